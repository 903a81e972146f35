//! The HTTP front against clients that mean no good, or that have stalled: a good client does not notice.

mod http_support;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use http_support::client::{get, post};
use http_support::engines::{Counts, Pace, Speaker};
use http_support::{PATIENCE, Setup, TestHouse, frames};
use hyper_util::rt::{TokioExecutor, TokioIo};
use playhouse::http::{HttpSettings, ServeError, TlsFiles};
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls;

/// A house whose engine talks without end.
async fn chatterbox(change: impl FnOnce(&mut Setup)) -> (TestHouse, Counts) {
    let counts = Counts::default();
    let seen = counts.clone();
    let mut setup = Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, Pace::Free, seen.clone())));
    change(&mut setup);
    (setup.start().await, counts)
}

/// Reads until the other side hangs up; whether it did in time.
async fn is_cut(socket: &mut TcpStream) -> bool {
    last_words(socket).await.is_some()
}

/// What is said before the other side hangs up; `None` if it does not in time.
async fn last_words(socket: &mut TcpStream) -> Option<Vec<u8>> {
    let (mut words, mut piece) = (Vec::new(), vec![0; 4096]);
    let reading = async {
        while let Ok(n @ 1..) = socket.read(&mut piece).await {
            words.truncate(256);
            words.extend_from_slice(&piece[..n]);
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.ok()?;
    Some(words)
}

/// Whether the other side says 408 and hangs up.
async fn is_refused_as_slow(socket: &mut TcpStream) -> bool {
    last_words(socket).await.is_some_and(|words| words.starts_with(b"HTTP/1.1 408 "))
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_are_cut_and_keep_nobody_out() {
    let (house, _) = chatterbox(|setup| {
        setup.settings.limits.connections = 64;
        setup.settings.limits.connections_per_ip = 64;
        setup.settings.limits.header_timeout = Duration::from_secs(2);
    })
    .await;
    let mut crowd = Vec::new();
    for _ in 0..1000 {
        let mut socket = TcpStream::connect(house.address).await.expect("the front listens");
        // Whoever had to make room may be gone already.
        let _ = socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ").await;
        crowd.push(socket);
    }
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 2});
    for _ in 0..20 {
        let answer = post(house.address, "/v1/completions", &body).send().await;
        assert_eq!(answer.status, 200, "there is room for whoever has something to say");
    }
    let start = Instant::now();
    let mut n_refused = 0;
    for mut socket in crowd {
        n_refused += u32::from(is_refused_as_slow(&mut socket).await);
    }
    // One that had to make room before its first byte was read is not told: it had asked for nothing.
    assert!(n_refused >= 64, "{n_refused} were told why");
    assert!(start.elapsed() < Duration::from_secs(30), "all at once, not one after the other");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_request_are_cut_in_time() {
    let (house, _) = chatterbox(|setup| {
        setup.settings.limits.header_timeout = Duration::from_millis(200);
        setup.settings.limits.idle_timeout = Duration::from_millis(400);
    })
    .await;
    // Never a byte; half a preface; a request and then nothing.
    for bytes in ["", "PRI * HT", "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"] {
        let mut socket = TcpStream::connect(house.address).await.expect("the front listens");
        socket.write_all(bytes.as_bytes()).await.expect("sent");
        let words = last_words(&mut socket).await.unwrap_or_else(|| panic!("{bytes:?}: it is still open"));
        // What was not half a request of HTTP/1 gets no answer that it did not ask for.
        assert_eq!(words.is_empty(), !bytes.starts_with("GET"), "{bytes:?}: {:?}", String::from_utf8_lossy(&words));
        assert!(!String::from_utf8_lossy(&words).contains(" 408 "), "{bytes:?}");
    }
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_stop_are_cut_and_their_requests_end() {
    const READERS: u64 = 1000;
    let _alone = MEASURING.lock().await;
    raise_descriptors();
    let (counts, mut setup) = (Counts::default(), Setup::default());
    let seen = counts.clone();
    // Every chunk repeats the model's name. With a long one some fifty tokens fill the buffers of both kernels; with a short
    // one it takes a thousand, for each of the readers, and how long that takes depends on the machine and who else is on it.
    setup.config.models[0].name = "basho".repeat(1000);
    let mut setup = setup.engine(move || Box::new(Speaker::new(vec![300], false, Pace::Free, seen.clone())));
    setup.config.host.limits.client_timeout = Duration::from_secs(1);
    setup.config.host.limits.queued_requests = 2048;
    setup.settings.limits.client_timeout = Duration::from_secs(1);
    setup.settings.limits.connections = 2048;
    setup.settings.limits.connections_per_ip = 2048;
    let house = setup.start().await;
    let body = json!({"model": "poet", "prompt": "a", "max_tokens": 1_000_000_000, "stream": true}).to_string();
    let mut stalled = Vec::new();
    for _ in 0..READERS {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small window");
        let mut socket = socket.connect(house.address).await.expect("the front listens");
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", body.len());
        socket.write_all(format!("{head}{body}").as_bytes()).await.expect("sent");
        stalled.push(socket);
    }
    house.wait("busy", |_| counts.submitted.load(Ordering::SeqCst) >= READERS).await;
    // They never read a byte. Others are served meanwhile, and then the stalled are gone.
    let answer = post(house.address, "/v1/completions", &json!({"model": "poet", "prompt": "a", "max_tokens": 2}));
    assert_eq!(answer.send().await.status, 200);
    house.wait("free", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 0)).await;
    // What they cost in memory is a matter of the engine's speed; `benches/load.rs` measures it with one of 10 ms a step.
    for mut socket in stalled {
        assert!(is_cut(&mut socket).await);
    }
    house.shut_down().await;
}

/// Held by tests that measure memory: what one costs is not to be counted by another.
static MEASURING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Bytes that an attack may cost the process, its own sockets and everything else that runs here included.
const MEMORY_MAX: u64 = 200_000_000;

/// Bytes that this process holds.
fn rss() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number of pages");
    pages * rustix::param::page_size() as u64
}

/// As many files as the system lets this process have; how many that is.
fn raise_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("up to the maximum is allowed");
    maximum.unwrap_or(u64::MAX)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_slow_connections_cost_little_memory_and_keep_nobody_out() {
    let _alone = MEASURING.lock().await;
    // Two descriptors each, and some for everything else; a system that allows fewer gets fewer.
    let connections = (raise_descriptors().saturating_sub(4096) / 2).min(10_000);
    let (house, _) = chatterbox(|setup| {
        setup.settings.limits.connections = 16_384;
        setup.settings.limits.connections_per_ip = 16_384;
        setup.settings.limits.header_timeout = Duration::from_secs(20);
    })
    .await;
    let before = rss();
    let mut crowd = Vec::new();
    for _ in 0..connections {
        let mut socket = TcpStream::connect(house.address).await.expect("the front listens");
        socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ").await.expect("sent");
        crowd.push(socket);
    }
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 2});
    for _ in 0..50 {
        let answer = post(house.address, "/v1/completions", &body).send().await;
        assert_eq!(answer.status, 200, "others are served meanwhile");
    }
    assert!(rss().saturating_sub(before) < MEMORY_MAX, "grew from {before} to {}", rss());
    for mut socket in crowd {
        assert!(is_refused_as_slow(&mut socket).await, "it is told why");
    }
    house.shut_down().await;
}

