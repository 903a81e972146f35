//! A house with simulated cards, and clients whose streams are held against an undisturbed run.

use playhouse_actors::engine::{FinishReason, SamplingParams, Task};
use playhouse_actors::house::{HouseArgs, HouseHandle};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::messages::{Phase, ReplicaStatus, WorkerCommand, WorkerSpec};
use playhouse_actors::policy::placement::{Card, Demand, Plan, Wanted, place};
use playhouse_actors::sim::{
    Faults, SIM_BLOCK_BYTES, SIM_CONTEXT_BYTES, SimBox, SimInventory, SimWorkers, Verdict, sim_token,
};
use playhouse_actors::{Generate, HouseEvent, HouseStatus, StreamEvent, Terminal, TokenStream};
use playhouse_config::{Config, Model, ModelSource, Replicas, SimulatedDevice};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// On the paused clock: longer than every back-off and timeout of the default configuration.
pub(crate) const DEADLINE: Duration = Duration::from_secs(3600);

/// Tokens of a sequence at most.
pub(crate) const N_CTX: u32 = 256;

/// KV of one sequence of the full context.
pub(crate) const KV_MIN_BLOCKS: u64 = 17;

/// What fails: a function of the worker, and in a step of how many steps it has taken.
#[derive(Clone, Copy)]
pub(crate) struct Script {
    pub(crate) load: fn(&WorkerSpec) -> Verdict,
    pub(crate) step: fn(&WorkerSpec, u32) -> Verdict,
    pub(crate) send_panics: fn(&WorkerSpec, &WorkerCommand) -> bool,
}

impl Default for Script {
    fn default() -> Self {
        Self { load: |_| Verdict::Pass, step: |_, _| Verdict::Pass, send_panics: |_, _| false }
    }
}

pub(crate) struct Scripted {
    pub(crate) script: Script,
    pub(crate) steps: Mutex<BTreeMap<(String, u64), u32>>,
}

impl Faults for Scripted {
    fn at_load(&self, spec: &WorkerSpec) -> Verdict {
        (self.script.load)(spec)
    }

    fn at_step(&self, spec: &WorkerSpec) -> Verdict {
        let mut steps = self.steps.lock().expect("no panics");
        let step = steps.entry((spec.replica.to_string(), spec.incarnation)).or_default();
        *step += 1;
        (self.script.step)(spec, *step)
    }

    fn panics_at_send(&self, spec: &WorkerSpec, command: &WorkerCommand) -> bool {
        (self.script.send_panics)(spec, command)
    }
}

/// A house with simulated cards.
pub(crate) struct Stage {
    pub(crate) house: HouseHandle,
    pub(crate) root: JoinHandle<()>,
    pub(crate) sim: SimBox,
    pub(crate) workers: SimWorkers,
    pub(crate) cards: Vec<SimulatedDevice>,
    pub(crate) config: Config,
    pub(crate) events: broadcast::Receiver<HouseEvent>,
}

pub(crate) fn model(name: &str, replicas: Replicas) -> Model {
    let source = ModelSource::Embedded("basho".into());
    Model { name: name.into(), source, replicas, ..Model::default() }
}

pub(crate) fn one_model(replicas: u32) -> Config {
    Config { models: vec![model("m", Replicas::Count(replicas))], ..Config::default() }
}

pub(crate) fn plan(config: &Config, cards: &[SimulatedDevice], before: Option<&Plan>) -> Plan {
    let current = |name: &str| -> Vec<(DeviceId, u64)> {
        let placements = before.into_iter().flat_map(Plan::placements).filter(|(_, placement)| placement.model == name);
        placements.map(|(device, placement)| (device.clone(), placement.kv_bytes)).collect()
    };
    let wanted = |model: &Model| Wanted {
        name: model.name.clone(),
        devices: model.devices.clone(),
        replicas: model.replicas,
        priority: model.priority,
        kv_budget_bytes: model.kv_budget_bytes,
        memory_limit: model.memory_limit,
        demand: Demand {
            context_bytes: SIM_CONTEXT_BYTES,
            kv_min_bytes: KV_MIN_BLOCKS * SIM_BLOCK_BYTES,
            kv_full_bytes: 64 * SIM_BLOCK_BYTES,
            ..Demand::default()
        },
        current: current(&model.name),
    };
    let wanted: Vec<Wanted> = config.models.iter().map(wanted).collect();
    let card = |device: &SimulatedDevice| Card {
        id: DeviceId::gpu(&device.uuid),
        name: device.name.clone(),
        pci: None,
        total_bytes: device.vram_bytes,
        free_bytes: device.vram_bytes,
    };
    let gpus: Vec<Card> = cards.iter().map(card).collect();
    let cpu = Card { id: DeviceId::cpu(), name: "CPU".into(), pci: None, total_bytes: 0, free_bytes: 0 };
    place(&wanted, &gpus, &cpu).expect("the cards are large enough")
}

