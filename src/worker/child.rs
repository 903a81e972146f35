//! A worker process from the inside: greet, then run the main loop between two ends of a socket.
//!
//! | thread | does |
//! |---|---|
//! | main | owns the engine: [`main_loop`](super::main_loop) |
//! | `commands` | reads the socket into the bounded channel of commands |
//! | `heartbeat` | writes heartbeats |
//! | `hangup` | ends the process when the socket closes, at the latest after [`GRACE`] whatever the engine does |
//!
//! The death of the host ends the process in two ways at once: the kernel sends SIGKILL (PDEATHSIG), and the socket closes.

use super::frame::{self, FrameError, FrameReader, Wait};
use super::handshake::{HandshakeError, Hello, Opened, Version, Welcome, append_greeting, read_greeting};
use super::load::open_device;
use super::main_loop::{COMMANDS_MAX, EXIT_SOFTWARE, End, Host, HostGone, Task, run};
use crossbeam_channel::{Receiver, Sender, bounded};
use playhouse_actors::messages::{WorkerCommand, WorkerEvent};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, Signal};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The environment variable that says: this process was started as a worker.
pub(super) const WORKER_MARK: &str = "PLAYHOUSE_WORKER";
/// The first argument of a worker.
pub(super) const WORKER_ARG: &str = "worker";
/// How long the engine may take to end after the socket was closed; then the process is killed.
const GRACE: Duration = Duration::from_millis(700);

/// Runs the worker at the end of `socket` until the host ends it; the status says why. For a program that opened the
/// socket itself; [`run_if_worker`] is the usual way.
pub fn run_worker(socket: OwnedFd) -> ExitCode {
    // A worker's statuses are below 256.
    u8::try_from(status_of(socket)).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Makes this process a worker if it was started as one, and does not return then. Otherwise it returns at once.
///
/// A program that uses Playhouse with `isolation = "process"`, and is not the `playhouse` binary, calls this first in its
/// `main`: its workers are started from its own executable.
///
/// ```no_run
/// // First in main:
/// playhouse::worker::run_if_worker();
/// // ... the program
/// ```
pub fn run_if_worker() {
    let started_as_worker =
        std::env::args_os().nth(1).is_some_and(|first| first == WORKER_ARG) && std::env::var_os(WORKER_MARK).is_some();
    if !started_as_worker {
        return;
    }
    close_inherited();
    let status = match take_stdin() {
        Ok(socket) => status_of(socket),
        Err(error) => {
            complain(&format!("standard input is not the host's socket: {error}"));
            EXIT_SOFTWARE
        }
    };
    std::process::exit(status);
}

/// Closes what came down besides the standard streams: descriptors that the host inherited itself and did not mark
/// close-on-exec, such as a listening socket from systemd, which a worker would keep open when the host is gone.
fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<i32> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers {
        // The listing itself had one of them, which is closed by now.
        let is_open = std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
        if number > 2 && is_open {
            // SAFETY: this is the first thing that the program does, on its only thread: the descriptor is open, and nothing
            // in this process owns it.
            unsafe { rustix::io::close(number) };
        }
    }
}

/// The socket that the host gave as standard input, which becomes `/dev/null`: nothing else in this process may read it.
fn take_stdin() -> std::io::Result<OwnedFd> {
    let stdin = std::io::stdin();
    // Fails for what is no socket.
    rustix::net::sockopt::socket_type(&stdin)?;
    let socket = rustix::io::fcntl_dupfd_cloexec(&stdin, 3)?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    Ok(socket)
}

/// For the host's log, which gets this process's stderr line by line.
fn complain(words: &str) {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr().lock(), "ERROR {words}");
}

fn status_of(socket: OwnedFd) -> i32 {
    prepare();
    let end = match serve(Arc::new(socket)) {
        Ok(end) => end,
        Err(error) => End::Broken(error.to_string()),
    };
    match &end {
        End::Asked | End::HostGone => {}
        End::WrongDevice(reason) | End::Broken(reason) => complain(reason),
        End::Failed(error) => complain(&error.to_string()),
    }
    end.status()
}

/// What holds for every worker process. None of it is worth failing for: the closed socket ends a worker, too.
fn prepare() {
    // Sent when the thread that started us ends; the host starts all workers from one that lives as long as it does.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // A core would hold the weights.
    let _ = rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).without_time();
    // A host app's main may have set another up.
    let _ = log.with_max_level(tracing::Level::INFO).try_init();
}

fn serve(socket: Arc<OwnedFd>) -> Result<End, HandshakeError> {
    let mut reader = FrameReader::default();
    let ours = Version::ours();
    let hello = match read_hello(&socket, &mut reader, &ours) {
        Ok(hello) => hello,
        Err(error) => {
            // So that the host can say whom it met. The answer to whoever is no host at all does no harm.
            let refused = Welcome { pid: std::process::id(), device: Opened::Refused(error.to_string()) };
            let _ = greet(&socket, &ours, &refused);
            return Err(error);
        }
    };
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().cast_unsigned());
    if parent != Some(hello.host_pid) {
        // It died before PDEATHSIG was set.
        return Ok(End::HostGone);
    }
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    let ours = faulty_version(ours, &hello);
    let opened = match open_device(&hello.spec.device) {
        #[cfg(any(debug_assertions, feature = "fault-injection"))]
        Ok(_) if has_fault(&hello, super::fault::Fault::OtherDevice) => {
            Opened::Device(playhouse_actors::inventory::DeviceId::gpu("SIM-other"))
        }
        Ok(device) => Opened::Device(device),
        Err(error) => Opened::Refused(error.to_string()),
    };
    greet(&socket, &ours, &Welcome { pid: std::process::id(), device: opened.clone() })?;
    match opened {
        Opened::Refused(reason) => Ok(End::WrongDevice(reason)),
        Opened::Device(_) => Ok(converse(socket, reader, hello)),
    }
}

