//! Load on the HTTP front: what the front itself can carry, with an engine that costs nothing, and what a running house
//! carries. Prints one JSON document.
//!
//! ```text
//! cargo bench --bench load                        all of the below, shortened
//! cargo bench --bench load -- throughput [SECONDS]        tokens a second of SSE over 256 streams
//! cargo bench --bench load -- delay [SECONDS]             what the front adds to a token at 10,000 tokens a second
//! cargo bench --bench load -- overload [SECONDS]          20 times as many requests as are admitted
//! cargo bench --bench load -- loris [CONNECTIONS]         connections that never finish their headers
//! cargo bench --bench load -- serve PORT                  the embedded model behind the front, for other generators
//! cargo bench --bench load -- URL MODEL RATE SECONDS      open-loop arrivals at a house that runs
//! ```
//!
//! The generator runs in the same process, on the same cores. Arrivals are open-loop: they do not wait for answers, so a
//! server that falls behind is seen to.

#[path = "../tests/http_support/mod.rs"]
mod http_support;

use http_support::engines::{Counts, Emitted, Pace, Speaker};
use http_support::{Setup, TestHouse};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Streams of the two speed figures.
const STREAMS: usize = 256;
/// A token of the embedded model that is plain text.
const TOKEN: u32 = 300;

fn main() {
    // `cargo bench` adds a flag of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    raise_descriptors();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let number = |at: usize, default: u64| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(default);
    let report = runtime.block_on(async {
        match words.first().copied() {
            None => json!({
                "throughput": throughput(5).await,
                "delay": delay(5).await,
                "overload": overload(10).await,
                "loris": loris(2000).await,
            }),
            Some("throughput") => throughput(number(1, 10)).await,
            Some("delay") => delay(number(1, 10)).await,
            Some("overload") => overload(number(1, 60)).await,
            Some("loris") => loris(number(1, 10_000)).await,
            Some("serve") => serve(number(1, 7070)).await,
            Some(url) => live(url, words.get(1).copied().unwrap_or("basho"), number(2, 4), number(3, 10)).await,
        }
    });
    println!("{report:#}");
    // Engines that nobody asked to end would be waited for.
    std::process::exit(0);
}

fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What is not allowed shows in the result.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// A house whose engine costs nothing.
async fn null_house(pace: Pace, counts: Counts, emitted: Option<Emitted>, queued: u32) -> TestHouse {
    let mut setup = Setup::default().engine(move || {
        let speaker = Speaker::new(vec![TOKEN], false, pace.clone(), counts.clone());
        Box::new(match &emitted {
            Some(emitted) => speaker.telling(emitted.clone()),
            None => speaker,
        })
    });
    setup.config.host.limits.queued_requests = queued;
    setup.config.host.limits.stream_events = 256;
    setup.settings.limits.connections = 2048;
    setup.start().await
}

/// The real engine on the embedded model, until the process is ended.
async fn serve(port: u64) -> Value {
    let port = u16::try_from(port).expect("a port");
    let house = Setup { listen: SocketAddr::from(([127, 0, 0, 1], port)), ..Setup::default() }.start().await;
    println!("http://{}", house.address);
    match house.served.await {
        Ok(Ok(())) => Value::Null,
        ended => panic!("{ended:?}"),
    }
}

/// A stream of tokens, read as bytes: the cost of a client that parses is not the front's.
struct Reader {
    socket: TcpStream,
    buffer: Vec<u8>,
    last: u8,
}

impl Reader {
    async fn open(
        address: SocketAddr,
        model: &str,
        prompt: &Value,
        max_tokens: u64,
        stream: bool,
    ) -> std::io::Result<Self> {
        let body =
            json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": stream, "ignore_eos": true})
                .to_string();
        let mut socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(format!("{head}{body}").as_bytes()).await?;
        Ok(Self { socket, buffer: vec![0; 32 << 10], last: 0 })
    }

    /// How many events ended in the next piece; `None` at the end.
    async fn events(&mut self) -> std::io::Result<Option<u64>> {
        let n = self.socket.read(&mut self.buffer).await?;
        if n == 0 {
            return Ok(None);
        }
        let mut events = 0;
        for byte in &self.buffer[..n] {
            events += u64::from(*byte == b'\n' && self.last == b'\n');
            self.last = *byte;
        }
        Ok(Some(events))
    }

