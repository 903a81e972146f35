//! Bias and penalties: what changes a logit before any probability is computed.
//!
//! In f32, each operation rounded: add the biases in the order given; then, for ids seen in prompt or output, divide a
//! positive logit by the repetition penalty and multiply any other with it (Keskar et al. 2019, "CTRL"); then, for ids seen
//! in the output, subtract the presence penalty, and the frequency penalty times the count. The result is clamped to
//! finite values; only a bias of minus infinity forbids an id.

use playhouse_actors::engine::SamplingParams;
use std::collections::HashMap;

/// How often each id was seen. Stays empty where no penalty needs it.
#[derive(Debug, Clone)]
pub(super) struct History {
    is_needed: bool,
    seen: HashMap<u32, u32>,
}

impl History {
    /// Whether penalties change logits.
    pub(super) fn is_needed(&self) -> bool {
        self.is_needed
    }

    /// Of a sequence that has emitted nothing.
    pub(super) fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let repetition = params.repetition_penalty != 1.0;
        let is_needed = repetition || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        // Prompt ids have a count of 0: seen, but not in the output.
        let seen = if repetition { prompt.iter().map(|&token| (token, 0)).collect() } else { HashMap::new() };
        Self { is_needed, seen }
    }

    /// Each id that was seen, with how often it is in the output; in no order.
    pub(super) fn counts(&self) -> Vec<(u32, u32)> {
        self.seen.iter().map(|(&token, &count)| (token, count)).collect()
    }

    /// Notes an emitted token.
    pub(super) fn push(&mut self, token: u32) {
        if self.is_needed {
            *self.seen.entry(token).or_insert(0) += 1;
        }
    }
}

/// Applies bias and penalties in place.
pub(super) fn apply(params: &SamplingParams, history: &History, logits: &mut [f32]) {
    for &(token, bias) in &params.logit_bias {
        let logit = &mut logits[token as usize];
        let is_forbidden = *logit == f32::NEG_INFINITY || bias == f32::NEG_INFINITY;
        *logit = if is_forbidden { f32::NEG_INFINITY } else { (*logit + bias).clamp(f32::MIN, f32::MAX) };
    }
    // The order of iteration is arbitrary and does not matter: each id is changed on its own.
    for (&token, &count) in &history.seen {
        let logit = &mut logits[token as usize];
        if *logit != f32::NEG_INFINITY {
            *logit = penalised(*logit, count, params).clamp(f32::MIN, f32::MAX);
        }
    }
}

fn penalised(logit: f32, count: u32, params: &SamplingParams) -> f32 {
    let repetition = params.repetition_penalty;
    let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
    if count == 0 {
        return logit;
    }
    let logit = logit - params.presence_penalty;
    let frequency = params.frequency_penalty * count as f32;
    logit - frequency
}
