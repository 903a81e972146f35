//! Workers as real processes of the real binary: what they do, and every way in which they end.

mod worker_support;

use playhouse::worker::frame::{self, FRAME_MAX, Fill, Frame, FrameReader, Wait};
use playhouse::worker::handshake::{
    HandshakeError, Hello, MAGIC, Opened, PROTOCOL, Version, Welcome, append_greeting, read_greeting,
};
use playhouse::worker::{ProcessWorkers, ThreadWorkers, Workers};
use playhouse_actors::engine::{EngineError, EngineEvent, LoadPhase, RequestError, RequestId};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::link::{LinkError, WorkerFactory};
use playhouse_actors::messages::{WorkerCommand, WorkerEvent, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_config::ModelSource;
use playhouse_config::checked::Isolation;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, test_kill_process};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use worker_support::{HEARTBEAT, Worker, is_step, processes, request, spec, undisturbed, with_faults};

fn pid_of(worker: &Worker) -> Pid {
    Pid::from_raw(worker.link.pid().expect("a process").cast_signed()).expect("not 0")
}

#[test]
fn a_worker_loads_and_says_that_it_is_ready() {
    let mut worker = Worker::start(&processes(), spec());
    let (phases, ready) = worker.await_ready();
    assert_eq!(phases.first(), Some(&LoadPhase::Open));
    assert_eq!(phases.last(), Some(&LoadPhase::Ready));
    assert_eq!(ready.pid, worker.link.pid());
    assert_eq!(ready.n_ctx, 256);
    assert!(ready.stats.weight_bytes > 0 && ready.stats.kv_bytes <= spec().kv_bytes);
    assert!(0 < ready.kv_min_bytes && ready.kv_min_bytes <= ready.stats.kv_bytes);
    worker.link.send(&WorkerCommand::Shutdown).unwrap();
    assert_eq!(worker.end(), (vec![], WorkerEnd::Exited(0)));
}

/// On every kind of worker, and where the host reads one event at a time.
#[test]
fn a_worker_generates_what_the_engine_generates() {
    let requests: Vec<_> = (1..=6).map(|id| request(id, 24)).collect();
    let expected = undisturbed(&spec(), &requests);
    assert_eq!(expected.len(), 6);
    let workers = Workers::new(Some(env!("CARGO_BIN_EXE_playhouse").into()));
    for isolation in [Isolation::Process, Isolation::Thread] {
        let mut worker = Worker::start_with_room(&workers, WorkerSpec { isolation, ..spec() }, 1);
        let (_, ready) = worker.await_ready();
        assert_eq!(ready.pid.is_some(), isolation == Isolation::Process);
        requests.iter().for_each(|request| worker.submit(request.clone()));
        assert_eq!(worker.transcript(requests.len()), expected, "{isolation:?}");
        worker.link.send(&WorkerCommand::Shutdown).unwrap();
        assert_eq!(worker.end().1, WorkerEnd::Exited(0));
    }
}

#[test]
fn a_request_resumed_in_another_worker_goes_on_with_the_same_tokens() {
    let whole = undisturbed(&spec(), &[request(2, 20)]);
    let (tokens, end) = &whole[&RequestId(2)];
    let ids = tokens.iter().map(|event| match event {
        EngineEvent::Token { token, .. } => *token,
        other => panic!("{other:?}"),
    });
    let mut resumed = request(2, 20);
    resumed.emitted = ids.take(7).collect();
    let mut worker = Worker::ready(&processes(), spec());
    worker.submit(resumed);
    let transcript = worker.transcript(1);
    let (rest, rest_end) = &transcript[&RequestId(2)];
    assert_eq!(rest, &tokens[7..]);
    assert_eq!(rest_end.map(|(reason, _)| reason), end.map(|(reason, _)| reason));
}

#[test]
fn a_cancelled_request_ends_and_a_refused_one_never_begins() {
    let mut worker = Worker::ready(&with_faults("slow-step=5"), spec());
    worker.submit(request(1, 200));
    worker.submit(request(1, 200));
    let events = worker.until(|event| matches!(event, WorkerEvent::Refused { .. }));
    let Some(WorkerEvent::Refused { id, error }) = events.last() else { panic!("{events:?}") };
    assert_eq!((*id, error), (RequestId(1), &RequestError::DuplicateId(RequestId(1))));
    worker.link.send(&WorkerCommand::Cancel(RequestId(1))).unwrap();
    let ended = |event: &WorkerEvent| match event {
        WorkerEvent::Step(events) => events.iter().any(|event| matches!(event, EngineEvent::Finished { .. })),
        _ => false,
    };
    worker.until(ended);
    // Its blocks are free: the heartbeat after it says so.
    worker.until(|event| matches!(event, WorkerEvent::Heartbeat(beat) if beat.stats.running == 0));
}

