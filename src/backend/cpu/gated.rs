//! Gated feed-forward, and the projection back into the residual stream.

use super::lanes::{Lanes, chunks, dispatch, padded};
use super::matmul::{self, Done, Group};
use super::pool::Shards;
use super::{CpuBackend, CpuTensor, Ctx, math, norm};
use crate::backend::{Activation, GatedOp, Linear};

/// See [`crate::backend::Backend::gated`].
pub(super) fn run(
    ctx: &mut Ctx,
    n_tokens: usize,
    normed: &mut Vec<f32>,
    op: &GatedOp<'_, CpuBackend>,
    x: &CpuTensor,
    h: &mut CpuTensor,
) {
    let (_, n_out, n_in) = op.gate.weight.shape();
    let normed = norm::rows(ctx, op.norm, x.rows(n_tokens, n_in), n_in, normed);
    let group =
        Group { mats: vec![op.gate.weight.mat(0), op.up.weight.mat(0)], cols: normed.chunks_exact(n_in).collect() };
    let (gate_bias, up_bias) = (op.gate.bias.map(|b| b.vector(n_out)), op.up.bias.map(|b| b.vector(n_out)));
    let (shards, isa) = (Shards::new(h.rows_mut(n_tokens, n_out)), ctx.isa);
    matmul::multiply(ctx, &[group], &|done: Done<'_>| {
        let mut up = [0.0; matmul::TASK_ROWS];
        let up = &mut up[..done.n_rows];
        for t in 0..done.n_cols {
            // SAFETY: these rows of column `t` belong to this task alone.
            let out = unsafe { shards.part(t * n_out + done.first_row, done.n_rows) };
            done.column(0, t, gate_bias, out);
            done.column(1, t, up_bias, up);
            activate(isa, op.activation, out, up);
        }
    });
}

/// See [`crate::backend::Backend::linear_residual`].
pub(super) fn linear_residual(
    ctx: &mut Ctx,
    n_tokens: usize,
    linear: Linear<'_, CpuBackend>,
    a: &CpuTensor,
    x: &mut CpuTensor,
) {
    let (_, n_out, n_in) = linear.weight.shape();
    let cols = a.rows(n_tokens, n_in).chunks_exact(n_in).collect();
    let group = Group { mats: vec![linear.weight.mat(0)], cols };
    let bias = linear.bias.map(|b| b.vector(n_out));
    let shards = Shards::new(x.rows_mut(n_tokens, n_out));
    matmul::multiply(ctx, &[group], &|done: Done<'_>| {
        let mut y = [0.0; matmul::TASK_ROWS];
        let y = &mut y[..done.n_rows];
        for t in 0..done.n_cols {
            done.column(0, t, bias, y);
            // SAFETY: these rows of column `t` belong to this task alone.
            let x = unsafe { shards.part(t * n_out + done.first_row, done.n_rows) };
            x.iter_mut().zip(&*y).for_each(|(x, y)| *x += y);
        }
    });
}

dispatch!(
    /// `gate = act(gate, up)`, element by element.
    pub(super) fn activate(activation: Activation, gate: &mut [f32], up: &[f32]) = activate_lanes
);

#[inline(always)]
fn activate_lanes<S: Lanes>(s: S, activation: Activation, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up are equally long");
    let (up, up_rest) = chunks(up);
    let (gate, gate_rest) = gate.as_chunks_mut::<16>();
    for (gate, up) in gate.iter_mut().zip(up) {
        s.store(act(s, activation, s.load(gate), s.load(up)), gate);
    }
    if !gate_rest.is_empty() {
        let mut out = [0.0; 16];
        s.store(act(s, activation, s.load(&padded(gate_rest)), s.load(&padded(up_rest))), &mut out);
        gate_rest.copy_from_slice(&out[..gate_rest.len()]);
    }
}

#[inline(always)]
fn act<S: Lanes>(s: S, activation: Activation, g: S::F, u: S::F) -> S::F {
    match activation {
        Activation::SwiGlu => s.mul(s.mul(g, math::sigmoid_lanes(s, g)), u),
        Activation::SwiGluClamped { alpha, limit } => {
            let g = s.min(s.splat(limit), g);
            let u = s.max(s.splat(-limit), s.min(s.splat(limit), u));
            let sigmoid = math::sigmoid_lanes(s, s.mul(s.splat(alpha), g));
            s.mul(s.mul(g, sigmoid), s.add(u, s.splat(1.0)))
        }
    }
}
