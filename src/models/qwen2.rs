//! `qwen2`: Qwen2 and Qwen2.5. GQA with biases on q, k and v, SwiGLU, NeoX pairing; small ones tie the output.
//!
//! Source: Qwen2.5 Technical Report (arXiv:2412.15115); `Qwen2ForCausalLM` of Hugging Face transformers.

use super::common::{Bias, Sizes, Tying, no_experts, rope_scaling};
use super::keys::Keys;
use super::spec::{Layer, ModelSpec, RopeSpec};
use super::{Architecture, ModelError};
use crate::backend::Pairing;

/// The row in the table.
pub(super) const QWEN2: Architecture = Architecture { name: "qwen2", models: "Qwen2, Qwen2.5", describe };

fn describe(keys: &Keys<'_>) -> Result<ModelSpec, ModelError> {
    let sizes = Sizes::read(keys, "feed_forward_length")?;
    no_experts(keys)?;
    let rope = RopeSpec {
        n_rot: sizes.n_rot(keys)?,
        // 1,000,000 in Qwen2.5, 10,000 in some tunes: only the file knows.
        base: keys.positive("rope.freq_base")?,
        pairing: Pairing::Halves,
        scaling: rope_scaling(keys, true)?,
    };
    let layer = |i| Layer { attention: sizes.attention(i, Bias::Qkv), ffn: sizes.swiglu(i) };
    let layers = (0..sizes.n_layers).map(layer).collect();
    sizes.model(keys, Tying::IfOutputAbsent, vec![rope], layers)
}
