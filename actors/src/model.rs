//! The async front of one worker. Owns: the link to the worker, its state machine, and the requests that the worker has.
//! Never: devices, other replicas, the decision to restart.
//! Started by `device_supervisor`, which also restarts it; if it dies, its worker is killed with the link, and its
//! requests go back to the router with their tickets.
//!
//! ```text
//!             slot free            Ready                       Stop, Recycle
//! [Waiting] ------------> [Loading] -----> [Ready] --------------------------> [Stopping]     (from Loading: killed)
//!     ^                       |               |                                     | Exited
//!     |      load_timeout,    |  Exited,      | Exited, step_timeout, missed        v
//!     |      Failed: killed   +-------------> | heartbeat, broken rules: killed  [Stopped], or [Waiting] if recycled
//!     |                                       v
//!     +----- after a while ---- [Backoff] <- [Down] -> [Quarantined] | [Failed] | [Stopped]
//!                                    as the supervisor decides
//! ```
//!
//! A worker starts only when the last one of the replica was reaped: the pump that reads a worker's events holds the
//! replica's slot until the end of those events, even if this actor is gone.

use crate::device_supervisor::DeviceMsg;
use crate::engine::{EngineError, EngineEvent, EngineStats, LoadProgress, RequestId, Task};
use crate::events::EventBus;
use crate::journal::{AfterDeath, Delivery, Ticket};
use crate::link::{LinkError, WorkerFactory, WorkerLink};
use crate::messages::{
    Failure, Generate, Heartbeat, HouseEvent, Phase, Refusal, ReplicaId, ReplicaStatus, Terminal, WorkerCommand,
    WorkerEvent, WorkerReady, WorkerSpec,
};
use crate::policy::ladder::RungCounts;
use crate::policy::outcome::WorkerEnd;
use crate::policy::restart::Decision;
use crate::router::{RouterHandle, RouterMsg};
use crate::stream::TokenStream;
use playhouse_config::{Limits, Supervision};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tracing::Span;

/// Events of a worker that wait to be read; a worker that is further ahead waits.
const EVENTS_MAX: usize = 64;

/// The log shows how far a load has come this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What a model actor is told.
#[derive(Debug)]
pub enum ModelMsg {
    /// A client's request to this very replica; what [`RouterMsg::Generate`] does, for whoever holds a model actor.
    Generate(Generate, RpcReplyPort<Result<TokenStream, Refusal>>),
    /// Take this request.
    Submit(Ticket),
    /// End this one.
    Cancel(RequestId),
    /// End all of them.
    EndAll(Failure),
    /// What the supervisor decided after the end of a worker, with the bytes for KV.
    Decided(Decision, u64),
    /// The model cannot be loaded: start no worker.
    GiveUp(String),
    /// The device was given up: end the worker, give the requests back.
    Quarantine,
    /// End the worker and start another.
    Recycle,
    /// Start, whatever was decided before.
    Start,
    /// End the worker, then say so.
    Stop(RpcReplyPort<()>),
    /// Tell the router again who is here.
    Announce,
    /// Take new limits.
    Configure(Supervision, Limits),
    /// Say how it is.
    Status(RpcReplyPort<ReplicaStatus>),
    #[doc(hidden)]
    Internal(Internal),
}

/// What a model actor tells itself.
#[derive(Debug)]
pub struct Internal(Inner);

#[derive(Debug)]
enum Inner {
    /// The last worker is gone; here is the slot.
    Slot { attempt: u64, slot: OwnedSemaphorePermit },
    /// Events of a worker, and whom to tell when they were handled.
    Events { incarnation: u64, events: Vec<WorkerEvent>, handled: oneshot::Sender<()> },
    /// A back-off is over.
    BackoffOver { attempt: u64 },
    /// A stream has room again.
    Room(RequestId),
    /// A stream had no room for too long.
    Slow(RequestId),
    /// Look at the clock.
    Tick,
}

impl ModelMsg {
    fn internal(inner: Inner) -> Self {
        Self::Internal(Internal(inner))
    }
}

