//! A house on real GPUs: a replica and a worker process on each, workers that are killed and kernels that trap under streams.
//! Needs a GPU; what needs a second one says so. Where there is none, the tests say that they had nothing to look at.
//!
//! `PLAYHOUSE_GPU_MODEL` names a GGUF file to use instead of the embedded model.

#![allow(clippy::print_stderr)] // Figures and skips are said where a person sees them.

mod house_support;

use house_support::*;
use playhouse::client::Event;
use playhouse::host::nvml::NvmlInventory;
use playhouse::host::{Parts, Playhouse};
use playhouse::worker::Workers;
use playhouse_actors::HouseEvent;
use playhouse_actors::inventory::{Device, Inventory};
use playhouse_actors::messages::{Phase, ReplicaId};
use playhouse_actors::policy::outcome::WorkerEnd;
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_playhouse");
/// Faults of each kind.
const FAULTS: u32 = 20;
const STREAMS: u64 = 8;

fn gpus() -> Vec<Device> {
    let devices = NvmlInventory::new().devices().expect("NVML answers, or is not there");
    if devices.is_empty() {
        eprintln!("there is no GPU here: this test looked at nothing");
    }
    devices
}

/// One replica on each of these GPUs.
fn text(devices: &[Device]) -> String {
    let path = std::env::var("PLAYHOUSE_GPU_MODEL").unwrap_or_else(|_| "embedded:basho".into());
    let uuids: Vec<String> = devices.iter().map(|device| format!("\"{}\"", device.uuid)).collect();
    let n = devices.len();
    format!(
        "[[model]]\nname = \"m\"\npath = \"{path}\"\nreplicas = {n}\ndevices = [{}]\nmax_sequences = 16\n{PATIENT}",
        uuids.join(", ")
    )
}

async fn open_on(devices: &[Device], faults: &str) -> Playhouse {
    let workers = Workers::new(Some(BINARY.into())).env("PLAYHOUSE_FAULTS", faults);
    let parts = Parts { factory: Some(Arc::new(workers)), ..Parts::default() };
    let house = Playhouse::open_with(config(&text(devices)), parts).await.expect("the house opens");
    let mut events = house.events();
    within(house.ready()).await.expect("the models load");
    // That is one replica of each model. Here all are to be there: one that still loads has not taken its memory.
    let n_ready = || async { workers_ready(&house).await };
    while n_ready().await < devices.len() {
        event(&mut events, |event| matches!(event, HouseEvent::WorkerReady { .. }).then_some(())).await;
    }
    house
}

async fn workers_ready(house: &Playhouse) -> usize {
    let status = within(house.status()).await.expect("running");
    status.replicas().filter(|replica| replica.phase == Phase::Ready).count()
}

/// What each seed gives while nothing happens: on one GPU, whichever it is.
async fn quiet(devices: &[Device]) -> BTreeMap<u64, Exact> {
    let mut results: BTreeMap<u64, Exact> = BTreeMap::new();
    for device in devices {
        let house = open_on(std::slice::from_ref(device), "").await;
        for seed in 0..STREAMS {
            let found = run(&house, "m", request(seed)).await;
            let first = results.entry(seed).or_insert_with(|| found.clone());
            assert_eq!(*first, found, "seed {seed} is the same on every GPU");
        }
        within(house.stop()).await;
    }
    results
}

/// Keeps streams running until told to stop, and compares each with what it gave alone. Returns how many there were.
fn keep_streaming(
    house: &Playhouse,
    quiet: &BTreeMap<u64, Exact>,
    over: &Arc<AtomicBool>,
) -> Vec<tokio::task::JoinHandle<u64>> {
    let one = |seed: u64| {
        let (house, expected, over) = (house.clone(), quiet[&seed].clone(), over.clone());
        tokio::spawn(async move {
            let mut n = 0;
            while !over.load(Ordering::Relaxed) {
                assert_eq!(run(&house, "m", request(seed)).await, expected, "seed {seed}, stream {n}");
                n += 1;
            }
            n
        })
    };
    (0..STREAMS).map(one).collect()
}

