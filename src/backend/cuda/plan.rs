//! How many bytes a model takes on a GPU: pure functions of its shape, shared by the prediction and the allocation.

use crate::backend::{Join, MemoryUse, ModelShape, WeightGroup, WeightShape};
use crate::dtype::DType;
use playhouse_cuda::arena::ALIGN;
use playhouse_cuda::launch::attention::{self, BLOCK_TOKENS, DECODE_ROWS, Heads, PREFILL_ROWS, SPLIT};
use playhouse_cuda::launch::matmul::{self, SMALL_COLUMNS};
use playhouse_cuda::launch::matrix::{self, Format, Layout, Part, TILE_K, TileShape};
use playhouse_cuda::launch::moe;
use std::collections::HashSet;
use std::ops::Range;

/// The crate of kernels' name for a format.
pub(super) fn format(dtype: DType) -> Option<Format> {
    Format::by_name(dtype.name())
}

/// Which weights of a group are kept as one matrix; every weight is in one range.
pub(super) fn runs(weights: &[WeightShape], join: Join) -> Vec<Range<usize>> {
    let kind = |w: &WeightShape| format(w.dtype).map(Format::kind);
    let together = |a: &WeightShape, b: &WeightShape| match join {
        Join::Stacked => kind(a) == kind(b) && a.n_cols == b.n_cols && a.n_mats == 1 && b.n_mats == 1,
        Join::Gated => (a.dtype, a.n_mats, a.n_rows, a.n_cols) == (b.dtype, b.n_mats, b.n_rows, b.n_cols),
    };
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (i, weight) in weights.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if together(&weights[run.start], weight) => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

/// How a run of weights is laid out.
pub(super) fn layout(join: Join, run: &Range<usize>) -> Layout {
    match join {
        Join::Gated if run.len() == 2 => Layout::Gated,
        _ => Layout::Stacked,
    }
}

/// The matrices of a group: kind and shape of each.
fn matrices(group: &WeightGroup) -> Vec<(matrix::Kind, TileShape)> {
    let matrix = |run: Range<usize>| {
        let weights = &group.weights[run.clone()];
        let part = |w: &WeightShape| Some(Part { format: format(w.dtype)?, n_rows: w.n_rows });
        let parts: Vec<Part> = weights.iter().filter_map(part).collect();
        let first = weights.first()?;
        let shape = matrix::tile_shape(&parts, layout(group.join, &run), first.n_cols, first.n_mats);
        Some((format(first.dtype)?.kind(), shape))
    };
    runs(&group.weights, group.join).into_iter().filter_map(matrix).collect()
}

/// f32 elements of each of some joined vectors: whole stripes, as the product has rows.
pub(super) fn padded_values(weight: &WeightShape, joined: bool) -> usize {
    let n = weight.n_mats * weight.n_rows * weight.n_cols;
    if joined { n.next_multiple_of(matrix::TILE_ROWS) } else { n }
}

/// Bytes that a group of weights takes in the arena.
pub(super) fn group_bytes(group: &WeightGroup) -> u64 {
    let Some(first) = group.weights.first() else { return 0 };
    let mut bytes = 0;
    if first.uses.values {
        let n: usize = group.weights.iter().map(|w| padded_values(w, group.weights.len() > 1)).sum();
        bytes += aligned(4 * n as u64);
    }
    if first.uses.rows {
        let table = |w: &WeightShape| (w.n_mats * w.n_rows * w.dtype.row_bytes(w.n_cols).unwrap_or(0)) as u64;
        bytes += group.weights.iter().map(|w| aligned(table(w))).sum::<u64>();
    }
    if first.uses.product {
        bytes += matrices(group).into_iter().map(|(kind, shape)| matrix::matrix_bytes(kind, shape)).sum::<u64>();
    }
    bytes
}

/// f32 elements of an activation buffer: it may hold f16 rows padded for a product instead.
pub(super) fn tensor_len(rows: usize, cols: usize) -> usize {
    (rows * cols).max((rows * cols.next_multiple_of(TILE_K)).div_ceil(2))
}

/// Columns that share an expert in a step of `n` tokens; `None` where each choice is a product of its own.
pub(super) fn expert_tile(n: usize, (n_experts, n_used): (usize, usize)) -> Option<usize> {
    if n <= SMALL_COLUMNS {
        return None;
    }
    match n * n_used / n_experts {
        0..48 => Some(32),
        _ => Some(64),
    }
}

/// Most tokens of a step whose rotation, attention and merge are one kernel.
const STEP_TOKENS: usize = 8;
/// Most splits that one block merges there; of more, many blocks merge a part each.
const STEP_SPLITS: usize = 8;

/// Whether a step of `n` tokens of a sequence each, which see up to `max_splits` splits, rotates, attends and merges in one kernel.
pub(super) fn one_kernel_attends(n: usize, max_splits: usize) -> bool {
    n <= STEP_TOKENS && max_splits <= STEP_SPLITS
}

/// Rows of the activations of experts, and tiles, in a step of `n` tokens.
pub(super) fn expert_rows(n: usize, (n_experts, n_used): (usize, usize)) -> (usize, usize) {
    match expert_tile(n, (n_experts, n_used)) {
        None => (n * n_used, 0),
        Some(tile) => {
            let n_tiles = moe::max_tiles(n, n_used, n_experts, tile);
            (n_tiles * tile, n_tiles)
        }
    }
}

/// Lengths of the work space of ops, in elements.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct WorkSizes {
    /// f16: normalised rows.
    pub(super) normed: usize,
    /// f32: q, k and v of each token.
    pub(super) qkv: usize,
    /// f32: sums of chunks of split products.
    pub(super) partial: usize,
    /// f32: splits of attention.
    pub(super) attention: usize,
    /// u32: tickets of attention.
    pub(super) tickets: usize,
    /// f32: gate and up where they are not one matrix.
    pub(super) gates: usize,
    /// f32: router logits.
    pub(super) scores: usize,
    /// i32 and f32: choices.
    pub(super) choices: usize,
    /// i32: tiles of experts.
    pub(super) tiles: usize,
    /// Rows of activations of experts; i32 columns of tiles.
    pub(super) rows: usize,
    /// f16: inner activations of experts.
    pub(super) hidden: usize,
    /// f32: outputs of experts.
    pub(super) outputs: usize,
    /// u32: what a step uploads.
    pub(super) inputs: usize,
}

