//! A house with an HTTP front in the test's own process: real actors, the real front on a real socket, and workers that
//! are threads with a real engine on the embedded model, or with an engine made for the test.

#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod client;
pub(crate) mod engines;
pub(crate) mod frames;

use engines::{Counts, Gate, Pace, Speaker};
use playhouse::backend::KvDtype;
use playhouse::backend::cpu::CpuBackend;
use playhouse::client::{Catalog, Client, ModelCard};
use playhouse::engine::{EngineOptions, LlmEngine, Runner, RunnerLimits};
use playhouse::http::control::{BoxFuture, ConfiguredModel, Control, ControlError};
use playhouse::http::{BuildInfo, Front, HttpSettings, Listeners};
use playhouse_actors::EventLog;
use playhouse_actors::engine::{Engine, EngineEvent, LoadPhase, LoadProgress};
use playhouse_actors::inventory::{Device, DeviceId, Inventory, InventoryError};
use playhouse_actors::link::{LinkError, WorkerFactory, WorkerLink};
use playhouse_actors::messages::{Heartbeat, WorkerCommand, WorkerEvent, WorkerReady, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_actors::policy::placement::{DevicePlan, Placement, Plan};
use playhouse_actors::{HouseArgs, HouseHandle};
use playhouse_config::{Config, Model, ModelSource};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc as std_mpsc};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes; a test that waits so long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A model's engine, made on the thread that will own it.
pub(crate) struct Loaded {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) n_ctx: u32,
    pub(crate) n_vocab: u32,
}

/// Makes engines.
pub(crate) type Loader = Arc<dyn Fn(&WorkerSpec) -> Result<Loaded, String> + Send + Sync>;

/// The real engine over the model that the worker was told to load.
pub(crate) fn real(spec: &WorkerSpec) -> Result<Loaded, String> {
    let file = playhouse::source::open(&spec.source).map_err(|error| error.to_string())?;
    let n_ctx = spec.context.unwrap_or(256) as usize;
    let limits = RunnerLimits::new(n_ctx, spec.max_sequences as usize, KvDtype::F32);
    let runner =
        Runner::load(&file, CpuBackend::with_threads(1), limits, &mut |_| {}).map_err(|error| error.to_string())?;
    let n_vocab = u32::try_from(runner.spec().n_vocab).expect("small");
    let tokenizer = move || playhouse::text::Tokenizer::from_gguf(&file).map_err(|error| error.to_string());
    let constrainer = Box::new(playhouse::grammar::LazyGrammars::new(Box::new(tokenizer)));
    let engine = Box::new(LlmEngine::new(runner, EngineOptions::default()).with_constrainer(constrainer));
    Ok(Loaded { engine, n_ctx: n_ctx as u32, n_vocab })
}

/// Starts workers that are threads.
pub(crate) struct ThreadWorkers {
    pub(crate) loader: Loader,
    /// Workers started so far.
    pub(crate) started: Arc<AtomicU32>,
    /// Kill switches of the workers, oldest first.
    pub(crate) kills: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
}

impl ThreadWorkers {
    pub(crate) fn new(loader: Loader) -> Self {
        Self { loader, started: Arc::default(), kills: Arc::default() }
    }
}

struct Link {
    commands: std_mpsc::SyncSender<WorkerCommand>,
    killed: Arc<AtomicBool>,
}

impl WorkerLink for Link {
    fn send(&mut self, command: &WorkerCommand) -> Result<(), LinkError> {
        self.commands.try_send(command.clone()).map_err(|error| match error {
            std_mpsc::TrySendError::Full(_) => LinkError::Full,
            std_mpsc::TrySendError::Disconnected(_) => LinkError::Closed,
        })
    }

    fn kill(&mut self) {
        self.killed.store(true, Ordering::Relaxed);
    }

    fn pid(&self) -> Option<u32> {
        None
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.kill();
    }
}

