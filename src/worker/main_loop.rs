//! What a worker does, in a process of its own or on a thread of the host: load, then take commands, step, tell.
//!
//! ```text
//! [Loading] --loaded: Ready--> [Idle] <--nothing left-- [Stepping]
//!     |                          | \--command--> [Stepping] --step: its events, in one message--> [Stepping]
//!     | cannot: Failed           | Shutdown, the host is gone        | device lost, out of memory for good: Failed
//!     v                          v                                   v
//!   an end that is not Asked   Asked, or HostGone                  an end that is not Asked
//! ```
//!
//! One thread owns the engine and does all this. A second sends heartbeats, so that the age of a step that blocks is told
//! while it blocks. Commands come by a bounded channel; whoever is at its other end waits when it is full.

use super::load::{Loaded, WorkerEngine, is_gpu, load};
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};
use playhouse_actors::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, EngineStats, LoadPhase, LoadProgress, RequestError, RequestId,
    StepReport, StepTokens,
};
use playhouse_actors::messages::{Heartbeat, WorkerCommand, WorkerEvent, WorkerReady, WorkerSpec};
use playhouse_actors::policy::ladder::{Rung, RungCounts};
use playhouse_actors::policy::outcome::{EXIT_BAD_MODEL, EXIT_WRONG_DEVICE};
use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Commands that a worker may be behind.
pub(super) const COMMANDS_MAX: usize = 64;
/// Progress within a phase is told this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);
/// Heartbeats are not more frequent than this, whatever the configuration says.
const HEARTBEAT_MIN: Duration = Duration::from_millis(10);

/// The status of a worker that is at fault itself, or whose device is lost (`EX_SOFTWARE`).
pub const EXIT_SOFTWARE: i32 = 70;
/// The status of a worker that ran out of memory (`EX_TEMPFAIL`).
pub const EXIT_OUT_OF_MEMORY: i32 = 75;

/// Nobody listens any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostGone;

/// Where a worker's events go. Waits where the host is behind.
pub(super) trait Host: Send + Sync + 'static {
    fn tell(&self, event: WorkerEvent) -> Result<(), HostGone>;
}

/// What a worker has when it starts.
pub(super) struct Task {
    pub(super) spec: WorkerSpec,
    /// Threads on the CPU.
    pub(super) threads: usize,
    /// The process, if it is the worker's own.
    pub(super) pid: Option<u32>,
    pub(super) commands: Receiver<WorkerCommand>,
    pub(super) host: Arc<dyn Host>,
    /// Set when the worker is to end at the next step boundary without being asked.
    pub(super) stop: Arc<AtomicBool>,
}

/// Why a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// It was told to.
    Asked,
    /// The host is gone or gave it up.
    HostGone,
    /// The device is not the one it was told to use.
    WrongDevice(String),
    /// The engine cannot go on; the host was told.
    Failed(EngineError),
    /// A bug of ours, or of whoever speaks to us.
    Broken(String),
}

impl End {
    /// The exit status of a process that ends so.
    pub(super) fn status(&self) -> i32 {
        match self {
            Self::Asked | Self::HostGone => 0,
            Self::WrongDevice(_) => EXIT_WRONG_DEVICE,
            Self::Failed(EngineError::BadModel(_)) => EXIT_BAD_MODEL,
            Self::Failed(EngineError::OutOfMemory { .. }) => EXIT_OUT_OF_MEMORY,
            Self::Failed(EngineError::DeviceLost { .. }) | Self::Broken(_) => EXIT_SOFTWARE,
        }
    }
}

/// Runs a worker to its end on this thread. Everything it had is given back when this returns. A panic is an end, too.
pub(super) fn run(task: Task) -> End {
    catch_unwind(AssertUnwindSafe(|| run_with_heartbeat(task))).unwrap_or_else(|panic| {
        match panic.is::<LoadGivenUp>() {
            true => End::HostGone,
            false => End::Broken(words_of(&*panic)),
        }
    })
}

/// Carried by the unwinding that leaves a load half way: the only way out of one, from the inside of its progress report.
struct LoadGivenUp;

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without words"))
}

fn run_with_heartbeat(task: Task) -> End {
    let pulse = Arc::new(Pulse::default());
    // Dropped at the end of this function, however it ends: that ends the heartbeats.
    let (_alive, ended) = bounded::<()>(0);
    let (host, beating, every) = (Arc::clone(&task.host), Arc::clone(&pulse), task.spec.heartbeat.max(HEARTBEAT_MIN));
    let beats = std::thread::Builder::new().name("heartbeat".into());
    if let Err(error) = beats.spawn(move || beat(&*host, &beating, every, &ended)) {
        return End::Broken(format!("no thread for heartbeats: {error}"));
    }
    work(task, &pulse).unwrap_or_else(|end| end)
}

/// What the heartbeat thread sees of the engine thread.
struct Pulse {
    began: Instant,
    /// Microseconds from `began` to the start of the step in progress, plus 1; 0 between steps.
    step_since: AtomicU64,
    stats: Mutex<EngineStats>,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { began: Instant::now(), step_since: AtomicU64::new(0), stats: Mutex::default() }
    }
}

