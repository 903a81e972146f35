//! What is kept of a live request, so that any worker can go on with it: prompt, parameters, emitted tokens. A pure
//! record; who has it at the moment is a matter of ownership ([`Ticket`]), not of a shared table.
//!
//! ```text
//! [Open] --token--> [Open] --end of worker--> [Open, deaths + 1] --at the limit--> poison
//!    |                                              |
//!    +--finished, failed, cancelled--> one Terminal <+
//! ```

use crate::engine::{EngineRequest, FinishReason, RequestId, Task, TokenLogprobs, Usage};
use crate::messages::{Failure, StreamToken, Terminal};
use crate::router::{RouterHandle, RouterMsg};
use crate::stream::{Sent, StreamSender};
use crate::trace::Trace;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;
use tracing::Span;

/// A worker's token does not follow the last one: the worker is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("token {found} came where token {expected} was due")]
pub struct Gap {
    /// The index that was due.
    pub expected: u32,
    /// The index that came.
    pub found: u32,
}

/// Whether a request goes on after the death of its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterDeath {
    /// On another worker.
    Resume,
    /// It was there too often.
    Poison,
}

/// The record of one request.
#[derive(Debug, Clone)]
pub struct Entry {
    request: EngineRequest,
    model: String,
    deaths: u32,
    cached_tokens: u32,
    deadline: Instant,
    /// When an engine began with it for the first time.
    begun: Option<Instant>,
    /// Emitted and not yet taken by the client's channel.
    undelivered: VecDeque<StreamToken>,
}

impl Entry {
    /// A fresh request for `model`, the model's own name.
    pub fn new(request: EngineRequest, model: String, deadline: Instant) -> Self {
        Self { request, model, deaths: 0, cached_tokens: 0, deadline, begun: None, undelivered: VecDeque::new() }
    }

    /// The request.
    pub fn id(&self) -> RequestId {
        self.request.id
    }

    /// What is to be made of the prompt.
    pub fn task(&self) -> Task {
        self.request.task
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// When its time is up.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Tokens emitted so far.
    pub fn emitted(&self) -> &[u32] {
        &self.request.emitted
    }

    /// Tokens it may need in all.
    pub fn tokens_max(&self) -> u64 {
        tokens_max(self.request.prompt.len(), self.request.max_tokens)
    }

    /// What a worker is given: the prompt and what was emitted, to go on from there.
    pub fn to_request(&self) -> EngineRequest {
        self.request.clone()
    }

    /// Records a token.
    ///
    /// # Errors
    /// [`Gap`] if it does not follow the last one; nothing is recorded.
    pub fn on_token(&mut self, index: u32, token: u32, logprobs: Option<TokenLogprobs>) -> Result<(), Gap> {
        let expected = u32::try_from(self.request.emitted.len()).unwrap_or(u32::MAX);
        if index != expected {
            return Err(Gap { expected, found: index });
        }
        self.request.emitted.push(token);
        let begun = self.begun.filter(|_| index == 0).map(Instant::into_std);
        self.undelivered.push_back(StreamToken { index, token, logprobs, begun });
        Ok(())
    }

    /// An engine began with it. Of a request that was resumed, the first beginning counts.
    pub fn on_begun(&mut self, at: Instant) {
        self.begun.get_or_insert(at);
    }

    /// Its worker died with it.
    pub fn on_death(&mut self, deaths_max: u32) -> AfterDeath {
        self.deaths += 1;
        if self.deaths >= deaths_max { AfterDeath::Poison } else { AfterDeath::Resume }
    }

    /// Deaths of workers that had it.
    pub fn deaths(&self) -> u32 {
        self.deaths
    }

    /// Whether the emitted tokens are all there will be, though no worker lived to say so.
    pub fn settled(&self) -> Option<FinishReason> {
        let request = &self.request;
        let n_emitted = u32::try_from(request.emitted.len()).unwrap_or(u32::MAX);
        if request.task == Task::Embed {
            return None;
        }
        let stopped = request.emitted.last().is_some_and(|last| request.stop_ids.contains(last));
        if stopped && n_emitted > request.min_tokens {
            return Some(FinishReason::Stop);
        }
        (n_emitted >= request.max_tokens).then_some(FinishReason::Length)
    }

    /// Its terminal event where no engine says one, or what an engine said, with the first count of cached tokens.
    pub fn completed(&self, reason: FinishReason) -> Terminal {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let usage = Usage {
            prompt_tokens: count(self.request.prompt.len()),
            cached_tokens: self.cached_tokens,
            completion_tokens: count(self.request.emitted.len()),
        };
        Terminal::Completed { reason, usage }
    }

    /// An engine found so many prompt tokens in its cache. Of a request that was resumed, the first engine's word counts.
    pub fn on_cached(&mut self, cached_tokens: u32) {
        if self.deaths == 0 {
            self.cached_tokens = cached_tokens;
        }
    }
}

/// Tokens a request may need: its prompt and all it may emit.
pub fn tokens_max(prompt_len: usize, max_tokens: u32) -> u64 {
    u64::try_from(prompt_len).unwrap_or(u64::MAX).saturating_add(u64::from(max_tokens))
}

/// How far delivering has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// The client's channel has everything.
    All,
    /// The client reads slowly.
    Stalled,
    /// The client is gone.
    Gone,
}