impl WorkerFactory for ThreadWorkers {
    fn start(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<Box<dyn WorkerLink>, String> {
        let (commands, receiver) = std_mpsc::sync_channel(4096);
        let killed = Arc::new(AtomicBool::new(false));
        self.started.fetch_add(1, Ordering::Relaxed);
        self.kills.lock().expect("not poisoned").push(killed.clone());
        let (loader, flag) = (self.loader.clone(), killed.clone());
        std::thread::spawn(move || {
            let end = run(&loader, &spec, &receiver, &events, &flag);
            let _ = events.blocking_send(WorkerEvent::Exited(end));
        });
        Ok(Box::new(Link { commands, killed }))
    }
}

fn run(
    loader: &Loader,
    spec: &WorkerSpec,
    commands: &std_mpsc::Receiver<WorkerCommand>,
    events: &mpsc::Sender<WorkerEvent>,
    killed: &AtomicBool,
) -> WorkerEnd {
    let progress = LoadProgress { phase: LoadPhase::Weights, bytes_done: 0, bytes_total: 1 };
    let _ = events.blocking_send(WorkerEvent::Progress(progress));
    let loaded = match loader(spec) {
        Ok(loaded) => loaded,
        Err(why) => return WorkerEnd::BadModel(why),
    };
    let mut engine = loaded.engine;
    let ready =
        WorkerReady { pid: None, n_ctx: loaded.n_ctx, n_vocab: loaded.n_vocab, kv_min_bytes: 1, stats: engine.stats() };
    let _ = events.blocking_send(WorkerEvent::Ready(ready));
    let (mut busy, mut out) = (false, Vec::<EngineEvent>::new());
    let mut waiting = std::collections::HashMap::new();
    let mut beat = std::time::Instant::now();
    loop {
        if killed.load(Ordering::Relaxed) {
            return WorkerEnd::Signalled(9);
        }
        let command =
            if busy { commands.try_recv().ok() } else { commands.recv_timeout(Duration::from_millis(20)).ok() };
        match command {
            Some(WorkerCommand::Submit(request)) => {
                let id = request.id;
                match engine.submit(request) {
                    Ok(()) => {
                        waiting.insert(id, std::time::Instant::now());
                        busy = true;
                    }
                    Err(error) => drop(events.blocking_send(WorkerEvent::Refused { id, error })),
                }
                // As a real worker does: whatever else waits is taken in before the next step.
                if busy {
                    continue;
                }
            }
            Some(WorkerCommand::Cancel(id)) => {
                engine.cancel(id);
                busy = true;
                continue;
            }
            Some(WorkerCommand::Shutdown) => return WorkerEnd::Asked,
            None => {}
        }
        if busy {
            let begins = std::time::Instant::now();
            match engine.step(&mut out) {
                Ok(report) => busy = report.busy,
                Err(error) => {
                    let _ = events.blocking_send(WorkerEvent::Failed(error));
                    return WorkerEnd::Exited(1);
                }
            }
            // Prompts are short here: the step that begins with a request brings its first token.
            let begun = out.iter().filter_map(|event| match event {
                EngineEvent::Token { id, index: 0, .. } => Some((*id, begins.duration_since(waiting.remove(id)?))),
                _ => None,
            });
            let begun: Vec<_> = begun.collect();
            if !begun.is_empty() && events.blocking_send(WorkerEvent::Begun(begun)).is_err() {
                return WorkerEnd::Exited(0);
            }
            if !out.is_empty() && events.blocking_send(WorkerEvent::Step(std::mem::take(&mut out))).is_err() {
                return WorkerEnd::Exited(0);
            }
        }
        if beat.elapsed() >= spec.heartbeat.min(Duration::from_millis(50)) {
            beat = std::time::Instant::now();
            let _ = events.blocking_send(WorkerEvent::Heartbeat(Heartbeat { step_age: None, stats: engine.stats() }));
        }
    }
}

/// An inventory without GPUs.
pub(crate) struct NoGpus;

impl Inventory for NoGpus {
    fn devices(&mut self) -> Result<Vec<Device>, InventoryError> {
        Ok(Vec::new())
    }

