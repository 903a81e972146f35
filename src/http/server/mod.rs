//! Takes connections and drives them: HTTP/1 and HTTP/2 on the same port, each connection with its deadlines.
//!
//! axum's own `serve` has no timer, so that hyper's header timeout is off, no cap on connections and no deadline for
//! writes. Here a connection is cut when its headers, its next request, or room for its next byte do not come in time;
//! and when all places are taken the one that has waited longest without a request makes room, so that idle
//! connections, however many, cannot keep a client out.

mod calm;
mod door;
mod head;
mod io;
mod tls;

use super::error::ServeError;
use super::{App, fresh, guard, routes};
use axum::body::Body;
use axum::http::Request;
use calm::Calm;
use door::{Conn, Door};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use io::GuardedIo;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// Somebody on the network.
    Tcp(SocketAddr),
    /// Somebody on this machine whom the socket file's permissions let through.
    Unix,
}

impl Peer {
    /// Whom the address stands for.
    pub(super) fn client(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(door::client_of(address.ip())),
            Self::Unix => None,
        }
    }
}

/// Bytes of the headers of an HTTP/2 request.
const H2_HEADERS_MAX: u32 = 16 << 10;
/// Bytes buffered for reading an HTTP/1 connection: also the most that headers may have.
const H1_BUFFER_MAX: usize = 64 << 10;
/// Header lines of a request.
const HEADERS_MAX: usize = 64;
/// Bytes of an answer that HTTP/2 may hold back for a slow reader.
const H2_SEND_BUFFER: usize = 64 << 10;
/// Bytes that an HTTP/2 client may send ahead, per request and per connection.
const H2_WINDOWS: (u32, u32) = (256 << 10, 1 << 20);
/// Requests that an HTTP/2 client may open and reset before they were looked at (CVE-2023-44487).
const H2_RESETS_MAX: usize = 20;
/// Bytes that the kernel holds for a reader that takes nothing. Left alone it would hold megabytes, for each of them.
const SEND_BUFFER: usize = 128 << 10;
/// After a failed `accept` (no descriptors left, usually) the next one is tried this much later.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves TCP until `stop`.
pub(super) async fn serve_tcp(app: App, listener: TcpListener, stop: CancellationToken) -> Result<(), ServeError> {
    let address = listener.local_addr()?;
    app.read_keys()?;
    check_exposure(&app, address)?;
    let tls = app.settings.tls.clone().map(tls::Tls::open).transpose()?;
    let _watches = [
        tls.clone().map(|tls| AbortOnDrop(tokio::spawn(tls.watch(app.settings.reread.clone(), stop.clone())))),
        watch_keys(&app, &stop),
    ];
    let server = Server::new(app, stop.clone());
    let mut tasks = JoinSet::new();
    loop {
        let (socket, peer) = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => { pause_after(&error).await; continue }
            },
        };
        // Tokens are small and each is wanted at once.
        let _ = socket.set_nodelay(true);
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
        let conn = match server.door.enter(Some(peer.ip())) {
            Ok(conn) => conn,
            Err(full) => {
                if tls.is_none() {
                    // A courtesy: whoever cannot take it at once does not get it.
                    let _ = socket.try_write(full.answer());
                }
                continue;
            }
        };
        let patience = server.app.settings.limits.client_timeout;
        // Two tasks, not one for both cases: thousands of plain connections need no room for TLS.
        match tls.clone() {
            None => tasks.spawn(server.clone().drive_plain(socket, conn, Peer::Tcp(peer))),
            Some(tls) => {
                let io = GuardedIo::new(socket, conn.clone(), patience);
                tasks.spawn(server.clone().drive_tls(tls, io, conn, Peer::Tcp(peer)))
            }
        };
    }
    drop(listener);
    server.drain(tasks).await;
    Ok(())
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Looks after the files of keys, if there are any.
fn watch_keys(app: &App, stop: &CancellationToken) -> Option<AbortOnDrop> {
    let files = app.key_files();
    if files.is_empty() {
        return None;
    }
    let (app, reread, every) = (app.clone(), app.settings.reread.clone(), app.settings.look_every);
    // A file without keys is an error: keys that were asked for once do not stop being asked for.
    let read = move || app.read_keys();
    Some(AbortOnDrop(tokio::spawn(fresh::watch(files, every, reread, stop.clone(), read))))
}

/// Serves a Unix socket until `stop`.
pub(super) async fn serve_unix(app: App, listener: UnixListener, stop: CancellationToken) -> Result<(), ServeError> {
    let server = Server::new(app, stop.clone());
    let mut tasks = JoinSet::new();
    loop {
        let socket = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => socket,
                Err(error) => { pause_after(&error).await; continue }
            },
        };
        let Ok(conn) = server.door.enter(None) else { continue };
        let server = server.clone();
        tasks.spawn(async move {
            let io = GuardedIo::new(socket, conn.clone(), server.app.settings.limits.client_timeout);
            server.drive(io, conn, Peer::Unix).await;
        });
    }
    server.drain(tasks).await;
    Ok(())
}

