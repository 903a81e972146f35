//! What the way between host and worker costs. `cargo bench --bench messages`.
//!
//! 1. One batch of 32 tokens as one frame, from another process: the time from before it is encoded there until it is
//!    decoded here, waking up included. To be below 50 us at the median.
//! 2. The same as a stream, as fast as it goes: messages and tokens per second, and the processor time of one.
//! 3. A whole request through the actors and a worker (process and thread), beside the engine called directly: what each
//!    token takes longer.

use playhouse::backend::cpu::CpuBackend;
use playhouse::engine::{EngineOptions, LlmEngine, Runner};
use playhouse::gguf::GgufFile;
use playhouse::models::describe;
use playhouse::worker::frame::{self, FrameReader};
use playhouse::worker::{Workers, run_if_worker, sizing};
use playhouse_actors::engine::{Engine, EngineEvent, EngineRequest, RequestId, SamplingParams};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::messages::{Generate, ReplicaId, StreamEvent, Terminal, WorkerCommand, WorkerEvent, WorkerSpec};
use playhouse_actors::policy::placement::{Card, Plan, Wanted, place};
use playhouse_actors::sim::SimInventory;
use playhouse_actors::{HouseArgs, HouseHandle, Refusal};
use playhouse_config::checked::{Isolation, KvType};
use playhouse_config::{Config, Devices, Model, ModelSource};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinHandle;

/// Tokens of a batch.
const BATCH: u64 = 32;
/// Batches that wait for an answer each.
const N_PINGS: usize = 5_000;
/// Batches of the stream.
const N_STREAMED: usize = 100_000;
/// Requests of one token.
const N_SHORT: u64 = 300;
/// Requests of many.
const N_LONG: u64 = 20;
/// So many.
const N_TOKENS: u32 = 200;

fn main() {
    run_if_worker();
    match std::env::args().nth(1).as_deref() {
        Some("child") => child(),
        _ => {
            socket_path();
            stream();
            actor_path();
        }
    }
}

// --- 1 and 2: the socket ------------------------------------------------------------------------------------------------

/// Nanoseconds of the clock that both processes see.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("the clock is set");
    u64::try_from(since.as_nanos()).expect("nanoseconds of this century fit")
}

/// A batch; the first token's request says when it was made.
fn batch() -> WorkerEvent {
    let now = now_ns();
    let token = |i: u64| EngineEvent::Token { id: RequestId(now + i), index: 700, token: 31_000, logprobs: None };
    WorkerEvent::Step((0..BATCH).map(token).collect())
}

/// The other process: a batch for each `Cancel`, or a stream of them for a `Shutdown`.
fn child() {
    let socket = std::io::stdin();
    let (mut reader, mut bytes) = (FrameReader::default(), Vec::new());
    let mut send = |n: usize| {
        for _ in 0..n {
            bytes.clear();
            frame::encode(&batch(), &mut bytes).expect("a batch fits a frame");
            if frame::write(&socket, &bytes, &[]).is_err() {
                return;
            }
        }
    };
    while let Ok(Some((command, _))) = reader.read::<WorkerCommand>(&socket) {
        match command {
            WorkerCommand::Cancel(_) => send(1),
            _ => send(N_STREAMED),
        }
    }
}

struct Other {
    child: Child,
    socket: OwnedFd,
    reader: FrameReader,
}

impl Other {
    fn start() -> Self {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
        let exe = std::env::current_exe().expect("this program has a path");
        let child = Command::new(exe).arg("child").stdin(Stdio::from(theirs)).spawn().expect("this program starts");
        Self { child, socket, reader: FrameReader::default() }
    }

    fn send(&self, command: &WorkerCommand) {
        let mut bytes = Vec::new();
        frame::encode(command, &mut bytes).expect("a command fits a frame");
        frame::write(&self.socket, &bytes, &[]).expect("the child reads");
    }