    fn take_events(&mut self) -> Option<mpsc::Receiver<playhouse_actors::inventory::HealthEvent>> {
        None
    }
}

/// The part of a host that a front needs.
pub(crate) struct TestControl {
    pub(crate) tree: HouseHandle,
    pub(crate) models: Vec<ConfiguredModel>,
    /// What was asked for.
    pub(crate) calls: Mutex<Vec<String>>,
}

impl Control for TestControl {
    fn devices(&self) -> BoxFuture<'_, Vec<Device>> {
        Box::pin(self.tree.devices())
    }

    fn models(&self) -> Vec<ConfiguredModel> {
        self.models.clone()
    }

    fn load<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>> {
        Box::pin(async move { self.call("load", model) })
    }

    fn unload<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>> {
        Box::pin(async move { self.call("unload", model) })
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({ "path": null })
    }

    fn events(&self) -> &EventLog {
        self.tree.log()
    }
}

impl TestControl {
    fn call(&self, what: &str, model: &str) -> Result<(), ControlError> {
        if !self.models.iter().any(|known| known.name == model) {
            return Err(ControlError::UnknownModel(model.to_owned()));
        }
        self.calls.lock().expect("not poisoned").push(format!("{what} {model}"));
        Ok(())
    }
}

/// A house with its front.
pub(crate) struct TestHouse {
    pub(crate) address: SocketAddr,
    pub(crate) client: Client,
    pub(crate) control: Arc<TestControl>,
    pub(crate) kills: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
    pub(crate) started: Arc<AtomicU32>,
    pub(crate) stop: CancellationToken,
    pub(crate) served: tokio::task::JoinHandle<Result<(), playhouse::http::ServeError>>,
    pub(crate) front: Front,
}

/// What a house is made with.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) settings: HttpSettings,
    pub(crate) loader: Loader,
    /// Models are also known by these cards, whatever the configuration says.
    pub(crate) cards: Vec<Arc<ModelCard>>,
    pub(crate) listen: SocketAddr,
    /// A Unix socket that the front listens on, too.
    pub(crate) unix: Option<tokio::net::UnixListener>,
}

impl Default for Setup {
    fn default() -> Self {
        let model =
            Model { context: Some(256), max_sequences: 8, aliases: vec!["poet".into()], ..Model::embedded_default() };
        let config = Config { models: vec![model], ..Config::default() };
        let settings = HttpSettings::from(&config.host);
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { config, settings, loader: Arc::new(real), cards: Vec::new(), listen, unix: None }
    }
}

impl Setup {
    /// With another engine, which may talk for as long as it likes.
    pub(crate) fn engine(mut self, make: impl Fn() -> Box<dyn Engine> + Send + Sync + 'static) -> Self {
        self.loader = Arc::new(move |_: &WorkerSpec| Ok(Loaded { engine: make(), n_ctx: u32::MAX, n_vocab: 1 << 17 }));
        self.config.host.limits.queued_tokens = 1 << 50;
        for model in &mut self.config.models {
            model.context = None;
            let mut card = ModelCard::read(model).expect("the embedded model is whole");
            card.context = u32::MAX;
            self.cards.push(Arc::new(card));
        }
        self
    }

    /// With a model that says the same token, one for each permit of the gate; and what it counts.
    pub(crate) fn gated() -> (Self, Arc<Gate>, Counts) {
        let (gate, counts) = (Arc::new(Gate::default()), Counts::default());
        let (pace, seen) = (Pace::Permits(gate.clone()), counts.clone());
        let speak = move || Speaker::new(vec![300], false, pace.clone(), seen.clone());
        (Self::default().engine(move || Box::new(speak())), gate, counts)
    }

