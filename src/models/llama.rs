//! `llama`: Llama 2, 3, 3.1 and later, and the many models of the same shape. GQA without biases, SwiGLU, pairs of
//! neighbouring elements rotated (the converter permutes q and k for it), and from 3.1 on a factor per frequency.
//!
//! Source: arXiv:2307.09288, arXiv:2407.21783; `LlamaForCausalLM` of Hugging Face transformers.

use super::common::{Bias, Sizes, Tying, no_experts, one, rope_scaling};
use super::keys::Keys;
use super::spec::{Layer, ModelSpec, RopeScaling, RopeSpec, Shape};
use super::{Architecture, ModelError};
use crate::backend::Pairing;
use crate::gguf::GgufError;

/// The row in the table.
pub(super) const LLAMA: Architecture = Architecture { name: "llama", models: "Llama 2, 3, 3.1, 3.2", describe };

/// A divisor for each frequency, `[n_rot / 2]`.
const FACTORS: &str = "rope_freqs.weight";

fn describe(keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    let sizes = Sizes::read(keys, "feed_forward_length")?;
    no_experts(keys)?;
    let n_rot = sizes.n_rot(keys)?;
    let rope = RopeSpec { n_rot, base: base(keys)?, pairing: Pairing::Interleaved, scaling: scaling(keys, n_rot)? };
    let layer = |i| Layer { attention: sizes.attention(i, Bias::None), ffn: sizes.swiglu(i) };
    let layers = (0..sizes.n_layers).map(layer).collect();
    sizes.model(keys, Tying::IfOutputAbsent, vec![rope], layers)
}

/// The base of the frequencies. Llama 1 and 2 fix it at 10,000 in their code, and their files, which one knows by the
/// SentencePiece tokenizer, often leave it out; every later file must have it.
fn base(keys: &Keys<'_>) -> Result<f32, GgufError> {
    let spm = keys.file().metadata().opt_str("tokenizer.ggml.model")? == Some("llama");
    if spm && !keys.has("rope.freq_base") { Ok(10_000.0) } else { keys.positive("rope.freq_base") }
}

fn scaling(keys: &Keys<'_>, n_rot: usize) -> Result<RopeScaling, GgufError> {
    let stated = rope_scaling(keys, true)?;
    if !keys.has_tensor(FACTORS) {
        return Ok(stated);
    }
    match stated {
        RopeScaling::None => Ok(RopeScaling::Factors(one(FACTORS, Shape::Vector(n_rot / 2)))),
        _ => Err(keys.invalid("rope.scaling.type", format_args!("no such key beside the tensor `{FACTORS}`"))),
    }
}
