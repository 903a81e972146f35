//! Chooses the next token from a row of logits. The same row, parameters and token index give the same token everywhere.
//!
//! The result is defined without reference to an order of evaluation, so that a GPU can reproduce it bit for bit:
//!
//! 1. **Adjust** (f32, each operation rounded): add the bias, apply the repetition, presence and frequency penalties
//!    (`penalties`); forbid the ids outside the mask and, before `min_tokens`, the stop ids. The *rank* of an id is its
//!    place by (adjusted logit descending, id ascending). Rank 0 is the greedy choice.
//! 2. **Weigh**: `w = round(2^43 * exp((l - l_max) / temperature))`, an integer ([`weight`]). Integers add up to the same sum in
//!    any order.
//! 3. **Truncate**: keep the `top_k` first ranks; of those the shortest run of first ranks whose weights reach `top_p` of
//!    their sum; of those the ids with `w >= min_p * 2^43`. Each keeps rank 0.
//! 4. **Draw**: with `r` the 64-bit random number of (seed, choice, token index) (`philox`) and `W` the sum of the kept
//!    weights, the choice is the first kept id, in ascending order of ids, whose running sum exceeds `floor(r * W / 2^64)`.
//!
//! Log probabilities (`logprobs`) are of the adjusted logits, before the temperature.

mod logprobs;
mod mask;
mod penalties;
mod philox;
mod rank;
mod weight;

pub use mask::TokenMask;
pub use philox::{philox4x32_10, random_u64};
pub use weight::{WEIGHT_ONE, exp_nonpositive, weight};

use crate::backend::{Penalties, SampleRow, Sampled};
use penalties::History;
use playhouse_actors::engine::{Logprob, SamplingParams, TokenLogprobs};

/// Why a row of logits gives no token. The request fails, the engine is well.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model's fault.
    #[error("logit of token {token} is {found}, expected a finite number")]
    NotFinite {
        /// The first such id.
        token: u32,
        /// Its logit.
        found: f32,
    },
    /// Bias, mask or `min_tokens` forbid every id.
    #[error("bias, mask or min_tokens forbid the whole vocabulary")]
    NothingToChoose,
}

/// What one row is chosen under, beside the request's parameters.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowOptions<'a> {
    /// Ids that may not be chosen: the stop ids, while `min_tokens` is not reached.
    pub forbidden: &'a [u32],
    /// Ids that may be chosen, if a grammar says so.
    pub mask: Option<&'a TokenMask>,
    /// Report log probabilities: of the chosen token and of so many most likely.
    pub n_logprobs: Option<u32>,
}

/// A slot in which a device counts a sequence's tokens, and what is to be written there before: see [`Penalties`].
pub type HistorySlot<'a> = (u32, Option<&'a [(u32, u32)]>);

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// Its id.
    pub token: u32,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
}

impl Chosen {
    /// What a device chose.
    ///
    /// # Errors
    /// [`SampleError`].
    pub fn on_device(sampled: Sampled) -> Result<Chosen, SampleError> {
        match sampled {
            Sampled::Token { token, logprobs } => {
                let listed = |(token, logprob)| Logprob { token, logprob };
                let logprobs =
                    logprobs.map(|(chosen, top)| TokenLogprobs { chosen, top: top.into_iter().map(listed).collect() });
                Ok(Chosen { token, logprobs })
            }
            Sampled::NotFinite { token, found } => Err(SampleError::NotFinite { token, found }),
            Sampled::NothingToChoose => Err(SampleError::NothingToChoose),
        }
    }
}

/// The sampler of one sequence: its parameters and what the penalties must know of its tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    history: History,
}

impl Sampler {
    /// A sampler for a sequence that has emitted `emitted` after `prompt`; it is the same as one that chose them itself.
    pub fn new(params: &SamplingParams, prompt: &[u32], emitted: &[u32]) -> Self {
        let mut sampler = Self { params: params.clone(), history: History::new(params, prompt) };
        emitted.iter().for_each(|&token| sampler.push(token));
        sampler
    }

