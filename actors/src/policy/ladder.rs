//! What is given up when memory runs out, one rung at a time, each counted.
//!
//! ```text
//! drop the prefix cache -> preempt the youngest -> refuse the one request    (in the engine, within a step)
//!   -> shrink the KV budget and restart the worker -> quarantine the device  (here, when the worker says it cannot go on)
//! ```

use serde::{Deserialize, Serialize};

/// The rungs, from the least to the most drastic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// Blocks that only the prefix cache holds are freed.
    DropPrefixCache,
    /// The youngest sequence is sent back to the queue.
    Preempt,
    /// The one request that did not fit is refused.
    Refuse,
    /// The worker starts again with less memory for KV.
    ShrinkKv,
    /// The device is given up.
    Quarantine,
}

impl Rung {
    /// All of them, in order.
    pub const ALL: [Self; 5] = [Self::DropPrefixCache, Self::Preempt, Self::Refuse, Self::ShrinkKv, Self::Quarantine];

    /// One word, for labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::DropPrefixCache => "drop_prefix_cache",
            Self::Preempt => "preempt",
            Self::Refuse => "refuse",
            Self::ShrinkKv => "shrink_kv",
            Self::Quarantine => "quarantine",
        }
    }

    /// What was done, for people.
    pub fn words(self) -> &'static str {
        match self {
            Self::DropPrefixCache => "prefix cache dropped",
            Self::Preempt => "preempted",
            Self::Refuse => "request refused",
            Self::ShrinkKv => "started again with less KV",
            Self::Quarantine => "given up",
        }
    }
}

/// How often each rung was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RungCounts {
    /// [`Rung::DropPrefixCache`].
    pub drop_prefix_cache: u64,
    /// [`Rung::Preempt`].
    pub preempt: u64,
    /// [`Rung::Refuse`].
    pub refuse: u64,
    /// [`Rung::ShrinkKv`].
    pub shrink_kv: u64,
    /// [`Rung::Quarantine`].
    pub quarantine: u64,
}

impl RungCounts {
    fn of(&mut self, rung: Rung) -> &mut u64 {
        match rung {
            Rung::DropPrefixCache => &mut self.drop_prefix_cache,
            Rung::Preempt => &mut self.preempt,
            Rung::Refuse => &mut self.refuse,
            Rung::ShrinkKv => &mut self.shrink_kv,
            Rung::Quarantine => &mut self.quarantine,
        }
    }

    /// How often this one was.
    pub fn get(mut self, rung: Rung) -> u64 {
        *self.of(rung)
    }

    /// It was taken so many times more.
    pub fn add(&mut self, rung: Rung, times: u64) {
        let count = self.of(rung);
        *count = count.saturating_add(times);
    }

    /// Those that were taken, the least drastic first.
    pub fn taken(self) -> impl Iterator<Item = (Rung, u64)> {
        Rung::ALL.into_iter().map(move |rung| (rung, self.get(rung))).filter(|(_, times)| *times > 0)
    }

    /// What was added since `before`, of the same worker.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let mut since = Self::default();
        Rung::ALL.into_iter().for_each(|rung| since.add(rung, self.get(rung).saturating_sub(before.get(rung))));
        since
    }
}

/// What a placement does about a worker that ran out of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Restart with so many bytes for KV.
    Shrink {
        /// The new budget.
        kv_bytes: u64,
    },
    /// There is nothing left to shrink.
    Quarantine,
}

/// A smaller budget is worth a restart only if it frees something: three quarters of the last.
const SHRINK_NUMERATOR: u64 = 3;
const SHRINK_DENOMINATOR: u64 = 4;

/// Decides for a worker that ended out of memory with `kv_bytes` for KV, where `kv_bytes_min` are needed for one
/// sequence. Each step frees at least a quarter, or more if it is known that more was missing.
pub fn next(kv_bytes: u64, kv_bytes_min: u64, requested: u64, free: u64) -> Step {
    let missing = requested.saturating_sub(free);
    let scaled = u128::from(kv_bytes) * u128::from(SHRINK_NUMERATOR) / u128::from(SHRINK_DENOMINATOR);
    let quarter_less = u64::try_from(scaled).unwrap_or(kv_bytes);
    let less = quarter_less.min(kv_bytes.saturating_sub(missing)).max(kv_bytes_min);
    if less < kv_bytes { Step::Shrink { kv_bytes: less } } else { Step::Quarantine }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_quarter_less_or_what_was_missing() {
        assert_eq!(next(1000, 100, 10, 5), Step::Shrink { kv_bytes: 750 });
        assert_eq!(next(1000, 100, 600, 100), Step::Shrink { kv_bytes: 500 });
        assert_eq!(next(1000, 900, 600, 100), Step::Shrink { kv_bytes: 900 }, "never less than one sequence needs");
        assert_eq!(next(100, 100, 10, 5), Step::Quarantine);
        assert_eq!(next(0, 0, 10, 5), Step::Quarantine);
    }

    #[test]
    fn counts_add_up_and_show_what_is_new() {
        let mut counts = RungCounts::default();
        counts.add(Rung::Refuse, 2);
        let before = counts;
        counts.add(Rung::DropPrefixCache, 1);
        counts.add(Rung::Refuse, 1);
        let taken: Vec<_> = counts.taken().collect();
        assert_eq!(taken, [(Rung::DropPrefixCache, 1), (Rung::Refuse, 3)]);
        let new: Vec<_> = counts.since(before).taken().collect();
        assert_eq!(new, [(Rung::DropPrefixCache, 1), (Rung::Refuse, 1)]);
    }

    proptest! {
        #[test]
        fn the_ladder_ends(kv: u64, min: u64, requested: u64, free: u64) {
            let mut bytes = kv;
            for _ in 0..400 {
                match next(bytes, min, requested, free) {
                    Step::Shrink { kv_bytes } => {
                        prop_assert!(kv_bytes < bytes && kv_bytes >= min);
                        bytes = kv_bytes;
                    }
                    Step::Quarantine => return Ok(()),
                }
            }
            prop_assert!(false, "never quarantined");
        }
    }
}
