//! `gpt-oss`: GPT-OSS 20B and 120B. Mixture of experts with a clamped SwiGLU, a sink logit per head, a sliding window
//! on every other layer, YaRN, biases everywhere.
//!
//! Source: arXiv:2508.10925, <https://github.com/openai/gpt-oss>; `GptOssForCausalLM` of Hugging Face transformers.

use super::common::{Bias, Sizes, Tying, blk_linear, one, rope_scaling};
use super::keys::Keys;
use super::spec::{Attention, Ffn, Layer, ModelSpec, RopeSpec, Shape, TensorRule};
use super::{Architecture, ModelError};
use crate::backend::{Activation, MoeWeighting, Pairing};
use crate::gguf::GgufError;

/// The row in the table.
pub(super) const GPT_OSS: Architecture = Architecture { name: "gpt-oss", models: "GPT-OSS 20B, 120B", describe };

/// Constants of the architecture: they stand in its reference code and in no file.
const ACTIVATION: Activation = Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 };

fn describe(keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    let sizes = Sizes::read(keys, "expert_feed_forward_length")?;
    if keys.opt_size("feed_forward_length")?.is_some_and(|f| f != sizes.ffn_dim) {
        let expected = format_args!("{}, the experts' width: there are no other networks", sizes.ffn_dim);
        return Err(keys.invalid("feed_forward_length", expected).into());
    }
    let (n_experts, n_used) = experts(keys)?;
    let window = keys.tokens("attention.sliding_window")?;
    let windowed = windowed_layers(keys, sizes.n_layers)?;

    let base = keys.positive("rope.freq_base")?;
    let rope = |base| -> Result<RopeSpec, GgufError> {
        // The reference code does not round the ends of YaRN's ramp.
        Ok(RopeSpec { n_rot: sizes.n_rot(keys)?, base, pairing: Pairing::Halves, scaling: rope_scaling(keys, false)? })
    };
    let mut ropes = vec![rope(base)?];
    if let Some(base) = keys.opt_positive("rope.freq_base_swa")?.filter(|&swa| swa != base) {
        ropes.push(rope(base)?);
    }
    let (full_rope, windowed_rope) = (0, ropes.len() - 1);

    let layer = |i: usize| {
        let (rope, window) = if windowed[i] { (windowed_rope, Some(window)) } else { (full_rope, None) };
        let sinks = one(format!("blk.{i}.attn_sinks.weight"), Shape::Vector(sizes.heads.n_heads));
        Layer {
            attention: Attention { rope, window, sinks: Some(sinks), ..sizes.attention(i, Bias::QkvAndOutput) },
            ffn: moe(&sizes, i, n_experts, n_used),
        }
    };
    let layers = (0..sizes.n_layers).map(layer).collect();
    sizes.model(keys, Tying::Never, ropes, layers)
}

fn moe(sizes: &Sizes, layer: usize, n_experts: usize, n_used: usize) -> Ffn<TensorRule> {
    let (c, f) = (sizes.hidden_dim, sizes.ffn_dim);
    let experts = |name, rows, cols| {
        let mut linear = blk_linear(layer, name, Shape::Stack(n_experts, rows, cols), true);
        // One expert's bias is still one row of a matrix.
        linear.bias = Some(one(format!("blk.{layer}.{name}.bias"), Shape::Matrix(n_experts, rows)));
        linear
    };
    Ffn::Moe {
        norm: sizes.norm(layer, "post_attention_norm"),
        router: blk_linear(layer, "ffn_gate_inp", Shape::Matrix(n_experts, c), true),
        gate: experts("ffn_gate_exps", f, c),
        up: experts("ffn_up_exps", f, c),
        down: experts("ffn_down_exps", c, f),
        n_experts,
        n_used,
        weighting: MoeWeighting::SoftmaxOfChosen,
        activation: ACTIVATION,
    }
}

fn experts(keys: &Keys<'_>) -> Result<(usize, usize), GgufError> {
    let (n_experts, n_used) = (keys.size("expert_count")?, keys.size("expert_used_count")?);
    if n_used > n_experts {
        return Err(keys.invalid("expert_used_count", format_args!("at most the {n_experts} experts there are")));
    }
    Ok((n_experts, n_used))
}

/// Which layers see only the window: the first of every two, unless the file says otherwise with a period (the last
/// layer of each is full) or with one boolean per layer.
fn windowed_layers(keys: &Keys<'_>, n_layers: usize) -> Result<Vec<bool>, GgufError> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    if let Some(pattern) = keys.opt_bools(PATTERN) {
        if pattern.len() != n_layers {
            return Err(keys.invalid(PATTERN, format_args!("{n_layers} booleans, one per layer")));
        }
        return Ok(pattern.to_vec());
    }
    let period = keys.opt_size(PATTERN)?.unwrap_or(2);
    Ok((0..n_layers).map(|i| i % period < period - 1).collect())
}
