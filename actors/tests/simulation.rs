//! The real actors and policies on a paused clock and one thread, with simulated workers, devices and clients, and
//! faults at random from one seed. After every step the invariants are checked; when the faults stop, everything must
//! come to its end.
//!
//! `SIM_SEED=42 cargo test -p playhouse-actors --test simulation` replays one seed; `SIM_SEEDS=100000` runs so many,
//! `SIM_SEEDS=50000..100000` those from the first to before the second.

use playhouse_actors::device_supervisor::DeviceMsg;
use playhouse_actors::engine::{FinishReason, SamplingParams, Task};
use playhouse_actors::house::{HouseArgs, HouseHandle, HouseMsg};
use playhouse_actors::inventory::{DeviceId, HealthKind};
use playhouse_actors::messages::{
    Drained, Failure, Generate, HouseEvent, HouseStatus, Phase, Refusal, StreamEvent, Terminal, WorkerCommand,
    WorkerSpec,
};
use playhouse_actors::policy::placement::{Card, Demand, Plan, Wanted, place};
use playhouse_actors::sim::{
    Faults, SIM_BLOCK_BYTES, SIM_CONTEXT_BYTES, SimBox, SimInventory, SimWorkers, Verdict, sim_embedding, sim_token,
};
use playhouse_config::checked::Backoff;
use playhouse_config::{Config, Devices, Limits, Model, ModelSource, Replicas, SimulatedDevice, Supervision};
use ractor::ActorCell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::time::Instant;

/// Seeds that `cargo test` runs; CI runs more by `SIM_SEEDS`.
const SEEDS: u64 = 300;
/// Virtual time between two checks.
const STEP: Duration = Duration::from_millis(50);
/// Checks while faults happen.
const STEPS: u32 = 200;

/// SplitMix64, shared: every draw is made in the order of events, which the seed fixes.
#[derive(Debug)]
struct Random(AtomicU64);

impl Random {
    fn next(&self) -> u64 {
        let state = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// True once in `n` times.
    fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn ms(&self, limit: u64) -> Duration {
        Duration::from_millis(self.below(limit))
    }
}

/// Faults at random, until they are switched off.
struct RandomFaults {
    random: Arc<Random>,
    on: AtomicBool,
    rate: u64,
}

impl RandomFaults {
    fn happens(&self, n: u64) -> bool {
        self.on.load(Ordering::Relaxed) && self.random.one_in(n)
    }
}

impl Faults for RandomFaults {
    fn at_start(&self, _spec: &WorkerSpec) -> Option<String> {
        self.happens(40).then(|| "no process".into())
    }

    fn at_load(&self, _spec: &WorkerSpec) -> Verdict {
        if !self.happens(12) {
            return Verdict::Pass;
        }
        [Verdict::OutOfMemory, Verdict::Exit(1), Verdict::Hang, Verdict::Signal(11)][self.index(4)]
    }

    fn at_step(&self, _spec: &WorkerSpec) -> Verdict {
        if !self.happens(self.rate) {
            return Verdict::Pass;
        }
        let verdicts = [
            Verdict::Signal(9),
            Verdict::Exit(0),
            Verdict::Exit(134),
            Verdict::Hang,
            Verdict::OutOfMemory,
            Verdict::DeviceLost,
            Verdict::BrokenIndex,
        ];
        verdicts[self.index(7)]
    }

    fn panics_at_send(&self, _spec: &WorkerSpec, _command: &WorkerCommand) -> bool {
        self.happens(200)
    }

    fn load_time(&self, _spec: &WorkerSpec) -> Duration {
        Duration::from_millis(20) + self.random.ms(400)
    }

    fn step_time(&self, _spec: &WorkerSpec) -> Duration {
        Duration::from_millis(5) + self.random.ms(15)
    }

