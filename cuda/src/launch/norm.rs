//! Root-mean-square normalisation of rows, and plain rounding of rows to f16.

use super::matrix::HalfRows;
use crate::arena::Buffer;
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// Arguments of [`rms_norm`].
#[derive(Debug, Clone)]
pub struct RmsNorm<'a> {
    /// f32 `[rows of x, n_cols]`.
    pub x: &'a Buffer<f32>,
    /// f32 `[n_cols]`.
    pub weight: &'a Buffer<f32>,
    /// Which rows of x, each below their number; `0..n` if `None`.
    pub rows: Option<&'a Buffer<u32>>,
    /// Added to the mean square.
    pub eps: f32,
    /// f16 `[n, stride]`.
    pub y: &'a HalfRows,
}

/// Enqueues the normalisation of `n` rows.
///
/// # Errors
/// [`CudaError::Contract`]; a failed launch.
pub fn rms_norm(kernels: &Kernels, op: &RmsNorm<'_>, n: usize) -> Result<(), CudaError> {
    let n_cols = op.weight.len();
    check_rows("rms_norm", n, n_cols, op.rows.map_or(n, |_| 1), op.x, op.y)?;
    if let Some(rows) = op.rows.filter(|rows| rows.len() < n) {
        return Err(contract("rms_norm: rows", format!("{n} indices"), rows.len()));
    }
    let args = Args::new()
        .with(op.y.data.ptr())
        .with(op.x.ptr())
        .with(op.weight.ptr())
        .with(op.rows.map_or(0, Buffer::ptr))
        .with(n_cols as i32)
        .with(op.y.stride as i32)
        .with(op.eps);
    let mut launch = Launch::new((n as u32, 1, 1), (256, 1, 1));
    launch.overlap = true;
    // SAFETY: the arguments are the kernel's parameters in order; the checks held the buffers against the shapes, and row
    // indices are validated where the batch is made.
    unsafe { kernels.get("norm", "rms_norm", 0)?.launch(kernels.gpu(), launch, args) }
}

/// Enqueues `y = x` in f16, saturating, for `n` rows of `n_cols`; the padding of `y` becomes zero.
///
/// # Errors
/// [`CudaError::Contract`]; a failed launch.
pub fn to_half(kernels: &Kernels, x: &Buffer<f32>, n_cols: usize, y: &HalfRows, n: usize) -> Result<(), CudaError> {
    check_rows("to_half", n, n_cols, n, x, y)?;
    let args = Args::new().with(y.data.ptr()).with(x.ptr()).with(n_cols as i32).with(y.stride as i32);
    let mut launch = Launch::new((y.stride.div_ceil(256) as u32, n as u32, 1), (256, 1, 1));
    launch.overlap = true;
    // SAFETY: as above.
    unsafe { kernels.get("half", "to_half_rows", 0)?.launch(kernels.gpu(), launch, args) }
}

/// Enqueues `x = cap * tanh(x / cap)` for the first `n` elements.
///
/// # Errors
/// [`CudaError::Contract`]; a failed launch.
pub fn softcap(kernels: &Kernels, x: &Buffer<f32>, n: usize, cap: f32) -> Result<(), CudaError> {
    if n == 0 || n > x.len() || cap <= 0.0 {
        return Err(contract("softcap", format!("1 to {} elements, a positive cap", x.len()), format!("{n}, {cap}")));
    }
    let args = Args::new().with(x.ptr()).with(n as u64).with(cap);
    let mut launch = Launch::new((n.div_ceil(256) as u32, 1, 1), (256, 1, 1));
    launch.overlap = true;
    // SAFETY: the arguments are the kernel's parameters in order; `x` has `n` elements.
    unsafe { kernels.get("softcap", "softcap", 0)?.launch(kernels.gpu(), launch, args) }
}

/// Holds `x_rows` rows of `n_cols` in x and `n` in y against the buffers.
fn check_rows(
    op: &str,
    n: usize,
    n_cols: usize,
    x_rows: usize,
    x: &Buffer<f32>,
    y: &HalfRows,
) -> Result<(), CudaError> {
    if n == 0 || n_cols == 0 || x.len() < x_rows * n_cols {
        return Err(contract(&format!("{op}: x"), format!("1 or more rows of {n_cols}, {n} said"), x.len()));
    }
    if y.stride < n_cols || y.data.len() < n * y.stride {
        let found = format!("{} elements, stride {}", y.data.len(), y.stride);
        return Err(contract(&format!("{op}: y"), format!("{n} rows of {n_cols} or more"), found));
    }
    Ok(())
}

fn contract(op: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: op.to_owned(), expected: expected.to_string(), found: found.to_string() }
}