fn check_exposure(app: &App, address: SocketAddr) -> Result<(), ServeError> {
    let settings = &app.settings;
    if address.ip().is_loopback() || settings.insecure {
        return Ok(());
    }
    let missing = match (app.keys.load().users.is_empty(), settings.tls.is_none()) {
        (true, true) => "are neither API keys nor a certificate",
        (true, false) => "are no API keys",
        (false, true) => "is no certificate",
        (false, false) => return Ok(()),
    };
    Err(ServeError::Exposed { address, missing })
}

async fn pause_after(error: &std::io::Error) {
    tracing::warn!(%error, "a connection could not be taken");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

#[derive(Clone)]
struct Server {
    app: App,
    router: axum::Router,
    door: Arc<Door>,
    http: Arc<auto::Builder<TokioExecutor>>,
    stop: CancellationToken,
}

impl Server {
    fn new(app: App, stop: CancellationToken) -> Self {
        let door = Arc::new(Door::new(&app.settings.limits));
        let http = Arc::new(builder(&app));
        Self { router: routes::router(&app), app, door, http, stop }
    }

    /// Drives one connection to its end, once there is a request.
    async fn drive_plain(self, socket: TcpStream, conn: Arc<Conn>, peer: Peer) {
        let limits = &self.app.settings.limits;
        tokio::select! {
            arrived = head::arrives(&socket, &conn) => {
                if arrived.is_ok() {
                    let io = GuardedIo::plain(socket, conn.clone(), limits.client_timeout);
                    // On the heap: a task that waits for a head needs no room for what comes after it.
                    Box::pin(self.drive(io, conn, peer)).await;
                }
                return;
            }
            () = conn.evicted() => {}
            () = tokio::time::sleep(limits.header_timeout) => {}
            () = self.stop.cancelled() => return,
        }
        conn.cut();
        if conn.is_cut_short() {
            head::refuse(&socket);
        }
    }

    /// Drives one connection to its end, after its handshake.
    async fn drive_tls(self, tls: tls::Tls, io: GuardedIo<TcpStream>, conn: Arc<Conn>, peer: Peer) {
        let handshake = tokio::time::timeout(self.app.settings.limits.header_timeout, tls.accept(io));
        let io = tokio::select! { io = handshake => io, () = conn.evicted() => return };
        if let Ok(Ok(io)) = io {
            self.drive(io, conn, peer).await;
        }
    }

    /// Drives one connection to its end.
    async fn drive<S>(self, io: S, conn: Arc<Conn>, peer: Peer)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let router = self.router.clone();
        let tracked = conn.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let in_flight = tracked.begin(request.version() == axum::http::Version::HTTP_2);
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            let router = router.clone();
            async move {
                let response = router.oneshot(request).await.unwrap_or_else(|never: Infallible| match never {});
                Ok::<_, Infallible>(response.map(|body| in_flight.carry(body)))
            }
        });
        let connection = self.http.serve_connection(TokioIo::new(Calm::new(io)), service);
        tokio::pin!(connection);
        let limits = &self.app.settings.limits;
        let (mut stopping, mut next_look) = (false, Instant::now() + limits.header_timeout);
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection ended early");
                    }
                    return;
                }
                () = conn.evicted() => return conn.cut(),
                () = self.stop.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = tokio::time::sleep_until(next_look) => match conn.overdue(limits) {
                    None => {
                        tracing::debug!("a connection was cut: nothing came, or nothing was taken, in time");
                        return conn.cut();
                    }
                    Some(at) => next_look = at,
                },
            }
        }
    }

    async fn drain(self, mut tasks: JoinSet<()>) {
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(self.app.settings.drain, all).await.is_err() {
            tracing::warn!("connections were cut because they did not end in time");
        }
    }
}

fn builder(app: &App) -> auto::Builder<TokioExecutor> {
    let limits = &app.settings.limits;
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // hyper starts this clock when it begins to wait, not with the first byte. `Conn` knows the difference and cuts
        // slow headers sooner; this one stands behind it.
        .header_read_timeout(limits.idle_timeout.max(limits.header_timeout))
        .max_headers(HEADERS_MAX)
        .max_buf_size(H1_BUFFER_MAX)
        .half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(app.settings.h2_streams)
        .max_header_list_size(H2_HEADERS_MAX)
        .max_pending_accept_reset_streams(H2_RESETS_MAX)
        .max_local_error_reset_streams(H2_RESETS_MAX)
        .max_send_buf_size(H2_SEND_BUFFER)
        .initial_stream_window_size(H2_WINDOWS.0)
        .initial_connection_window_size(H2_WINDOWS.1)
        .keep_alive_interval(limits.client_timeout)
        .keep_alive_timeout(limits.header_timeout);
    builder
}

/// The router with everything that stands in front of it.
pub(super) fn layered(app: &App, router: axum::Router) -> axum::Router {
    router.layer(axum::middleware::from_fn_with_state(app.clone(), guard::outermost))
}