    fn read(&mut self) -> Vec<EngineEvent> {
        match self.reader.read(&self.socket).expect("whole frames").expect("the child lives").0 {
            WorkerEvent::Step(events) => events,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn socket_path() {
    let mut other = Other::start();
    let mut micros = Vec::with_capacity(N_PINGS);
    let mut round_trips = Vec::with_capacity(N_PINGS);
    for _ in 0..N_PINGS {
        let asked = Instant::now();
        other.send(&WorkerCommand::Cancel(RequestId(1)));
        let events = other.read();
        let EngineEvent::Token { id: RequestId(made), .. } = events[0] else { panic!("{events:?}") };
        micros.push(now_ns().saturating_sub(made) as f64 / 1e3);
        round_trips.push(asked.elapsed().as_secs_f64() * 1e6);
        assert_eq!(events.len() as u64, BATCH);
    }
    println!("one batch of {BATCH} tokens over the socket, one way:  {}", quantiles(micros));
    println!("  and with the command that asks for it, both ways: {}", quantiles(round_trips));
}

/// The value below which this share of them is.
fn at(micros: &[f64], share: f64) -> f64 {
    let mut sorted = micros.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

fn quantiles(micros: Vec<f64>) -> String {
    let [p10, p50, p90, p99] = [0.1, 0.5, 0.9, 0.99].map(|share| at(&micros, share));
    format!("median {p50:.1} us (p10 {p10:.1}, p90 {p90:.1}, p99 {p99:.1})")
}

fn stream() {
    let mut other = Other::start();
    other.send(&WorkerCommand::Shutdown);
    other.read();
    let start = Instant::now();
    let n_tokens: usize = (1..N_STREAMED).map(|_| other.read().len()).sum();
    let seconds = start.elapsed().as_secs_f64();
    let n_messages = (N_STREAMED - 1) as f64;
    println!(
        "batches of {BATCH} tokens as a stream: {:.0} messages/s, {:.1} million tokens/s, {:.2} us each",
        n_messages / seconds,
        n_tokens as f64 / seconds / 1e6,
        seconds / n_messages * 1e6
    );
    codec();
}

/// The part of it that is encoding and decoding.
fn codec() {
    let (event, mut bytes) = (batch(), Vec::new());
    let start = Instant::now();
    for _ in 0..N_STREAMED {
        bytes.clear();
        frame::encode(&event, &mut bytes).expect("a batch fits a frame");
    }
    let encode = start.elapsed();
    let start = Instant::now();
    for _ in 0..N_STREAMED {
        let decoded: WorkerEvent = frame::decode(&bytes[frame::HEADER_BYTES..]).expect("what was encoded");
        std::hint::black_box(&decoded);
    }
    let each = |time: Duration| time.as_secs_f64() / N_STREAMED as f64 * 1e6;
    let (encode, decode) = (each(encode), each(start.elapsed()));
    println!("  of which encoding {encode:.2} us, decoding {decode:.2} us; {} bytes a frame", bytes.len());
}

// --- 3: the actors ------------------------------------------------------------------------------------------------------

fn model(isolation: Isolation) -> Model {
    Model {
        devices: Devices::Cpu,
        isolation,
        kv_type: KvType::F32,
        context: Some(256),
        max_sequences: 1,
        ..Model::embedded_default()
    }
}

fn prompt() -> Vec<u32> {
    (0..8).map(|i| 300 + 17 * i).collect()
}

/// The three ways take turns, so that a machine that is busy with something else is so for all of them.
fn actor_path() {
    let mut direct = direct_engine();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let ways = [(Isolation::Process, "process"), (Isolation::Thread, "thread ")];
    runtime.block_on(async {
        let houses = [start(ways[0].0).await, start(ways[1].0).await];
        for (n_requests, n_tokens, what) in [
            (N_SHORT, 1, "requests of one token, from asking to having it"),
            (N_LONG, N_TOKENS, "requests of many tokens, between two of them"),
        ] {
            println!("the embedded model on one thread, {what}:");
            let (mut called, mut sent) = (Vec::new(), [Vec::new(), Vec::new()]);
            for seed in 0..n_requests {
                called.extend(tokio::task::block_in_place(|| one_call(&mut direct, seed, n_tokens)));
                for (house, waits) in houses.iter().zip(&mut sent) {
                    waits.extend(one_request(&house.0, seed, n_tokens).await);
                }
            }
            println!("  the engine, called directly:     {}", quantiles(called.clone()));
            for ((_, name), waits) in ways.iter().zip(sent) {
                let [median, p10] = [0.5, 0.1].map(|share| at(&waits, share) - at(&called, share));
                let waits = quantiles(waits);
                println!("  through the actors, in a {name}: {waits}; {median:+.1} us at the median, {p10:+.1} at p10");
            }
        }
        for (house, join) in houses {
            house.stop().await;
            join.await.expect("the tree ends");
        }
    });
}

/// The engine that a worker of [`model`] has.
fn direct_engine() -> LlmEngine<Runner<CpuBackend>> {
    let file = embedded();
    let described = describe(&file).expect("the embedded file is sound");
    let config = model(Isolation::Thread);
    let spec = WorkerSpec {
        kv_bytes: sizing::demand(&config, &described).expect("it fits").kv_full_bytes,
        replica: ReplicaId { model: config.name, index: 0 },
        incarnation: 1,
        device: DeviceId::cpu(),
        source: ModelSource::Embedded("basho".into()),
        memory_bytes_max: None,
        kv_type: config.kv_type,
        context: config.context,
        max_sequences: config.max_sequences,
        max_batch_tokens: config.max_batch_tokens,
        isolation: Isolation::Thread,
        heartbeat: Duration::from_secs(1),
    };
    let limits = sizing::limits(&spec, &described).expect("it fits");
    let runner = Runner::load(&file, CpuBackend::with_threads(1), limits, &mut |_| ()).expect("it loads");
    LlmEngine::new(runner, EngineOptions::default())
}

/// Microseconds that tokens are waited for: the first if there is no other, else those between two.
struct Waits {
    micros: Vec<f64>,
    last: Instant,
}

impl Waits {
    fn start() -> Self {
        Self { micros: Vec::new(), last: Instant::now() }
    }

    fn token(&mut self) {
        let now = Instant::now();
        self.micros.push((now - std::mem::replace(&mut self.last, now)).as_secs_f64() * 1e6);
    }

    fn of_interest(mut self, n_tokens: u32) -> Vec<f64> {
        assert_eq!(self.micros.len(), n_tokens as usize);
        if n_tokens > 1 {
            self.micros.remove(0);
        }
        self.micros
    }
}

fn one_call(engine: &mut LlmEngine<Runner<CpuBackend>>, seed: u64, n_tokens: u32) -> Vec<f64> {
    let (mut waits, mut busy) = (Waits::start(), true);
    engine.submit(engine_request(seed, n_tokens)).expect("it fits");
    while busy {
        let mut events = Vec::new();
        busy = engine.step(&mut events).expect("the step runs").busy;
        if events.iter().any(|event| matches!(event, EngineEvent::Token { .. })) {
            waits.token();
        }
    }
    waits.of_interest(n_tokens)
}

fn embedded() -> GgufFile {
    GgufFile::from_static(playhouse::basho::LABEL, playhouse::basho::GGUF).expect("the embedded file is sound")
}

fn engine_request(id: u64, max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: playhouse_actors::engine::Task::Generate,
        prompt: prompt(),
        emitted: Vec::new(),
        sampling: SamplingParams { seed: id, temperature: 1.0, ..SamplingParams::greedy() },
        max_tokens,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        deadline: None,
    }
}

fn plan_of(model: &Model) -> Plan {
    let wanted = Wanted {
        name: model.name.clone(),
        devices: model.devices.clone(),
        replicas: model.replicas,
        priority: 0,
        kv_budget_bytes: None,
        memory_limit: None,
        demand: sizing::demand(model, &describe(&embedded()).expect("the embedded file is sound")).expect("it fits"),
        current: Vec::new(),
    };
    let (total_bytes, free_bytes) = (8 << 30, 8 << 30);
    let cpu = Card { id: DeviceId::cpu(), name: "cpu".into(), pci: None, total_bytes, free_bytes };
    place(&[wanted], &[], &cpu).expect("it fits")
}

async fn start(isolation: Isolation) -> (HouseHandle, JoinHandle<()>) {
    let model = model(isolation);
    let plan = plan_of(&model);
    let args = HouseArgs {
        config: Config { models: vec![model], ..Config::default() },
        plan,
        factory: Arc::new(Workers::new(None).expecting(usize::MAX)),
        inventory: Box::new(SimInventory::new(Vec::new()).0),
        seed: 1,
    };
    HouseHandle::start(args).await.expect("the root starts")
}

async fn one_request(house: &HouseHandle, seed: u64, max_tokens: u32) -> Vec<f64> {
    let request = Generate {
        model: "basho".into(),
        task: playhouse_actors::engine::Task::Generate,
        prompt: prompt(),
        sampling: engine_request(seed, max_tokens).sampling,
        max_tokens,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        timeout: None,
    };
    let (mut waits, mut stream) = loop {
        let waits = Waits::start();
        match house.generate(request.clone()).await {
            Ok(stream) => break (waits, stream),
            Err(Refusal::Loading { .. }) => tokio::task::yield_now().await,
            Err(refusal) => panic!("{refusal}"),
        }
    };
    while let Some(event) = stream.next().await {
        match event {
            StreamEvent::Token(_) => waits.token(),
            StreamEvent::End(end) => assert!(matches!(end, Terminal::Completed { .. }), "{end:?}"),
        }
    }
    waits.of_interest(max_tokens)
}
