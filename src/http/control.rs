//! What the front needs of its host besides a way to the models: devices, the configured models, and what happened.

use playhouse_actors::HouseEvent;
use playhouse_actors::inventory::{Device, HealthKind};
use playhouse_actors::policy::ladder::Rung;
use playhouse_actors::policy::outcome::WorkerEnd;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// A future that a trait object can give back.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A model of the configuration, whether it runs or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfiguredModel {
    /// Its name.
    pub name: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Whether the house is to have it running.
    pub wanted: bool,
}

/// Why the host did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The configuration has no such model. Models are named, never found by a path.
    #[error("there is no model `{0}` in the configuration")]
    UnknownModel(String),
    /// There is no room for it, or its file cannot be read.
    #[error("{0}")]
    Refused(String),
    /// The host is about to stop.
    #[error("the host is stopping")]
    Stopping,
}

/// What the host does for the front. Nothing here may block.
pub trait Control: Send + Sync + 'static {
    /// The devices now; empty where there is no GPU.
    fn devices(&self) -> BoxFuture<'_, Vec<Device>>;

    /// The models of the configuration in its order.
    fn models(&self) -> Vec<ConfiguredModel>;

    /// Has a configured model run. Returns when its replicas are started, not when they are ready.
    fn load<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>>;

    /// Ends the replicas of a model; its requests go on to their end or are refused as the house does at a reload.
    fn unload<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>>;

    /// What the dashboard shows of the configuration. No secrets.
    fn config(&self) -> serde_json::Value;

    /// What happened since the host's start.
    fn events(&self) -> &EventLog;
}

/// Something that happened, with its number and time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recorded {
    /// 0, 1, 2 ... since the host's start.
    pub number: u64,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub event: HouseEvent,
}

/// Counts of what happened, for metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventCounts {
    /// Workers that ended, by (model, replica, device, reason); those that were asked to are not counted.
    pub restarts: BTreeMap<(String, u32, String, &'static str), u64>,
    /// Restarts because memory ran out, by device: the rung of the ladder that a supervisor takes.
    pub oom_rungs: BTreeMap<(String, Rung), u64>,
    /// XIDs, by (device, XID).
    pub xids: BTreeMap<(String, u64), u64>,
    /// Times that a device was given up.
    pub quarantines: BTreeMap<String, u64>,
    /// Actors that failed and were started again.
    pub actor_failures: u64,
    /// Events that were lost because nobody recorded them in time.
    pub lost: u64,
}

/// Events kept for those who ask later.
const RECENT_MAX: usize = 512;

/// The last events, counts of all of them, and a way to hear of the next. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventLog {
    inner: Arc<Mutex<Inner>>,
    news: broadcast::Sender<Recorded>,
}

#[derive(Debug, Default)]
struct Inner {
    recent: VecDeque<Recorded>,
    next: u64,
    counts: EventCounts,
    /// Where each replica's last worker was started.
    places: BTreeMap<(String, u32), String>,
}

impl EventLog {
    /// Records what `house` tells from now on, until the house is gone. Make it right after the house is started.
    pub fn record(mut house: broadcast::Receiver<HouseEvent>) -> Self {
        let log = Self { inner: Arc::default(), news: broadcast::channel(RECENT_MAX).0 };
        let recorder = log.clone();
        tokio::spawn(async move {
            loop {
                match house.recv().await {
                    Ok(event) => recorder.push(event),
                    Err(broadcast::error::RecvError::Lagged(lost)) => recorder.lock().counts.lost += lost,
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        log
    }

    /// The last events, oldest first.
    pub fn recent(&self) -> Vec<Recorded> {
        self.lock().recent.iter().cloned().collect()
    }

    /// Counts since the host's start.
    pub fn counts(&self) -> EventCounts {
        self.lock().counts.clone()
    }

    /// News from now on. A listener that is too slow loses the oldest.
    pub fn listen(&self) -> broadcast::Receiver<Recorded> {
        self.news.subscribe()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Counters and a queue: whole even if somebody panicked between two of them.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: HouseEvent) {
        let mut inner = self.lock();
        inner.count(&event);
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        let recorded = Recorded { number: inner.next, at_ms, event };
        inner.next += 1;
        if inner.recent.len() == RECENT_MAX {
            inner.recent.pop_front();
        }
        inner.recent.push_back(recorded.clone());
        drop(inner);
        // Without a listener it is in `recent` all the same.
        let _ = self.news.send(recorded);
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
                if matches!(end, WorkerEnd::OutOfMemory { .. }) {
                    *self.counts.oom_rungs.entry((place.clone(), Rung::ShrinkKv)).or_default() += 1;
                }
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
