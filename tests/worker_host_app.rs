//! A host app that is not the `playhouse` binary: its workers are its own executable, by one line in its main. This
//! program is such an app, so it has a `main` of its own instead of test functions; started without arguments it checks
//! what needs one.

mod worker_support;

use playhouse::worker::{ProcessWorkers, ThreadWorkers};
use playhouse_actors::engine::RequestId;
use playhouse_actors::link::WorkerFactory;
use playhouse_actors::messages::{WorkerCommand, WorkerEvent, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_config::checked::Isolation;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getpgid, pidfd_open};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::sync::mpsc;
use worker_support::{Worker, is_step, request, spec, undisturbed};

/// Set for a run that leaves the one line out.
const FORGETS: &str = "HOST_APP_FORGETS";

fn main() {
    if std::env::var_os(FORGETS).is_none() {
        playhouse::worker::run_if_worker();
    }
    match std::env::args().nth(1).as_deref() {
        Some("parent") => parent(),
        Some("thread-panic") => thread_panic(),
        // What a worker of an app without the line is: the app again.
        Some("worker") => forgetful(),
        _ => checks(),
    }
}

fn checks() {
    let all: [(&str, fn()); 7] = [
        ("its_own_executable_is_its_worker", its_own_executable_is_its_worker),
        ("a_worker_has_nothing_of_its_hosts", a_worker_has_nothing_of_its_hosts),
        ("a_worker_outlives_the_thread_that_asked_for_it", a_worker_outlives_the_thread_that_asked_for_it),
        ("a_worker_dies_with_its_host", a_worker_dies_with_its_host),
        ("an_app_without_the_line_starts_no_apps", an_app_without_the_line_starts_no_apps),
        ("a_thread_that_panics_is_an_end", a_thread_that_panics_is_an_end),
        ("a_thread_ends_at_a_step_boundary", a_thread_ends_at_a_step_boundary),
    ];
    for (name, check) in all {
        check();
        println!("test {name} ... ok");
    }
}

fn its_own_executable_is_its_worker() {
    let mut worker = Worker::ready(&ProcessWorkers::new(None), spec());
    worker.submit(request(1, 12));
    assert_eq!(worker.transcript(1), undisturbed(&spec(), &[request(1, 12)]));
    let pid = worker.link.pid().unwrap();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(exe, std::env::current_exe().unwrap());
}

fn a_worker_has_nothing_of_its_hosts() {
    // Descriptors that this process has while the worker starts, the second one even for its children.
    let _file = std::fs::File::open("/proc/self/exe").unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let worker = Worker::ready(&ProcessWorkers::new(None), spec());
    let pid = worker.link.pid().unwrap();
    let mut targets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap().display().to_string())
        .map(|target| target.split(':').next().unwrap().to_owned())
        .collect();
    targets.sort();
    assert_eq!(targets, ["/dev/null", "/dev/null", "pipe", "socket"], "standard streams and the host's socket");
    let raw = Pid::from_raw(pid.cast_signed()).unwrap();
    assert_eq!(getpgid(Some(raw)).unwrap(), raw, "Ctrl-C in the host's terminal does not reach it");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

/// To the kernel a worker's parent is a thread, and this one ends.
fn a_worker_outlives_the_thread_that_asked_for_it() {
    let start = || Worker::start(&ProcessWorkers::new(None), spec());
    let mut worker = std::thread::spawn(start).join().unwrap();
    worker.await_ready();
    worker.submit(request(1, 5));
    assert_eq!(worker.transcript(1).len(), 1);
}

fn a_worker_dies_with_its_host() {
    for fault in ["", "hang-at-step=1"] {
        let (mut parent, line) = app("parent", fault);
        let worker = Pid::from_raw(line.trim().parse().expect("a pid")).unwrap();
        let pidfd = pidfd_open(worker, PidfdFlags::empty()).unwrap();
        assert!(!has_ended(&pidfd, Duration::ZERO));
        parent.kill().unwrap();
        assert!(has_ended(&pidfd, Duration::from_secs(1)), "with fault `{fault}`");
        parent.wait().unwrap();
    }
}

/// Starts a worker, gives it work, says its process, and waits for its own death.
fn parent() {
    let mut worker = Worker::ready(&ProcessWorkers::new(None), spec());
    worker.submit(request(1, 200));
    match std::env::var("PLAYHOUSE_FAULTS").as_deref() {
        Ok("hang-at-step=1") => {
            worker.until(|event| matches!(event, WorkerEvent::Heartbeat(beat) if beat.step_age.is_some()));
        }
        _ => drop(worker.until(is_step)),
    }
    println!("{}", worker.link.pid().unwrap());
    // The parent's end of this pipe stays open until it has killed us.
    let _ = std::io::stdin().read(&mut [0]);
}

/// This program again, with a role; and the first line it prints.
fn app(role: &str, faults: &str) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .arg(role)
        .env("PLAYHOUSE_FAULTS", faults)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, line)
}

fn has_ended(pidfd: &OwnedFd, wait: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::try_from(wait).unwrap())).unwrap() == 1
}

fn an_app_without_the_line_starts_no_apps() {
    let (_, end) = Worker::start(&ProcessWorkers::new(None).env(FORGETS, "1"), spec()).end();
    let WorkerEnd::NotStarted(reason) = end else { panic!("{end:?}") };
    assert!(reason.contains("ended with status 3") && reason.contains("run_if_worker()"), "{reason}");
}

fn forgetful() {
    let (sender, _events) = mpsc::channel(8);
    if let Err(reason) = ProcessWorkers::new(None).start(spec(), sender) {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "{reason}");
        std::process::exit(3);
    }
}

fn thread_spec() -> WorkerSpec {
    WorkerSpec { isolation: Isolation::Thread, ..spec() }
}

fn a_thread_that_panics_is_an_end() {
    let (mut child, line) = app("thread-panic", "panic-at-step=2");
    assert!(child.wait().unwrap().success(), "the host goes on");
    assert_eq!(line.trim(), format!("{:?}", WorkerEnd::Exited(70)));
}

fn thread_panic() {
    let mut worker = Worker::ready(&ThreadWorkers::new(), thread_spec());
    worker.submit(request(1, 10));
    println!("{:?}", worker.end().1);
}

fn a_thread_ends_at_a_step_boundary() {
    let mut worker = Worker::ready(&ThreadWorkers::new(), thread_spec());
    worker.submit(request(1, 240));
    worker.until(is_step);
    worker.link.kill();
    assert!(worker.link.send(&WorkerCommand::Cancel(RequestId(1))).is_err());
    let (events, end) = worker.end();
    assert_eq!(end, WorkerEnd::Exited(0));
    assert!(events.len() < 239, "not all of it was generated");
    // An idle one ends, too.
    let mut idle = Worker::ready(&ThreadWorkers::new(), thread_spec());
    idle.link.kill();
    assert_eq!(idle.end(), (vec![], WorkerEnd::Exited(0)));
}
