//! Takes requests, finds each a replica, and goes on with them when a worker dies. Owns: the table of models and
//! replicas, admission, and every request that no replica has at the moment. Never: tokens, devices, workers.
//! Started by `house`; if it dies, requests in flight go on, new ones are refused until it is back, and the replicas tell
//! the new one what they have.
//!
//! ```text
//! a model:  [Loading] --ReplicaReady--> [Serving] --last ReplicaDown--> [Waiting] --ReplicaReady--> [Serving]
//!               |                           |                               |
//!               +------ last ReplicaGone ---+-------------------------------+--> [Unavailable]
//!   Loading: new requests are refused with a time.  Serving: they go to the least busy ready replica.
//!   Waiting: a worker is being restarted; new requests and those of the dead worker wait, within the admission limits.
//!   Unavailable: whoever waits fails, new requests are refused.
//! ```

mod accept;
mod drain;
mod handle;
mod service;

pub use handle::RouterHandle;

use crate::engine::RequestId;
use crate::events::{Clock, EventBus};
use crate::journal::{Open, Ticket};
use crate::messages::{
    Drained, Failure, Generate, HouseEvent, Refusal, ReplicaId, RequestCounters, RouterStatus, Terminal,
};
use crate::model::ModelMsg;
use crate::policy::admission::AdmissionLimits;
use crate::stream::TokenStream;
use drain::Draining;
use playhouse_config::{Limits, Model};
use ractor::{Actor, ActorProcessingErr, ActorRef, MessagingErr, RpcReplyPort};
use service::{ReplicaState, Service};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use tracing::Span;

/// How often deadlines of waiting requests are looked at.
const TICK: Duration = Duration::from_millis(250);

/// What the router is told.
#[derive(Debug)]
pub enum RouterMsg {
    /// A client's request, for `prefer` if it is ready.
    Generate {
        /// The request.
        request: Generate,
        /// The replica that was asked directly.
        prefer: Option<ReplicaId>,
        /// What the spans of its life are part of.
        span: Span,
        /// Where the stream or the refusal goes.
        reply: RpcReplyPort<Result<TokenStream, Refusal>>,
    },
    /// A ticket was dropped: its holder died, or its worker did.
    #[doc(hidden)]
    Returned(Box<Open>),
    /// A request ended.
    Concluded {
        /// Which.
        id: RequestId,
        /// How.
        outcome: Concluded,
    },
    /// A client wants a request ended, or is gone.
    Cancel(RequestId),
    /// A replica exists, with the requests it has.
    ReplicaUp {
        /// Which.
        replica: ReplicaId,
        /// Its actor.
        actor: ActorRef<ModelMsg>,
        /// Requests it has, with the tokens they may need.
        open: Vec<(RequestId, u64)>,
    },
    /// A replica takes requests.
    ReplicaReady {
        /// Which.
        replica: ReplicaId,
        /// Most tokens of a sequence.
        n_ctx: u32,
    },
    /// A replica takes no requests, and will again.
    ReplicaDown(ReplicaId),
    /// A replica takes no requests, and nobody knows when it will.
    ReplicaGone(ReplicaId),
    /// A replica does not exist any more.
    ReplicaRemoved(ReplicaId),
    /// A replica computed so many tokens since it last said so.
    Computed {
        /// Which.
        replica: ReplicaId,
        /// Prompt and output.
        tokens: u64,
    },
    /// The models changed.
    Configure {
        /// All of them.
        models: Vec<Model>,
        /// The limits.
        limits: Limits,
    },
    /// Take nothing more; say when all has ended, or end it when the time is up.
    Drain {
        /// How long open requests may take.
        deadline: Duration,
        /// Answered when none is left, or the drain is taken back.
        reply: RpcReplyPort<Drained>,
    },
    /// Take requests again; answered with whether they were refused.
    Undrain(RpcReplyPort<bool>),
    /// Look at the clock.
    Tick,
    /// Say who serves a model, by its own name: for raw messages.
    Replicas(String, RpcReplyPort<Vec<(ReplicaId, ActorRef<ModelMsg>)>>),
    /// Say what there is.
    Status(RpcReplyPort<RouterStatus>),
}

