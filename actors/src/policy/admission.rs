//! How much a model takes on: so many requests, and so many tokens that they may still need. Full is a typed refusal
//! that says when to ask again, from the speed that was measured.

use super::Moment;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Bounds per model, over all its replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Accepted, unfinished requests.
    pub requests: u32,
    /// Tokens that those may still need, prompt and output.
    pub tokens: u64,
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Full {
    /// So many requests are open already.
    #[error("{open} requests are open, the limit is {limit}")]
    Requests {
        /// Open requests.
        open: u32,
        /// The limit.
        limit: u32,
        /// When to ask again.
        retry_after: Duration,
    },
    /// The open requests need so many tokens already.
    #[error("the open requests need {open} tokens, this one {needed}, the limit is {limit}")]
    Tokens {
        /// Tokens the open requests may need.
        open: u64,
        /// Tokens this one may need.
        needed: u64,
        /// The limit.
        limit: u64,
        /// When to ask again.
        retry_after: Duration,
    },
    /// The request alone is more than the limit: there is no use in asking again.
    #[error("the request needs {needed} tokens, more than the limit of {limit}")]
    TooLarge {
        /// Tokens this one may need.
        needed: u64,
        /// The limit.
        limit: u64,
    },
}

impl Full {
    /// When to ask again, if ever.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Requests { retry_after, .. } | Self::Tokens { retry_after, .. } => Some(*retry_after),
            Self::TooLarge { .. } => None,
        }
    }
}

/// Clients are never told to come back sooner or later than this.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// The speed is averaged over about this long.
const SPEED_HALF_LIFE: Duration = Duration::from_secs(10);

/// What one model has taken on.
#[derive(Debug, Clone, PartialEq)]
pub struct Admission {
    limits: AdmissionLimits,
    open_requests: u32,
    open_tokens: u64,
    speed: Speed,
}

impl Admission {
    /// Nothing taken on yet.
    pub fn new(limits: AdmissionLimits) -> Self {
        Self { limits, open_requests: 0, open_tokens: 0, speed: Speed::default() }
    }

    /// Takes a request that may need `needed` tokens, or says why not. What was taken is given back by
    /// [`Admission::release`] with the same number.
    ///
    /// # Errors
    /// [`Full`]; nothing was taken.
    pub fn admit(&mut self, needed: u64) -> Result<(), Full> {
        let AdmissionLimits { requests, tokens } = self.limits;
        if needed > tokens {
            return Err(Full::TooLarge { needed, limit: tokens });
        }
        if self.open_requests >= requests {
            // On average one of them ends after its share of the open tokens.
            let share = self.open_tokens / u64::from(self.open_requests.max(1));
            let retry_after = self.speed.time_for(share);
            return Err(Full::Requests { open: self.open_requests, limit: requests, retry_after });
        }
        let over = self.open_tokens.saturating_add(needed).saturating_sub(tokens);
        if over > 0 {
            let retry_after = self.speed.time_for(over);
            return Err(Full::Tokens { open: self.open_tokens, needed, limit: tokens, retry_after });
        }
        self.open_requests += 1;
        self.open_tokens += needed;
        Ok(())
    }

    /// A request that was taken with `needed` tokens has ended.
    pub fn release(&mut self, needed: u64) {
        self.open_requests = self.open_requests.saturating_sub(1);
        self.open_tokens = self.open_tokens.saturating_sub(needed);
    }

    /// `tokens` were computed, prompt or output, up to `now`.
    pub fn measured(&mut self, tokens: u64, now: Moment) {
        self.speed.add(tokens, now);
    }

    /// Takes new limits; what was taken on stays.
    pub fn set_limits(&mut self, limits: AdmissionLimits) {
        self.limits = limits;
    }

    /// Requests taken and not ended.
    pub fn open_requests(&self) -> u32 {
        self.open_requests
    }

    /// Tokens that those may need.
    pub fn open_tokens(&self) -> u64 {
        self.open_tokens
    }

