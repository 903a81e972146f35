//! The gate of a feed-forward network after two products: for gate and up matrices of different kinds, which cannot be fused.

use super::matmul::Gate;
use super::matrix::HalfRows;
use crate::arena::Buffer;
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// Enqueues `h = act(g, u)` for `n` rows of `n_rows` elements; `g` and `u` are f32 `[n, n_rows]`.
///
/// # Errors
/// [`CudaError::Contract`]; a failed launch.
pub fn gate_up(
    kernels: &Kernels,
    gate: Gate,
    (g, u): (&Buffer<f32>, &Buffer<f32>),
    n_rows: usize,
    h: &HalfRows,
    n: usize,
) -> Result<(), CudaError> {
    let cells = n * n_rows;
    if cells == 0 || g.len() < cells || u.len() < cells || h.stride < n_rows || h.data.len() < n * h.stride {
        return Err(CudaError::Contract {
            op: "gate_up".into(),
            expected: format!("1 or more rows of {n_rows}, {n} said"),
            found: format!("{} and {} elements, h of {} in rows of {}", g.len(), u.len(), h.data.len(), h.stride),
        });
    }
    let (alpha, limit) = gate.numbers();
    let args = Args::new()
        .with(h.data.ptr())
        .with(g.ptr())
        .with(u.ptr())
        .with(n_rows as i32)
        .with(h.stride as i32)
        .with(alpha)
        .with(limit);
    let mut launch = Launch::new((n_rows.div_ceil(256) as u32, n as u32, 1), (256, 1, 1));
    launch.overlap = true;
    // SAFETY: the arguments are the kernel's parameters in order; the checks above held the buffers against the shapes.
    unsafe { kernels.get("gate", "gate_up", 0)?.launch(kernels.gpu(), launch, args) }
}