/// What a model actor tells its supervisor.
#[derive(Debug)]
pub enum Report {
    /// A worker takes requests.
    Ready {
        /// Whose.
        replica: ReplicaId,
        /// KV below this is useless.
        kv_min_bytes: u64,
    },
    /// A worker gave something up for want of memory, since the last such report.
    GaveUp {
        /// Whose.
        replica: ReplicaId,
        /// What.
        rungs: RungCounts,
    },
    /// A worker is no more; [`ModelMsg::Decided`] or [`ModelMsg::GiveUp`] is the answer.
    Ended {
        /// Whose.
        replica: ReplicaId,
        /// Why.
        end: WorkerEnd,
    },
}

/// What the supervisor gives.
pub struct ModelArgs {
    /// What workers are started with; the incarnation is counted here.
    pub spec: WorkerSpec,
    /// Timeouts.
    pub supervision: Supervision,
    /// Patience with clients.
    pub limits: Limits,
    /// Starts workers.
    pub factory: Arc<dyn WorkerFactory>,
    /// One permit: the replica's slot.
    pub slot: Arc<Semaphore>,
    /// Who routes.
    pub router: RouterHandle,
    /// Where news go.
    pub events: EventBus,
    /// Who decides.
    pub supervisor: ActorRef<DeviceMsg>,
    /// Counts the workers of this replica, over all its actors.
    pub incarnations: Arc<AtomicU64>,
    /// Whether to start at once; otherwise the device is quarantined, and [`ModelMsg::Start`] follows.
    pub start: bool,
}

/// The actor.
#[derive(Debug)]
pub struct ModelActor;

/// What only the actor changes.
pub struct ModelState {
    args: ModelArgs,
    me: ActorRef<ModelMsg>,
    phase: Phase,
    /// Counts starts and back-offs, so that a late answer to an old one is told from one to the last.
    attempt: u64,
    live: Option<Live>,
    running: BTreeMap<RequestId, Running>,
    last_end: Option<WorkerEnd>,
    stopped: Vec<RpcReplyPort<()>>,
    recycle: bool,
}

/// A worker that was started and not reaped yet.
struct Live {
    link: Box<dyn WorkerLink>,
    incarnation: u64,
    since: Instant,
    heard: Instant,
    told_to_end: Option<Instant>,
    /// Why it was killed or said that it would end: outranks what its exit says.
    end: Option<WorkerEnd>,
    progress: Option<LoadProgress>,
    progress_told: Instant,
    ready: Option<WorkerReady>,
    heartbeat: Option<Heartbeat>,
    computed: u64,
    /// What it gave up for want of memory, as reported.
    rungs: RungCounts,
    /// Commands that did not fit into the worker's queue.
    outbox: VecDeque<WorkerCommand>,
}

/// A request that the worker has.
struct Running {
    ticket: Ticket,
    /// When it was given to the worker.
    since: Instant,
    /// Somebody waits for the client to read.
    stalled: bool,
}

impl Actor for ModelActor {
    type Msg = ModelMsg;
    type State = ModelState;
    type Arguments = ModelArgs;

    async fn pre_start(&self, me: ActorRef<ModelMsg>, args: ModelArgs) -> Result<ModelState, ActorProcessingErr> {
        let start = args.start;
        me.send_interval(args.supervision.heartbeat, || ModelMsg::internal(Inner::Tick));
        let mut state = ModelState {
            args,
            me,
            phase: if start { Phase::Waiting } else { Phase::Quarantined },
            attempt: 0,
            live: None,
            running: BTreeMap::new(),
            last_end: None,
            stopped: Vec::new(),
            recycle: false,
        };
        state.announce();
        if start {
            state.wait_for_slot();
        }
        Ok(state)
    }

