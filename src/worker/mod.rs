//! Workers: the engine of one replica, in a process of its own or on a thread of the host.
//!
//! ```text
//! host                                               worker process
//! model actor                                         main thread: engine, step by step
//!   │ WorkerLink::send      ┌────────────┐  commands     ▲  │
//!   ├──────> queue ───────> │ write      │ ════════════> │  │
//!   │ mpsc of WorkerEvent   ├────────────┤   socketpair     │ one frame per step, heartbeats beside
//!   └<───────────────────── │ watch      │ <════════════════┘
//!                           │ + stderr   │
//!                           │ + pidfd    │ the end: reaped, then told, once and last
//!                           └────────────┘
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | [`frame`], [`handshake`] | the wire |
//! | `process`, `watch`, `spawner` | the host's side of a process |
//! | `thread` | the same on a thread |
//! | `main_loop`, `load` | the worker, wherever it runs |
//! | `child` | a worker process around the main loop |
//! | [`sizing`] | what a replica needs, for the planner and for the worker |
//!
//! Exit statuses of a worker process: 0 it was told to end or its host is gone, 65 the model cannot be loaded, 69 the device is
//! not the one it was told to use, 70 the device was lost or we are at fault, 75 out of memory.

pub mod frame;
pub mod handshake;
mod main_loop;
mod load;
mod child;
mod spawner;
mod share;
mod watch;
mod process;
mod thread;
pub mod sizing;
#[cfg(any(debug_assertions, feature = "fault-injection"))]
mod fault;

pub use child::{run_if_worker, run_worker};
pub use load::DeviceError;
pub use main_loop::{EXIT_OUT_OF_MEMORY, EXIT_SOFTWARE};
pub use process::ProcessWorkers;
pub use thread::ThreadWorkers;

use playhouse_actors::link::{WorkerFactory, WorkerLink};
use playhouse_actors::messages::{WorkerEvent, WorkerSpec};
use playhouse_config::checked::Isolation;
use share::Share;
use std::ffi::OsString;
use std::path::PathBuf;
use tokio::sync::mpsc;

/// Starts each worker as its spec says: as a process, or as a thread.
#[derive(Debug, Clone)]
pub struct Workers {
    processes: ProcessWorkers,
    threads: ThreadWorkers,
}

impl Workers {
    /// Processes are `exe worker`, see [`ProcessWorkers::new`].
    pub fn new(exe: Option<PathBuf>) -> Self {
        Self::sharing(ProcessWorkers::new(exe), Share::default())
    }

    /// Lets as many workers share the cores from the first one on. Without it, each start counts those that run.
    #[must_use]
    pub fn expecting(self, n_workers: usize) -> Self {
        Self::sharing(self.processes, Share::default().expecting(n_workers))
    }

    /// Adds a variable to the environment of worker processes.
    #[must_use]
    pub fn env(self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        Self { processes: self.processes.env(name, value), threads: self.threads }
    }

    fn sharing(processes: ProcessWorkers, share: Share) -> Self {
        Self { processes: processes.with_share(share.clone()), threads: ThreadWorkers::with_share(share) }
    }
}

impl WorkerFactory for Workers {
    fn start(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<Box<dyn WorkerLink>, String> {
        match spec.isolation {
            Isolation::Thread => self.threads.start(spec, events),
            // `Auto` is resolved before it comes here; of the two, a process is the safe reading.
            Isolation::Process | Isolation::Auto => self.processes.start(spec, events),
        }
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
