//! What a model actor needs of a worker: a way to speak to it, a way to end it, and its events. Implemented over
//! processes and threads in the root package, and by [`crate::sim::SimWorkers`].

use crate::messages::{WorkerCommand, WorkerEvent, WorkerSpec};
use tokio::sync::mpsc;

/// Why a command was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The worker has not taken the last ones yet.
    #[error("the worker's queue is full")]
    Full,
    /// The worker is gone, or about to be: [`WorkerEvent::Exited`] follows or was sent.
    #[error("the worker is gone")]
    Closed,
}

/// One worker.
pub trait WorkerLink: Send + 'static {
    /// Hands a command over. Never blocks.
    ///
    /// # Errors
    /// [`LinkError`]; the command was not taken.
    fn send(&mut self, command: &WorkerCommand) -> Result<(), LinkError>;

    /// Ends the worker at once, whatever it does (SIGKILL). [`WorkerEvent::Exited`] follows. Dropping the link does the
    /// same.
    fn kill(&mut self);

    /// The worker's process, if it has one of its own.
    fn pid(&self) -> Option<u32>;
}

/// Starts workers.
pub trait WorkerFactory: Send + Sync + 'static {
    /// Starts a worker. Returns at once: loading goes on in the worker and is told in `events`. The last event is
    /// [`WorkerEvent::Exited`], sent when the process was reaped and its memory is free again; then the channel closes.
    /// The channel is bounded: a worker whose events are not read waits.
    ///
    /// # Errors
    /// Why it could not be started, in words; no event is sent.
    fn start(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<Box<dyn WorkerLink>, String>;
}