    fn reap_time(&self, _spec: &WorkerSpec) -> Duration {
        self.random.ms(300)
    }
}

impl RandomFaults {
    fn index(&self, n: u64) -> usize {
        usize::try_from(self.random.below(n)).expect("small")
    }
}

/// What all clients saw, and what the checks look at.
#[derive(Debug, Default)]
struct Ledger {
    accepted: u64,
    refused: u64,
    ended: BTreeMap<&'static str, u64>,
    tokens: u64,
    open: u64,
    log: String,
}

type SharedLedger = Arc<Mutex<Ledger>>;

fn config(random: &Random) -> Config {
    let n_models = 1 + random.below(3);
    let models = (0..n_models).map(|index| Model {
        name: format!("m{index}"),
        aliases: vec![format!("alias{index}")],
        source: ModelSource::Embedded("basho".into()),
        devices: if random.one_in(4) { Devices::Cpu } else { Devices::AutoElseCpu },
        replicas: if random.one_in(2) { Replicas::All } else { Replicas::Count(1) },
        max_sequences: 1 + u32::try_from(random.below(6)).expect("small"),
        ..Model::default()
    });
    let supervision = Supervision {
        max_restarts: 3 + u32::try_from(random.below(40)).expect("small"),
        window: Duration::from_secs(60),
        backoff: Backoff { min: Duration::from_millis(100), max: Duration::from_secs(2), jitter: 0.2 },
        step_timeout: Duration::from_secs(1),
        load_timeout: Duration::from_secs(2),
        heartbeat: Duration::from_millis(200),
        shutdown: Duration::from_secs(1),
        poison_deaths: 2 + u32::try_from(random.below(4)).expect("small"),
        strategy: [
            playhouse_config::checked::Strategy::OneForOne,
            playhouse_config::checked::Strategy::OneForAll,
            playhouse_config::checked::Strategy::RestForOne,
        ][usize::try_from(random.below(3)).expect("small")],
        ..Supervision::default()
    };
    let limits = Limits {
        queued_requests: 4 + u32::try_from(random.below(60)).expect("small"),
        queued_tokens: 500 + random.below(20_000),
        stream_events: 1 + u32::try_from(random.below(16)).expect("small"),
        client_timeout: Duration::from_secs(2),
        request_timeout: Duration::from_secs(60),
        ..Limits::default()
    };
    let mut config = Config { models: models.collect(), supervision, ..Config::default() };
    config.host.limits = limits;
    config
}

fn plan(config: &Config, cards: &[SimulatedDevice], before: Option<&Plan>) -> Plan {
    let current = |name: &str| -> Vec<(DeviceId, u64)> {
        let placements = before.into_iter().flat_map(Plan::placements).filter(|(_, placement)| placement.model == name);
        placements.map(|(device, placement)| (device.clone(), placement.kv_bytes)).collect()
    };
    let wanted: Vec<Wanted> = config
        .models
        .iter()
        .map(|model| Wanted {
            name: model.name.clone(),
            devices: model.devices.clone(),
            replicas: model.replicas,
            priority: model.priority,
            kv_budget_bytes: model.kv_budget_bytes,
            memory_limit: model.memory_limit,
            demand: Demand {
                context_bytes: SIM_CONTEXT_BYTES,
                kv_min_bytes: 16 * SIM_BLOCK_BYTES,
                kv_full_bytes: 64 * SIM_BLOCK_BYTES,
                ..Demand::default()
            },
            current: current(&model.name),
        })
        .collect();
    let card = |device: &SimulatedDevice| Card {
        id: DeviceId::gpu(&device.uuid),
        name: device.name.clone(),
        pci: None,
        total_bytes: device.vram_bytes,
        free_bytes: device.vram_bytes - device.used_bytes,
    };
    let gpus: Vec<Card> = cards.iter().map(card).collect();
    let cpu = Card { id: DeviceId::cpu(), name: "CPU".into(), pci: None, total_bytes: 1 << 40, free_bytes: 1 << 40 };
    place(&wanted, &gpus, &cpu).expect("the cards are large enough")
}

fn cards(random: &Random) -> Vec<SimulatedDevice> {
    let card = |index: u64| SimulatedDevice {
        name: "Simulated".into(),
        uuid: format!("SIM-{index}"),
        vram_bytes: (100 + random.below(300)) * SIM_BLOCK_BYTES,
        used_bytes: 0,
    };
    (0..random.below(5)).map(card).collect()
}

/// One client with one request: asks, reads at its own pace, perhaps goes away, and checks what it reads.
async fn client(house: HouseHandle, random: Arc<Random>, ledger: SharedLedger, number: u64, n_models: u64) {
    let prompt: Vec<u32> =
        (0..1 + random.below(40)).map(|_| u32::try_from(random.below(1000)).expect("small")).collect();
    let seed = random.next();
    let max_tokens = 1 + u32::try_from(random.below(60)).expect("small");
    let model = random.below(n_models);
    let embed = random.one_in(10);
    let request = Generate {
        model: if random.one_in(3) { format!("alias{model}") } else { format!("m{model}") },
        task: if embed { Task::Embed } else { Task::Generate },
        prompt: prompt.clone(),
        sampling: SamplingParams { seed, ..SamplingParams::greedy() },
        max_tokens,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        timeout: random.one_in(8).then(|| random.ms(1500)),
    };
    let (slow, leaves_after, cancels_after) =
        (random.one_in(6), random.one_in(6).then(|| random.below(20)), random.one_in(8).then(|| random.below(20)));
    let mut stream = match house.generate(request).await {
        Ok(stream) => stream,
        Err(refusal) => {
            let mut ledger = ledger.lock().expect("no panics");
            ledger.refused += 1;
            let known = matches!(
                refusal,
                Refusal::Busy { .. }
                    | Refusal::Loading { .. }
                    | Refusal::Unavailable { .. }
                    | Refusal::RouterLost
                    | Refusal::Draining
                    | Refusal::UnknownModel { .. }
            );
            assert!(known, "client {number}: {refusal:?}");
            return;
        }
    };
    {
        let mut ledger = ledger.lock().expect("no panics");
        ledger.accepted += 1;
        ledger.open += 1;
    }
    let mut next_index = 0;
    let mut ends = 0;
    let mut how = "left";
    loop {
        if leaves_after.is_some_and(|after| u64::from(next_index) >= after) {
            break;
        }
        if cancels_after == Some(u64::from(next_index)) {
            house.cancel(stream.id());
        }
        if slow {
            tokio::time::sleep(random.ms(60)).await;
        }
        match stream.next().await {
            Some(StreamEvent::Token(token)) => {
                assert_eq!(ends, 0, "client {number}: a token after the end");
                assert_eq!(token.index, next_index, "client {number}: a gap or a repeat");
                let expected = sim_token(&prompt, seed, 0, token.index);
                assert_eq!(
                    token.token, expected,
                    "client {number}: token {next_index} differs from an undisturbed run"
                );
                next_index += 1;
                ledger.lock().expect("no panics").tokens += 1;
            }
            Some(StreamEvent::End(terminal)) => {
                ends += 1;
                how = judge(&terminal, number, next_index, max_tokens, &prompt);
            }
            None => break,
        }
    }
    assert!(ends == 1 || leaves_after.is_some(), "client {number}: {ends} ends");
    drop(stream);
    let mut ledger = ledger.lock().expect("no panics");
    ledger.open -= 1;
    *ledger.ended.entry(how).or_default() += 1;
    let _ = writeln!(ledger.log, "{number} {how} {next_index}");
}

fn judge(terminal: &Terminal, number: u64, n_tokens: u32, max_tokens: u32, prompt: &[u32]) -> &'static str {
    match terminal {
        Terminal::Completed { reason, usage } => {
            assert_eq!(*reason, FinishReason::Length, "client {number}");
            assert_eq!(n_tokens, max_tokens, "client {number}: complete, and tokens are missing");
            assert_eq!(usage.completion_tokens, n_tokens, "client {number}");
            assert_eq!(usage.prompt_tokens as usize, prompt.len(), "client {number}");
            "completed"
        }
        Terminal::Embedded { values, usage } => {
            assert_eq!(*values, sim_embedding(prompt), "client {number}: an embedding differs from an undisturbed run");
            assert_eq!((n_tokens, usage.completion_tokens), (0, 0), "client {number}");
            "embedded"
        }
        Terminal::Cancelled => "cancelled",
        Terminal::Failed(Failure::Poison { .. }) => "poison",
        Terminal::Failed(Failure::Deadline) => "deadline",
        Terminal::Failed(Failure::SlowClient) => "slow",
        Terminal::Failed(Failure::Unavailable) => "unavailable",
        Terminal::Failed(Failure::Draining) => "draining",
        Terminal::Failed(Failure::Request(error)) => panic!("client {number}: the engine refused: {error}"),
        Terminal::Failed(Failure::Lost) => panic!("client {number}: the host lost the request"),
    }
}

