//! Answers as server-sent events, straight from a stream of tokens.
//!
//! All events that are there go out in one piece: under load a write carries the tokens of several steps, alone each
//! token leaves at once. A stream that is silent for long gets a comment, so that nobody in between takes it for dead.
//! When the client goes away hyper drops the body, and with it the stream: that cancels the request.

use super::error::ApiError;
use super::metrics::RequestMeter;
use super::quota::Place;
use crate::client::Event;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_core::Stream;
use hyper::body::Frame;
use serde_json::Value;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until};

/// Turns events into the lines of one API's stream.
pub(super) trait Chunks: Send + Unpin + 'static {
    /// What comes before the first token.
    fn begin(&mut self, out: &mut Vec<u8>);

    /// What an event becomes.
    ///
    /// # Errors
    /// The request failed: the stream ends with this.
    fn event(&mut self, event: &Event, out: &mut Vec<u8>) -> Result<(), ApiError>;

    /// What comes after the last token, if all went well.
    fn end(&mut self, out: &mut Vec<u8>);

    /// What comes instead of the rest if it did not.
    fn failed(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        data(out, &error.json());
    }

    /// The very last line.
    fn last(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// One `data:` line with a JSON document.
pub(super) fn data(out: &mut Vec<u8>, value: &Value) {
    out.extend_from_slice(b"data: ");
    json(out, value);
    out.extend_from_slice(b"\n\n");
}

/// Appends JSON. Line breaks inside of strings are escaped, so it is one line.
pub(super) fn json(out: &mut Vec<u8>, value: &(impl serde::Serialize + ?Sized)) {
    // Writing into a vector does not fail, and what is written has string keys only.
    let _ = serde_json::to_writer(out, value);
}

/// Bytes after which a piece is sent although more events are there.
const PIECE_BYTES: usize = 16 << 10;

/// What belongs to a request as long as it runs.
pub(super) struct Running {
    meter: RequestMeter,
    place: Option<Place>,
    keep_alive: Duration,
}

impl Running {
    /// For a request that was accepted with so many tokens of prompt.
    pub(super) fn new(meter: RequestMeter, place: Option<Place>, keep_alive: Duration, n_prompt: u64) -> Self {
        let mut running = Self { meter, place, keep_alive };
        running.spend(n_prompt);
        running
    }

    /// Something came of it.
    pub(super) fn event(&mut self, event: &Event) {
        self.meter.event(event);
        if matches!(event, Event::Token(_)) {
            self.spend(1);
        }
    }

    fn spend(&mut self, tokens: u64) {
        if let Some(place) = &mut self.place {
            place.spend(tokens);
        }
    }
}

/// The answer to a request that streams. Waits for the first event, so that a request that fails before it has begun
/// is answered with a status; but not longer than the client may be left without a sign.
///
/// # Errors
/// The first event says that the request failed.
pub(super) async fn respond<S, C>(mut tokens: S, mut chunks: C, mut running: Running) -> Result<Response, ApiError>
where
    S: Stream<Item = Event> + Unpin + Send + 'static,
    C: Chunks,
{
    use futures_util::StreamExt;
    let mut out = Vec::with_capacity(1024);
    chunks.begin(&mut out);
    let mut is_done = false;
    if let Ok(first) = tokio::time::timeout(running.keep_alive, tokens.next()).await {
        match first {
            Some(event) => {
                running.event(&event);
                chunks.event(&event, &mut out)?;
            }
            None => is_done = true,
        }
    }
    let timer = Box::pin(sleep_until(Instant::now() + running.keep_alive));
    let last_sent = Instant::now();
    let mut body = Events { tokens, chunks, running, timer, last_sent, out, is_done };
    if body.is_done {
        body.finish(None);
    }
    Ok(headed(Body::new(body)))
}

/// A response that is an event stream.
pub(super) fn headed(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The body of an answer.
struct Events<S, C> {
    tokens: S,
    chunks: C,
    running: Running,
    timer: Pin<Box<Sleep>>,
    last_sent: Instant,
    out: Vec<u8>,
    is_done: bool,
}

impl<S, C: Chunks> Events<S, C> {
    fn finish(&mut self, error: Option<&ApiError>) {
        self.is_done = true;
        match error {
            None => self.chunks.end(&mut self.out),
            Some(error) => self.chunks.failed(error, &mut self.out),
        }
        self.chunks.last(&mut self.out);
        self.running.place = None;
    }

    fn piece(&mut self) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.last_sent = Instant::now();
        let capacity = self.out.len().min(PIECE_BYTES);
        let piece = std::mem::replace(&mut self.out, Vec::with_capacity(capacity));
        Poll::Ready(Some(Ok(Frame::data(piece.into()))))
    }

    /// Whether the stream has been silent too long. The timer is set again only when it fires: setting it for every
    /// token would cost more than the token.
    fn is_silent(&mut self, cx: &mut Context<'_>) -> bool {
        while self.timer.as_mut().poll(cx).is_ready() {
            let due = self.last_sent + self.running.keep_alive;
            let now = Instant::now();
            if due <= now {
                self.timer.as_mut().reset(now + self.running.keep_alive);
                return true;
            }
            self.timer.as_mut().reset(due);
        }
        false
    }
}

impl<S, C> hyper::body::Body for Events<S, C>
where
    S: Stream<Item = Event> + Unpin + Send + 'static,
    C: Chunks,
{
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        while !this.is_done && this.out.len() < PIECE_BYTES {
            match Pin::new(&mut this.tokens).poll_next(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => this.finish(None),
                Poll::Ready(Some(event)) => {
                    this.running.event(&event);
                    if let Err(error) = this.chunks.event(&event, &mut this.out) {
                        this.finish(Some(&error));
                    }
                }
            }
        }
        if !this.out.is_empty() {
            return this.piece();
        }
        if this.is_done {
            return Poll::Ready(None);
        }
        if this.is_silent(cx) {
            this.out.extend_from_slice(b": ping\n\n");
            return this.piece();
        }
        Poll::Pending
    }
}