    async fn handle(
        &self,
        _me: ActorRef<ModelMsg>,
        message: ModelMsg,
        state: &mut ModelState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ModelMsg::Generate(request, reply) => state.forward(request, reply),
            ModelMsg::Submit(ticket) => state.submit(ticket),
            ModelMsg::Cancel(id) => state.conclude_early(id, Terminal::Cancelled),
            ModelMsg::EndAll(failure) => state.end_all(&failure),
            ModelMsg::Decided(decision, kv_bytes) => state.decided(decision, kv_bytes),
            ModelMsg::GiveUp(reason) => state.give_up(reason),
            ModelMsg::Quarantine => state.quarantine(),
            ModelMsg::Recycle => state.recycle(),
            ModelMsg::Start => state.start_anyway(),
            ModelMsg::Stop(reply) => state.stop(reply),
            ModelMsg::Announce => state.announce(),
            ModelMsg::Configure(supervision, limits) => {
                state.args.supervision = supervision;
                state.args.limits = limits;
            }
            ModelMsg::Status(reply) => {
                // Who asked may be gone.
                let _ = reply.send(state.status());
            }
            ModelMsg::Internal(Internal(inner)) => state.internal(inner),
        }
        Ok(())
    }

    async fn post_stop(&self, _me: ActorRef<ModelMsg>, state: &mut ModelState) -> Result<(), ActorProcessingErr> {
        // The state lives on in the supervision event: what others wait for is given back here, not when it is dropped.
        state.live = None;
        state.running.clear();
        Ok(())
    }
}

impl ModelState {
    fn replica(&self) -> ReplicaId {
        self.args.spec.replica.clone()
    }

    fn report(&self, report: Report) {
        // A supervisor that is gone takes this actor with it.
        let _ = self.args.supervisor.send_message(DeviceMsg::Report(report));
    }

    fn internal(&mut self, inner: Inner) {
        match inner {
            Inner::Slot { attempt, slot } => self.launch(attempt, slot),
            Inner::Events { incarnation, events, handled } => {
                for event in events {
                    self.on_event(incarnation, event);
                }
                // The pump is gone only if the runtime ends.
                let _ = handled.send(());
            }
            Inner::BackoffOver { attempt } => {
                if attempt == self.attempt && self.phase == Phase::Backoff {
                    self.wait_for_slot();
                }
            }
            Inner::Room(id) => self.room(id),
            Inner::Slow(id) => self.conclude_early(id, Terminal::Failed(Failure::SlowClient)),
            Inner::Tick => self.tick(),
        }
    }

    // --- clients -------------------------------------------------------------------------------------------------------

    fn forward(&self, request: Generate, reply: RpcReplyPort<Result<TokenStream, Refusal>>) {
        let message = RouterMsg::Generate { request, prefer: Some(self.replica()), span: Span::none(), reply };
        // Without a router the reply port is dropped here, and the caller sees that.
        self.args.router.tell(message);
    }

    fn submit(&mut self, mut ticket: Ticket) {
        if self.phase != Phase::Ready {
            // Dropped, the ticket goes back to the router, which must not send it here again.
            return self.tell_not_ready();
        }
        ticket.submitted();
        let id = ticket.entry().id();
        let command = WorkerCommand::Submit(ticket.entry().to_request());
        self.running.insert(id, Running { ticket, since: Instant::now(), stalled: false });
        self.send(command);
    }

    fn tell_not_ready(&self) {
        let replica = self.replica();
        self.args.router.tell(match self.phase {
            Phase::Quarantined | Phase::Failed | Phase::Stopped => RouterMsg::ReplicaGone(replica),
            _ => RouterMsg::ReplicaDown(replica),
        });
    }

    /// Ends a request for its client now, and for the worker as soon as it hears of it.
    fn conclude_early(&mut self, id: RequestId, terminal: Terminal) {
        let Some(running) = self.running.remove(&id) else { return };
        running.ticket.conclude(terminal);
        self.send(WorkerCommand::Cancel(id));
    }

    fn end_all(&mut self, failure: &Failure) {
        let ids: Vec<RequestId> = self.running.keys().copied().collect();
        ids.into_iter().for_each(|id| self.conclude_early(id, Terminal::Failed(failure.clone())));
    }

