//! What each key has open and has used lately, and whether it may have more.
//!
//! Requests and tokens are counted by buckets that fill at so many a minute and hold a minute's worth. A request spends
//! its tokens while it runs, so a bucket may fall below nothing; the next request waits until it is filled again.

use super::error::ApiError;
use super::keys::KeyId;
use playhouse_config::PerKey;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Tokens are taken from the bucket in bunches.
const BUNCH: u64 = 64;

/// Of all keys. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Quotas(Arc<Mutex<HashMap<KeyId, Used>>>);

#[derive(Debug)]
struct Used {
    open: u32,
    requests: Bucket,
    tokens: Bucket,
}

#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_minute: f64) -> Self {
        Self { per_minute, level: per_minute, at: Instant::now() }
    }

    /// How long until there is one whole again.
    fn wait(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let filled = (now - self.at).as_secs_f64() * self.per_minute / 60.0;
        (self.level, self.at) = ((self.level + filled).min(self.per_minute), now);
        let missing = 1.0 - self.level;
        (missing > 0.0).then(|| Duration::from_secs_f64(missing * 60.0 / self.per_minute))
    }
}

/// One open request of a key. Dropped, it is no longer open.
#[derive(Debug)]
pub(super) struct Place {
    quotas: Quotas,
    key: KeyId,
    pending: u64,
}

impl Quotas {
    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, Used>> {
        // Numbers, each whole even if somebody panicked between two of them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more request of this key.
    ///
    /// # Errors
    /// 429 if the key has as much as it may.
    pub(super) fn open(&self, key: KeyId, may: &PerKey) -> Result<Place, ApiError> {
        let mut keys = self.lock();
        let used = keys.entry(key).or_insert_with(|| Used {
            open: 0,
            requests: Bucket::full(may.requests_per_minute.map_or(f64::INFINITY, f64::from)),
            tokens: Bucket::full(may.tokens_per_minute.map_or(f64::INFINITY, |tokens| tokens as f64)),
        });
        if let Some(most) = may.streams.filter(|most| used.open >= *most) {
            let message = format!("this key has {most} requests open, which is the most it may");
            return Err(ApiError::busy(message, Duration::from_secs(1)));
        }
        if let (Some(most), Some(wait)) = (may.tokens_per_minute, used.tokens.wait()) {
            let message = format!("this key has used the {most} tokens that it may in a minute");
            return Err(ApiError::busy(message, wait));
        }
        if let (Some(most), Some(wait)) = (may.requests_per_minute, used.requests.wait()) {
            let message = format!("this key has made the {most} requests that it may in a minute");
            return Err(ApiError::busy(message, wait));
        }
        used.open += 1;
        used.requests.level -= 1.0;
        Ok(Place { quotas: self.clone(), key, pending: 0 })
    }
}

impl Place {
    /// So many tokens were read or written.
    pub(super) fn spend(&mut self, tokens: u64) {
        self.pending += tokens;
        if self.pending >= BUNCH {
            self.settle(0);
        }
    }

    fn settle(&mut self, closed: u32) {
        if let Some(used) = self.quotas.lock().get_mut(&self.key) {
            used.tokens.level -= std::mem::take(&mut self.pending) as f64;
            used.open -= closed;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.settle(1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::KeyRing;
    use super::*;

    fn key(name: &str) -> KeyId {
        [name].into_iter().collect::<KeyRing>().find(name.as_bytes()).expect("it is there")
    }

    fn refused(quotas: &Quotas, may: &PerKey) -> String {
        let error = quotas.open(key("a"), may).expect_err("it has as much as it may");
        error.json()["error"]["message"].as_str().expect("a text").to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_has_so_many_streams() {
        let (quotas, may) = (Quotas::default(), PerKey { streams: Some(1), ..PerKey::default() });
        let first = quotas.open(key("a"), &may).expect("free");
        assert!(refused(&quotas, &may).contains("1 requests open"));
        assert!(quotas.open(key("b"), &may).is_ok(), "another key");
        drop(first);
        assert!(quotas.open(key("a"), &may).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_has_so_many_requests_and_tokens_in_a_minute() {
        let (quotas, may) = (Quotas::default(), PerKey { requests_per_minute: Some(3), ..PerKey::default() });
        for _ in 0..3 {
            quotas.open(key("a"), &may).expect("it may");
        }
        assert!(refused(&quotas, &may).contains("3 requests that it may in a minute"));
        tokio::time::advance(Duration::from_secs(20)).await;
        quotas.open(key("a"), &may).expect("a third of a minute has passed");
        assert!(refused(&quotas, &may).contains("in a minute"));

        let (quotas, may) = (Quotas::default(), PerKey { tokens_per_minute: Some(60), ..PerKey::default() });
        let mut place = quotas.open(key("a"), &may).expect("it may");
        place.spend(90);
        assert!(refused(&quotas, &may).contains("60 tokens"), "while the first still runs");
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(refused(&quotas, &may).contains("60 tokens"), "it owed 30");
        tokio::time::advance(Duration::from_secs(2)).await;
        quotas.open(key("a"), &may).expect("paid");
        place.spend(3);
        drop(place);
        assert!(refused(&quotas, &may).contains("60 tokens"), "what was pending is counted at the end");
    }
}
