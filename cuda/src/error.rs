//! Errors of the driver, each with the operation, the device and the launch it belongs to.

use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;

/// Why something on a GPU did not work.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// There is no GPU to be had in this process.
    #[error("no usable GPU: {0}")]
    Unavailable(String),
    /// The device asked for is not visible to this process.
    #[error("GPU {wanted} is not visible: {visible}")]
    NoSuchDevice {
        /// UUID as configured.
        wanted: String,
        /// The UUIDs that are.
        visible: String,
    },
    /// Memory ran out. Everything allocated before is intact and usable.
    #[error("out of memory on {device}: {what} needs {requested} bytes, {free} are free")]
    OutOfMemory {
        /// The device's UUID.
        device: String,
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free when it failed.
        free: u64,
    },
    /// The driver refused or failed a call.
    #[error("{op} on {device}: {code} ({text})")]
    Driver {
        /// The device's UUID, or `-`.
        device: String,
        /// The call, with the launch configuration where there is one.
        op: String,
        /// `CUresult` as a number; `cuda.h` names them.
        code: u32,
        /// The driver's name and words for it.
        text: String,
    },
    /// A launcher was called against its contract: a mistake of ours, found before the device saw it.
    #[error("{op}: expected {expected}, found {found}")]
    Contract {
        /// The launcher.
        op: String,
        /// What the contract says.
        expected: String,
        /// What came.
        found: String,
    },
}

impl CudaError {
    /// Whether this process can never use a GPU again: `cuda.h` says of these results that the process must be
    /// terminated and relaunched, and on multi-GPU boxes every context of the process is lost with them.
    pub fn is_sticky(&self) -> bool {
        const STICKY: &[u32] = &[214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999];
        matches!(self, CudaError::Driver { code, .. } if STICKY.contains(code))
    }
}

/// Turns a driver result into an error that says what was being done.
pub(crate) fn check(result: CUresult, device: &str, op: impl FnOnce() -> String) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Driver { device: device.to_owned(), op: op(), code: result as u32, text: describe(result) })
}

fn describe(result: CUresult) -> String {
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut pointer = std::ptr::null();
        // SAFETY: the driver is loaded (it gave us `result`) and sets the pointer to a static string or to null.
        unsafe {
            get(result, &mut pointer);
            if pointer.is_null() { "unknown".into() } else { CStr::from_ptr(pointer).to_string_lossy().into_owned() }
        }
    };
    format!("{}: {}", text(sys::cuGetErrorName), text(sys::cuGetErrorString))
}
