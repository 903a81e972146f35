//! When a worker that ended is started again. One record per device: a bad GPU must not use up the patience that a good
//! one needs (a supervisor-wide counter, as in OTP's `supervisor`, would).
//!
//! ```text
//! [Healthy] --failure--> restart at once --failure--> after min --failure--> after 2 min ... up to max
//!     ^                                                                            |
//!     +------------------- reset_after without failure ----------------------------+--- max_restarts in window
//!                                                                                  v
//!                                                                            [Quarantined] --release--> [Healthy]
//! ```

use super::{Moment, unit_random};
use playhouse_config::Supervision;
use playhouse_config::checked::{Restart, Strategy};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// It was told to.
    Asked,
    /// By itself, with status 0.
    Clean,
    /// In any other way.
    Failure,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Start it again after this long.
    RestartAfter(Duration),
    /// Nothing: this end is final.
    Leave,
    /// The device failed too often. Nothing is started on it until somebody releases it.
    Quarantine,
}

/// The failures of one device.
#[derive(Debug, Clone, PartialEq)]
pub struct RestartRecord {
    policy: Supervision,
    seed: u64,
    /// Within `window`, oldest first.
    failures: VecDeque<Moment>,
    /// Since the last reset: how far the back-off has come.
    streak: u32,
    /// Since when a worker has been ready without a failure.
    healthy_since: Option<Moment>,
    quarantined: bool,
    /// Over the device's life.
    total: u64,
}

impl RestartRecord {
    /// A clean sheet. The seed makes the jitter: give each device its own, so that they do not restart in step.
    pub fn new(policy: Supervision, seed: u64) -> Self {
        Self { policy, seed, failures: VecDeque::new(), streak: 0, healthy_since: None, quarantined: false, total: 0 }
    }

    /// Decides on a worker's end at `now`.
    pub fn on_end(&mut self, end: End, now: Moment) -> Decision {
        if self.quarantined {
            return Decision::Quarantine;
        }
        match (end, self.policy.restart) {
            (End::Asked, _) | (_, Restart::Temporary) | (End::Clean, Restart::Transient) => Decision::Leave,
            // A permanent worker that ends by itself has failed at being permanent.
            (End::Clean, Restart::Permanent) | (End::Failure, Restart::Permanent | Restart::Transient) => {
                self.on_failure(now)
            }
        }
    }

    fn on_failure(&mut self, now: Moment) -> Decision {
        self.reset_if_healthy(now);
        self.forget_before(now);
        self.failures.push_back(now);
        self.healthy_since = None;
        self.total += 1;
        if self.failures.len() >= usize::try_from(self.policy.max_restarts).unwrap_or(usize::MAX) {
            self.quarantined = true;
            return Decision::Quarantine;
        }
        let delay = self.delay();
        self.streak = self.streak.saturating_add(1);
        Decision::RestartAfter(delay)
    }

    /// A worker of the device is ready: from here on it is healthy, however long the load took.
    pub fn on_ready(&mut self, now: Moment) {
        self.healthy_since.get_or_insert(now);
    }

    fn reset_if_healthy(&mut self, now: Moment) {
        if self.healthy_since.is_some_and(|since| now.saturating_sub(since) >= self.policy.reset_after) {
            self.failures.clear();
            self.streak = 0;
        }
    }

    fn forget_before(&mut self, now: Moment) {
        let window = self.policy.window;
        while self.failures.front().is_some_and(|failure| now.saturating_sub(*failure) >= window) {
            self.failures.pop_front();
        }
    }

    /// Nothing before the first restart; then `min`, doubled each time, varied by the jitter, within `min` and `max`.
    fn delay(&self) -> Duration {
        let backoff = &self.policy.backoff;
        let Some(doublings) = self.streak.checked_sub(1) else { return Duration::ZERO };
        let factor = 1u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let plain = backoff.min.saturating_mul(factor).min(backoff.max);
        let vary = 1.0 + backoff.jitter * (2.0 * unit_random(self.seed, self.total) - 1.0);
        plain.mul_f64(vary.max(0.0)).clamp(backoff.min, backoff.max)
    }

    /// Gives the device up for a reason other than too many failures, such as an XID that asks for a reset.
    pub fn quarantine(&mut self) {
        self.quarantined = true;
    }

    /// Forgets everything but the total: an operator says that the device is well.
    pub fn release(&mut self) {
        self.quarantined = false;
        self.failures.clear();
        self.streak = 0;
        self.healthy_since = None;
    }

    /// Whether the device was given up.
    pub fn is_quarantined(&self) -> bool {
        self.quarantined
    }

    /// Failures within the window, as of `now`.
    pub fn recent(&self, now: Moment) -> usize {
        self.failures.iter().filter(|failure| now.saturating_sub(**failure) < self.policy.window).count()
    }

    /// Failures since the host's start.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Takes new limits; the record stays.
    pub fn set_policy(&mut self, policy: Supervision) {
        self.policy = policy;
    }
}

