//! The thread that watches one worker process: greeting, events, stderr, and its end, which is told once and last.
//!
//! ```text
//! [Greeting] --Welcome fits--> [Listening] --the process ended, its last events are read--> [Reaped]: Exited
//!     |                            |                                                           ^
//!     | wrong version or device,   | a frame that is none, nobody reads the events             |
//!     | nothing in time            v                                                           |
//!     \------------------------> [Killed] ------------------------------------------------------/
//! ```

use super::frame::{self, Fill, FrameError, FrameReader, Wait};
use super::handshake::{HandshakeError, Opened, Version, Welcome, read_greeting};
use super::share::Taken;
use crossbeam_channel::Sender;
use playhouse_actors::messages::{WorkerEvent, WorkerSpec};
use playhouse_actors::policy::outcome::WorkerEnd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// For a process to greet. It has nothing to do before that but to start.
const GREETING_TIMEOUT: Duration = Duration::from_secs(30);
/// For a process to end after it closed its socket; then it is killed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// A longer line of stderr is cut.
const LINE_MAX: usize = 4096;

/// What the thread has.
pub(super) struct Watcher {
    spec: WorkerSpec,
    exe: PathBuf,
    socket: Arc<OwnedFd>,
    pidfd: Arc<OwnedFd>,
    log: Log,
    events: mpsc::Sender<WorkerEvent>,
    reader: FrameReader,
    greeted: bool,
    started: Instant,
}

/// What a look at the three descriptors found.
enum Seen {
    /// Bytes on the socket, or its end.
    Socket,
    /// The process has ended; bytes may be left on the socket.
    Ended,
    /// Neither: stderr, or a deadline.
    Other,
}

impl Watcher {
    pub(super) fn new(
        spec: WorkerSpec,
        exe: PathBuf,
        pid: u32,
        socket: Arc<OwnedFd>,
        pidfd: Arc<OwnedFd>,
        stderr: Option<OwnedFd>,
        events: mpsc::Sender<WorkerEvent>,
    ) -> Self {
        let log = Log::new(spec.replica.to_string(), pid, stderr);
        let (reader, started) = (FrameReader::default(), Instant::now());
        Self { spec, exe, socket, pidfd, log, events, reader, greeted: false, started }
    }

    /// Watches to the end. `gone` is dropped when nothing more can be written; `writing` is waited for, so that no thread
    /// outlives the worker.
    pub(super) fn run(mut self, gone: Sender<()>, writing: JoinHandle<()>, share: Taken) {
        let verdict = self.listen();
        if verdict.is_some() {
            self.kill();
        }
        self.await_exit();
        let exit = reap(&self.pidfd);
        drop(gone);
        // Wakes a writer that waits for room. The socket may be closed already.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        // A panic of the writer is in the log; the worker is gone either way.
        let _ = writing.join();
        self.log.finish();
        drop(share);
        let end = verdict.unwrap_or_else(|| self.end_of(exit));
        // Nobody may be interested any more.
        let _ = self.events.blocking_send(WorkerEvent::Exited(end));
    }

    /// How the process ended, as the host sees it. A status before the greeting is that of another program, or of one
    /// that the system could not run.
    fn end_of(&self, exit: WorkerEnd) -> WorkerEnd {
        match exit {
            WorkerEnd::Exited(status) if !self.greeted => {
                let (exe, last) = (self.exe.display(), self.log.last_words());
                WorkerEnd::NotStarted(format!("{exe} ended with status {status} before it greeted the host{last}"))
            }
            other => other,
        }
    }

