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