impl Stage {
    /// A house on so many cards whose replicas are all ready, unless `script` keeps them from it.
    pub(crate) async fn set(n_cards: usize, config: Config, script: Script) -> Self {
        let card = |index: usize| SimulatedDevice {
            name: "Simulated".into(),
            uuid: format!("SIM-{index}"),
            vram_bytes: 400 * SIM_BLOCK_BYTES,
            used_bytes: 0,
        };
        let cards: Vec<SimulatedDevice> = (0..n_cards).map(card).collect();
        let (inventory, sim) = SimInventory::new(cards.clone());
        let faults = Arc::new(Scripted { script, steps: Mutex::default() });
        let workers = SimWorkers::new(sim.clone(), faults, N_CTX);
        let args = HouseArgs {
            plan: plan(&config, &cards, None),
            config: config.clone(),
            factory: Arc::new(workers.clone()),
            inventory: Box::new(inventory),
            seed: 1,
        };
        let (house, root) = HouseHandle::start(args).await.expect("the root starts");
        let events = house.listen();
        Self { house, root, sim, workers, cards, config, events }
    }

    pub(crate) async fn ready(n_cards: usize, config: Config, script: Script) -> Self {
        let mut stage = Self::set(n_cards, config, script).await;
        stage.all_ready().await;
        stage
    }

    /// Waits for an event; what came before it is forgotten.
    pub(crate) async fn until<T>(&mut self, wanted: impl Fn(&HouseEvent) -> Option<T>) -> T {
        let found = async {
            loop {
                let event = self.events.recv().await.expect("the tree lives, and tells less than the bus holds");
                if let Some(found) = wanted(&event) {
                    return found;
                }
            }
        };
        timeout(DEADLINE, found).await.expect("the event comes")
    }

    pub(crate) async fn status(&self) -> HouseStatus {
        self.house.status().await.expect("the tree lives")
    }

    pub(crate) async fn replica(&self, name: &str) -> ReplicaStatus {
        let status = self.status().await;
        status.replicas().find(|replica| replica.replica.to_string() == name).cloned().expect("there is such a replica")
    }

    /// Looks at the house, again and again, until it is as it should be.
    pub(crate) async fn seen(&self, what: &str, wanted: impl Fn(&HouseStatus) -> bool) -> HouseStatus {
        let mut looks = tokio::time::interval(Duration::from_millis(50));
        let begun = Instant::now();
        loop {
            looks.tick().await;
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "never {what}: {status:#?}");
        }
    }

    pub(crate) async fn all_ready(&mut self) -> HouseStatus {
        self.seen("ready", |status| status.replicas().all(|replica| replica.phase == Phase::Ready)).await
    }

    pub(crate) async fn stream(&self, model: &str, seed: u64, max_tokens: u32) -> Reading {
        let stream = self.house.generate(request(model, seed, max_tokens)).await.expect("it is accepted");
        Reading { stream, seed, max_tokens, n_read: 0 }
    }

    /// What must hold in the end, whatever happened: memory is held by the living alone, and nothing is left open.
    pub(crate) async fn strike(self) {
        self.house.stop().await;
        timeout(DEADLINE, self.root).await.expect("in time").expect("the root ends well");
        assert!(self.sim.ledger().is_empty(), "memory is left: {:?}", self.sim.ledger());
        assert!(self.workers.alive().is_empty(), "workers are left");
    }
}

pub(crate) fn prompt(seed: u64) -> Vec<u32> {
    (0..10).map(|index| u32::try_from(seed).expect("small") * 100 + index).collect()
}

pub(crate) fn request(model: &str, seed: u64, max_tokens: u32) -> Generate {
    Generate {
        task: Task::Generate,
        constraint: None,
        model: model.into(),
        prompt: prompt(seed),
        sampling: SamplingParams { seed, ..SamplingParams::greedy() },
        max_tokens,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        priority: 0,
        timeout: None,
    }
}

/// A client in the middle of its stream.
pub(crate) struct Reading {
    pub(crate) stream: TokenStream,
    pub(crate) seed: u64,
    pub(crate) max_tokens: u32,
    pub(crate) n_read: u32,
}

impl Reading {
    pub(crate) async fn event(&mut self) -> Option<StreamEvent> {
        timeout(DEADLINE, self.stream.next()).await.expect("the stream goes on or ends")
    }

    /// Reads so many tokens, each of which must be the one of an undisturbed run.
    pub(crate) async fn read(&mut self, n_tokens: u32) {
        for _ in 0..n_tokens {
            match self.event().await {
                Some(StreamEvent::Token(token)) => self.judge(token.index, token.token),
                other => panic!("expected token {}, found {other:?}", self.n_read),
            }
        }
    }

    pub(crate) fn judge(&mut self, index: u32, token: u32) {
        assert_eq!(index, self.n_read, "a gap or a repeat");
        assert_eq!(token, sim_token(&prompt(self.seed), self.seed, 0, index), "token {index} differs");
        self.n_read += 1;
    }

    /// Reads to the end.
    pub(crate) async fn end(mut self) -> (u32, Terminal) {
        loop {
            match self.event().await {
                Some(StreamEvent::Token(token)) => self.judge(token.index, token.token),
                Some(StreamEvent::End(terminal)) => {
                    assert_eq!(self.event().await, None, "nothing follows the end");
                    return (self.n_read, terminal);
                }
                None => panic!("the stream ended without an end"),
            }
        }
    }

    /// Reads to the end, which must be that of an undisturbed run.
    pub(crate) async fn completes(self) {
        let max_tokens = self.max_tokens;
        let (n_read, terminal) = self.end().await;
        let Terminal::Completed { reason, usage } = terminal else { panic!("{terminal:?} after {n_read} tokens") };
        assert_eq!((reason, n_read, usage.completion_tokens), (FinishReason::Length, max_tokens, max_tokens));
    }
}
