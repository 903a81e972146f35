//! What all our architectures share: sizes, names of tensors, and the usual layer.

use super::keys::Keys;
use super::spec::{Attention, Ffn, Linear, Model, ModelSpec, Norm, RopeScaling, RopeSpec, Shape, TensorRule};
use super::{ModelError, validate};
use crate::backend::{Activation, HeadDims};
use crate::gguf::GgufError;

/// The sizes every architecture has.
pub(super) struct Sizes {
    pub n_layers: usize,
    pub n_ctx_train: usize,
    pub hidden_dim: usize,
    pub ffn_dim: usize,
    pub heads: HeadDims,
    pub eps: f32,
    pub n_vocab: usize,
}

impl Sizes {
    /// Reads and checks them; `ffn_key` names the key of `F`.
    pub(super) fn read(keys: &Keys<'_>, ffn_key: &str) -> Result<Self, ModelError> {
        let hidden_dim = keys.size("embedding_length")?;
        let sizes = Self {
            n_layers: keys.size("block_count")?,
            n_ctx_train: keys.tokens("context_length")?,
            hidden_dim,
            ffn_dim: keys.size(ffn_key)?,
            heads: heads(keys, hidden_dim)?,
            eps: keys.positive("attention.layer_norm_rms_epsilon")?,
            n_vocab: n_vocab(keys, hidden_dim)?,
        };
        neutral_keys(keys)?;
        // Each layer has tensors of its own, so a file cannot make us describe more layers than it has tensors.
        if sizes.n_layers > keys.file().tensors().len() {
            let found = keys.file().tensors().len();
            return Err(keys.invalid("block_count", format_args!("at most one layer per tensor ({found})")).into());
        }
        Ok(sizes)
    }

    /// `NH * HS`.
    pub(super) fn q_dim(&self) -> usize {
        self.heads.n_heads * self.heads.head_dim
    }

    /// `NKV * HS`.
    pub(super) fn kv_dim(&self) -> usize {
        self.heads.n_kv_heads * self.heads.head_dim
    }

    /// Rotated elements per head: the file's count, or whole heads where it has none.
    pub(super) fn n_rot(&self, keys: &Keys<'_>) -> Result<usize, GgufError> {
        let head_dim = self.heads.head_dim;
        match keys.opt_size("rope.dimension_count")? {
            Some(n) if n > head_dim || n % 2 != 0 => {
                Err(keys.invalid("rope.dimension_count", format_args!("an even number up to the head size {head_dim}")))
            }
            n_rot => Ok(n_rot.unwrap_or(head_dim)),
        }
    }

    /// The norm `blk.{i}.{name}.weight` over the residual stream.
    pub(super) fn norm(&self, layer: usize, name: &str) -> Norm<TensorRule> {
        Norm { weight: one(format!("blk.{layer}.{name}.weight"), Shape::Vector(self.hidden_dim)), eps: self.eps }
    }

    /// Attention without bias, window or sinks on separate q, k and v.
    pub(super) fn attention(&self, layer: usize, bias: Bias) -> Attention<TensorRule> {
        let linear = |name, rows, bias| blk_linear(layer, name, Shape::Matrix(rows, self.hidden_dim), bias);
        Attention {
            norm: self.norm(layer, "attn_norm"),
            q: linear("attn_q", self.q_dim(), bias != Bias::None),
            k: linear("attn_k", self.kv_dim(), bias != Bias::None),
            v: linear("attn_v", self.kv_dim(), bias != Bias::None),
            qk_norm: None,
            output: blk_linear(
                layer,
                "attn_output",
                Shape::Matrix(self.hidden_dim, self.q_dim()),
                bias == Bias::QkvAndOutput,
            ),
            rope: 0,
            scale: 1.0 / (self.heads.head_dim as f32).sqrt(),
            window: None,
            sinks: None,
            softcap: None,
        }
    }

    /// A SwiGLU network on separate gate and up.
    pub(super) fn swiglu(&self, layer: usize) -> Ffn<TensorRule> {
        Ffn::Gated {
            norm: self.norm(layer, "ffn_norm"),
            gate: blk_linear(layer, "ffn_gate", Shape::Matrix(self.ffn_dim, self.hidden_dim), false),
            up: blk_linear(layer, "ffn_up", Shape::Matrix(self.ffn_dim, self.hidden_dim), false),
            down: self.ffn_down(layer),
            activation: Activation::SwiGlu,
        }
    }