type H2 = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

async fn h2(address: SocketAddr) -> H2 {
    let socket = TcpStream::connect(address).await.expect("the front listens");
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
    let (sender, connection) = handshake.await.expect("a handshake");
    tokio::spawn(connection);
    sender
}

fn h2_get(address: SocketAddr, path: &str) -> hyper::Request<Empty<Bytes>> {
    hyper::Request::builder().uri(format!("http://{address}{path}")).body(Empty::new()).expect("a request")
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_serves_many_requests_and_survives_resets() {
    let (house, _) = chatterbox(|setup| setup.settings.h2_streams = 8).await;
    let mut sender = h2(house.address).await;
    for _ in 0..3 {
        let response = sender.send_request(h2_get(house.address, "/health")).await.expect("an answer");
        assert_eq!((response.status().as_u16(), response.version()), (200, hyper::Version::HTTP_2));
        response.into_body().collect().await.expect("a whole body");
    }
    // Requests that are dropped before their answer are resets; thousands of them end at most their own connection.
    for _ in 0..5 {
        let sender = h2(house.address).await;
        for _ in 0..1000 {
            let mut sender = sender.clone();
            if sender.ready().await.is_err() {
                break;
            }
            drop(sender.send_request(h2_get(house.address, "/v1/models")));
        }
    }
    // Headers beyond any measure.
    let mut greedy = h2(house.address).await;
    let mut request = h2_get(house.address, "/health");
    request.headers_mut().insert("x-large", "x".repeat(60_000).parse().expect("a header"));
    let answer = tokio::time::timeout(PATIENCE, greedy.send_request(request)).await.expect("in time");
    assert!(answer.is_err() || answer.is_ok_and(|response| response.status().is_client_error()));
    assert_eq!(get(house.address, "/health").send().await.status, 200);
    house.shut_down().await;
}

/// Frames of a server, up to the end of the connection: each frame's kind with its payload.
async fn frames_of(socket: &mut (impl AsyncReadExt + Unpin)) -> Vec<(u8, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut piece = vec![0; 16 << 10];
    // A connection that is reset has said what it had to say.
    while let Ok(n @ 1..) = socket.read(&mut piece).await {
        bytes.extend_from_slice(&piece[..n]);
    }
    let (mut rest, mut frames) = (bytes.as_slice(), Vec::new());
    while let Some((head, tail)) = rest.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, next)) = tail.split_at_checked(length) else { break };
        frames.push((head[3], payload.to_vec()));
        rest = next;
    }
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_over_http2_end_their_own_connection() {
    let _alone = MEASURING.lock().await;
    let (house, _) = chatterbox(|setup| {
        setup.settings.limits.client_timeout = Duration::from_millis(500);
        setup.settings.limits.header_timeout = Duration::from_millis(500);
        setup.settings.limits.idle_timeout = Duration::from_secs(2);
    })
    .await;
    let before = rss();
    let bombs = (0..200).flat_map(|at| frames::header_bomb(2 * at + 1)).collect();
    // And whether the server is to say that it was too much; settings and pings it may also answer, one by one.
    let floods: [(&str, Vec<u8>, bool); 5] = [
        ("requests that are reset at once", frames::rapid_reset(1, 10_000), true),
        ("settings", frames::settings_flood(200_000), false),
        ("pings", frames::ping_flood(200_000), false),
        ("headers that never end", frames::continuation_flood(10_000), true),
        ("headers that grow when they are read", bombs, true),
    ];
    for (what, flood, is_refused) in floods {
        let mut socket = TcpStream::connect(house.address).await.expect("the front listens");
        socket.write_all(&frames::hello()).await.expect("sent");
        let (mut reader, mut writer) = socket.split();
        // Writing fails once the server has had enough.
        let writing = async { drop(writer.write_all(&flood).await) };
        let reading = frames_of(&mut reader);
        let ((), frames) = tokio::time::timeout(PATIENCE, async { tokio::join!(writing, reading) })
            .await
            .unwrap_or_else(|_| panic!("{what}: the connection never ended"));
        let calm = |(kind, payload): &(u8, Vec<u8>)| {
            *kind == frames::GOAWAY && payload.get(4..8) == Some(&frames::ENHANCE_YOUR_CALM.to_be_bytes())
        };
        let kinds: Vec<u8> = frames.iter().map(|(kind, _)| *kind).collect();
        assert!(!is_refused || frames.iter().any(calm), "{what}: {kinds:?}");
        assert_eq!(get(house.address, "/health").send().await.status, 200, "{what}: others are served");
    }
    // Nor may answers that nobody takes pile up.
    for flood in [frames::settings_flood(200_000), frames::ping_flood(200_000)] {
        let mut socket = TcpStream::connect(house.address).await.expect("the front listens");
        socket.write_all(&frames::hello()).await.expect("sent");
        let unread = async { while socket.write_all(&flood).await.is_ok() {} };
        tokio::time::timeout(PATIENCE, unread).await.expect("it is cut");
    }
    assert!(rss().saturating_sub(before) < MEMORY_MAX, "grew from {before} to {}", rss());
    assert_eq!(get(house.address, "/health").send().await.status, 200);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn absurd_heads_are_refused() {
    let (house, _) = chatterbox(|_| {}).await;
    let lines: String = (0..200).map(|n| format!("x-{n}: a\r\n")).collect();
    for head in [
        format!("GET /health HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n"),
        format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx-a: {}\r\n\r\n", "a".repeat(100_000)),
        format!("GET /{} HTTP/1.1\r\nhost: localhost\r\n\r\n", "a".repeat(100_000)),
        "GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(),
        "GET /health\u{0} HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n".to_owned(),
        "nonsense\r\n\r\n".to_owned(),
    ] {
        let mut socket = TcpStream::connect(house.address).await.expect("the front listens");
        // It may hang up before everything is sent.
        let _ = socket.write_all(head.as_bytes()).await;
        let mut answer = vec![0; 256];
        let n = tokio::time::timeout(PATIENCE, socket.read(&mut answer)).await.expect("in time").unwrap_or(0);
        let line = String::from_utf8_lossy(&answer[..n.min(12)]).into_owned();
        assert!(n == 0 || line.starts_with("HTTP/1.1 4"), "{:?}: {line}", &head[..40.min(head.len())]);
    }
    assert_eq!(get(house.address, "/health").send().await.status, 200);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_its_share_of_streams() {
    let (house, _) = chatterbox(|setup| {
        setup.settings.api_keys = ["sk-moon", "sk-river"].into_iter().collect();
        setup.settings.per_key.streams = Some(1);
    })
    .await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 1_000_000, "stream": true});
    let ask =
        |key: &str| post(house.address, "/v1/completions", &body).header("authorization", &format!("Bearer {key}"));
    let first = ask("sk-moon").open().await;
    assert_eq!(first.status(), 200);
    let second = ask("sk-moon").send().await;
    assert_eq!((second.status, second.error("type")), (429, json!("rate_limit_error")));
    assert_eq!(ask("sk-river").open().await.status(), 200, "another key has its own");
    drop(first);
    house.wait("free", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 0)).await;
    assert_eq!(ask("sk-moon").open().await.status(), 200);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_finishes_what_is_open_and_takes_nothing_new() {
    let (house, _) = chatterbox(|setup| setup.settings.drain = Duration::from_millis(300)).await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 1_000_000_000, "stream": true});
    let mut endless = post(house.address, "/v1/completions", &body).open().await;
    assert!(endless.frame().await.is_some());
    let watching = get(house.address, "/api/events").open().await;
    house.stop.cancel();
    let TestHouse { served, address, client, .. } = house;
    tokio::time::timeout(PATIENCE, served).await.expect("in time").expect("no panic").expect("served");
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
    drop(watching);
    client.tree().stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_address_needs_keys_and_a_certificate() {
    for (keys, insecure, is_served) in [(false, false, false), (true, false, false), (false, true, true)] {
        let mut setup = Setup { listen: SocketAddr::from(([0, 0, 0, 0], 0)), ..Setup::default() };
        setup.settings.insecure = insecure;
        if keys {
            setup.settings.api_keys = ["sk-moon"].into_iter().collect();
        }
        let house = setup.start().await;
        if is_served {
            let address = SocketAddr::from(([127, 0, 0, 1], house.address.port()));
            assert_eq!(get(address, "/health").send().await.status, 200);
            house.shut_down().await;
        } else {
            let TestHouse { served, client, .. } = house;
            let refused = tokio::time::timeout(PATIENCE, served).await.expect("in time").expect("no panic");
            assert!(matches!(refused, Err(ServeError::Exposed { .. })), "{refused:?}");
            client.tree().stop().await;
        }
    }
}

