//! The generator's side: requests over raw sockets, read as bytes, because the cost of a client that parses is not the
//! front's; and the arithmetic of figures.

use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Connects to `to`. To an address of this machine itself from one of 200 addresses in turn: one address has 28,000 ports,
/// and a port rests for a minute after each connection.
pub(crate) async fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    if !to.ip().is_loopback() || to.is_ipv6() {
        return TcpStream::connect(to).await;
    }
    let [a, b] = (NEXT.fetch_add(1, Ordering::Relaxed) % 200 + 1).to_be_bytes()[2..] else { unreachable!("two bytes") };
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, a, b)), 0))?;
    socket.connect(to).await
}

/// What is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub(crate) model: &'a str,
    pub(crate) prompt: &'a Value,
    pub(crate) max_tokens: u64,
    pub(crate) stream: bool,
}

impl Ask<'_> {
    /// The request as it goes over the wire.
    pub(crate) fn bytes(&self, to: SocketAddr) -> Vec<u8> {
        let Self { model, prompt, max_tokens, stream } = self;
        let body =
            json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": stream, "ignore_eos": true});
        let body = body.to_string();
        let length = body.len();
        format!(
            "POST /v1/completions HTTP/1.1\r\nhost: {to}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// An answer that comes.
pub(crate) struct Reader {
    socket: TcpStream,
    buffer: Vec<u8>,
    last: u8,
}

impl Reader {
    pub(crate) async fn open(to: SocketAddr, ask: Ask<'_>) -> std::io::Result<Self> {
        let mut socket = connect(to).await?;
        socket.set_nodelay(true)?;
        socket.write_all(&ask.bytes(to)).await?;
        Ok(Self { socket, buffer: vec![0; 32 << 10], last: 0 })
    }

    /// How many events ended in the next piece; `None` at the end.
    pub(crate) async fn events(&mut self) -> std::io::Result<Option<u64>> {
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
    pub(crate) async fn status(mut self) -> std::io::Result<u16> {
        let n = self.socket.read(&mut self.buffer).await?;
        let status = status_of(&self.buffer[..n]);
        while self.socket.read(&mut self.buffer).await? > 0 {}
        Ok(status.unwrap_or(0))
    }
}

/// The status of an answer's first line.
pub(crate) fn status_of(bytes: &[u8]) -> Option<u16> {
    std::str::from_utf8(bytes.get(..12)?).ok()?.strip_prefix("HTTP/1.1 ")?.parse().ok()
}

/// When one request was sent, its events came and it ended.
pub(crate) struct Timed {
    begun: Instant,
    arrived: Vec<Instant>,
    ended: Instant,
}

/// Requests that arrive `rate` times a second for a while, whether or not earlier ones are answered.
pub(crate) struct OpenLoop {
    timed: Vec<Timed>,
    n_failed: usize,
    took: Duration,
}

impl OpenLoop {
    pub(crate) async fn run(to: SocketAddr, ask: Ask<'_>, rate: u64, seconds: u64) -> Self {
        let bytes = ask.bytes(to);
        let start = Instant::now();
        let mut tasks = Vec::new();
        for number in 0..rate * seconds {
            let due = Duration::from_secs_f64(number as f64 / rate as f64);
            if let Some(early) = due.checked_sub(start.elapsed()) {
                wait(early).await;
            }
            let bytes = bytes.clone();
            tasks.push(tokio::spawn(async move {
                let begun = Instant::now();
                let mut socket = connect(to).await?;
                socket.set_nodelay(true)?;
                socket.write_all(&bytes).await?;
                let mut reader = Reader { socket, buffer: vec![0; 8 << 10], last: 0 };
                let mut arrived = Vec::new();
                while let Some(events) = reader.events().await? {
                    arrived.extend((0..events).map(|_| Instant::now()));
                }
                Ok::<_, std::io::Error>(Timed { begun, arrived, ended: Instant::now() })
            }));
        }
        let (mut timed, mut n_failed) = (Vec::new(), 0);
        for task in tasks {
            match task.await.expect("no panic") {
                // At least one token and the end.
                Ok(one) if one.arrived.len() > 1 => timed.push(one),
                _ => n_failed += 1,
            }
        }
        Self { timed, n_failed, took: start.elapsed() }
    }

    pub(crate) fn n_failed(&self) -> usize {
        self.n_failed
    }

    /// Milliseconds from each request to its first token.
    pub(crate) fn ttft(&self) -> Vec<f64> {
        self.timed.iter().map(|one| ms(one.arrived[0] - one.begun)).collect()
    }

    pub(crate) fn json(&self) -> Value {
        let gaps = self.timed.iter().flat_map(|one| one.arrived.windows(2).map(|pair| ms(pair[1] - pair[0])));
        let whole = self.timed.iter().map(|one| ms(one.ended - one.begun));
        let n_events: usize = self.timed.iter().map(|one| one.arrived.len()).sum();
        json!({
            "requests": self.timed.len() + self.n_failed, "failed": self.n_failed,
            "events_per_second": (n_events as f64 / self.took.as_secs_f64()).round(),
            "ttft_ms": quantiles(self.ttft()), "gap_ms": quantiles(gaps.collect()), "e2e_ms": quantiles(whole.collect()),
        })
    }
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

pub(crate) fn quantiles(mut values: Vec<f64>) -> Value {
    if values.is_empty() {
        return Value::Null;
    }
    values.sort_by(f64::total_cmp);
    json!({
        "p50": at(&values, 0.5), "p90": at(&values, 0.9), "p99": at(&values, 0.99), "max": at(&values, 1.0)
    })
}

/// The quantile `q` of `values`.
pub(crate) fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    if values.is_empty() { f64::NAN } else { at(&values, q) }
}

fn at(sorted: &[f64], q: f64) -> f64 {
    (sorted[((sorted.len() - 1) as f64 * q) as usize] * 1000.0).round() / 1000.0
}

/// MiB of memory that a process holds; `self` is this one.
pub(crate) fn rss_mib(process: &str) -> f64 {
    let pages = std::fs::read_to_string(format!("/proc/{process}/statm")).ok();
    let pages: f64 = pages.and_then(|text| text.split(' ').nth(1)?.parse().ok()).unwrap_or(0.0);
    pages * rustix::param::page_size() as f64 / f64::from(1 << 20)
}

pub(crate) async fn wait(time: Duration) {
    tokio::time::sleep(time).await;
}