    /// `blk.{i}.ffn_down`, `[C, F]`.
    pub(super) fn ffn_down(&self, layer: usize) -> Linear<TensorRule> {
        blk_linear(layer, "ffn_down", Shape::Matrix(self.hidden_dim, self.ffn_dim), false)
    }

    /// The model around `layers`, checked against the file: no key unread, every tensor used exactly once.
    pub(super) fn model(
        self,
        keys: &Keys<'_>,
        tying: Tying,
        ropes: Vec<RopeSpec>,
        layers: Vec<super::spec::Layer<TensorRule>>,
    ) -> Result<ModelSpec, ModelError> {
        let table = Shape::Matrix(self.n_vocab, self.hidden_dim);
        let output = if tying == Tying::IfOutputAbsent && !keys.has_tensor("output.weight") {
            TensorRule::TiedTo { name: EMBEDDING.into(), shape: table }
        } else {
            one("output.weight", table)
        };
        let model = Model {
            architecture: keys.architecture(),
            name: keys.file().metadata().opt_str("general.name")?.map(str::to_owned),
            n_vocab: self.n_vocab,
            hidden_dim: self.hidden_dim,
            ffn_dim: self.ffn_dim,
            heads: self.heads,
            n_ctx_train: self.n_ctx_train,
            weight_bytes: 0,
            embedding: one(EMBEDDING, table),
            embedding_scale: 1.0,
            ropes,
            layers,
            output_norm: Norm { weight: one("output_norm.weight", Shape::Vector(self.hidden_dim)), eps: self.eps },
            output: Linear { weight: output, bias: None },
            final_softcap: None,
        };
        keys.refuse_unread()?;
        validate::tensors(keys.file(), model)
    }
}

/// Which projections of attention have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    None,
    Qkv,
    QkvAndOutput,
}

/// Whether a file may leave out `output.weight` and mean the embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tying {
    Never,
    IfOutputAbsent,
}

const EMBEDDING: &str = "token_embd.weight";

/// Five times the largest vocabulary there is; the sampler's sums are exact up to here.
const MAX_VOCAB: usize = 1 << 20;

/// A whole tensor.
pub(super) fn one(name: impl Into<String>, shape: Shape) -> TensorRule {
    TensorRule::One { name: name.into(), shape }
}

/// `blk.{layer}.{name}.weight` of `shape`, with `blk.{layer}.{name}.bias` if asked for.
pub(super) fn blk_linear(layer: usize, name: &str, shape: Shape, bias: bool) -> Linear<TensorRule> {
    let bias_shape = match shape.mats_rows_cols() {
        (1, rows, _) => Shape::Vector(rows),
        (mats, rows, _) => Shape::Matrix(mats, rows),
    };
    Linear {
        weight: one(format!("blk.{layer}.{name}.weight"), shape),
        bias: bias.then(|| one(format!("blk.{layer}.{name}.bias"), bias_shape)),
    }
}

fn heads(keys: &Keys<'_>, hidden_dim: usize) -> Result<HeadDims, GgufError> {
    let n_heads = keys.size("attention.head_count")?;
    // GGUF's specification: as many as query heads where the key is absent.
    let n_kv_heads = keys.opt_size("attention.head_count_kv")?.unwrap_or(n_heads);
    if n_heads % n_kv_heads != 0 {
        return Err(keys.invalid("attention.head_count_kv", format_args!("a divisor of the {n_heads} query heads")));
    }
    let head_dim = match keys.opt_size("attention.key_length")? {
        Some(n) => n,
        None if hidden_dim.is_multiple_of(n_heads) => hidden_dim / n_heads,
        None => {
            let expected = format_args!("a divisor of the embedding length {hidden_dim}, or a key for the head size");
            return Err(keys.invalid("attention.head_count", expected));
        }
    };
    if head_dim % 2 != 0 {
        return Err(keys.invalid("attention.head_count", format_args!("an even head size, not {head_dim}")));
    }
    if keys.opt_size("attention.value_length")?.is_some_and(|n| n != head_dim) {
        return Err(keys.invalid("attention.value_length", format_args!("{head_dim}, the size of the keys")));
    }
    Ok(HeadDims { n_heads, n_kv_heads, head_dim })
}

