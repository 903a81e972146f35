//! Whether streams notice that the worker of another device dies: the time between two tokens of streams on one device, in
//! quiet phases and in phases in which the other device's worker is killed again and again, taking turns.
//!
//! ```text
//! cargo bench --bench gaps --features fault-injection
//! PLAYHOUSE_GPU_MODEL=model.gguf cargo bench --bench gaps       on the first two GPUs of a box
//! ```
//!
//! Two models, each on a device of its own, so that nothing moves from one to the other: what is seen is the disturbance
//! alone. Without two GPUs the devices are simulated, and each step is stretched to [`STEP_MS`], as a device's would be that
//! computes by itself: on the CPU two busy engines would compete for the cores, and a restart would take its share.
//! With `--check` the program fails if the 99th percentile under kills is more than [`RATIO_MAX`] times the quiet one.

use playhouse::host::nvml::NvmlInventory;
use playhouse::host::{Parts, Playhouse};
use playhouse::worker::{Workers, run_if_worker};
use playhouse_actors::engine::{SamplingParams, Task};
use playhouse_actors::inventory::Inventory;
use playhouse_actors::{Generate, HouseEvent, StreamEvent};
use playhouse_config::{Config, Overrides};
use rustix::process::{Pid, Signal, kill_process};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Each kind of phase so often.
const ROUNDS: u32 = 5;
/// A phase lasts so long.
const PHASE: Duration = Duration::from_secs(5);
/// Tokens of a request; then the stream begins another.
const N_TOKENS: u32 = 120;
/// The victim serves so many tokens between its restart and the next kill.
const TOKENS_BETWEEN_KILLS: u64 = 20;
/// How long a step takes on a simulated device.
const STEP_MS: u64 = 20;
/// More is a disturbance.
const RATIO_MAX: f64 = 1.2;

const QUIET: u32 = 0;
const KILLS: u32 = 1;
const OVER: u32 = 2;