#[cfg(any(debug_assertions, feature = "fault-injection"))]
fn has_fault(hello: &Hello, fault: super::fault::Fault) -> bool {
    super::fault::Faults::of(&hello.spec).has(fault)
}

#[cfg(any(debug_assertions, feature = "fault-injection"))]
fn faulty_version(ours: Version, hello: &Hello) -> Version {
    if has_fault(hello, super::fault::Fault::NeverGreet) {
        super::fault::hang();
    }
    let protocol = super::fault::Faults::of(&hello.spec).protocol().unwrap_or(ours.protocol);
    Version { protocol, ..ours }
}

fn read_hello(socket: &OwnedFd, reader: &mut FrameReader, ours: &Version) -> Result<Hello, HandshakeError> {
    loop {
        if let Some(frame) = reader.take()? {
            return read_greeting(ours, frame.payload);
        }
        if reader.fill(socket, Wait::Yes)? == frame::Fill::Closed {
            return Err(HandshakeError::Closed);
        }
    }
}

fn greet(socket: &OwnedFd, ours: &Version, welcome: &Welcome) -> Result<(), FrameError> {
    let mut bytes = Vec::new();
    frame::encode_with(&mut bytes, 0, |payload| append_greeting(ours, welcome, payload))?;
    frame::write(socket, &bytes, &[])
}

/// Events as frames on the socket.
struct SocketHost {
    socket: Arc<OwnedFd>,
    /// The frame in the making, kept for its memory; held while it is written, so that frames stay whole.
    buffer: Mutex<Vec<u8>>,
}

impl Host for SocketHost {
    fn tell(&self, event: WorkerEvent) -> Result<(), HostGone> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.clear();
        let written = frame::encode(&event, &mut buffer).and_then(|()| frame::write(&*self.socket, &buffer, &[]));
        written.map_err(|error| {
            if !matches!(error, FrameError::Closed) {
                complain(&format!("an event could not be sent: {error}"));
            }
            HostGone
        })
    }
}

fn converse(socket: Arc<OwnedFd>, reader: FrameReader, hello: Hello) -> End {
    let (sender, commands) = bounded(COMMANDS_MAX);
    let stop = Arc::new(AtomicBool::new(false));
    let broken = Arc::new(Mutex::new(None));
    // Dropped when the engine has ended.
    let (alive, ended) = bounded::<()>(0);
    let started = start_thread("commands", {
        let (socket, broken) = (Arc::clone(&socket), Arc::clone(&broken));
        move || {
            let result = read_commands(&socket, reader, &sender);
            *broken.lock().unwrap_or_else(PoisonError::into_inner) = result.err();
        }
    })
    .and_then(|()| {
        start_thread("hangup", {
            let (socket, stop) = (Arc::clone(&socket), Arc::clone(&stop));
            move || await_hangup(&socket, &stop, &ended)
        })
    });
    if let Err(error) = started {
        return End::Broken(format!("no thread: {error}"));
    }
    let threads = hello.threads.max(1) as usize;
    // Rows of logits are sampled on it. A host app may have made one before.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    let host = Arc::new(SocketHost { socket, buffer: Mutex::default() });
    let end = run(Task { spec: hello.spec, threads, pid: Some(std::process::id()), commands, host, stop });
    drop(alive);
    let broken = broken.lock().unwrap_or_else(PoisonError::into_inner).take();
    match (end, broken) {
        (End::HostGone, Some(error)) => End::Broken(format!("the host's commands cannot be read: {error}")),
        (end, _) => end,
    }
}

fn start_thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}

/// Hands commands on until the socket closes or the engine ends. The channel closes with it, which ends the engine.
fn read_commands(
    socket: &OwnedFd,
    mut reader: FrameReader,
    commands: &Sender<WorkerCommand>,
) -> Result<(), FrameError> {
    while let Some((command, _)) = reader.read::<WorkerCommand>(socket)? {
        if commands.send(command).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Sees that the process ends within a second when the socket closes, even if the engine is stuck in a step, and even if
/// commands that were sent before are not read yet.
fn await_hangup(socket: &OwnedFd, stop: &AtomicBool, ended: &Receiver<()>) {
    let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    loop {
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)];
        match poll(&mut fds, None) {
            Ok(_) if fds[0].revents().intersects(closed) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Without a way to watch it, the reader of commands still sees the end of the socket.
            Err(_) => return,
        }
    }
    stop.store(true, Ordering::Relaxed);
    if ended.recv_timeout(GRACE) == Err(crossbeam_channel::RecvTimeoutError::Timeout) {
        complain("the host is gone and the engine does not end: killed");
        // No destructor and no exit handler may wait for the device.
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    }
}