/// Which of a device's `n_children` workers, in the order of their start, are restarted when `failed` ends.
pub fn restarted_with(strategy: Strategy, failed: usize, n_children: usize) -> Range<usize> {
    match strategy {
        Strategy::OneForOne => failed..failed + 1,
        Strategy::OneForAll => 0..n_children,
        Strategy::RestForOne => failed..n_children,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_config::checked::{Backoff, Strategy};
    use proptest::prelude::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_worker_that_always_fails_is_started_four_times() {
        let mut record = RestartRecord::new(Supervision::default(), 7);
        assert_eq!(record.on_end(End::Failure, secs(1)), Decision::RestartAfter(Duration::ZERO), "the first at once");
        let Decision::RestartAfter(second) = record.on_end(End::Failure, secs(2)) else { panic!("no restart") };
        assert!((secs(1)..=Duration::from_millis(1200)).contains(&second), "{second:?}");
        let Decision::RestartAfter(third) = record.on_end(End::Failure, secs(5)) else { panic!("no restart") };
        assert!((Duration::from_millis(1600)..=Duration::from_millis(2400)).contains(&third), "{third:?}");
        assert_eq!(record.on_end(End::Failure, secs(9)), Decision::Quarantine);
        assert_eq!(record.on_end(End::Failure, secs(10_000)), Decision::Quarantine, "until it is released");
        record.release();
        assert_eq!(record.on_end(End::Failure, secs(10_001)), Decision::RestartAfter(Duration::ZERO));
        assert_eq!(record.total(), 5);
    }

    #[test]
    fn ten_healthy_minutes_clear_the_record() {
        let mut record = RestartRecord::new(Supervision::default(), 7);
        record.on_end(End::Failure, secs(0));
        record.on_end(End::Failure, secs(1));
        record.on_end(End::Failure, secs(4));
        let mut early = record.clone();
        record.on_ready(secs(30));
        early.on_ready(secs(30));
        assert_eq!(record.on_end(End::Failure, secs(630)), Decision::RestartAfter(Duration::ZERO));
        assert_eq!(record.recent(secs(630)), 1);
        let Decision::RestartAfter(delay) = early.on_end(End::Failure, secs(629)) else { panic!("not in the window") };
        assert!(delay > secs(1), "a second less than ten minutes is not enough: {delay:?}");
    }

    #[test]
    fn what_is_restarted_is_what_otp_says() {
        let decide = |restart, end| {
            RestartRecord::new(Supervision { restart, ..Supervision::default() }, 0).on_end(end, secs(1))
        };
        let now = Decision::RestartAfter(Duration::ZERO);
        assert_eq!(decide(Restart::Permanent, End::Clean), now);
        assert_eq!(decide(Restart::Permanent, End::Failure), now);
        assert_eq!(decide(Restart::Transient, End::Clean), Decision::Leave);
        assert_eq!(decide(Restart::Transient, End::Failure), now);
        assert_eq!(decide(Restart::Temporary, End::Failure), Decision::Leave);
        assert_eq!(decide(Restart::Permanent, End::Asked), Decision::Leave);
        assert_eq!(restarted_with(Strategy::OneForOne, 1, 3), 1..2);
        assert_eq!(restarted_with(Strategy::OneForAll, 1, 3), 0..3);
        assert_eq!(restarted_with(Strategy::RestForOne, 1, 3), 1..3);
    }

    proptest! {
        /// Never more than `max_restarts - 1` restarts in any window, and every wait within its bounds.
        #[test]
        fn intensity_and_backoff_are_respected(
            gaps in prop::collection::vec(0u64..400_000, 1..60),
            max_restarts in 1u32..8,
            window_ms in 1u64..1_000_000,
            min_ms in 0u64..5_000,
            extra_ms in 0u64..100_000,
            jitter in 0.0f64..=1.0,
            seed: u64,
        ) {
            let (min, max) = (Duration::from_millis(min_ms), Duration::from_millis(min_ms + extra_ms));
            let policy = Supervision {
                max_restarts,
                window: Duration::from_millis(window_ms),
                backoff: Backoff { min, max, jitter },
                ..Supervision::default()
            };
            let mut record = RestartRecord::new(policy.clone(), seed);
            let mut twin = RestartRecord::new(policy.clone(), seed);
            let (mut now, mut restarts): (Moment, Vec<Moment>) = (Duration::ZERO, Vec::new());
            for gap in gaps {
                now += Duration::from_millis(gap);
                let decision = record.on_end(End::Failure, now);
                prop_assert_eq!(decision, twin.on_end(End::Failure, now), "the same seed decides the same");
                let Decision::RestartAfter(delay) = decision else {
                    prop_assert!(record.is_quarantined());
                    break;
                };
                prop_assert!(delay.is_zero() || (min..=max).contains(&delay), "{:?}", delay);
                restarts.push(now);
                let in_window = restarts.iter().filter(|at| now - **at < policy.window).count();
                prop_assert!(in_window < max_restarts as usize);
            }
        }
    }
}
