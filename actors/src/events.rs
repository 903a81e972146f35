//! News for whoever listens: bounded, and never waited for. A listener that is too slow loses the oldest.

use crate::messages::HouseEvent;
use crate::policy::Moment;
use tokio::sync::broadcast;
use tokio::time::Instant;

/// Events kept for listeners that are behind.
const EVENTS_MAX: usize = 1024;

/// Where actors tell what happened.
#[derive(Debug, Clone)]
pub struct EventBus(broadcast::Sender<HouseEvent>);

impl EventBus {
    /// A bus without listeners.
    pub fn new() -> Self {
        Self(broadcast::channel(EVENTS_MAX).0)
    }

    /// Tells everyone who listens, and the log.
    pub fn tell(&self, event: HouseEvent) {
        tracing::debug!(?event, "supervision");
        // Without a listener the event is nobody's.
        let _ = self.0.send(event);
    }

    /// Listens from now on.
    pub fn listen(&self) -> broadcast::Receiver<HouseEvent> {
        self.0.subscribe()
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
