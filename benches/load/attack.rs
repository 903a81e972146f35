//! The bad clients, in a process of their own. It says `ready` once they are there, goes on until its standard input is
//! closed, and says what it saw.

use super::client::{Ask, connect, status_of, wait};
use crate::http_support::frames;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What bad clients do.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Send their headers a byte at a time, and come again when they are cut.
    SlowLoris,
    /// Ask for streams and read nothing.
    StalledReaders,
    /// Resets, floods and header bombs over HTTP/2.
    H2,
    /// Ask for what nobody may have.
    Absurd,
}

impl Kind {
    pub(crate) fn name(self) -> String {
        use clap::ValueEnum as _;
        self.to_possible_value().expect("no kind is hidden").get_name().to_owned()
    }

    /// How many there are to be at a time, or a second where each is cut at once.
    pub(crate) fn connections(self) -> u32 {
        match self {
            Self::SlowLoris => 10_000,
            Self::StalledReaders => 1000,
            Self::H2 => 50,
            Self::Absurd => 200,
        }
    }

    /// Places of the house, where the default of a configuration is not what is meant. Whoever has a stream that runs keeps
    /// its place until it is cut; how many an address or a key may have is another bound.
    pub(crate) fn places(self) -> Option<u32> {
        matches!(self, Self::StalledReaders).then_some(4096)
    }

    /// From its beginning until it does what it is for: streams stall when the buffers of both kernels are full.
    pub(crate) fn settles_in(self) -> Duration {
        Duration::from_secs(if matches!(self, Self::StalledReaders) { 10 } else { 0 })
    }

    /// Microseconds of a step of the house's engine. Streams that nobody reads are made by an engine like any other; the
    /// others do not come to one, and it shall hide nothing of what they cost.
    pub(crate) fn step_us(self) -> u64 {
        match self {
            Self::StalledReaders => 10_000,
            Self::SlowLoris | Self::H2 | Self::Absurd => 0,
        }
    }
}

#[derive(clap::Args)]
pub(crate) struct Args {
    kind: Kind,
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    connections: u32,
    #[arg(long)]
    cpu: Option<usize>,
}

/// Between two bytes of one slow connection.
const DRIP: Duration = Duration::from_secs(2);
/// New connections a second: a thousand of those that a house cuts after ten seconds make ten thousand.
const ARRIVALS: f64 = 1000.0;
const TICK: Duration = Duration::from_millis(2);

/// What was seen of the house.
#[derive(Default)]
struct Seen {
    opened: u64,
    failed: u64,
    /// Connections that the house cut, by the status that it gave.
    cut: BTreeMap<u16, u64>,
}

pub(crate) async fn run(args: Args) {
    if let Some(cpu) = args.cpu {
        let mut cpus = rustix::thread::CpuSet::new();
        cpus.set(cpu);
        rustix::thread::sched_setaffinity(None, &cpus).expect("the processor is there");
    }
    let stop = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    let mut seen = Seen::default();
    let (n, to) = (args.connections as usize, args.to);
    let open = match args.kind {
        Kind::SlowLoris => {
            let mut crowd = Crowd { to, slots: (0..n).map(|_| None).collect(), next: 0, owed: 0.0, seen: &mut seen };
            crowd.arrive().await;
            println!("ready");
            tokio::select! { () = crowd.drip() => {}, _ = stop => {} }
            crowd.slots.iter().flatten().count()
        }
        Kind::StalledReaders => {
            let stalled = stall(to, n, &mut seen).await;
            println!("ready");
            let _ = stop.await;
            stalled.len()
        }
        Kind::H2 => {
            println!("ready");
            tokio::select! { () = flood(to, n, &mut seen) => {}, _ = stop => {} }
            0
        }
        Kind::Absurd => {
            println!("ready");
            tokio::select! { () = absurd(to, n, &mut seen) => {}, _ = stop => {} }
            0
        }
    };
    println!(
        "{}",
        json!({ "open_at_the_end": open, "opened": seen.opened, "unconnected": seen.failed, "cut_by_status": seen.cut })
    );
    std::process::exit(0);
}

/// Slow connections.
struct Crowd<'a> {
    to: SocketAddr,
    slots: Vec<Option<TcpStream>>,
    next: usize,
    /// New connections that are due.
    owed: f64,
    seen: &'a mut Seen,
}

impl Crowd<'_> {
    /// Fills every place once.
    async fn arrive(&mut self) {
        let start = Instant::now();
        for slot in 0..self.slots.len() {
            let due = Duration::from_secs_f64(slot as f64 / ARRIVALS);
            if let Some(early) = due.checked_sub(start.elapsed()) {
                wait(early).await;
            }
            self.open(slot).await;
        }
    }

    /// Keeps them all waiting, and takes the place of those that were cut.
    async fn drip(&mut self) {
        let mut ticks = tokio::time::interval(TICK);
        let per_tick = (self.slots.len() as f64 * TICK.as_secs_f64() / DRIP.as_secs_f64()).ceil() as usize;
        loop {
            ticks.tick().await;
            self.owed = (self.owed + ARRIVALS * TICK.as_secs_f64()).min(100.0);
            for _ in 0..per_tick {
                let slot = self.next;
                self.next = (slot + 1) % self.slots.len();
                self.visit(slot).await;
            }
        }
    }

    async fn visit(&mut self, slot: usize) {
        if let Some(socket) = &self.slots[slot] {
            let mut answer = [0; 64];
            match socket.try_read(&mut answer) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    let _ = socket.try_write(b"b");
                    return;
                }
                Ok(n) => *self.seen.cut.entry(status_of(&answer[..n]).unwrap_or(0)).or_default() += 1,
                Err(_) => *self.seen.cut.entry(0).or_default() += 1,
            }
            self.slots[slot] = None;
        }
        if self.owed >= 1.0 {
            self.owed -= 1.0;
            self.open(slot).await;
        }
    }

    async fn open(&mut self, slot: usize) {
        match connect(self.to).await {
            Ok(socket) => {
                let _ = socket.try_write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-a: ");
                self.slots[slot] = Some(socket);
                self.seen.opened += 1;
            }
            Err(_) => self.seen.failed += 1,
        }
    }
}

