//! The plain data that crosses between actors, to workers and to clients. No behaviour.

use crate::engine::{
    Constraint, EngineError, EngineEvent, EngineRequest, EngineStats, FinishReason, LoadProgress, RequestError,
    RequestId, SamplingParams, Task, TokenLogprobs, Usage,
};
use crate::inventory::{DeviceId, HealthKind};
use crate::policy::admission::Full;
use crate::policy::ladder::{Rung, RungCounts};
use crate::policy::outcome::WorkerEnd;
use playhouse_config::ModelSource;
use playhouse_config::checked::{Isolation, KvType};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, Instant};

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

/// A request of a client: one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    /// Name or alias of the model.
    pub model: String,
    /// What to make of the prompt.
    pub task: Task,
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to emit.
    pub max_tokens: u32,
    /// Stop ids are not chosen before this many tokens.
    pub min_tokens: u32,
    /// Ids that end the sequence.
    pub stop_ids: Vec<u32>,
    /// Log probabilities of the chosen token and so many others.
    pub logprobs: Option<u32>,
    /// What the text must be.
    pub constraint: Option<Constraint>,
    /// Higher goes first where requests wait in an engine.
    pub priority: i32,
    /// How long it may take in all; without it, the host's limit.
    pub timeout: Option<Duration>,
}

/// Why a request was not accepted. Nothing was started, and no stream exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No model has this name.
    #[error("there is no model `{model}`")]
    UnknownModel {
        /// The name.
        model: String,
    },
    /// The model has taken on all it may.
    #[error("model `{model}` is busy: {full}")]
    Busy {
        /// The model.
        model: String,
        /// What is full, and when to ask again.
        full: Full,
    },
    /// The model has not been ready yet.
    #[error("model `{model}` is loading")]
    Loading {
        /// The model.
        model: String,
        /// When to ask again.
        retry_after: Duration,
    },
    /// Nobody can serve the model: its devices are quarantined, or its file is bad.
    #[error("model `{model}` is not available")]
    Unavailable {
        /// The model.
        model: String,
    },
    /// The prompt does not fit.
    #[error(transparent)]
    Invalid(RequestError),
    /// The host takes no more requests: it is about to stop.
    #[error("the host is draining")]
    Draining,
    /// Too many requests wait to be looked at.
    #[error("too many requests at once")]
    Overloaded,
    /// The router went away before it answered; the request was not accepted.
    #[error("the router did not answer")]
    RouterLost,
}

/// One token of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamToken {
    /// 0, 1, 2 ... without gap or repeat, whatever dies meanwhile.
    pub index: u32,
    /// The id.
    pub token: u32,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// When an engine began with the request, if it said so: waiting ended and computing began. The first token has it.
    #[serde(skip)]
    pub begun: Option<Instant>,
}

/// What a stream yields: tokens, then exactly one end.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEvent {
    /// A token.
    Token(StreamToken),
    /// The end; nothing follows.
    End(Terminal),
}

/// How an accepted request ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Terminal {
    /// Well.
    Completed {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// Well: what [`Task::Embed`] asked for.
    Embedded {
        /// The hidden state of the prompt's last token, `[C]`.
        values: Vec<f32>,
        /// What it took.
        usage: Usage,
    },
    /// Not well.
    Failed(Failure),
    /// The client cancelled it or went away.
    Cancelled,
}

/// Why an accepted request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// It was in flight at too many deaths of workers.
    #[error("the request was in flight when {deaths} workers died")]
    Poison {
        /// How many.
        deaths: u32,
    },
    /// The engine refused it or gave it up; others go on.
    #[error(transparent)]
    Request(RequestError),
    /// Its time was up.
    #[error("the request took longer than it may")]
    Deadline,
    /// The client did not read.
    #[error("the client did not read its stream in time")]
    SlowClient,
    /// The host stopped before it was done.
    #[error("the host stopped")]
    Draining,
    /// No replica of the model is left.
    #[error("no replica of the model is left")]
    Unavailable,
    /// Whoever had the request is gone. Only the end of the whole host does this.
    #[error("the host lost the request")]
    Lost,
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
    /// Memory ran out, and something was given up. Preemptions are counted in [`DeviceStatus::oom`] alone: under load they
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