    fn kill(&self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// Passes events on until the process has ended or closed its socket, or breaks the rules: then what it is to be
    /// killed for.
    fn listen(&mut self) -> Option<WorkerEnd> {
        let broken = |error: FrameError| Some(WorkerEnd::Protocol(error.to_string()));
        loop {
            match self.take() {
                Ok(true) => continue,
                Ok(false) => {}
                Err(verdict) => return Some(verdict),
            }
            match self.reader.fill(&*self.socket, Wait::No) {
                Ok(Fill::Data) => continue,
                Ok(Fill::Closed) => return None,
                Ok(Fill::Nothing) => {}
                // A process that is killed while it writes leaves a part of a frame.
                Err(FrameError::Truncated { .. }) if self.exits_soon() => return None,
                Err(error) => return broken(error),
            }
            match self.look() {
                Ok(Seen::Socket | Seen::Other) => {}
                Ok(Seen::Ended) => return self.read_the_rest(),
                Err(errno) => return broken(FrameError::Io(errno.into())),
            }
            if !self.greeted && self.started.elapsed() > GREETING_TIMEOUT {
                return Some(WorkerEnd::Protocol(format!(
                    "{} did not greet within {GREETING_TIMEOUT:?}; is it a worker? A host app calls \
                     `playhouse::worker::run_if_worker()` first in its main",
                    self.exe.display()
                )));
            }
        }
    }

    /// What a process that has ended said last.
    fn read_the_rest(&mut self) -> Option<WorkerEnd> {
        loop {
            match self.take() {
                Ok(true) => {}
                Ok(false) => match self.reader.fill(&*self.socket, Wait::No) {
                    Ok(Fill::Data) => {}
                    Ok(Fill::Closed | Fill::Nothing) | Err(FrameError::Truncated { .. }) => return None,
                    Err(error) => return Some(WorkerEnd::Protocol(error.to_string())),
                },
                Err(verdict) => return Some(verdict),
            }
        }
    }

    /// Handles one frame, if there is a whole one.
    fn take(&mut self) -> Result<bool, WorkerEnd> {
        let protocol = |error: HandshakeError| WorkerEnd::Protocol(super::chain(&error));
        let Some(frame) = self.reader.take().map_err(|error| protocol(error.into()))? else { return Ok(false) };
        if !self.greeted {
            let welcome: Welcome = read_greeting(&Version::ours(), frame.payload).map_err(protocol)?;
            self.greeted = true;
            return match welcome.device {
                Opened::Device(device) if device == self.spec.device => Ok(true),
                Opened::Device(device) => {
                    let wanted = &self.spec.device;
                    Err(WorkerEnd::WrongDevice(format!("the worker opened {device}, expected {wanted}")))
                }
                Opened::Refused(reason) => Err(WorkerEnd::WrongDevice(reason)),
            };
        }
        let event: WorkerEvent = frame::decode(frame.payload).map_err(|error| protocol(error.into()))?;
        if let WorkerEvent::Exited(_) = event {
            return Err(WorkerEnd::Protocol("a worker told its own end, which is the link's to tell".to_owned()));
        }
        // Nobody wants to know: the host gave the worker up.
        self.events.blocking_send(event).map(|()| true).map_err(|_| WorkerEnd::Asked)
    }

    /// Waits until there is something to read, the process has ended, or the greeting is late. Reads stderr meanwhile.
    fn look(&mut self) -> Result<Seen, Errno> {
        let wait = if self.greeted { None } else { Some(GREETING_TIMEOUT.saturating_sub(self.started.elapsed())) };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN),
        ];
        fds.extend(self.log.stderr.as_ref().map(|stderr| PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::IN)));
        wait_on(&mut fds, wait)?;
        let [socket, ended] = [0, 1].map(|index| !fds[index].revents().is_empty());
        let stderr = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
        if stderr {
            self.log.read();
        }
        Ok(match () {
            () if socket => Seen::Socket,
            () if ended => Seen::Ended,
            () => Seen::Other,
        })
    }

    fn exits_soon(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
        wait_on(&mut fds, Some(EXIT_TIMEOUT)).is_ok() && !fds[0].revents().is_empty()
    }

    /// Waits until the process has ended; kills it if that takes too long.
    fn await_exit(&mut self) {
        let mut deadline = Some(Instant::now() + EXIT_TIMEOUT);
        loop {
            let mut fds = vec![PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
            fds.extend(self.log.stderr.as_ref().map(|stderr| PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::IN)));
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if wait_on(&mut fds, left).is_err() || !fds[0].revents().is_empty() {
                // If it cannot be watched, reaping waits for it.
                return;
            }
            if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
                self.log.read();
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.kill();
                deadline = None;
            }
        }
    }
}

