//! What a GPU's memory and tensor cores give, measured: the limits that benchmarks are held against.

use super::{CudaBackend, GpuInfo};
use crate::backend::BackendError;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matmul::{Experts, Output, Product, half_rows};
use playhouse_cuda::launch::matrix::{Format, Layout, Matrix, Part};
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
    /// Of our own product of f16 matrices of 8192 x 8192.
    pub multiply_adds_per_s: f64,
}

/// Bytes of each side of the copy: many times the cache.
const COPY: usize = 1 << 30;
/// Rows, columns and depth of the product.
const SIDE: usize = 8192;
const RUNS: usize = 5;

/// Measures the GPU with this UUID. Takes 3 GB of its memory for a moment.
///
/// # Errors
/// [`BackendError::Device`], [`BackendError::OutOfMemory`].
pub fn measure(uuid: &str) -> Result<GpuSpeed, BackendError> {
    let gpu = CudaBackend::open(uuid, None)?;
    let measured = copy_rate(&gpu).and_then(|copy| Ok((copy, product_rate(&gpu)?)));
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

fn product_rate(gpu: &CudaBackend) -> Result<f64, CudaError> {
    let arena = &gpu.work.arena;
    let format = Format::by_name("F16").expect("a format of ours");
    // Random bits would be NaN and infinite in part, zeros run too fast: small numbers of either sign.
    let numbers: Vec<half::f16> =
        (0..SIDE * SIDE).map(|i| half::f16::from_f32(((i * 7919 % 1009) as f32 - 504.0) / 500.0)).collect();
    let source = arena.alloc::<half::f16>(SIDE * SIDE, "numbers")?;
    source.write(&numbers)?;
    let matrix = Matrix::new(arena, "a square", &[Part { format, n_rows: SIDE }], Layout::Stacked, SIDE, 1)?;
    matrix.fill(&gpu.kernels, 0, format, &[&source.cast()])?;
    let x = half_rows(arena, "columns", SIDE, SIDE)?;
    x.data.copy_from(&source)?;
    let y = half_rows(arena, "results", SIDE, SIDE)?;
    let partial = arena.alloc::<f32>(1, "nothing")?;
    let output = Output::StoreHalf(y);
    let product = Product { matrix: &matrix, x: &x, n: SIDE, bias: None, bias_up: None, experts: Experts::One, output };
    let seconds = best(gpu, 3, || product.launch(&gpu.kernels, &partial))?;
    Ok((SIDE * SIDE * SIDE) as f64 / seconds)
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
