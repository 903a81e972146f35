//! A real host under its operator's hands: `playhouse serve` with worker processes, and the commands, signals and service
//! manager that act on it.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(60);

/// A box with a configuration, an admin socket and a service manager.
struct Stage {
    folder: tempfile::TempDir,
    manager: UnixDatagram,
}

/// A running `playhouse serve`. Dropped, it is killed.
struct Host {
    child: Child,
    log: Receiver<String>,
}

fn model(name: &str) -> String {
    format!(
        "[[model]]\nname = \"{name}\"\npath = \"embedded:basho\"\ndevices = \"cpu\"\nisolation = \"process\"\ncontext = 256\n"
    )
}

impl Stage {
    fn new(models: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let manager = UnixDatagram::bind(folder.path().join("notify")).expect("free");
        manager.set_read_timeout(Some(DEADLINE)).expect("settable");
        let stage = Self { folder, manager };
        stage.write(models);
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, models: &[&str]) {
        let models: String = models.iter().map(|name| model(name)).collect();
        let text = format!("[host]\naddress = \"127.0.0.1:0\"\ndrain = \"5s\"\n{models}");
        std::fs::write(self.path("house.toml"), text).expect("writable");
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
        command.env_clear().env("PATH", "/bin").env("PLAYHOUSE_HOST_ADMIN_SOCKET", self.path("admin.sock"));
        command.stdin(Stdio::null());
        command
    }

    fn serve(&self) -> Host {
        let mut command = self.command();
        command.arg("serve").arg(self.path("house.toml"));
        self.start(command)
    }

    /// A host whose workers have faults on command.
    fn serve_faulty(&self, faults: &str) -> Host {
        let mut command = self.command();
        command.arg("serve").arg(self.path("house.toml")).env("PLAYHOUSE_FAULTS", faults);
        self.start(command)
    }

    /// Puts in the place of the configuration what gives it to a reader only when [`Stage::pass`] is called.
    fn stall(&self) {
        std::fs::remove_file(self.path("house.toml")).expect("there is one");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, self.path("house.toml"), fifo, mode, 0).expect("makeable");
    }

    /// Gives the stalled reader what `was` in the file, after `then` is there for the next one.
    fn pass(&self, was: &str, then: &[&str]) {
        let mut stalled = std::fs::OpenOptions::new().write(true).open(self.path("house.toml")).expect("it is read");
        std::fs::remove_file(self.path("house.toml")).expect("there is one");
        self.write(then);
        stalled.write_all(was.as_bytes()).expect("it is read");
    }

    /// The phase of the one replica, if the host answers.
    fn phase(&self) -> Option<String> {
        let output = self.run(&["ps", "--json"]);
        let ps: Value = serde_json::from_slice(&output.stdout).ok()?;
        Some(ps["devices"][0]["replicas"][0]["phase"].as_str()?.to_owned())
    }

    fn start(&self, mut command: Command) -> Host {
        command.env("NOTIFY_SOCKET", self.path("notify"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let stderr = child.stderr.take().expect("piped");
        let (lines, log) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // Whoever reads the log may have seen enough.
                let _ = lines.send(line);
            }
        });
        Host { child, log }
    }

    /// A host whose models are all ready.
    fn ready(&self) -> Host {
        let host = self.serve();
        self.wait_for("READY");
        host
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("the binary runs")
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    fn ps(&self) -> Value {
        serde_json::from_str(&self.text(&["ps", "--json"])).expect("one document")
    }

    /// The worker of a model: its process and how many there were.
    fn worker(&self, model: &str) -> Option<(u64, u64)> {
        let ps = self.ps();
        let devices = ps["devices"].as_array().expect("a list");
        let mut replicas = devices.iter().flat_map(|device| device["replicas"].as_array().expect("a list"));
        let replica = replicas.find(|replica| replica["replica"]["model"] == model && replica["phase"] == "ready")?;
        Some((replica["pid"].as_u64()?, replica["incarnation"].as_u64()?))
    }

    /// Asks again and again until there is an answer.
    fn until<T>(&self, what: &str, ask: impl Fn() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            assert!(begun.elapsed() < DEADLINE, "never {what}: {}", String::from_utf8_lossy(&self.run(&["ps"]).stdout));
        }
    }

    /// Waits until the service manager is told this.
    fn wait_for(&self, name: &str) -> BTreeMap<String, String> {
        let begun = Instant::now();
        loop {
            let mut buffer = [0; 4096];
            let n_bytes = match self.manager.recv(&mut buffer) {
                // A signal, such as a child's end: with a timeout the call is not begun again by itself.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                received => received.unwrap_or_else(|error| panic!("no {name}: {error}")),
            };
            let text = String::from_utf8_lossy(&buffer[..n_bytes]).into_owned();
            let pairs = text.lines().filter_map(|line| line.split_once('='));
            let message: BTreeMap<String, String> = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            if message.contains_key(name) {
                return message;
            }
            assert!(begun.elapsed() < DEADLINE, "no {name}");
        }
    }
}