#[test]
fn a_killed_worker_is_reaped_and_its_end_told_once() {
    let mut worker = Worker::ready(&with_faults("slow-step=5"), spec());
    worker.submit(request(1, 200));
    worker.until(is_step);
    let pid = pid_of(&worker);
    kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(worker.end().1, WorkerEnd::Signalled(9));
    assert!(test_kill_process(pid).is_err(), "no zombie is left when the end is told");
}

#[test]
fn dropping_the_link_ends_the_process() {
    let worker = Worker::ready(&processes(), spec());
    let pid = pid_of(&worker);
    let Worker { link, mut events, .. } = worker;
    drop(link);
    let mut last = None;
    while let Some(event) = events.blocking_recv() {
        last = Some(event);
    }
    assert_eq!(last, Some(WorkerEvent::Exited(WorkerEnd::Signalled(9))));
    assert!(test_kill_process(pid).is_err());
}

#[test]
fn a_host_that_reads_no_more_ends_the_process() {
    let mut worker = Worker::ready(&processes(), spec());
    let pidfd = pidfd_open(pid_of(&worker), PidfdFlags::empty()).unwrap();
    worker.events.close();
    // The next heartbeat finds nobody.
    assert!(has_ended(&pidfd, worker_support::DEADLINE));
}

#[test]
fn a_stopped_worker_is_silent_and_a_killed_one_is_gone() {
    let mut worker = Worker::ready(&processes(), spec());
    let pid = pid_of(&worker);
    kill_process(pid, Signal::STOP).unwrap();
    // What it had said before is read first; then nothing comes for many heartbeats.
    let started = Instant::now();
    while worker.next_within(10 * HEARTBEAT).is_ok() {
        assert!(started.elapsed() < worker_support::DEADLINE, "a stopped worker speaks");
    }
    kill_process(pid, Signal::CONT).unwrap();
    worker.until(|event| matches!(event, WorkerEvent::Heartbeat(_)));
    kill_process(pid, Signal::STOP).unwrap();
    worker.link.kill();
    assert_eq!(worker.end().1, WorkerEnd::Signalled(9));
}

#[test]
fn a_stuck_step_is_told_while_it_is_stuck() {
    let mut worker = Worker::ready(&with_faults("hang-at-step=2"), spec());
    worker.submit(request(1, 10));
    let long = |event: &WorkerEvent| match event {
        WorkerEvent::Heartbeat(beat) => beat.step_age.is_some_and(|age| age > 5 * HEARTBEAT),
        _ => false,
    };
    worker.until(long);
    worker.link.kill();
    assert_eq!(worker.end().1, WorkerEnd::Signalled(9));
}

#[test]
fn a_worker_that_is_never_ready_still_gives_signs_of_life() {
    let mut worker = Worker::start(&with_faults("never-ready"), spec());
    for _ in 0..3 {
        worker.until(|event| matches!(event, WorkerEvent::Heartbeat(beat) if beat.step_age.is_none()));
    }
    worker.link.kill();
    assert_eq!(worker.end(), (vec![], WorkerEnd::Signalled(9)));
}

#[test]
fn exits_are_told_as_they_were() {
    let check = |fault: &str, expected: WorkerEnd| {
        let mut worker = Worker::ready(&with_faults(fault), spec());
        worker.submit(request(1, 10));
        let (events, end) = worker.end();
        assert_eq!(end, expected, "{fault}");
        let tokens = events.iter().filter(|event| is_step(event)).count();
        assert_eq!(tokens, 2, "{fault}: what it said before is delivered");
        events
    };
    check("exit-at-step=3:3", WorkerEnd::Exited(3));
    check("panic-at-step=3", WorkerEnd::Exited(70));
    let events = check("device-lost-at-step=3", WorkerEnd::Exited(70));
    assert!(matches!(events.last(), Some(WorkerEvent::Failed(EngineError::DeviceLost { .. }))), "{events:?}");
}

#[test]
fn a_shutdown_ends_a_worker_that_has_work() {
    let mut worker = Worker::ready(&with_faults("slow-step=5"), spec());
    worker.submit(request(1, 200));
    worker.until(is_step);
    worker.link.send(&WorkerCommand::Shutdown).unwrap();
    assert_eq!(worker.end().1, WorkerEnd::Exited(0));
}

