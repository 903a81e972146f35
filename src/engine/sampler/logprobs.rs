//! Log probabilities: the log-softmax of the adjusted logits, before the temperature.
//!
//! `ln p = (l - l_max) - ln(sum of w / 2^43)` in f64, with the integer weights `w` at temperature 1; rounded to f32 once.

use super::{WEIGHT_ONE, rank, weight};
use playhouse_actors::engine::{Logprob, TokenLogprobs};

/// Of `chosen` and of the `n_top` most likely ids; forbidden ids are not listed.
pub(super) fn of(logits: &[f32], max: f32, chosen: u32, n_top: usize) -> TokenLogprobs {
    let total: u64 = logits.iter().map(|&logit| weight(logit, max, 1.0)).sum();
    let log_total = libm::log(total as f64 / WEIGHT_ONE as f64);
    let logprob = |token: u32| (f64::from(logits[token as usize]) - f64::from(max) - log_total) as f32;
    let top = rank::top(logits, n_top.min(logits.len()))
        .into_iter()
        .filter(|&token| logits[token as usize] != f32::NEG_INFINITY)
        .map(|token| Logprob { token, logprob: logprob(token) })
        .collect();
    TokenLogprobs { chosen: logprob(chosen), top }
}