    fn deliver(&mut self, id: RequestId) {
        let Some(running) = self.running.get_mut(&id) else { return };
        match running.ticket.deliver() {
            Delivery::All => {}
            Delivery::Gone => self.conclude_early(id, Terminal::Cancelled),
            Delivery::Stalled if running.stalled => {}
            Delivery::Stalled => {
                running.stalled = true;
                wait_for_room(running.ticket.room(), id, self.args.limits.client_timeout, self.me.clone());
            }
        }
    }

    fn room(&mut self, id: RequestId) {
        if let Some(running) = self.running.get_mut(&id) {
            running.stalled = false;
            self.deliver(id);
        }
    }

    // --- the worker ----------------------------------------------------------------------------------------------------

    fn send(&mut self, command: WorkerCommand) {
        let Some(live) = &mut self.live else { return };
        live.outbox.push_back(command);
        live.flush();
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Starts a worker as soon as the last one is reaped.
    fn wait_for_slot(&mut self) {
        self.attempt += 1;
        self.set_phase(Phase::Waiting);
        let (attempt, me, slot) = (self.attempt, self.me.clone(), self.args.slot.clone());
        tokio::spawn(async move {
            // The semaphore is never closed. An actor that is gone drops the slot with the message.
            if let Ok(slot) = slot.acquire_owned().await {
                let _ = me.send_message(ModelMsg::internal(Inner::Slot { attempt, slot }));
            }
        });
    }

    fn launch(&mut self, attempt: u64, slot: OwnedSemaphorePermit) {
        if attempt != self.attempt || self.phase != Phase::Waiting {
            return;
        }
        self.args.spec.incarnation = self.args.incarnations.fetch_add(1, Ordering::Relaxed) + 1;
        let spec = self.args.spec.clone();
        let incarnation = spec.incarnation;
        let (replica, device) = (spec.replica.clone(), spec.device.clone());
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        match self.args.factory.start(spec, events) {
            Ok(link) => {
                let now = Instant::now();
                self.set_phase(Phase::Loading);
                self.live = Some(Live {
                    link,
                    incarnation,
                    since: now,
                    heard: now,
                    told_to_end: None,
                    end: None,
                    progress: None,
                    progress_told: now,
                    ready: None,
                    heartbeat: None,
                    computed: 0,
                    rungs: RungCounts::default(),
                    outbox: VecDeque::new(),
                });
                tokio::spawn(pump(receiver, incarnation, self.me.clone(), slot));
                self.args.events.tell(HouseEvent::WorkerStarted { replica, device, incarnation });
            }
            Err(reason) => {
                drop(slot);
                self.worker_gone(WorkerEnd::NotStarted(reason), false);
            }
        }
    }

    fn on_event(&mut self, incarnation: u64, event: WorkerEvent) {
        let Some(live) = self.live.as_mut().filter(|live| live.incarnation == incarnation) else { return };
        live.heard = Instant::now();
        if live.end.is_some() && !matches!(event, WorkerEvent::Exited(_)) {
            // It broke the rules, or was given up: the journal holds what counts, and another worker goes on from there.
            return;
        }
        match event {
            WorkerEvent::Progress(progress) => {
                live.log_progress(&self.args.spec.replica, &progress);
                live.progress = Some(progress);
            }
            WorkerEvent::Ready(ready) => self.on_ready(ready),
            WorkerEvent::Refused { id, error } => self.on_failed(id, Failure::Request(error)),
            WorkerEvent::Begun(begun) => begun.into_iter().for_each(|(id, waited)| self.on_begun(id, waited)),
            WorkerEvent::Step(events) => events.into_iter().for_each(|event| self.on_engine_event(event)),
            WorkerEvent::Heartbeat(heartbeat) => self.on_heartbeat(heartbeat),
            WorkerEvent::Failed(error) => live.end = live.end.take().or(Some(end_of(error))),
            WorkerEvent::Exited(exit) => self.on_exit(exit),
        }
        if let Some(live) = &mut self.live {
            live.flush();
        }
    }

    fn on_ready(&mut self, ready: WorkerReady) {
        let Some(live) = self.live.as_mut().filter(|_| self.phase == Phase::Loading) else { return };
        let (n_ctx, kv_min_bytes, after) = (ready.n_ctx, ready.kv_min_bytes, live.since.elapsed());
        live.ready = Some(ready);
        self.set_phase(Phase::Ready);
        let replica = self.replica();
        self.args.router.tell(RouterMsg::ReplicaReady { replica: replica.clone(), n_ctx });
        self.report(Report::Ready { replica: replica.clone(), kv_min_bytes });
        self.args.events.tell(HouseEvent::WorkerReady { replica, after });
    }

    fn on_heartbeat(&mut self, heartbeat: Heartbeat) {
        let replica = self.replica();
        let Some(live) = &mut self.live else { return };
        live.heartbeat = Some(heartbeat);
        let computed = heartbeat.stats.prefill_tokens + heartbeat.stats.decode_tokens;
        let tokens = computed.saturating_sub(live.computed);
        live.computed = computed;
        let rungs = heartbeat.stats.oom.since(live.rungs);
        live.rungs = heartbeat.stats.oom;
        self.args.router.tell(RouterMsg::Computed { replica: replica.clone(), tokens });
        if rungs != RungCounts::default() {
            self.report(Report::GaveUp { replica, rungs });
        }
        if heartbeat.step_age.is_some_and(|age| age > self.args.supervision.step_timeout) {
            self.kill(WorkerEnd::Hung);
        }
    }

    fn on_begun(&mut self, id: RequestId, waited: Duration) {
        if let Some(Running { ticket, since, .. }) = self.running.get_mut(&id) {
            // What a worker says may be nonsense; a time that does not exist is not recorded.
            since.checked_add(waited).into_iter().for_each(|at| ticket.begun(at, waited));
        }
    }

    fn on_engine_event(&mut self, event: EngineEvent) {
        match event {
            _ if self.live.as_ref().is_none_or(|live| live.end.is_some()) => {}
            EngineEvent::Token { id, index, token, logprobs } => {
                // Cancelled meanwhile: the worker has not heard of it yet.
                let Some(running) = self.running.get_mut(&id) else { return };
                if running.ticket.entry().task() == Task::Embed {
                    return self.kill(WorkerEnd::Protocol("a token where an embedding was due".into()));
                }
                match running.ticket.entry_mut().on_token(index, token, logprobs) {
                    Ok(()) => self.deliver(id),
                    Err(gap) => self.kill(WorkerEnd::Protocol(gap.to_string())),
                }
            }
            EngineEvent::Finished { id, reason, usage } => {
                let Some(running) = self.running.get(&id) else { return };
                let emitted = running.ticket.entry().emitted().len();
                if u32::try_from(emitted) != Ok(usage.completion_tokens) {
                    let told = usage.completion_tokens;
                    return self.kill(WorkerEnd::Protocol(format!("an end after {told} tokens, {emitted} came")));
                }
                let Some(mut running) = self.running.remove(&id) else { return };
                running.ticket.entry_mut().on_cached(usage.cached_tokens);
                let terminal = running.ticket.entry().completed(reason);
                running.ticket.conclude_delivered(terminal, self.args.limits.client_timeout);
            }
            EngineEvent::Embedded { id, values, usage } => {
                if self.running.get(&id).is_some_and(|running| running.ticket.entry().task() != Task::Embed) {
                    return self.kill(WorkerEnd::Protocol("an embedding that nobody asked for".into()));
                }
                let Some(running) = self.running.remove(&id) else { return };
                running.ticket.conclude(Terminal::Embedded { values, usage });
            }
            EngineEvent::Failed { id, error } => self.on_failed(id, Failure::Request(error)),
        }
    }

    fn on_failed(&mut self, id: RequestId, failure: Failure) {
        let Some(running) = self.running.remove(&id) else { return };
        running.ticket.conclude_delivered(Terminal::Failed(failure), self.args.limits.client_timeout);
    }

    /// Ends the worker at once. Its end is `end`, whatever its exit says.
    fn kill(&mut self, end: WorkerEnd) {
        if let Some(live) = &mut self.live {
            live.end.get_or_insert(end);
            live.link.kill();
        }
    }

    fn on_exit(&mut self, exit: WorkerEnd) {
        let Some(live) = self.live.take() else { return };
        let asked = live.told_to_end.is_some();
        let end = if asked { WorkerEnd::Asked } else { live.end.unwrap_or(exit) };
        // An exit that nobody asked for is none, even if the worker thinks so.
        let end = if end == WorkerEnd::Asked && !asked { WorkerEnd::Exited(0) } else { end };
        self.worker_gone(end, true);
    }

    fn worker_gone(&mut self, end: WorkerEnd, had_worker: bool) {
        let replica = self.replica();
        let in_flight = u32::try_from(self.running.len()).unwrap_or(u32::MAX);
        self.args.events.tell(HouseEvent::WorkerEnded { replica: replica.clone(), end: end.clone(), in_flight });
        self.last_end = Some(end.clone());
        match self.phase {
            Phase::Stopping => {
                self.give_tickets_back(false);
                return self.after_asked_end();
            }
            // It was given up, and perhaps the next one waits for its slot already: nothing is left to decide.
            Phase::Quarantined | Phase::Stopped | Phase::Failed => return,
            Phase::Waiting if had_worker => return,
            Phase::Waiting | Phase::Loading | Phase::Ready | Phase::Down | Phase::Backoff => {}
        }
        self.args.router.tell(RouterMsg::ReplicaDown(replica.clone()));
        self.give_tickets_back(true);
        self.set_phase(Phase::Down);
        self.report(Report::Ended { replica, end });
    }

    fn after_asked_end(&mut self) {
        if std::mem::take(&mut self.recycle) {
            return self.wait_for_slot();
        }
        self.set_phase(Phase::Stopped);
        self.answer_stopped();
    }

    fn answer_stopped(&mut self) {
        self.stopped.drain(..).for_each(|reply| {
            // Who asked may have given up waiting.
            let _ = reply.send(());
        });
    }

    /// The requests go back to the router, except those that were there too often.
    fn give_tickets_back(&mut self, died: bool) {
        let deaths_max = self.args.supervision.poison_deaths;
        for (_, mut running) in std::mem::take(&mut self.running) {
            if died && running.ticket.entry_mut().on_death(deaths_max) == AfterDeath::Poison {
                let deaths = running.ticket.entry().deaths();
                running.ticket.conclude(Terminal::Failed(Failure::Poison { deaths }));
            }
        }
    }

    // --- the supervisor ------------------------------------------------------------------------------------------------

    fn decided(&mut self, decision: Decision, kv_bytes: u64) {
        if self.phase != Phase::Down {
            return;
        }
        self.args.spec.kv_bytes = kv_bytes;
        match decision {
            Decision::RestartAfter(delay) => {
                self.attempt += 1;
                self.set_phase(Phase::Backoff);
                let attempt = self.attempt;
                self.me.send_after(delay, move || ModelMsg::internal(Inner::BackoffOver { attempt }));
                let replica = self.replica();
                let device = self.args.spec.device.clone();
                self.args.events.tell(HouseEvent::RestartScheduled { replica, device, after: delay, kv_bytes });
            }
            Decision::Leave => {
                self.set_phase(Phase::Stopped);
                self.args.router.tell(RouterMsg::ReplicaGone(self.replica()));
            }
            Decision::Quarantine => self.quarantine(),
        }
    }

    fn give_up(&mut self, reason: String) {
        self.set_phase(Phase::Failed);
        let replica = self.replica();
        self.args.router.tell(RouterMsg::ReplicaGone(replica.clone()));
        self.args.events.tell(HouseEvent::ModelFailed { replica, reason });
    }

    fn quarantine(&mut self) {
        if self.phase == Phase::Stopping || self.phase == Phase::Failed || self.phase == Phase::Stopped {
            // On its way out, or not to be started anyway; what it has ends with its worker.
            return;
        }
        self.set_phase(Phase::Quarantined);
        self.args.router.tell(RouterMsg::ReplicaGone(self.replica()));
        self.kill(WorkerEnd::DeviceLost("quarantined".into()));
        self.give_tickets_back(false);
    }

    fn recycle(&mut self) {
        match self.phase {
            Phase::Loading | Phase::Ready => {
                self.recycle = true;
                self.end_worker();
            }
            Phase::Waiting | Phase::Stopping | Phase::Down | Phase::Backoff => {}
            Phase::Quarantined | Phase::Failed | Phase::Stopped => {}
        }
    }

    fn start_anyway(&mut self) {
        match self.phase {
            Phase::Quarantined | Phase::Failed | Phase::Stopped | Phase::Backoff | Phase::Down => {
                self.wait_for_slot();
                self.announce();
            }
            Phase::Waiting | Phase::Loading | Phase::Ready | Phase::Stopping => {}
        }
    }

    fn stop(&mut self, reply: RpcReplyPort<()>) {
        self.stopped.push(reply);
        self.recycle = false;
        match self.phase {
            Phase::Loading | Phase::Ready => self.end_worker(),
            Phase::Stopping => {}
            // A worker that was killed is not waited for: its slot is.
            Phase::Waiting | Phase::Down | Phase::Backoff | Phase::Quarantined | Phase::Failed | Phase::Stopped => {
                self.attempt += 1;
                self.set_phase(Phase::Stopped);
                self.answer_stopped();
            }
        }
    }

    /// Tells the worker to end; its requests go on elsewhere. One that still loads is killed: it has nothing to finish, and
    /// hears no command before it has loaded, which can take minutes or for ever.
    fn end_worker(&mut self) {
        let is_loading = self.phase == Phase::Loading;
        self.set_phase(Phase::Stopping);
        self.args.router.tell(RouterMsg::ReplicaDown(self.replica()));
        self.give_tickets_back(false);
        if let Some(live) = &mut self.live {
            live.told_to_end = Some(Instant::now());
            if is_loading {
                return live.link.kill();
            }
        }
        self.send(WorkerCommand::Shutdown);
    }

    fn announce(&mut self) {
        let open = self.running.iter().map(|(id, running)| (*id, running.ticket.entry().tokens_max())).collect();
        let (replica, actor) = (self.replica(), self.me.clone());
        self.args.router.tell(RouterMsg::ReplicaUp { replica: replica.clone(), actor, open });
        match self.phase {
            Phase::Ready => {
                let n_ctx =
                    self.live.as_ref().and_then(|live| live.ready.as_ref()).map_or(u32::MAX, |ready| ready.n_ctx);
                self.args.router.tell(RouterMsg::ReplicaReady { replica, n_ctx });
            }
            Phase::Quarantined | Phase::Failed | Phase::Stopped => {
                self.args.router.tell(RouterMsg::ReplicaGone(replica))
            }
            Phase::Waiting | Phase::Loading | Phase::Stopping | Phase::Down | Phase::Backoff => {}
        }
    }

    // --- time ----------------------------------------------------------------------------------------------------------

    fn tick(&mut self) {
        self.watch();
        let now = Instant::now();
        let late = self.running.iter().filter(|(_, running)| running.ticket.entry().deadline() <= now);
        let late: Vec<RequestId> = late.map(|(id, _)| *id).collect();
        late.into_iter().for_each(|id| self.conclude_early(id, Terminal::Failed(Failure::Deadline)));
        if let Some(live) = &mut self.live {
            live.flush();
        }
    }

    /// A worker that is silent, or that takes too long, is hung.
    fn watch(&mut self) {
        let Some(live) = &self.live else { return };
        let limits = &self.args.supervision;
        let overdue = match (self.phase, live.told_to_end) {
            (Phase::Loading, _) => live.since.elapsed() > limits.load_timeout,
            (Phase::Ready, _) => live.heard.elapsed() > limits.step_timeout,
            (Phase::Stopping, Some(told)) => told.elapsed() > limits.shutdown,
            _ => false,
        };
        if overdue {
            self.kill(WorkerEnd::Hung);
        }
    }

    fn status(&self) -> ReplicaStatus {
        let live = self.live.as_ref();
        let ready = live.and_then(|live| live.ready.as_ref());
        let heartbeat = live.and_then(|live| live.heartbeat);
        let stats: Option<EngineStats> = heartbeat.map(|beat| beat.stats).or(ready.map(|ready| ready.stats));
        ReplicaStatus {
            replica: self.replica(),
            device: self.args.spec.device.clone(),
            phase: self.phase,
            incarnation: self.args.spec.incarnation,
            pid: live.and_then(|live| live.link.pid()).or(ready.and_then(|ready| ready.pid)),
            progress: live.and_then(|live| live.progress.clone()),
            running: u32::try_from(self.running.len()).unwrap_or(u32::MAX),
            kv_bytes: self.args.spec.kv_bytes,
            last_heard: live.map(|live| live.heard.elapsed()),
            step_age: heartbeat.and_then(|beat| beat.step_age),
            stats,
            last_end: self.last_end.clone(),
        }
    }
}

impl Live {
    /// Each phase when it begins, and now and then how far it has come.
    fn log_progress(&mut self, replica: &ReplicaId, progress: &LoadProgress) {
        let is_new = self.progress.as_ref().is_none_or(|last| last.phase != progress.phase);
        if is_new || self.progress_told.elapsed() >= PROGRESS_EVERY {
            let LoadProgress { phase, bytes_done, bytes_total } = progress;
            tracing::info!(%replica, ?phase, bytes_done, bytes_total, "loading");
            self.progress_told = Instant::now();
        }
    }

