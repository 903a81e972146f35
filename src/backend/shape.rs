//! What a model will ask of a backend, in numbers: the shapes of its weights and the sizes of its steps.
//!
//! `Backend::reserve` gets it before the first weight, so that memory can be taken in one piece or refused at once, and a
//! backend's prediction of its memory is a function of it.

use super::{HeadDims, KvLayout};
use crate::dtype::DType;

/// What a weight is used for, so that a device keeps it in the forms that serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct WeightUse {
    /// Element by element: norms, biases, sinks, rotation tables.
    pub values: bool,
    /// Row by row, by token: the embedding.
    pub rows: bool,
    /// Multiplied by activations.
    pub product: bool,
}

impl WeightUse {
    /// Element by element.
    pub const VALUES: Self = Self { values: true, rows: false, product: false };
    /// Row by row.
    pub const ROWS: Self = Self { values: false, rows: true, product: false };
    /// In products.
    pub const PRODUCT: Self = Self { values: false, rows: false, product: true };
    /// Everything: for tests of single ops.
    pub const ANY: Self = Self { values: true, rows: true, product: true };

    /// For what either is used.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            values: self.values || other.values,
            rows: self.rows || other.rows,
            product: self.product || other.product,
        }
    }
}

/// How weights that one op uses together may be kept as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Join {
    /// Rows of one below those of the other: q, k and v, and their biases.
    Stacked,
    /// The gate and up matrices of a feed-forward network, of the same shape.
    Gated,
}

/// A weight's encoding, sizes and use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightShape {
    /// The encoding of each row.
    pub dtype: DType,
    /// Stacked matrices.
    pub n_mats: usize,
    /// Rows of each.
    pub n_rows: usize,
    /// Elements of a row.
    pub n_cols: usize,
    /// What it is for.
    pub uses: WeightUse,
}

/// Weights made resident by one call: one of `Backend::weight`, or several of `Backend::joined`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightGroup {
    /// In the order of the call.
    pub weights: Vec<WeightShape>,
    /// How they may be kept as one; without meaning for a single one.
    pub join: Join,
}

/// All of a model's weights, and the largest step it will run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// Every call that makes weights resident.
    pub groups: Vec<WeightGroup>,
    /// Elements of the residual stream.
    pub hidden_dim: usize,
    /// Elements between the halves of a feed-forward network, or of one expert.
    pub ffn_dim: usize,
    /// Whether some layer has one gated network for all tokens.
    pub has_gated: bool,
    /// Experts, and experts per token.
    pub moe: Option<(usize, usize)>,
    /// Head counts.
    pub heads: HeadDims,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Most tokens of a sequence.
    pub n_ctx: usize,
    /// Most tokens of a step.
    pub max_tokens: usize,
    /// Most rows of logits of a step, which is also the most sequences.
    pub max_logit_rows: usize,
    /// The cache.
    pub kv: KvLayout,
}

impl ModelShape {
    /// Rows and columns of each activation buffer of the interpreter, in the order it allocates them: residual stream, queries,
    /// attention, the inner of gated networks, logits.
    pub fn activations(&self) -> Vec<(usize, usize)> {
        let q_dim = self.heads.n_heads * self.heads.head_dim;
        let mut all = vec![(self.max_tokens, self.hidden_dim), (self.max_tokens, q_dim), (self.max_tokens, q_dim)];
        all.extend(self.has_gated.then_some((self.max_tokens, self.ffn_dim)));
        all.push((self.max_logit_rows, self.n_vocab));
        all
    }
}
