//! A worker in a test: started, spoken to, listened to with a deadline.
#![allow(dead_code, reason = "each test program uses its part")]

use playhouse::basho;
use playhouse::engine::{EngineOptions, LlmEngine, Runner};
use playhouse::gguf::GgufFile;
use playhouse::models::describe;
use playhouse::worker::{ProcessWorkers, sizing};
use playhouse_actors::engine::{
    Engine, EngineEvent, EngineRequest, FinishReason, LoadPhase, RequestId, SamplingParams, Usage,
};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::link::{WorkerFactory, WorkerLink};
use playhouse_actors::messages::{ReplicaId, WorkerCommand, WorkerEvent, WorkerReady, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_config::ModelSource;
use playhouse_config::checked::{Isolation, KvType};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long anything may take. A machine that is busy with other tests is slow.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(50);

/// The embedded model on the CPU, in a process.
pub(crate) fn spec() -> WorkerSpec {
    WorkerSpec {
        replica: ReplicaId { model: "basho".into(), index: 0 },
        incarnation: 1,
        device: DeviceId::cpu(),
        source: ModelSource::Embedded("basho".into()),
        kv_bytes: 16 << 20,
        memory_bytes_max: None,
        kv_type: KvType::F16,
        context: Some(256),
        max_sequences: 4,
        max_batch_tokens: 64,
        isolation: Isolation::Process,
        heartbeat: HEARTBEAT,
    }
}

pub(crate) fn request(id: u64, max_tokens: u32) -> EngineRequest {
    let prompt = (0..5 + id as u32).map(|i| 300 + (17 * i + 31 * id as u32) % 900).collect();
    let sampling = SamplingParams { temperature: 0.9, top_k: 40, seed: id, ..SamplingParams::greedy() };
    EngineRequest {
        id: RequestId(id),
        task: playhouse_actors::engine::Task::Generate,
        prompt,
        emitted: Vec::new(),
        sampling,
        max_tokens,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: id.is_multiple_of(2).then_some(3),
        constraint: None,
        priority: 0,
        deadline: None,
    }
}

/// What became of each request: its token events, and its end.
pub(crate) type Transcript = BTreeMap<RequestId, (Vec<EngineEvent>, Option<(FinishReason, Usage)>)>;

pub(crate) fn note(transcript: &mut Transcript, events: Vec<EngineEvent>) {
    for event in events {
        match event {
            EngineEvent::Token { id, .. } => transcript.entry(id).or_default().0.push(event),
            EngineEvent::Finished { id, reason, usage } => {
                let end = transcript.entry(id).or_default().1.replace((reason, usage));
                assert_eq!(end, None, "one end each");
            }
            EngineEvent::Embedded { id, .. } => panic!("{id:?} is no embedding"),
            EngineEvent::Failed { id, error } => panic!("{id:?}: {error}"),
        }
    }
}

/// The engine of `spec` in this process.
pub(crate) fn engine(spec: &WorkerSpec) -> LlmEngine<Runner<playhouse::backend::cpu::CpuBackend>> {
    let file = GgufFile::from_static(basho::LABEL, basho::GGUF).unwrap();
    let limits = sizing::limits(spec, &describe(&file).unwrap()).unwrap();
    let backend = playhouse::backend::cpu::CpuBackend::with_threads(1);
    let runner = Runner::load(&file, backend, limits, &mut |_| ()).unwrap();
    LlmEngine::new(runner, EngineOptions::default())
}

/// What the engine says in this process, all requests at once.
pub(crate) fn undisturbed(spec: &WorkerSpec, requests: &[EngineRequest]) -> Transcript {
    let mut engine = engine(spec);
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    let (mut events, mut busy) = (Vec::new(), true);
    while busy {
        busy = engine.step(&mut events).unwrap().busy;
    }
    let mut transcript = Transcript::new();
    note(&mut transcript, events);
    transcript
}

pub(crate) fn processes() -> ProcessWorkers {
    ProcessWorkers::new(Some(env!("CARGO_BIN_EXE_playhouse").into()))
}

pub(crate) fn with_faults(faults: &str) -> ProcessWorkers {
    processes().env("PLAYHOUSE_FAULTS", faults)
}

/// A worker and its events.
pub(crate) struct Worker {
    pub(crate) link: Box<dyn WorkerLink>,
    pub(crate) events: mpsc::Receiver<WorkerEvent>,
    runtime: tokio::runtime::Runtime,
}

impl Worker {
    pub(crate) fn start(factory: &dyn WorkerFactory, spec: WorkerSpec) -> Self {
        Self::start_with_room(factory, spec, 64)
    }

    pub(crate) fn start_with_room(factory: &dyn WorkerFactory, spec: WorkerSpec, room: usize) -> Self {
        let (sender, events) = mpsc::channel(room);
        let link = factory.start(spec, sender).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        Self { link, events, runtime }
    }

    /// One that takes requests.
    pub(crate) fn ready(factory: &dyn WorkerFactory, spec: WorkerSpec) -> Self {
        let mut worker = Self::start(factory, spec);
        worker.await_ready();
        worker
    }

    /// The next event within `wait`; `Ok(None)` when the channel is closed.
    pub(crate) fn next_within(&mut self, wait: Duration) -> Result<Option<WorkerEvent>, tokio::time::error::Elapsed> {
        self.runtime.block_on(async { tokio::time::timeout(wait, self.events.recv()).await })
    }

    pub(crate) fn next(&mut self) -> Option<WorkerEvent> {
        self.next_within(DEADLINE).expect("an event within the deadline")
    }

    pub(crate) fn await_ready(&mut self) -> (Vec<LoadPhase>, WorkerReady) {
        let mut phases = Vec::new();
        loop {
            match self.next() {
                Some(WorkerEvent::Progress(progress)) => phases.push(progress.phase),
                Some(WorkerEvent::Ready(ready)) => return (phases, ready),
                Some(WorkerEvent::Heartbeat(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn submit(&mut self, request: EngineRequest) {
        self.link.send(&WorkerCommand::Submit(request)).unwrap();
    }

    /// The events until one that `wanted` likes, that included; heartbeats are left out unless wanted.
    pub(crate) fn until(&mut self, wanted: impl Fn(&WorkerEvent) -> bool) -> Vec<WorkerEvent> {
        let mut events = Vec::new();
        loop {
            let event = self.next().unwrap_or_else(|| panic!("the channel closed after {events:?}"));
            let found = wanted(&event);
            if found || !matches!(event, WorkerEvent::Heartbeat(_)) {
                events.push(event);
            }
            if found {
                return events;
            }
        }
    }

    /// Everything up to the end of `n` requests.
    pub(crate) fn transcript(&mut self, n: usize) -> Transcript {
        let mut transcript = Transcript::new();
        while transcript.values().filter(|(_, end)| end.is_some()).count() < n {
            match self.next() {
                Some(WorkerEvent::Step(events)) => note(&mut transcript, events),
                Some(WorkerEvent::Heartbeat(_) | WorkerEvent::Begun(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        transcript
    }

    /// What was told before the end, and the end: told once, and last.
    pub(crate) fn end(mut self) -> (Vec<WorkerEvent>, WorkerEnd) {
        let mut events = Vec::new();
        while let Some(event) = self.next() {
            events.push(event);
        }
        let Some(WorkerEvent::Exited(end)) = events.pop() else { panic!("the last event is the end: {events:?}") };
        assert!(!events.iter().any(|event| matches!(event, WorkerEvent::Exited(_))), "{events:?}");
        events.retain(|event| !matches!(event, WorkerEvent::Heartbeat(_) | WorkerEvent::Progress(_)));
        (events, end)
    }
}

pub(crate) fn is_step(event: &WorkerEvent) -> bool {
    matches!(event, WorkerEvent::Step(_))
}
