//! Workers that are tasks: they take time to load and to step, account for their memory in a [`SimBox`], and fail as a
//! [`Faults`] says. Their time is the runtime's, so a paused clock makes a day of them a second.

use super::engine::SimEngine;
use super::inventory::SimBox;
use crate::engine::{Engine, EngineError, EngineEvent, EngineStats, LoadPhase, LoadProgress};
use crate::inventory::DeviceId;
use crate::link::{LinkError, WorkerFactory, WorkerLink};
use crate::messages::{Heartbeat, WorkerCommand, WorkerEvent, WorkerReady, WorkerSpec};
use crate::policy::outcome::WorkerEnd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// Commands that a worker may be behind.
const COMMANDS_MAX: usize = 64;
/// Bytes of a block of KV.
pub const SIM_BLOCK_BYTES: u64 = 1 << 20;
/// What a simulated process takes before anything is loaded.
pub const SIM_CONTEXT_BYTES: u64 = 4 << 20;

/// What happens at a point where something can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Pass,
    /// The process ends with this status.
    Exit(i32),
    /// The process is killed by this signal.
    Signal(i32),
    /// The worker says nothing more, and does nothing more.
    Hang,
    /// An allocation fails.
    OutOfMemory,
    /// The device fails.
    DeviceLost,
    /// The engine repeats an index: a bug that must not reach a client.
    BrokenIndex,
}

/// Decides what fails.
pub trait Faults: Send + Sync + 'static {
    /// Whether this worker can be started at all; the words say why not.
    fn at_start(&self, _spec: &WorkerSpec) -> Option<String> {
        None
    }

    /// What happens while this worker loads.
    fn at_load(&self, _spec: &WorkerSpec) -> Verdict {
        Verdict::Pass
    }

    /// What happens in this worker's step.
    fn at_step(&self, _spec: &WorkerSpec) -> Verdict {
        Verdict::Pass
    }

    /// Whether handing this command to the worker panics, which ends the model actor.
    fn panics_at_send(&self, _spec: &WorkerSpec, _command: &WorkerCommand) -> bool {
        false
    }

    /// How long a load takes.
    fn load_time(&self, _spec: &WorkerSpec) -> Duration {
        Duration::from_millis(100)
    }

    /// How long a step takes.
    fn step_time(&self, _spec: &WorkerSpec) -> Duration {
        Duration::from_millis(10)
    }

    /// How long it takes until a process that ended is reaped and its memory free.
    fn reap_time(&self, _spec: &WorkerSpec) -> Duration {
        Duration::from_millis(50)
    }
}

/// Nothing fails.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoFaults;

impl Faults for NoFaults {}

/// A worker that is alive, for tests that end workers from outside.
#[derive(Debug, Clone)]
pub struct SimProcess {
    /// What it was started with.
    pub spec: WorkerSpec,
    /// Its number in the ledger of the [`SimBox`].
    pub holder: u64,
    killed: Arc<Kill>,
}

impl SimProcess {
    /// What `kill -9` does.
    pub fn kill(&self) {
        self.killed.kill();
    }
}

#[derive(Debug, Default)]
struct Kill {
    notify: Notify,
}

impl Kill {
    fn kill(&self) {
        // The permit is kept until the worker looks: a kill before that is not lost.
        self.notify.notify_one();
    }
}

/// Starts simulated workers.
#[derive(Clone)]
pub struct SimWorkers {
    sim: SimBox,
    faults: Arc<dyn Faults>,
    n_ctx: u32,
    holders: Arc<AtomicU64>,
    alive: Arc<Mutex<Vec<SimProcess>>>,
}

impl SimWorkers {
    /// Workers on the cards of `sim` that fail as `faults` says; sequences have at most `n_ctx` tokens.
    pub fn new(sim: SimBox, faults: Arc<dyn Faults>, n_ctx: u32) -> Self {
        Self { sim, faults, n_ctx, holders: Arc::new(AtomicU64::new(1)), alive: Arc::default() }
    }