impl Pulse {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }

    fn step_begins(&self) {
        self.step_since.store(self.now() + 1, Ordering::Relaxed);
    }

    fn step_ends(&self, stats: EngineStats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
        self.step_since.store(0, Ordering::Relaxed);
    }

    fn heartbeat(&self) -> Heartbeat {
        let since = self.step_since.load(Ordering::Relaxed).checked_sub(1);
        let step_age = since.map(|since| Duration::from_micros(self.now().saturating_sub(since)));
        Heartbeat { step_age, stats: *self.stats.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

fn beat(host: &dyn Host, pulse: &Pulse, every: Duration, ended: &Receiver<()>) {
    while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        if host.tell(WorkerEvent::Heartbeat(pulse.heartbeat())).is_err() {
            return;
        }
    }
}

fn work(task: Task, pulse: &Pulse) -> Result<End, End> {
    let tell = |event| task.host.tell(event).map_err(|HostGone| End::HostGone);
    let loaded = match load_and_tell(&task) {
        Ok(loaded) => loaded,
        Err(error) => {
            tell(WorkerEvent::Failed(error.clone()))?;
            return Err(End::Failed(error));
        }
    };
    let stats = loaded.engine.stats();
    pulse.step_ends(stats);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    tell(WorkerEvent::Ready(WorkerReady {
        pid: task.pid,
        n_ctx: count(loaded.n_ctx),
        n_vocab: count(loaded.n_vocab),
        kv_min_bytes: loaded.kv_min_bytes,
        stats,
    }))?;
    let mut service = Service {
        task: &task,
        engine: Box::new(loaded.engine),
        waiting: HashMap::new(),
        step_tokens: StepTokens::default(),
        refused: HashSet::new(),
        n_failed_steps: 0,
        given_up: RungCounts::default(),
    };
    let end = service.serve(pulse);
    let stats = service.stats();
    let Service { engine, .. } = service;
    if let Err(End::Failed(error)) = &end {
        // What was given up in the last step would be told with the next heartbeat, which does not come.
        pulse.step_ends(stats);
        tell(WorkerEvent::Heartbeat(pulse.heartbeat()))?;
        tell(WorkerEvent::Failed(error.clone()))?;
        if is_gpu(&task.spec.device) && matches!(error, EngineError::DeviceLost { .. }) {
            // Every call to the driver fails from here on, those that free too. The process ends, and that frees all.
            std::mem::forget(engine);
            return end;
        }
    }
    engine.teardown();
    end
}

fn load_and_tell(task: &Task) -> Result<Loaded, EngineError> {
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    faults_at_load(&task.spec)?;
    let mut last: Option<(LoadPhase, Instant)> = None;
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    let faults = super::fault::Faults::of(&task.spec);
    load(&task.spec, task.threads, &mut |progress: LoadProgress| {
        #[cfg(any(debug_assertions, feature = "fault-injection"))]
        faults.slow_load();
        if task.stop.load(Ordering::Relaxed) {
            // No panic, so no hook: everything that was loaded is given back on the way out.
            resume_unwind(Box::new(LoadGivenUp));
        }
        let recent = last.is_some_and(|(phase, at)| phase == progress.phase && at.elapsed() < PROGRESS_EVERY);
        if !recent {
            last = Some((progress.phase, Instant::now()));
            // A host that is gone sets `stop` where it can, and kills where it cannot.
            let _ = task.host.tell(WorkerEvent::Progress(progress));
        }
    })
}

#[cfg(any(debug_assertions, feature = "fault-injection"))]
fn faults_at_load(spec: &WorkerSpec) -> Result<(), EngineError> {
    use super::fault::{Fault, Faults, hang};
    let faults = Faults::of(spec);
    if faults.has(Fault::NeverReady) {
        hang();
    }
    if faults.has(Fault::OomAtLoad) {
        let (device, what) = (spec.device.to_string(), "KV (asked for)".to_owned());
        return Err(EngineError::OutOfMemory { device, what, requested: 2 << 20, free: 1 << 20 });
    }
    Ok(())
}

/// A loaded worker.
struct Service<'a> {
    task: &'a Task,
    engine: Box<WorkerEngine>,
    /// When the requests came that no step has computed anything of yet.
    waiting: HashMap<RequestId, Instant>,
    step_tokens: StepTokens,
    /// Given up for want of memory, and reported; what the engine says of their end is not passed on.
    refused: HashSet<RequestId>,
    /// Steps in a row that found no memory.
    n_failed_steps: u32,
    /// What was given up for want of memory.
    given_up: RungCounts,
}