/// Streams without an end, and no reader.
async fn stall(to: SocketAddr, n: usize, seen: &mut Seen) -> Vec<TcpStream> {
    let prompt = json!([2]);
    let ask = Ask { model: "basho", prompt: &prompt, max_tokens: 1_000_000, stream: true }.bytes(to);
    let mut open = Vec::new();
    for _ in 0..n {
        let Ok(mut socket) = connect(to).await else {
            seen.failed += 1;
            continue;
        };
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4096);
        seen.opened += 1;
        if socket.write_all(&ask).await.is_ok() {
            open.push(socket);
        }
    }
    open
}

/// Each kind of flood in turn, on `n` new connections a second.
async fn flood(to: SocketAddr, n: usize, seen: &mut Seen) {
    let floods = [
        frames::rapid_reset(1, 500),
        frames::settings_flood(5000),
        frames::ping_flood(5000),
        frames::continuation_flood(200),
        (0..20).flat_map(|at| frames::header_bomb(2 * at + 1)).collect(),
    ];
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / n as f64));
    let (cut, mut cuts) = tokio::sync::mpsc::unbounded_channel();
    for flood in floods.iter().cycle() {
        ticks.tick().await;
        while let Ok(status) = cuts.try_recv() {
            *seen.cut.entry(status).or_default() += 1;
        }
        let Ok(mut socket) = connect(to).await else {
            seen.failed += 1;
            continue;
        };
        seen.opened += 1;
        let (flood, cut) = (flood.clone(), cut.clone());
        tokio::spawn(async move {
            let attack = async {
                socket.write_all(&frames::hello()).await?;
                socket.write_all(&flood).await?;
                let mut sink = vec![0; 16 << 10];
                while socket.read(&mut sink).await? > 0 {}
                Ok::<_, std::io::Error>(())
            };
            // Whoever is not cut in a second goes.
            if tokio::time::timeout(Duration::from_secs(1), attack).await.is_ok() {
                let _ = cut.send(0);
            }
        });
    }
}

/// Requests whose parameters, names or sizes are beyond every bound.
fn absurd_bodies() -> Vec<String> {
    let with = |name: &str, value: serde_json::Value| {
        let mut body = json!({ "model": "basho", "prompt": "a", "max_tokens": 1 });
        body[name] = value;
        body.to_string()
    };
    let bias: serde_json::Map<String, serde_json::Value> = (0..50_000).map(|id| (id.to_string(), json!(1))).collect();
    let deep = 50_000;
    vec![
        with("n", json!(1_000_000_000)),
        with("max_tokens", json!(-1)),
        with("temperature", json!(1e300)),
        with("top_p", json!("all of it")),
        with("logprobs", json!(1_000_000)),
        with("stop", json!(vec!["a"; 50_000])),
        with("logit_bias", json!(bias)),
        with("seed", json!({ "a": 1 })),
        with("prompt", json!(vec![u64::MAX; 1000])),
        with("model", json!("../../../etc/passwd")),
        with("prompt", json!("a".repeat(3 << 20))),
        with(
            "response_format",
            json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": { "enum": vec!["a"; 50_000] } } }),
        ),
        format!("{{\"model\": \"basho\", \"prompt\": {}{}}}", "[".repeat(deep), "]".repeat(deep)),
        "{".to_owned(),
    ]
}

/// Each absurdity in turn, `n` a second.
async fn absurd(to: SocketAddr, n: usize, seen: &mut Seen) {
    let head = |body: &String| {
        let length = body.len();
        format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {to}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    let requests: Vec<String> = absurd_bodies().iter().map(head).collect();
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / n as f64));
    let (answered, mut answers) = tokio::sync::mpsc::unbounded_channel();
    for request in requests.iter().cycle() {
        ticks.tick().await;
        while let Ok(status) = answers.try_recv() {
            *seen.cut.entry(status).or_default() += 1;
        }
        let Ok(mut socket) = connect(to).await else {
            seen.failed += 1;
            continue;
        };
        seen.opened += 1;
        let (request, answered) = (request.clone(), answered.clone());
        tokio::spawn(async move {
            // What is too large is refused before it was sent.
            let _ = socket.write_all(request.as_bytes()).await;
            let mut answer = [0; 64];
            let n = socket.read(&mut answer).await.unwrap_or(0);
            let _ = answered.send(status_of(&answer[..n]).unwrap_or(0));
        });
    }
}