    /// The workers that are alive, oldest first.
    pub fn alive(&self) -> Vec<SimProcess> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl WorkerFactory for SimWorkers {
    fn start(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<Box<dyn WorkerLink>, String> {
        if let Some(reason) = self.faults.at_start(&spec) {
            return Err(reason);
        }
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let killed = Arc::new(Kill::default());
        let holder = self.holders.fetch_add(1, Ordering::Relaxed);
        let process = SimProcess { spec: spec.clone(), holder, killed: killed.clone() };
        self.alive.lock().unwrap_or_else(PoisonError::into_inner).push(process);
        let worker = SimWorker {
            spec: spec.clone(),
            holder,
            sim: self.sim.clone(),
            faults: self.faults.clone(),
            n_ctx: self.n_ctx,
            events: events.clone(),
            commands: receiver,
        };
        let this = self.clone();
        let kill = killed.clone();
        tokio::spawn(async move {
            let reap = worker.faults.reap_time(&worker.spec);
            let end = tokio::select! {
                biased;
                () = kill.notify.notified() => WorkerEnd::Signalled(9),
                end = worker.run() => end,
            };
            tokio::time::sleep(reap).await;
            this.sim.release(holder);
            this.alive.lock().unwrap_or_else(PoisonError::into_inner).retain(|process| process.holder != holder);
            // An actor that is gone does not care.
            let _ = events.send(WorkerEvent::Exited(end)).await;
        });
        Ok(Box::new(SimLink { spec, commands, killed, faults: self.faults.clone() }))
    }
}

struct SimLink {
    spec: WorkerSpec,
    commands: mpsc::Sender<WorkerCommand>,
    killed: Arc<Kill>,
    faults: Arc<dyn Faults>,
}

impl WorkerLink for SimLink {
    fn send(&mut self, command: &WorkerCommand) -> Result<(), LinkError> {
        assert!(!self.faults.panics_at_send(&self.spec, command), "a simulated bug in the link");
        self.commands.try_send(command.clone()).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LinkError::Full,
            mpsc::error::TrySendError::Closed(_) => LinkError::Closed,
        })
    }

    fn kill(&mut self) {
        self.killed.kill();
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        self.killed.kill();
    }
}

struct SimWorker {
    spec: WorkerSpec,
    holder: u64,
    sim: SimBox,
    faults: Arc<dyn Faults>,
    n_ctx: u32,
    events: mpsc::Sender<WorkerEvent>,
    commands: mpsc::Receiver<WorkerCommand>,
}

impl SimWorker {
    async fn run(mut self) -> WorkerEnd {
        match self.load().await {
            Ok(engine) => self.serve(engine).await,
            Err(end) => end,
        }
    }

    /// Tells the host; a host that does not read makes the worker wait.
    async fn tell(&self, event: WorkerEvent) {
        // A host that is gone closes the commands, too: `serve` sees that.
        let _ = self.events.send(event).await;
    }

    async fn fail(&self, verdict: Verdict) -> Option<WorkerEnd> {
        let device = self.spec.device.to_string();
        let error = match verdict {
            Verdict::Pass | Verdict::BrokenIndex => return None,
            Verdict::Exit(status) => return Some(WorkerEnd::Exited(status)),
            Verdict::Signal(signal) => return Some(WorkerEnd::Signalled(signal)),
            Verdict::Hang => std::future::pending().await,
            Verdict::OutOfMemory => {
                EngineError::OutOfMemory { device, what: "simulated".into(), requested: SIM_BLOCK_BYTES, free: 0 }
            }
            Verdict::DeviceLost => EngineError::DeviceLost { device, op: "step".into(), detail: "simulated".into() },
        };
        self.tell(WorkerEvent::Failed(error)).await;
        Some(WorkerEnd::Exited(1))
    }

