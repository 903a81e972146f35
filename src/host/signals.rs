//! What an operator's signals ask of the host.
//!
//! ```text
//! [Running] --SIGHUP: Reload--> [Running]
//!     | SIGTERM, SIGINT: Drain
//!     v
//! [Draining] --SIGTERM, SIGINT: Now--> [Draining]     SIGHUP is ignored here
//! ```
//!
//! From [`Signals::listen`] on, these signals do nothing else: whoever listens must act on them.

use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Read the configuration again.
    Reload,
    /// Stop when the open streams have finished, or the time for that is up.
    Drain,
    /// Stop at once.
    Now,
}

/// The signals of this process as a stream of what they ask.
#[derive(Debug)]
pub struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    stopping: Stopping,
}

/// Whether the first of two was heard.
#[derive(Debug, Default)]
struct Stopping(bool);

impl Stopping {
    fn on_hangup(&self) -> Option<Asked> {
        (!self.0).then_some(Asked::Reload)
    }

    fn on_terminate(&mut self) -> Asked {
        if std::mem::replace(&mut self.0, true) { Asked::Now } else { Asked::Drain }
    }
}

impl Signals {
    /// Listens from now on, within a runtime.
    ///
    /// # Errors
    /// If the system does not let us.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            stopping: Stopping::default(),
        })
    }

    /// The next thing asked. Nothing is lost when this is dropped before it is ready.
    pub async fn next(&mut self) -> Asked {
        loop {
            // The streams of signals end only with the runtime.
            tokio::select! {
                biased;
                Some(()) = self.terminate.recv() => return self.stopping.on_terminate(),
                Some(()) = self.interrupt.recv() => return self.stopping.on_terminate(),
                Some(()) = self.hangup.recv() => if let Some(asked) = self.stopping.on_hangup() {
                    return asked;
                },
                else => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_stop_is_immediate_and_reloads_end_with_the_first() {
        let mut stopping = Stopping::default();
        assert_eq!(stopping.on_hangup(), Some(Asked::Reload));
        assert_eq!(stopping.on_hangup(), Some(Asked::Reload));
        assert_eq!(stopping.on_terminate(), Asked::Drain);
        assert_eq!(stopping.on_hangup(), None);
        assert_eq!(stopping.on_terminate(), Asked::Now);
        assert_eq!(stopping.on_terminate(), Asked::Now);
    }
}
