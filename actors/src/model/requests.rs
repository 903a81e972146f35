//! The requests that a worker has: their tickets, and what the worker's events mean for them. Knows no worker: what one
//! may not say is an error here, and what follows from that is for `model` to do.

use crate::engine::{EngineRequest, FinishReason, RequestId, Task, TokenLogprobs, Usage};
use crate::journal::{AfterDeath, Delivery, Gap, Ticket};
use crate::messages::{Failure, StreamToken, Terminal};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// What a worker said and may not say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Gap(#[from] Gap),
    #[error("an end after {told} tokens, {came} came")]
    Count { told: u32, came: usize },
    #[error("a token where an embedding was due")]
    TokenOfEmbedding,
    #[error("an embedding that nobody asked for")]
    EmbeddingOfText,
}

/// How a client takes its tokens.
#[derive(Debug)]
pub(super) enum Taking {
    /// It does, or somebody waits for it already.
    Well,
    /// It reads slowly: whoever asked waits for room here.
    Slowly(mpsc::Sender<StreamToken>),
    /// It is gone.
    Gone,
}

#[derive(Debug, Default)]
pub(super) struct Requests(BTreeMap<RequestId, Running>);

#[derive(Debug)]
struct Running {
    ticket: Ticket,
    /// When it was given to the worker.
    since: Instant,
    /// Somebody waits for the client to read.
    stalled: bool,
}

impl Requests {
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn ids(&self) -> Vec<RequestId> {
        self.0.keys().copied().collect()
    }

    /// Those whose time is up.
    pub(super) fn late(&self, now: Instant) -> Vec<RequestId> {
        let late = self.0.iter().filter(|(_, running)| running.ticket.entry().deadline() <= now);
        late.map(|(id, _)| *id).collect()
    }

    /// Each with the tokens that it may need.
    pub(super) fn open(&self) -> Vec<(RequestId, u64)> {
        self.0.iter().map(|(id, running)| (*id, running.ticket.entry().tokens_max())).collect()
    }

    /// Takes one on: what the worker is given.
    pub(super) fn take_on(&mut self, mut ticket: Ticket) -> EngineRequest {
        ticket.submitted();
        let request = ticket.entry().to_request();
        self.0.insert(request.id, Running { ticket, since: Instant::now(), stalled: false });
        request
    }

    /// Ends one at once. Whether it was there.
    pub(super) fn conclude(&mut self, id: RequestId, terminal: Terminal) -> bool {
        let running = self.0.remove(&id);
        running.map(|running| running.ticket.conclude(terminal)).is_some()
    }

    /// The worker did not take it, or gave it up. What it emitted is delivered first.
    pub(super) fn on_failed(&mut self, id: RequestId, failure: Failure, patience: Duration) {
        if let Some(running) = self.0.remove(&id) {
            running.ticket.conclude_delivered(Terminal::Failed(failure), patience);
        }
    }

    pub(super) fn on_begun(&mut self, id: RequestId, waited: Duration) {
        if let Some(Running { ticket, since, .. }) = self.0.get_mut(&id) {
            // What a worker says may be nonsense; a time that does not exist is not recorded.
            since.checked_add(waited).into_iter().for_each(|at| ticket.begun(at, waited));
        }
    }

    /// Records a token; [`Requests::deliver`] follows. One that was cancelled meanwhile is not here, and that is no
    /// fault: the worker has not heard of it yet. So it is with all that follows.
    pub(super) fn on_token(
        &mut self,
        id: RequestId,
        index: u32,
        token: u32,
        logprobs: Option<TokenLogprobs>,
    ) -> Result<(), Broken> {
        let Some(running) = self.0.get_mut(&id) else { return Ok(()) };
        if running.ticket.entry().task() == Task::Embed {
            return Err(Broken::TokenOfEmbedding);
        }
        Ok(running.ticket.entry_mut().on_token(index, token, logprobs)?)
    }

    pub(super) fn on_finished(
        &mut self,
        id: RequestId,
        reason: FinishReason,
        usage: Usage,
        patience: Duration,
    ) -> Result<(), Broken> {
        let Some(running) = self.0.get(&id) else { return Ok(()) };
        let (told, came) = (usage.completion_tokens, running.ticket.entry().emitted().len());
        if u32::try_from(came) != Ok(told) {
            return Err(Broken::Count { told, came });
        }
        let Some(mut running) = self.0.remove(&id) else { return Ok(()) };
        running.ticket.entry_mut().on_cached(usage.cached_tokens);
        let terminal = running.ticket.entry().completed(reason);
        running.ticket.conclude_delivered(terminal, patience);
        Ok(())
    }

    pub(super) fn on_embedded(&mut self, id: RequestId, values: Vec<f32>, usage: Usage) -> Result<(), Broken> {
        if self.0.get(&id).is_some_and(|running| running.ticket.entry().task() != Task::Embed) {
            return Err(Broken::EmbeddingOfText);
        }
        self.conclude(id, Terminal::Embedded { values, usage });
        Ok(())
    }

    /// Moves what is recorded to the client.
    pub(super) fn deliver(&mut self, id: RequestId) -> Taking {
        let Some(running) = self.0.get_mut(&id) else { return Taking::Well };
        match running.ticket.deliver() {
            Delivery::Gone => Taking::Gone,
            Delivery::Stalled if !running.stalled => {
                running.stalled = true;
                Taking::Slowly(running.ticket.room())
            }
            Delivery::All | Delivery::Stalled => Taking::Well,
        }
    }

    /// A client that read slowly has read: moves on.
    pub(super) fn on_room(&mut self, id: RequestId) -> Taking {
        if let Some(running) = self.0.get_mut(&id) {
            running.stalled = false;
        }
        self.deliver(id)
    }

    /// All go back to the router, with their tickets.
    pub(super) fn give_back(&mut self) {
        self.0.clear();
    }

    /// The same after the death of their worker, except those that were there too often.
    pub(super) fn give_back_after_death(&mut self, deaths_max: u32) {
        for (_, mut running) in std::mem::take(&mut self.0) {
            if running.ticket.entry_mut().on_death(deaths_max) == AfterDeath::Poison {
                let deaths = running.ticket.entry().deaths();
                running.ticket.conclude(Terminal::Failed(Failure::Poison { deaths }));
            }
        }
    }
}