impl WorkSizes {
    /// For the largest step of a model.
    pub(super) fn of(shape: &ModelShape, n_sms: usize) -> Self {
        let t = shape.max_tokens;
        let heads = heads(shape.heads);
        let q_dim = heads.n_heads * heads.head_dim;
        let kv_dim = heads.n_kv_heads * heads.head_dim;
        let mut sizes = Self {
            normed: t.max(shape.max_logit_rows) * shape.hidden_dim.next_multiple_of(TILE_K),
            qkv: t * (q_dim + 2 * kv_dim),
            partial: partial_len(shape, n_sms).max(1),
            attention: attention::decode_partial_len(
                heads,
                shape.max_logit_rows.min(t) * items_per_token(heads),
                attention::rows_of_one_token(heads),
                shape.n_ctx.div_ceil(SPLIT),
            ),
            tickets: t.min(STEP_TOKENS) * items_per_token(heads) * heads.n_kv_heads,
            inputs: StepSizes::largest(shape).len(),
            ..Self::default()
        };
        let mut gate_rows = if shape.has_gated { t } else { 0 };
        if let Some(experts) = shape.moe {
            sizes.scores = t * experts.0;
            sizes.choices = t * experts.1;
            // The tile grows with the step, so an earlier step may need more rows than the largest.
            let largest =
                |f: fn((usize, usize)) -> usize| (1..=t).map(|n| f(expert_rows(n, experts))).max().unwrap_or(0);
            sizes.rows = largest(|(rows, _)| rows);
            sizes.tiles = largest(|(_, tiles)| tiles);
            sizes.hidden = sizes.rows * shape.ffn_dim.next_multiple_of(TILE_K);
            sizes.outputs = sizes.rows * shape.hidden_dim;
            gate_rows = gate_rows.max(sizes.rows);
        }
        let is_apart = |group: &WeightGroup| group.join == Join::Gated && runs(&group.weights, group.join).len() > 1;
        if shape.groups.iter().any(is_apart) {
            sizes.gates = gate_rows * shape.ffn_dim;
        }
        sizes
    }

