//! What is measured: prompts and side-by-side sequences, as the steps that they are.

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "test", rename_all = "lowercase")]
pub(super) enum Test {
    /// A prompt of `n_tokens`, in steps of up to `chunk`.
    Prefill { n_tokens: usize, chunk: usize },
    /// `n_tokens` tokens of each of `n_sequences`, after `depth` tokens each.
    Decode { n_sequences: usize, n_tokens: usize, depth: usize },
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Test::Prefill { n_tokens, .. } => write!(f, "prefill {n_tokens}"),
            Test::Decode { n_sequences, n_tokens, depth: 0 } => write!(f, "decode {n_sequences} x {n_tokens}"),
            Test::Decode { n_sequences, n_tokens, depth } => write!(f, "decode {n_sequences} x {n_tokens} @ {depth}"),
        }
    }
}

impl Test {
    pub(super) fn n_tokens(&self) -> usize {
        match self {
            Test::Prefill { n_tokens, .. } | Test::Decode { n_tokens, .. } => *n_tokens,
        }
    }

    pub(super) fn n_sequences(&self) -> usize {
        match self {
            Test::Prefill { .. } => 1,
            Test::Decode { n_sequences, .. } => *n_sequences,
        }
    }

    pub(super) fn start(&self) -> usize {
        match self {
            Test::Prefill { .. } => 0,
            Test::Decode { depth, .. } => *depth,
        }
    }

    /// The steps of a run: for each the first position and the tokens of every sequence.
    pub(super) fn steps(&self) -> Vec<(usize, usize)> {
        let chunk = match self {
            Test::Prefill { chunk, .. } => *chunk,
            Test::Decode { .. } => 1,
        };
        let end = self.start() + self.n_tokens();
        (self.start()..end).step_by(chunk).map(|at| (at, chunk.min(end - at))).collect()
    }
}
