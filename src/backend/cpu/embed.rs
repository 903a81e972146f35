//! Token ids to rows of the embedding table.

use super::{CpuTensor, CpuWeight, Ctx, matmul};
use crate::backend::Batch;

/// `x[t] = scale * table[tokens[t]]`.
pub(super) fn run(ctx: &Ctx, batch: &Batch, table: &CpuWeight, scale: f32, x: &mut CpuTensor) {
    let mat = table.mat(0);
    let x = x.rows_mut(batch.tokens.len(), mat.n_cols);
    for (&token, x) in batch.tokens.iter().zip(x.chunks_exact_mut(mat.n_cols)) {
        assert!((token as usize) < mat.n_rows, "token {token} of a vocabulary of {}", mat.n_rows);
        matmul::decode_row(ctx.isa, mat.dtype, mat.row(token as usize), x);
        if scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= scale);
        }
    }
}
