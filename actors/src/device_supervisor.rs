//! Decides for one device when its workers are restarted. Owns: the device's record of failures, its replicas, their
//! slots. Never: requests, tokens, other devices.
//! Started by `house`; if it dies, its model actors end with it (and their workers with them), and it is started again
//! with the same placements.
//!
//! ```text
//! [Healthy] --a worker ends--> policy: restart now or later --> [Healthy]
//!     |                          \-- too often, XID, OOM ladder's end --> [Quarantined] --Release--> [Healthy]
//!     +-- a model that cannot be loaded: that replica is given up, the device is not
//! ```

mod child;

pub use child::Lives;

use crate::ask::ask;
use crate::events::{Clock, EventBus};
use crate::house::HouseMsg;
use crate::inventory::{DeviceId, HealthKind};
use crate::link::WorkerFactory;
use crate::messages::{DeviceStatus, HouseEvent, ReplicaId, ReplicaStatus, WorkerSpec};
use crate::model::{ModelActor, ModelArgs, ModelMsg, Report};
use crate::policy::ladder::{self, Rung, RungCounts};
use crate::policy::outcome::{Action, WorkerEnd, health};
use crate::policy::restart::{Decision, End, RestartRecord, restarted_with};
use crate::router::{RouterHandle, RouterMsg};
use child::Child;
use playhouse_config::{Limits, Supervision};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a replica may take to say how it is; it never blocks, so this is long.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// What a device supervisor is told.
#[derive(Debug)]
pub enum DeviceMsg {
    /// Start a replica here.
    Place(Placed),
    /// End a replica; answered when its worker is gone.
    Remove {
        /// Which.
        replica: ReplicaId,
        /// Another of the same name follows: requests for it wait.
        returning: bool,
        /// Answered when its worker is gone.
        reply: RpcReplyPort<()>,
    },
    /// A model actor reports.
    Report(Report),
    /// The device reports.
    Health(HealthKind),
    /// The device is well again: start everything.
    Release,
    /// End the worker of this replica and start another.
    Recycle(ReplicaId),
    /// Start the actor of this replica again.
    Respawn(ReplicaId),
    /// Tell the router again who is here.
    Announce,
    /// Take new limits.
    Configure(Supervision, Limits),
    /// End everything, in the reverse order of the start.
    Stop(RpcReplyPort<()>),
    /// Say how it is.
    Status(RpcReplyPort<DeviceStatus>),
}

/// A replica that is to be here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// What its workers are started with.
    pub spec: WorkerSpec,
    /// KV below this is useless.
    pub kv_min_bytes: u64,
}

/// What the house gives.
pub struct DeviceArgs {
    /// The device.
    pub device: DeviceId,
    /// The replicas, in the order in which they are started.
    pub placed: Vec<Placed>,
    /// The policy.
    pub supervision: Supervision,
    /// For the model actors.
    pub limits: Limits,
    /// Starts workers.
    pub factory: Arc<dyn WorkerFactory>,
    /// Who routes.
    pub router: RouterHandle,
    /// Where news go.
    pub events: EventBus,
    /// The time.
    pub clock: Clock,
    /// Who is told of a quarantine.
    pub house: ActorRef<HouseMsg>,
    /// Why the device is given up, if it is: what was known before a restart of this actor.
    pub quarantined: Option<String>,
    /// The device's failures. Shared with the house, so that they are not forgotten with this actor.
    pub record: Arc<Mutex<RestartRecord>>,
    /// What was given up on it for want of memory. Shared for the same reason.
    pub oom: Arc<Mutex<RungCounts>>,
    /// Whose workers may still be there. Shared for the same reason.
    pub lives: Lives,
}

/// The actor.
#[derive(Debug)]
pub struct DeviceSupervisor;

/// What only the actor changes.
pub struct DeviceState {
    args: DeviceArgs,
    me: ActorRef<DeviceMsg>,
    children: Vec<Child>,
    /// Replicas that were removed and whose workers may not be gone yet.
    leaving: Vec<JoinHandle<()>>,
    stopping: bool,
}

impl Actor for DeviceSupervisor {
    type Msg = DeviceMsg;
    type State = DeviceState;
    type Arguments = DeviceArgs;