impl Host {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it runs");
    }

    /// Waits for its end.
    fn end(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status;
            }
            assert!(begun.elapsed() < DEADLINE, "it does not end");
            std::thread::yield_now();
        }
    }

    fn logged(&self, words: &str) {
        let begun = Instant::now();
        while begun.elapsed() < DEADLINE {
            match self.log.recv_timeout(DEADLINE) {
                Ok(line) if line.contains(words) => return,
                Ok(_) => {}
                Err(error) => panic!("`{words}` is not in the log: {error}"),
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_drain_from_the_command_line_ends_the_host_with_0() {
    let stage = Stage::new(&["one"]);
    let mut host = stage.ready();
    assert_eq!(stage.ps()["host"]["pid"], u64::from(host.child.id()));
    assert!(stage.text(&["ps"]).contains(", ready\n"));
    assert!(stage.text(&["ps", "--tree"]).contains("one/0  ready, process "));
    assert!(stage.text(&["top", "--once", "--interval", "100ms"]).contains("one/0"));
    let events = stage.text(&["events"]);
    assert!(events.contains("one/0 starts on cpu (start 1)\n") && events.contains("one/0 is ready after "), "{events}");
    assert_eq!(stage.text(&["drain", "--stop"]), "drained: every stream finished\n");
    stage.wait_for("STOPPING");
    assert_eq!(host.end().code(), Some(0));
    assert!(!stage.path("admin.sock").exists(), "its socket is gone");
}

#[test]
fn the_first_signal_drains_and_the_exit_code_is_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let stage = Stage::new(&["one"]);
        let mut host = stage.ready();
        host.signal(signal);
        stage.wait_for("STOPPING");
        assert_eq!(host.end().code(), Some(0), "{signal:?}");
    }
}

/// The first signal lets a stream go on, for a minute if need be; the second ends it with an error that says so.
#[test]
fn a_second_signal_ends_open_streams_now() {
    let stage = Stage::new(&["one"]);
    let socket = stage.path("http.sock");
    let text = std::fs::read_to_string(stage.path("house.toml")).expect("there is one");
    let host = format!("drain = \"60s\"\nhttp_socket = \"{}\"", socket.display());
    std::fs::write(stage.path("house.toml"), text.replace("drain = \"5s\"", &host)).expect("writable");
    let mut host = stage.serve_faulty("slow-step=100");
    stage.wait_for("READY");
    let mut client = UnixStream::connect(&socket).expect("it listens");
    client.set_read_timeout(Some(DEADLINE)).expect("settable");
    let body = r#"{"model": "one", "prompt": "autumn", "max_tokens": 200, "stream": true, "ignore_eos": true}"#;
    write!(
        client,
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .expect("it reads");
    let mut lines = BufReader::new(client).lines().map(|line| line.expect("it writes in time"));
    let mut next = |words: &str| lines.by_ref().find(|line| line.contains(words));
    assert!(next("data: ").is_some(), "no token comes");
    let begun = Instant::now();
    host.signal(Signal::TERM);
    stage.wait_for("STOPPING");
    assert!(next("data: ").is_some(), "the stream goes on");
    host.signal(Signal::TERM);
    assert!(next("\"draining\"").is_some(), "the stream ends without a word");
    assert_eq!(host.end().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(15), "200 steps take twenty: {:?}", begun.elapsed());
}

#[test]
fn a_reload_touches_only_what_changed() {
    let stage = Stage::new(&["stays", "goes"]);
    let host = stage.ready();
    let before = stage.worker("stays").expect("ready");
    stage.write(&["stays", "comes"]);
    let dry = "would keep   stays/0\nwould stop   goes/0\nwould start  comes/0\n";
    assert_eq!(stage.text(&["reload", "--dry-run"]), dry);
    assert!(stage.worker("goes").is_some(), "it was only asked");
    host.signal(Signal::HUP);
    let message = stage.wait_for("RELOADING");
    assert!(message["MONOTONIC_USEC"].parse::<u64>().is_ok(), "{message:?}");
    stage.wait_for("READY");
    stage.until("ready", || stage.worker("comes"));
    assert_eq!((stage.worker("stays"), stage.worker("goes")), (Some(before), None));
    assert_eq!(stage.text(&["reload"]), "kept         stays/0 comes/0\nstopped      nothing\nstarted      nothing\n");
}

#[test]
fn a_configuration_that_goes_bad_changes_nothing() {
    let stage = Stage::new(&["one"]);
    let host = stage.ready();
    let before = stage.worker("one").expect("ready");
    std::fs::write(stage.path("house.toml"), "[host]\nadress = \"127.0.0.1:0\"\n").expect("writable");
    let output = stage.run(&["reload"]);
    assert_eq!(output.status.code(), Some(78));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.starts_with("error: unknown key `adress` in [host]\n --> "), "{words}");
    assert!(words.contains("house.toml:2:1") && words.contains("did you mean `address`?"), "{words}");
    host.signal(Signal::HUP);
    host.logged("everything goes on as it was");
    assert_eq!(stage.worker("one"), Some(before));
}

#[test]
fn a_restart_replaces_the_worker_and_an_end_of_one_is_seen() {
    let stage = Stage::new(&["one"]);
    let _host = stage.ready();
    let (first, _) = stage.worker("one").expect("ready");
    assert_eq!(stage.text(&["restart", "one"]), "one: 1 replica restarts\n");
    let next = |than: u64| stage.until("restarted", || stage.worker("one").filter(|(pid, _)| *pid != than));
    let (second, incarnation) = next(first);
    assert_eq!(incarnation, 2);
    let pid = Pid::from_raw(i32::try_from(second).expect("a process id")).expect("not 0");
    kill_process(pid, Signal::KILL).expect("it runs");
    let (_, incarnation) = next(second);
    assert_eq!(incarnation, 3);
    assert!(stage.text(&["events"]).contains("one/0: ended by signal 9; 0 requests in flight\n"));
    let output = stage.run(&["restart", "two"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_second_host_runs_without_the_socket_and_names_the_first() {
    let stage = Stage::new(&["one"]);
    let first = stage.ready();
    let mut second = stage.serve();
    second.logged(&format!("belongs to another host (process {}", first.child.id()));
    stage.wait_for("READY");
    assert_eq!(stage.ps()["host"]["pid"], u64::from(first.child.id()), "the first still answers");
    second.signal(Signal::TERM);
    assert_eq!(second.end().code(), Some(0));
}

/// Needs the right to mount, if only in a namespace of its own; without it there is no disk to fill, and the test says so.
#[test]
fn a_host_whose_disk_is_full_runs_without_the_socket() {
    if !Command::new("unshare").args(["-rm", "true"]).output().is_ok_and(|output| output.status.success()) {
        println!("this user may not mount: not tested");
        return;
    }
    let stage = Stage::new(&["one"]);
    let full = stage.path("full");
    std::fs::create_dir(&full).expect("makeable");
    let mut command = Command::new("unshare");
    // One inode is the folder itself, the other the lock file's: the socket's name is one too many.
    let script = "mount -t tmpfs -o nr_inodes=2 none \"$1\" && exec \"$2\" serve \"$3\"";
    command.args(["-rm", "sh", "-c", script, "sh"]).arg(&full).arg(env!("CARGO_BIN_EXE_playhouse"));
    command.arg(stage.path("house.toml")).env("PLAYHOUSE_HOST_ADMIN_SOCKET", full.join("admin.sock"));
    let mut host = stage.start(command);
    host.logged("the host goes on without: no room for the admin socket");
    stage.wait_for("READY");
    host.signal(Signal::TERM);
    assert_eq!(host.end().code(), Some(0));
}

#[test]
fn the_socket_of_a_killed_host_is_taken_over() {
    let stage = Stage::new(&["one"]);
    let mut first = stage.ready();
    first.signal(Signal::KILL);
    first.end();
    assert_eq!(stage.run(&["ps"]).status.code(), Some(75));
    let second = stage.ready();
    assert_eq!(stage.ps()["host"]["pid"], u64::from(second.child.id()));
}

#[test]
fn a_reload_by_the_admin_socket_is_told_to_the_service_manager() {
    let stage = Stage::new(&["one"]);
    let _host = stage.ready();
    stage.text(&["reload", "--dry-run"]);
    assert_eq!(stage.text(&["reload"]), "kept         one/0\nstopped      nothing\nstarted      nothing\n");
    let message = stage.wait_for("RELOADING");
    assert!(message["MONOTONIC_USEC"].parse::<u64>().is_ok(), "{message:?}");
    stage.wait_for("READY");
}

/// The file is one that never comes, as on a network that is gone.
#[test]
fn a_stop_does_not_wait_for_a_reload() {
    let stage = Stage::new(&["one"]);
    let mut host = stage.ready();
    stage.stall();
    host.signal(Signal::HUP);
    stage.wait_for("RELOADING");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| stage.run(&["reload"]));
        host.logged("the admin socket asks for a reload");
        host.signal(Signal::TERM);
        stage.wait_for("STOPPING");
        assert_eq!(host.end().code(), Some(0));
        let output = waiting.join().expect("no panic");
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), words.as_str()), (Some(75), "error: the host is stopping\n"));
    });
}

