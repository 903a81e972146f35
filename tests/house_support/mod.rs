//! Houses with real worker processes for tests: the CPU engine on devices that are not there.

#![allow(dead_code)] // Each test binary uses its part.

use playhouse::client::{Collected, GenerateRequest};
use playhouse::host::{Parts, Playhouse};
use playhouse_actors::HouseEvent;
use playhouse_actors::engine::TokenLogprobs;
use playhouse_actors::messages::ReplicaId;
use playhouse_config::{Config, Overrides};
use rustix::process::{Pid, Signal, kill_process};
use std::future::Future;
use std::time::Duration;
use tokio::sync::broadcast;

/// Nothing in these tests takes longer on a machine that is not stuck.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Limits that let a test kill as often as it likes.
pub(crate) const PATIENT: &str = r#"
[supervision]
max_restarts = 100000
poison_deaths = 1000
backoff = { min = "1ms", max = "2ms" }
heartbeat = "100ms"
"#;

/// `n` simulated devices, `SIM-0` and on.
pub(crate) fn devices(n: usize) -> String {
    let device = |i| format!("[[simulate.device]]\nname = \"Card {i}\"\nuuid = \"SIM-{i}\"\nvram = \"1GiB\"\n");
    (0..n).map(device).collect()
}

/// The embedded model under a name, in processes.
pub(crate) fn basho(name: &str, replicas: usize) -> String {
    format!("[[model]]\nname = \"{name}\"\npath = \"embedded:basho\"\nreplicas = {replicas}\nisolation = \"process\"\n")
}

/// Reads a configuration that is right.
pub(crate) fn config(text: &str) -> Config {
    Config::from_text("test", text, &Overrides::none()).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Opens a house whose workers are processes of the `playhouse` binary.
pub(crate) async fn open(text: &str) -> Playhouse {
    let parts = Parts { worker_exe: Some(env!("CARGO_BIN_EXE_playhouse").into()), ..Parts::default() };
    Playhouse::open_with(config(text), parts).await.expect("the house opens")
}

/// Opens a house and waits until it is ready.
pub(crate) async fn open_ready(text: &str) -> Playhouse {
    let house = open(text).await;
    within(house.ready()).await.expect("the models load");
    house
}

/// Waits for something that must happen.
///
/// # Panics
/// If it does not happen in time.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it happens in time")
}

/// The next event of interest.
pub(crate) async fn event<T>(
    events: &mut broadcast::Receiver<HouseEvent>,
    mut wanted: impl FnMut(HouseEvent) -> Option<T>,
) -> T {
    within(async {
        loop {
            match events.recv().await {
                Ok(event) => {
                    if let Some(found) = wanted(event) {
                        return found;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => panic!("the house ended while a test waited for an event"),
            }
        }
    })
    .await
}

/// The processes of the workers that are ready.
pub(crate) async fn workers(house: &Playhouse) -> Vec<(ReplicaId, u32)> {
    let status = within(house.status()).await.expect("the house runs");
    status.replicas().filter_map(|replica| Some((replica.replica.clone(), replica.pid?))).collect()
}

/// Sends a signal to a worker. One that is gone already is as good as hit.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("process ids fit")).expect("process ids are not 0");
    let _ = kill_process(pid, signal);
}

/// What must not differ between a quiet run and one in which workers die.
pub(crate) type Exact = (String, Vec<u32>, Vec<TokenLogprobs>, String);

/// A request whose result is compared bit for bit.
pub(crate) fn request(seed: u64) -> GenerateRequest {
    GenerateRequest::text("winter river\n").seed(seed).max_tokens(64).logprobs(3)
}

/// The comparable part of a choice.
pub(crate) fn exact(choice: &Collected) -> Exact {
    let indices: Vec<u32> = choice.tokens.iter().map(|token| token.index).collect();
    let counted: Vec<u32> = (0..).take(indices.len()).collect();
    assert_eq!(indices, counted, "indices have no gap and no repeat");
    (
        choice.text.clone(),
        choice.tokens.iter().map(|token| token.id).collect(),
        choice.tokens.iter().filter_map(|token| token.logprobs.clone()).collect(),
        format!("{:?} {} {}", choice.end.outcome, choice.end.prompt_tokens, choice.end.completion_tokens),
    )
}

/// Runs a request to its end.
pub(crate) async fn run(house: &Playhouse, model: &str, request: GenerateRequest) -> Exact {
    let model = house.model(model).expect("the model is configured");
    let stream = within(model.generate(request)).await.expect("the request is accepted");
    exact(&within(stream.collect()).await.expect("the stream ends")[0])
}

/// What this process holds: resident KiB, descriptors, threads, children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) rss_kib: u64,
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
    pub(crate) children: usize,
}

impl Held {
    /// Now.
    pub(crate) fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux has /proc");
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it says VmRSS");
        let count = |folder: &str| std::fs::read_dir(folder).expect("Linux has /proc").count();
        let children = std::fs::read_dir("/proc/self/task").expect("Linux has /proc").map(|task| {
            let path = task.expect("readable").path().join("children");
            std::fs::read_to_string(path).map_or(0, |text| text.split_whitespace().count())
        });
        Self {
            rss_kib: rss.trim().trim_end_matches(" kB").parse().expect("a number"),
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            children: children.sum(),
        }
    }
}

/// SplitMix64: the order of faults, from a seed.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }
}
