//! A worker that was started and is not reaped yet, as its model actor knows it.

use super::{Inner, ModelMsg};
use crate::engine::{EngineError, EngineStats, LoadProgress};
use crate::link::{LinkError, WorkerLink};
use crate::messages::{Heartbeat, Phase, ReplicaId, WorkerCommand, WorkerEvent, WorkerReady};
use crate::policy::ladder::RungCounts;
use crate::policy::outcome::WorkerEnd;
use playhouse_config::Supervision;
use ractor::ActorRef;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;

/// Events of a worker that wait to be read; a worker that is further ahead waits.
pub(super) const EVENTS_MAX: usize = 64;

/// The log shows how far a load has come this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

pub(super) struct Live {
    link: Box<dyn WorkerLink>,
    pub(super) incarnation: u64,
    since: Instant,
    heard: Instant,
    told_to_end: Option<Instant>,
    /// Why it was killed or said that it would end: outranks what its exit says.
    end: Option<WorkerEnd>,
    progress: Option<LoadProgress>,
    progress_told: Instant,
    ready: Option<WorkerReady>,
    heartbeat: Option<Heartbeat>,
    /// Commands that did not fit into the worker's queue.
    outbox: VecDeque<WorkerCommand>,
}

/// What a worker did since its last heartbeat.
pub(super) struct Since {
    pub(super) tokens: u64,
    /// What it gave up for want of memory.
    pub(super) rungs: RungCounts,
}

impl Live {
    pub(super) fn new(link: Box<dyn WorkerLink>, incarnation: u64) -> Self {
        let now = Instant::now();
        Self {
            link,
            incarnation,
            since: now,
            heard: now,
            told_to_end: None,
            end: None,
            progress: None,
            progress_told: now,
            ready: None,
            heartbeat: None,
            outbox: VecDeque::new(),
        }
    }

    /// A sign of life came.
    pub(super) fn hear(&mut self) {
        self.heard = Instant::now();
    }

    pub(super) fn on_progress(&mut self, replica: &ReplicaId, progress: LoadProgress) {
        // Each phase when it begins, and now and then how far it has come.
        let is_new = self.progress.as_ref().is_none_or(|last| last.phase != progress.phase);
        if is_new || self.progress_told.elapsed() >= PROGRESS_EVERY {
            let LoadProgress { phase, bytes_done, bytes_total } = &progress;
            tracing::info!(%replica, ?phase, bytes_done, bytes_total, "loading");
            self.progress_told = Instant::now();
        }
        self.progress = Some(progress);
    }

    /// It takes requests; how long that took.
    pub(super) fn on_ready(&mut self, ready: WorkerReady) -> Duration {
        self.ready = Some(ready);
        self.since.elapsed()
    }

    pub(super) fn on_heartbeat(&mut self, heartbeat: Heartbeat) -> Since {
        let last = self.heartbeat.replace(heartbeat).map(|last| last.stats);
        let computed = |stats: EngineStats| stats.prefill_tokens + stats.decode_tokens;
        let tokens = computed(heartbeat.stats).saturating_sub(last.map_or(0, computed));
        Since { tokens, rungs: heartbeat.stats.oom.since(last.map_or_else(RungCounts::default, |last| last.oom)) }
    }

    /// It says why it will end.
    pub(super) fn on_failed(&mut self, error: EngineError) {
        self.end.get_or_insert(end_of(error));
    }

    /// Whether it broke the rules, was killed, or said that it would end: nothing that it says counts any more.
    pub(super) fn is_given_up(&self) -> bool {
        self.end.is_some()
    }

    pub(super) fn send(&mut self, command: WorkerCommand) {
        self.outbox.push_back(command);
        self.flush();
    }

    /// Sends what did not fit before.
    pub(super) fn flush(&mut self) {
        while let Some(command) = self.outbox.front() {
            match self.link.send(command) {
                // A worker that is gone takes nothing more; its exit is on the way.
                Ok(()) | Err(LinkError::Closed) => drop(self.outbox.pop_front()),
                Err(LinkError::Full) => return,
            }
        }
    }

