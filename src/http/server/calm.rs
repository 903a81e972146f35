//! Counts the frames of HTTP/2 with which a client only makes work (settings, pings, priorities, windows) and ends a
//! connection that has too many of them: each is a few bytes that want an answer or a change of state, and a client can send
//! thousands in the time that one is told to go.
//!
//! A connection begins with an allowance. Time adds to it, and so does what is written to the client: whoever reads an answer
//! has windows to open. Resets are not counted here; h2 does, with the requests that they end.

use super::head::H2_PREFACE;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Frames that a connection may begin with.
const AT_FIRST: f64 = 500.0;
/// Frames that it may ever have in hand: an answer is read after it was written.
const AT_MOST: f64 = 10_000.0;
const PER_SECOND: f64 = 100.0;
/// A token's event has more than a hundred bytes, for which some clients open two windows.
const PER_BYTE_WRITTEN: f64 = 1.0 / 64.0;

/// Length, kind, flags, stream.
const FRAME_HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;

/// What the bytes of a client are.
#[derive(Debug)]
enum At {
    /// So many bytes of the preface came.
    Preface(usize),
    /// So many of a frame's head.
    Head(usize, [u8; FRAME_HEAD]),
    /// So many bytes of a frame's payload are to come.
    Payload(usize),
    /// HTTP/1.
    Other,
}

/// What a client may still send.
#[derive(Debug)]
struct Allowance {
    at: At,
    level: f64,
    since: Instant,
}

impl Allowance {
    fn new() -> Self {
        Self { at: At::Preface(0), level: AT_FIRST, since: Instant::now() }
    }

    /// These bytes came; whether the client may go on.
    fn heard(&mut self, mut bytes: &[u8]) -> bool {
        let mut n_frames = 0.0;
        while !bytes.is_empty() {
            let taken = match &mut self.at {
                At::Other => break,
                At::Preface(n) => {
                    let taken = bytes.len().min(H2_PREFACE.len() - *n);
                    let is_h2 = H2_PREFACE[*n..*n + taken] == bytes[..taken];
                    *n += taken;
                    self.at = match *n {
                        _ if !is_h2 => At::Other,
                        n if n == H2_PREFACE.len() => At::Head(0, [0; FRAME_HEAD]),
                        n => At::Preface(n),
                    };
                    taken
                }
                At::Head(n, head) => {
                    let taken = bytes.len().min(FRAME_HEAD - *n);
                    head[*n..*n + taken].copy_from_slice(&bytes[..taken]);
                    *n += taken;
                    if *n == FRAME_HEAD {
                        let [a, b, c, kind, ..] = *head;
                        n_frames += f64::from(!matches!(kind, DATA | HEADERS | CONTINUATION | RST_STREAM));
                        self.at = At::payload(u32::from_be_bytes([0, a, b, c]) as usize);
                    }
                    taken
                }
                At::Payload(left) => {
                    let taken = bytes.len().min(*left);
                    self.at = At::payload(*left - taken);
                    taken
                }
            };
            bytes = &bytes[taken..];
        }
        n_frames == 0.0 || self.spend(n_frames)
    }

    fn spend(&mut self, frames: f64) -> bool {
        let now = Instant::now();
        let earned = (now - self.since).as_secs_f64() * PER_SECOND;
        (self.level, self.since) = ((self.level + earned).min(AT_MOST) - frames, now);
        self.level >= 0.0
    }

    fn written(&mut self, n_bytes: usize) {
        self.level = (self.level + n_bytes as f64 * PER_BYTE_WRITTEN).min(AT_MOST);
    }
}

impl At {
    fn payload(left: usize) -> Self {
        if left == 0 { Self::Head(0, [0; FRAME_HEAD]) } else { Self::Payload(left) }
    }
}

/// A connection that fails when its client has sent too many such frames.
pub(super) struct Calm<S> {
    inner: S,
    allowance: Allowance,
}

impl<S> Calm<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner, allowance: Allowance::new() }
    }

    fn wrote(&mut self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(n)) = polled {
            self.allowance.written(n);
        }
        polled
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Calm<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        if polled.is_ready() && !self.allowance.heard(&buf.filled()[before..]) {
            return Poll::Ready(Err(io::Error::other("the client sent too many frames that ask for nothing")));
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Calm<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.wrote(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.wrote(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PING: u8 = 6;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 0], payload].concat()
    }

    fn begun() -> Allowance {
        let mut allowance = Allowance::new();
        assert!(allowance.heard(H2_PREFACE));
        allowance
    }

    #[tokio::test(start_paused = true)]
    async fn pings_are_counted_however_they_are_cut() {
        let pings = frame(PING, &[7; 8]).repeat(AT_FIRST as usize);
        for piece in [1, 7, 17, 1000] {
            let mut allowance = begun();
            assert!(pings.chunks(piece).all(|bytes| allowance.heard(bytes)), "{piece}");
            assert!(!allowance.heard(&frame(PING, &[7; 8])), "{piece}");
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(allowance.heard(&frame(PING, &[7; 8])), "time has passed");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_and_bodies_are_not_counted() {
        let mut allowance = begun();
        let request = [frame(HEADERS, b"abc"), frame(DATA, &[6; 20_000]), frame(RST_STREAM, &[0; 4])].concat();
        assert!((0..2 * AT_FIRST as usize).all(|_| allowance.heard(&request)));
        assert_eq!(allowance.level, AT_FIRST);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_written_to_may_open_windows() {
        let mut allowance = begun();
        let window = frame(8, &[0; 4]);
        assert!((0..5000).all(|_| {
            allowance.written(150);
            allowance.heard(&window) && allowance.heard(&window)
        }));
    }

    #[tokio::test(start_paused = true)]
    async fn the_other_version_is_none_of_our_business() {
        let mut allowance = Allowance::new();
        let pings = frame(PING, &[7; 8]).repeat(1000);
        assert!(allowance.heard(b"PRINT / HTTP/1.1\r\n") && allowance.heard(&pings));
    }
}
