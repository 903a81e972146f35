//! Asks a running host over its admin socket. Blocking, with timeouts: what commands need.

use super::protocol::{ANSWER_BYTES_MAX, Answer, Failure, HostInfo, Outcome, Reloaded, Reply, Request, Restarted};
use playhouse_actors::inventory::Device;
use playhouse_actors::{Drained, HouseStatus, Stamped};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For a host to take a request, and to answer one that needs no waiting: longer than the tree may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(25);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no host answers at {}; is one running, and is this its admin socket?", path.display())]
    NoHost {
        /// The socket.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The socket may not be used.
    #[error("the admin socket {} belongs to somebody else: its host answers its own user and root", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// It took too long.
    #[error("the host at {} does not answer; it may be stopped or stuck", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// The connection ended before the answer.
    #[error("the host at {} hung up", path.display())]
    HungUp {
        /// The socket.
        path: PathBuf,
    },
    /// What came is no answer to what was asked.
    #[error("the host at {} answered what is no answer: {what}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The host says no.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// A connection to a host.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the host at `path`.
    ///
    /// # Errors
    /// [`ClientError::NoHost`], [`ClientError::Denied`], [`ClientError::Silent`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connected = || -> rustix::io::Result<UnixStream> {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // Counts for connecting, too: the queue of a stopped host fills up.
            set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
            set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(UnixStream::from(socket))
        };
        let stream = connected().map_err(|errno| {
            let (path, source) = (path.to_owned(), io::Error::from(errno));
            match source.kind() {
                io::ErrorKind::PermissionDenied => ClientError::Denied { path },
                io::ErrorKind::WouldBlock => ClientError::Silent { path },
                _ => ClientError::NoHost { path, source },
            }
        })?;
        Ok(Self { path: path.to_owned(), reader: BufReader::new(stream) })
    }

    /// How everything is.
    ///
    /// # Errors
    /// [`ClientError`], as all of these.
    pub fn status(&mut self) -> Result<(HostInfo, HouseStatus), ClientError> {
        match self.ask(&Request::Status {})? {
            Answer::Status { host, house } => Ok((host, house)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The devices.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn devices(&mut self) -> Result<Vec<Device>, ClientError> {
        match self.ask(&Request::Devices {})? {
            Answer::Devices(devices) => Ok(devices),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has the configuration read again. Waits until what is to stop has stopped.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn reload(&mut self, dry_run: bool) -> Result<Reloaded, ClientError> {
        self.be_patient()?;
        match self.ask(&Request::Reload { dry_run })? {
            Answer::Reloaded(reloaded) => Ok(reloaded),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has the host take no more requests; waits until none is open, or somebody takes the drain back.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn drain(&mut self, timeout: Option<Duration>) -> Result<Drained, ClientError> {
        self.be_patient()?;
        let timeout_ms = timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        match self.ask(&Request::Drain { timeout_ms })? {
            Answer::Drained { ended } => Ok(Drained::Empty { ended }),
            Answer::Undrained { .. } => Ok(Drained::Undone),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has the host take requests again. Whether it refused them.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn undrain(&mut self) -> Result<bool, ClientError> {
        match self.ask(&Request::Undrain {})? {
            Answer::Undrained { was_draining } => Ok(was_draining),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Restarts a model or a device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn restart(&mut self, target: &str) -> Result<Restarted, ClientError> {
        match self.ask(&Request::Restart { target: target.to_owned() })? {
            Answer::Restarted(restarted) => Ok(restarted),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Ends the host as SIGTERM does.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn stop(&mut self) -> Result<(), ClientError> {
        match self.ask(&Request::Stop {})? {
            Answer::Stopping {} => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// What happened lately, and what happens from now on if asked for.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn events(mut self, follow: bool) -> Result<Events, ClientError> {
        if follow {
            self.be_patient()?;
        }
        self.send(&Request::Events { follow })?;
        Ok(Events { client: Some(self), follow })
    }

    /// Waits for answers as long as it takes.
    fn be_patient(&mut self) -> Result<(), ClientError> {
        let set = set_socket_timeout(self.reader.get_ref(), Timeout::Recv, None);
        set.map_err(|errno| self.failed(errno.into()))
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        self.send(request)?;
        self.receive()
    }

    fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        let sent = self.reader.get_mut().write_all(request.to_line().as_bytes());
        match sent {
            // A host that sends us away hangs up at once; its word is still there to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            sent => sent.map_err(|error| self.failed(error)),
        }
    }

    fn receive(&mut self) -> Result<Answer, ClientError> {
        let mut line = Vec::new();
        let limit = u64::try_from(ANSWER_BYTES_MAX).unwrap_or(u64::MAX);
        let read = (&mut self.reader).take(limit).read_until(b'\n', &mut line);
        read.map_err(|error| self.failed(error))?;
        if line.is_empty() {
            return Err(ClientError::HungUp { path: self.path.clone() });
        }
        let protocol = |what: String| ClientError::Protocol { path: self.path.clone(), what };
        let reply: Reply = serde_json::from_slice(&line).map_err(|error| protocol(error.to_string()))?;
        match reply.outcome {
            Outcome::Answer(answer) => Ok(*answer),
            Outcome::Error(failure) => Err(failure.into()),
        }
    }

    fn failed(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent { path },
            io::ErrorKind::ConnectionReset => ClientError::HungUp { path },
            _ => ClientError::NoHost { path, source },
        }
    }

    fn unexpected(&self, answer: &Answer) -> ClientError {
        let what = format!("another answer than was asked for: {answer:.120?}");
        ClientError::Protocol { path: self.path.clone(), what }
    }
}

/// An event, or a hole where some were.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// It happened.
    Event(Stamped),
    /// So many are missing: the reader was too slow.
    Missed(u64),
}

/// The events of a host: those it has kept, then, if followed, each as it happens. Ends with an error or `None`.
#[derive(Debug)]
pub struct Events {
    client: Option<Client>,
    follow: bool,
}

impl Iterator for Events {
    type Item = Result<News, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        let client = self.client.as_mut()?;
        let item = match client.receive() {
            Ok(Answer::Event(stamped)) => return Some(Ok(News::Event(stamped))),
            Ok(Answer::Missed(n_missed)) => return Some(Ok(News::Missed(n_missed))),
            Ok(Answer::EndOfEvents {}) => None,
            // The end of the host is the end of what is followed.
            Err(ClientError::HungUp { .. }) if self.follow => None,
            Ok(other) => Some(Err(client.unexpected(&other))),
            Err(error) => Some(Err(error)),
        };
        self.client = None;
        item
    }
}
