//! The vocabulary in which architectures are described. What a word here means, `engine::forward` does.
//!
//! A description is generic over what stands for a tensor: a [`TensorRule`] in a [`ModelSpec`], an index of a resident
//! weight once it is loaded. [`Model::map`] is the one walk over all tensors of a model; checking, loading and counting
//! are closures over it.
//!
//! Letters: `C` hidden size, `NH` query heads, `NKV` key/value heads, `HS` head size, `F` feed-forward size,
//! `V` vocabulary, `E` experts, `K` experts used per token.

use crate::backend::{Activation, HeadDims, MoeWeighting, Pairing};
use std::ops::Range;

/// A model as its file describes it.
pub type ModelSpec = Model<TensorRule>;

/// A decoder-only transformer with pre-normalisation: embedding, layers, final norm, output.
#[derive(Debug, Clone, PartialEq)]
pub struct Model<T> {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// `general.name`, if the file has one.
    pub name: Option<String>,
    /// Tokens in the vocabulary (`V`).
    pub n_vocab: usize,
    /// Elements of the residual stream (`C`).
    pub hidden_dim: usize,
    /// Elements between the two halves of a feed-forward network, or of one expert (`F`).
    pub ffn_dim: usize,
    /// Head counts, the same in every layer.
    pub heads: HeadDims,
    /// Positions the model was made for.
    pub n_ctx_train: usize,
    /// Bytes of all tensors that become resident, as encoded in the file.
    pub weight_bytes: u64,
    /// `[V, C]`.
    pub embedding: T,
    /// Multiplies embeddings; 1 unless the architecture says otherwise.
    pub embedding_scale: f32,
    /// The distinct rotations; layers refer to them by index.
    pub ropes: Vec<RopeSpec>,
    /// From first to last.
    pub layers: Vec<Layer<T>>,
    /// Before the output.
    pub output_norm: Norm<T>,
    /// `[V, C]`.
    pub output: Linear<T>,
    /// Logits become `cap * tanh(logit / cap)`.
    pub final_softcap: Option<f32>,
}

/// One layer: `x += attention(x)`, then `x += ffn(x)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer<T> {
    /// Attention with its norm.
    pub attention: Attention<T>,
    /// Feed-forward network with its norm.
    pub ffn: Ffn<T>,
}

/// Multi-head attention with rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention<T> {
    /// Before the projections.
    pub norm: Norm<T>,
    /// `[NH * HS, C]`.
    pub q: Linear<T>,
    /// `[NKV * HS, C]`.
    pub k: Linear<T>,
    /// `[NKV * HS, C]`.
    pub v: Linear<T>,
    /// Per-head norms of q and k before the rotation, `[HS]` each.
    pub qk_norm: Option<(Norm<T>, Norm<T>)>,
    /// `[C, NH * HS]`.
    pub output: Linear<T>,
    /// Index into [`Model::ropes`].
    pub rope: usize,
    /// Multiplies `q . k`.
    pub scale: f32,
    /// A token sees itself and the `window - 1` before it; all before it if `None`.
    pub window: Option<usize>,
    /// A logit per head that joins the softmax's sum, `[NH]`.
    pub sinks: Option<T>,
    /// Attention logits become `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

/// A feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub enum Ffn<T> {
    /// `W_down act(W_gate n, W_up n)`.
    Gated {
        /// Before the projections.
        norm: Norm<T>,
        /// `[F, C]`.
        gate: Linear<T>,
        /// `[F, C]`.
        up: Linear<T>,
        /// `[C, F]`.
        down: Linear<T>,
        /// The gate.
        activation: Activation,
    },
    /// The `n_used` best of `n_experts` gated networks, weighted.
    Moe {
        /// Before the router and the projections.
        norm: Norm<T>,
        /// `[E, C]`.
        router: Linear<T>,
        /// `E` stacked `[F, C]`, bias `[E, F]`.
        gate: Linear<T>,
        /// `E` stacked `[F, C]`, bias `[E, F]`.
        up: Linear<T>,
        /// `E` stacked `[C, F]`, bias `[E, C]`.
        down: Linear<T>,
        /// `E`.
        n_experts: usize,
        /// `K`.
        n_used: usize,
        /// How the chosen are weighted.
        weighting: MoeWeighting,
        /// The gate.
        activation: Activation,
    },
}

/// `y = W x + b`.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear<T> {
    /// `[n_out, n_in]`.
    pub weight: T,
    /// `[n_out]`.
    pub bias: Option<T>,
}

