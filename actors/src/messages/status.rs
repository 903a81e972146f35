//! How everything is: the tree as `ps` shows it.

use super::ReplicaId;
use crate::engine::{EngineStats, LoadProgress};
use crate::inventory::DeviceId;
use crate::policy::ladder::RungCounts;
use crate::policy::outcome::WorkerEnd;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It waits for its last worker to be gone.
    Waiting,
    /// Its worker loads.
    Loading,
    /// Its worker takes requests.
    Ready,
    /// Its worker was told to end.
    Stopping,
    /// Its worker died; its supervisor decides.
    Down,
    /// It waits before it starts again.
    Backoff,
    /// Its device was given up.
    Quarantined,
    /// Its model cannot be loaded.
    Failed,
    /// It was told to stop.
    Stopped,
}

impl Phase {
    /// One word, for tables and labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Down => "down",
            Self::Backoff => "backoff",
            Self::Quarantined => "quarantined",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A replica as `ps` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Which.
    pub replica: ReplicaId,
    /// Where.
    pub device: DeviceId,
    /// What it is doing.
    pub phase: Phase,
    /// Workers started so far.
    pub incarnation: u64,
    /// The worker's process.
    pub pid: Option<u32>,
    /// How far a load has come.
    pub progress: Option<LoadProgress>,
    /// Requests it has.
    pub running: u32,
    /// Bytes for KV.
    pub kv_bytes: u64,
    /// Since the worker was last heard.
    pub last_heard: Option<Duration>,
    /// Age of the step in progress, as last heard.
    pub step_age: Option<Duration>,
    /// The engine's counters, as last heard.
    pub stats: Option<EngineStats>,
    /// Why the last worker ended.
    pub last_end: Option<WorkerEnd>,
}

/// A device as `ps` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Which.
    pub device: DeviceId,
    /// Why nothing is started on it, if so.
    pub quarantined: Option<String>,
    /// Failures within the window.
    pub recent_failures: u32,
    /// Failures since the host's start.
    pub failures: u64,
    /// What was given up on it for want of memory since the host's start, by the rungs of the ladder.
    pub oom: RungCounts,
    /// Its replicas.
    pub replicas: Vec<ReplicaStatus>,
}

/// A model as the router sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub model: String,
    /// Replicas that take requests.
    pub ready: u32,
    /// Replicas in all.
    pub replicas: u32,
    /// Accepted, unfinished requests.
    pub open_requests: u32,
    /// Tokens that those may need.
    pub open_tokens: u64,
    /// Of those requests, the ones that wait for a replica.
    pub waiting: u32,
    /// Measured speed of all replicas.
    pub tokens_per_second: Option<f64>,
    /// Whether readiness waits for it.
    pub required: bool,
}

/// Counters of the router since the host's start (or the router's, if it was restarted).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestCounters {
    /// Accepted.
    pub accepted: u64,
    /// Refused.
    pub refused: u64,
    /// Ended well.
    pub completed: u64,
    /// Failed.
    pub failed: u64,
    /// Cancelled.
    pub cancelled: u64,
    /// Given to another worker after the death of one.
    pub resumed: u64,
    /// Refused as poison.
    pub poisoned: u64,
}

/// The router's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RouterStatus {
    /// The models.
    pub services: Vec<ServiceStatus>,
    /// What became of requests.
    pub requests: RequestCounters,
    /// Whether new requests are refused because the host is about to stop.
    pub draining: bool,
}

/// The whole tree.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HouseStatus {
    /// The devices with their replicas.
    pub devices: Vec<DeviceStatus>,
    /// The router; `None` while it is being restarted.
    pub router: Option<RouterStatus>,
    /// Since the host's start.
    pub uptime: Duration,
}

impl HouseStatus {
    /// Every replica on every device.
    pub fn replicas(&self) -> impl Iterator<Item = &ReplicaStatus> {
        self.devices.iter().flat_map(|device| &device.replicas)
    }

    /// Whether every required model has a ready replica and the host is not about to stop.
    pub fn is_ready(&self) -> bool {
        let required = |service: &&ServiceStatus| service.required;
        self.router.as_ref().is_some_and(|router| {
            !router.draining && router.services.iter().filter(required).all(|service| service.ready > 0)
        })
    }
}
