//! News for whoever listens: bounded, and never waited for. A listener that is too slow loses the oldest.

use crate::event_log::EventLog;
use crate::messages::HouseEvent;
use crate::policy::Moment;
use crate::policy::outcome::WorkerEnd;
use tokio::sync::broadcast;
use tokio::time::Instant;

/// Events kept for listeners that are behind.
const EVENTS_MAX: usize = 1024;

/// Where actors tell what happened.
#[derive(Debug, Clone)]
pub struct EventBus {
    news: broadcast::Sender<HouseEvent>,
    log: EventLog,
}

impl EventBus {
    /// A bus without listeners.
    pub fn new() -> Self {
        Self { news: broadcast::channel(EVENTS_MAX).0, log: EventLog::new() }
    }

    /// Tells everyone who listens, and the log.
    pub fn tell(&self, event: HouseEvent) {
        log(&event);
        self.log.add(event.clone());
        // Without a listener it is in the log all the same.
        let _ = self.news.send(event);
    }

    /// Listens from now on.
    pub fn listen(&self) -> broadcast::Receiver<HouseEvent> {
        self.news.subscribe()
    }

    /// What was told so far.
    pub fn log(&self) -> &EventLog {
        &self.log
    }
}

/// The same for the log: what an operator must look at is an error, what was mended a warning.
fn log(event: &HouseEvent) {
    match event {
        HouseEvent::WorkerStarted { replica, device, incarnation } => {
            tracing::info!(%replica, %device, incarnation, "a worker starts");
        }
        HouseEvent::WorkerReady { replica, after } => tracing::info!(%replica, ?after, "a worker takes requests"),
        HouseEvent::WorkerEnded { replica, end: end @ WorkerEnd::Asked, .. } => {
            tracing::info!(%replica, %end, "a worker ended");
        }
        HouseEvent::WorkerEnded { replica, end, in_flight } => {
            tracing::warn!(%replica, %end, in_flight, "a worker ended");
        }
        HouseEvent::RestartScheduled { replica, device, after, kv_bytes } => {
            tracing::info!(%replica, %device, ?after, kv_bytes, "a worker is to be started again");
        }
        HouseEvent::OutOfMemory { replica, device, rung, times } => {
            tracing::warn!(%replica, %device, times, "out of memory: {}", rung.words());
        }
        HouseEvent::Quarantined { device, reason } => tracing::error!(%device, reason, "a device is given up"),
        HouseEvent::Released { device } => tracing::info!(%device, "a device is taken back"),
        HouseEvent::ModelFailed { replica, reason } => tracing::error!(%replica, reason, "a model cannot be loaded"),
        HouseEvent::Health { device, kind } => tracing::warn!(device, ?kind, "a device reports"),
        HouseEvent::Resumed { id, emitted, replica } => {
            tracing::debug!(request = id.0, emitted, %replica, "a request goes on");
        }
        HouseEvent::Poisoned { id } => tracing::warn!(request = id.0, "a request is refused as poison"),
        HouseEvent::ActorRestarted { actor, reason } => {
            tracing::error!(actor, reason, "an actor failed and is started again");
        }
        HouseEvent::GaveUp { reason } => tracing::error!(reason, "nothing is left that could serve"),
    }
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new()
    }
}

/// Turns the runtime's clock into the moments that policies take; paused clocks too.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// Now is moment 0.
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// The moment it is.
    pub fn now(&self) -> Moment {
        self.start.elapsed()
    }
}
