//! The choice of tokens on a device, as data. What the numbers mean is defined in `engine::sampler`, bit for bit.

/// What one row of logits is sampled under: everything but penalties and masks, whose rows stay with the host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow<'a> {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 is off.
    pub top_k: u32,
    /// Keep the most likely ids whose mass reaches this; 1 is off.
    pub top_p: f32,
    /// Drop ids less likely than this times the most likely; 0 is off.
    pub min_p: f32,
    /// Key of the random numbers, with `choice` and `index`.
    pub seed: u64,
    /// Which of a request's choices this is.
    pub choice: u32,
    /// Index of the token in the output.
    pub index: u32,
    /// Added to the logits of these ids.
    pub bias: &'a [(u32, f32)],
    /// Ids that may not be chosen.
    pub forbidden: &'a [u32],
    /// Report log probabilities: of the chosen token and of so many most likely.
    pub n_logprobs: Option<u32>,
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Sampled {
    /// A token.
    Token {
        /// Its id.
        token: u32,
        /// Its log probability and the most likely ids with theirs, if asked for.
        logprobs: Option<(f32, Vec<(u32, f32)>)>,
    },
    /// A logit is not finite.
    NotFinite {
        /// The first such id.
        token: u32,
        /// Its logit.
        found: f32,
    },
    /// Bias or forbidden ids leave nothing.
    NothingToChoose,
}
