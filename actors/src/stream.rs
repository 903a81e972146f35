//! The stream of one request: a bounded channel of tokens, and beside it a place for the one end, which is never full.

use crate::engine::RequestId;
use crate::messages::{Failure, StreamEvent, StreamToken, Terminal};
use crate::router::RouterHandle;
use tokio::sync::{mpsc, oneshot};

/// What a client reads. Dropping it before its end cancels the request: its KV is free within one step.
#[derive(Debug)]
pub struct TokenStream {
    id: RequestId,
    tokens: mpsc::Receiver<StreamToken>,
    end: Option<oneshot::Receiver<Terminal>>,
    router: RouterHandle,
}

impl TokenStream {
    /// The request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event: tokens, then one [`StreamEvent::End`], then `None`. Safe to drop between polls.
    pub async fn next(&mut self) -> Option<StreamEvent> {
        if let Some(token) = self.tokens.recv().await {
            return Some(StreamEvent::Token(token));
        }
        let end = self.end.as_mut()?;
        let terminal = end.await.unwrap_or(Terminal::Failed(Failure::Lost));
        self.end = None;
        Some(StreamEvent::End(terminal))
    }

    /// Reads to the end: all tokens and how it ended.
    pub async fn collect(mut self) -> (Vec<StreamToken>, Terminal) {
        let mut tokens = Vec::new();
        loop {
            match self.next().await {
                Some(StreamEvent::Token(token)) => tokens.push(token),
                Some(StreamEvent::End(terminal)) => return (tokens, terminal),
                None => return (tokens, Terminal::Failed(Failure::Lost)),
            }
        }
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if self.end.is_some() {
            self.router.cancel(self.id);
        }
    }
}

/// What became of a token that was to be sent.
#[derive(Debug)]
pub(crate) enum Sent {
    Yes,
    /// The client reads slowly; here is the token back.
    Full(StreamToken),
    /// The client is gone.
    Gone,
}

/// The other end of a [`TokenStream`].
#[derive(Debug)]
pub(crate) struct StreamSender {
    tokens: mpsc::Sender<StreamToken>,
    end: oneshot::Sender<Terminal>,
}

impl StreamSender {
    pub(crate) fn new(id: RequestId, capacity: usize, router: RouterHandle) -> (Self, TokenStream) {
        let (tokens, token_receiver) = mpsc::channel(capacity.max(1));
        let (end, end_receiver) = oneshot::channel();
        (Self { tokens, end }, TokenStream { id, tokens: token_receiver, end: Some(end_receiver), router })
    }

    pub(crate) fn try_send(&self, token: StreamToken) -> Sent {
        match self.tokens.try_send(token) {
            Ok(()) => Sent::Yes,
            Err(mpsc::error::TrySendError::Full(token)) => Sent::Full(token),
            Err(mpsc::error::TrySendError::Closed(_)) => Sent::Gone,
        }
    }

    /// For waiting for room elsewhere.
    pub(crate) fn tokens(&self) -> mpsc::Sender<StreamToken> {
        self.tokens.clone()
    }

    /// Ends the stream. A client that is gone does not learn it.
    pub(crate) fn finish(self, terminal: Terminal) {
        let _ = self.end.send(terminal);
    }
}