fn main() -> ExitCode {
    run_if_worker();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let ratio = runtime.block_on(measure());
    if std::env::args().any(|argument| argument == "--check") && ratio > RATIO_MAX {
        println!("the ratio is more than {RATIO_MAX}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Where it runs.
struct Stage {
    text: String,
    faults: String,
    streams: u32,
    what: String,
}

impl Stage {
    fn of_this_box() -> Self {
        let gpus = NvmlInventory::new().devices().unwrap_or_default();
        let path = std::env::var("PLAYHOUSE_GPU_MODEL").unwrap_or_else(|_| "embedded:basho".into());
        let model = |name: &str, path: &str, device: &str| {
            format!("[[model]]\nname = \"{name}\"\npath = \"{path}\"\ndevices = [\"{device}\"]\nmax_sequences = 16\n")
        };
        // Limits that let it kill as often as it likes.
        let limits =
            "[supervision]\nmax_restarts = 100000\npoison_deaths = 1000\nbackoff = { min = \"1ms\", max = \"2ms\" }\n";
        if let [victim, other, ..] = gpus.as_slice() {
            let text =
                format!("{limits}{}{}", model("victim", &path, &victim.uuid), model("other", &path, &other.uuid));
            let what = format!("{path} on {} and {}", victim.name, other.name);
            return Self { text, faults: String::new(), streams: 8, what };
        }
        let device = |uuid: &str| format!("[[simulate.device]]\nname = \"Card\"\nuuid = \"{uuid}\"\nvram = \"1GiB\"\n");
        let (path, cards) = ("embedded:basho", device("SIM-0") + &device("SIM-1"));
        let models = model("victim", path, "SIM-0") + &model("other", path, "SIM-1");
        let stretched = if cfg!(any(debug_assertions, feature = "fault-injection")) {
            format!("steps of {STEP_MS} ms")
        } else {
            "steps as fast as the CPU: build with --features fault-injection to stretch them".to_owned()
        };
        Self {
            text: format!("{limits}{models}{cards}"),
            faults: format!("slow-step={STEP_MS}"),
            streams: 1,
            what: format!("the embedded model on two simulated devices, {stretched}"),
        }
    }
}

/// What all tasks see.
#[derive(Default)]
struct Shared {
    phase: AtomicU32,
    /// Tokens of the victim's streams.
    served: AtomicU64,
    more: Notify,
}

async fn measure() -> f64 {
    let stage = Stage::of_this_box();
    println!(
        "{}: {} streams on each; {ROUNDS} quiet phases and {ROUNDS} with kills, {PHASE:?} each",
        stage.what, stage.streams
    );
    let config = Config::from_text("gaps", &stage.text, &Overrides::none()).unwrap_or_else(|error| panic!("{error}"));
    let factory = Arc::new(Workers::new(None).expecting(usize::MAX).env("PLAYHOUSE_FAULTS", &stage.faults));
    let parts = Parts { factory: Some(factory), ..Parts::default() };
    let house = Playhouse::open_with(config, parts).await.expect("the house opens");
    house.ready().await.expect("the models load");
    let shared = Arc::new(Shared::default());
    let start = |model: &'static str, seeds: std::ops::Range<u32>| -> Vec<_> {
        seeds.map(|seed| tokio::spawn(keep_streaming(house.clone(), model, seed.into(), shared.clone()))).collect()
    };
    let victims = start("victim", 0..stage.streams);
    let others = start("other", stage.streams..2 * stage.streams);
    let mut n_kills = 0;
    for _ in 0..ROUNDS {
        shared.phase.store(QUIET, Ordering::Relaxed);
        tokio::time::sleep(PHASE).await;
        shared.phase.store(KILLS, Ordering::Relaxed);
        n_kills += kill_for(&house, &shared, PHASE).await;
    }
    shared.phase.store(OVER, Ordering::Relaxed);
    let mut gaps = [Vec::new(), Vec::new()];
    for stream in others {
        let [quiet, kills] = stream.await.expect("no stream fails");
        gaps[0].extend(quiet);
        gaps[1].extend(kills);
    }
    for stream in victims {
        stream.await.expect("no stream fails");
    }
    let status = house.status().await.expect("the house runs");
    let noticed = status.replicas().filter(|replica| replica.replica.model == "other").any(|it| it.incarnation != 1);
    assert!(!noticed, "the other device's worker was never restarted");
    house.stop().await;
    report(n_kills, gaps)
}

/// Kills the victim's worker as soon as each has served a little, for so long. How many.
async fn kill_for(house: &Playhouse, shared: &Shared, time: Duration) -> u32 {
    let (until, mut n_kills) = (Instant::now() + time, 0);
    let mut events = house.events();
    while Instant::now() < until {
        let from = shared.served.load(Ordering::Relaxed);
        loop {
            let more = shared.more.notified();
            if shared.served.load(Ordering::Relaxed) >= from + TOKENS_BETWEEN_KILLS {
                break;
            }
            more.await;
        }
        let status = house.status().await.expect("the house runs");
        let victim = status.replicas().find(|replica| replica.replica.model == "victim").and_then(|it| it.pid);
        let Some(pid) = victim.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) else { continue };
        kill_process(pid, Signal::KILL).expect("it runs");
        n_kills += 1;
        while !matches!(events.recv().await, Ok(HouseEvent::WorkerReady { .. })) {}
    }
    n_kills
}

/// One stream after the other. The gaps between tokens, in seconds, by phase; a gap belongs to the phase in which it ends.
async fn keep_streaming(house: Playhouse, model: &'static str, seed: u64, shared: Arc<Shared>) -> [Vec<f64>; 2] {
    let mut gaps = [Vec::new(), Vec::new()];
    while shared.phase.load(Ordering::Relaxed) != OVER {
        let mut stream = house.tree().generate(request(model, seed)).await.expect("accepted");
        let mut last: Option<Instant> = None;
        while let Some(event) = stream.next().await {
            let StreamEvent::Token(_) = event else { continue };
            let now = Instant::now();
            if model == "victim" {
                shared.served.fetch_add(1, Ordering::Relaxed);
                shared.more.notify_waiters();
            }
            let phase = shared.phase.load(Ordering::Relaxed) as usize;
            if let (Some(last), Some(gaps)) = (last, gaps.get_mut(phase)) {
                gaps.push((now - last).as_secs_f64());
            }
            last = Some(now);
        }
    }
    gaps
}

fn request(model: &str, seed: u64) -> Generate {
    Generate {
        model: model.into(),
        task: Task::Generate,
        prompt: (0..16).map(|index| 300 + 17 * index).collect(),
        sampling: SamplingParams { seed, temperature: 1.0, ..SamplingParams::greedy() },
        max_tokens: N_TOKENS,
        min_tokens: 0,
        // None: every stream has all its tokens.
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        timeout: None,
    }
}

fn report(n_kills: u32, gaps: [Vec<f64>; 2]) -> f64 {
    let at = |gaps: &[f64], share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize] * 1e3;
    let sorted = gaps.map(|mut gaps| {
        gaps.sort_by(f64::total_cmp);
        gaps
    });
    for (name, gaps) in ["quiet", "kills"].iter().zip(&sorted) {
        let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| at(gaps, share));
        println!("  {name}: {} gaps, median {p50:.2} ms, p90 {p90:.2}, p99 {p99:.2}, worst {max:.2}", gaps.len());
    }
    let ratio = at(&sorted[1], 0.99) / at(&sorted[0], 0.99);
    println!("  {n_kills} kills of the other device's worker; p99 with kills / p99 quiet: {ratio:.3}");
    ratio
}