impl Service<'_> {
    /// The engine's, with what its steps computed and what was given up. Where blocks of KV run out, the engine itself preempts.
    fn stats(&self) -> EngineStats {
        let stats = self.engine.stats();
        let oom = RungCounts { preempt: stats.preemptions, ..self.given_up };
        EngineStats { oom, step_tokens: self.step_tokens, ..stats }
    }

    fn serve(&mut self, pulse: &Pulse) -> Result<End, End> {
        let mut busy = false;
        loop {
            if let Some(end) = self.take_commands(busy)? {
                return Ok(end);
            }
            pulse.step_begins();
            let mut events = Vec::new();
            let begins = Instant::now();
            let stepped = self.engine.step(&mut events);
            if let Ok(StepReport { n_prefill_tokens, n_decode_tokens, n_sequences: 1.., .. }) = stepped {
                self.step_tokens.observe(n_prefill_tokens + n_decode_tokens);
            }
            pulse.step_ends(self.stats());
            self.tell_begun(begins)?;
            self.tell_step(events)?;
            busy = match stepped {
                Ok(report) => {
                    self.n_failed_steps = 0;
                    report.busy
                }
                Err(error @ EngineError::OutOfMemory { .. }) => self.make_room(error)?,
                Err(error) => return Err(End::Failed(error)),
            };
        }
    }

    /// Takes what has come; waits for the first if there is nothing else to do.
    fn take_commands(&mut self, busy: bool) -> Result<Option<End>, End> {
        if !busy {
            let command = self.task.commands.recv().map_err(|_| End::HostGone)?;
            if let Some(end) = self.take(command)? {
                return Ok(Some(end));
            }
        }
        loop {
            if self.task.stop.load(Ordering::Relaxed) {
                return Err(End::HostGone);
            }
            match self.task.commands.try_recv() {
                Ok(command) => {
                    if let Some(end) = self.take(command)? {
                        return Ok(Some(end));
                    }
                }
                Err(TryRecvError::Empty) => return Ok(None),
                Err(TryRecvError::Disconnected) => return Err(End::HostGone),
            }
        }
    }

    fn take(&mut self, command: WorkerCommand) -> Result<Option<End>, End> {
        match command {
            WorkerCommand::Submit(request) => self.submit(request)?,
            WorkerCommand::Cancel(id) => self.engine.cancel(id),
            WorkerCommand::Shutdown => return Ok(Some(End::Asked)),
        }
        Ok(None)
    }

    fn submit(&mut self, request: EngineRequest) -> Result<(), End> {
        let id = request.id;
        match self.engine.submit(request) {
            Ok(()) => {
                self.waiting.insert(id, Instant::now());
                Ok(())
            }
            Err(error) => self.tell(WorkerEvent::Refused { id, error }),
        }
    }

    fn tell(&self, event: WorkerEvent) -> Result<(), End> {
        self.task.host.tell(event).map_err(|HostGone| End::HostGone)
    }

    /// Tells of the requests that are no longer waiting since the step that began at `begins`.
    fn tell_begun(&mut self, begins: Instant) -> Result<(), End> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let scheduler = self.engine.scheduler();
        let begun = self.waiting.extract_if(|id, _| !scheduler.is_waiting(*id));
        let begun: Vec<_> = begun.map(|(id, came)| (id, begins.saturating_duration_since(came))).collect();
        if begun.is_empty() { Ok(()) } else { self.tell(WorkerEvent::Begun(begun)) }
    }

    fn tell_step(&mut self, mut events: Vec<EngineEvent>) -> Result<(), End> {
        if !self.refused.is_empty() {
            events.retain(|event| match event {
                EngineEvent::Token { id, .. } => !self.refused.contains(id),
                EngineEvent::Finished { id, .. }
                | EngineEvent::Embedded { id, .. }
                | EngineEvent::Failed { id, .. } => !self.refused.remove(id),
            });
        }
        if events.is_empty() { Ok(()) } else { self.tell(WorkerEvent::Step(events)) }
    }

    /// A step found no memory: the rungs of the ladder that are the worker's. First what only the prefix cache holds is
    /// dropped and the step tried again, for somebody else's memory may be back; then the running request that came last is
    /// refused. With one left there is nothing more to give up here: the host starts the worker again, with less for KV.
    fn make_room(&mut self, error: EngineError) -> Result<bool, End> {
        self.n_failed_steps += 1;
        if self.n_failed_steps == 1 {
            let blocks = self.engine.drop_prefix_cache();
            self.given_up.add(Rung::DropPrefixCache, 1);
            tracing::warn!(%error, blocks, "out of memory in a step: the prefix cache is dropped");
            return Ok(true);
        }
        match self.engine.scheduler().youngest_running() {
            Some(id) if self.engine.scheduler().n_running() > 1 => {
                tracing::warn!(%error, request = id.0, "out of memory in a step: a request is refused");
                self.engine.cancel(id);
                self.given_up.add(Rung::Refuse, 1);
                self.refused.insert(id);
                let error = RequestError::OutOfMemory(error.to_string());
                self.tell(WorkerEvent::Step(vec![EngineEvent::Failed { id, error }]))?;
                Ok(true)
            }
            _ => Err(End::Failed(error)),
        }
    }
}
