//! Which slot of the device counts the tokens of which sequence, for penalties.

use super::sequence::QueueKey;
use std::collections::HashMap;

/// The slots of a device, and what each of them holds.
///
/// A slot stays with its sequence for as long as nobody else needs it. What a device has counted is noted here; where that is not what
/// the sequence has emitted, because a step was lost or its token was chosen elsewhere, the counts are to be written again.
#[derive(Debug)]
pub(super) struct Histories {
    free: Vec<u32>,
    held: HashMap<QueueKey, Held>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    slot: u32,
    /// Tokens of the output that are counted there; `None`: it holds another sequence's.
    n_counted: Option<u32>,
}

impl Histories {
    /// `n` slots, all free.
    pub(super) fn new(n: u32) -> Self {
        Self { free: (0..n).rev().collect(), held: HashMap::new() }
    }

    /// The slot of a sequence that has emitted `n_emitted` tokens, and whether it holds their counts. Slots of sequences that do not
    /// run are taken where none is free.
    ///
    /// # Panics
    /// If more sequences run than there are slots.
    pub(super) fn slot(&mut self, key: QueueKey, n_emitted: u32, runs: impl Fn(QueueKey) -> bool) -> (u32, bool) {
        if let Some(held) = self.held.get(&key) {
            return (held.slot, held.n_counted == Some(n_emitted));
        }
        if self.free.is_empty() {
            let free = &mut self.free;
            self.held.retain(|key, held| runs(*key) || (free.push(held.slot), false).1);
        }
        let slot = self.free.pop().expect("no more sequences run than there are rows of logits");
        self.held.insert(key, Held { slot, n_counted: None });
        (slot, false)
    }

    /// The device is about to count the token of a sequence after which it has emitted `n_emitted`.
    pub(super) fn counts(&mut self, key: QueueKey, n_emitted: u32) {
        if let Some(held) = self.held.get_mut(&key) {
            held.n_counted = Some(n_emitted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_kept_and_its_counts_are_written_when_they_are_not_right() {
        let key = |n| QueueKey::new(0, n);
        let mut histories = Histories::new(2);
        let all = |_| true;
        assert_eq!(histories.slot(key(1), 0, all), (0, false));
        histories.counts(key(1), 1);
        assert_eq!(histories.slot(key(1), 1, all), (0, true));
        // The step was lost, or the host chose a token: what is counted is not what was emitted.
        assert_eq!(histories.slot(key(1), 0, all), (0, false));
        assert_eq!(histories.slot(key(1), 2, all), (0, false));
        assert_eq!(histories.slot(key(2), 7, all), (1, false));
        assert_eq!(histories.slot(key(3), 7, |other| other != key(1)), (0, false), "the first does not run any more");
        histories.counts(key(1), 1);
        assert_eq!(histories.slot(key(1), 1, |other| other != key(2)), (1, false), "another was there meanwhile");
    }
}
