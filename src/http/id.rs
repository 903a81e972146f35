//! Ids of requests, answers and tool calls: unique, not secret.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

static KEYS: LazyLock<(RandomState, RandomState)> = LazyLock::new(|| (RandomState::new(), RandomState::new()));
static NEXT: AtomicU64 = AtomicU64::new(0);

/// `prefix` and 24 hexadecimal digits: a count hashed with keys drawn at the start, so that ids of two runs differ, too.
pub(super) fn new(prefix: &str) -> String {
    let count = NEXT.fetch_add(1, Ordering::Relaxed);
    let hash = |state: &RandomState| {
        let mut hasher = state.build_hasher();
        hasher.write_u64(count);
        hasher.finish()
    };
    format!("{prefix}{:016x}{:08x}", hash(&KEYS.0), hash(&KEYS.1) >> 32)
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_differ() {
        let ids: std::collections::BTreeSet<String> = (0..1000).map(|_| super::new("req-")).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| id.len() == 28));
    }
}
