//! A GPU of this process: found by UUID, with a context and a stream.

use crate::error::{CudaError, check};
use cudarc::driver::sys::{self, CUdevice_attribute as Attr};
use std::ffi::{c_int, c_uint};
use std::sync::Arc;

/// What does not change about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`: the only name that NVML, CUDA and the config agree on.
    pub uuid: String,
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub n_sms: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: u64,
    /// Bytes of memory in all.
    pub memory_bytes: u64,
}

/// Bytes of shared memory of a multiprocessor. The driver keeps [`SHARED_OF_DRIVER`] of them for each block.
pub(crate) fn shared_of_multiprocessor(capability: (u32, u32)) -> usize {
    match capability {
        (8, 0) => 164 << 10,
        (9 | 10, _) => 228 << 10,
        _ => 100 << 10,
    }
}

/// Bytes of shared memory that the driver keeps for each block.
pub(crate) const SHARED_OF_DRIVER: usize = 1 << 10;

/// A device with a context and a stream, owned by one thread at a time.
///
/// The stream is non-blocking with respect to the legacy default stream. Dropping the last handle destroys both; on a
/// device that has failed the driver's refusals are ignored, the process is about to end.
#[derive(Debug, Clone)]
pub struct Gpu(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    info: GpuInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
}

// SAFETY: driver handles may be used from any thread once the context is bound to it, which `bind` does; `Inner` has no
// other state.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver serialises calls on one context.
unsafe impl Sync for Inner {}

/// Lists the devices this process sees, in CUDA's order. An absent driver or an empty box is `Unavailable`.
///
/// # Errors
/// [`CudaError::Unavailable`] or a failed driver call.
pub fn visible_gpus() -> Result<Vec<GpuInfo>, CudaError> {
    init()?;
    let mut n: c_int = 0;
    // SAFETY: the driver is initialised and writes one integer.
    check(unsafe { sys::cuDeviceGetCount(&mut n) }, "-", || "cuDeviceGetCount".into())?;
    (0..n).map(|i| device_at(i).and_then(info)).collect()
}

/// Loads the driver and initialises it once.
fn init() -> Result<(), CudaError> {
    // SAFETY: probing for the library has no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::Unavailable("libcuda.so.1 is not installed (the NVIDIA driver)".into()));
    }
    // SAFETY: cuInit may be called any number of times.
    let result = unsafe { sys::cuInit(0) };
    check(result, "-", || "cuInit".into()).map_err(|e| CudaError::Unavailable(e.to_string()))
}

fn device_at(ordinal: c_int) -> Result<sys::CUdevice, CudaError> {
    let mut device = 0;
    // SAFETY: the ordinal is below the count; one integer is written.
    check(unsafe { sys::cuDeviceGet(&mut device, ordinal) }, "-", || format!("cuDeviceGet({ordinal})"))?;
    Ok(device)
}

fn attribute(device: sys::CUdevice, attribute: Attr) -> Result<u32, CudaError> {
    let mut value: c_int = 0;
    // SAFETY: one integer is written.
    let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    check(result, "-", || format!("cuDeviceGetAttribute({attribute:?})"))?;
    Ok(value as u32)
}

fn info(device: sys::CUdevice) -> Result<GpuInfo, CudaError> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: sixteen bytes are written.
    check(unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }, "-", || "cuDeviceGetUuid".into())?;
    let mut name = [0_u8; 256];
    // SAFETY: at most 256 bytes are written, with a final zero.
    let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) };
    check(result, "-", || "cuDeviceGetName".into())?;
    let mut memory_bytes = 0;
    // SAFETY: one size is written.
    check(unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, device) }, "-", || "cuDeviceTotalMem".into())?;
    Ok(GpuInfo {
        uuid: format_uuid(&uuid.bytes.map(|b| b as u8)),
        name: String::from_utf8_lossy(name.split(|b| *b == 0).next().unwrap_or(&[])).into_owned(),
        capability: (
            attribute(device, Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        n_sms: attribute(device, Attr::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: attribute(device, Attr::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        memory_bytes: memory_bytes as u64,
    })
}

/// `GPU-` and the bytes in groups of 4-2-2-2-6, as NVML prints them.
fn format_uuid(bytes: &[u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let group = |range: std::ops::Range<usize>| hex[range].concat();
    format!("GPU-{}-{}-{}-{}-{}", group(0..4), group(4..6), group(6..8), group(8..10), group(10..16))
}

impl Gpu {
    /// Opens the device with this UUID and makes its context current on the calling thread.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] without a driver or kernels, [`CudaError::NoSuchDevice`], or a failed driver call.
    pub fn open(uuid: &str) -> Result<Gpu, CudaError> {
        let visible = visible_gpus()?;
        let ordinal = visible.iter().position(|g| g.uuid == uuid).ok_or_else(|| CudaError::NoSuchDevice {
            wanted: uuid.to_owned(),
            visible: visible.iter().map(|g| g.uuid.as_str()).collect::<Vec<_>>().join(", "),
        })?;
        let info = visible[ordinal].clone();
        let device = device_at(ordinal as c_int)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device is valid; a context handle is written.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) };
        check(result, uuid, || "cuDevicePrimaryCtxRetain".into())?;
        // SAFETY: the context was just retained.
        check(unsafe { sys::cuCtxSetCurrent(context) }, uuid, || "cuCtxSetCurrent".into())?;
        let mut stream = std::ptr::null_mut();
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: a context is current; a stream handle is written.
        check(unsafe { sys::cuStreamCreate(&mut stream, non_blocking) }, uuid, || "cuStreamCreate".into())?;
        Ok(Gpu(Arc::new(Inner { info, device, context, stream })))
    }

    /// What does not change about the device.
    pub fn info(&self) -> &GpuInfo {
        &self.0.info
    }

    /// The device's UUID, for messages.
    pub fn uuid(&self) -> &str {
        &self.0.info.uuid
    }

    /// Makes the context current on the calling thread: once per thread that uses the device.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as self.
        self.check(unsafe { sys::cuCtxSetCurrent(self.0.context) }, || "cuCtxSetCurrent".into())
    }

    /// Waits until everything enqueued on the stream has run.
    ///
    /// # Errors
    /// The first failure of anything enqueued; a sticky one ends the process's use of GPUs.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives as long as self.
        self.check(unsafe { sys::cuStreamSynchronize(self.0.stream) }, || "cuStreamSynchronize".into())
    }

    /// Bytes free on the device now, other processes' use taken off.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current on this thread; two sizes are written.
        self.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, || "cuMemGetInfo".into())?;
        Ok(free as u64)
    }

    /// Bytes in use on the device now, by every process.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn used_bytes(&self) -> Result<u64, CudaError> {
        Ok(self.info().memory_bytes - self.free_bytes()?)
    }

    /// The stream that everything is enqueued on.
    pub fn stream(&self) -> sys::CUstream {
        self.0.stream
    }

    pub(crate) fn device(&self) -> sys::CUdevice {
        self.0.device
    }

    pub(crate) fn check(&self, result: sys::CUresult, op: impl FnOnce() -> String) -> Result<(), CudaError> {
        check(result, self.uuid(), op)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the handles are ours and this is their last use. A failed device refuses; there is nothing to add to
        // the error that was already reported.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_prints_as_nvml_prints_it() {
        let bytes = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(format_uuid(&bytes), "GPU-12345678-9abc-def0-0102-030405060708");
    }
}
