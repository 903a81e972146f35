//! The plain data that crosses between actors, to workers and to clients. No behaviour.

mod event;
mod request;
mod status;
mod worker;

pub use event::HouseEvent;
pub use request::{Failure, Generate, Refusal, StreamEvent, StreamToken, Terminal};
pub use status::{DeviceStatus, HouseStatus, Phase, ReplicaStatus, RequestCounters, RouterStatus, ServiceStatus};
pub use worker::{Heartbeat, WorkerCommand, WorkerEvent, WorkerReady, WorkerSpec};

use serde::{Deserialize, Serialize};
use std::fmt;

/// One replica of a model, wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplicaId {
    /// The model's name.
    pub model: String,
    /// Which of its replicas, from 0.
    pub index: u32,
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.model, self.index)
    }
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drained {
    /// No request is left.
    Empty {
        /// Streams that had to be ended.
        ended: u32,
    },
    /// It was taken back before that: requests are taken again, and open ones go on.
    Undone,
}
