//! The choice of tokens on a device, as data. What the numbers mean is defined in `engine::sampler`, bit for bit.

/// What one row of logits is sampled under.
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
    /// Added to the logits of these ids, in this order.
    pub bias: &'a [(u32, f32)],
    /// What ids that were seen are penalised by; `None` is off.
    pub penalties: Option<Penalties<'a>>,
    /// The ids that may be chosen: bit `i % 64` of word `i / 64` allows id `i`. `None` allows all.
    pub mask: Option<&'a [u64]>,
    /// Ids that may not be chosen.
    pub forbidden: &'a [u32],
    /// Report log probabilities: of the chosen token and of so many most likely.
    pub n_logprobs: Option<u32>,
}

impl SampleRow<'_> {
    /// The most likely id, nothing else.
    pub const fn greedy() -> SampleRow<'static> {
        SampleRow {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
            index: 0,
            bias: &[],
            penalties: None,
            mask: None,
            forbidden: &[],
            n_logprobs: None,
        }
    }
}

/// Penalties of ids that a sequence has seen, and where the device counts them.
///
/// The device keeps a history per slot: how often each id was seen. Each token that it chooses under a history it counts there itself, so
/// that the next step needs nothing of the host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties<'a> {
    /// Divides or multiplies the logits of ids in prompt or output.
    pub repetition: f32,
    /// Subtracted once from ids in the output.
    pub presence: f32,
    /// Subtracted times the count in the output.
    pub frequency: f32,
    /// The slot of the history, below the number of rows of logits there are.
    pub history: u32,
    /// What the history is to hold before this row, instead of what it holds: each id that was seen, once, with how often it is in the
    /// output. `None`: it holds the right counts.
    pub fresh: Option<&'a [(u32, u32)]>,
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
    /// Bias, mask or forbidden ids leave nothing.
    NothingToChoose,
}
