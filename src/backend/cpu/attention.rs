//! Causal attention over the paged cache.
//!
//! A task is a few neighbouring tokens of one sequence and one kv head with its group of query heads: the keys of a
//! block are multiplied with all their queries at once, as a matrix. A token's softmax and its weighted sum of values
//! run over its own positions in ascending order, so neither its neighbours nor the cut into tasks change a bit.

use super::kv::KvCache;
use super::lanes::{self, Lanes, dispatch};
use super::pool::Shards;
use super::{CpuBackend, CpuTensor, Ctx, Isa, grow, math, matmul};
use crate::backend::{AttentionOp, BLOCK_TOKENS, Batch, SeqSpan};
use std::cell::RefCell;
use std::ops::Range;

/// Most tokens in one task.
const TASK_TOKENS: usize = 8;
/// Queries that share the loads of a value.
const QUERIES: usize = 4;
/// Multiply-adds below which a fork costs more than it saves.
const SERIAL_MACS: usize = 1 << 15;

/// Tokens `first .. first + n` of a sequence with one kv head.
#[derive(Debug, Clone, Copy)]
struct Task<'a> {
    span: &'a SeqSpan,
    /// Counted within the span.
    first: usize,
    n_tokens: usize,
    kv_head: usize,
}

impl Task<'_> {
    /// Position of the task's `i`-th token.
    fn position(&self, i: usize) -> usize {
        self.span.kv_len - self.span.n_tokens + self.first + i
    }
}

