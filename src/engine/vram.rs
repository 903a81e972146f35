//! How many bytes a model takes on a device, before anything is allocated.

use super::forward::activation_elements;
use super::runner::RunnerLimits;
use super::weights::resident_bytes;
use crate::backend::{BLOCK_TOKENS, KvLayout, MemoryUse};
use crate::models::ModelSpec;

/// The KV cache of a model with `n_blocks` blocks.
pub fn kv_layout(spec: &ModelSpec, limits: &RunnerLimits) -> KvLayout {
    KvLayout {
        n_layers: spec.layers.len(),
        n_kv_heads: spec.heads.n_kv_heads,
        head_dim: spec.heads.head_dim,
        n_blocks: limits.n_kv_blocks,
        dtype: limits.kv_dtype,
    }
}

/// Blocks that `n_sequences` sequences of `n_ctx` tokens need at most.
pub fn kv_blocks(n_ctx: usize, n_sequences: usize) -> usize {
    n_ctx.div_ceil(BLOCK_TOKENS).saturating_mul(n_sequences)
}

/// The bytes that `Runner::load` will allocate under these limits. A pure function of the description.
///
/// `scratch` counts the interpreter's buffers and the work space that an op needs for itself: the normalised input, the
/// fresh keys and values, and for experts the choices' activations. A backend may round each up.
pub fn vram_usage(spec: &ModelSpec, limits: &RunnerLimits) -> MemoryUse {
    let (per_token, per_logit_row) = activation_elements(spec);
    let per_token = (per_token + work_elements(spec)) as u64;
    let elements = per_token * limits.max_batch_tokens as u64 + (per_logit_row * limits.max_logit_rows) as u64;
    MemoryUse {
        weights: resident_bytes(spec, limits.n_ctx),
        kv: kv_layout(spec, limits).bytes(),
        scratch: 4 * elements,
    }
}

/// Elements of work space per token.
fn work_elements(spec: &ModelSpec) -> usize {
    let kv_dim = spec.heads.n_kv_heads * spec.heads.head_dim;
    let experts = spec.moe().map_or(0, |(n_experts, n_used)| n_experts + n_used * (spec.ffn_dim + spec.hidden_dim));
    spec.hidden_dim + 2 * kv_dim + experts
}
