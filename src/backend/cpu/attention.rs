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

/// Most tokens in one task.
const TASK_TOKENS: usize = 8;
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
        let panel = grow(panel, part.n * hs);
        for (j, row) in panel.chunks_exact_mut(hs).enumerate() {
            matmul::decode_row(isa, values.dtype, values.row(part.offset + j), row);
        }
        let from = part.position - begin;
        for (query, out) in outs.iter_mut().enumerate() {
            let range = seen[query].start.max(from)..seen[query].end.min(from + part.n);
            if !range.is_empty() {
                let weights = &scores[query * n_seen..][range.clone()];
                add_weighted(isa, weights, &panel[(range.start - from) * hs..(range.end - from) * hs], out);
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
    let max = scores.iter().copied().fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    math::exp_minus(isa, scores, max);
    let sum = lanes::sum(isa, scores);
    sink.map_or(sum, |sink| sum + math::exp(sink - max))
}

dispatch!(
    /// `out += sum_j weights[j] * rows[j]` in the order of `j`; `rows` `[weights][out]`.
    fn add_weighted(weights: &[f32], rows: &[f32], out: &mut [f32]) = add_weighted_lanes
);

#[inline(always)]
fn add_weighted_lanes<S: Lanes>(s: S, weights: &[f32], rows: &[f32], out: &mut [f32]) {
    let n = out.len();
    assert_eq!(rows.len(), weights.len() * n, "a row per weight");
    let (whole, rest) = out.as_chunks_mut::<16>();
    let n_whole = 16 * whole.len();
    for (c, out) in whole.iter_mut().enumerate() {
        let mut acc = s.load(out);
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            let (row, _) = row[16 * c..].as_chunks::<16>();
            acc = s.mul_then_add(acc, s.splat(*weight), s.load(&row[0]));
        }
        s.store(acc, out);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        for (weight, row) in weights.iter().zip(rows.chunks_exact(n)) {
            *out += weight * row[n_whole + i];
        }
    }
}