/// Root-mean-square norm.
#[derive(Debug, Clone, PartialEq)]
pub struct Norm<T> {
    /// `[n]`.
    pub weight: T,
    /// Added to the mean square.
    pub eps: f32,
}

/// A rotation of queries and keys by position. `models::rope` computes its table.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Rotated elements of a head, even, the first ones; the rest passes through.
    pub n_rot: usize,
    /// Pair `i` turns by `position * base^(-2i / n_rot)` before scaling.
    pub base: f32,
    /// Which elements form pairs.
    pub pairing: Pairing,
    /// How the model was stretched beyond the context it was first trained on.
    pub scaling: RopeScaling,
}

/// Changes to the frequencies of a rotation.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by `factor` (Chen et al. 2023).
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// YaRN (Peng et al. 2023): low frequencies divided by `factor`, high ones kept, a ramp between; cosines and sines
    /// times `1 + 0.1 ln(factor)`.
    Yarn {
        /// At least 1.
        factor: f32,
        /// Positions before stretching.
        n_ctx_original: usize,
        /// Pairs that turn more often than this over the original context are kept.
        beta_fast: f32,
        /// Pairs that turn less often than this are divided.
        beta_slow: f32,
        /// Whether the ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
    },
    /// Each frequency divided by a factor of its own (Llama 3.1); factors `[n_rot / 2]`.
    Factors(TensorRule),
    /// LongRoPE (Ding et al. 2024): one set of factors `[n_rot / 2]` for contexts up to the original, one for longer
    /// ones; cosines and sines times `attn_factor`. The context given at load decides, so that a sequence never
    /// changes sets while it grows.
    LongRope {
        /// For contexts of at most `n_ctx_original` tokens.
        short: TensorRule,
        /// For longer contexts.
        long: TensorRule,
        /// Positions before stretching.
        n_ctx_original: usize,
        /// `sqrt(1 + ln(stretch) / ln(n_ctx_original))`, from the file.
        attn_factor: f32,
    },
}

/// The shape of a tensor, or of the part of it that a rule takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `[n]`.
    Vector(usize),
    /// `[rows, cols]`.
    Matrix(usize, usize),
    /// `[mats, rows, cols]`.
    Stack(usize, usize, usize),
}

impl Shape {
    /// Number of stacked matrices, rows of each, elements of a row; a vector is one row.
    pub fn mats_rows_cols(self) -> (usize, usize, usize) {
        match self {
            Self::Vector(n) => (1, 1, n),
            Self::Matrix(rows, cols) => (1, rows, cols),
            Self::Stack(mats, rows, cols) => (mats, rows, cols),
        }
    }

    /// Sizes in the order of a GGUF file: row length first.
    pub fn file_dims(self) -> Vec<u64> {
        match self {
            Self::Vector(n) => vec![n as u64],
            Self::Matrix(rows, cols) => vec![cols as u64, rows as u64],
            Self::Stack(mats, rows, cols) => vec![cols as u64, rows as u64, mats as u64],
        }
    }
}

/// Where in the file a weight comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TensorRule {
    /// A whole tensor; a stack of matrices if its shape says so.
    One {
        /// In the file.
        name: String,
        /// Of the tensor.
        shape: Shape,
    },
    /// Consecutive rows of a tensor that fuses several weights. The slices of a tensor cover it.
    FusedSlice {
        /// Of the fused tensor.
        name: String,
        /// Rows of the fused tensor.
        n_rows: usize,
        /// Elements of a row.
        n_cols: usize,
        /// The rows of this weight.
        rows: Range<usize>,
    },
    /// The same weight as another rule's whole tensor, which stays its owner.
    TiedTo {
        /// Of the owner's tensor.
        name: String,
        /// Of the tensor.
        shape: Shape,
    },
}

impl TensorRule {
    /// The tensor's name in the file.
    pub fn name(&self) -> &str {
        match self {
            Self::One { name, .. } | Self::FusedSlice { name, .. } | Self::TiedTo { name, .. } => name,
        }
    }

    /// The shape that the tensor in the file must have.
    pub fn file_shape(&self) -> Shape {
        match self {
            Self::One { shape, .. } | Self::TiedTo { shape, .. } => *shape,
            Self::FusedSlice { n_rows, n_cols, .. } => Shape::Matrix(*n_rows, *n_cols),
        }
    }

    /// The shape of the weight.
    pub fn shape(&self) -> Shape {
        match self {
            Self::One { shape, .. } | Self::TiedTo { shape, .. } => *shape,
            Self::FusedSlice { n_cols, rows, .. } => Shape::Matrix(rows.len(), *n_cols),
        }
    }