#[test]
fn out_of_memory_at_load_says_so_and_exits_75() {
    let (events, end) = Worker::start(&with_faults("oom-at-load"), spec()).end();
    assert!(
        matches!(events.as_slice(), [WorkerEvent::Failed(EngineError::OutOfMemory { requested, free, .. })] if requested > free)
    );
    assert_eq!(end, WorkerEnd::Exited(75));
}

#[test]
fn out_of_memory_once_in_a_step_costs_nothing() {
    let requests = [request(1, 20)];
    let mut worker = Worker::ready(&with_faults("oom-at-step=4"), spec());
    // Leaves blocks in the prefix cache: they are what is given up.
    worker.submit(request(3, 3));
    worker.transcript(1);
    worker.submit(request(1, 20));
    assert_eq!(worker.transcript(1), undisturbed(&spec(), &requests));
}

#[test]
fn out_of_memory_in_steps_refuses_the_youngest_and_ends_with_the_last() {
    let mut worker = Worker::ready(&with_faults("oom-from-step=6"), spec());
    for id in 1..=3 {
        worker.submit(request(id, 100));
    }
    let (events, end) = worker.end();
    let refused: Vec<u64> = events
        .iter()
        .filter_map(|event| if let WorkerEvent::Step(events) = event { Some(events) } else { None })
        .flatten()
        .filter_map(|event| match event {
            EngineEvent::Failed { id, error: RequestError::OutOfMemory(_) } => Some(id.0),
            EngineEvent::Token { .. } => None,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(refused, [3, 2], "the youngest first, and not the last one");
    assert!(matches!(events.last(), Some(WorkerEvent::Failed(EngineError::OutOfMemory { .. }))), "{events:?}");
    assert_eq!(end, WorkerEnd::Exited(75));
}

#[test]
fn a_model_that_cannot_be_loaded_says_why_and_exits_65() {
    let folder = tempfile::tempdir().unwrap();
    let damaged = folder.path().join("damaged.gguf");
    std::fs::write(&damaged, b"GGUF, or is it").unwrap();
    let file = |path: &std::path::Path| WorkerSpec { source: ModelSource::File(path.to_owned()), ..spec() };
    let cases = [
        (file(&folder.path().join("missing.gguf")), "missing.gguf"),
        (file(&damaged), "damaged.gguf"),
        (WorkerSpec { context: Some(1 << 30), ..spec() }, "context is 1073741824, expected 1 to"),
        (WorkerSpec { kv_bytes: 1, ..spec() }, "1 bytes for KV are less than"),
    ];
    for (spec, words) in cases {
        let (events, end) = Worker::start(&processes(), spec).end();
        let [WorkerEvent::Failed(EngineError::BadModel(reason))] = events.as_slice() else { panic!("{events:?}") };
        assert!(reason.contains(words), "{reason}");
        assert_eq!(end, WorkerEnd::Exited(65));
    }
}

#[test]
fn another_device_than_the_configured_one_is_refused() {
    let wrong = |factory: &dyn WorkerFactory, device: &str| {
        let spec = WorkerSpec { device: DeviceId::gpu(device), ..spec() };
        let (events, end) = Worker::start(factory, spec).end();
        assert!(events.is_empty(), "{events:?}");
        let WorkerEnd::WrongDevice(reason) = end else { panic!("{end:?}") };
        assert!(reason.contains(device), "{reason}");
        reason
    };
    assert!(wrong(&processes(), "TPU-1").contains("expected `cpu`"));
    assert!(wrong(&ThreadWorkers::new(), "TPU-1").contains("expected `cpu`"));
    // The worker opened a device, and it is not the one.
    assert_eq!(wrong(&with_faults("other-device"), "SIM-1"), "the worker opened SIM-other, expected SIM-1");
    // No box has this one.
    wrong(&processes(), "GPU-00000000-0000-0000-0000-000000000000");
}

#[test]
fn simulated_devices_run_on_the_cpu() {
    let spec = WorkerSpec { device: DeviceId::gpu("SIM-3"), ..spec() };
    let mut worker = Worker::ready(&processes(), spec.clone());
    worker.submit(request(1, 5));
    assert_eq!(worker.transcript(1), undisturbed(&spec, &[request(1, 5)]));
}

#[test]
fn a_worker_of_another_version_is_refused_by_the_host() {
    let (events, end) = Worker::start(&with_faults("protocol=99"), spec()).end();
    assert!(events.is_empty(), "{events:?}");
    let WorkerEnd::Protocol(reason) = end else { panic!("{end:?}") };
    assert!(reason.contains(&format!("protocol {PROTOCOL} of build")), "{reason}");
    assert!(reason.contains("protocol 99 of build"), "{reason}");
}

#[test]
fn programs_that_are_no_workers_are_told_from_workers() {
    let missing = ProcessWorkers::new(Some("/no/such/playhouse".into()));
    let (sender, mut events) = mpsc::channel(8);
    let error = missing.start(spec(), sender).err().unwrap();
    assert!(error.contains("/no/such/playhouse") && error.contains("No such file"), "{error}");
    assert_eq!(events.blocking_recv(), None, "no event is sent");

    let exits = ProcessWorkers::new(Some("/bin/false".into()));
    let (_, end) = Worker::start(&exits, spec()).end();
    let WorkerEnd::NotStarted(reason) = end else { panic!("{end:?}") };
    assert!(reason.contains("/bin/false ended with status 1"), "{reason}");

    // Says back what it hears: the host's own greeting is not a worker's.
    let echo = ProcessWorkers::new(Some("/bin/cat".into()));
    let (_, end) = Worker::start(&echo, spec()).end();
    assert!(matches!(end, WorkerEnd::NotStarted(_) | WorkerEnd::Protocol(_)), "{end:?}");
}

#[test]
fn a_queue_that_is_full_says_so_and_a_dead_worker_is_closed() {
    let mut worker = Worker::ready(&processes(), spec());
    let pid = pid_of(&worker);
    kill_process(pid, Signal::STOP).unwrap();
    let mut big = request(1, 1);
    big.prompt = vec![300; 1 << 18];
    let full = (0..100).map(|_| worker.link.send(&WorkerCommand::Submit(big.clone()))).find(Result::is_err);
    assert_eq!(full, Some(Err(LinkError::Full)));
    worker.link.kill();
    while !matches!(worker.next(), Some(WorkerEvent::Exited(_))) {}
    assert_eq!(worker.link.send(&WorkerCommand::Cancel(RequestId(1))), Err(LinkError::Closed));
}

#[test]
fn a_request_that_no_frame_holds_is_refused_and_others_go_on() {
    let mut worker = Worker::ready(&processes(), spec());
    let mut huge = request(9, 1);
    huge.prompt = vec![u32::MAX; FRAME_MAX / 5 + 1];
    worker.submit(huge);
    let events = worker.until(|event| matches!(event, WorkerEvent::Refused { .. }));
    let Some(WorkerEvent::Refused { id: RequestId(9), error: RequestError::InvalidParam { .. } }) = events.last()
    else {
        panic!("{events:?}")
    };
    worker.submit(request(1, 5));
    assert_eq!(worker.transcript(1), undisturbed(&spec(), &[request(1, 5)]));
}

// --- a host by hand ----------------------------------------------------------------------------------------------------

/// A worker process, and this test at the other end of its socket.
struct ByHand {
    child: Child,
    pidfd: OwnedFd,
    socket: OwnedFd,
    reader: FrameReader,
}

impl ByHand {
    fn start(faults: &str) -> Self {
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_playhouse"))
            .arg("worker")
            .env("PLAYHOUSE_WORKER", "1")
            .env("PLAYHOUSE_FAULTS", faults)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        Self { child, pidfd, socket, reader: FrameReader::default() }
    }

    fn greet(&self, version: &Version) {
        let hello = Hello { host_pid: std::process::id(), threads: 1, spec: spec() };
        let mut bytes = Vec::new();
        frame::encode_with(&mut bytes, 0, |payload| append_greeting(version, &hello, payload)).unwrap();
        frame::write(&self.socket, &bytes, &[]).unwrap();
    }

    /// The payload of the next frame.
    fn read(&mut self) -> Vec<u8> {
        loop {
            if let Some(Frame { payload, .. }) = self.reader.take().unwrap() {
                return payload.to_vec();
            }
            assert_eq!(self.reader.fill(&self.socket, Wait::Yes).unwrap(), Fill::Data);
        }
    }

    fn event(&mut self) -> WorkerEvent {
        frame::decode(&self.read()).unwrap()
    }

    /// Greeted, loaded, ready.
    fn ready(faults: &str) -> Self {
        let mut worker = Self::start(faults);
        worker.greet(&Version::ours());
        let welcome: Welcome = read_greeting(&Version::ours(), &worker.read()).unwrap();
        assert_eq!(welcome, Welcome { pid: worker.child.id(), device: Opened::Device(DeviceId::cpu()) });
        while !matches!(worker.event(), WorkerEvent::Ready(_)) {}
        worker
    }

    /// Its end within `wait`, and its stderr.
    fn end(mut self, wait: Duration) -> (ExitStatus, String) {
        assert!(has_ended(&self.pidfd, wait), "still there after {wait:?}");
        let status = self.child.wait().unwrap();
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        (status, stderr)
    }

    /// Closes the socket.
    fn hang_up(&mut self) {
        let (other, _) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        self.socket = other;
    }
}

fn has_ended(pidfd: &OwnedFd, wait: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::try_from(wait).unwrap())).unwrap() == 1
}

