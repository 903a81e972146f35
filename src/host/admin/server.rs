//! Answers on the admin socket. Owns: the socket, a task per client. Never: the tree.
//!
//! ```text
//! [Listening] --connection--> who is it? --stranger, or too many--> one error line, closed
//!                                  \--ours--> [Reading] --line--> ask the house --> [Writing] --> [Reading]
//!                                                 |   \-- events follow: [Writing] until the client goes
//!                                                 \-- silent, too long, gone: closed
//! ```
//!
//! Each client is a task with timeouts of its own: one that neither reads nor writes costs a task and nothing else.

use super::House;
use super::protocol::{Answer, Failure, FailureKind, HostInfo, REQUEST_BYTES_MAX, Reply, Request};
use super::socket::{BoundSocket, SocketError};
use playhouse_actors::Drained;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

/// Wait after a failed `accept`: it fails for want of descriptors, and at once again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Clients at a time; one more is told so and sent away.
    pub clients_max: usize,
    /// For a request to come whole.
    pub read_timeout: Duration,
    /// For a client to take an answer.
    pub write_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { clients_max: 64, read_timeout: Duration::from_secs(30), write_timeout: Duration::from_secs(10) }
    }
}

/// A running server. Dropped, it ends every connection and frees the path.
#[derive(Debug)]
pub struct AdminServer {
    socket: BoundSocket,
    accepting: JoinHandle<()>,
}

impl AdminServer {
    /// Binds `path` and answers there for `house`, within a runtime.
    ///
    /// # Errors
    /// [`SocketError`]. A host can do without: it says so in its log and goes on.
    pub fn open<H: House>(path: &Path, house: Arc<H>, options: Options) -> Result<Self, SocketError> {
        let mut socket = BoundSocket::bind(path)?;
        let failed = |source| SocketError::Io { path: path.to_owned(), what: "the runtime cannot use it", source };
        let taken = socket.take_listener().ok_or_else(|| failed(io::Error::other("taken before")))?;
        let listener = UnixListener::from_std(taken).map_err(failed)?;
        let accepting = tokio::spawn(accept(listener, Server { house, options }));
        Ok(Self { socket, accepting })
    }

    /// Where it answers.
    pub fn path(&self) -> &Path {
        self.socket.path()
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Whether a peer may speak: the host's own user, and root.
fn is_ours(peer_uid: u32, own_uid: u32) -> bool {
    peer_uid == 0 || peer_uid == own_uid
}

async fn accept<H: House>(listener: UnixListener, server: Server<H>) {
    // Aborted or dropped, the set ends the clients with it.
    let mut clients = JoinSet::new();
    let own_uid = rustix::process::geteuid().as_raw();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the admin socket cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(_) = clients.join_next() => continue,
        };
        match stream.peer_cred() {
            Ok(peer) if is_ours(peer.uid(), own_uid) => {}
            peer => {
                tracing::warn!(?peer, "a stranger called at the admin socket");
                let message = "this socket answers its host's user and root only";
                send_away(stream, FailureKind::Forbidden, message);
                continue;
            }
        }
        if clients.len() >= server.options.clients_max {
            send_away(stream, FailureKind::Busy, "too many clients of the admin socket; try again");
            continue;
        }
        clients.spawn(Client::new(stream, server.clone()).serve());
    }
}

/// Says why, if the client's buffer takes it, and hangs up. Nothing is waited for.
fn send_away(stream: UnixStream, kind: FailureKind, message: &str) {
    let line = Reply::new(Err(Failure::new(kind, message))).to_line();
    // The buffer of a new connection is empty; a client that is gone does not care.
    let _ = stream.try_write(line.as_bytes());
}

struct Server<H> {
    house: Arc<H>,
    options: Options,
}

impl<H> Clone for Server<H> {
    fn clone(&self) -> Self {
        Self { house: self.house.clone(), options: self.options }
    }
}

/// The connection is over: the client is gone, silent or too slow. Nobody is left to tell.
struct Over;

struct Client<H> {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    server: Server<H>,
}

impl<H: House> Client<H> {
    fn new(stream: UnixStream, server: Server<H>) -> Self {
        let (reader, writer) = stream.into_split();
        Self { reader: BufReader::new(reader), writer, server }
    }

    async fn serve(mut self) {
        // However it ends, it ends: the streams are dropped.
        while self.one().await.is_ok() {}
    }

