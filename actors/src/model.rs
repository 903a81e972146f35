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

mod live;
mod orders;
mod requests;
mod worker;

use crate::device_supervisor::DeviceMsg;
use crate::engine::RequestId;
use crate::events::EventBus;
use crate::journal::Ticket;
use crate::link::WorkerFactory;
use crate::messages::{
    Failure, Generate, Phase, Refusal, ReplicaId, ReplicaStatus, StreamToken, Terminal, WorkerCommand, WorkerEvent,
    WorkerSpec,
};
use crate::policy::ladder::RungCounts;
use crate::policy::outcome::WorkerEnd;
use crate::policy::restart::Decision;
use crate::router::{RouterHandle, RouterMsg};
use crate::stream::TokenStream;
use live::Live;
use playhouse_config::{Limits, Supervision};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use requests::{Requests, Taking};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tracing::Span;

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
    requests: Requests,
    last_end: Option<WorkerEnd>,
    stopped: Vec<RpcReplyPort<()>>,
    recycle: bool,
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
            requests: Requests::default(),
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
        state.requests.give_back();
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
            Inner::Room(id) => {
                let taking = self.requests.on_room(id);
                self.delivered(id, taking);
            }
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

    fn submit(&mut self, ticket: Ticket) {
        if self.phase != Phase::Ready {
            // Dropped, the ticket goes back to the router, which must not send it here again.
            return self.tell_not_ready();
        }
        let command = WorkerCommand::Submit(self.requests.take_on(ticket));
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
        if self.requests.conclude(id, terminal) {
            self.send(WorkerCommand::Cancel(id));
        }
    }

    fn end_all(&mut self, failure: &Failure) {
        let ids = self.requests.ids();
        ids.into_iter().for_each(|id| self.conclude_early(id, Terminal::Failed(failure.clone())));
    }

    fn delivered(&mut self, id: RequestId, taking: Taking) {
        match taking {
            Taking::Well => {}
            Taking::Gone => self.conclude_early(id, Terminal::Cancelled),
            Taking::Slowly(room) => {
                tokio::spawn(wait_for_room(room, id, self.args.limits.client_timeout, self.me.clone()));
            }
        }
    }

    // --- time ----------------------------------------------------------------------------------------------------------

    fn tick(&mut self) {
        self.watch();
        let late = self.requests.late(Instant::now());
        late.into_iter().for_each(|id| self.conclude_early(id, Terminal::Failed(Failure::Deadline)));
        self.flush();
    }

    /// A worker that is silent, or that takes too long, is hung.
    fn watch(&mut self) {
        let is_overdue = |live: &Live| live.is_overdue(self.phase, &self.args.supervision);
        if self.live.as_ref().is_some_and(is_overdue) {
            self.kill(WorkerEnd::Hung);
        }
    }

    fn status(&self) -> ReplicaStatus {
        let live = self.live.as_ref();
        ReplicaStatus {
            replica: self.replica(),
            device: self.args.spec.device.clone(),
            phase: self.phase,
            incarnation: self.args.spec.incarnation,
            pid: live.and_then(Live::pid),
            progress: live.and_then(Live::progress),
            running: self.requests.len(),
            kv_bytes: self.args.spec.kv_bytes,
            last_heard: live.map(Live::last_heard),
            step_age: live.and_then(Live::step_age),
            stats: live.and_then(Live::stats),
            last_end: self.last_end.clone(),
        }
    }
}

/// Waits until the client has read something, has gone, or has taken too long.
async fn wait_for_room(room: mpsc::Sender<StreamToken>, id: RequestId, patience: Duration, me: ActorRef<ModelMsg>) {
    let inner = match tokio::time::timeout(patience, room.reserve()).await {
        Ok(_) => Inner::Room(id),
        Err(_) => Inner::Slow(id),
    };
    // An actor that is gone has given the request back.
    let _ = me.send_message(ModelMsg::internal(inner));
}
