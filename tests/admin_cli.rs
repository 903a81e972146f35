//! The commands that talk to a running host, against a host of the tests.

#[path = "admin/house.rs"]
mod house;

use house::{BAD_CONFIG, FakeHouse};
use playhouse::host::admin::{AdminServer, Options};
use playhouse_actors::HouseEvent;
use playhouse_actors::inventory::DeviceId;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(30);

struct Host {
    folder: tempfile::TempDir,
    house: Arc<FakeHouse>,
    server: Option<AdminServer>,
    _runtime: tokio::runtime::Runtime,
}

fn host(house: FakeHouse) -> Host {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let house = Arc::new(house);
    let server = {
        let _inside = runtime.enter();
        AdminServer::open(&folder.path().join("admin.sock"), house.clone(), Options::default()).expect("it opens")
    };
    Host { folder, house, server: Some(server), _runtime: runtime }
}

fn playhouse(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
    command.env_clear().env("PLAYHOUSE_HOST_ADMIN_SOCKET", folder.join("admin.sock")).stdin(Stdio::null());
    command
}

impl Host {
    fn run(&self, arguments: &[&str]) -> Output {
        playhouse(self.folder.path()).args(arguments).output().expect("the binary runs")
    }

    /// What a command that succeeds prints.
    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.text(arguments)).expect("one document")
    }
}

/// The exit code and the words.
fn failure(output: &Output) -> (i32, String) {
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().expect("no signal"), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn ps_shows_replicas_in_a_table() {
    let host = host(FakeHouse::new());
    let pid = std::process::id();
    let expected = format!(
        "\
playhouse 0.1.0, process {pid}, up 3h01m, ready

REPLICA  DEVICE        PHASE         PID  RESTARTS  RUN  WAIT   KV  STEP  LAST END
qwen/0   GPU-5d5b0000  ready        4242         2    5     2  25%  12ms  ended by signal 9
phi/0    GPU-5d5b0000  loading         -         0    0     -    -  -     -
qwen/1   GPU-5d5b0001  quarantined     -         0    0     -    -  -     -
GPU-5d5b0000 ran out of memory: 3 times request refused, 1 time started again with less KV
GPU-5d5b0001 is quarantined: Xid(79)
"
    );
    assert_eq!(host.text(&["ps"]), expected);
}

#[test]
fn ps_shows_a_tree() {
    let host = host(FakeHouse::new());
    let pid = std::process::id();
    let expected = format!(
        "\
playhouse 0.1.0, process {pid}, up 3h01m, ready
├─ GPU-5d5b0000  NVIDIA H200, 21.0G of 140.0G used, 2 failures (1 recent), ran out of memory: 3 times request refused, 1 time started again with less KV
│  ├─ qwen/0  ready, process 4242, 2 restarts, 5 running, 2 waiting, step 12ms, KV 25% of 8.0 GiB; last end: ended by signal 9
│  └─ phi/0  loading
├─ GPU-5d5b0001  NVIDIA H200, 0.0G of 140.0G used, quarantined: Xid(79)
│  └─ qwen/1  quarantined
├─ models
│  ├─ phi  not required, 0 of 1 ready, 7 open requests (2 wait for a replica), 900 tokens to come, 1234 tokens/s
│  └─ qwen  required, 1 of 2 ready, 7 open requests (2 wait for a replica), 900 tokens to come, 1234 tokens/s
└─ requests  100 accepted, 90 completed, 0 failed, 0 cancelled, 0 refused, 4 resumed, 0 poison
"
    );
    assert_eq!(host.text(&["ps", "--tree"]), expected);
}

#[test]
fn ps_says_what_readiness_waits_for() {
    let host = host(FakeHouse::new());
    {
        let mut status = host.house.status.lock().expect("no panics");
        let router = status.as_mut().and_then(|status| status.router.as_mut()).expect("a router");
        router.services.iter_mut().for_each(|service| service.ready = 0);
    }
    assert!(host.text(&["ps"]).contains("not ready: qwen to come\n"), "phi is not required");
}

#[test]
fn ps_prints_one_document() {
    let document = host(FakeHouse::new()).json(&["ps", "--json"]);
    assert_eq!(document["ready"], true);
    assert_eq!(document["host"]["pid"], std::process::id());
    assert_eq!(document["devices"][0]["replicas"][0]["pid"], 4242);
    assert_eq!(document["devices"][0]["oom"]["refuse"], 3);
    assert_eq!(document["router"]["services"][1]["model"], "qwen");
    assert_eq!(document["inventory"][1]["uuid"], "GPU-5d5b0001");
}

#[test]
fn reload_says_what_it_did_or_would_do() {
    let host = host(FakeHouse::new());
    let did = "\
kept         qwen/0 qwen/1
stopped      phi/0
started      llama/0
changed, and in effect when the host is started again: host.address
";
    assert_eq!(host.text(&["reload"]), did);
    assert!(host.text(&["reload", "--dry-run"]).starts_with("would keep   qwen/0 qwen/1\nwould stop   phi/0\n"));
    assert_eq!(host.json(&["reload", "--dry-run", "--json"])["applied"]["started"][0]["model"], "llama");
    let asked = ["reload dry_run=false", "reload dry_run=true", "reload dry_run=true"];
    assert_eq!(host.house.asked(), asked);
}

#[test]
fn a_reload_of_a_bad_file_shows_the_diagnostic_and_is_78() {
    let host = host(FakeHouse { bad_config: true, ..FakeHouse::new() });
    assert_eq!(failure(&host.run(&["reload"])), (78, format!("{BAD_CONFIG}\n")));
}

#[test]
fn drain_waits_and_may_stop() {
    let host = host(FakeHouse { drained: tokio::sync::Semaphore::new(2), ..FakeHouse::new() });
    assert_eq!(host.text(&["drain"]), "drained: 3 streams had to be ended\n");
    host.text(&["drain", "--timeout", "90s", "--stop"]);
    assert_eq!(host.house.asked(), ["drain None", "drain Some(90s)", "stop"]);
    assert_eq!(failure(&host.run(&["drain", "--timeout", "90"])).0, 2, "a duration has a unit");
}

#[test]
fn a_drain_that_is_taken_back_says_so_and_is_75() {
    let host = host(FakeHouse { drained: tokio::sync::Semaphore::new(0), ..FakeHouse::new() });
    std::thread::scope(|scope| {
        let draining = scope.spawn(|| failure(&host.run(&["drain", "--stop"])));
        let begun = std::time::Instant::now();
        while host.house.asked().is_empty() {
            assert!(begun.elapsed() < DEADLINE, "it is never asked");
        }
        assert_eq!(host.text(&["undrain"]), "undrained: the host takes requests again\n");
        let (code, words) = draining.join().expect("no panic");
        assert_eq!(code, 75);
        assert_eq!(words, "error: the drain was taken back before it was over: the host takes requests\n");
    });
    assert_eq!(host.house.asked(), ["drain None", "undrain"], "and does not stop");
}

#[test]
fn restart_takes_models_and_devices() {
    let host = host(FakeHouse::new());
    assert_eq!(host.text(&["restart", "qwen"]), "qwen: 2 replicas restart\n");
    assert_eq!(host.text(&["restart", "GPU-5d5b0001"]), "GPU-5d5b0001: its replicas restart\n");
    let (code, words) = failure(&host.run(&["restart", "nobody"]));
    assert_eq!((code, words.as_str()), (2, "error: no model or device `nobody`\n"));
}

#[test]
fn events_are_shown_and_followed_to_the_end_of_the_host() {
    let mut host = host(FakeHouse::new());
    let released = |number: u32| HouseEvent::Released { device: DeviceId::gpu(format!("GPU-{number}")) };
    host.house.tell(released(0));
    // Whoever connects after this line was read finds the event in the log: it is told in order.
    let mut child =
        playhouse(host.folder.path()).args(["events", "--follow"]).stdout(Stdio::piped()).spawn().expect("it runs");
    let (lines, read) = std::sync::mpsc::channel();
    let stdout = child.stdout.take().expect("piped");
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            lines.send(line.expect("text")).expect("read");
        }
    });
    let first = read.recv_timeout(DEADLINE).expect("the first event");
    assert!(first.ends_with(" GPU-0 is taken back") && first.as_bytes()[10] == b'T', "{first}");
    host.house.tell(released(1));
    let second = read.recv_timeout(DEADLINE).expect("the second event");
    assert!(second.ends_with(" GPU-1 is taken back"), "{second}");
    let kept = host.text(&["events", "--json"]);
    let kept: Vec<Value> = kept.lines().map(|line| serde_json::from_str(line).expect("a document")).collect();
    assert_eq!((kept.len(), &kept[1]["event"], &kept[1]["number"]), (2, &"released".into(), &1.into()));
    host.server = None;
    reader.join().expect("no panic");
    assert!(child.wait().expect("it ends").success(), "the end of the host is the end of its events");
}

