//! The arguments of a backend's ops, as plain data.

use super::Backend;

/// `y = W x + b`.
pub struct Linear<'a, B: Backend + ?Sized> {
    /// `[n_out, n_in]`.
    pub weight: &'a B::Weight,
    /// `[n_out]`.
    pub bias: Option<&'a B::Weight>,
}

impl<B: Backend + ?Sized> Clone for Linear<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend + ?Sized> Copy for Linear<'_, B> {}

/// Root-mean-square normalisation (Zhang and Sennrich 2019): `x * w / sqrt(mean(x^2) + eps)`.
pub struct Norm<'a, B: Backend + ?Sized> {
    /// `[n]`.
    pub weight: &'a B::Weight,
    /// Added to the mean square.
    pub eps: f32,
}

impl<B: Backend + ?Sized> Clone for Norm<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend + ?Sized> Copy for Norm<'_, B> {}

/// Which elements of a head form the rotated pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub enum Pairing {
    /// `(2i, 2i + 1)`: GGUF files of `llama`, whose q and k rows are permuted for it.
    Interleaved,
    /// `(i, i + n_rot / 2)`: GPT-NeoX style.
    Halves,
}

/// Rotary position embedding (Su et al. 2021) with a precomputed table.
pub struct Rope<'a, B: Backend + ?Sized> {
    /// f32 `[n_ctx, n_rot]`: for each position `n_rot / 2` cosines, then as many sines, scaling applied.
    pub table: &'a B::Weight,
    /// Rotated elements per head; the rest passes through.
    pub n_rot: usize,
    /// Pairing of elements.
    pub pairing: Pairing,
}

/// Head counts of one attention layer. `n_heads % n_kv_heads == 0`; query head `h` reads kv head
/// `h / (n_heads / n_kv_heads)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadDims {
    /// Query heads (`NH`).
    pub n_heads: usize,
    /// Key/value heads (`NKV`).
    pub n_kv_heads: usize,
    /// Elements per head (`HS`).
    pub head_dim: usize,
}

/// Arguments of [`Backend::qkv`].
pub struct QkvOp<'a, B: Backend + ?Sized> {
    /// Layer index: where in the KV cache to write.
    pub layer: usize,
    /// Applied to `x` first.
    pub norm: Norm<'a, B>,
    /// `[NH * HS, C]`.
    pub q: Linear<'a, B>,
    /// `[NKV * HS, C]`.
    pub k: Linear<'a, B>,
    /// `[NKV * HS, C]`.
    pub v: Linear<'a, B>,
    /// Per-head normalisation of q and k, before the rotation, `[HS]` each.
    pub qk_norm: Option<(Norm<'a, B>, Norm<'a, B>)>,
    /// Rotation of q and k.
    pub rope: Rope<'a, B>,
    /// Head counts.
    pub dims: HeadDims,
}

/// Arguments of [`Backend::attention`].
pub struct AttentionOp<'a, B: Backend + ?Sized> {
    /// Layer index: which part of the KV cache to read.
    pub layer: usize,
    /// Head counts.
    pub dims: HeadDims,
    /// Multiplies `q . k`; usually `1 / sqrt(HS)`.
    pub scale: f32,
    /// A token at position `p` sees positions `p - window + 1 ..= p`; all if `None`.
    pub window: Option<usize>,
    /// f32 `[NH]`: a logit per head that takes part in the softmax's sum and has no value (GPT-OSS).
    pub sinks: Option<&'a B::Weight>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

/// The gate of a feed-forward network: a function of gate `g` and up `u`.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub enum Activation {
    /// `silu(g) * u`, `silu(g) = g / (1 + exp(-g))`.
    SwiGlu,
    /// GPT-OSS: `g' = min(g, limit)`, `u' = clamp(u, -limit, limit)`, `g' * sigmoid(alpha * g') * (u' + 1)`.
    SwiGluClamped {
        /// 1.702 in GPT-OSS.
        alpha: f32,
        /// 7.0 in GPT-OSS.
        limit: f32,
    },
}

/// Arguments of [`Backend::gated`].
pub struct GatedOp<'a, B: Backend + ?Sized> {
    /// Applied to `x` first.
    pub norm: Norm<'a, B>,
    /// `[F, C]`.
    pub gate: Linear<'a, B>,
    /// `[F, C]`.
    pub up: Linear<'a, B>,
    /// The gate.
    pub activation: Activation,
}

/// How router logits become the weights of the chosen experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum MoeWeighting {
    /// Softmax over the chosen logits only (GPT-OSS, Mixtral).
    SoftmaxOfChosen,
}

/// Arguments of [`Backend::moe`].
pub struct MoeOp<'a, B: Backend + ?Sized> {
    /// Applied to `x` first.
    pub norm: Norm<'a, B>,
    /// `[E, C]`.
    pub router: Linear<'a, B>,
    /// `E` stacked `[F, C]`, bias `[E, F]`.
    pub gate: Linear<'a, B>,
    /// `E` stacked `[F, C]`, bias `[E, F]`.
    pub up: Linear<'a, B>,
    /// `E` stacked `[C, F]`, bias `[E, C]`.
    pub down: Linear<'a, B>,
    /// `E`.
    pub n_experts: usize,
    /// `K`.
    pub n_used: usize,
    /// How the chosen are weighted.
    pub weighting: MoeWeighting,
    /// The gate.
    pub activation: Activation,
}

/// Arguments of [`Backend::head`].
pub struct HeadOp<'a, B: Backend + ?Sized> {
    /// Applied to the wanted rows first.
    pub norm: Norm<'a, B>,
    /// `[V, C]`.
    pub output: Linear<'a, B>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}
