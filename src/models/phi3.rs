//! `phi3`: Phi-3, Phi-3.5 and Phi-4-mini. One tensor for q, k and v, one for gate and up, a sliding window on every
//! layer, and for the long contexts LongRoPE with two sets of factors.
//!
//! Source: arXiv:2404.14219; `Phi3ForCausalLM` of Hugging Face transformers.

use super::common::{Bias, Sizes, Tying, no_experts, one};
use super::keys::Keys;
use super::spec::{Attention, Ffn, Layer, Linear, ModelSpec, RopeScaling, RopeSpec, Shape, TensorRule};
use super::{Architecture, ModelError};
use crate::backend::{Activation, Pairing};
use crate::gguf::GgufError;
use std::ops::Range;

/// The row in the table.
pub(super) const PHI3: Architecture = Architecture { name: "phi3", models: "Phi-3, Phi-3.5, Phi-4-mini", describe };

const LONG: &str = "rope_factors_long.weight";
const SHORT: &str = "rope_factors_short.weight";
const ORIGINAL: &str = "rope.scaling.original_context_length";

fn describe(keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    let sizes = Sizes::read(keys, "feed_forward_length")?;
    no_experts(keys)?;
    let n_rot = sizes.n_rot(keys)?;
    let rope = RopeSpec {
        n_rot,
        base: keys.positive("rope.freq_base")?,
        pairing: Pairing::Halves,
        scaling: scaling(keys, n_rot, sizes.n_ctx_train)?,
    };
    // 0 in files of models without a window.
    let window = keys.opt_tokens("attention.sliding_window")?;
    let layer = |i| Layer { attention: attention(&sizes, i, window), ffn: ffn(&sizes, i) };
    let layers = (0..sizes.n_layers).map(layer).collect();
    sizes.model(keys, Tying::IfOutputAbsent, vec![rope], layers)
}

/// Rows of the fused tensor: all of q, then all of k, then all of v.
fn attention(sizes: &Sizes, layer: usize, window: Option<usize>) -> Attention<TensorRule> {
    let (q, kv) = (sizes.q_dim(), sizes.kv_dim());
    let part = |rows| slice(format!("blk.{layer}.attn_qkv.weight"), q + 2 * kv, sizes.hidden_dim, rows);
    Attention {
        q: part(0..q),
        k: part(q..q + kv),
        v: part(q + kv..q + 2 * kv),
        window,
        ..sizes.attention(layer, Bias::None)
    }
}

/// Rows of the fused tensor: all of the gate, then all of up.
fn ffn(sizes: &Sizes, layer: usize) -> Ffn<TensorRule> {
    let f = sizes.ffn_dim;
    let part = |rows| slice(format!("blk.{layer}.ffn_up.weight"), 2 * f, sizes.hidden_dim, rows);
    Ffn::Gated {
        norm: sizes.norm(layer, "ffn_norm"),
        gate: part(0..f),
        up: part(f..2 * f),
        down: sizes.ffn_down(layer),
        activation: Activation::SwiGlu,
    }
}

fn slice(name: String, n_rows: usize, n_cols: usize, rows: Range<usize>) -> Linear<TensorRule> {
    Linear { weight: TensorRule::FusedSlice { name, n_rows, n_cols, rows }, bias: None }
}

/// LongRoPE where the file has its factors; the other `rope.scaling` keys mean nothing without them.
fn scaling(keys: &Keys<'_>, n_rot: usize, n_ctx_train: usize) -> Result<RopeScaling, GgufError> {
    if keys.opt_str("rope.scaling.type")?.is_some_and(|t| t != "longrope" && t != "none") {
        return Err(keys.invalid("rope.scaling.type", "\"longrope\" or \"none\""));
    }
    if !keys.has_tensor(LONG) && !keys.has_tensor(SHORT) {
        // Files of models that were not stretched repeat their context length here.
        if keys.opt_tokens(ORIGINAL)?.is_some_and(|n| n != n_ctx_train) {
            let expected = format_args!("{n_ctx_train}, the context length, or the tensors `{SHORT}` and `{LONG}`");
            return Err(keys.invalid(ORIGINAL, expected));
        }
        keys.neutral("rope.scaling.attn_factor", 1.0)?;
        return Ok(RopeScaling::None);
    }
    Ok(RopeScaling::LongRope {
        short: one(SHORT, Shape::Vector(n_rot / 2)),
        long: one(LONG, Shape::Vector(n_rot / 2)),
        n_ctx_original: keys.tokens(ORIGINAL)?,
        attn_factor: keys.positive("rope.scaling.attn_factor")?,
    })
}
