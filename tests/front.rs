//! `playhouse serve` as strangers and newcomers meet it: a configuration with keys, certificate, names and limits; the line
//! that it prints; the lines of the guide.

mod http_support;

use http_body_util::{BodyExt, Empty};
use http_support::PATIENCE;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;
use tokio::net::TcpStream;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject;

/// A running `playhouse serve`. Dropped, it is killed.
struct Served {
    child: Child,
    lines: Receiver<String>,
    folder: tempfile::TempDir,
}

fn serve_in(folder: tempfile::TempDir, arguments: &[&str]) -> Served {
    serve_logging(folder, arguments, Stdio::inherit())
}

fn serve_logging(folder: tempfile::TempDir, arguments: &[&str], log: Stdio) -> Served {
    let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
    command.env_clear().env("PATH", "/bin:/usr/bin").stdin(Stdio::null()).current_dir(folder.path());
    command.args(["serve", "--admin-socket", "admin.sock"]).args(arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().expect("the binary runs");
    let stdout = child.stdout.take().expect("piped");
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            // The test may have seen enough.
            let _ = sender.send(line);
        }
    });
    Served { child, lines, folder }
}

impl Served {
    /// The lines up to and with the first that begins so.
    fn until(&self, beginning: &str) -> Vec<String> {
        let mut seen = Vec::new();
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            seen.push(line.unwrap_or_else(|error| panic!("no `{beginning}` line after {seen:?}: {error}")));
            if seen.last().is_some_and(|line| line.starts_with(beginning)) {
                return seen;
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn hang_up(&self) {
        kill_process(Pid::from_child(&self.child), Signal::HUP).expect("it runs");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a line as a reader would.
fn shell(line: &str, environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", line]).envs(environment.iter().copied()).stdin(Stdio::null());
    command.output().expect("there is a shell")
}

/// The body and the status of a `curl` line.
fn curl(arguments: &str, environment: &[(&str, &str)]) -> (String, String) {
    let output = shell(&format!("curl -sS -w '\n%{{http_code}}' --max-time 30 {arguments}"), environment);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or_else(|| {
        panic!("curl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (body.to_owned(), status.to_owned())
}

/// Asks again and again until it is so.
fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "never {what}");
        std::thread::yield_now();
    }
}

#[test]
fn the_line_that_serve_prints_works() {
    let served = serve_in(tempfile::tempdir().expect("a folder"), &["--address", "127.0.0.1:0"]);
    let lines = served.until("curl ");
    assert!(lines.iter().any(|line| line == "no GPU found; models run on the CPU" || line.starts_with("GPU-")));
    assert!(lines.iter().any(|line| line.starts_with("basho/0 on ")), "{lines:?}");
    assert!(lines.iter().any(|line| line.starts_with("http://127.0.0.1:")), "{lines:?}");
    let output = shell(lines.last().expect("one"), &[]);
    let answer: Value = serde_json::from_slice(&output.stdout).expect("the answer is JSON");
    let text = answer["choices"][0]["text"].as_str().expect("a text");
    assert!(text.chars().any(char::is_alphabetic), "{answer}");
    // The page at the same address.
    let url = lines.iter().find(|line| line.starts_with("http://")).expect("one");
    let (page, status) = curl(url, &[]);
    assert!(status == "200" && page.contains("<html"), "{status} {page}");
}

#[test]
fn the_program_and_its_server_say_the_same_of_themselves() {
    let output = shell(&format!("{} --version", env!("CARGO_BIN_EXE_playhouse")), &[]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let (program, kernels) = text.trim_end().split_once('\n').expect("two lines");
    assert!(kernels == "no GPU kernels" || kernels.starts_with("kernels for sm_"), "{kernels}");
    let served = serve_in(tempfile::tempdir().expect("a folder"), &["--address", "127.0.0.1:0"]);
    let lines = served.until("http://");
    let (server, _) = curl(&format!("{}/version", lines.last().expect("one")), &[]);
    let server: Value = serde_json::from_str(&server).expect("JSON");
    let commit = server["commit"].as_str().map(|commit| format!(" ({commit})")).unwrap_or_default();
    assert_eq!(program, format!("playhouse {}{commit}", server["version"].as_str().expect("a version")));
}

#[test]
fn prompts_are_logged_where_that_is_asked_for() {
    let logged = |arguments: &[&str]| {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        let log = std::fs::File::create(&path).expect("writable");
        let served = serve_logging(folder, &[&["--address", "127.0.0.1:0"], arguments].concat(), log.into());
        let lines = served.until("curl ");
        let url = lines.iter().find(|line| line.starts_with("http://")).expect("one");
        let body =
            r#"{"model": "basho", "messages": [{"role": "user", "content": "a secret heron"}], "max_tokens": 2}"#;
        let (answer, status) =
            curl(&format!("{url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"), &[]);
        assert_eq!(status, "200", "{answer}");
        std::fs::read_to_string(path).expect("a log")
    };
    assert!(!logged(&[]).contains("heron"));
    let log = logged(&["--set", "host.log_prompts=true", "--set", "host.log=json"]);
    let line = log.lines().find(|line| line.contains("heron")).unwrap_or_else(|| panic!("no prompt in {log}"));
    let line: Value = serde_json::from_str(line).expect("JSON");
    assert_eq!(line["prompt"], "<|user|>a secret heron<|end|><|assistant|>", "{line}");
}

/// The guide's lines, run as they stand against a real server: every endpoint has one, and each is answered.
#[test]
fn the_guide_has_a_line_for_every_endpoint_and_they_work() {
    let guide = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/src/http-api.md"));
    let guide = guide.expect("the guide");
    let lines: Vec<&str> = guide.lines().filter_map(|line| line.strip_prefix("$ curl ")).collect();
    let set = ["--set", "host.admin_keys=sk-admin"];
    let served = serve_in(tempfile::tempdir().expect("a folder"), &["--address", "127.0.0.1:0", set[0], set[1]]);
    let seen = served.until("curl ");
    let url = seen.iter().find(|line| line.starts_with("http://")).expect("an address");
    let environment = [("URL", url.as_str()), ("ADMIN_KEY", "sk-admin")];
    let (document, _) = curl("$URL/openapi.json", &environment);
    let document: Value = serde_json::from_str(&document).expect("a document");
    for path in document["paths"].as_object().expect("paths").keys() {
        let path = path.replace("{id}", "basho");
        let is_shown = |line: &&str| {
            let rest = line.split("$URL").nth(1).expect("a line has an address");
            rest.split([' ', '?', '"']).next() == Some(path.as_str())
        };
        assert!(lines.iter().any(is_shown), "{path} has no line in the guide");
    }
    for line in lines {
        // One of them unloads the model, the next loads it.
        if !line.contains("/models/load") {
            wait("ready", || curl("$URL/health/ready?model=basho", &environment).1 == "200");
        }
        // A stream without an end is left after a moment.
        let line = line.replace("-N $URL/api/events", "--max-time 2 $URL/api/events");
        let (body, status) = curl(&line, &environment);
        assert!(status == "200" && !body.trim().is_empty(), "{line}: {status} {body}");
    }
}

/// A certificate for `localhost` that names itself, made by the openssl of the machine.
fn make_certificate(folder: &Path, serial: u32) {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-set_serial", &serial.to_string()])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(folder)
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

type Sender = hyper::client::conn::http1::SendRequest<Empty<bytes::Bytes>>;

/// A connection that stays open, to a server whose certificate is the one in this file.
async fn connection(port: u16, certificate: &Path) -> Sender {
    let mut roots = rustls::RootCertStore::empty();
    let trusted = rustls::pki_types::CertificateDer::from_pem_file(certificate).expect("a certificate");
    roots.add(trusted).expect("one to trust");
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
    let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("trusted");
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
    tokio::spawn(connection);
    sender
}

/// Asks over an open connection; the status.
async fn ask(sender: &mut Sender, key: &str) -> u16 {
    let request = hyper::Request::get("/v1/models").header("host", "localhost").header("x-api-key", key);
    let request = request.body(Empty::new()).expect("a request");
    let sent = tokio::time::timeout(PATIENCE, async {
        sender.ready().await.expect("the connection is open");
        let response = sender.send_request(request).await.expect("an answer");
        let status = response.status().as_u16();
        response.into_body().collect().await.expect("a whole body");
        status
    });
    sent.await.expect("in time")
}

#[test]
fn a_file_says_keys_certificate_names_origins_and_limits() {
    let folder = tempfile::tempdir().expect("a folder");
    make_certificate(folder.path(), 1);
    std::fs::write(folder.path().join("keys"), "sk-moon # the first\nsk-few\n").expect("writable");
    let text = r#"
        [host]
        address = "127.0.0.1:0"
        api_keys_file = "keys"
        admin_keys = ["sk-admin"]
        tls = { certificate = "cert.pem", key = "key.pem" }
        allowed_hosts = ["models.example"]
        cors_origins = ["https://chat.example"]
        per_key = { requests_per_minute = 2 }
        look_every = "1h"
        http_socket = "http.sock"
        [[model]]
        name = "basho"
        path = "embedded:basho"
        devices = "cpu"
        context = 256
    "#;
    std::fs::write(folder.path().join("house.toml"), text).expect("writable");
    let served = serve_in(folder, &["house.toml"]);
    let seen = served.until("curl ");
    let line = seen.last().expect("one").clone();
    let url = seen.iter().find(|line| line.starts_with("https://")).expect("an address").clone();
    assert!(url.starts_with("https://models.example:"), "a certificate is for a name: {url}");
    assert!(line.contains("authorization: Bearer $KEY"), "{line}");
    let port: u16 = url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let certificate = served.path("cert.pem");
    let ask_curl = |arguments: &str| {
        let base = format!("--cacert {} {arguments}", certificate.display());
        curl(&base.replace("$URL", &format!("https://localhost:{port}")), &[]).1
    };
    // Keys.
    assert_eq!(ask_curl("$URL/health"), "200");
    assert_eq!(ask_curl("$URL/v1/models"), "401");
    assert_eq!(ask_curl("$URL/v1/models -H 'authorization: Bearer sk-moon'"), "200");
    let load = r#"$URL/models/load -d '{"model": "basho"}'"#;
    // Over HTTP/2: a refusal that comes before the body was read is seen all the same, every time.
    for _ in 0..20 {
        assert_eq!(ask_curl(&format!("--http2 {load} -H 'x-api-key: sk-moon'")), "403");
    }
    assert_eq!(ask_curl(&format!("{load} -H 'x-api-key: sk-admin'")), "200");
    // The socket's file says who may come; whoever can needs no key.
    let socket = served.path("http.sock");
    let mode = std::fs::metadata(&socket).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let by_socket = format!("--unix-socket {} {}", socket.display(), load.replace("$URL", "http://localhost"));
    assert_eq!(curl(&by_socket, &[]).1, "200");
    // Names and origins.
    assert_eq!(ask_curl("$URL/health -H 'host: models.example'"), "200");
    assert_eq!(ask_curl("$URL/health -H 'host: other.example'"), "403");
    assert_eq!(ask_curl("$URL/health -H 'origin: https://chat.example'"), "200");
    assert_eq!(ask_curl("$URL/health -H 'origin: https://other.example'"), "403");
    // Limits of each key.
    let complete = r#"$URL/v1/completions -d '{"model": "basho", "prompt": "moon", "max_tokens": 1}'"#;
    let few = format!("{complete} -H 'x-api-key: sk-few'");
    assert_eq!((ask_curl(&few), ask_curl(&few), ask_curl(&few)), ("200".into(), "200".into(), "429".into()));
    assert_eq!(ask_curl(&format!("{complete} -H 'x-api-key: sk-moon'")), "200", "another key has its own");
    assert_eq!(curl(&format!("http://127.0.0.1:{port}/health"), &[]).1, "000", "nothing is served in plain");

    // Other files, and a hangup: new connections see the new certificate, open ones go on, and so do the keys.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut open = runtime.block_on(connection(port, &certificate));
    assert_eq!(runtime.block_on(ask(&mut open, "sk-moon")), 200);
    make_certificate(served.folder.path(), 2);
    std::fs::write(served.path("keys"), "sk-sun\n").expect("writable");
    assert_eq!(runtime.block_on(ask(&mut open, "sk-moon")), 200, "nobody has looked yet");
    assert_eq!(ask_curl("$URL/health"), "000", "the old certificate is still shown, and not trusted");
    served.hang_up();
    wait("another certificate", || ask_curl("$URL/health") == "200");
    let mut new = runtime.block_on(connection(port, &certificate));
    wait("other keys", || runtime.block_on(ask(&mut new, "sk-sun")) == 200);
    assert_eq!(runtime.block_on(ask(&mut new, "sk-moon")), 401);
    assert_eq!(runtime.block_on(ask(&mut open, "sk-sun")), 200, "open connections outlive their certificate");

    // What cannot be used changes nothing.
    let good = served.path("good.pem");
    std::fs::copy(&certificate, &good).expect("writable");
    std::fs::write(&certificate, "nonsense").expect("writable");
    std::fs::write(served.path("keys"), "sk-later\n").expect("writable");
    served.hang_up();
    wait("other keys", || runtime.block_on(ask(&mut open, "sk-later")) == 200);
    let mut third = runtime.block_on(connection(port, &good));
    assert_eq!(runtime.block_on(ask(&mut third, "sk-later")), 200);
}

#[test]
fn what_would_be_open_to_everybody_does_not_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let refused = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
        command.env_clear().env("PATH", "/bin:/usr/bin").current_dir(folder.path()).stdin(Stdio::null());
        let output = command.args(["serve", "--admin-socket", "admin.sock"]).args(arguments).output();
        let output = output.expect("the binary runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = refused(&["--address", "0.0.0.0:0"]);
    assert!(code == Some(78) && text.contains("neither keys nor a certificate"), "{code:?} {text}");
    std::fs::write(folder.path().join("empty"), "# none\n").expect("writable");
    let (code, text) = refused(&["--address", "127.0.0.1:0", "--api-keys-file", "empty"]);
    assert!(code == Some(78) && text.contains("empty: there is no key in it"), "{code:?} {text}");
    let (code, text) = refused(&["--address", "127.0.0.1:0", "--tls-certificate", "cert.pem", "--tls-key", "key.pem"]);
    assert!(code == Some(78) && text.contains("cert.pem: "), "{code:?} {text}");
    let (code, _) = refused(&["--tls-certificate", "cert.pem"]);
    assert_eq!(code, Some(2), "one without the other");

    let served = serve_in(tempfile::tempdir().expect("a folder"), &["--address", "0.0.0.0:0", "--insecure"]);
    let seen = served.until("curl ");
    let url = seen.iter().find(|line| line.starts_with("http://127.0.0.1:")).expect("an address that can be reached");
    let body = json!({"status": "ok"}).to_string();
    assert_eq!(curl(&format!("{url}/health"), &[]), (body, "200".into()));
}
