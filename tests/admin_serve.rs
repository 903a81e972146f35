//! A real host under its operator's hands: `playhouse serve` with worker processes, and the commands, signals and service
//! manager that act on it.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
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
            assert!(begun.elapsed() < DEADLINE, "never {what}: {}", self.ps());
        }
    }

    /// Waits until the service manager is told this.
    fn wait_for(&self, name: &str) -> BTreeMap<String, String> {
        let begun = Instant::now();
        loop {
            let mut buffer = [0; 4096];
            let n_bytes = self.manager.recv(&mut buffer).unwrap_or_else(|error| panic!("no {name}: {error}"));
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
    assert!(stage.text(&["events"]).contains("one/0 is ready after "));
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