const ONE_SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_closed_socket_ends_an_idle_worker() {
    use std::os::unix::process::ExitStatusExt;
    let mut worker = ByHand::ready("");
    worker.hang_up();
    let (status, stderr) = worker.end(ONE_SECOND);
    assert_eq!((status.code(), status.signal()), (Some(0), None), "{stderr}");
}

#[test]
fn a_closed_socket_ends_a_worker_that_is_stuck_in_a_step() {
    use std::os::unix::process::ExitStatusExt;
    let mut worker = ByHand::ready("hang-at-step=1");
    let mut bytes = Vec::new();
    frame::encode(&WorkerCommand::Submit(request(1, 5)), &mut bytes).unwrap();
    frame::write(&worker.socket, &bytes, &[]).unwrap();
    while !matches!(worker.event(), WorkerEvent::Heartbeat(beat) if beat.step_age.is_some()) {}
    worker.hang_up();
    let (status, stderr) = worker.end(ONE_SECOND);
    assert_eq!(status.signal(), Some(9), "{stderr}");
}

#[test]
fn a_host_of_another_version_is_refused_by_the_worker() {
    let mut worker = ByHand::start("");
    let other = Version { protocol: PROTOCOL + 1, build: "0.0.9".into() };
    worker.greet(&other);
    let Err(HandshakeError::Version { ours, theirs }) = read_greeting::<Welcome>(&other, &worker.read()) else {
        panic!("the worker says who it is")
    };
    assert_eq!((ours, theirs), (other, Version::ours()));
    let (status, stderr) = worker.end(worker_support::DEADLINE);
    assert_eq!(status.code(), Some(70));
    assert!(stderr.contains("0.0.9") && stderr.contains(&Version::ours().to_string()), "{stderr}");
}

