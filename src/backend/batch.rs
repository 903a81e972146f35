//! One step's work as flat arrays.

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = 32;

/// The tokens that one sequence contributes to a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeqSpan {
    /// Index of the sequence's first token in [`Batch::tokens`].
    pub first: usize,
    /// Number of its tokens in this step; at least 1.
    pub n_tokens: usize,
    /// Tokens of the sequence whose keys and values are in the cache once this step has written its own:
    /// the last token of the span attends to positions `0 .. kv_len`.
    pub kv_len: usize,
    /// KV blocks of the sequence in order; covers at least `kv_len` tokens.
    pub blocks: Vec<u32>,
}

/// One step's work: `T` tokens of one or more sequences.
///
/// Invariants: `tokens`, `positions` and `slots` are `T` long; spans are disjoint, ascending and cover `0..T`;
/// no slot occurs twice; every id is below the vocabulary's size, every block below the pool's; feeds only where the step before was
/// enqueued and chose a token in that row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[T]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its own sequence, `[T]`.
    pub positions: Vec<u32>,
    /// KV slot that each token's key and value go to, `[T]`.
    pub slots: Vec<u32>,
    /// The sequences, in the order of their tokens.
    pub spans: Vec<SeqSpan>,
    /// Indices into `tokens` of the rows whose logits are wanted, ascending, `[R]`.
    pub logit_rows: Vec<u32>,
    /// The tokens that the step before chooses.
    pub feeds: Vec<Feed>,
}

/// A token that the host does not know yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feed {
    /// Index into [`Batch::tokens`], which holds any id there.
    pub token: u32,
    /// The row of the step enqueued before whose choice it is.
    pub row: u32,
}
