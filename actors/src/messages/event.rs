//! What happened, for whoever listens.

use super::ReplicaId;
use crate::engine::RequestId;
use crate::inventory::{DeviceId, HealthKind};
use crate::policy::ladder::Rung;
use crate::policy::outcome::WorkerEnd;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Something that happened, for logs and dashboards. Never part of a decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum HouseEvent {
    /// A worker was started.
    WorkerStarted {
        /// Whose.
        replica: ReplicaId,
        /// Where.
        device: DeviceId,
        /// The how many-th.
        incarnation: u64,
    },
    /// A worker takes requests.
    WorkerReady {
        /// Whose.
        replica: ReplicaId,
        /// Since its start.
        after: Duration,
    },
    /// A worker is no more.
    WorkerEnded {
        /// Whose.
        replica: ReplicaId,
        /// Why.
        end: WorkerEnd,
        /// Requests that it had.
        in_flight: u32,
    },
    /// A worker will be started again.
    RestartScheduled {
        /// Whose.
        replica: ReplicaId,
        /// Where.
        device: DeviceId,
        /// After this long.
        after: Duration,
        /// Bytes for KV.
        kv_bytes: u64,
    },
    /// Memory ran out, and something was given up. Preemptions are counted in [`super::DeviceStatus::oom`] alone: under load they
    /// are everyday life.
    OutOfMemory {
        /// Whose.
        replica: ReplicaId,
        /// Where.
        device: DeviceId,
        /// What was given up.
        rung: Rung,
        /// How often since it was last told.
        times: u64,
    },
    /// A device was given up.
    Quarantined {
        /// Which.
        device: DeviceId,
        /// Why.
        reason: String,
    },
    /// A device's record was cleared; if it was given up, it is taken back.
    Released {
        /// Which.
        device: DeviceId,
    },
    /// A model cannot be loaded.
    ModelFailed {
        /// Whose.
        replica: ReplicaId,
        /// Why.
        reason: String,
    },
    /// A device reported something.
    Health {
        /// Which; `None` concerns all.
        device: Option<String>,
        /// What.
        kind: HealthKind,
    },
    /// A request moved on after the death of a worker.
    Resumed {
        /// The request.
        id: RequestId,
        /// Tokens it had emitted.
        emitted: u32,
        /// Where it goes on.
        replica: ReplicaId,
    },
    /// A request was refused as poison.
    Poisoned {
        /// The request.
        id: RequestId,
    },
    /// An actor failed and was started again.
    ActorRestarted {
        /// Which.
        actor: String,
        /// Its words.
        reason: String,
    },
    /// Nothing is left that could serve: every device with a model is quarantined, or actors failed too often.
    GaveUp {
        /// Why.
        reason: String,
    },
}
