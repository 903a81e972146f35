//! Workers that are processes, from the host's side.
//!
//! ```text
//! start: socketpair -- spawn `<exe> worker`, the socket as its stdin --> pidfd --> two threads
//!   link     bounded queue of encoded commands; kill is SIGKILL through the pidfd, as is drop
//!   writer   queue -> socket
//!   watcher  socket -> events, stderr -> log, pidfd -> the end; see `watch`
//! ```
//!
//! The child gets its socket as standard input, as a server of `inetd` does: that is the one descriptor that can be handed
//! down without a moment in which a process started by somebody else at the same time would inherit it, too. Everything
//! else is close-on-exec. It is in a process group of its own, so that Ctrl-C in a terminal reaches the host alone.

use super::child::{WORKER_ARG, WORKER_MARK};
use super::frame::{self, FrameError};
use super::handshake::{Hello, Version, append_greeting};
use super::main_loop::COMMANDS_MAX;
use super::share::Share;
use super::spawner::spawn;
use super::watch::{Watcher, reap};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use playhouse_actors::engine::{RequestError, RequestId};
use playhouse_actors::link::{LinkError, WorkerFactory, WorkerLink};
use playhouse_actors::messages::{WorkerCommand, WorkerEvent, WorkerSpec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Starts each worker as a process of its own.
#[derive(Debug, Clone)]
pub struct ProcessWorkers {
    exe: PathBuf,
    env: Vec<(OsString, OsString)>,
    share: Share,
}

impl ProcessWorkers {
    /// Workers that are `exe worker`; without a path, this very program, even if its file was replaced meanwhile.
    /// It must be the `playhouse` binary, or call [`run_if_worker`](super::run_if_worker) first in its main.
    pub fn new(exe: Option<PathBuf>) -> Self {
        let exe = exe.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
        Self { exe, env: Vec::new(), share: Share::default() }
    }

    /// Adds a variable to the workers' environment, which is otherwise the host's.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    pub(super) fn with_share(mut self, share: Share) -> Self {
        self.share = share;
        self
    }

    fn command(&self, socket: OwnedFd) -> Command {
        let mut command = Command::new(&self.exe);
        command.arg0("playhouse").arg(WORKER_ARG).env(WORKER_MARK, "1").envs(self.env.iter().cloned());
        command.stdin(Stdio::from(socket)).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        command
    }

    fn start_process(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<ProcessLink, StartError> {
        if std::env::var_os(WORKER_MARK).is_some() {
            return Err(StartError::IsWorker);
        }
        let share = self.share.take();
        let hello = Hello { host_pid: std::process::id(), threads: share.threads(), spec };
        let mut greeting = Vec::new();
        frame::encode_with(&mut greeting, 0, |payload| append_greeting(&Version::ours(), &hello, payload))?;

        let system = |what| move |errno: rustix::io::Errno| StartError::System { what, source: errno.into() };
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(system("a socket"))?;
        let exe = |source| StartError::Exe { exe: self.exe.clone(), source };
        let mut child = spawn(self.command(theirs)).map_err(exe)?;
        let stderr = child.stderr.take().map(OwnedFd::from);
        let pid = Pid::from_child(&child);
        // Reaped by the watcher, through the pidfd. The process is not waited for before, so the number is still its own.
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Arc::new(pidfd),
            Err(errno) => {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(system("a pidfd")(errno));
            }
        };

        let replica = hello.spec.replica.to_string();
        let (commands, queue) = bounded(COMMANDS_MAX);
        let (gone, watcher_gone) = bounded::<()>(0);
        let socket = Arc::new(socket);
        let link = ProcessLink { commands, pidfd: Arc::clone(&pidfd), pid: child.id() };
        let writer = Writer { socket: Arc::clone(&socket), queue, events: events.clone() };
        let named = |role: &str| std::thread::Builder::new().name(format!("{role} {replica}"));
        let thread = |source| {
            // The link is dropped, and with it the process; it must not stay as a zombie.
            let _ = pidfd_send_signal(&*pidfd, Signal::KILL);
            reap(&pidfd);
            StartError::System { what: "a thread", source }
        };
        let writing = named("write").spawn(move || writer.run(&greeting, &watcher_gone)).map_err(thread)?;
        let watcher = Watcher::new(hello.spec, self.exe.clone(), link.pid, socket, Arc::clone(&pidfd), stderr, events);
        named("watch").spawn(move || watcher.run(gone, writing, share)).map_err(thread)?;
        Ok(link)
    }
}

