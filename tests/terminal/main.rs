//! Commands that live in a terminal, on a real one: what a person sees, and that the terminal is theirs again afterwards.

mod pty;
mod screen;

use pty::{DEADLINE, Terminal};
use rustix::process::{Pid, Signal, kill_process};
use screen::Screen;
use serde_json::Value;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

fn playhouse() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
    command.env_clear().env("PATH", "/bin");
    command
}

/// A running `playhouse serve` on two simulated devices. Dropped, it is killed, and its workers with it.
struct Host {
    folder: tempfile::TempDir,
    child: Child,
}

impl Host {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let text = "[host]\naddress = \"127.0.0.1:0\"\n[supervision]\nheartbeat = \"100ms\"\n\
            [[model]]\nname = \"m\"\npath = \"embedded:basho\"\nreplicas = 2\n\
            [[simulate.device]]\nname = \"Card 0\"\nuuid = \"SIM-0\"\nvram = \"1GiB\"\n\
            [[simulate.device]]\nname = \"Card 1\"\nuuid = \"SIM-1\"\nvram = \"1GiB\"\n";
        std::fs::write(folder.path().join("house.toml"), text).expect("writable");
        let mut command = playhouse();
        command.arg("serve").arg(folder.path().join("house.toml")).arg("--admin-socket");
        command.arg(folder.path().join("admin.sock")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let host = Self { child: command.spawn().expect("the host starts"), folder };
        let begun = Instant::now();
        while host.ready_workers().len() < 2 {
            assert!(begun.elapsed() < DEADLINE, "the host does not get ready");
        }
        host
    }

    fn command(&self, name: &str) -> Command {
        let mut command = playhouse();
        command.arg(name).arg("--admin-socket").arg(self.folder.path().join("admin.sock"));
        command
    }

    /// The processes of the workers that are ready; none while the host does not answer.
    fn ready_workers(&self) -> Vec<u64> {
        let output = self.command("ps").arg("--json").output().expect("the binary runs");
        let Ok(ps) = serde_json::from_slice::<Value>(&output.stdout) else { return Vec::new() };
        let devices = ps["devices"].as_array().expect("a list").iter();
        let replicas = devices.flat_map(|device| device["replicas"].as_array().expect("a list"));
        replicas.filter(|replica| replica["phase"] == "ready").filter_map(|replica| replica["pid"].as_u64()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

#[test]
fn top_shows_devices_and_a_restart_and_leaves_the_terminal_as_it_was() {
    let host = Host::start();
    let mut command = host.command("top");
    command.args(["--interval", "100ms"]);
    let mut terminal = Terminal::run(command, 110, 40);
    terminal.until("the devices and replicas", |screen| {
        ["SIM-0", "SIM-1", "Card 0", "m/0", "m/1", "ready", "q quit"].iter().all(|words| screen.shows(words))
    });
    assert!(terminal.screen.is_alternate && !terminal.screen.has_cursor, "it has the screen to itself");
    let pid = Pid::from_raw(i32::try_from(host.ready_workers()[0]).expect("a process id")).expect("not 0");
    kill_process(pid, Signal::KILL).expect("it runs");
    terminal.until("the end of a worker and its restart", |screen| {
        screen.shows("ended by signal 9") && screen.shows("(start 2)")
    });
    terminal.press("?");
    terminal.until("the help", |screen| screen.shows("this help"));
    terminal.press("?");
    terminal.press("p");
    terminal.until("the pause", |screen| screen.shows("PAUSED"));
    terminal.press("q");
    assert_eq!(terminal.end().code(), Some(0));
    terminal.is_restored();
}

#[test]
fn top_says_when_its_host_is_gone_and_ctrl_c_leaves_it() {
    let mut host = Host::start();
    let mut command = host.command("top");
    command.args(["--interval", "100ms"]);
    let mut terminal = Terminal::run(command, 80, 24);
    terminal.until("the devices", |screen| screen.shows("SIM-0"));
    host.child.kill().and_then(|()| host.child.wait()).expect("it runs");
    terminal.until("the end of the host", |screen| screen.shows("no host answers at"));
    terminal.press("\x03");
    assert_eq!(terminal.end().code(), Some(0));
    terminal.is_restored();
}

#[test]
fn ctrl_c_stops_an_answer_and_not_the_conversation() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = playhouse();
    command.args(["run", "--chat", "--ignore-eos", "--seed", "7"]).env("XDG_STATE_HOME", folder.path());
    let mut terminal = Terminal::run(command, 100, 200);
    for asked in 1.. {
        // One line at a time: what is typed while none is read is lost when the terminal's settings change.
        terminal.until("the prompt", is_asking);
        terminal.press("autumn moon\r");
        // Not before: keys that are pressed while a line is read are read with it.
        terminal
            .until("the beginning of the answer", |screen| answer(screen, asked).is_some_and(|text| text.len() > 8));
        terminal.press("\x03");
        let is_over = |screen: &Screen| answer(screen, asked).is_some_and(|text| text.contains(" tokens/s; prompt "));
        terminal.until("the end of the answer", |screen| is_over(screen) && is_asking(screen));
        if terminal.screen.shows("; cancelled]") {
            break;
        }
        // An answer can be over before the key is pressed: then another question is asked.
        assert!(asked < 5, "no answer was stopped:\n{}", terminal.screen.text());
        terminal.press("/clear\r");
        terminal.until("the command", |screen| screen.text().matches("> /clear").count() == asked);
    }
    // The program goes on: it takes another line, and ends when it is told to.
    terminal.press("/help\r");
    terminal.until("the help", |screen| screen.shows("Ctrl-C stops an answer"));
    terminal.press("/exit\r");
    assert_eq!(terminal.end().code(), Some(0));
    terminal.is_restored();
}

/// Whether the last line is an empty prompt.
fn is_asking(screen: &Screen) -> bool {
    screen.text().trim_end().ends_with("\n>") || screen.text().trim_end() == ">"
}

/// What is on the screen below the `asked`-th question, without its spaces around.
fn answer(screen: &Screen, asked: usize) -> Option<String> {
    let text = screen.text();
    let (at, question) = text.match_indices("> autumn moon\n").nth(asked - 1)?;
    Some(text[at + question.len()..].trim().to_owned())
}