/// Everything that must hold at any time.
struct Invariants {
    sim: SimBox,
    workers: SimWorkers,
    cards: Vec<SimulatedDevice>,
    limits: Limits,
    supervision: Supervision,
    events: broadcast::Receiver<HouseEvent>,
    /// Scheduled restarts by device, with their times.
    restarts: BTreeMap<String, Vec<Instant>>,
}

impl Invariants {
    fn check(&mut self, status: &HouseStatus) {
        self.memory_is_held_by_the_living();
        self.one_worker_per_replica();
        self.queues_are_bounded(status);
        self.intensity_is_respected();
        nothing_runs_where_nothing_may(status);
    }

    fn memory_is_held_by_the_living(&self) {
        let alive: Vec<u64> = self.workers.alive().iter().map(|process| process.holder).collect();
        let ledger = self.sim.ledger();
        for (device, holder) in ledger.keys() {
            assert!(alive.contains(holder), "worker {holder} is dead and holds memory on {device}");
        }
        for card in &self.cards {
            let held: u64 = ledger.iter().filter(|((uuid, _), _)| *uuid == card.uuid).map(|(_, bytes)| bytes).sum();
            assert!(held <= card.vram_bytes, "{} of {} bytes on {}", held, card.vram_bytes, card.uuid);
        }
    }