    /// One request and its answer.
    async fn one(&mut self) -> Result<(), Over> {
        let line = match timeout(self.server.options.read_timeout, read_line(&mut self.reader)).await {
            Ok(Ok(line)) => line,
            Ok(Err(ReadError::TooLong)) => {
                let message = format!("a request has at most {REQUEST_BYTES_MAX} bytes");
                return self.refuse_and_close(FailureKind::TooLong, message).await;
            }
            Ok(Err(ReadError::Over)) => return Err(Over),
            Err(_) => {
                let seconds = self.server.options.read_timeout.as_secs_f64();
                let message = format!("no request came within {seconds} s");
                return self.refuse_and_close(FailureKind::Timeout, message).await;
            }
        };
        match Request::parse(&line) {
            Ok(Request::Events { follow }) => self.events(follow).await,
            Ok(request) => {
                let result = self.server.answer(request).await;
                self.write(result).await
            }
            Err(failure) => self.write(Err(failure)).await,
        }
    }

    /// After this line it is not known where the next request begins.
    async fn refuse_and_close(&mut self, kind: FailureKind, message: String) -> Result<(), Over> {
        self.write(Err(Failure::new(kind, message))).await?;
        Err(Over)
    }

    async fn write(&mut self, result: Result<Answer, Failure>) -> Result<(), Over> {
        let line = Reply::new(result).to_line();
        match timeout(self.server.options.write_timeout, self.writer.write_all(line.as_bytes())).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Over),
        }
    }

    async fn events(&mut self, follow: bool) -> Result<(), Over> {
        let (kept, mut news) = self.server.house.log().read();
        for stamped in kept {
            self.write(Ok(Answer::Event(stamped))).await?;
        }
        if !follow {
            return self.write(Ok(Answer::EndOfEvents {})).await;
        }
        loop {
            let answer = tokio::select! {
                news = news.recv() => match news {
                    Ok(stamped) => Answer::Event(stamped),
                    Err(RecvError::Lagged(n_missed)) => Answer::Missed(n_missed),
                    Err(RecvError::Closed) => Answer::EndOfEvents {},
                },
                // A follower says nothing more; what it says all the same is an end, too.
                _ = self.reader.fill_buf() => return Err(Over),
            };
            self.write(Ok(answer)).await?;
        }
    }
}

impl<H: House> Server<H> {
    async fn answer(&self, request: Request) -> Result<Answer, Failure> {
        match request {
            Request::Status {} => {
                let house = self.house.status().await.ok_or_else(Failure::ended)?;
                Ok(Answer::Status { host: HostInfo::this(), house })
            }
            Request::Devices {} => Ok(Answer::Devices(self.house.devices().await)),
            Request::Reload { dry_run } => {
                tracing::info!(dry_run, "the admin socket asks for a reload");
                Ok(Answer::Reloaded(self.house.reload(dry_run).await?))
            }
            Request::Drain { timeout_ms } => {
                tracing::info!(timeout_ms, "the admin socket asks for a drain");
                Ok(match self.house.drain(timeout_ms.map(Duration::from_millis)).await {
                    Drained::Empty { ended } => Answer::Drained { ended },
                    Drained::Undone => Answer::Undrained { was_draining: true },
                })
            }
            Request::Undrain {} => {
                tracing::info!("the admin socket asks for the end of a drain");
                Ok(Answer::Undrained { was_draining: self.house.undrain().await? })
            }
            Request::Restart { target } => {
                tracing::info!(target_name = target, "the admin socket asks for a restart");
                Ok(Answer::Restarted(self.house.restart(&target).await?))
            }
            Request::Stop {} => {
                tracing::info!("the admin socket asks for a stop");
                self.house.stop();
                Ok(Answer::Stopping {})
            }
            // Answered with a stream, above.
            Request::Events { .. } => Err(Failure::new(FailureKind::Internal, "events are a stream")),
        }
    }
}

enum ReadError {
    TooLong,
    Over,
}

/// A line without its break, of at most [`REQUEST_BYTES_MAX`] bytes.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Result<String, ReadError> {
    let mut line = Vec::new();
    let limit = u64::try_from(REQUEST_BYTES_MAX).unwrap_or(u64::MAX) + 1;
    match reader.take(limit).read_until(b'\n', &mut line).await {
        Ok(_) if line.last() == Some(&b'\n') => {
            // Bytes that are no UTF-8 are no JSON: the parser says so.
            Ok(String::from_utf8_lossy(&line).into_owned())
        }
        Ok(n) if n > REQUEST_BYTES_MAX => Err(ReadError::TooLong),
        Ok(_) | Err(_) => Err(ReadError::Over),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_user_and_root_may_speak() {
        assert!(is_ours(1000, 1000) && is_ours(0, 1000) && is_ours(0, 0));
        assert!(!is_ours(1001, 1000) && !is_ours(1000, 0));
    }
}