    /// Bytes of all of them in an arena.
    fn bytes(&self) -> u64 {
        let words = [
            self.qkv,
            self.partial,
            self.attention,
            self.tickets,
            self.gates,
            self.gates,
            self.scores,
            self.choices,
            self.choices,
            self.choices,
            self.tiles,
            self.rows,
            self.rows,
            self.outputs,
            self.inputs,
        ];
        let halves = [self.normed, self.hidden];
        words.iter().map(|n| aligned(4 * *n as u64)).chain(halves.iter().map(|n| aligned(2 * *n as u64))).sum()
    }
}

/// The most that a split product of the model needs.
fn partial_len(shape: &ModelShape, n_sms: usize) -> usize {
    let products = shape.groups.iter().filter(|g| g.weights.first().is_some_and(|w| w.uses.product));
    let shapes: HashSet<(matrix::Kind, TileShape)> = products.flat_map(matrices).collect();
    let most = |(kind, tiles): &(matrix::Kind, TileShape)| {
        let is_expert = tiles.n_mats > 1;
        let len = |n: usize| match shape.moe.filter(|_| is_expert) {
            None => matmul::partial_len(*kind, *tiles, n, n_sms, None),
            Some(experts) => match expert_tile(n, experts) {
                None => 0,
                tile => matmul::partial_len(*kind, *tiles, expert_rows(n, experts).0, n_sms, tile),
            },
        };
        (1..=shape.max_tokens.max(shape.max_logit_rows)).map(len).max().unwrap_or(0)
    };
    shapes.iter().map(most).max().unwrap_or(0)
}

/// Lengths of what a step uploads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StepSizes {
    pub(super) n_tokens: usize,
    pub(super) n_rows: usize,
    pub(super) n_decode_items: usize,
    pub(super) n_prefill_items: usize,
    pub(super) n_table: usize,
}

impl StepSizes {
    /// First element of tokens, positions, slots, rows, decode items, prefill items and tables; and the end.
    pub(super) fn offsets(&self) -> [usize; 8] {
        let lens = [
            self.n_tokens,
            self.n_tokens,
            self.n_tokens,
            self.n_rows,
            4 * self.n_decode_items,
            4 * self.n_prefill_items,
            self.n_table,
        ];
        let mut offsets = [0; 8];
        for (i, len) in lens.into_iter().enumerate() {
            offsets[i + 1] = offsets[i] + len.next_multiple_of(ALIGN as usize / 4);
        }
        offsets
    }

    /// Elements in all.
    pub(super) fn len(&self) -> usize {
        self.offsets()[7]
    }

    fn largest(shape: &ModelShape) -> Self {
        let heads = heads(shape.heads);
        let group = heads.n_heads / heads.n_kv_heads;
        let n_seqs = shape.max_logit_rows.min(shape.max_tokens);
        Self {
            n_tokens: shape.max_tokens,
            n_rows: shape.max_logit_rows,
            n_decode_items: n_seqs * items_per_token(heads),
            n_prefill_items: (shape.max_tokens * group).div_ceil(PREFILL_ROWS) + n_seqs,
            n_table: n_seqs * table_blocks(shape.n_ctx.div_ceil(SPLIT)),
        }
    }
}