/// The rows of the embedding, which `vocab_size` must repeat where it is there.
fn n_vocab(keys: &Keys<'_>, hidden_dim: usize) -> Result<usize, ModelError> {
    let stated = keys.opt_size("vocab_size")?;
    let Some(table) = keys.file().tensor(EMBEDDING) else {
        let expected = vec![hidden_dim as u64, stated.unwrap_or(1) as u64];
        let file = keys.file().label().to_owned();
        return Err(ModelError::MissingTensor { file, tensor: EMBEDDING.into(), expected });
    };
    let n_vocab = table.dims.get(1).map_or(1, |&n| n);
    if stated.is_some_and(|stated| stated as u64 != n_vocab) {
        return Err(keys.invalid("vocab_size", format_args!("{n_vocab}, the rows of `{EMBEDDING}`")).into());
    }
    match usize::try_from(n_vocab) {
        Ok(n) if n <= MAX_VOCAB => Ok(n),
        _ => Err(keys.file().invalid_tensor(table, format_args!("at most {MAX_VOCAB} rows"), n_vocab).into()),
    }
}

/// Keys that converters write for any architecture: fine as long as they say that nothing is unusual.
fn neutral_keys(keys: &Keys<'_>) -> Result<(), GgufError> {
    keys.neutral("attention.causal", 1.0)?;
    keys.neutral("use_parallel_residual", 0.0)?;
    if keys.opt_str("tensor_data_layout")?.is_some_and(|layout| layout != "Meta AI original pth") {
        return Err(keys.invalid("tensor_data_layout", "\"Meta AI original pth\" or no such key"));
    }
    Ok(())
}

/// A dense architecture's expert keys, which must say that there are none.
pub(super) fn no_experts(keys: &Keys<'_>) -> Result<(), GgufError> {
    keys.neutral("expert_count", 0.0)?;
    keys.neutral("expert_used_count", 0.0)
}

/// How `rope.scaling.*` stretches the context: not at all, linearly, or by YaRN. `truncate` is the architecture's way
/// of rounding YaRN's ramp, about which files say nothing.
pub(super) fn rope_scaling(keys: &Keys<'_>, truncate: bool) -> Result<RopeScaling, GgufError> {
    // Whether the model was tuned after stretching; the arithmetic is the same.
    keys.opt_bool("rope.scaling.finetuned")?;
    // YaRN's attention factor is `1 + 0.1 ln(factor)`. Files with another one, and what they mean by it (the product,
    // or the replacement), are not settled among converters.
    for (name, value) in [
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
    ] {
        keys.neutral(name, value)?;
    }
    // The older name of a linear factor.
    if let Some(factor) = keys.opt_positive("rope.scale_linear")?.filter(|&f| f != 1.0) {
        if keys.has("rope.scaling.type") {
            return Err(keys.invalid("rope.scale_linear", "no such key beside `rope.scaling.type`"));
        }
        return Ok(RopeScaling::Linear { factor });
    }
    match keys.opt_str("rope.scaling.type")? {
        None | Some("none") => {
            keys.neutral("rope.scaling.factor", 1.0)?;
            Ok(RopeScaling::None)
        }
        Some("linear") => Ok(RopeScaling::Linear { factor: keys.positive("rope.scaling.factor")? }),
        Some("yarn") => yarn(keys, truncate),
        Some(_) => Err(keys.invalid("rope.scaling.type", "\"none\", \"linear\" or \"yarn\"")),
    }
}

fn yarn(keys: &Keys<'_>, truncate: bool) -> Result<RopeScaling, GgufError> {
    let factor = keys.positive("rope.scaling.factor")?;
    if factor < 1.0 {
        return Err(keys.invalid("rope.scaling.factor", "at least 1"));
    }
    // 32 and 1 are the paper's values for all models of the LLaMA family, and GPT-OSS's.
    let beta_fast = keys.opt_positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0);
    let beta_slow = keys.opt_positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0);
    let n_ctx_original = keys.tokens("rope.scaling.original_context_length")?;
    Ok(RopeScaling::Yarn { factor, n_ctx_original, beta_fast, beta_slow, truncate })
}
