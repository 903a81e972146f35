//! What happened in a house: the last of it, counts of all of it, and a way to hear of the next. The tree's bus writes it
//! from its first event on, so that nothing is missing, whoever reads it and when.

use crate::inventory::HealthKind;
use crate::messages::HouseEvent;
use crate::policy::outcome::WorkerEnd;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// Events kept for those who ask later.
const KEPT_MAX: usize = 512;

/// An event with its number and the time it was told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stamped {
    /// 0, 1, 2 ... since the host's start.
    pub number: u64,
    /// Milliseconds since 1970, UTC.
    pub unix_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: HouseEvent,
}

/// Counts of what happened, for metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventCounts {
    /// Workers that ended, by (model, replica, device, reason); those that were asked to are not counted.
    pub restarts: BTreeMap<(String, u32, String, &'static str), u64>,
    /// XIDs, by (device, XID).
    pub xids: BTreeMap<(String, u64), u64>,
    /// Times that a device was given up.
    pub quarantines: BTreeMap<String, u64>,
    /// Actors that failed and were started again.
    pub actor_failures: u64,
}

/// The log. Cheap to clone: all clones are one log.
#[derive(Debug, Clone)]
pub struct EventLog {
    inner: Arc<Mutex<Inner>>,
    news: broadcast::Sender<Stamped>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    kept: VecDeque<Stamped>,
    counts: EventCounts,
    /// Where each replica's last worker was started.
    places: BTreeMap<(String, u32), String>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self::new()
    }
}

impl EventLog {
    /// An empty one.
    pub fn new() -> Self {
        Self { inner: Arc::default(), news: broadcast::channel(KEPT_MAX).0 }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Counters and a queue: whole even if somebody panicked between two of them.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an event down and tells those who listen.
    pub fn add(&self, event: HouseEvent) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let mut inner = self.lock();
        inner.count(&event);
        let stamped = Stamped { number: inner.next, unix_ms, event };
        inner.next += 1;
        if inner.kept.len() == KEPT_MAX {
            inner.kept.pop_front();
        }
        inner.kept.push_back(stamped.clone());
        // Sent under the lock: nobody can see it in the list and be told of it again. Nobody may listen at all.
        let _ = self.news.send(stamped);
    }

    /// The last events, oldest first.
    pub fn recent(&self) -> Vec<Stamped> {
        self.lock().kept.iter().cloned().collect()
    }

    /// Counts since the host's start.
    pub fn counts(&self) -> EventCounts {
        self.lock().counts.clone()
    }

    /// News from now on. A listener that is too slow loses the oldest.
    pub fn listen(&self) -> broadcast::Receiver<Stamped> {
        self.news.subscribe()
    }

    /// What was kept so far, and what follows it without a gap.
    pub fn read(&self) -> (Vec<Stamped>, broadcast::Receiver<Stamped>) {
        let inner = self.lock();
        (inner.kept.iter().cloned().collect(), self.news.subscribe())
    }
}

impl Inner {
    fn count(&mut self, event: &HouseEvent) {
        match event {
            HouseEvent::WorkerStarted { replica, device, .. } => {
                self.places.insert((replica.model.clone(), replica.index), device.to_string());
            }
            HouseEvent::WorkerEnded { replica, end, .. } if *end != WorkerEnd::Asked => {
                let place = self.places.get(&(replica.model.clone(), replica.index)).cloned().unwrap_or_default();
                let key = (replica.model.clone(), replica.index, place, end.reason());
                *self.counts.restarts.entry(key).or_default() += 1;
            }
            HouseEvent::Quarantined { device, .. } => {
                *self.counts.quarantines.entry(device.to_string()).or_default() += 1;
            }
            HouseEvent::Health { device, kind: HealthKind::Xid(xid) } => {
                *self.counts.xids.entry((device.clone().unwrap_or_default(), *xid)).or_default() += 1;
            }
            HouseEvent::ActorRestarted { .. } => self.counts.actor_failures += 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::DeviceId;
    use crate::messages::ReplicaId;

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
        let kept = log.recent();
        assert_eq!((kept.len(), kept[0].number), (KEPT_MAX, 5));
    }

    #[test]
    fn ends_are_counted_where_they_happened_unless_they_were_asked_for() {
        let log = EventLog::new();
        let replica = ReplicaId { model: "m".into(), index: 1 };
        let ended = |end| HouseEvent::WorkerEnded { replica: replica.clone(), end, in_flight: 0 };
        log.add(HouseEvent::WorkerStarted { replica: replica.clone(), device: DeviceId::gpu("GPU-1"), incarnation: 1 });
        log.add(ended(WorkerEnd::Signalled(9)));
        log.add(ended(WorkerEnd::Asked));
        let expected = BTreeMap::from([(("m".into(), 1, "GPU-1".into(), "signalled"), 1)]);
        assert_eq!(log.counts().restarts, expected);
    }
}
