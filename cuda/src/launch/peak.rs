//! The most multiply-adds that a device gives, for benchmarks to be held against.

use crate::arena::Buffer;
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// Multiply-adds of one step of a block: 32 tiles of 64 x 128 x 16 in each of two warpgroups.
const PER_STEP: u64 = 2 * 32 * 64 * 128 * 16;

/// Enqueues `n_steps` steps on every multiprocessor, and says how many multiply-adds they are.
///
/// # Errors
/// [`CudaError::Contract`] where `sink` has no element; a failed launch.
pub fn multiply(kernels: &Kernels, sink: &Buffer<f32>, n_steps: u32) -> Result<u64, CudaError> {
    if sink.is_empty() || i32::try_from(n_steps).is_err() {
        let (expected, found) =
            ("a place for a sum, steps that fit an i32".into(), format!("{}, {n_steps}", sink.len()));
        return Err(CudaError::Contract { op: "peak::multiply".into(), expected, found });
    }
    let n_blocks = 2 * kernels.gpu().info().n_sms;
    let args = Args::new().with(sink.ptr()).with(n_steps as i32);
    let launch = Launch::new((n_blocks, 1, 1), (256, 1, 1));
    // SAFETY: the arguments are the kernel's parameters in order; the sink has an element.
    unsafe { kernels.get("peak", "peak_multiply", 0)?.launch(kernels.gpu(), launch, args)? };
    Ok(u64::from(n_blocks) * u64::from(n_steps) * PER_STEP)
}