    fn flush(&mut self) {
        while let Some(command) = self.outbox.front() {
            match self.link.send(command) {
                // A worker that is gone takes nothing more; its exit is on the way.
                Ok(()) | Err(LinkError::Closed) => drop(self.outbox.pop_front()),
                Err(LinkError::Full) => return,
            }
        }
    }
}

/// Why a worker ends that reports this error.
fn end_of(error: EngineError) -> WorkerEnd {
    match error {
        EngineError::OutOfMemory { requested, free, .. } => WorkerEnd::OutOfMemory { requested, free },
        EngineError::BadModel(reason) => WorkerEnd::BadModel(reason),
        EngineError::DeviceLost { op, detail, .. } => WorkerEnd::DeviceLost(format!("{op}: {detail}")),
    }
}

/// Carries a worker's events to its actor, never more than one message at a time: the actor's mailbox has no bound, this
/// channel has. Holds the replica's slot until the worker is reaped.
async fn pump(
    mut events: mpsc::Receiver<WorkerEvent>,
    incarnation: u64,
    me: ActorRef<ModelMsg>,
    slot: OwnedSemaphorePermit,
) {
    let mut batch = Vec::new();
    let mut exited = false;
    while !exited {
        if events.recv_many(&mut batch, EVENTS_MAX).await == 0 {
            let end = WorkerEnd::Protocol("the link closed without an exit".into());
            batch.push(WorkerEvent::Exited(end));
        }
        exited = batch.iter().any(|event| matches!(event, WorkerEvent::Exited(_)));
        let (handled, done) = oneshot::channel();
        let events = std::mem::take(&mut batch);
        if me.send_message(ModelMsg::internal(Inner::Events { incarnation, events, handled })).is_ok() {
            // An actor that ends before it answers drops the link, and that ends the worker.
            let _ = done.await;
        }
    }
    drop(slot);
}

/// Waits until the client has read something, has gone, or has taken too long.
fn wait_for_room(
    room: mpsc::Sender<crate::messages::StreamToken>,
    id: RequestId,
    patience: Duration,
    me: ActorRef<ModelMsg>,
) {
    tokio::spawn(async move {
        let inner = match tokio::time::timeout(patience, room.reserve()).await {
            Ok(_) => Inner::Room(id),
            Err(_) => Inner::Slow(id),
        };
        drop(room);
        // An actor that is gone has given the request back.
        let _ = me.send_message(ModelMsg::internal(inner));
    });
}
