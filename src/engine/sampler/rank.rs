//! The order of ids by (logit descending, id ascending). `-0.0` and `0.0` are the same logit.

use std::cmp::Ordering;

/// Which of two ids ranks first. Logits are not NaN.
pub(super) fn order(logits: &[f32], a: u32, b: u32) -> Ordering {
    let (logit_a, logit_b) = (logits[a as usize], logits[b as usize]);
    logit_b.partial_cmp(&logit_a).expect("logits were checked").then(a.cmp(&b))
}

/// The id of rank 0.
pub(super) fn first(logits: &[f32]) -> u32 {
    let mut best = (0u32, f32::NEG_INFINITY);
    for (token, &logit) in (0u32..).zip(logits) {
        if logit > best.1 {
            best = (token, logit);
        }
    }
    best.0
}

/// The ids of the first `n` ranks, in order.
pub(super) fn top(logits: &[f32], n: usize) -> Vec<u32> {
    if n == 0 {
        return Vec::new();
    }
    let mut tokens: Vec<u32> = (0u32..).take(logits.len()).collect();
    if n < tokens.len() {
        tokens.select_nth_unstable_by(n - 1, |&a, &b| order(logits, a, b));
        tokens.truncate(n);
    }
    tokens.sort_unstable_by(|&a, &b| order(logits, a, b));
    tokens
}