#[test]
fn a_host_that_is_no_host_is_refused() {
    let worker = ByHand::start("");
    let mut bytes = Vec::new();
    frame::encode(&"GET / HTTP/1.1", &mut bytes).unwrap();
    frame::write(&worker.socket, &bytes, &[]).unwrap();
    let (status, stderr) = worker.end(worker_support::DEADLINE);
    assert_eq!(status.code(), Some(70));
    assert!(stderr.contains(&format!("expected {MAGIC:02x?}")), "{stderr}");
}

#[test]
fn a_frame_over_the_cap_ends_the_worker() {
    let worker = ByHand::ready("");
    let mut header = u32::try_from(FRAME_MAX + 1).unwrap().to_le_bytes().to_vec();
    header.extend([0; 4]);
    frame::write(&worker.socket, &header, &[]).unwrap();
    let (status, stderr) = worker.end(worker_support::DEADLINE);
    assert_eq!(status.code(), Some(70));
    assert!(stderr.contains(&format!("{} bytes, expected at most {FRAME_MAX}", FRAME_MAX + 1)), "{stderr}");
}

#[test]
fn a_command_that_is_none_ends_the_worker() {
    let worker = ByHand::ready("");
    let mut bytes = Vec::new();
    frame::encode(&77u8, &mut bytes).unwrap();
    frame::write(&worker.socket, &bytes, &[]).unwrap();
    let (status, stderr) = worker.end(worker_support::DEADLINE);
    assert_eq!(status.code(), Some(70));
    assert!(stderr.contains("not WorkerCommand"), "{stderr}");
}

#[test]
fn a_person_who_types_playhouse_worker_is_told_what_it_is() {
    let output = Command::new(env!("CARGO_BIN_EXE_playhouse")).arg("worker").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("started by"));
}
