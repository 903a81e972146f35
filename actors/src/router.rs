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

use crate::engine::{EngineRequest, RequestError, RequestId};
use crate::events::{Clock, EventBus};
use crate::journal::{Entry, Open, Ticket, tokens_max};
use crate::messages::{
    Drained, Failure, Generate, HouseEvent, Refusal, ReplicaId, RequestCounters, RouterStatus, ServiceStatus, Terminal,
};
use crate::model::ModelMsg;
use crate::policy::admission::{Admission, AdmissionLimits};
use crate::policy::routing::{Candidate, choose};
use crate::stream::{StreamSender, TokenStream};
use playhouse_config::{Limits, Model};
use ractor::{Actor, ActorProcessingErr, ActorRef, MessagingErr, RpcReplyPort};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::Span;

/// Requests that may wait in the router's mailbox; ractor's mailboxes have no bound of their own.
const INBOX_MAX: usize = 4096;
/// How often deadlines of waiting requests are looked at.
const TICK: Duration = Duration::from_millis(250);
/// For replicas to tell a new router what they have.
const SETTLING: Duration = Duration::from_secs(1);
/// What a client is told while a model loads for the first time.
const LOADING_RETRY_AFTER: Duration = Duration::from_secs(5);

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

/// Speaks to the router, whichever it is: it outlives a restart of the router.
#[derive(Debug, Clone, Default)]
pub struct RouterHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Who is the router now: a name, not a table.
    current: RwLock<Option<ActorRef<RouterMsg>>>,
    /// What came while there was no router and must not be lost: tickets. `None` when no router comes any more.
    parked: Mutex<Option<Vec<RouterMsg>>>,
    next_id: AtomicU64,
    inbox: Arc<Semaphore>,
    /// Until when a drain lets requests go on: what the next router must know, too.
    draining: Mutex<Option<Instant>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            current: RwLock::new(None),
            parked: Mutex::new(Some(Vec::new())),
            next_id: AtomicU64::new(1),
            inbox: Arc::new(Semaphore::new(INBOX_MAX)),
            draining: Mutex::new(None),
        }
    }
}

impl RouterHandle {
    /// Asks for a stream.
    ///
    /// # Errors
    /// [`Refusal`]; nothing was accepted.
    pub async fn generate(&self, request: Generate) -> Result<TokenStream, Refusal> {
        self.generate_on(request, None).await
    }

    pub(crate) async fn generate_on(
        &self,
        request: Generate,
        prefer: Option<ReplicaId>,
    ) -> Result<TokenStream, Refusal> {
        let _room = self.shared.inbox.try_acquire().map_err(|_| Refusal::Overloaded)?;
        let (reply, answer) = ractor::concurrency::oneshot();
        let Some(router) = self.current() else { return Err(Refusal::RouterLost) };
        match router.send_message(RouterMsg::Generate { request, prefer, span: Span::current(), reply: reply.into() }) {
            Ok(()) => answer.await.unwrap_or(Err(Refusal::RouterLost)),
            Err(_) => Err(Refusal::RouterLost),
        }
    }

    /// Ends a request. One that has ended already is none of anybody's business.
    pub fn cancel(&self, id: RequestId) {
        self.tell(RouterMsg::Cancel(id));
    }