/// Waits until the replica has a new worker that serves; returns how long that took from `since`.
async fn back(
    events: &mut tokio::sync::broadcast::Receiver<HouseEvent>,
    replica: &ReplicaId,
    since: Instant,
) -> Duration {
    event(events, |event| match event {
        HouseEvent::WorkerReady { replica: ready, .. } if ready == *replica => Some(since.elapsed()),
        _ => None,
    })
    .await
}

/// What a worker takes is what the plan says, within two percent, as NVML sees it.
async fn memory_is_as_planned(house: &Playhouse, devices: &[Device]) {
    let plan = house.plan();
    let status = within(house.status()).await.expect("running");
    for (device, placement) in plan.placements() {
        let pid = status
            .replicas()
            .find(|replica| replica.replica.model == placement.model && replica.replica.index == placement.replica)
            .and_then(|replica| replica.pid)
            .expect("a worker runs");
        let card = within(house.devices()).await.into_iter().find(|card| card.uuid == device.as_str()).expect("there");
        let used = card.processes.iter().find(|process| process.pid == pid).and_then(|process| process.used_bytes);
        // In a container the driver may not tell processes apart: then nobody else uses the card, and all of it is the worker's.
        let alone =
            card.used_bytes - devices.iter().find(|before| before.uuid == card.uuid).map_or(0, |d| d.used_bytes);
        let used = used.unwrap_or(alone);
        eprintln!("{}/{}: {used} bytes used, {} planned", placement.model, placement.replica, placement.total_bytes());
        let apart = used.abs_diff(placement.total_bytes()) as f64 / placement.total_bytes() as f64;
        let small = used.abs_diff(placement.total_bytes()) < 160 << 20;
        assert!(apart < 0.02 || small, "{used} bytes used, {} planned", placement.total_bytes());
    }
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    eprintln!("{what}: {} times, a new worker served after {median:?} at the median, {worst:?} at worst", times.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_workers_lose_nothing() {
    let devices = gpus();
    if devices.is_empty() {
        return;
    }
    let quiet = quiet(&devices).await;
    let house = open_on(&devices, "").await;
    memory_is_as_planned(&house, &devices).await;
    let over = Arc::new(AtomicBool::new(false));
    let streams = keep_streaming(&house, &quiet, &over);
    let mut events = house.events();
    let victim = ReplicaId { model: "m".into(), index: 0 };
    let mut times = Vec::new();
    for _ in 0..FAULTS {
        let pid = workers(&house).await.into_iter().find(|(replica, _)| *replica == victim).expect("it runs").1;
        let since = Instant::now();
        signal(pid, Signal::KILL);
        let end = event(&mut events, |event| match event {
            HouseEvent::WorkerEnded { replica, end, .. } if replica == victim => Some(end),
            _ => None,
        })
        .await;
        assert_eq!(end, WorkerEnd::Signalled(9));
        times.push(back(&mut events, &victim, since).await);
    }
    finish(&house, streams, &over, &victim, devices.len()).await;
    memory_is_as_planned(&house, &devices).await;
    report("SIGKILL", times);
    within(house.stop()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trapped_kernels_lose_nothing() {
    let devices = gpus();
    if devices.is_empty() {
        return;
    }
    let quiet = quiet(&devices).await;
    // Every worker of the first replica traps in its thirtieth step.
    let house = open_on(&devices, "trap-at-step=30@m/0").await;
    let over = Arc::new(AtomicBool::new(false));
    let mut events = house.events();
    let streams = keep_streaming(&house, &quiet, &over);
    let victim = ReplicaId { model: "m".into(), index: 0 };
    let mut times = Vec::new();
    for _ in 0..FAULTS {
        let end = event(&mut events, |event| match event {
            HouseEvent::WorkerEnded { replica, end, .. } if replica == victim => Some(end),
            _ => None,
        })
        .await;
        assert!(matches!(&end, WorkerEnd::DeviceLost(_)), "{end}");
        times.push(back(&mut events, &victim, Instant::now()).await);
    }
    finish(&house, streams, &over, &victim, devices.len()).await;
    report("trap", times);
    within(house.stop()).await;
}

/// Ends the streams: none lost, repeated or changed a token, and the workers of other GPUs noticed nothing.
async fn finish(
    house: &Playhouse,
    streams: Vec<tokio::task::JoinHandle<u64>>,
    over: &AtomicBool,
    victim: &ReplicaId,
    n_devices: usize,
) {
    over.store(true, Ordering::Relaxed);
    let mut n = 0;
    for stream in streams {
        n += within(stream).await.expect("no stream lost, repeated or changed a token");
    }
    let status = within(house.status()).await.expect("running");
    for replica in status.replicas().filter(|replica| replica.replica != *victim) {
        assert_eq!(replica.incarnation, 1, "the worker of {} never noticed", replica.device);
    }
    eprintln!("{n} streams on {n_devices} GPUs, all as alone");
}

#[test]
fn nvml_and_cuda_agree_whatever_is_visible() {
    let devices = gpus();
    if devices.is_empty() {
        return;
    }
    let uuids: Vec<&str> = devices.iter().map(|device| device.uuid.as_str()).collect();
    let shuffled = (0..devices.len()).rev().map(|index| index.to_string()).collect::<Vec<_>>().join(",");
    for visible in [shuffled.as_str(), "0", uuids[uuids.len() - 1]] {
        let folder = tempfile::tempdir().expect("a folder");
        // A worker refuses a GPU that CUDA does not show under the UUID that NVML gave the host.
        let mut host = Command::new(BINARY)
            .args(["serve", "--address", "127.0.0.1:0", "--admin-socket"])
            .arg(folder.path().join("admin.sock"))
            .env("CUDA_VISIBLE_DEVICES", visible)
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("the host starts");
        let deadline = Instant::now() + DEADLINE;
        let wanted = if visible == shuffled { devices.len() } else { 1 };
        let ready: Vec<(String, String)> = loop {
            let out = Command::new(BINARY)
                .args(["ps", "--json", "--socket"])
                .arg(folder.path().join("admin.sock"))
                .output()
                .expect("ps runs");
            // The document, not its text: the progress of a load has a phase that is called ready, too.
            let replicas = replicas_of(&out.stdout);
            let ready = replicas.iter().filter(|(_, phase)| phase == "ready").count();
            if (ready == wanted && replicas.len() == wanted) || Instant::now() > deadline {
                break replicas;
            }
        };
        host.kill().expect("it runs");
        host.wait().expect("it ends");
        let found: BTreeSet<&str> = ready.iter().map(|(device, _)| device.as_str()).collect();
        let expected: BTreeSet<&str> = match visible {
            "0" => BTreeSet::from([uuids[0]]),
            one if uuids.contains(&one) => BTreeSet::from([one]),
            _ => uuids.iter().copied().collect(),
        };
        assert_eq!((ready.len(), found), (wanted, expected), "CUDA_VISIBLE_DEVICES={visible}: {ready:?}");
    }
}

/// The device and phase of each replica that `ps --json` shows; none while there is no host to ask.
fn replicas_of(document: &[u8]) -> Vec<(String, String)> {
    let Ok(ps) = serde_json::from_slice::<serde_json::Value>(document) else { return Vec::new() };
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let devices = ps["devices"].as_array().into_iter().flatten();
    let replicas = devices.flat_map(|device| device["replicas"].as_array().into_iter().flatten());
    replicas.map(|replica| (text(&replica["device"]), text(&replica["phase"]))).collect()
}

#[test]
fn a_load_that_is_ready_is_not_a_replica_that_is() {
    let document = br#"{"devices": [{"replicas": [
        {"device": "GPU-1", "phase": "ready", "progress": {"phase": "ready", "bytes_done": 1}}]}]}"#;
    assert_eq!(replicas_of(document), [("GPU-1".to_owned(), "ready".to_owned())]);
    assert!(replicas_of(b"no host answers").is_empty());
}

/// A stream's first token after the start of a worker: the time from nothing to text.
#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_worker_answers() {
    let devices = gpus();
    let Some(device) = devices.first() else { return };
    let since = Instant::now();
    let house = open_on(std::slice::from_ref(device), "").await;
    let model = house.model("m").expect("configured");
    let mut stream = within(model.generate(request(1))).await.expect("accepted");
    let first = within(stream.next()).await.expect("a token");
    assert!(matches!(first, Event::Token(_)), "{first:?}");
    eprintln!("from opening the house to the first token: {:?}", since.elapsed());
    drop(stream);
    within(house.stop()).await;
}
