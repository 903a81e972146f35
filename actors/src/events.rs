//! News for whoever listens: bounded, and never waited for. A listener that is too slow loses the oldest.

use crate::event_log::EventLog;
use crate::messages::HouseEvent;
use crate::policy::Moment;
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
        tracing::debug!(?event, "supervision");
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
