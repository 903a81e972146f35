//! How a router comes to rest: it takes nothing more, and says when nothing is left, or ends what is left.
//!
//! ```text
//! [Serving] --Drain--> [Draining] --nothing is open--> answered; it stays so until the tree stops, or
//!     ^                    |   \--the time is up--> what is open is ended --> answered
//!     +------Undrain-------+
//! ```

use super::RouterState;
use crate::messages::{Drained, Failure};
use crate::model::ModelMsg;
use ractor::RpcReplyPort;
use std::time::Duration;
use tokio::time::Instant;

/// For replicas to tell a new router what they have.
const SETTLING: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Draining {
    until: Instant,
    /// Before that, a router that has just begun may not have been told of every request yet.
    settled: Instant,
    ended: u32,
    reply: Vec<RpcReplyPort<Drained>>,
}

impl Draining {
    /// The drain that the last router had begun.
    pub(super) fn taken_over(until: Instant) -> Self {
        Self { until, settled: Instant::now() + SETTLING, ended: 0, reply: Vec::new() }
    }

    /// Whether the time is up.
    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }
}

impl RouterState {
    pub(super) fn drain(&mut self, deadline: Duration, reply: RpcReplyPort<Drained>) {
        let now = Instant::now();
        let until = now + deadline;
        let draining = self.draining.get_or_insert(Draining { until, settled: now, ended: 0, reply: Vec::new() });
        // A second, more impatient call shortens the wait.
        draining.until = draining.until.min(until);
        draining.reply.push(reply);
        *self.args.handle.draining() = Some(draining.until);
        self.tick();
    }

    /// What waits or runs goes on as if nothing had been asked.
    pub(super) fn undrain(&mut self) -> bool {
        *self.args.handle.draining() = None;
        let Some(draining) = self.draining.take() else { return false };
        for reply in draining.reply {
            // Those who wait for the end of the drain.
            let _ = reply.send(Drained::Undone);
        }
        true
    }

    /// Ends what is open when the time for it is up.
    pub(super) fn end_if_over(&mut self) {
        let Some(draining) = self.draining.as_mut().filter(|draining| draining.is_over()) else { return };
        draining.ended = draining.ended.max(u32::try_from(self.open.len()).unwrap_or(u32::MAX));
        for service in self.services.values_mut() {
            service.fail_waiting(&Failure::Draining);
            for replica in service.replicas.values() {
                // A replica that is gone has nothing to end.
                let _ = replica.actor.send_message(ModelMsg::EndAll(Failure::Draining));
            }
        }
    }

    pub(super) fn finish_drain_if_empty(&mut self) {
        let is_done = |draining: &&mut Draining| self.open.is_empty() && draining.settled <= Instant::now();
        let Some(draining) = self.draining.as_mut().filter(is_done) else { return };
        for reply in draining.reply.drain(..) {
            // Who asked may be gone.
            let _ = reply.send(Drained::Empty { ended: draining.ended });
        }
    }
}
