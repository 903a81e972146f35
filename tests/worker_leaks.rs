//! Workers come and go, and nothing of them stays: descriptors, threads, children. Alone in its program, because it counts
//! what the whole process has.

mod worker_support;

use playhouse::worker::Workers;
use playhouse_actors::link::WorkerFactory;
use playhouse_actors::messages::{WorkerCommand, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_config::checked::Isolation;
use std::time::Instant;
use worker_support::{DEADLINE, Worker, is_step, request, spec};

/// What a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    fds: usize,
    threads: usize,
    children: usize,
}

fn entries(path: &str) -> usize {
    std::fs::read_dir(path).unwrap().count()
}

/// Processes, zombies too, whose parent we are.
fn children() -> usize {
    let ours = format!("\nPPid:\t{}\n", std::process::id());
    let pids = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    // One that ended meanwhile has no status.
    pids.filter(|path| std::fs::read_to_string(path.join("status")).is_ok_and(|status| status.contains(&ours))).count()
}

fn held() -> Held {
    Held { fds: entries("/proc/self/fd"), threads: entries("/proc/self/task"), children: children() }
}

/// Waits until no more is held than before: a thread that told its last is still there for a moment.
fn settle(before: Held, isolation: Isolation) {
    let started = Instant::now();
    loop {
        let now = held();
        if now.fds <= before.fds && now.threads <= before.threads && now.children <= before.children {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "{isolation:?}: {before:?} before, {now:?} after");
        std::thread::yield_now();
    }
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Asked,
    Killed,
    Dropped,
    AtStart,
}

fn cycle(factory: &dyn WorkerFactory, isolation: Isolation, way: Way) {
    let mut worker = Worker::start(factory, WorkerSpec { isolation, ..spec() });
    if !matches!(way, Way::AtStart) {
        worker.await_ready();
        worker.submit(request(1, 200));
        worker.until(is_step);
    }
    match way {
        Way::Asked => worker.link.send(&WorkerCommand::Shutdown).unwrap(),
        Way::Killed | Way::AtStart => worker.link.kill(),
        Way::Dropped => {
            let Worker { link, mut events, .. } = worker;
            drop(link);
            while events.blocking_recv().is_some() {}
            return;
        }
    }
    let (_, end) = worker.end();
    let expected = match (way, isolation) {
        (Way::Asked, _) | (_, Isolation::Thread) => WorkerEnd::Exited(0),
        _ => WorkerEnd::Signalled(9),
    };
    assert_eq!(end, expected, "{way:?} {isolation:?}");
}

#[test]
fn fifty_workers_of_each_kind_leave_nothing() {
    let factory = Workers::new(Some(env!("CARGO_BIN_EXE_playhouse").into()));
    let ways = [Way::Asked, Way::Killed, Way::Dropped, Way::AtStart];
    for isolation in [Isolation::Process, Isolation::Thread] {
        // What stays once: the thread that starts processes, the sampler's pool.
        cycle(&factory, isolation, Way::Asked);
        let before = held();
        for way in ways.into_iter().cycle().take(50) {
            cycle(&factory, isolation, way);
        }
        settle(before, isolation);
    }
}
