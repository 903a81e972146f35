//! What the front itself can carry, with an engine that costs nothing. Generator, front and engine share the process and
//! its cores.

use super::client::{Ask, OpenLoop, Reader, ms, quantile, quantiles, rss_mib, wait};
use super::http_support::engines::{Counts, Emitted, Pace, Speaker};
use super::http_support::{Setup, TestHouse};
use super::{Must, Report};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Streams of the throughput figure.
const STREAMS: usize = 256;
/// A token of the embedded model that is plain text.
const TOKEN: u32 = 300;

/// A house whose engine costs nothing; not started.
pub(crate) fn null_setup(pace: Pace, emitted: Option<Emitted>) -> Setup {
    let mut setup = Setup::default().engine(move || {
        let speaker = Speaker::new(vec![TOKEN], false, pace.clone(), Counts::default());
        Box::new(match &emitted {
            Some(emitted) => speaker.telling(emitted.clone()),
            None => speaker,
        })
    });
    setup.config.host.limits.queued_requests = 1024;
    setup
}

/// Tokens a second over all streams, as fast as it goes.
pub(crate) async fn throughput(seconds: u64) -> Report {
    let mut setup = null_setup(Pace::Free, None);
    setup.config.host.limits.stream_events = 256;
    let house = setup.start().await;
    let total = Arc::new(AtomicU64::new(0));
    for stream in 0..STREAMS {
        let prompt = json!([stream]);
        let ask = Ask { model: "basho", prompt: &prompt, max_tokens: u64::from(u32::MAX) / 2, stream: true };
        let mut reader = Reader::open(house.address, ask).await.expect("connected");
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
    let per_second = (tokens as f64 / start.elapsed().as_secs_f64()).round();
    let figures = json!({ "streams": STREAMS, "seconds": seconds, "tokens_per_second": per_second });
    let must = Must::at_least("tokens a second of SSE over 256 streams", 100_000.0, per_second);
    Report::new("throughput", figures, vec![must])
}

/// What lies between the moment a token leaves the engine and the moment a client has read it, at 10,000 tokens a second:
/// a token for each stream in every step, as batched engines make them, so the last of a step waits for all others.
pub(crate) async fn delay(seconds: u64, streams: u64) -> Report {
    const PER_SECOND: f64 = 10_000.0;
    let step = Duration::from_secs_f64(streams as f64 / PER_SECOND);
    let emitted = Emitted::default();
    let house = null_setup(Pace::Every(step), Some(emitted.clone())).start().await;
    let n_tokens = (seconds as f64 / step.as_secs_f64()) as u64;
    let mut tasks = Vec::new();
    for stream in 0..streams {
        let prompt = json!([stream]);
        let ask = Ask { model: "basho", prompt: &prompt, max_tokens: n_tokens, stream: true };
        let mut reader = Reader::open(house.address, ask).await.expect("connected");
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
    for (stream, task) in (0..).zip(tasks) {
        let arrived = task.await.expect("no panic");
        let sent = emitted.of(stream);
        // The first tokens come while the other streams are still being opened.
        delays.extend(sent.iter().zip(&arrived).skip(20).map(|(sent, arrived)| ms(*arrived - *sent)));
    }
    let rate = (delays.len() as f64 / start.elapsed().as_secs_f64()).round();
    let must = Must::at_most("ms added to a token at 10,000 tokens/s, p99", 1.0, quantile(delays.clone(), 0.99));
    let figures = json!({ "streams": streams, "tokens_per_second": rate, "added_ms": quantiles(delays) });
    Report::new("delay", figures, vec![must])
}

/// Twenty times as many requests as can be done, and what becomes of them.
pub(crate) async fn overload(seconds: u64) -> Report {
    // 50 at a time, 10 steps of 50 ms each: 100 requests a second, of which 2,000 come.
    const ADMITTED: u32 = 50;
    const TOKENS: u64 = 10;
    const STEP: Duration = Duration::from_millis(50);
    let mut setup = null_setup(Pace::Every(STEP), None);
    setup.config.host.limits.queued_requests = ADMITTED;
    setup.settings.limits.connections = 4096;
    let house = setup.start().await;
    let capacity = f64::from(ADMITTED) / (STEP.as_secs_f64() * TOKENS as f64);
    let gap = Duration::from_secs_f64(1.0 / (20.0 * capacity));
    let (done, mut done_of) = tokio::sync::mpsc::unbounded_channel();
    let (start, mut sent, mut memory) = (Instant::now(), 0u32, Vec::new());
    while start.elapsed() < Duration::from_secs(seconds) {
        let due = gap * sent;
        if let Some(early) = due.checked_sub(start.elapsed()) {
            wait(early).await;
        }
        if memory.len() as u64 <= start.elapsed().as_secs() {
            memory.push(rss_mib("self"));
        }
        sent += 1;
        let (done, address) = (done.clone(), house.address);
        tokio::spawn(async move {
            let begun = Instant::now();
            let ask = Ask { model: "basho", prompt: &json!([1]), max_tokens: TOKENS, stream: false };
            let status = match Reader::open(address, ask).await {
                Ok(reader) => reader.status().await.unwrap_or(0),
                Err(_) => 0,
            };
            let _ = done.send((status, ms(begun.elapsed())));
        });
    }
    drop(done);
    let (mut served, mut refused, mut others) = (Vec::new(), Vec::new(), std::collections::BTreeMap::<u16, u64>::new());
    while let Some((status, ms)) = done_of.recv().await {
        match status {
            200 => served.push(ms),
            429 => refused.push(ms),
            other => *others.entry(other).or_default() += 1,
        }
    }
    // Buffers and threads come with the first seconds; what comes after those would go on coming.
    let settled = &memory[memory.len() / 6..];
    let growth = settled.iter().fold(0.0, |most: f64, mib| most.max(mib - settled[0])).round();
    // Its own steps, the one it arrives in, and what a refusal may take.
    let bound = ms(STEP) * (TOKENS + 1) as f64 + 50.0;
    let musts = vec![
        Must::at_most("MiB that memory grew by after the first sixth", 16.0, growth),
        Must::at_most("ms that an admitted request took, p99", bound, quantile(served.clone(), 0.99)),
        Must::at_most("ms until a refusal, p99", 50.0, quantile(refused.clone(), 0.99)),
        Must::at_most("requests that were neither served nor refused", 0.0, others.values().sum::<u64>() as f64),
        Must::at_least("requests served a second", capacity * 0.8, (served.len() as f64 / seconds as f64).round()),
    ];
    let figures = json!({
        "seconds": seconds, "capacity_per_second": capacity, "sent_per_second": sent / u32::try_from(seconds).unwrap_or(1),
        "served": served.len(), "served_ms": quantiles(served),
        "refused": refused.len(), "refused_ms": quantiles(refused),
        "others": others, "rss_mib": memory.iter().map(|mib| mib.round()).collect::<Vec<_>>(),
    });
    Report::new("overload", figures, musts)
}

/// Open-loop arrivals at a house that runs somewhere, or at one of our own with an engine of 10 ms a step.
pub(crate) async fn open(url: Option<&str>, model: &str, rate: u64, seconds: u64) -> Report {
    let own = match url {
        Some(_) => None,
        None => Some(null_setup(Pace::Every(Duration::from_millis(10)), None).start().await),
    };
    let to = match (&own, url) {
        (Some(house), _) => house.address,
        (None, url) => lookup(url.unwrap_or_default()).await,
    };
    let prompt = if own.is_some() { json!([1]) } else { json!("the moon") };
    let ask = Ask { model, prompt: &prompt, max_tokens: 64, stream: true };
    let run = OpenLoop::run(to, ask, rate, seconds).await;
    let mut figures = run.json();
    figures["rate"] = json!(rate);
    Report::new("open", figures, vec![Must::at_most("requests that failed", 0.0, run.n_failed() as f64)])
}

async fn lookup(url: &str) -> SocketAddr {
    let authority = url.trim_start_matches("http://").trim_end_matches('/');
    tokio::net::lookup_host(authority).await.expect("a host:port").next().expect("an address")
}

/// The embedded model behind the front, until the process is ended.
pub(crate) async fn serve(port: u16) -> Value {
    let house = Setup { listen: SocketAddr::from(([127, 0, 0, 1], port)), ..Setup::default() }.start().await;
    println!("http://{}", house.address);
    ended(house).await
}

/// Waits for the end of a house that is to have none.
pub(crate) async fn ended(house: TestHouse) -> Value {
    match house.served.await {
        Ok(Ok(())) => Value::Null,
        ended => panic!("{ended:?}"),
    }
}
