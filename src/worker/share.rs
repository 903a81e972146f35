//! How many threads a worker uses on the CPU: the cores, shared by the workers there are. The text does not depend on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the workers of a host.
#[derive(Debug, Clone, Default)]
pub(super) struct Share {
    live: Arc<AtomicUsize>,
    /// Workers that are to be expected; as many share the cores even before all of them run.
    expected: usize,
}

impl Share {
    pub(super) fn expecting(self, n_workers: usize) -> Self {
        Self { expected: n_workers, ..self }
    }

    /// The share of one more worker, until it is dropped.
    pub(super) fn take(&self) -> Taken {
        let live = self.live.fetch_add(1, Ordering::Relaxed) + 1;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Taken { live: Arc::clone(&self.live), threads: threads_of(cores, live.max(self.expected)) }
    }
}

fn threads_of(cores: usize, workers: usize) -> usize {
    (cores / workers.max(1)).max(1)
}

/// One worker's share.
#[derive(Debug)]
pub(super) struct Taken {
    live: Arc<AtomicUsize>,
    threads: usize,
}

impl Taken {
    pub(super) fn threads(&self) -> u32 {
        u32::try_from(self.threads).unwrap_or(u32::MAX)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.live.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_and_nobody_goes_without() {
        assert_eq!([1, 2, 3, 4, 9].map(|workers| threads_of(8, workers)), [8, 4, 2, 2, 1]);
        let share = Share::default();
        let (first, second) = (share.take(), share.take());
        assert_eq!(share.live.load(Ordering::Relaxed), 2);
        drop((first, second));
        assert_eq!(share.live.load(Ordering::Relaxed), 0, "a worker that ended counts no more");
        let cores = share.take().threads();
        assert_eq!(share.clone().expecting(usize::MAX).take().threads(), 1);
        assert!(cores >= 1);
    }
}