    /// Tokens per second, if any were measured.
    pub fn tokens_per_second(&self) -> Option<f64> {
        self.speed.per_second
    }
}

/// An average of tokens per second in which old measurements fade.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Speed {
    per_second: Option<f64>,
    since: Option<Moment>,
    pending: u64,
}

impl Speed {
    fn add(&mut self, tokens: u64, now: Moment) {
        let since = *self.since.get_or_insert(now);
        self.pending = self.pending.saturating_add(tokens);
        let elapsed = now.saturating_sub(since);
        // Below this the clock's own steps would show.
        if elapsed < Duration::from_millis(100) {
            return;
        }
        let sample = self.pending as f64 / elapsed.as_secs_f64();
        let keep = 0.5f64.powf(elapsed.as_secs_f64() / SPEED_HALF_LIFE.as_secs_f64());
        self.per_second = Some(self.per_second.map_or(sample, |old| old * keep + sample * (1.0 - keep)));
        self.since = Some(now);
        self.pending = 0;
    }

    fn time_for(&self, tokens: u64) -> Duration {
        let seconds = self.per_second.filter(|speed| *speed > 0.0).map(|speed| tokens as f64 / speed);
        let (least, most) = RETRY_AFTER;
        match seconds {
            Some(seconds) if seconds >= most.as_secs_f64() => most,
            // HTTP's `Retry-After` is in whole seconds.
            Some(seconds) => Duration::from_secs_f64(seconds.ceil()).clamp(least, most),
            None => least,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn full_says_when_to_come_back() {
        let mut admission = Admission::new(AdmissionLimits { requests: 2, tokens: 1000 });
        assert_eq!(admission.admit(1001), Err(Full::TooLarge { needed: 1001, limit: 1000 }));
        admission.admit(600).expect("empty");
        let unmeasured = Full::Tokens { open: 600, needed: 500, limit: 1000, retry_after: Duration::from_secs(1) };
        assert_eq!(admission.admit(500), Err(unmeasured));
        admission.measured(0, Duration::from_secs(1));
        admission.measured(50, Duration::from_secs(2));
        let measured = admission.admit(500).expect_err("full").retry_after();
        assert_eq!(measured, Some(Duration::from_secs(2)), "100 tokens too many at 50 a second");
        admission.admit(400).expect("exactly full");
        let full = Full::Requests { open: 2, limit: 2, retry_after: Duration::from_secs(10) };
        assert_eq!(admission.admit(0), Err(full), "500 tokens a request at 50 a second");
        admission.release(600);
        admission.admit(600).expect("room again");
    }

    proptest! {
        /// What is open never exceeds the limits, and everything released leaves nothing behind.
        #[test]
        fn never_more_than_the_limits(
            requests in 1u32..6,
            tokens in 1u64..500,
            steps in prop::collection::vec((0u64..600, any::<bool>(), 0u64..5000), 0..80),
        ) {
            let mut admission = Admission::new(AdmissionLimits { requests, tokens });
            let (mut open, mut now) = (Vec::new(), Duration::ZERO);
            for (needed, release, ms) in steps {
                now += Duration::from_millis(ms);
                admission.measured(needed, now);
                if release {
                    if let Some(needed) = open.pop() {
                        admission.release(needed);
                    }
                } else {
                    match admission.admit(needed) {
                        Ok(()) => open.push(needed),
                        Err(full) => {
                            let wait = full.retry_after();
                            prop_assert!(wait.is_none_or(|wait| (RETRY_AFTER.0..=RETRY_AFTER.1).contains(&wait)));
                            prop_assert_eq!(wait.is_none(), needed > tokens);
                        }
                    }
                }
                prop_assert!(admission.open_requests() <= requests && admission.open_tokens() <= tokens);
                prop_assert_eq!(admission.open_tokens(), open.iter().sum::<u64>());
            }
            open.drain(..).for_each(|needed| admission.release(needed));
            prop_assert_eq!((admission.open_requests(), admission.open_tokens()), (0, 0));
        }
    }
}
