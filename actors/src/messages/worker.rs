//! What a worker is started with, what it is told, and what it says.

use super::ReplicaId;
use crate::engine::{EngineError, EngineEvent, EngineRequest, EngineStats, LoadProgress, RequestError, RequestId};
use crate::inventory::DeviceId;
use crate::policy::outcome::WorkerEnd;
use playhouse_config::ModelSource;
use playhouse_config::checked::{Isolation, KvType};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What a worker is started with. Everything a process needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// Whose worker.
    pub replica: ReplicaId,
    /// Counts the workers of this replica from 1.
    pub incarnation: u64,
    /// Where it runs. The worker refuses any other device.
    pub device: DeviceId,
    /// The weights.
    pub source: ModelSource,
    /// Bytes for KV.
    pub kv_bytes: u64,
    /// Most bytes of the device's memory in all, if there is a limit.
    pub memory_bytes_max: Option<u64>,
    /// Number format of KV.
    pub kv_type: KvType,
    /// Most tokens of a sequence; without it, what the model was trained for.
    pub context: Option<u32>,
    /// Sequences computed together.
    pub max_sequences: u32,
    /// Tokens computed in one step.
    pub max_batch_tokens: u32,
    /// Process or thread; never `Auto`.
    pub isolation: Isolation,
    /// Between two heartbeats.
    pub heartbeat: Duration,
}

/// What the host tells a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "nearly all commands are the large one, and few wait at a time")]
pub enum WorkerCommand {
    /// Take this request.
    Submit(EngineRequest),
    /// End this one; it may have ended meanwhile.
    Cancel(RequestId),
    /// End, giving everything back.
    Shutdown,
}

/// What a worker tells the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum WorkerEvent {
    /// How far the load has come.
    Progress(LoadProgress),
    /// It takes requests now.
    Ready(WorkerReady),
    /// It did not take this request.
    Refused {
        /// The request.
        id: RequestId,
        /// Why.
        error: RequestError,
    },
    /// These were begun: the first of their prompt was computed so long after they came. Told once each, before the step's
    /// events.
    Begun(Vec<(RequestId, Duration)>),
    /// What one step brought.
    Step(Vec<EngineEvent>),
    /// It is alive.
    Heartbeat(Heartbeat),
    /// It cannot go on, and ends.
    Failed(EngineError),
    /// It is no more: reaped, its memory given back. The last event of every worker; made by the link.
    Exited(WorkerEnd),
}

/// What a worker is when it is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReady {
    /// Its process, if it has one of its own.
    pub pid: Option<u32>,
    /// Most tokens of a sequence.
    pub n_ctx: u32,
    /// Size of the vocabulary.
    pub n_vocab: u32,
    /// KV of one sequence of `n_ctx`: with less the model cannot run.
    pub kv_min_bytes: u64,
    /// Memory as measured.
    pub stats: EngineStats,
}

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// How long the step in progress has taken so far; `None` between steps.
    pub step_age: Option<Duration>,
    /// Counters and gauges.
    pub stats: EngineStats,
}