    /// The rule that owns the weight: itself unless tied.
    pub fn owner(&self) -> TensorRule {
        match self {
            Self::TiedTo { name, shape } => Self::One { name: name.clone(), shape: *shape },
            rule => rule.clone(),
        }
    }
}

impl<T> Model<T> {
    /// The same model with every tensor replaced. Stops at the first error.
    ///
    /// # Errors
    /// What `f` returns.
    pub fn map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Model<U>, E> {
        Ok(Model {
            architecture: self.architecture,
            name: self.name.clone(),
            n_vocab: self.n_vocab,
            hidden_dim: self.hidden_dim,
            ffn_dim: self.ffn_dim,
            heads: self.heads,
            n_ctx_train: self.n_ctx_train,
            weight_bytes: self.weight_bytes,
            embedding: f(&self.embedding)?,
            embedding_scale: self.embedding_scale,
            ropes: self.ropes.clone(),
            layers: self.layers.iter().map(|l| l.map(f)).collect::<Result<_, E>>()?,
            output_norm: self.output_norm.map(f)?,
            output: self.output.map(f)?,
            final_softcap: self.final_softcap,
        })
    }

    /// Every tensor, a tied one again where it is used again; those that only shape a rotation excepted.
    pub fn tensors(&self) -> Vec<T>
    where
        T: Clone,
    {
        let mut all = Vec::new();
        let mut collect = |t: &T| -> Result<(), std::convert::Infallible> {
            all.push(t.clone());
            Ok(())
        };
        let Ok(_) = self.map(&mut collect);
        all
    }

    /// Whether any layer is of this kind.
    pub fn has_gated(&self) -> bool {
        self.layers.iter().any(|l| matches!(l.ffn, Ffn::Gated { .. }))
    }

    /// Experts and experts used per token, if any layer has them.
    pub fn moe(&self) -> Option<(usize, usize)> {
        self.layers.iter().find_map(|l| match l.ffn {
            Ffn::Moe { n_experts, n_used, .. } => Some((n_experts, n_used)),
            Ffn::Gated { .. } => None,
        })
    }
}

impl RopeSpec {
    /// The tensors that shape the rotation. They are read on the host and do not become resident.
    pub fn tensors(&self) -> Vec<&TensorRule> {
        match &self.scaling {
            RopeScaling::Factors(factors) => vec![factors],
            RopeScaling::LongRope { short, long, .. } => vec![short, long],
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn { .. } => Vec::new(),
        }
    }
}

impl<T> Layer<T> {
    fn map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Layer<U>, E> {
        Ok(Layer { attention: self.attention.map(f)?, ffn: self.ffn.map(f)? })
    }
}

impl<T> Attention<T> {
    fn map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Attention<U>, E> {
        Ok(Attention {
            norm: self.norm.map(f)?,
            q: self.q.map(f)?,
            k: self.k.map(f)?,
            v: self.v.map(f)?,
            qk_norm: self.qk_norm.as_ref().map(|(q, k)| Ok::<_, E>((q.map(f)?, k.map(f)?))).transpose()?,
            output: self.output.map(f)?,
            rope: self.rope,
            scale: self.scale,
            window: self.window,
            sinks: self.sinks.as_ref().map(&mut *f).transpose()?,
            softcap: self.softcap,
        })
    }
}

impl<T> Ffn<T> {
    fn map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Ffn<U>, E> {
        Ok(match self {
            Ffn::Gated { norm, gate, up, down, activation } => Ffn::Gated {
                norm: norm.map(f)?,
                gate: gate.map(f)?,
                up: up.map(f)?,
                down: down.map(f)?,
                activation: *activation,
            },
            Ffn::Moe { norm, router, gate, up, down, n_experts, n_used, weighting, activation } => Ffn::Moe {
                norm: norm.map(f)?,
                router: router.map(f)?,
                gate: gate.map(f)?,
                up: up.map(f)?,
                down: down.map(f)?,
                n_experts: *n_experts,
                n_used: *n_used,
                weighting: *weighting,
                activation: *activation,
            },
        })
    }
}

impl<T> Linear<T> {
    fn map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Linear<U>, E> {
        Ok(Linear { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()? })
    }
}

impl<T> Norm<T> {
    fn map<U, E>(&self, f: &mut impl FnMut(&T) -> Result<U, E>) -> Result<Norm<U>, E> {
        Ok(Norm { weight: f(&self.weight)?, eps: self.eps })
    }
}
