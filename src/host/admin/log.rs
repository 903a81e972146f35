//! The last events of a house, kept for those who ask later, and handed on to those who listen now.

use super::protocol::Stamped;
use playhouse_actors::HouseEvent;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::broadcast;

/// Events kept.
const KEPT_MAX: usize = 512;

/// The log. Cheap to clone: all clones are one log.
#[derive(Debug, Clone)]
pub(super) struct EventLog {
    kept: Arc<Mutex<Kept>>,
    news: broadcast::Sender<Stamped>,
}

#[derive(Debug, Default)]
struct Kept {
    next_number: u64,
    events: VecDeque<Stamped>,
}

impl EventLog {
    pub(super) fn new() -> Self {
        Self { kept: Arc::default(), news: broadcast::channel(KEPT_MAX).0 }
    }

    /// Writes down what `house` tells until it ends.
    pub(super) async fn keep(self, mut house: broadcast::Receiver<HouseEvent>) {
        loop {
            match house.recv().await {
                Ok(event) => self.add(event),
                // Events that came too fast are counted, so that their absence shows in the numbers.
                Err(broadcast::error::RecvError::Lagged(n_lost)) => self.kept().next_number += n_lost,
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Holders push and copy; a panic between leaves the list whole.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, event: HouseEvent) {
        let mut kept = self.kept();
        let stamped = Stamped::now(kept.next_number, event);
        kept.next_number += 1;
        if kept.events.len() == KEPT_MAX {
            kept.events.pop_front();
        }
        kept.events.push_back(stamped.clone());
        // Sent under the lock: nobody can see it in the list and be told of it again. Nobody may listen at all.
        let _ = self.news.send(stamped);
    }

    /// What was kept so far, and what follows it without a gap.
    pub(super) fn read(&self) -> (Vec<Stamped>, broadcast::Receiver<Stamped>) {
        let kept = self.kept();
        (kept.events.iter().cloned().collect(), self.news.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::inventory::DeviceId;

    fn event(number: usize) -> HouseEvent {
        HouseEvent::Released { device: DeviceId::gpu(format!("GPU-{number}")) }
    }

    #[test]
    fn history_and_news_join_without_gap_or_repeat() {
        let log = EventLog::new();
        (0..3).for_each(|number| log.add(event(number)));
        let (kept, mut news) = log.read();
        log.add(event(3));
        assert_eq!(kept.iter().map(|stamped| stamped.number).collect::<Vec<_>>(), [0, 1, 2]);
        let next = news.try_recv().expect("told");
        assert_eq!((next.number, next.event), (3, event(3)));
        assert!(news.try_recv().is_err(), "only once");
    }

    #[test]
    fn the_oldest_make_room() {
        let log = EventLog::new();
        (0..KEPT_MAX + 5).for_each(|number| log.add(event(number)));
        let (kept, _) = log.read();
        assert_eq!((kept.len(), kept[0].number), (KEPT_MAX, 5));
    }
}