impl WorkerFactory for ProcessWorkers {
    fn start(&self, spec: WorkerSpec, events: mpsc::Sender<WorkerEvent>) -> Result<Box<dyn WorkerLink>, String> {
        match self.start_process(spec, events) {
            Ok(link) => Ok(Box::new(link)),
            Err(error) => Err(super::chain(&error)),
        }
    }
}

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(
        "this process was itself started as a worker and did not become one: call `playhouse::worker::run_if_worker()` \
         first in its main, or give the path of the `playhouse` binary"
    )]
    IsWorker,
    #[error("{} cannot be started", exe.display())]
    Exe { exe: PathBuf, source: std::io::Error },
    #[error("no {what} for a worker")]
    System { what: &'static str, source: std::io::Error },
    #[error("the worker's task cannot be sent")]
    Task(#[from] FrameError),
}

/// What waits to be written.
enum Outgoing {
    /// A whole frame.
    Frame(Vec<u8>),
    /// A request that no frame can hold.
    TooLong(RequestId, FrameError),
}

/// The host's hold on a worker process.
struct ProcessLink {
    commands: Sender<Outgoing>,
    pidfd: Arc<OwnedFd>,
    pid: u32,
}

impl WorkerLink for ProcessLink {
    fn send(&mut self, command: &WorkerCommand) -> Result<(), LinkError> {
        if self.commands.is_full() {
            // Nothing is encoded for a full queue. A frame of no bytes tells whether anybody empties it.
            let empty = self.commands.try_send(Outgoing::Frame(Vec::new()));
            return Err(if let Err(TrySendError::Disconnected(_)) = empty {
                LinkError::Closed
            } else {
                LinkError::Full
            });
        }
        let mut bytes = Vec::new();
        let outgoing = match (frame::encode(command, &mut bytes), command) {
            (Ok(()), _) => Outgoing::Frame(bytes),
            (Err(error), WorkerCommand::Submit(request)) => Outgoing::TooLong(request.id, error),
            (Err(error), WorkerCommand::Cancel(_) | WorkerCommand::Shutdown) => {
                unreachable!("a few bytes always fit a frame: {error}")
            }
        };
        self.commands.try_send(outgoing).map_err(|error| match error {
            TrySendError::Full(_) => LinkError::Full,
            TrySendError::Disconnected(_) => LinkError::Closed,
        })
    }

    fn kill(&mut self) {
        // It may have ended, and even be reaped: a pidfd never means another process.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }
}

impl Drop for ProcessLink {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The thread that writes.
struct Writer {
    socket: Arc<OwnedFd>,
    queue: Receiver<Outgoing>,
    events: mpsc::Sender<WorkerEvent>,
}

impl Writer {
    /// Writes until the link is dropped, the worker is gone, or the watcher says so.
    fn run(self, greeting: &[u8], watcher_gone: &Receiver<()>) {
        let mut open = frame::write(&*self.socket, greeting, &[]).is_ok();
        while open {
            open = select! {
                recv(self.queue) -> outgoing => outgoing.is_ok_and(|outgoing| self.write(outgoing)),
                recv(watcher_gone) -> _ => false,
            };
        }
    }

    fn write(&self, outgoing: Outgoing) -> bool {
        match outgoing {
            // What is wrong with the socket is the watcher's to find out.
            Outgoing::Frame(bytes) => frame::write(&*self.socket, &bytes, &[]).is_ok(),
            Outgoing::TooLong(id, error) => {
                let (param, found) = ("request".to_owned(), error.to_string());
                let expected = format!("at most {} bytes when encoded", frame::FRAME_MAX);
                let error = RequestError::InvalidParam { param, found, expected };
                self.events.blocking_send(WorkerEvent::Refused { id, error }).is_ok()
            }
        }
    }
}
