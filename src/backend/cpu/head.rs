//! The last norm and the projection to the vocabulary, for the rows whose logits are wanted.

use super::matmul::{self, Done, Group};
use super::pool::Shards;
use super::{CpuBackend, CpuTensor, Ctx, grow, math, norm};
use crate::backend::{Batch, HeadOp};

/// See [`crate::backend::Backend::head`].
pub(super) fn run(
    ctx: &mut Ctx,
    batch: &Batch,
    normed: &mut Vec<f32>,
    op: &HeadOp<'_, CpuBackend>,
    x: &CpuTensor,
    logits: &mut CpuTensor,
) {
    let (_, n_vocab, n_in) = op.output.weight.shape();
    let (weight, isa) = (op.norm.weight.vector(n_in), ctx.isa);
    let x = x.rows(batch.tokens.len(), n_in);
    let normed = grow(normed, batch.logit_rows.len() * n_in);
    for (&row, out) in batch.logit_rows.iter().zip(normed.chunks_exact_mut(n_in)) {
        norm::row(isa, &x[row as usize * n_in..][..n_in], weight, op.norm.eps, out);
    }
    let group = Group { mats: vec![op.output.weight.mat(0)], cols: normed.chunks_exact(n_in).collect() };
    let bias = op.output.bias.map(|b| b.vector(n_vocab));
    let shards = Shards::new(logits.rows_mut(batch.logit_rows.len(), n_vocab));
    matmul::multiply(ctx, &[group], &|done: Done<'_>| {
        for r in 0..done.n_cols {
            // SAFETY: these rows of column `r` belong to this task alone.
            let out = unsafe { shards.part(r * n_vocab + done.first_row, done.n_rows) };
            done.column(0, r, bias, out);
            math::softcap(out, op.softcap);
        }
    });
}