    async fn pre_start(&self, me: ActorRef<DeviceMsg>, args: DeviceArgs) -> Result<DeviceState, ActorProcessingErr> {
        let mut state = DeviceState { args, me, children: Vec::new(), leaving: Vec::new(), stopping: false };
        if state.args.quarantined.is_some() {
            state.record().quarantine();
        }
        for placed in std::mem::take(&mut state.args.placed) {
            state.place(placed).await;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        _me: ActorRef<DeviceMsg>,
        message: DeviceMsg,
        state: &mut DeviceState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DeviceMsg::Place(placed) => state.place(placed).await,
            DeviceMsg::Remove { replica, returning, reply } => state.remove(&replica, returning, reply),
            DeviceMsg::Report(report) => state.report(report),
            DeviceMsg::Health(kind) => state.health(kind),
            DeviceMsg::Release => state.release().await,
            DeviceMsg::Recycle(replica) => state.tell(&replica, ModelMsg::Recycle),
            DeviceMsg::Respawn(replica) => state.respawn(&replica).await,
            DeviceMsg::Announce => state.announce(),
            DeviceMsg::Configure(supervision, limits) => state.configure(&supervision, &limits),
            DeviceMsg::Stop(reply) => state.stop(reply),
            DeviceMsg::Status(reply) => state.status(reply),
        }
        Ok(())
    }

    /// ractor stops a supervisor whose child ends, unless it is told otherwise: here a child's end is a decision.
    async fn handle_supervisor_evt(
        &self,
        _me: ActorRef<DeviceMsg>,
        event: SupervisionEvent,
        state: &mut DeviceState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(actor, error) => state.child_failed(&actor, &error.to_string()),
            SupervisionEvent::ActorTerminated(actor, last_state, reason) => {
                // What the state holds (a link, tickets) is given back now.
                drop(last_state);
                state.child_failed(&actor, reason.as_deref().unwrap_or("terminated"));
            }
            _ => {}
        }
        Ok(())
    }
}

impl DeviceState {
    fn record(&self) -> MutexGuard<'_, RestartRecord> {
        // Its methods leave it whole, whoever panics between them.
        self.args.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn place(&mut self, placed: Placed) {
        if self.stopping {
            // A change of the configuration that was under way when the house was told to stop.
            return;
        }
        let replica = placed.spec.replica.clone();
        self.children.push(Child::new(placed, &self.args.lives));
        self.spawn(&replica).await;
    }

    /// Starts a replica's actor. Its `pre_start` only builds its state, so awaiting it here blocks nobody.
    async fn spawn(&mut self, replica: &ReplicaId) {
        let Some(index) = self.index_of(replica) else { return };
        let start = self.args.quarantined.is_none();
        let child = &self.children[index];
        let args = ModelArgs {
            spec: child.placed.spec.clone(),
            supervision: self.args.supervision.clone(),
            limits: self.args.limits.clone(),
            factory: self.args.factory.clone(),
            slot: child.life.slot.clone(),
            router: self.args.router.clone(),
            events: self.args.events.clone(),
            supervisor: self.me.clone(),
            incarnations: child.life.incarnations.clone(),
            start,
        };
        match ractor::Actor::spawn_linked(None, ModelActor, args, self.me.get_cell()).await {
            Ok((actor, _)) => self.children[index].actor = Some(actor),
            // A failure in `pre_start` gives no supervision event: it is told here.
            Err(error) => self.decide_respawn(replica.clone(), &error.to_string()),
        }
    }

    fn index_of(&self, replica: &ReplicaId) -> Option<usize> {
        self.children.iter().position(|child| child.placed.spec.replica == *replica)
    }