/// A certificate for `localhost` that names itself, made by the openssl of the machine.
fn make_certificate(folder: &Path, serial: u32) -> TlsFiles {
    let (certificate, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-set_serial", &serial.to_string()])
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    TlsFiles { certificate, key, look_every: Duration::from_millis(20) }
}

/// Connects; the certificate that was shown, and the connection.
async fn tls(address: SocketAddr) -> (Vec<u8>, tokio_rustls::client::TlsStream<TcpStream>) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    let socket = TcpStream::connect(address).await.expect("the front listens");
    let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("a handshake");
    let shown = stream.get_ref().1.peer_certificates().expect("a certificate")[0].to_vec();
    (shown, stream)
}

/// Trusts whatever is shown: the test looks at it itself.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_takes_over_a_new_certificate_and_ignores_a_broken_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = make_certificate(folder.path(), 1);
    let (house, _) = chatterbox(|setup| setup.settings.tls = Some(files.clone())).await;
    let (first, stream) = tls(house.address).await;
    let response = get(house.address, "/health").header("host", "localhost").over(stream).await;
    assert_eq!(response.status(), 200);
    let plain = {
        let mut socket = TcpStream::connect(house.address).await.expect("it listens");
        socket.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.expect("sent");
        let mut answer = [0; 64];
        let n = tokio::time::timeout(PATIENCE, socket.read(&mut answer)).await.expect("in time").unwrap_or(0);
        String::from_utf8_lossy(&answer[..n]).into_owned()
    };
    assert!(!plain.contains("200"), "{plain}");
    let whole = std::fs::read(&files.certificate).expect("readable");
    std::fs::write(&files.certificate, "-----BEGIN CERTIFICATE-----\nnonsense").expect("writable");
    assert_eq!(tls(house.address).await.0, first, "the old one is used on");
    std::fs::write(&files.certificate, whole).expect("writable");
    make_certificate(folder.path(), 2);
    let changed = async { while tls(house.address).await.0 == first {} };
    tokio::time::timeout(PATIENCE, changed).await.expect("the new certificate is shown in time");
    house.shut_down().await;

    let settings =
        HttpSettings { tls: Some(TlsFiles { key: "/nowhere.pem".into(), ..files }), ..HttpSettings::default() };
    let house = Setup { settings, ..Setup::default() }.start().await;
    let TestHouse { served, client, .. } = house;
    let refused = tokio::time::timeout(PATIENCE, served).await.expect("in time").expect("no panic");
    assert!(matches!(refused, Err(ServeError::Tls { .. })), "{refused:?}");
    client.tree().stop().await;
}