    /// Starts house and front; returns when the first model is ready.
    pub(crate) async fn start(self) -> TestHouse {
        let house = self.start_unready().await;
        house.wait_ready().await;
        house
    }

    /// Starts house and front.
    pub(crate) async fn start_unready(self) -> TestHouse {
        let cards = if self.cards.is_empty() {
            let read = |model: &Model| Arc::new(ModelCard::read(model).expect("the embedded model is whole"));
            self.config.models.iter().map(read).collect()
        } else {
            self.cards
        };
        let placements = self.config.models.iter().map(|model| Placement {
            model: model.name.clone(),
            replica: 0,
            weights_bytes: 0,
            kv_bytes: 1 << 20,
            scratch_bytes: 0,
            context_bytes: 0,
            limit_bytes: None,
            kv_min_bytes: 1,
        });
        let device = DevicePlan {
            device: DeviceId::cpu(),
            name: "CPU".into(),
            total_bytes: 1 << 30,
            foreign_bytes: 0,
            placements: placements.collect(),
            headroom_bytes: 0,
        };
        let workers = ThreadWorkers::new(self.loader);
        let (kills, started) = (workers.kills.clone(), workers.started.clone());
        let args = HouseArgs {
            config: self.config.clone(),
            plan: Plan { devices: vec![device] },
            factory: Arc::new(workers),
            inventory: Box::new(NoGpus),
            seed: 1,
        };
        let (tree, _) = HouseHandle::start(args).await.expect("the tree starts");
        let catalog = Arc::new(arc_swap::ArcSwap::from_pointee(Catalog::new(cards)));
        let client = Client::new(tree.clone(), catalog);
        let configured =
            |model: &Model| ConfiguredModel { name: model.name.clone(), aliases: model.aliases.clone(), wanted: true };
        let models = self.config.models.iter().map(configured).collect();
        let control = Arc::new(TestControl { tree, models, calls: Mutex::default() });
        let listener = TcpListener::bind(self.listen).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let build = BuildInfo { version: "0.0.0-test".into(), commit: Some("0123456789abcdef".into()) };
        let front = Front { client: client.clone(), control: control.clone(), settings: self.settings, build };
        let served = tokio::spawn(playhouse::http::serve(
            front.clone(),
            Listeners { tcp: listener, unix: self.unix },
            stop.clone(),
        ));
        TestHouse { address, client, control, kills, started, stop, served, front }
    }
}

impl TestHouse {
    /// Waits until every required model has a ready replica.
    pub(crate) async fn wait_ready(&self) {
        self.wait("ready", |status| status.is_ready()).await;
    }

    /// Waits until the house is as `is_so` says.
    pub(crate) async fn wait(&self, what: &str, is_so: impl Fn(&playhouse_actors::HouseStatus) -> bool) {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        let waiting = async {
            loop {
                ticks.tick().await;
                if self.client.tree().status().await.is_some_and(|status| is_so(&status)) {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("the house never was {what}"));
    }

    /// Kills the worker that was started last, as `kill -9` would.
    pub(crate) fn kill_worker(&self) {
        self.kills.lock().expect("not poisoned").last().expect("a worker").store(true, Ordering::Relaxed);
    }

    /// Ends front and house.
    pub(crate) async fn shut_down(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.served).await.expect("in time").expect("no panic").expect("served");
        self.client.tree().stop().await;
    }
}

/// A card of the embedded model under another name and with another chat template.
pub(crate) fn card_with_template(name: &str, template: &str) -> Arc<ModelCard> {
    let model = Model { name: name.into(), source: ModelSource::Embedded("basho".into()), ..Model::default() };
    let mut card = ModelCard::read(&model).expect("the embedded model is whole");
    let tokens = playhouse::text::TemplateTokens::of(&card.tokenizer);
    card.template = Some(playhouse::text::ChatTemplate::new(template, tokens).expect("a template"));
    Arc::new(card)
}