    fn one_worker_per_replica(&self) {
        let mut seen = BTreeMap::new();
        for process in self.workers.alive() {
            let replica = process.spec.replica.to_string();
            let other = seen.insert((replica.clone(), process.spec.device.to_string()), process.holder);
            assert_eq!(other, None, "two workers of {replica}");
        }
    }

    fn queues_are_bounded(&self, status: &HouseStatus) {
        for service in status.router.iter().flat_map(|router| &router.services) {
            assert!(service.open_requests <= self.limits.queued_requests, "{service:?}");
            assert!(service.open_tokens <= self.limits.queued_tokens, "{service:?}");
        }
    }

    fn intensity_is_respected(&mut self) {
        let max = usize::try_from(self.supervision.max_restarts).expect("small");
        loop {
            match self.events.try_recv() {
                Ok(HouseEvent::RestartScheduled { device, .. }) => {
                    let restarts = self.restarts.entry(device.to_string()).or_default();
                    restarts.push(Instant::now());
                    let recent = restarts.iter().filter(|at| at.elapsed() < self.supervision.window - STEP * 2).count();
                    assert!(recent < max, "{recent} restarts on {device}, {max} quarantine it");
                }
                Ok(HouseEvent::Released { device }) => {
                    self.restarts.remove(device.as_str());
                }
                Ok(_) | Err(broadcast::error::TryRecvError::Lagged(_)) => {}
                Err(_) => return,
            }
        }
    }
}

/// On a device that was given up no worker loads, serves, or is about to.
fn nothing_runs_where_nothing_may(status: &HouseStatus) {
    for device in status.devices.iter().filter(|device| device.quarantined.is_some()) {
        let is_idle = |phase| !matches!(phase, Phase::Waiting | Phase::Loading | Phase::Ready | Phase::Backoff);
        assert!(device.replicas.iter().all(|replica| is_idle(replica.phase)), "{device:#?}");
    }
}

