//! What a GPU's memory and tensor cores give, measured: the limits that benchmarks are held against.

use super::{CudaBackend, GpuInfo};
use crate::backend::BackendError;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::peak;
use std::time::Instant;

/// A GPU's measured limits.
#[derive(Debug, Clone)]
pub struct GpuSpeed {
    /// The vendor's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub n_sms: u32,
    /// Bytes read and written per second by a large copy.
    pub copy_bytes_per_s: f64,
    /// Of the tensor cores, f16 in and f32 out, operands at hand: no product of matrices is faster.
    pub multiply_adds_per_s: f64,
}

/// Bytes of each side of the copy: many times the cache.
const COPY: usize = 1 << 30;
/// Steps of a launch: some milliseconds.
const STEPS: u32 = 2000;
const RUNS: usize = 5;

/// Measures the GPU with this UUID. Takes 2 GB of its memory for a moment.
///
/// # Errors
/// [`BackendError::Device`], [`BackendError::OutOfMemory`].
pub fn measure(uuid: &str) -> Result<GpuSpeed, BackendError> {
    let gpu = CudaBackend::open(uuid, None)?;
    let measured = copy_rate(&gpu).and_then(|copy| Ok((copy, multiply_rate(&gpu)?)));
    let (copy_bytes_per_s, multiply_adds_per_s) = measured.map_err(|e| gpu.error(e))?;
    let GpuInfo { name, capability, n_sms, .. } = gpu.info().clone();
    Ok(GpuSpeed { name, capability, n_sms, copy_bytes_per_s, multiply_adds_per_s })
}

fn copy_rate(gpu: &CudaBackend) -> Result<f64, CudaError> {
    let side = || gpu.work.arena.alloc::<u8>(COPY, "a side of the copy");
    let (from, to): (Buffer<u8>, Buffer<u8>) = (side()?, side()?);
    let seconds = best(gpu, 10, || to.copy_from(&from))?;
    Ok(2.0 * COPY as f64 / seconds)
}

fn multiply_rate(gpu: &CudaBackend) -> Result<f64, CudaError> {
    let sink = gpu.work.arena.alloc::<f32>(1, "nothing")?;
    let in_all = peak::multiply(&gpu.kernels, &sink, STEPS)?;
    let seconds = best(gpu, 3, || peak::multiply(&gpu.kernels, &sink, STEPS).map(drop))?;
    Ok(in_all as f64 / seconds)
}

/// Seconds of one `enqueue`, the best of some runs of `n` each.
fn best(gpu: &CudaBackend, n: usize, enqueue: impl Fn() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    enqueue()?;
    gpu.gpu.synchronize()?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        (0..n).try_for_each(|_| enqueue())?;
        gpu.gpu.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / n as f64);
    }
    Ok(best)
}