thread_local! {
    /// Scores `[queries][positions]`, products of a block, decoded rows.
    static SCRATCH: RefCell<[Vec<f32>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

/// See [`crate::backend::Backend::attention`].
pub(super) fn run(
    ctx: &mut Ctx,
    batch: &Batch,
    kv: &KvCache,
    op: &AttentionOp<'_, CpuBackend>,
    q: &CpuTensor,
    out: &mut CpuTensor,
) {
    let (n_tokens, dims) = (batch.tokens.len(), op.dims);
    kv.check(op.layer, dims.n_kv_heads, dims.head_dim);
    assert_eq!(dims.n_heads % dims.n_kv_heads, 0, "query heads come in whole groups");
    let width = dims.n_heads * dims.head_dim;
    let (q, out) = (q.rows(n_tokens, width), Shards::new(out.rows_mut(n_tokens, width)));
    let (tasks, isa) = (tasks(batch, dims.n_kv_heads), ctx.isa);
    let run = |task: &Task<'_>| SCRATCH.with_borrow_mut(|scratch| attend(isa, kv, op, task, q, out, scratch));
    let macs: usize = batch.spans.iter().map(|s| s.n_tokens * s.kv_len * width).sum();
    if macs < SERIAL_MACS {
        tasks.iter().for_each(run);
    } else {
        ctx.pool.run(tasks.len(), &|i| run(&tasks[i]));
    }
}

fn tasks(batch: &Batch, n_kv_heads: usize) -> Vec<Task<'_>> {
    let mut tasks = Vec::new();
    for span in &batch.spans {
        assert!(span.n_tokens <= span.kv_len && span.kv_len <= span.blocks.len() * BLOCK_TOKENS, "span {span:?}");
        for first in (0..span.n_tokens).step_by(TASK_TOKENS) {
            let n_tokens = TASK_TOKENS.min(span.n_tokens - first);
            tasks.extend((0..n_kv_heads).map(|kv_head| Task { span, first, n_tokens, kv_head }));
        }
    }
    tasks
}

/// One task: scores, softmax, weighted values.
fn attend(
    isa: Isa,
    kv: &KvCache,
    op: &AttentionOp<'_, CpuBackend>,
    task: &Task<'_>,
    q: &[f32],
    out: Shards<'_>,
    [scores, products, panel]: &mut [Vec<f32>; 3],
) {
    let (hs, group) = (op.dims.head_dim, op.dims.n_heads / op.dims.n_kv_heads);
    let first_seen = |i: usize| op.window.map_or(0, |w| (task.position(i) + 1).saturating_sub(w));
    let (begin, end) = (first_seen(0), task.position(task.n_tokens - 1) + 1);
    let n_seen = end - begin;
    // Query `i * group + g` is query head `kv_head * group + g` of the task's token `i`.
    let n_queries = task.n_tokens * group;
    let query_head = |query: usize| task.kv_head * group + query % group;
    let at = |query: usize| ((task.span.first + task.first + query / group) * op.dims.n_heads + query_head(query)) * hs;
    let queries: Vec<&[f32]> = (0..n_queries).map(|i| &q[at(i)..][..hs]).collect();
    let scores = grow(scores, n_queries * n_seen);
    let blocks =
        || (begin / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS)).map(|b| BlockPart::new(task.span, b, begin, end));

    for part in blocks() {
        let (keys, _) = kv.block(op.layer, part.block, task.kv_head);
        let products = grow(products, part.n * n_queries);
        matmul::rows(isa, &keys, part.offset, part.n, &queries, panel, products);
        for (j, products) in products.chunks_exact(n_queries).enumerate() {
            for (query, product) in products.iter().enumerate() {
                scores[query * n_seen + part.position - begin + j] = product * op.scale;
            }
        }
    }

    let sinks = op.sinks.map(|s| s.vector(op.dims.n_heads));
    let mut seen = Vec::with_capacity(n_queries);
    let mut sums = Vec::with_capacity(n_queries);
    for query in 0..n_queries {
        let token = query / group;
        let range = first_seen(token) - begin..task.position(token) + 1 - begin;
        let row = &mut scores[query * n_seen..][..n_seen];
        math::softcap(&mut row[range.clone()], op.softcap);
        sums.push(softmax(isa, &mut row[range.clone()], sinks.map(|s| s[query_head(query)])));
        seen.push(range);
    }

    // SAFETY: a token's query head belongs to one task alone.
    let mut outs: Vec<&mut [f32]> = (0..n_queries).map(|i| unsafe { out.part(at(i), hs) }).collect();
    outs.iter_mut().for_each(|o| o.fill(0.0));
    for part in blocks() {
        let (_, values) = kv.block(op.layer, part.block, task.kv_head);
        let rows = match values.f32s() {
            Some(all) => &all[part.offset * hs..][..part.n * hs],
            None => {
                let panel = grow(panel, part.n * hs);
                for (j, row) in panel.chunks_exact_mut(hs).enumerate() {
                    matmul::decode_row(isa, values.dtype, values.row(part.offset + j), row);
                }
                panel
            }
        };
        let from = part.position - begin;
        // The heads of a token see the same positions.
        for (token, outs) in outs.chunks_mut(group).enumerate() {
            let seen = &seen[token * group];
            let range = seen.start.max(from)..seen.end.min(from + part.n);
            if range.is_empty() {
                continue;
            }
            let rows = &rows[(range.start - from) * hs..(range.end - from) * hs];
            for (g, outs) in outs.chunks_mut(QUERIES).enumerate() {
                let query = token * group + g * QUERIES;
                let weights = &scores[query * n_seen..];
                match outs {
                    [a, b, c, d] => add_weighted_4(isa, weights, n_seen, range.clone(), rows, [a, b, c, d]),
                    outs => outs.iter_mut().enumerate().for_each(|(i, out)| {
                        add_weighted_1(isa, &weights[i * n_seen..], n_seen, range.clone(), rows, [out]);
                    }),
                }
            }
        }
    }
    for (out, sum) in outs.iter_mut().zip(sums) {
        out.iter_mut().for_each(|o| *o /= sum);
    }
}

/// The rows of one KV block that a task sees.
struct BlockPart {
    block: usize,
    /// First row in the block, and its position in the sequence.
    offset: usize,
    position: usize,
    n: usize,
}