#[test]
fn who_asks_for_a_reload_while_one_is_under_way_gets_the_next_one() {
    let stage = Stage::new(&["one"]);
    let host = stage.ready();
    let before = stage.worker("one").expect("ready");
    let was = std::fs::read_to_string(stage.path("house.toml")).expect("there is one");
    stage.stall();
    host.signal(Signal::HUP);
    stage.wait_for("RELOADING");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| stage.text(&["reload"]));
        host.logged("the admin socket asks for a reload");
        assert_eq!(stage.worker("one"), Some(before), "everything else goes on meanwhile");
        stage.pass(&was, &["one", "two"]);
        let did = waiting.join().expect("no panic");
        assert_eq!(did, "kept         one/0\nstopped      nothing\nstarted      two/0\n");
    });
    // The end of the first, then the second.
    stage.wait_for("READY");
    stage.wait_for("RELOADING");
    stage.wait_for("READY");
    assert_eq!(stage.worker("one"), Some(before));
}

#[test]
fn a_bad_model_file_at_a_reload_is_named_and_changes_nothing() {
    let stage = Stage::new(&["one"]);
    let _host = stage.ready();
    let before = stage.worker("one").expect("ready");
    let good = std::fs::read_to_string(stage.path("house.toml")).expect("there is one");
    let bad = stage.path("bad.gguf");
    std::fs::write(&bad, "GGUF, or is it").expect("writable");
    for (file, code) in [("bad.gguf", 65), ("missing.gguf", 66)] {
        let text = format!("{good}[[model]]\nname = \"two\"\npath = \"{file}\"\ndevices = \"cpu\"\n");
        std::fs::write(stage.path("house.toml"), text).expect("writable");
        let output = stage.run(&["reload"]);
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{words}");
        let path = stage.path(file).display().to_string();
        assert!(words.starts_with("error: model `two` (") && words.contains(&path), "{words}");
        assert_eq!(stage.worker("one"), Some(before));
    }
    // A setting that does not suit the file is the configuration's fault.
    std::fs::write(stage.path("house.toml"), good.replace("context = 256", "context = 100000")).expect("writable");
    let output = stage.run(&["reload"]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{words}");
    assert!(words.contains("model `one`: context is 100000, expected 1 to 256"), "{words}");
    assert_eq!(stage.worker("one"), Some(before));
}

#[test]
fn a_drain_can_be_taken_back() {
    let stage = Stage::new(&["one"]);
    let mut host = stage.ready();
    stage.text(&["drain"]);
    assert!(stage.text(&["ps"]).contains(", draining\n"));
    assert_eq!(stage.text(&["undrain"]), "undrained: the host takes requests again\n");
    assert!(stage.text(&["ps"]).contains(", ready\n"));
    assert_eq!(stage.text(&["uncordon"]), "the host was not draining: it takes requests\n");
    host.signal(Signal::TERM);
    assert_eq!(host.end().code(), Some(0));
}

/// In a process, which is killed, and on a thread, which leaves its load half way.
#[test]
fn a_stop_does_not_wait_for_a_load() {
    for (isolation, fault) in [("process", "never-ready"), ("thread", "slow-load=300")] {
        let stage = Stage::new(&["one"]);
        let text = std::fs::read_to_string(stage.path("house.toml")).expect("there is one");
        std::fs::write(stage.path("house.toml"), text.replace("process", isolation)).expect("writable");
        let mut host = stage.serve_faulty(fault);
        stage.until("loading", || stage.phase().filter(|phase| phase == "loading"));
        host.signal(Signal::TERM);
        stage.wait_for("STOPPING");
        let begun = Instant::now();
        assert_eq!(host.end().code(), Some(0), "{isolation}");
        // A second, and what a busy machine takes; the load of the thread takes twenty.
        assert!(begun.elapsed() < Duration::from_secs(5), "{isolation}: {:?}", begun.elapsed());
    }
}

#[test]
fn a_supervisor_that_gives_up_is_70_and_the_log_says_why() {
    let stage = Stage::new(&["one"]);
    let text = std::fs::read_to_string(stage.path("house.toml")).expect("there is one");
    let limits =
        "[supervision]\nmax_restarts = 2\nload_timeout = \"500ms\"\nbackoff = { min = \"1ms\", max = \"2ms\" }\n";
    std::fs::write(stage.path("house.toml"), text + limits).expect("writable");
    let mut host = stage.serve_faulty("never-ready");
    host.logged("a worker starts");
    host.logged("a device is given up");
    host.logged("error: the supervisor gave up: every device is quarantined");
    assert_eq!(host.end().code(), Some(70));
}

#[test]
fn the_log_shows_how_a_load_gets_on() {
    let stage = Stage::new(&["one"]);
    let host = stage.serve();
    for phase in ["Open", "Weights", "Allocate", "Ready"] {
        host.logged(&format!("loading replica=one/0 phase={phase} bytes_done="));
    }
    host.logged("a worker takes requests replica=one/0 after=");
}
