//! Root-mean-square normalisation.

use super::lanes::{self, Lanes, chunks, dispatch};
use super::pool::{Shards, part_len};
use super::{CpuBackend, Ctx, Isa, grow};
use crate::backend::Norm;

/// Rows times elements below which the rows are done on the calling thread.
const SERIAL_ELEMENTS: usize = 1 << 14;

/// Normalises each row of `x` into `normed`, which grows as needed; returns the `[T, n]` it wrote.
pub(super) fn rows<'a>(
    ctx: &mut Ctx,
    norm: Norm<'_, CpuBackend>,
    x: &[f32],
    n: usize,
    normed: &'a mut Vec<f32>,
) -> &'a [f32] {
    let weight = norm.weight.vector(n);
    let out = grow(normed, x.len());
    let (n_rows, isa) = (x.len() / n, ctx.isa);
    let shards = Shards::new(out);
    let len = part_len(n_rows, ctx.pool.n_threads(), 1, n_rows.max(1));
    let task = |i: usize| {
        for r in i * len..n_rows.min((i + 1) * len) {
            // SAFETY: row `r` belongs to this task alone.
            let out = unsafe { shards.part(r * n, n) };
            row(isa, &x[r * n..][..n], weight, norm.eps, out);
        }
    };
    match n_rows.div_ceil(len) {
        n_tasks if x.len() < SERIAL_ELEMENTS => (0..n_tasks).for_each(task),
        n_tasks => ctx.pool.run(n_tasks, &task),
    }
    out
}

/// `out = (x * r) * w` with `r = 1 / sqrt(mean(x^2) + eps)`.
pub(super) fn row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean_square = lanes::dot(isa, x, x) / x.len() as f32;
    scale(isa, x, 1.0 / (mean_square + eps).sqrt(), weight, out);
}

dispatch!(
    /// `out[i] = (x[i] * r) * weight[i]`.
    fn scale(x: &[f32], r: f32, weight: &[f32], out: &mut [f32]) = scale_lanes
);

#[inline(always)]
fn scale_lanes<S: Lanes>(s: S, x: &[f32], r: f32, weight: &[f32], out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "norm: lengths differ");
    let ((x, x_rest), (w, w_rest)) = (chunks(x), chunks(weight));
    let (out, out_rest) = out.as_chunks_mut::<16>();
    for ((x, w), out) in x.iter().zip(w).zip(out) {
        s.store(s.mul(s.mul(s.load(x), s.splat(r)), s.load(w)), out);
    }
    for ((x, w), out) in x_rest.iter().zip(w_rest).zip(out_rest) {
        *out = (x * r) * w;
    }
}