/// Entries of a block table that covers `n_splits` splits.
pub(super) fn table_blocks(n_splits: usize) -> usize {
    n_splits * SPLIT / BLOCK_TOKENS
}

/// Decode items of one token.
pub(super) fn items_per_token(heads: Heads) -> usize {
    (heads.n_heads / heads.n_kv_heads).div_ceil(DECODE_ROWS)
}

/// Head counts as the launchers take them.
pub(super) fn heads(dims: crate::backend::HeadDims) -> Heads {
    Heads { n_heads: dims.n_heads, n_kv_heads: dims.n_kv_heads, head_dim: dims.head_dim }
}

/// Bytes in the arenas of a model on a device with `n_sms` multiprocessors: what is allocated, and what
/// `Backend::memory` says once it is.
pub fn memory_use(shape: &ModelShape, n_sms: usize) -> MemoryUse {
    let tensors: u64 = shape.activations().into_iter().map(|(r, c)| aligned(4 * tensor_len(r, c) as u64)).sum();
    MemoryUse {
        weights: whole_pages(shape.groups.iter().map(group_bytes).sum()),
        kv: whole_pages(kv_bytes(shape)),
        scratch: whole_pages(tensors + WorkSizes::of(shape, n_sms).bytes() + super::sampling::limits(shape).bytes()),
    }
}

fn kv_bytes(shape: &ModelShape) -> u64 {
    let per_layer = shape.kv.bytes() / (2 * shape.kv.n_layers.max(1) as u64);
    2 * shape.kv.n_layers as u64 * aligned(per_layer)
}

/// Memory comes in pages of this size on every GPU that we know.
const PAGE: u64 = 2 << 20;

fn whole_pages(bytes: u64) -> u64 {
    bytes.next_multiple_of(PAGE)
}

fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::WeightUse;

    fn weight(dtype: DType, n_rows: usize, n_cols: usize) -> WeightShape {
        WeightShape { dtype, n_mats: 1, n_rows, n_cols, uses: WeightUse::PRODUCT }
    }

    #[test]
    fn neighbours_of_one_kind_become_one_matrix() {
        let (q, k, v) = (weight(DType::Q4_K, 64, 256), weight(DType::Q4_0, 32, 256), weight(DType::Q6_K, 32, 256));
        assert_eq!(runs(&[q, k, v], Join::Stacked), [0..2, 2..3]);
        assert_eq!(runs(&[q, q, q], Join::Stacked), std::slice::from_ref(&(0..3)));
        assert_eq!(runs(&[q, k], Join::Gated), [0..1, 1..2], "gate and up of different formats stay apart");
        assert_eq!(runs(&[q, q], Join::Gated), std::slice::from_ref(&(0..2)));
    }

    #[test]
    fn a_fused_group_takes_what_its_bits_take() {
        let q = weight(DType::Q8_0, 64, 256);
        let group = WeightGroup { weights: vec![q, q], join: Join::Stacked };
        assert_eq!(group_bytes(&group), (2 * 64 * 256) as u64 * 17 / 16);
    }

    #[test]
    fn step_inputs_do_not_overlap() {
        let sizes = StepSizes { n_tokens: 5, n_rows: 65, n_decode_items: 17, n_prefill_items: 0, n_table: 1 };
        assert_eq!(sizes.offsets(), [0, 64, 128, 192, 320, 448, 448, 512]);
    }

    #[test]
    fn few_tokens_choose_one_by_one_and_many_in_tiles() {
        assert_eq!(expert_rows(8, (32, 4)), (32, 0));
        assert_eq!(expert_tile(9, (32, 4)), Some(32));
        assert_eq!(expert_tile(512, (32, 4)), Some(64));
        assert_eq!(expert_tile(4096, (32, 4)), Some(64));
    }
}
