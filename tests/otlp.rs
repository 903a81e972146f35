//! Traces: a house sends the spans of a request to a collector, as parts of the client's own trace, over the death of a
//! worker. The collector is in the test.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A span as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Span {
    trace: Vec<u8>,
    id: Vec<u8>,
    parent: Vec<u8>,
    name: String,
    start: u64,
    end: u64,
}

/// The fields of a protobuf message: number and bytes; numbers as their little-endian bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (first, rest) = bytes.split_first().expect("a whole number");
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return value;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let n_bytes = match tag & 7 {
            0 => {
                varint(&mut bytes);
                continue;
            }
            1 => 8,
            2 => usize::try_from(varint(&mut bytes)).expect("a length"),
            5 => 4,
            kind => panic!("wire type {kind}"),
        };
        let (value, rest) = bytes.split_at(n_bytes);
        found.push((tag >> 3, value));
        bytes = rest;
    }
    found
}

/// The messages in this field of a message.
fn inner(bytes: &[u8], number: u64) -> Vec<&[u8]> {
    fields(bytes).into_iter().filter(|field| field.0 == number).map(|field| field.1).collect()
}

/// The spans of an `ExportTraceServiceRequest`.
fn spans(request: &[u8]) -> Vec<Span> {
    let scopes = inner(request, 1).into_iter().flat_map(|resource| inner(resource, 2));
    let time = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let read = |bytes: &[u8]| {
        let mut span = Span::default();
        for (number, value) in fields(bytes) {
            match number {
                1 => span.trace = value.to_vec(),
                2 => span.id = value.to_vec(),
                4 => span.parent = value.to_vec(),
                5 => span.name = String::from_utf8(value.to_vec()).expect("a text"),
                7 => span.start = time(value),
                8 => span.end = time(value),
                _ => {}
            }
        }
        span
    };
    scopes.flat_map(|scope| inner(scope, 2)).map(read).collect()
}

/// A collector: its address, and the spans that come to it.
fn collector() -> (String, Receiver<Span>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("bound"));
    let (sender, found) = channel();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = BufReader::new(socket.expect("a connection"));
            let (mut n_bytes, mut line) = (0, String::new());
            socket.read_line(&mut line).expect("a request");
            assert!(line.starts_with("POST /v1/traces "), "{line}");
            loop {
                line.clear();
                socket.read_line(&mut line).expect("a header");
                if line.trim().is_empty() {
                    break;
                }
                if let Some(length) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    n_bytes = length.trim().parse().expect("a number");
                }
            }
            let mut body = vec![0; n_bytes];
            socket.read_exact(&mut body).expect("a whole body");
            // Nobody may be listening any more.
            spans(&body).into_iter().for_each(|span| drop(sender.send(span)));
            let _ = socket.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        }
    });
    (address, found)
}

struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn curl(arguments: &[&str]) -> String {
    let output = Command::new("curl").args(["-sS", "--max-time", "60"]).args(arguments).output();
    String::from_utf8(output.expect("curl is installed").stdout).expect("text")
}

/// The process of the replica, once it is as `is_so` says.
fn worker(url: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Pid {
    let begun = Instant::now();
    loop {
        let status: Value = serde_json::from_str(&curl(&[&format!("{url}/api/status")])).expect("a status");
        let replica = &status["house"]["devices"][0]["replicas"][0];
        if is_so(replica) {
            let pid = replica["pid"].as_i64().expect("a process");
            return Pid::from_raw(i32::try_from(pid).expect("small")).expect("not 0");
        }
        assert!(begun.elapsed() < PATIENCE, "never {what}: {status}");
    }
}

#[test]
fn the_spans_of_a_request_are_part_of_the_clients_trace() {
    let (collector, found) = collector();
    let folder = tempfile::tempdir().expect("a folder");
    let text = format!(
        "[host]\naddress = \"127.0.0.1:0\"\notlp_endpoint = \"{collector}\"\n[[model]]\nname = \"basho\"\n\
         path = \"embedded:basho\"\ndevices = \"cpu\"\nisolation = \"process\"\ncontext = 256\n"
    );
    std::fs::write(folder.path().join("house.toml"), text).expect("writable");
    let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
    command.env_clear().env("PATH", "/bin:/usr/bin").env("OTEL_BSP_SCHEDULE_DELAY", "50").current_dir(folder.path());
    command.args(["serve", "house.toml", "--admin-socket", "admin.sock"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut served = Served(command.spawn().expect("the binary runs"));
    let lines = BufReader::new(served.0.stdout.take().expect("piped")).lines().map_while(Result::ok);
    let mut url = String::new();
    for line in lines {
        if line.starts_with("http://") {
            url.clone_from(&line);
        }
        if line.starts_with("curl ") {
            break;
        }
    }

    // The worker is stopped before it can say anything, and killed once it has the request: another goes on with it.
    let first = worker(&url, "ready", |replica| replica["phase"] == "ready");
    kill_process(first, Signal::STOP).expect("it runs");
    let completions = format!("{url}/v1/completions");
    let asking = std::thread::spawn(move || {
        let parent = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let body = r#"{"model": "basho", "prompt": "autumn moon", "max_tokens": 8, "stream": true}"#;
        curl(&["-N", &completions, "-H", parent, "-d", body])
    });
    worker(&url, "asked", |replica| replica["running"] == 1);
    kill_process(first, Signal::KILL).expect("it runs");
    assert!(asking.join().expect("no panic").trim_end().ends_with("data: [DONE]"));

    let trace: Vec<u8> =
        vec![0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c];
    let mut ours: BTreeMap<String, Span> = BTreeMap::new();
    let begun = Instant::now();
    while !["request", "queue", "prefill", "resume", "decode"].iter().all(|name| ours.contains_key(*name)) {
        let left = PATIENCE.saturating_sub(begun.elapsed());
        let span = found.recv_timeout(left).unwrap_or_else(|error| panic!("{error}, only {ours:?}"));
        if span.trace == trace {
            ours.insert(span.name.clone(), span);
        }
    }
    let request = &ours["request"];
    assert_eq!(request.parent, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31], "part of the client's span");
    for pair in ["queue", "prefill", "resume", "decode"].windows(2) {
        let (before, after) = (&ours[pair[0]], &ours[pair[1]]);
        assert!(before.end <= after.end && before.start <= after.start, "{before:?} {after:?}");
    }
    for name in ["queue", "prefill", "resume", "decode"] {
        let span = &ours[name];
        assert_eq!(span.parent, request.id, "{name} is part of the request");
        assert!(span.start >= request.start && span.end <= request.end, "{name} lies within it");
    }
}
