//! A set of ids that may be chosen: what a grammar hands to the sampler.

/// One bit per vocabulary id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u64>,
}

impl TokenMask {
    /// Nothing is allowed.
    pub fn none(n_vocab: usize) -> Self {
        Self { words: vec![0; n_vocab.div_ceil(64)] }
    }

    /// Allows an id.
    ///
    /// # Panics
    /// If the id is beyond the vocabulary the mask was made for.
    pub fn allow(&mut self, token: u32) {
        self.words[token as usize / 64] |= 1 << (token % 64);
    }

    /// Whether an id may be chosen; `false` beyond the vocabulary.
    pub fn allows(&self, token: u32) -> bool {
        self.words.get(token as usize / 64).is_some_and(|word| word >> (token % 64) & 1 == 1)
    }

    /// Bit `i % 64` of word `i / 64` says whether id `i` may be chosen.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Makes the logits of all other ids minus infinity.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        for (token, logit) in (0u32..).zip(logits) {
            if !self.allows(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}