/// How a request ended, for counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Concluded {
    /// Well.
    Completed,
    /// Not well.
    Failed,
    /// As poison.
    Poisoned,
    /// By its client.
    Cancelled,
}

/// What the router starts with.
#[derive(Debug)]
pub struct RouterArgs {
    /// The models.
    pub models: Vec<Model>,
    /// The limits.
    pub limits: Limits,
    /// The name under which it is spoken to.
    pub handle: RouterHandle,
    /// Where news go.
    pub events: EventBus,
    /// The time.
    pub clock: Clock,
}

/// The router.
#[derive(Debug)]
pub struct Router;

/// What only the router changes.
#[derive(Debug)]
pub struct RouterState {
    args: RouterArgs,
    services: BTreeMap<String, Service>,
    open: BTreeMap<RequestId, Row>,
    counters: RequestCounters,
    draining: Option<Draining>,
}

#[derive(Debug)]
struct Row {
    model: String,
    tokens: u64,
    /// Whether admission counts it: one that a dead router accepted may find the new one full.
    counted: bool,
    /// Its client wants it ended, and it is on its way from one place to another.
    cancelled: bool,
    replica: Option<ReplicaId>,
}

impl Actor for Router {
    type Msg = RouterMsg;
    type State = RouterState;
    type Arguments = RouterArgs;

    async fn pre_start(&self, me: ActorRef<RouterMsg>, args: RouterArgs) -> Result<RouterState, ActorProcessingErr> {
        let mut state = RouterState {
            args,
            services: BTreeMap::new(),
            open: BTreeMap::new(),
            counters: RequestCounters::default(),
            draining: None,
        };
        // A drain outlives the router that began it.
        state.draining = state.args.handle.draining().map(Draining::taken_over);
        let models = std::mem::take(&mut state.args.models);
        state.configure(&models);
        me.send_interval(TICK, || RouterMsg::Tick);
        Ok(state)
    }

    async fn handle(
        &self,
        _me: ActorRef<RouterMsg>,
        message: RouterMsg,
        state: &mut RouterState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RouterMsg::Generate { request, prefer, span, reply } => state.generate(request, prefer, span, reply),
            RouterMsg::Returned(open) => state.returned(open),
            RouterMsg::Concluded { id, outcome } => state.concluded(id, outcome),
            RouterMsg::Cancel(id) => state.cancel(id),
            RouterMsg::ReplicaUp { replica, actor, open } => state.replica_up(replica, actor, open),
            RouterMsg::ReplicaReady { replica, n_ctx } => state.replica_ready(&replica, n_ctx),
            RouterMsg::ReplicaDown(replica) => state.replica_down(&replica, ReplicaState::Down),
            RouterMsg::ReplicaGone(replica) => state.replica_down(&replica, ReplicaState::Gone),
            RouterMsg::ReplicaRemoved(replica) => state.replica_removed(&replica),
            RouterMsg::Computed { replica, tokens } => state.computed(&replica, tokens),
            RouterMsg::Configure { models, limits } => {
                state.args.limits = limits;
                state.configure(&models);
            }
            RouterMsg::Drain { deadline, reply } => state.drain(deadline, reply),
            RouterMsg::Undrain(reply) => {
                // Who asked may be gone.
                let _ = reply.send(state.undrain());
            }
            RouterMsg::Tick => state.tick(),
            RouterMsg::Replicas(model, reply) => {
                let _ = reply.send(state.replicas_of(&model));
            }
            RouterMsg::Status(reply) => {
                // Who asked may be gone.
                let _ = reply.send(state.status());
            }
        }
        Ok(())
    }
}

impl RouterState {
    fn configure(&mut self, models: &[Model]) {
        let limits =
            AdmissionLimits { requests: self.args.limits.queued_requests, tokens: self.args.limits.queued_tokens };
        let is_configured = |name: &String| models.iter().any(|model| model.name == *name);
        for (_, mut service) in self.services.extract_if(.., |name, _| !is_configured(name)) {
            service.fail_waiting(&Failure::Unavailable);
        }
        for model in models {
            let service = self.services.entry(model.name.clone()).or_insert_with(|| Service::new(limits));
            service.configure(model, limits);
        }
    }