impl BlockPart {
    fn new(span: &SeqSpan, index: usize, begin: usize, end: usize) -> Self {
        let first = index * BLOCK_TOKENS;
        let position = first.max(begin);
        let n = end.min(first + BLOCK_TOKENS) - position;
        Self { block: span.blocks[index] as usize, offset: position - first, position, n }
    }
}

/// Turns scores into `exp(score - max)` and returns their sum, the sink's included.
fn softmax(isa: Isa, scores: &mut [f32], sink: Option<f32>) -> f32 {
    let max = lanes::max(isa, scores, sink.unwrap_or(f32::NEG_INFINITY));
    math::exp_minus(isa, scores, max);
    let sum = lanes::sum(isa, scores);
    sink.map_or(sum, |sink| sum + math::exp(sink - max))
}

dispatch!(
    /// [`add_weighted_lanes`] for four queries.
    fn add_weighted_4(weights: &[f32], stride: usize, range: Range<usize>, rows: &[f32], outs: [&mut [f32]; QUERIES])
        = add_weighted_lanes
);
dispatch!(
    /// [`add_weighted_lanes`] for one query.
    fn add_weighted_1(weights: &[f32], stride: usize, range: Range<usize>, rows: &[f32], outs: [&mut [f32]; 1])
        = add_weighted_lanes
);

/// `outs[q] += sum_j weights[q * stride + j] * rows[j]`, `j` ascending over `range`, of which `rows` holds one each.
#[inline(always)]
fn add_weighted_lanes<S: Lanes, const Q: usize>(
    s: S,
    weights: &[f32],
    stride: usize,
    range: Range<usize>,
    rows: &[f32],
    mut outs: [&mut [f32]; Q],
) {
    let n = outs[0].len();
    assert_eq!(rows.len(), range.len() * n, "a row per weight");
    let mut w = [&[][..]; Q];
    for q in 0..Q {
        w[q] = &weights[q * stride..][range.clone()];
    }
    let mut at = 0;
    while at + 32 <= n {
        add_weighted_columns::<S, Q, 2>(s, w, rows, at, &mut outs);
        at += 32;
    }
    while at + 16 <= n {
        add_weighted_columns::<S, Q, 1>(s, w, rows, at, &mut outs);
        at += 16;
    }
    for i in at..n {
        for q in 0..Q {
            for (j, w) in w[q].iter().enumerate() {
                outs[q][i] += w * rows[j * n + i];
            }
        }
    }
}

/// Columns `at .. at + 16 * D` of [`add_weighted_lanes`], in `Q * D` accumulators.
#[inline(always)]
fn add_weighted_columns<S: Lanes, const Q: usize, const D: usize>(
    s: S,
    weights: [&[f32]; Q],
    rows: &[f32],
    at: usize,
    outs: &mut [&mut [f32]; Q],
) {
    let n = outs[0].len();
    let mut acc = [[s.splat(0.0); D]; Q];
    for q in 0..Q {
        for (d, acc) in acc[q].iter_mut().enumerate() {
            *acc = s.load(sixteen(outs[q], at + 16 * d));
        }
    }
    for (j, row) in rows.chunks_exact(n).enumerate() {
        let mut v = [s.splat(0.0); D];
        for (d, v) in v.iter_mut().enumerate() {
            *v = s.load(sixteen(row, at + 16 * d));
        }
        for q in 0..Q {
            let w = s.splat(weights[q][j]);
            for d in 0..D {
                acc[q][d] = s.mul_then_add(acc[q][d], w, v[d]);
            }
        }
    }
    for q in 0..Q {
        for d in 0..D {
            let (out, _) = outs[q][at + 16 * d..].as_chunks_mut::<16>();
            s.store(acc[q][d], &mut out[0]);
        }
    }
}

#[inline(always)]
fn sixteen(row: &[f32], at: usize) -> &[f32; 16] {
    &row[at..].as_chunks::<16>().0[0]
}
