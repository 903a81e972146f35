//! The order of ids by (logit descending, id ascending). `-0.0` and `0.0` are the same logit.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

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
    // One comparison an id while few are wanted; beyond that a selection over all of them is quicker.
    let mut tokens = if n <= 256 { top_by_heap(logits, n) } else { top_by_selection(logits, n) };
    tokens.sort_unstable_by(|&a, &b| order(logits, a, b));
    tokens
}

fn top_by_heap(logits: &[f32], n: usize) -> Vec<u32> {
    if n == 0 {
        return Vec::new();
    }
    let mut heap = BinaryHeap::with_capacity(n);
    let mut worst = f32::NEG_INFINITY;
    for (token, &logit) in (0u32..).zip(logits) {
        if heap.len() < n {
            heap.push(Ranked { logit, token });
        } else if logit > worst {
            // Ids ascend, so that an equal logit ranks after all that are kept.
            heap.pop();
            heap.push(Ranked { logit, token });
        } else {
            continue;
        }
        worst = heap.peek().map_or(worst, |last| last.logit);
    }
    heap.into_iter().map(|ranked| ranked.token).collect()
}

fn top_by_selection(logits: &[f32], n: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0u32..).take(logits.len()).collect();
    if 0 < n && n < tokens.len() {
        tokens.select_nth_unstable_by(n - 1, |&a, &b| order(logits, a, b));
    }
    tokens.truncate(n);
    tokens
}

/// An id in a heap whose greatest element is the one that ranks last.
#[derive(Debug, PartialEq)]
struct Ranked {
    logit: f32,
    token: u32,
}

impl Eq for Ranked {}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_logit = other.logit.partial_cmp(&self.logit).expect("logits were checked");
        by_logit.then(self.token.cmp(&other.token))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn heap_and_selection_agree(logits in prop::collection::vec((-9i8..9).prop_map(f32::from), 1..400), n in 0usize..500) {
            let sorted = |mut tokens: Vec<u32>| { tokens.sort_unstable_by(|&a, &b| order(&logits, a, b)); tokens };
            let mut expected = sorted((0u32..).take(logits.len()).collect());
            prop_assert_eq!(first(&logits), expected[0]);
            expected.truncate(n);
            prop_assert_eq!(&sorted(top_by_heap(&logits, n)), &expected);
            prop_assert_eq!(&sorted(top_by_selection(&logits, n)), &expected);
            prop_assert_eq!(&top(&logits, n), &expected);
        }
    }
}