    /// Reads the status line and goes on to the end.
    async fn status(mut self) -> std::io::Result<u16> {
        let n = self.socket.read(&mut self.buffer).await?;
        let line = String::from_utf8_lossy(&self.buffer[..n.min(16)]).into_owned();
        while self.socket.read(&mut self.buffer).await? > 0 {}
        Ok(line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0))
    }
}

/// Tokens a second over all streams, as fast as it goes.
async fn throughput(seconds: u64) -> Value {
    let house = null_house(Pace::Free, Counts::default(), None, 1024).await;
    let total = Arc::new(AtomicU64::new(0));
    for stream in 0..STREAMS {
        let mut reader = Reader::open(house.address, "basho", &json!([stream]), u64::from(u32::MAX) / 2, true)
            .await
            .expect("connected");
        let total = total.clone();
        tokio::spawn(async move {
            while let Ok(Some(events)) = reader.events().await {
                total.fetch_add(events, Ordering::Relaxed);
            }
        });
    }
    // The first second is for everybody to arrive.
    wait(Duration::from_secs(1)).await;
    let (start, before) = (Instant::now(), total.load(Ordering::Relaxed));
    wait(Duration::from_secs(seconds)).await;
    let tokens = total.load(Ordering::Relaxed) - before;
    let per_second = tokens as f64 / start.elapsed().as_secs_f64();
    json!({ "streams": STREAMS, "seconds": seconds, "tokens_per_second": per_second.round() })
}

/// What lies between an engine's token and the client's, at 10,000 tokens a second.
async fn delay(seconds: u64) -> Value {
    const STREAMS: usize = 100;
    let emitted = Emitted::default();
    let house =
        null_house(Pace::Every(Duration::from_millis(10)), Counts::default(), Some(emitted.clone()), 1024).await;
    let n_tokens = 100 * seconds;
    let mut tasks = Vec::new();
    for stream in 0..STREAMS {
        let mut reader =
            Reader::open(house.address, "basho", &json!([stream]), n_tokens, true).await.expect("connected");
        tasks.push(tokio::spawn(async move {
            let mut arrived = Vec::new();
            while let Ok(Some(events)) = reader.events().await {
                let now = Instant::now();
                arrived.extend((0..events).map(|_| now));
            }
            arrived
        }));
    }
    let start = Instant::now();
    let mut delays = Vec::new();
    for (stream, task) in tasks.into_iter().enumerate() {
        let arrived = task.await.expect("no panic");
        let sent = emitted.of(stream as u32);
        // The first tokens come while the other streams are still being opened.
        delays.extend(
            sent.iter().zip(&arrived).skip(20).map(|(sent, arrived)| (*arrived - *sent).as_secs_f64() * 1000.0),
        );
    }
    let rate = delays.len() as f64 / start.elapsed().as_secs_f64();
    json!({ "streams": STREAMS, "tokens_per_second": rate.round(), "added_ms": quantiles(delays) })
}

/// Twenty times as many requests as can be done, and what becomes of them.
async fn overload(seconds: u64) -> Value {
    // 64 at a time, 20 steps of 10 ms each: about 320 requests a second.
    const ADMITTED: u32 = 64;
    let (tokens, step) = (20, Duration::from_millis(10));
    let house = null_house(Pace::Every(step), Counts::default(), None, ADMITTED).await;
    let capacity = f64::from(ADMITTED) / (step.as_secs_f64() * tokens as f64);
    let gap = Duration::from_secs_f64(1.0 / (20.0 * capacity));
    let (done, mut done_of) = tokio::sync::mpsc::unbounded_channel();
    let before = rss();
    let start = Instant::now();
    let mut sent = 0u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        let due = gap.mul_f64(sent as f64);
        if let Some(early) = due.checked_sub(start.elapsed()) {
            wait(early).await;
        }
        sent += 1;
        let (done, address) = (done.clone(), house.address);
        tokio::spawn(async move {
            let begun = Instant::now();
            let status = match Reader::open(address, "basho", &json!([1]), tokens, false).await {
                Ok(reader) => reader.status().await.unwrap_or(0),
                Err(_) => 0,
            };
            let _ = done.send((status, begun.elapsed().as_secs_f64() * 1000.0));
        });
    }
    drop(done);
    let peak = rss();
    let (mut served, mut refused, mut others) = (Vec::new(), Vec::new(), std::collections::BTreeMap::<u16, u64>::new());
    while let Some((status, ms)) = done_of.recv().await {
        match status {
            200 => served.push(ms),
            429 => refused.push(ms),
            other => *others.entry(other).or_default() += 1,
        }
    }
    json!({
        "capacity_per_second": capacity, "sent": sent, "sent_per_second": (sent as f64 / seconds as f64).round(),
        "served": served.len(), "served_ms": quantiles(served),
        "refused": refused.len(), "refused_ms": quantiles(refused),
        "others": others, "rss_mib_before": before, "rss_mib_peak": peak,
    })
}