/// Runs one seed; what happened, for comparing two runs.
async fn run(seed: u64) -> String {
    let random = Arc::new(Random(AtomicU64::new(seed.wrapping_mul(0xD134_2543_DE82_EF95))));
    let cards = cards(&random);
    let config = config(&random);
    let rate = 20 + random.below(400);
    let faults = Arc::new(RandomFaults { random: random.clone(), on: AtomicBool::new(true), rate });
    let (inventory, sim) = SimInventory::new(cards.clone());
    let workers = SimWorkers::new(sim.clone(), faults.clone(), 128);
    let first_plan = plan(&config, &cards, None);
    let args = HouseArgs {
        plan: first_plan.clone(),
        config: config.clone(),
        factory: Arc::new(workers.clone()),
        inventory: Box::new(inventory),
        seed,
    };
    let (house, join) = HouseHandle::start(args).await.expect("the root starts");
    let mut invariants = Invariants {
        sim: sim.clone(),
        workers: workers.clone(),
        cards: cards.clone(),
        limits: config.host.limits.clone(),
        supervision: config.supervision.clone(),
        events: house.listen(),
        restarts: BTreeMap::new(),
    };
    let ledger = SharedLedger::default();
    let mut clients = Vec::new();
    let mut outside = Outside {
        random: random.clone(),
        sim: sim.clone(),
        workers: workers.clone(),
        cards: cards.clone(),
        config: config.clone(),
        plan: first_plan,
        actor_kills: config.supervision.max_restarts - 1,
    };

    for _ in 0..STEPS {
        tokio::time::sleep(STEP).await;
        for _ in 0..random.below(4) {
            let number = u64::try_from(clients.len()).expect("small");
            let n_models = u64::try_from(config.models.len()).expect("small");
            clients.push(tokio::spawn(client(house.clone(), random.clone(), ledger.clone(), number, n_models)));
        }
        outside.disturb(&house).await;
        if let Some(status) = house.status().await {
            invariants.check(&status);
        }
    }

    // Heal, then demand progress.
    faults.on.store(false, Ordering::Relaxed);
    house.apply(config.clone(), plan(&config, &cards, Some(&outside.plan))).await;
    let devices: Vec<DeviceId> =
        house.status().await.expect("the tree lives").devices.into_iter().map(|d| d.device).collect();
    for device in devices {
        house.restart_device(&device).await;
    }
    tokio::time::sleep(Duration::from_secs(150)).await;
    let status = house.status().await.expect("the tree lives");
    invariants.check(&status);
    assert_eq!(ledger.lock().expect("no panics").open, 0, "streams are still open: {status:#?}");
    for client in clients {
        client.await.expect("no client panicked");
    }
    for service in status.router.as_ref().map(|router| &router.services).expect("a router") {
        assert_eq!((service.open_requests, service.open_tokens, service.waiting), (0, 0, 0), "{service:?}");
        assert_eq!(service.ready, service.replicas, "not every replica came back: {status:#?}");
    }
    let replicas = status.devices.iter().flat_map(|device| &device.replicas);
    replicas.for_each(|replica| assert_eq!((replica.phase, replica.running), (Phase::Ready, 0), "{replica:?}"));

    let ended = house.drain(Duration::from_secs(1)).await;
    assert_eq!(ended, Drained::Empty { ended: 0 }, "nothing was open");
    house.stop().await;
    join.await.expect("the root ends well");
    assert!(sim.ledger().is_empty(), "memory is left: {:?}", sim.ledger());
    assert!(workers.alive().is_empty(), "workers are left");
    let ledger = ledger.lock().expect("no panics");
    format!("{:?} {} {} {}\n{}", ledger.ended, ledger.accepted, ledger.refused, ledger.tokens, ledger.log)
}

/// What comes from outside, now and then.
struct Outside {
    random: Arc<Random>,
    sim: SimBox,
    workers: SimWorkers,
    cards: Vec<SimulatedDevice>,
    config: Config,
    plan: Plan,
    /// The house gives up when its own actors fail too often: that is another test.
    actor_kills: u32,
}