#[test]
fn top_prints_one_frame_and_wants_a_terminal_for_more() {
    let host = host(FakeHouse::new());
    let frame = host.text(&["top", "--once", "--interval", "100ms"]);
    assert_eq!(frame.lines().count(), 24);
    assert!(frame.contains("qwen/0") && frame.contains("QUARANTINED: Xid(79)"), "{frame}");
    let (code, words) = failure(&host.run(&["top"]));
    assert_eq!(code, 2);
    assert!(words.contains("top needs a terminal"), "{words}");
}

#[test]
fn no_host_is_75_and_says_where_it_looked() {
    let folder = tempfile::tempdir().expect("a folder");
    let commands: &[&[&str]] =
        &[&["ps"], &["top", "--once"], &["reload"], &["drain"], &["undrain"], &["restart", "qwen"], &["events"]];
    for arguments in commands {
        let output = playhouse(folder.path()).args(*arguments).output().expect("the binary runs");
        let (code, words) = failure(&output);
        assert_eq!(code, 75, "{arguments:?}: {words}");
        let place = folder.path().join("admin.sock");
        assert!(words.contains(&format!("no host answers at {}", place.display())), "{words}");
    }
}

#[test]
fn the_flag_outranks_the_environment() {
    let host = host(FakeHouse::new());
    let elsewhere = host.folder.path().join("elsewhere.sock");
    let (code, words) = failure(&host.run(&["ps", "--socket", elsewhere.to_str().expect("text")]));
    assert_eq!(code, 75);
    assert!(words.contains("elsewhere.sock"), "{words}");
}