    /// Gives a ticket to a replica, or lets it wait for one, or ends it.
    fn route(&mut self, mut ticket: Ticket, prefer: Option<ReplicaId>) {
        let Some(service) = self.services.get_mut(ticket.entry().model()) else {
            return ticket.conclude(Terminal::Failed(Failure::Unavailable));
        };
        let (request, tokens) = (ticket.entry().id(), ticket.entry().tokens_max());
        while let Some(id) = service.choose(prefer.as_ref()) {
            let Some(replica) = service.replicas.get_mut(&id) else { break };
            match replica.actor.send_message(ModelMsg::Submit(ticket)) {
                Err(MessagingErr::SendErr(ModelMsg::Submit(back))) => {
                    // Its supervisor will say so, too.
                    replica.state = ReplicaState::Down;
                    ticket = back;
                }
                _ => {
                    replica.open_tokens += tokens;
                    if let Some(row) = self.open.get_mut(&request) {
                        row.replica = Some(id);
                    }
                    return;
                }
            }
        }
        if service.is_lost() {
            return ticket.conclude(Terminal::Failed(Failure::Unavailable));
        }
        service.waiting.push_back(ticket);
    }

    /// Routes one that may have been on its way already: if a worker died with it and another takes it, it was resumed.
    fn route_again(&mut self, ticket: Ticket) {
        let (id, deaths, emitted) = (ticket.entry().id(), ticket.entry().deaths(), ticket.entry().emitted().len());
        self.route(ticket, None);
        let replica = self.open.get(&id).and_then(|row| row.replica.clone());
        if let Some(replica) = replica.filter(|_| deaths > 0) {
            self.counters.resumed += 1;
            let emitted = u32::try_from(emitted).unwrap_or(u32::MAX);
            self.args.events.tell(HouseEvent::Resumed { id, emitted, replica });
        }
    }

    /// A ticket came back: its request goes on.
    fn returned(&mut self, open: Box<Open>) {
        let ticket = Ticket::reopen(open, self.args.handle.clone());
        let id = ticket.entry().id();
        self.adopt(id, ticket.entry().model(), ticket.entry().tokens_max());
        let row = self.open.get_mut(&id);
        let cancelled = row.as_ref().is_some_and(|row| row.cancelled);
        if let Some((replica, tokens)) = row.and_then(|row| Some((row.replica.take()?, row.tokens))) {
            self.unassign(&replica, tokens);
        }
        if cancelled {
            return ticket.conclude(Terminal::Cancelled);
        }
        if self.draining.as_ref().is_some_and(Draining::is_over) {
            return ticket.conclude(Terminal::Failed(Failure::Draining));
        }
        if let Some(reason) = ticket.entry().settled() {
            let terminal = ticket.entry().completed(reason);
            return ticket.conclude_delivered(terminal, self.args.limits.client_timeout);
        }
        self.route_again(ticket);
    }

    /// Counts a request that a router accepted which died since. Full or not, it is there.
    fn adopt(&mut self, id: RequestId, model: &str, tokens: u64) {
        if self.open.contains_key(&id) {
            return;
        }
        let service = self.services.get_mut(model);
        let counted = service.is_some_and(|service| service.admission.admit(tokens).is_ok());
        self.open.insert(id, Row { model: model.to_owned(), tokens, counted, cancelled: false, replica: None });
    }

    fn unassign(&mut self, replica: &ReplicaId, tokens: u64) {
        if let Some(found) = self.replica_mut(replica) {
            found.open_tokens = found.open_tokens.saturating_sub(tokens);
        }
    }

    fn replica_mut(&mut self, id: &ReplicaId) -> Option<&mut service::Replica> {
        self.services.get_mut(&id.model)?.replicas.get_mut(id)
    }