/// A live request and the client's end of it: the inside of a [`Ticket`].
#[derive(Debug)]
pub struct Open {
    pub(crate) entry: Entry,
    stream: StreamSender,
    trace: Trace,
}

/// The one right to end a request. Whoever holds it must end it; whoever loses it (an actor that panics, a message to
/// an actor that is gone) gives it back to the router by dropping it, and the router goes on with the request.
#[derive(Debug)]
pub struct Ticket {
    open: Option<Box<Open>>,
    home: RouterHandle,
}

impl Ticket {
    /// `span` is what the spans of the request's life are part of.
    pub(crate) fn new(entry: Entry, stream: StreamSender, span: Span, home: RouterHandle) -> Self {
        let trace = Trace::begin(span, entry.id());
        Self { open: Some(Box::new(Open { entry, stream, trace })), home }
    }

    /// A ticket that came back.
    pub(crate) fn reopen(open: Box<Open>, home: RouterHandle) -> Self {
        Self { open: Some(open), home }
    }

    fn open(&self) -> &Open {
        // `open` is empty only inside `conclude`, which takes the ticket.
        self.open.as_deref().expect("a ticket is open until it is concluded")
    }

    /// The record.
    pub fn entry(&self) -> &Entry {
        &self.open().entry
    }

    /// The record.
    pub fn entry_mut(&mut self) -> &mut Entry {
        &mut self.open.as_deref_mut().expect("a ticket is open until it is concluded").entry
    }

    /// A worker was given the request.
    pub(crate) fn submitted(&mut self) {
        self.open.as_deref_mut().expect("a ticket is open until it is concluded").trace.submitted();
    }

    /// Its worker's engine began with it at this moment, after so long.
    pub(crate) fn begun(&mut self, at: Instant, waited: Duration) {
        self.open().trace.begun(waited);
        self.entry_mut().on_begun(at);
    }

    /// Moves recorded tokens to the client's channel, as many as it takes.
    pub(crate) fn deliver(&mut self) -> Delivery {
        let open = self.open.as_deref_mut().expect("a ticket is open until it is concluded");
        while let Some(token) = open.entry.undelivered.pop_front() {
            open.trace.token();
            match open.stream.try_send(token) {
                Sent::Yes => {}
                Sent::Full(token) => {
                    open.entry.undelivered.push_front(token);
                    return Delivery::Stalled;
                }
                Sent::Gone => return Delivery::Gone,
            }
        }
        Delivery::All
    }

    /// For waiting until the client's channel has room.
    pub(crate) fn room(&self) -> tokio::sync::mpsc::Sender<StreamToken> {
        self.open().stream.tokens()
    }