fn wait_on(fds: &mut [PollFd<'_>], wait: Option<Duration>) -> Result<(), Errno> {
    // A wait of more than years is one without end.
    let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
    match poll(fds, wait.as_ref()) {
        Ok(_) => Ok(()),
        Err(Errno::INTR) => {
            // Nothing is known; whoever asked looks again.
            fds.iter_mut().for_each(PollFd::clear_revents);
            Ok(())
        }
        Err(errno) => Err(errno),
    }
}

/// Waits for the process and takes its status; it is no zombie then.
pub(super) fn reap(pidfd: &OwnedFd) -> WorkerEnd {
    let status = rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
    match status {
        Ok(Some(status)) => end_of_status(&status),
        Ok(None) => WorkerEnd::Protocol("the system has no status of the worker".to_owned()),
        // Somebody else in this process waits for all children, or ignores SIGCHLD.
        Err(errno) => WorkerEnd::Protocol(format!("the worker's status was taken by somebody else: {errno}")),
    }
}

fn end_of_status(status: &WaitIdStatus) -> WorkerEnd {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(status), _) => WorkerEnd::Exited(status),
        (None, Some(signal)) => WorkerEnd::Signalled(signal),
        (None, None) => WorkerEnd::Protocol("the worker ended neither by itself nor by a signal".to_owned()),
    }
}

/// A worker's stderr, line by line into the host's log.
struct Log {
    replica: String,
    pid: u32,
    stderr: Option<OwnedFd>,
    line: Vec<u8>,
    last: String,
}

impl Log {
    fn new(replica: String, pid: u32, stderr: Option<OwnedFd>) -> Self {
        if let Some(stderr) = &stderr {
            // What is read after the end of the process must not wait for whoever else holds the pipe.
            let _ = rustix::io::ioctl_fionbio(stderr, true);
        }
        Self { replica, pid, stderr, line: Vec::new(), last: String::new() }
    }

    /// Reads once.
    fn read(&mut self) -> bool {
        let Some(stderr) = &self.stderr else { return false };
        let mut bytes = [0; LINE_MAX];
        match rustix::io::retry_on_intr(|| rustix::io::read(stderr, &mut bytes)) {
            Ok(0) => {
                self.stderr = None;
                false
            }
            Ok(n) => {
                self.take(&bytes[..n]);
                true
            }
            Err(Errno::AGAIN) => false,
            Err(_) => {
                self.stderr = None;
                false
            }
        }
    }

    /// Reads what is left when the process has ended.
    fn finish(&mut self) {
        while self.read() {}
        self.stderr = None;
        if !self.line.is_empty() {
            self.end_line();
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ if self.line.len() < LINE_MAX => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim().to_owned();
        let (replica, pid) = (self.replica.as_str(), self.pid);
        match line.split_once(' ') {
            _ if line.is_empty() => return,
            Some(("ERROR", words)) => tracing::error!(replica, pid, "{}", words.trim()),
            Some(("INFO", words)) => tracing::info!(replica, pid, "{}", words.trim()),
            Some(("DEBUG" | "TRACE", words)) => tracing::debug!(replica, pid, "{}", words.trim()),
            Some(("WARN", words)) => tracing::warn!(replica, pid, "{}", words.trim()),
            // Whatever writes to stderr without a level, such as a driver or a panic.
            _ => tracing::warn!(replica, pid, "{line}"),
        }
        self.last = line;
    }

    fn last_words(&self) -> String {
        if self.last.is_empty() { String::new() } else { format!("; its last words: {}", self.last) }
    }
}