    /// Ends it at once. Its end is `end`, whatever its exit says.
    pub(super) fn kill(&mut self, end: WorkerEnd) {
        self.end.get_or_insert(end);
        self.link.kill();
    }

    /// Tells it to end in its own time, of which `is_overdue` allows `shutdown`. One that still loads is killed: it has
    /// nothing to finish, and hears no command before it has loaded, which can take minutes or for ever.
    pub(super) fn ask_to_end(&mut self) {
        self.told_to_end = Some(Instant::now());
        match self.ready {
            Some(_) => self.send(WorkerCommand::Shutdown),
            None => self.link.kill(),
        }
    }

    /// Whether it is hung: silent, or too long at what it does.
    pub(super) fn is_overdue(&self, phase: Phase, limits: &Supervision) -> bool {
        match (phase, self.told_to_end) {
            (Phase::Loading, _) => self.since.elapsed() > limits.load_timeout,
            (Phase::Ready, _) => self.heard.elapsed() > limits.step_timeout,
            (Phase::Stopping, Some(told)) => told.elapsed() > limits.shutdown,
            _ => false,
        }
    }

    /// How it ended, if its exit says so.
    pub(super) fn end(self, exit: WorkerEnd) -> WorkerEnd {
        match (self.told_to_end, self.end.unwrap_or(exit)) {
            (Some(_), _) => WorkerEnd::Asked,
            // An exit that nobody asked for is none, even if the worker thinks so.
            (None, WorkerEnd::Asked) => WorkerEnd::Exited(0),
            (None, end) => end,
        }
    }

    /// Most tokens of a sequence, once it is ready.
    pub(super) fn n_ctx(&self) -> Option<u32> {
        self.ready.as_ref().map(|ready| ready.n_ctx)
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.link.pid().or(self.ready.as_ref().and_then(|ready| ready.pid))
    }

    pub(super) fn progress(&self) -> Option<LoadProgress> {
        self.progress.clone()
    }

    pub(super) fn last_heard(&self) -> Duration {
        self.heard.elapsed()
    }

    pub(super) fn step_age(&self) -> Option<Duration> {
        self.heartbeat.and_then(|beat| beat.step_age)
    }

    /// The engine's counters, as last heard.
    pub(super) fn stats(&self) -> Option<EngineStats> {
        self.heartbeat.map(|beat| beat.stats).or(self.ready.as_ref().map(|ready| ready.stats))
    }
}

/// Why a worker ends that reports this error.
fn end_of(error: EngineError) -> WorkerEnd {
    match error {
        EngineError::OutOfMemory { requested, free, .. } => WorkerEnd::OutOfMemory { requested, free },
        EngineError::BadModel(reason) => WorkerEnd::BadModel(reason),
        EngineError::DeviceLost { op, detail, .. } => WorkerEnd::DeviceLost(format!("{op}: {detail}")),
    }
}

/// Carries a worker's events to its actor, never more than one message at a time: the actor's mailbox has no bound, this
/// channel has. Holds the replica's slot until the worker is reaped.
pub(super) async fn pump(
    mut events: mpsc::Receiver<WorkerEvent>,
    incarnation: u64,
    me: ActorRef<ModelMsg>,
    slot: OwnedSemaphorePermit,
) {
    let mut batch = Vec::new();
    let mut exited = false;
    while !exited {
        if events.recv_many(&mut batch, EVENTS_MAX).await == 0 {
            let end = WorkerEnd::Protocol("the link closed without an exit".into());
            batch.push(WorkerEvent::Exited(end));
        }
        exited = batch.iter().any(|event| matches!(event, WorkerEvent::Exited(_)));
        let (handled, done) = oneshot::channel();
        let events = std::mem::take(&mut batch);
        if me.send_message(ModelMsg::internal(Inner::Events { incarnation, events, handled })).is_ok() {
            // An actor that ends before it answers drops the link, and that ends the worker.
            let _ = done.await;
        }
    }
    drop(slot);
}
