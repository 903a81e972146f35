//! A worker process of this program, spoken to as the host speaks to it.

use crate::Trouble;
use playhouse::engine::DeviceName;
use playhouse::gguf::GgufFile;
use playhouse::models::{ModelSpec, describe};
use playhouse::worker::{ProcessWorkers, sizing};
use playhouse_actors::engine::{EngineEvent, EngineRequest, LoadPhase, RequestId, SamplingParams, Task};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::link::{WorkerFactory, WorkerLink};
use playhouse_actors::messages::{ReplicaId, WorkerCommand, WorkerEvent, WorkerReady, WorkerSpec};
use playhouse_config::ModelSource;
use playhouse_config::checked::{Isolation, KvType};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Nothing takes longer on a machine that is not stuck.
const DEADLINE: Duration = Duration::from_secs(120);

/// A model file and what it describes.
pub(crate) struct Model {
    pub(crate) source: ModelSource,
    pub(crate) spec: ModelSpec,
    pub(crate) file_bytes: u64,
}

impl Model {
    pub(crate) fn open(path: &Path) -> Result<Self, Trouble> {
        let spec = describe(&GgufFile::open(path)?)?;
        let file_bytes = std::fs::metadata(path)?.len();
        Ok(Self { source: ModelSource::File(path.to_owned()), spec, file_bytes })
    }

    /// A worker of this model on the first GPU, with KV for `n_full` full contexts.
    pub(crate) fn worker(&self, context: u32, max_sequences: u32, n_full: u64) -> Result<WorkerSpec, Trouble> {
        let context = context.min(u32::try_from(self.spec.n_ctx_train)?);
        let mut spec = WorkerSpec {
            replica: ReplicaId { model: "m".into(), index: 0 },
            incarnation: 1,
            device: DeviceId::gpu(DeviceName::find("gpu")?.to_string()),
            source: self.source.clone(),
            kv_bytes: 0,
            memory_bytes_max: None,
            kv_type: KvType::F16,
            context: Some(context),
            max_sequences,
            max_batch_tokens: 512.max(max_sequences),
            isolation: Isolation::Process,
            heartbeat: Duration::from_secs(1),
        };
        spec.kv_bytes = n_full * sizing::kv_min_bytes(&spec, &self.spec)?;
        Ok(spec)
    }
}

/// A request of `prompt`; the seed decides the rest.
pub(crate) fn request(id: u64, prompt: Vec<u32>, max_tokens: u32, sampling: SamplingParams) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: Task::Generate,
        prompt,
        emitted: Vec::new(),
        sampling,
        max_tokens,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        deadline: None,
    }
}

/// Token, bits of its log probability, and those of the most likely ones.
pub(crate) type Bits = Vec<(u32, u32, Vec<(u32, u32)>)>;

/// A worker and its events.
pub(crate) struct Worker {
    link: Box<dyn WorkerLink>,
    events: mpsc::Receiver<WorkerEvent>,
    runtime: tokio::runtime::Runtime,
    /// When it was started.
    pub(crate) since: Instant,
}

impl Worker {
    pub(crate) fn start(spec: WorkerSpec) -> Result<Self, Trouble> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let (sender, events) = mpsc::channel(1024);
        let since = Instant::now();
        let link = ProcessWorkers::new(None).start(spec, sender)?;
        Ok(Self { link, events, runtime, since })
    }

    fn next(&mut self) -> Result<WorkerEvent, Trouble> {
        let next = async { tokio::time::timeout(DEADLINE, self.events.recv()).await };
        self.runtime.block_on(next)?.ok_or_else(|| "the worker's channel closed".into())
    }

    /// Waits until it takes requests; seconds from the start to each phase of the load.
    pub(crate) fn await_ready(&mut self) -> Result<(Vec<(LoadPhase, f64)>, WorkerReady), Trouble> {
        let mut phases: Vec<(LoadPhase, f64)> = Vec::new();
        loop {
            match self.next()? {
                WorkerEvent::Progress(progress) => {
                    if phases.last().is_none_or(|(phase, _)| *phase != progress.phase) {
                        phases.push((progress.phase, self.since.elapsed().as_secs_f64()));
                    }
                }
                WorkerEvent::Ready(ready) => return Ok((phases, ready)),
                WorkerEvent::Heartbeat(_) => {}
                other => return Err(format!("while the worker loads: {other:?}").into()),
            }
        }
    }

    pub(crate) fn submit(&mut self, request: EngineRequest) -> Result<(), Trouble> {
        let command = WorkerCommand::Submit(request);
        let deadline = Instant::now() + DEADLINE;
        while let Err(error) = self.link.send(&command) {
            if Instant::now() > deadline {
                return Err(error.into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits for the first token of anything.
    pub(crate) fn first_token(&mut self) -> Result<(), Trouble> {
        loop {
            match self.next()? {
                WorkerEvent::Step(events) if events.iter().any(|e| matches!(e, EngineEvent::Token { .. })) => {
                    return Ok(());
                }
                WorkerEvent::Heartbeat(_) | WorkerEvent::Begun(_) | WorkerEvent::Step(_) => {}
                other => return Err(format!("while a token is due: {other:?}").into()),
            }
        }
    }

    /// Runs these requests at once, to their ends.
    pub(crate) fn run(&mut self, requests: Vec<EngineRequest>) -> Result<BTreeMap<RequestId, Bits>, Trouble> {
        let mut open = requests.len();
        let mut found: BTreeMap<RequestId, Bits> = BTreeMap::new();
        for request in requests {
            found.insert(request.id, Bits::new());
            self.submit(request)?;
        }
        while open > 0 {
            let WorkerEvent::Step(events) = self.next()? else { continue };
            for event in events {
                match event {
                    EngineEvent::Token { id, token, logprobs, .. } => {
                        let (chosen, top) = logprobs.map_or((0, Vec::new()), |l| {
                            (l.chosen.to_bits(), l.top.iter().map(|t| (t.token, t.logprob.to_bits())).collect())
                        });
                        found.entry(id).or_default().push((token, chosen, top));
                    }
                    EngineEvent::Finished { .. } => open -= 1,
                    other => return Err(format!("while requests run: {other:?}").into()),
                }
            }
        }
        Ok(found)
    }

    /// Kills it and waits until it is reaped.
    pub(crate) fn kill(mut self) -> Result<(), Trouble> {
        self.link.kill();
        while !matches!(self.next()?, WorkerEvent::Exited(_)) {}
        Ok(())
    }
}