    fn concluded(&mut self, id: RequestId, outcome: Concluded) {
        match outcome {
            Concluded::Completed => self.counters.completed += 1,
            Concluded::Failed => self.counters.failed += 1,
            Concluded::Poisoned => self.counters.poisoned += 1,
            Concluded::Cancelled => self.counters.cancelled += 1,
        }
        if outcome == Concluded::Poisoned {
            self.args.events.tell(HouseEvent::Poisoned { id });
        }
        let Some(row) = self.open.remove(&id) else { return };
        if let Some(replica) = &row.replica {
            self.unassign(replica, row.tokens);
        }
        if let Some(service) = self.services.get_mut(&row.model).filter(|_| row.counted) {
            service.admission.release(row.tokens);
        }
        self.finish_drain_if_empty();
    }

    fn cancel(&mut self, id: RequestId) {
        let Some(row) = self.open.get_mut(&id) else { return };
        row.cancelled = true;
        let (model, replica) = (row.model.clone(), row.replica.clone());
        if let Some(replica) = replica.and_then(|replica| self.replica_mut(&replica)) {
            // A replica that has it no more has given the ticket back: it ends when it arrives here.
            let _ = replica.actor.send_message(ModelMsg::Cancel(id));
            return;
        }
        let Some(service) = self.services.get_mut(&model) else { return };
        if let Some(index) = service.waiting.iter().position(|ticket| ticket.entry().id() == id)
            && let Some(ticket) = service.waiting.remove(index)
        {
            ticket.conclude(Terminal::Cancelled);
        }
    }

    fn replica_up(&mut self, id: ReplicaId, actor: ActorRef<ModelMsg>, open: Vec<(RequestId, u64)>) {
        for (request, tokens) in &open {
            self.adopt(*request, &id.model, *tokens);
            if let Some(row) = self.open.get_mut(request) {
                row.replica = Some(id.clone());
            }
        }
        if let Some(service) = self.services.get_mut(&id.model) {
            service.up(id, actor, open.iter().map(|(_, tokens)| tokens).sum());
        }
    }

    fn replica_ready(&mut self, id: &ReplicaId, n_ctx: u32) {
        let Some(service) = self.services.get_mut(&id.model) else { return };
        let Some(replica) = service.replicas.get_mut(id) else { return };
        replica.ready(n_ctx);
        let waiting = std::mem::take(&mut service.waiting);
        waiting.into_iter().for_each(|ticket| self.route_again(ticket));
    }

    fn replica_down(&mut self, id: &ReplicaId, state: ReplicaState) {
        if let Some(replica) = self.replica_mut(id) {
            replica.state = state;
        }
        self.fail_waiting_if_lost(&id.model);
    }

    fn replica_removed(&mut self, id: &ReplicaId) {
        if let Some(service) = self.services.get_mut(&id.model) {
            service.replicas.remove(id);
        }
        self.fail_waiting_if_lost(&id.model);
    }

    fn fail_waiting_if_lost(&mut self, model: &str) {
        if let Some(service) = self.services.get_mut(model).filter(|service| service.is_lost()) {
            service.fail_waiting(&Failure::Unavailable);
        }
    }

    fn computed(&mut self, id: &ReplicaId, tokens: u64) {
        let now = self.args.clock.now();
        if let Some(service) = self.services.get_mut(&id.model) {
            service.admission.measured(tokens, now);
        }
    }

    fn tick(&mut self) {
        self.end_if_over();
        let now = Instant::now();
        for service in self.services.values_mut() {
            for ticket in std::mem::take(&mut service.waiting) {
                if ticket.entry().deadline() <= now {
                    ticket.conclude(Terminal::Failed(Failure::Deadline));
                } else {
                    service.waiting.push_back(ticket);
                }
            }
        }
        self.finish_drain_if_empty();
    }

    fn replicas_of(&self, model: &str) -> Vec<(ReplicaId, ActorRef<ModelMsg>)> {
        let replicas = self.services.get(model).into_iter().flat_map(|service| &service.replicas);
        replicas.map(|(id, replica)| (id.clone(), replica.actor.clone())).collect()
    }

    fn status(&self) -> RouterStatus {
        RouterStatus {
            services: self.services.iter().map(|(name, service)| service.status(name)).collect(),
            requests: self.counters,
            draining: self.draining.is_some(),
        }
    }
}