    fn tell(&self, replica: &ReplicaId, message: ModelMsg) {
        let actor = self.index_of(replica).and_then(|index| self.children[index].actor.as_ref());
        if let Some(actor) = actor {
            // An actor that is gone is respawned by its supervision event.
            let _ = actor.send_message(message);
        }
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Ready { replica, kv_min_bytes } => {
                self.record().on_ready(self.args.clock.now());
                if let Some(index) = self.index_of(&replica) {
                    let placed = &mut self.children[index].placed;
                    placed.kv_min_bytes = placed.kv_min_bytes.max(kv_min_bytes);
                }
            }
            Report::GaveUp { replica, rungs } => rungs.taken().for_each(|(rung, n)| self.rung(&replica, rung, n)),
            Report::Ended { replica, end } => self.ended(&replica, &end),
        }
    }

    /// A rung of the memory ladder was taken.
    fn rung(&self, replica: &ReplicaId, rung: Rung, times: u64) {
        // A few counters: whole whoever panics between them.
        self.args.oom.lock().unwrap_or_else(PoisonError::into_inner).add(rung, times);
        if rung != Rung::Preempt {
            let (replica, device) = (replica.clone(), self.args.device.clone());
            self.args.events.tell(HouseEvent::OutOfMemory { replica, device, rung, times });
        }
    }

    fn ended(&mut self, replica: &ReplicaId, end: &WorkerEnd) {
        let Some(index) = self.index_of(replica) else { return };
        match (end, end.action()) {
            (WorkerEnd::OutOfMemory { requested, free }, _) => {
                let placed = &mut self.children[index].placed;
                match ladder::next(placed.spec.kv_bytes, placed.kv_min_bytes, *requested, *free) {
                    ladder::Step::Shrink { kv_bytes } => {
                        placed.spec.kv_bytes = kv_bytes;
                        self.tell_house(HouseMsg::Shrunk { replica: replica.clone(), kv_bytes });
                        self.rung(replica, Rung::ShrinkKv, 1);
                        self.decide(index, end.end());
                    }
                    ladder::Step::Quarantine => {
                        self.rung(replica, Rung::Quarantine, 1);
                        self.quarantine("out of memory with the least memory for KV");
                    }
                }
            }
            (_, Action::FailModel) => self.tell(replica, ModelMsg::GiveUp(format!("{end:?}"))),
            (_, Action::Quarantine) => self.quarantine(&format!("{replica}: {}", end.reason())),
            _ => self.decide(index, end.end()),
        }
    }

    /// Asks the policy and tells the replica, and with it those that the strategy names.
    fn decide(&mut self, index: usize, end: End) {
        let decision = self.record().on_end(end, self.args.clock.now());
        let child = &self.children[index];
        let (replica, kv_bytes) = (child.placed.spec.replica.clone(), child.placed.spec.kv_bytes);
        match decision {
            Decision::Quarantine => {
                let recent = self.record().recent(self.args.clock.now());
                self.quarantine(&format!("{recent} failures"))
            }
            Decision::Leave => self.tell(&replica, ModelMsg::Decided(decision, kv_bytes)),
            Decision::RestartAfter(_) => {
                self.tell(&replica, ModelMsg::Decided(decision, kv_bytes));
                let strategy = self.args.supervision.strategy;
                for other in restarted_with(strategy, index, self.children.len()).filter(|other| *other != index) {
                    let other = self.children[other].placed.spec.replica.clone();
                    self.tell(&other, ModelMsg::Recycle);
                }
            }
        }
    }

    fn quarantine(&mut self, reason: &str) {
        self.record().quarantine();
        if self.args.quarantined.is_none() {
            self.args.quarantined = Some(reason.to_owned());
            let (device, reason) = (self.args.device.clone(), reason.to_owned());
            self.args.events.tell(HouseEvent::Quarantined { device: device.clone(), reason: reason.clone() });
            self.tell_house(HouseMsg::Quarantined { device, reason: Some(reason) });
        }
        for child in &self.children {
            if let Some(actor) = &child.actor {
                let _ = actor.send_message(ModelMsg::Quarantine);
            }
            self.args.router.tell(RouterMsg::ReplicaGone(child.placed.spec.replica.clone()));
        }
    }

    fn tell_house(&self, message: HouseMsg) {
        // A house that is gone takes this actor with it.
        let _ = self.args.house.send_message(message);
    }

    fn health(&mut self, kind: HealthKind) {
        // What restarts a worker ends it, too: its own end, which is sooner and says more, is what counts.
        if health(kind) == Action::Quarantine {
            self.quarantine(&format!("{kind:?}"));
        }
    }

    async fn release(&mut self) {
        self.record().release();
        self.args.quarantined = None;
        let device = self.args.device.clone();
        self.args.events.tell(HouseEvent::Released { device: device.clone() });
        self.tell_house(HouseMsg::Quarantined { device, reason: None });
        let replicas: Vec<ReplicaId> = self.children.iter().map(|child| child.placed.spec.replica.clone()).collect();
        for replica in replicas {
            self.respawn(&replica).await;
            self.tell(&replica, ModelMsg::Start);
        }
    }

    async fn respawn(&mut self, replica: &ReplicaId) {
        let missing = self.index_of(replica).is_some_and(|index| self.children[index].actor.is_none());
        if missing && self.args.quarantined.is_none() {
            self.spawn(replica).await;
        }
    }

    fn child_failed(&mut self, actor: &ActorCell, reason: &str) {
        let is_it = |child: &Child| child.actor.as_ref().is_some_and(|known| known.get_id() == actor.get_id());
        let Some(child) = self.children.iter_mut().find(|child| is_it(child)) else { return };
        child.actor = None;
        let replica = child.placed.spec.replica.clone();
        self.args.router.tell(RouterMsg::ReplicaDown(replica.clone()));
        self.decide_respawn(replica, reason);
    }

    fn decide_respawn(&mut self, replica: ReplicaId, reason: &str) {
        let actor = format!("model {replica}");
        self.args.events.tell(HouseEvent::ActorRestarted { actor, reason: reason.to_owned() });
        let decision = self.record().on_end(End::Failure, self.args.clock.now());
        match decision {
            Decision::RestartAfter(delay) => {
                self.me.send_after(delay, move || DeviceMsg::Respawn(replica));
            }
            Decision::Leave => self.args.router.tell(RouterMsg::ReplicaGone(replica)),
            Decision::Quarantine => self.quarantine(&format!("actor of {replica} failed: {reason}")),
        }
    }

    fn remove(&mut self, replica: &ReplicaId, returning: bool, reply: RpcReplyPort<()>) {
        let Some(index) = self.index_of(replica) else {
            let _ = reply.send(());
            return;
        };
        let child = self.children.remove(index);
        self.args.lives.count_anew(replica);
        let replica = replica.clone();
        let gone = if returning { RouterMsg::ReplicaDown(replica) } else { RouterMsg::ReplicaRemoved(replica) };
        self.args.router.tell(gone);
        self.leaving.retain(|leaving| !leaving.is_finished());
        self.leaving.push(tokio::spawn(async move {
            child.stop().await;
            // Who asked may be gone.
            let _ = reply.send(());
        }));
    }

    fn announce(&self) {
        for actor in self.children.iter().filter_map(|child| child.actor.as_ref()) {
            let _ = actor.send_message(ModelMsg::Announce);
        }
    }

    fn configure(&mut self, supervision: &Supervision, limits: &Limits) {
        self.record().set_policy(supervision.clone());
        self.args.supervision = supervision.clone();
        self.args.limits = limits.clone();
        for actor in self.children.iter().filter_map(|child| child.actor.as_ref()) {
            let _ = actor.send_message(ModelMsg::Configure(supervision.clone(), limits.clone()));
        }
    }

    fn stop(&mut self, reply: RpcReplyPort<()>) {
        self.stopping = true;
        let (children, leaving) = (std::mem::take(&mut self.children), std::mem::take(&mut self.leaving));
        tokio::spawn(async move {
            for child in children.into_iter().rev() {
                child.stop().await;
            }
            for removal in leaving {
                // One that panicked has dropped its child, and that ends the worker.
                let _ = removal.await;
            }
            let _ = reply.send(());
        });
    }

    /// Asks the replicas in a task of its own: this actor never waits for a child.
    fn status(&self, reply: RpcReplyPort<DeviceStatus>) {
        let actors: Vec<(ReplicaStatus, Option<ActorRef<ModelMsg>>)> =
            self.children.iter().map(|child| (child.unknown(), child.actor.clone())).collect();
        let (recent, failures) = {
            let record = self.record();
            (record.recent(self.args.clock.now()), record.total())
        };
        let mut status = DeviceStatus {
            device: self.args.device.clone(),
            quarantined: self.args.quarantined.clone(),
            recent_failures: u32::try_from(recent).unwrap_or(u32::MAX),
            failures,
            oom: *self.args.oom.lock().unwrap_or_else(PoisonError::into_inner),
            replicas: Vec::new(),
        };
        tokio::spawn(async move {
            for (unknown, actor) in actors {
                let known = match actor {
                    Some(actor) => ask(&actor, ModelMsg::Status, Some(STATUS_TIMEOUT)).await,
                    None => None,
                };
                status.replicas.push(known.unwrap_or(unknown));
            }
            let _ = reply.send(status);
        });
    }
}