    async fn load(&self) -> Result<SimEngine, WorkerEnd> {
        let progress = |phase, bytes_done| {
            WorkerEvent::Progress(LoadProgress { phase, bytes_done, bytes_total: self.spec.kv_bytes })
        };
        self.tell(progress(LoadPhase::Open, 0)).await;
        tokio::time::sleep(self.faults.load_time(&self.spec)).await;
        if let Some(end) = self.fail(self.faults.at_load(&self.spec)).await {
            return Err(end);
        }
        let wanted = self.spec.kv_bytes + if self.spec.device.is_cpu() { 0 } else { SIM_CONTEXT_BYTES };
        if let Err(free) = self.sim.allocate(self.spec.device.as_str(), self.holder, wanted) {
            let (device, what) = (self.spec.device.to_string(), "KV".into());
            self.tell(WorkerEvent::Failed(EngineError::OutOfMemory { device, what, requested: wanted, free })).await;
            return Err(WorkerEnd::Exited(1));
        }
        self.tell(progress(LoadPhase::Ready, self.spec.kv_bytes)).await;
        let blocks = u32::try_from(self.spec.kv_bytes / SIM_BLOCK_BYTES).unwrap_or(u32::MAX);
        let engine = SimEngine::new(self.spec.context.unwrap_or(self.n_ctx), self.spec.max_sequences, blocks);
        let ready = WorkerReady {
            pid: None,
            n_ctx: self.spec.context.unwrap_or(self.n_ctx),
            n_vocab: 65_536,
            kv_min_bytes: SIM_BLOCK_BYTES,
            stats: engine.stats(),
        };
        self.tell(WorkerEvent::Ready(ready)).await;
        Ok(engine)
    }

    async fn serve(&mut self, mut engine: SimEngine) -> WorkerEnd {
        let mut busy = false;
        let mut beat = Instant::now() + self.spec.heartbeat;
        let mut step_due = Instant::now();
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(WorkerCommand::Submit(request)) => {
                        let id = request.id;
                        match engine.submit(request) {
                            Ok(()) if busy => {}
                            Ok(()) => (busy, step_due) = (true, Instant::now() + self.faults.step_time(&self.spec)),
                            Err(error) => self.tell(WorkerEvent::Refused { id, error }).await,
                        }
                    }
                    Some(WorkerCommand::Cancel(id)) => engine.cancel(id),
                    // A closed link is an order to end, as a closed socket is to a process.
                    Some(WorkerCommand::Shutdown) | None => return WorkerEnd::Exited(0),
                },
                () = tokio::time::sleep_until(beat) => {
                    beat += self.spec.heartbeat;
                    self.tell(self.heartbeat(engine.stats())).await;
                }
                () = tokio::time::sleep_until(step_due), if busy => {
                    let verdict = self.faults.at_step(&self.spec);
                    if let Some(end) = self.fail(verdict).await {
                        return end;
                    }
                    let mut events = Vec::new();
                    // The simulated engine has no errors of its own.
                    busy = engine.step(&mut events).is_ok_and(|report| report.busy);
                    if verdict == Verdict::BrokenIndex {
                        break_an_index(&mut events);
                    }
                    step_due = Instant::now() + self.faults.step_time(&self.spec);
                    if !events.is_empty() {
                        self.tell(WorkerEvent::Step(events)).await;
                    }
                }
            }
        }
    }

    fn heartbeat(&self, stats: EngineStats) -> WorkerEvent {
        WorkerEvent::Heartbeat(Heartbeat { step_age: None, stats })
    }
}

fn break_an_index(events: &mut [EngineEvent]) {
    if let Some(EngineEvent::Token { index, .. }) =
        events.iter_mut().find(|event| matches!(event, EngineEvent::Token { .. }))
    {
        *index += 1;
    }
}

/// What a placement of `kv_bytes` holds on a device when its worker is ready.
pub fn sim_held_bytes(device: &DeviceId, kv_bytes: u64) -> u64 {
    kv_bytes + if device.is_cpu() { 0 } else { SIM_CONTEXT_BYTES }
}