    /// Whether ids that were seen are penalised, so that a device needs their counts.
    pub fn is_penalised(&self) -> bool {
        self.history.is_needed()
    }

    /// Each id that penalties know of, with how often it is in the output.
    pub fn counts(&self) -> Vec<(u32, u32)> {
        self.history.counts()
    }

    /// The row as a device samples it. `history`: the slot in which it counts, and what is to be written there before.
    ///
    /// # Panics
    /// If ids are penalised and there is no slot.
    pub fn on_device<'a>(
        &'a self,
        index: u32,
        options: RowOptions<'a>,
        history: Option<HistorySlot<'a>>,
    ) -> SampleRow<'a> {
        let SamplingParams { temperature, top_k, top_p, min_p, seed, choice, .. } = self.params;
        let penalties = self.is_penalised().then(|| {
            let (history, fresh) = history.expect("a slot for each sequence that is penalised");
            let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
            let (repetition, presence, frequency) = (repetition_penalty, presence_penalty, frequency_penalty);
            Penalties { repetition, presence, frequency, history, fresh }
        });
        let (bias, forbidden) = (self.params.logit_bias.as_slice(), options.forbidden);
        let (mask, n_logprobs) = (options.mask.map(TokenMask::words), options.n_logprobs);
        SampleRow {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            choice,
            index,
            bias,
            penalties,
            mask,
            forbidden,
            n_logprobs,
        }
    }

    /// Notes an emitted token.
    pub fn push(&mut self, token: u32) {
        self.history.push(token);
    }

    /// Chooses the token at `index` of the sequence's output from `logits` `[V]`, which are adjusted in place.
    ///
    /// # Errors
    /// [`SampleError`].
    pub fn choose(&self, logits: &mut [f32], index: u32, options: RowOptions<'_>) -> Result<Chosen, SampleError> {
        check_finite(logits)?;
        self.adjust(logits, options);
        let greedy = rank::first(logits);
        let max = logits[greedy as usize];
        if max == f32::NEG_INFINITY {
            return Err(SampleError::NothingToChoose);
        }
        let token = if self.params.temperature == 0.0 { greedy } else { self.draw(logits, max, index) };
        let logprobs = options.n_logprobs.map(|n_top| logprobs::of(logits, max, token, n_top as usize));
        Ok(Chosen { token, logprobs })
    }

    fn adjust(&self, logits: &mut [f32], options: RowOptions<'_>) {
        penalties::apply(&self.params, &self.history, logits);
        if let Some(mask) = options.mask {
            mask.apply(logits);
        }
        for &token in options.forbidden {
            logits[token as usize] = f32::NEG_INFINITY;
        }
    }

    fn draw(&self, logits: &[f32], max: f32, index: u32) -> u32 {
        let params = &self.params;
        let weigh = |token: u32| weight(logits[token as usize], max, params.temperature);
        let n_vocab = u32::try_from(logits.len()).expect("token ids are 32 bits wide");
        let min_weight = fraction_of(params.min_p, WEIGHT_ONE).max(1);
        let top_k = if params.top_k == 0 { u32::MAX } else { params.top_k };
        let mut kept: Vec<(u32, u64)> = if top_k >= n_vocab && params.top_p >= 1.0 {
            (0..n_vocab).map(|token| (token, weigh(token))).collect()
        } else {
            top_ranks(logits, max, params, top_k, weigh)
        };
        kept.retain(|&(_, weight)| weight >= min_weight);
        let total: u64 = kept.iter().map(|&(_, weight)| weight).sum();
        let random = random_u64(params.seed, params.choice, index);
        let target = u64::try_from((u128::from(random) * u128::from(total)) >> 64).expect("below the total");
        pick(&kept, target)
    }
}