    /// The router's actor now, for raw messages.
    pub fn current(&self) -> Option<ActorRef<RouterMsg>> {
        self.shared.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the router, if there is one.
    pub(crate) fn tell(&self, message: RouterMsg) {
        if let Some(router) = self.current() {
            // A router that is gone is replaced, and told everything again by those who know.
            let _ = router.send_message(message);
        }
    }

    /// Tells the router, or the next one if there is none now.
    pub(crate) fn post(&self, message: RouterMsg) {
        let refused = match self.current() {
            Some(router) => match router.send_message(message) {
                Err(MessagingErr::SendErr(message)) => Some(message),
                _ => None,
            },
            None => Some(message),
        };
        let Some(message) = refused else { return };
        if let Some(parked) = &mut *self.parked() {
            return parked.push(message);
        }
        self.end(message);
    }

    fn parked(&self) -> MutexGuard<'_, Option<Vec<RouterMsg>>> {
        self.shared.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No router comes any more: the client of a ticket learns it.
    fn end(&self, message: RouterMsg) {
        if let RouterMsg::Returned(open) = message {
            Ticket::reopen(open, self.clone()).conclude(Terminal::Failed(Failure::Draining));
        }
    }

    pub(crate) fn concluded(&self, id: RequestId, terminal: &Terminal) {
        let outcome = match terminal {
            Terminal::Completed { .. } | Terminal::Embedded { .. } => Concluded::Completed,
            Terminal::Failed(Failure::Poison { .. }) => Concluded::Poisoned,
            Terminal::Failed(_) => Concluded::Failed,
            Terminal::Cancelled => Concluded::Cancelled,
        };
        self.tell(RouterMsg::Concluded { id, outcome });
    }

    /// Makes `router` the one; what was parked goes to it.
    pub(crate) fn install(&self, router: Option<ActorRef<RouterMsg>>) {
        *self.shared.current.write().unwrap_or_else(PoisonError::into_inner) = router.clone();
        if router.is_none() {
            return;
        }
        let parked = self.parked().as_mut().map(std::mem::take);
        parked.into_iter().flatten().for_each(|message| self.post(message));
    }

    /// The host ends, in peace or by a failure of its root: whoever still waits learns it, and whoever comes later.
    pub(crate) fn close(&self) {
        self.install(None);
        let parked = self.parked().take();
        parked.into_iter().flatten().for_each(|message| self.end(message));
    }

    fn draining(&self) -> MutexGuard<'_, Option<Instant>> {
        // One word: whole whoever panics.
        self.shared.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_id(&self) -> RequestId {
        RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }
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
struct Service {
    aliases: Vec<String>,
    required: bool,
    admission: Admission,
    replicas: BTreeMap<ReplicaId, Replica>,
    waiting: VecDeque<Ticket>,
}

#[derive(Debug)]
struct Replica {
    actor: ActorRef<ModelMsg>,
    ready: bool,
    /// It was ready once: who waits for it waits for a restart, not for a first load.
    was_ready: bool,
    gone: bool,
    n_ctx: u32,
    open_tokens: u64,
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

#[derive(Debug)]
struct Draining {
    until: Instant,
    /// Before that, a router that has just begun may not have been told of every request yet.
    settled: Instant,
    ended: u32,
    reply: Vec<RpcReplyPort<Drained>>,
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
        let until = *state.args.handle.draining();
        let settled = Instant::now() + SETTLING;
        state.draining = until.map(|until| Draining { until, settled, ended: 0, reply: Vec::new() });
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
            RouterMsg::ReplicaDown(replica) => state.replica_down(&replica, false),
            RouterMsg::ReplicaGone(replica) => state.replica_down(&replica, true),
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
                let service = state.services.get(&model);
                let replicas = service.into_iter().flat_map(|service| &service.replicas);
                let _ = reply.send(replicas.map(|(id, replica)| (id.clone(), replica.actor.clone())).collect());
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
        let removed: Vec<String> =
            self.services.keys().filter(|name| !models.iter().any(|model| model.name == **name)).cloned().collect();
        for name in removed {
            if let Some(service) = self.services.remove(&name) {
                service.waiting.into_iter().for_each(|ticket| ticket.conclude(Terminal::Failed(Failure::Unavailable)));
            }
        }
        for model in models {
            let service = self.services.entry(model.name.clone()).or_insert_with(|| Service {
                aliases: Vec::new(),
                required: model.required,
                admission: Admission::new(limits),
                replicas: BTreeMap::new(),
                waiting: VecDeque::new(),
            });
            service.aliases.clone_from(&model.aliases);
            service.required = model.required;
            service.admission.set_limits(limits);
        }
    }

    fn generate(
        &mut self,
        request: Generate,
        prefer: Option<ReplicaId>,
        span: Span,
        reply: RpcReplyPort<Result<TokenStream, Refusal>>,
    ) {
        match self.accept(request, span) {
            Ok((ticket, stream)) => {
                self.counters.accepted += 1;
                // A client that is gone drops the stream here, and that cancels the request.
                let _ = reply.send(Ok(stream));
                self.route(ticket, prefer);
            }
            Err(refusal) => {
                self.counters.refused += 1;
                let _ = reply.send(Err(refusal));
            }
        }
    }

    fn accept(&mut self, request: Generate, span: Span) -> Result<(Ticket, TokenStream), Refusal> {
        if self.draining.is_some() {
            return Err(Refusal::Draining);
        }
        let named = |(name, service): &(&String, &mut Service)| {
            **name == request.model || service.aliases.contains(&request.model)
        };
        let found = self.services.iter_mut().find(named);
        let (name, service) = found.ok_or_else(|| Refusal::UnknownModel { model: request.model.clone() })?;
        let model = name.clone();
        service.may_take(&model)?;
        service.fits(&request)?;
        let tokens = tokens_max(request.prompt.len(), request.max_tokens);
        service.admission.admit(tokens).map_err(|full| Refusal::Busy { model: model.clone(), full })?;

        let limits = &self.args.limits;
        let timeout = request.timeout.unwrap_or(limits.request_timeout).min(limits.request_timeout);
        let id = self.args.handle.next_id();
        let deadline = Instant::now() + timeout;
        let capacity = usize::try_from(limits.stream_events).unwrap_or(usize::MAX);
        let (sender, stream) = StreamSender::new(id, capacity, self.args.handle.clone());
        let entry = Entry::new(engine_request(id, request), model.clone(), deadline);
        self.open.insert(id, Row { model, tokens, counted: true, cancelled: false, replica: None });
        Ok((Ticket::new(entry, sender, span, self.args.handle.clone()), stream))
    }

    /// Gives a ticket to a replica, or lets it wait for one, or ends it.
    fn route(&mut self, ticket: Ticket, prefer: Option<ReplicaId>) {
        let model = ticket.entry().model().to_owned();
        let Some(service) = self.services.get_mut(&model) else {
            return ticket.conclude(Terminal::Failed(Failure::Unavailable));
        };
        let mut ticket = ticket;
        loop {
            let chosen = prefer.clone().filter(|id| service.replicas.get(id).is_some_and(|replica| replica.ready));
            let Some(id) = chosen.or_else(|| service.choose()) else { break };
            let Some(replica) = service.replicas.get_mut(&id) else { break };
            let (request, tokens) = (ticket.entry().id(), ticket.entry().tokens_max());
            match replica.actor.send_message(ModelMsg::Submit(ticket)) {
                Err(MessagingErr::SendErr(ModelMsg::Submit(back))) => {
                    // Its supervisor will say so, too.
                    replica.ready = false;
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
        if service.replicas.values().all(|replica| replica.gone) {
            return ticket.conclude(Terminal::Failed(Failure::Unavailable));
        }
        service.waiting.push_back(ticket);
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
        if self.draining.as_ref().is_some_and(|draining| Instant::now() >= draining.until) {
            return ticket.conclude(Terminal::Failed(Failure::Draining));
        }
        if let Some(reason) = ticket.entry().settled() {
            let terminal = ticket.entry().completed(reason);
            return ticket.conclude_delivered(terminal, self.args.limits.client_timeout);
        }
        let (deaths, emitted) = (ticket.entry().deaths(), ticket.entry().emitted().len());
        self.route(ticket, None);
        if deaths > 0 {
            self.tell_resumed(id, emitted);
        }
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

    fn tell_resumed(&mut self, id: RequestId, emitted: usize) {
        let Some(replica) = self.open.get(&id).and_then(|row| row.replica.clone()) else { return };
        self.counters.resumed += 1;
        let emitted = u32::try_from(emitted).unwrap_or(u32::MAX);
        self.args.events.tell(HouseEvent::Resumed { id, emitted, replica });
    }

    fn unassign(&mut self, replica: &ReplicaId, tokens: u64) {
        if let Some(found) = self.replica_mut(replica) {
            found.open_tokens = found.open_tokens.saturating_sub(tokens);
        }
    }

    fn replica_mut(&mut self, id: &ReplicaId) -> Option<&mut Replica> {
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
        let Some(service) = self.services.get_mut(&id.model) else { return };
        let open_tokens = open.iter().map(|(_, tokens)| tokens).sum();
        let was_ready = service.replicas.get(&id).is_some_and(|replica| replica.was_ready);
        let replica = Replica { actor, ready: false, was_ready, gone: false, n_ctx: u32::MAX, open_tokens };
        service.replicas.insert(id, replica);
    }

    fn replica_ready(&mut self, id: &ReplicaId, n_ctx: u32) {
        let Some(replica) = self.replica_mut(id) else { return };
        (replica.ready, replica.was_ready, replica.gone, replica.n_ctx) = (true, true, false, n_ctx);
        let Some(service) = self.services.get_mut(&id.model) else { return };
        let waiting = std::mem::take(&mut service.waiting);
        for ticket in waiting {
            let (request, deaths, emitted) =
                (ticket.entry().id(), ticket.entry().deaths(), ticket.entry().emitted().len());
            self.route(ticket, None);
            if deaths > 0 {
                self.tell_resumed(request, emitted);
            }
        }
    }

    fn replica_down(&mut self, id: &ReplicaId, gone: bool) {
        if let Some(replica) = self.replica_mut(id) {
            (replica.ready, replica.gone) = (false, gone);
        }
        self.fail_waiting_if_unavailable(&id.model);
    }

    fn replica_removed(&mut self, id: &ReplicaId) {
        if let Some(service) = self.services.get_mut(&id.model) {
            service.replicas.remove(id);
        }
        self.fail_waiting_if_unavailable(&id.model);
    }

    fn fail_waiting_if_unavailable(&mut self, model: &str) {
        let Some(service) = self.services.get_mut(model) else { return };
        if service.replicas.values().all(|replica| replica.gone) {
            let waiting = std::mem::take(&mut service.waiting);
            waiting.into_iter().for_each(|ticket| ticket.conclude(Terminal::Failed(Failure::Unavailable)));
        }
    }

    fn computed(&mut self, id: &ReplicaId, tokens: u64) {
        let now = self.args.clock.now();
        if let Some(service) = self.services.get_mut(&id.model) {
            service.admission.measured(tokens, now);
        }
    }

    fn drain(&mut self, deadline: Duration, reply: RpcReplyPort<Drained>) {
        let now = Instant::now();
        let until = now + deadline;
        let draining = self.draining.get_or_insert(Draining { until, settled: now, ended: 0, reply: Vec::new() });
        // A second, more impatient call shortens the wait.
        draining.until = draining.until.min(until);
        draining.reply.push(reply);
        *self.args.handle.draining() = Some(draining.until);
        self.tick();
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let over = self.draining.as_ref().is_some_and(|draining| now >= draining.until);
        for service in self.services.values_mut() {
            for ticket in std::mem::take(&mut service.waiting) {
                match () {
                    () if over => ticket.conclude(Terminal::Failed(Failure::Draining)),
                    () if ticket.entry().deadline() <= now => ticket.conclude(Terminal::Failed(Failure::Deadline)),
                    () => service.waiting.push_back(ticket),
                }
            }
        }
        if over {
            self.end_everything();
        }
        self.finish_drain_if_empty();
    }

    fn end_everything(&mut self) {
        if let Some(draining) = &mut self.draining {
            draining.ended = draining.ended.max(u32::try_from(self.open.len()).unwrap_or(u32::MAX));
        }
        for replica in self.services.values().flat_map(|service| service.replicas.values()) {
            // A replica that is gone has nothing to end.
            let _ = replica.actor.send_message(ModelMsg::EndAll(Failure::Draining));
        }
    }

    fn finish_drain_if_empty(&mut self) {
        let is_over = |draining: &&mut Draining| self.open.is_empty() && draining.settled <= Instant::now();
        let Some(draining) = self.draining.as_mut().filter(is_over) else { return };
        for reply in draining.reply.drain(..) {
            let _ = reply.send(Drained::Empty { ended: draining.ended });
        }
    }

    /// What waits or runs goes on as if nothing had been asked.
    fn undrain(&mut self) -> bool {
        *self.args.handle.draining() = None;
        let Some(draining) = self.draining.take() else { return false };
        for reply in draining.reply {
            // Those who wait for the end of the drain.
            let _ = reply.send(Drained::Undone);
        }
        true
    }

    fn status(&self) -> RouterStatus {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let services = self.services.iter().map(|(name, service)| ServiceStatus {
            model: name.clone(),
            ready: count(service.replicas.values().filter(|replica| replica.ready).count()),
            replicas: count(service.replicas.len()),
            open_requests: service.admission.open_requests(),
            open_tokens: service.admission.open_tokens(),
            waiting: count(service.waiting.len()),
            tokens_per_second: service.admission.tokens_per_second(),
            required: service.required,
        });
        RouterStatus { services: services.collect(), requests: self.counters, draining: self.draining.is_some() }
    }
}

impl Service {
    /// Whether somebody serves this model, or soon will again.
    fn may_take(&self, model: &str) -> Result<(), Refusal> {
        let model = || model.to_owned();
        if self.replicas.values().any(|replica| replica.ready || (replica.was_ready && !replica.gone)) {
            return Ok(());
        }
        if self.replicas.values().all(|replica| replica.gone) && !self.replicas.is_empty() {
            return Err(Refusal::Unavailable { model: model() });
        }
        Err(Refusal::Loading { model: model(), retry_after: LOADING_RETRY_AFTER })
    }

    /// What an engine would refuse anyway is refused before it is accepted.
    fn fits(&self, request: &Generate) -> Result<(), Refusal> {
        if request.prompt.is_empty() {
            let (param, found, expected) = ("prompt".into(), "empty".into(), "at least one token".into());
            return Err(Refusal::Invalid(RequestError::InvalidParam { param, found, expected }));
        }
        let limit = self.replicas.values().map(|replica| replica.n_ctx).max().unwrap_or(u32::MAX);
        let needed = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX).saturating_add(1);
        if needed > limit {
            return Err(Refusal::Invalid(RequestError::ContextExceeded { needed, limit }));
        }
        Ok(())
    }

    fn choose(&self) -> Option<ReplicaId> {
        let candidates = self
            .replicas
            .iter()
            .map(|(id, replica)| (id, Candidate { ready: replica.ready, open_tokens: replica.open_tokens }));
        choose(candidates).cloned()
    }
}

fn engine_request(id: RequestId, request: Generate) -> EngineRequest {
    EngineRequest {
        id,
        task: request.task,
        prompt: request.prompt,
        emitted: Vec::new(),
        sampling: request.sampling,
        max_tokens: request.max_tokens,
        min_tokens: request.min_tokens,
        stop_ids: request.stop_ids,
        logprobs: request.logprobs,
        constraint: request.constraint,
        priority: request.priority,
        deadline: None,
    }
}
