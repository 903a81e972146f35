//! Normalise, project to q, k and v, rotate, write k and v.

use super::kv::KvCache;
use super::matmul::{self, Done, Group};
use super::pool::Shards;
use super::{CpuBackend, CpuTensor, Ctx, Isa, grow, norm, rope};
use crate::backend::{Batch, Linear, Norm, QkvOp};

/// The normalised rows, and the fresh keys and values.
pub(super) type Scratch<'a> = (&'a mut Vec<f32>, &'a mut (Vec<f32>, Vec<f32>));

/// See [`crate::backend::Backend::qkv`].
pub(super) fn run(
    ctx: &mut Ctx,
    batch: &Batch,
    kv: &mut KvCache,
    (normed, (keys, values)): Scratch<'_>,
    op: &QkvOp<'_, CpuBackend>,
    x: &CpuTensor,
    q: &mut CpuTensor,
) {
    let (n_tokens, dims) = (batch.tokens.len(), op.dims);
    kv.check(op.layer, dims.n_kv_heads, dims.head_dim);
    let n_in = op.q.weight.shape().2;
    let normed = norm::rows(ctx, op.norm, x.rows(n_tokens, n_in), n_in, normed);
    let (n_q, n_kv) = (dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim);
    let q = q.rows_mut(n_tokens, n_q);
    let (keys, values) = (grow(keys, n_tokens * n_kv), grow(values, n_tokens * n_kv));
    project(ctx, [op.q, op.k, op.v], normed, [&mut *q, &mut *keys, &mut *values]);

    let table = op.rope.table.mat(0);
    assert_eq!(table.n_cols, op.rope.n_rot, "the rotation table has a row of n_rot per position");
    for t in 0..n_tokens {
        let (q, k) = (&mut q[t * n_q..][..n_q], &mut keys[t * n_kv..][..n_kv]);
        let table = op.rope.table.row(batch.positions[t] as usize, op.rope.n_rot);
        for (heads, norm) in [(q, op.qk_norm.map(|n| n.0)), (&mut *k, op.qk_norm.map(|n| n.1))] {
            for head in heads.chunks_exact_mut(dims.head_dim) {
                normalise_head(ctx.isa, norm, head);
                rope::rotate(head, &table, op.rope.pairing);
            }
        }
        kv.write(op.layer, batch.slots[t] as usize, k, &values[t * n_kv..][..n_kv]);
    }
}

/// Three products of the same columns in one parallel region.
fn project(ctx: &mut Ctx, linears: [Linear<'_, CpuBackend>; 3], normed: &[f32], outs: [&mut [f32]; 3]) {
    let n_in = linears[0].weight.shape().2;
    let cols: Vec<&[f32]> = normed.chunks_exact(n_in).collect();
    let widths = linears.map(|l| l.weight.shape().1);
    for (out, width) in outs.iter().zip(widths) {
        assert_eq!(out.len(), cols.len() * width, "a projection is as wide as its heads");
    }
    let groups = linears.map(|l| Group { mats: vec![l.weight.mat(0)], cols: cols.clone() });
    let biases = std::array::from_fn::<_, 3, _>(|i| linears[i].bias.map(|b| b.vector(widths[i])));
    let shards = outs.map(Shards::new);
    matmul::multiply(ctx, &groups, &|done: Done<'_>| {
        let (shard, width, bias) = (shards[done.group], widths[done.group], biases[done.group]);
        for t in 0..done.n_cols {
            // SAFETY: these rows of column `t` belong to this task alone.
            let out = unsafe { shard.part(t * width + done.first_row, done.n_rows) };
            done.column(0, t, bias, out);
        }
    });
}

fn normalise_head(isa: Isa, norm: Option<Norm<'_, CpuBackend>>, head: &mut [f32]) {
    if let Some(norm) = norm {
        let x = head.to_vec();
        norm::row(isa, &x, norm.weight.vector(x.len()), norm.eps, head);
    }
}