/// The ids that `top_k` and `top_p` keep, ascending, with their weights.
fn top_ranks(
    logits: &[f32],
    max: f32,
    params: &SamplingParams,
    top_k: u32,
    weigh: impl Fn(u32) -> u64,
) -> Vec<(u32, u64)> {
    let top_k = usize::try_from(top_k).unwrap_or(usize::MAX).min(logits.len());
    let mut kept: Vec<(u32, u64)> = if params.top_p >= 1.0 {
        rank::top(logits, top_k).into_iter().map(|token| (token, weigh(token))).collect()
    } else if top_k < logits.len() {
        let ranked: Vec<(u32, u64)> = rank::top(logits, top_k).into_iter().map(|token| (token, weigh(token))).collect();
        let wanted = fraction_of(params.top_p, ranked.iter().map(|&(_, weight)| weight).sum());
        shortest_run(ranked, wanted)
    } else {
        nucleus(logits, max, params, weigh)
    };
    kept.sort_unstable_by_key(|&(token, _)| token);
    kept
}

/// `top_p` over the whole vocabulary. Ranks only as far down as it must: below a threshold that is lowered until the
/// ids above it have the mass. The thresholds only save time; any others give the same result.
fn nucleus(logits: &[f32], max: f32, params: &SamplingParams, weigh: impl Fn(u32) -> u64) -> Vec<(u32, u64)> {
    let all = |floor: f32| (0u32..).zip(logits).filter(move |&(_, &logit)| logit >= floor).map(|(token, _)| token);
    let wanted = fraction_of(params.top_p, all(f32::NEG_INFINITY).map(&weigh).sum());
    for n_octaves in [4.0, 12.0] {
        let floor = max - params.temperature * n_octaves;
        let mass: u64 = all(floor).map(&weigh).sum();
        if mass >= wanted {
            return ranked_run(all(floor), logits, wanted, weigh);
        }
    }
    ranked_run(all(f32::NEG_INFINITY), logits, wanted, weigh)
}

fn ranked_run(
    tokens: impl Iterator<Item = u32>,
    logits: &[f32],
    wanted: u64,
    weigh: impl Fn(u32) -> u64,
) -> Vec<(u32, u64)> {
    let mut ranked: Vec<u32> = tokens.collect();
    ranked.sort_unstable_by(|&a, &b| rank::order(logits, a, b));
    shortest_run(ranked.into_iter().map(|token| (token, weigh(token))).collect(), wanted)
}

/// The shortest run of first ranks whose weights reach `wanted`; at least one.
fn shortest_run(mut ranked: Vec<(u32, u64)>, wanted: u64) -> Vec<(u32, u64)> {
    let mut sum = 0u64;
    let n_kept = ranked.iter().position(|&(_, weight)| {
        sum += weight;
        sum >= wanted
    });
    ranked.truncate(n_kept.map_or(ranked.len(), |last| last + 1));
    ranked
}

/// `ceil(fraction * whole)`, exact: an f32 in `0 ..= 1` is a multiple of 2^-149, of which the bits below 2^-62 are cut.
fn fraction_of(fraction: f32, whole: u64) -> u64 {
    let scaled = (f64::from(fraction) * (1u64 << 62) as f64) as u64;
    u64::try_from((u128::from(scaled) * u128::from(whole)).div_ceil(1 << 62)).expect("at most the whole")
}

/// The first id whose running sum exceeds `target`.
fn pick(kept: &[(u32, u64)], target: u64) -> u32 {
    let mut sum = 0u64;
    for &(token, weight) in kept {
        sum += weight;
        if sum > target {
            return token;
        }
    }
    unreachable!("the target is below the sum of all weights, of which rank 0 has 2^43")
}

fn check_finite(logits: &[f32]) -> Result<(), SampleError> {
    // A plain pass without branches first: it is the common case, over the whole vocabulary, for every token.
    if logits.iter().fold(true, |all, logit| all & logit.is_finite()) {
        return Ok(());
    }
    let (token, &found) = (0u32..).zip(logits).find(|(_, logit)| !logit.is_finite()).expect("one is not finite");
    Err(SampleError::NotFinite { token, found })
}

#[cfg(test)]
mod tests;