/// What a good client feels of connections that never finish their headers.
async fn loris(connections: u64) -> Value {
    let house = null_house(Pace::Free, Counts::default(), None, 1024).await;
    let address = house.address;
    let good = async |n: u64| {
        let mut times = Vec::new();
        for _ in 0..n {
            let start = Instant::now();
            let mut reader = Reader::open(address, "basho", &json!([1]), 4, true).await.expect("connected");
            while reader.events().await.expect("readable").is_some_and(|events| events == 0) {}
            times.push(start.elapsed().as_secs_f64() * 1000.0);
        }
        times
    };
    good(200).await;
    let (calm, before) = (good(1000).await, rss());
    let mut open = Vec::new();
    for _ in 0..connections {
        if let Ok(mut socket) = TcpStream::connect(address).await {
            let _ = socket.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-a: ").await;
            open.push(socket);
        }
    }
    let drip = tokio::spawn(async move {
        loop {
            for socket in &mut open {
                let _ = socket.try_write(b"b");
            }
            wait(Duration::from_millis(500)).await;
        }
    });
    let attacked = good(1000).await;
    drip.abort();
    json!({ "connections": connections, "calm_ttft_ms": quantiles(calm), "attacked_ttft_ms": quantiles(attacked), "rss_mib_grown": rss() - before })
}

/// Open-loop arrivals at a house that runs somewhere.
async fn live(url: &str, model: &str, rate: u64, seconds: u64) -> Value {
    let authority = url.trim_start_matches("http://").trim_end_matches('/');
    let address: SocketAddr =
        tokio::net::lookup_host(authority).await.expect("a host:port").next().expect("an address");
    let mut tasks = Vec::new();
    let start = Instant::now();
    for number in 0..rate * seconds {
        let due = Duration::from_secs_f64(number as f64 / rate as f64);
        if let Some(early) = due.checked_sub(start.elapsed()) {
            wait(early).await;
        }
        let model = model.to_owned();
        tasks.push(tokio::spawn(async move {
            let begun = Instant::now();
            let mut reader = Reader::open(address, &model, &json!("the moon"), 64, true).await?;
            let mut arrived = Vec::new();
            while let Some(events) = reader.events().await? {
                arrived.extend((0..events).map(|_| Instant::now()));
            }
            Ok::<_, std::io::Error>((begun, arrived, Instant::now()))
        }));
    }
    let (mut first, mut gaps, mut whole, mut n_failed) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for task in tasks {
        let Ok((begun, arrived, ended)) = task.await.expect("no panic") else {
            n_failed += 1;
            continue;
        };
        let Some(earliest) = arrived.first() else {
            n_failed += 1;
            continue;
        };
        first.push((*earliest - begun).as_secs_f64() * 1000.0);
        gaps.extend(arrived.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1000.0));
        whole.push((ended - begun).as_secs_f64() * 1000.0);
    }
    let tokens_per_second = (gaps.len() + first.len()) as f64 / start.elapsed().as_secs_f64();
    json!({
        "rate": rate, "requests": rate * seconds, "failed": n_failed, "events_per_second": tokens_per_second.round(),
        "ttft_ms": quantiles(first), "gap_ms": quantiles(gaps), "e2e_ms": quantiles(whole),
    })
}

fn quantiles(mut values: Vec<f64>) -> Value {
    if values.is_empty() {
        return Value::Null;
    }
    values.sort_by(f64::total_cmp);
    let at = |q: f64| (values[((values.len() - 1) as f64 * q) as usize] * 1000.0).round() / 1000.0;
    json!({ "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0) })
}

/// MiB of memory that this process holds.
fn rss() -> f64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages: f64 = pages.and_then(|text| text.split(' ').nth(1)?.parse().ok()).unwrap_or(0.0);
    (pages * 4096.0 / f64::from(1 << 20)).round()
}

async fn wait(time: Duration) {
    tokio::time::sleep(time).await;
}