    /// Ends the request at once; what was not delivered is not.
    pub fn conclude(mut self, terminal: Terminal) {
        let Some(open) = self.open.take() else { return };
        self.home.concluded(open.entry.id(), &terminal);
        let Open { stream, trace, .. } = *open;
        // Its last span ends before the client learns it: what the client traces lies around it.
        drop(trace);
        stream.finish(terminal);
    }

    /// Ends the request after its last token was delivered. A slow client gets `patience` for each token.
    pub(crate) fn conclude_delivered(mut self, terminal: Terminal, patience: Duration) {
        match self.deliver() {
            Delivery::All => self.conclude(terminal),
            Delivery::Gone => self.conclude(Terminal::Cancelled),
            Delivery::Stalled => {
                tokio::spawn(self.deliver_and_conclude(terminal, patience));
            }
        }
    }

    async fn deliver_and_conclude(mut self, terminal: Terminal, patience: Duration) {
        let room = self.room();
        loop {
            match tokio::time::timeout(patience, room.reserve()).await {
                Err(_) => return self.conclude(Terminal::Failed(Failure::SlowClient)),
                Ok(Err(_)) => return self.conclude(Terminal::Cancelled),
                // The room found is given up and taken again by `deliver`: nobody else sends on this channel.
                Ok(Ok(permit)) => drop(permit),
            }
            if self.deliver() == Delivery::All {
                return self.conclude(terminal);
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(mut open) = self.open.take() {
            open.trace.returned(open.entry.emitted().len());
            self.home.post(RouterMsg::Returned(open));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SamplingParams;

    fn entry(max_tokens: u32) -> Entry {
        let request = EngineRequest {
            id: RequestId(1),
            task: Task::Generate,
            prompt: vec![5, 6],
            emitted: Vec::new(),
            sampling: SamplingParams::greedy(),
            max_tokens,
            min_tokens: 1,
            stop_ids: vec![9],
            logprobs: None,
            constraint: None,
            priority: 0,
            deadline: None,
        };
        Entry::new(request, "m".into(), Instant::now())
    }

    #[tokio::test]
    async fn indices_have_no_gap_and_no_repeat() {
        let mut entry = entry(5);
        entry.on_token(0, 7, None).expect("the first");
        assert_eq!(entry.on_token(0, 7, None), Err(Gap { expected: 1, found: 0 }));
        assert_eq!(entry.on_token(2, 7, None), Err(Gap { expected: 1, found: 2 }));
        entry.on_token(1, 8, None).expect("the second");
        assert_eq!(entry.to_request().emitted, [7, 8]);
    }

    #[tokio::test]
    async fn two_deaths_are_poison() {
        let mut entry = entry(5);
        assert_eq!(entry.on_death(2), AfterDeath::Resume);
        assert_eq!(entry.on_death(2), AfterDeath::Poison);
        assert_eq!(entry.deaths(), 2);
    }

    #[tokio::test]
    async fn what_is_complete_is_not_resumed() {
        let mut entry = entry(3);
        assert_eq!(entry.settled(), None);
        entry.on_token(0, 9, None).expect("in order");
        assert_eq!(entry.settled(), None, "a stop id within min_tokens does not stop");
        entry.on_token(1, 9, None).expect("in order");
        assert_eq!(entry.settled(), Some(FinishReason::Stop));
        let mut entry = self::entry(1);
        entry.on_token(0, 3, None).expect("in order");
        assert_eq!(entry.settled(), Some(FinishReason::Length));
    }

    #[tokio::test]
    async fn usage_counts_each_token_once() {
        let mut entry = entry(3);
        entry.on_cached(2);
        entry.on_token(0, 3, None).expect("in order");
        entry.on_death(5);
        entry.on_cached(1);
        entry.on_token(1, 4, None).expect("in order");
        let usage = Usage { prompt_tokens: 2, cached_tokens: 2, completion_tokens: 2 };
        assert_eq!(entry.completed(FinishReason::Length), Terminal::Completed { reason: FinishReason::Length, usage });
    }
}