impl Outside {
    async fn disturb(&mut self, house: &HouseHandle) {
        let random = self.random.clone();
        if random.one_in(25)
            && let Some(victim) = pick(&random, &self.workers.alive())
        {
            victim.kill();
        }
        if random.one_in(40)
            && let Some(card) = pick(&random, &self.cards)
        {
            let xids = [43, 31, 13, 94, 63, 79, 95, 119, 154];
            let xid = xids[usize::try_from(random.below(9)).expect("small")];
            self.sim.report(Some(&card.uuid), HealthKind::Xid(xid));
        }
        if random.one_in(20)
            && let Some(card) = pick(&random, &self.cards)
        {
            house.restart_device(&DeviceId::gpu(&card.uuid)).await;
        }
        if self.actor_kills > 0 && random.one_in(60) {
            let victims = if random.one_in(2) { supervisors(house) } else { router(house) };
            if let Some(victim) = pick(&random, &victims) {
                self.actor_kills -= 1;
                victim.kill();
            }
        }
        if random.one_in(60)
            && let Some(model) = pick(&random, &self.config.models)
        {
            house.restart_model(&model.name).await;
        }
        if random.one_in(30) {
            self.reload(house);
        }
    }

    /// A model more or less, or other settings of one.
    fn reload(&mut self, house: &HouseHandle) {
        let mut config = self.config.clone();
        if config.models.len() > 1 && self.random.one_in(2) {
            let index = usize::try_from(self.random.below(3)).expect("small") % config.models.len();
            config.models.remove(index);
        }
        if self.random.one_in(2) {
            config.models[0].max_sequences = 1 + u32::try_from(self.random.below(4)).expect("small");
        }
        self.plan = plan(&config, &self.cards, Some(&self.plan));
        // Nobody waits for it: the next one may come while it is made.
        let (reply, _) = ractor::concurrency::oneshot();
        let message = HouseMsg::Apply(Box::new(config), self.plan.clone(), reply.into());
        house.actor().send_message(message).expect("the tree lives");
    }
}

fn router(house: &HouseHandle) -> Vec<ActorCell> {
    house.router().current().map(|router| router.get_cell()).into_iter().collect()
}

/// Those of the devices, in the order in which they were started: a seed must always mean the same one.
fn supervisors(house: &HouseHandle) -> Vec<ActorCell> {
    let mut found = house.actor().get_cell().get_children();
    found.retain(|child| child.is_message_type_of::<DeviceMsg>() == Some(true));
    found.sort_by_key(|child| child.get_id().pid());
    found
}

fn pick<'a, T>(random: &Random, list: &'a [T]) -> Option<&'a T> {
    list.get(usize::try_from(random.below(u64::try_from(list.len()).ok()?)).ok()?)
}

fn on_paused_clock(seed: u64) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(run(seed))
}

/// Panics of simulated bugs are part of the test and would bury everything else.
fn quiet_simulated_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !info.to_string().contains("a simulated bug") {
            default(info);
        }
    }));
}

#[test]
fn seeds() {
    quiet_simulated_panics();
    if let Ok(seed) = std::env::var("SIM_SEED") {
        println!("{}", on_paused_clock(seed.parse().expect("a number")));
        return;
    }
    for seed in wanted_seeds() {
        let result = std::panic::catch_unwind(|| on_paused_clock(seed));
        if let Err(panic) = result {
            println!("replay with: SIM_SEED={seed} cargo test -p playhouse-actors --test simulation seeds");
            std::panic::resume_unwind(panic);
        }
    }
}

/// `SIM_SEEDS`: how many, or from which to which.
fn wanted_seeds() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("SIM_SEEDS") else { return 0..SEEDS };
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("SIM_SEEDS: expected a number, found {text:?}"));
    text.split_once("..").map_or_else(|| 0..number(&text), |(from, to)| number(from)..number(to))
}

#[test]
fn a_seed_replays_exactly() {
    quiet_simulated_panics();
    for seed in [3, 11, 12, 77] {
        assert_eq!(on_paused_clock(seed), on_paused_clock(seed), "seed {seed}");
    }
}
