//! The root of the tree. Owns: which replica is to run on which device, and the actors that see to it. Never: requests,
//! workers, tokens.
//! Started by the host (or a library's user); if it gives up, the host ends with status 70.
//!
//! ```text
//! House
//!  ├─ InventoryActor      health events, device lists
//!  ├─ Router              requests
//!  └─ DeviceSupervisor xN
//!      └─ ModelActor xM
//!
//! [Running] --Apply: stop what is no more wanted, then start what is new--> [Running]
//!     |  --Stop: devices (replicas in reverse), router, inventory--> [Stopped]
//!     \-- actors fail too often: GaveUp, [Stopped]
//! ```

use crate::device_supervisor::{DeviceArgs, DeviceMsg, DeviceSupervisor, Placed, answer};
use crate::engine::RequestId;
use crate::event_log::EventLog;
use crate::events::{Clock, EventBus};
use crate::inventory::{Device, DeviceId, HealthEvent, Inventory};
use crate::inventory_actor::{InventoryActor, InventoryArgs, InventoryMsg};
use crate::link::WorkerFactory;
use crate::messages::{Drained, Generate, HouseEvent, HouseStatus, Refusal, ReplicaId, WorkerSpec};
use crate::model::ModelMsg;
use crate::policy::ladder::RungCounts;
use crate::policy::mix;
use crate::policy::placement::Plan;
use crate::policy::restart::{Decision, End, RestartRecord};
use crate::router::{Router, RouterArgs, RouterHandle, RouterMsg};
use crate::stream::TokenStream;
use playhouse_config::checked::Isolation;
use playhouse_config::{Config, Model, Supervision};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, ActorStatus, RpcReplyPort, SpawnErr, SupervisionEvent};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long an actor may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked whether there is a router again.
const ROUTER_LOOK: Duration = Duration::from_millis(20);

/// What the house is told.
#[derive(Debug)]
pub enum HouseMsg {
    /// The configuration changed; the plan is made for it. Answered when everything old is gone and everything new is
    /// started (not: loaded).
    Apply(Box<Config>, Plan, RpcReplyPort<Applied>),
    /// A device reports.
    Health(HealthEvent),
    /// A device was given up, or taken back.
    Quarantined {
        /// Which.
        device: DeviceId,
        /// Why; `None` if it was taken back.
        reason: Option<String>,
    },
    /// End the workers of a model and start others; answered with how many replicas there are.
    RestartModel(String, RpcReplyPort<u32>),
    /// Take a device back, or end its workers and start others; answered with whether there is such a device.
    RestartDevice(DeviceId, RpcReplyPort<bool>),
    /// List the devices now.
    Devices(RpcReplyPort<Vec<Device>>),
    /// End everything.
    Stop(RpcReplyPort<()>),
    /// Say how everything is.
    Status(RpcReplyPort<HouseStatus>),
    #[doc(hidden)]
    Respawn(Part),
    #[doc(hidden)]
    ApplyDone,
    #[doc(hidden)]
    Stopped,
}

/// A child of the house.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The inventory actor.
    Inventory,
    /// The router.
    Router,
    /// The supervisor of this device.
    Device(DeviceId),
}

/// What [`HouseMsg::Apply`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Applied {
    /// Replicas that were not touched: their actors, KV and streams are the same.
    pub kept: Vec<ReplicaId>,
    /// Replicas that were started.
    pub started: Vec<ReplicaId>,
    /// Replicas that were stopped.
    pub stopped: Vec<ReplicaId>,
}

/// What a house is made of.
pub struct HouseArgs {
    /// The configuration.
    pub config: Config,
    /// What goes where.
    pub plan: Plan,
    /// Starts workers.
    pub factory: Arc<dyn WorkerFactory>,
    /// Knows the devices.
    pub inventory: Box<dyn Inventory>,
    /// How often to look at the devices; `None` looks only when asked.
    pub poll: Option<Duration>,
    /// Makes the jitter of restarts.
    pub seed: u64,
}

/// A running tree. Cheap to clone; the tree goes on when all handles are gone, until it is stopped.
#[derive(Debug, Clone)]
pub struct HouseHandle {
    actor: ActorRef<HouseMsg>,
    router: RouterHandle,
    events: EventBus,
}

impl HouseHandle {
    /// Starts the tree. Workers load in the background. The join handle ends with the tree.
    ///
    /// # Errors
    /// If the root actor could not be started.
    pub async fn start(args: HouseArgs) -> Result<(Self, JoinHandle<()>), SpawnErr> {
        let (router, events) = (RouterHandle::default(), EventBus::new());
        let start = HouseStart { args, router: router.clone(), events: events.clone() };
        let (actor, root) = ractor::Actor::spawn(None, House, start).await?;
        let closing = router.clone();
        let join = tokio::spawn(async move {
            // A root that fails is not asked to clean up: the streams of its clients would never end.
            let _ = root.await;
            closing.close();
        });
        Ok((Self { actor, router, events }, join))
    }

    /// Asks for a stream.
    ///
    /// # Errors
    /// [`Refusal`]; nothing was accepted.
    pub async fn generate(&self, request: Generate) -> Result<TokenStream, Refusal> {
        self.router.generate(request).await
    }

    /// Ends a request. One that has ended already is ignored.
    pub fn cancel(&self, id: RequestId) {
        self.router.cancel(id);
    }

    /// The root actor, for raw messages.
    pub fn actor(&self) -> &ActorRef<HouseMsg> {
        &self.actor
    }

    /// The router, for raw messages.
    pub fn router(&self) -> &RouterHandle {
        &self.router
    }

    /// The actors that serve a model, by its own name, for raw messages.
    pub async fn replicas(&self, model: &str) -> Vec<(ReplicaId, ActorRef<ModelMsg>)> {
        let Some(router) = self.router.current() else { return Vec::new() };
        let message = |reply| RouterMsg::Replicas(model.to_owned(), reply);
        ractor::rpc::call(&router, message, Some(STATUS_TIMEOUT)).await.ok().and_then(answer).unwrap_or_default()
    }

    /// News from now on. A listener that is too slow loses the oldest.
    pub fn listen(&self) -> broadcast::Receiver<HouseEvent> {
        self.events.listen()
    }

    /// What happened since the tree was started.
    pub fn log(&self) -> &EventLog {
        self.events.log()
    }

    /// How everything is; `None` once the tree has ended.
    pub async fn status(&self) -> Option<HouseStatus> {
        ractor::rpc::call(&self.actor, HouseMsg::Status, Some(STATUS_TIMEOUT)).await.ok().and_then(answer)
    }

    /// The devices now; empty once the tree has ended.
    pub async fn devices(&self) -> Vec<Device> {
        let listed = ractor::rpc::call(&self.actor, HouseMsg::Devices, Some(STATUS_TIMEOUT)).await;
        listed.ok().and_then(answer).unwrap_or_default()
    }

    /// Goes over to another configuration; `None` once the tree has ended.
    pub async fn apply(&self, config: Config, plan: Plan) -> Option<Applied> {
        let message = |reply| HouseMsg::Apply(Box::new(config), plan, reply);
        ractor::rpc::call(&self.actor, message, None).await.ok().and_then(answer)
    }

    /// Ends the workers of a model and starts others. How many replicas it has.
    pub async fn restart_model(&self, model: &str) -> u32 {
        let message = |reply| HouseMsg::RestartModel(model.to_owned(), reply);
        ractor::rpc::call(&self.actor, message, Some(STATUS_TIMEOUT)).await.ok().and_then(answer).unwrap_or(0)
    }

    /// Takes a device back from quarantine, or ends its workers and starts others. Whether there is such a device.
    pub async fn restart_device(&self, device: &DeviceId) -> bool {
        let message = |reply| HouseMsg::RestartDevice(device.clone(), reply);
        ractor::rpc::call(&self.actor, message, Some(STATUS_TIMEOUT)).await.ok().and_then(answer).unwrap_or(false)
    }

    /// Takes no more requests and waits until the open ones have ended, or ends them when the time is up. The tree goes on,
    /// and takes no requests, until it is stopped or [`HouseHandle::undrain`] is called.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        let until = Instant::now() + deadline;
        while self.actor.get_status() < ActorStatus::Stopping {
            if let Some(router) = self.router.current() {
                let deadline = until.saturating_duration_since(Instant::now());
                let message = |reply| RouterMsg::Drain { deadline, reply };
                if let Some(drained) = ractor::rpc::call(&router, message, None).await.ok().and_then(answer) {
                    return drained;
                }
            }
            // That router died; the next one is there in a moment.
            tokio::time::sleep(ROUTER_LOOK).await;
        }
        Drained::Empty { ended: 0 }
    }

    /// Takes requests again after a drain, or in the middle of one. Whether there was one.
    pub async fn undrain(&self) -> bool {
        let Some(router) = self.router.current() else { return false };
        ractor::rpc::call(&router, RouterMsg::Undrain, Some(STATUS_TIMEOUT))
            .await
            .ok()
            .and_then(answer)
            .unwrap_or(false)
    }

    /// Ends the tree: every worker is gone when this returns.
    pub async fn stop(&self) {
        // A tree that has ended is stopped.
        let _ = ractor::rpc::call(&self.actor, HouseMsg::Stop, None).await;
    }
}

/// The root actor.
#[derive(Debug)]
pub struct House;

/// What the root actor starts with.
pub struct HouseStart {
    args: HouseArgs,
    router: RouterHandle,
    events: EventBus,
}

/// What only the house changes.
pub struct HouseState {
    config: Config,
    factory: Arc<dyn WorkerFactory>,
    inventory: Arc<Mutex<Box<dyn Inventory>>>,
    poll: Option<Duration>,
    seed: u64,
    me: ActorRef<HouseMsg>,
    router: RouterHandle,
    events: EventBus,
    clock: Clock,
    /// Failures of the house's own children, which are bugs: the same limits as a device has.
    record: RestartRecord,
    inventory_actor: Option<ActorRef<InventoryMsg>>,
    devices: BTreeMap<DeviceId, DeviceChild>,
    /// Changes are made one after the other; these wait for the one in progress.
    applying: bool,
    changes: VecDeque<(Config, Plan, RpcReplyPort<Applied>)>,
    stopping: bool,
}

struct DeviceChild {
    actor: Option<ActorRef<DeviceMsg>>,
    placed: Vec<Placed>,
    quarantined: Option<String>,
    /// Its failures, which outlive its supervisor.
    record: Arc<Mutex<RestartRecord>>,
    /// What was given up on it for want of memory; likewise.
    oom: Arc<Mutex<RungCounts>>,
}

impl DeviceChild {
    fn new(placed: Vec<Placed>, record: Arc<Mutex<RestartRecord>>) -> Self {
        Self { actor: None, placed, quarantined: None, record, oom: Arc::default() }
    }
}

impl Actor for House {
    type Msg = HouseMsg;
    type State = HouseState;
    type Arguments = HouseStart;

    async fn pre_start(&self, me: ActorRef<HouseMsg>, start: HouseStart) -> Result<HouseState, ActorProcessingErr> {
        let HouseStart { args, router, events } = start;
        let mut state = HouseState {
            record: RestartRecord::new(args.config.supervision.clone(), args.seed),
            config: args.config,
            factory: args.factory,
            inventory: Arc::new(Mutex::new(args.inventory)),
            poll: args.poll,
            seed: args.seed,
            me,
            router,
            events,
            clock: Clock::start(),
            inventory_actor: None,
            devices: BTreeMap::new(),
            applying: false,
            changes: VecDeque::new(),
            stopping: false,
        };
        state.spawn_inventory().await;
        state.spawn_router().await;
        for (device, placed) in placed_of(&state.config, &args.plan) {
            let record = record_of(&state.config.supervision, state.seed, &device);
            state.devices.insert(device.clone(), DeviceChild::new(placed, record));
            state.spawn_device(&device).await;
        }
        Ok(state)
    }

    async fn handle(
        &self,
        me: ActorRef<HouseMsg>,
        message: HouseMsg,
        state: &mut HouseState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            HouseMsg::Apply(config, plan, reply) => {
                state.changes.push_back((*config, plan, reply));
                state.apply_next().await;
            }
            HouseMsg::ApplyDone => {
                state.applying = false;
                state.apply_next().await;
            }
            HouseMsg::Health(event) => state.health(&event),
            HouseMsg::Quarantined { device, reason } => state.quarantined(&device, reason),
            HouseMsg::RestartModel(model, reply) => {
                let _ = reply.send(state.restart_model(&model));
            }
            HouseMsg::RestartDevice(device, reply) => {
                let _ = reply.send(state.restart_device(&device));
            }
            HouseMsg::Devices(reply) => state.list_devices(reply),
            HouseMsg::Stop(reply) => state.stop(reply),
            HouseMsg::Status(reply) => state.status(reply),
            HouseMsg::Respawn(part) => state.respawn(&part).await,
            HouseMsg::Stopped => me.stop(None),
        }
        Ok(())
    }

    /// ractor stops a supervisor whose child ends, unless it is told otherwise.
    async fn handle_supervisor_evt(
        &self,
        me: ActorRef<HouseMsg>,
        event: SupervisionEvent,
        state: &mut HouseState,
    ) -> Result<(), ActorProcessingErr> {
        let (actor, reason) = match event {
            SupervisionEvent::ActorFailed(actor, error) => (actor, error.to_string()),
            SupervisionEvent::ActorTerminated(actor, last_state, reason) => {
                // Tickets in it go back to the router now.
                drop(last_state);
                (actor, reason.unwrap_or_else(|| "terminated".into()))
            }
            _ => return Ok(()),
        };
        if !state.stopping && !state.child_failed(&actor, &reason) {
            me.stop(Some("gave up".into()));
        }
        Ok(())
    }

    async fn post_stop(&self, _me: ActorRef<HouseMsg>, state: &mut HouseState) -> Result<(), ActorProcessingErr> {
        state.router.close();
        Ok(())
    }
}

impl HouseState {
    async fn spawn_inventory(&mut self) {
        let args = InventoryArgs {
            inventory: self.inventory.clone(),
            poll: self.poll,
            house: self.me.clone(),
            events: self.events.clone(),
        };
        match ractor::Actor::spawn_linked(None, InventoryActor, args, self.me.get_cell()).await {
            Ok((actor, _)) => self.inventory_actor = Some(actor),
            Err(error) => self.part_failed(Part::Inventory, &error.to_string()),
        }
    }

    async fn spawn_router(&mut self) {
        let args = RouterArgs {
            models: self.config.models.clone(),
            limits: self.config.host.limits.clone(),
            handle: self.router.clone(),
            events: self.events.clone(),
            clock: self.clock,
        };
        match ractor::Actor::spawn_linked(None, Router, args, self.me.get_cell()).await {
            Ok((actor, _)) => {
                self.router.install(Some(actor));
                self.tell_devices(|| DeviceMsg::Announce);
            }
            Err(error) => self.part_failed(Part::Router, &error.to_string()),
        }
    }

    async fn spawn_device(&mut self, device: &DeviceId) {
        let Some(child) = self.devices.get(device) else { return };
        let args = DeviceArgs {
            device: device.clone(),
            placed: child.placed.clone(),
            supervision: self.config.supervision.clone(),
            limits: self.config.host.limits.clone(),
            factory: self.factory.clone(),
            router: self.router.clone(),
            events: self.events.clone(),
            clock: self.clock,
            house: self.me.clone(),
            quarantined: child.quarantined.clone(),
            record: child.record.clone(),
            oom: child.oom.clone(),
        };
        match ractor::Actor::spawn_linked(None, DeviceSupervisor, args, self.me.get_cell()).await {
            Ok((actor, _)) => {
                if let Some(child) = self.devices.get_mut(device) {
                    child.actor = Some(actor);
                }
            }
            Err(error) => self.part_failed(Part::Device(device.clone()), &error.to_string()),
        }
    }

    fn tell_devices(&self, message: impl Fn() -> DeviceMsg) {
        for actor in self.devices.values().filter_map(|child| child.actor.as_ref()) {
            // One that is gone is respawned by its supervision event.
            let _ = actor.send_message(message());
        }
    }

    async fn respawn(&mut self, part: &Part) {
        if self.stopping {
            return;
        }
        match part {
            Part::Inventory => self.spawn_inventory().await,
            Part::Router => self.spawn_router().await,
            // A change of the configuration may have been faster.
            Part::Device(device) if self.has_supervisor(device) => {}
            Part::Device(device) => self.spawn_device(device).await,
        }
    }

    fn has_supervisor(&self, device: &DeviceId) -> bool {
        self.devices.get(device).is_some_and(|child| child.actor.is_some())
    }

    /// Has a child that ended started again; false when that happened too often.
    fn child_failed(&mut self, actor: &ActorCell, reason: &str) -> bool {
        let Some(part) = self.forget(actor) else { return true };
        self.part_failed(part, reason);
        !self.record.is_quarantined()
    }

    /// Finds out which child it was that ended.
    fn forget(&mut self, actor: &ActorCell) -> Option<Part> {
        let id = actor.get_id();
        if self.router.current().is_some_and(|router| router.get_id() == id) {
            self.router.install(None);
            return Some(Part::Router);
        }
        if self.inventory_actor.take_if(|inventory| inventory.get_id() == id).is_some() {
            return Some(Part::Inventory);
        }
        let ended = |(device, child): (&DeviceId, &mut DeviceChild)| {
            child.actor.take_if(|actor| actor.get_id() == id).map(|_| Part::Device(device.clone()))
        };
        self.devices.iter_mut().find_map(ended)
    }

    fn part_failed(&mut self, part: Part, reason: &str) {
        let actor = format!("{part:?}");
        self.events.tell(HouseEvent::ActorRestarted { actor: actor.clone(), reason: reason.to_owned() });
        match self.record.on_end(End::Failure, self.clock.now()) {
            Decision::RestartAfter(delay) => {
                self.me.send_after(delay, move || HouseMsg::Respawn(part));
            }
            Decision::Leave | Decision::Quarantine => {
                self.record.quarantine();
                let reason = format!("{actor} failed too often: {reason}");
                self.events.tell(HouseEvent::GaveUp { reason });
            }
        }
    }

    fn health(&self, event: &HealthEvent) {
        for (device, child) in &self.devices {
            let concerns = event.uuid.as_ref().is_none_or(|uuid| device.as_str() == uuid);
            if let Some(actor) = child.actor.as_ref().filter(|_| concerns && !device.is_cpu()) {
                let _ = actor.send_message(DeviceMsg::Health(event.kind));
            }
        }
    }

    fn quarantined(&mut self, device: &DeviceId, reason: Option<String>) {
        if let Some(child) = self.devices.get_mut(device) {
            child.quarantined = reason;
        }
        let mut serving = self.devices.values().filter(|child| !child.placed.is_empty()).peekable();
        if serving.peek().is_some() && serving.all(|child| child.quarantined.is_some()) {
            self.events.tell(HouseEvent::GaveUp { reason: "every device is quarantined".into() });
        }
    }

    fn restart_model(&self, model: &str) -> u32 {
        let mut count = 0;
        for child in self.devices.values() {
            let replicas = child.placed.iter().map(|placed| &placed.spec.replica);
            for replica in replicas.filter(|replica| replica.model == model) {
                count += 1;
                if let Some(actor) = &child.actor {
                    let _ = actor.send_message(DeviceMsg::Recycle(replica.clone()));
                }
            }
        }
        count
    }

    fn restart_device(&self, device: &DeviceId) -> bool {
        let Some(child) = self.devices.get(device) else { return false };
        let Some(actor) = &child.actor else { return true };
        if child.quarantined.is_none() {
            for placed in &child.placed {
                let _ = actor.send_message(DeviceMsg::Recycle(placed.spec.replica.clone()));
            }
        }
        let _ = actor.send_message(DeviceMsg::Release);
        true
    }

    fn list_devices(&self, reply: RpcReplyPort<Vec<Device>>) {
        let Some(actor) = self.inventory_actor.clone() else { return };
        tokio::spawn(async move {
            let listed = ractor::rpc::call(&actor, InventoryMsg::Devices, Some(STATUS_TIMEOUT)).await;
            let devices = listed.ok().and_then(answer).and_then(Result::ok);
            // Who asked may be gone.
            let _ = reply.send(devices.unwrap_or_default());
        });
    }

    async fn apply_next(&mut self) {
        if self.applying || self.stopping {
            return;
        }
        if let Some((config, plan, reply)) = self.changes.pop_front() {
            self.applying = true;
            self.apply(config, &plan, reply).await;
        }
    }

    /// Goes over to `config`: replicas that are to be as they are stay as they are.
    async fn apply(&mut self, config: Config, plan: &Plan, reply: RpcReplyPort<Applied>) {
        let wanted = placed_of(&config, plan);
        let mut applied = Applied::default();
        let mut removals: Vec<(DeviceId, ReplicaId, bool)> = Vec::new();
        for (device, child) in &mut self.devices {
            let here = wanted.get(device).map_or(&[][..], Vec::as_slice);
            child.placed.retain(|old| {
                let replica = old.spec.replica.clone();
                if here.iter().any(|new| is_same(old, new, config.model(&replica.model))) {
                    applied.kept.push(replica);
                    return true;
                }
                let returning = wanted.values().flatten().any(|new| new.spec.replica == replica);
                removals.push((device.clone(), replica.clone(), returning));
                applied.stopped.push(replica);
                false
            });
        }
        let mut placements: Vec<(DeviceId, Placed)> = Vec::new();
        for (device, placed) in wanted {
            let record = record_of(&config.supervision, self.seed, &device);
            let empty = || DeviceChild::new(Vec::new(), record);
            self.devices.entry(device.clone()).or_insert_with(empty);
            for new in placed.into_iter().filter(|new| !applied.kept.contains(&new.spec.replica)) {
                applied.started.push(new.spec.replica.clone());
                placements.push((device.clone(), new.clone()));
            }
        }
        self.config = config;
        let (models, limits) = (self.config.models.clone(), self.config.host.limits.clone());
        self.record.set_policy(self.config.supervision.clone());
        self.router.tell(RouterMsg::Configure { models, limits: limits.clone() });
        let supervision = self.config.supervision.clone();
        self.tell_devices(|| DeviceMsg::Configure(supervision.clone(), limits.clone()));
        let missing: Vec<DeviceId> =
            self.devices.iter().filter(|(_, child)| child.actor.is_none()).map(|(device, _)| device.clone()).collect();
        for device in missing {
            self.spawn_device(&device).await;
        }
        for (device, placed) in &placements {
            if let Some(child) = self.devices.get_mut(device) {
                child.placed.push(placed.clone());
            }
        }
        let actors: BTreeMap<DeviceId, ActorRef<DeviceMsg>> =
            self.devices.iter().filter_map(|(device, child)| Some((device.clone(), child.actor.clone()?))).collect();
        let me = self.me.clone();
        tokio::spawn(async move {
            for (device, replica, returning) in removals {
                let Some(actor) = actors.get(&device) else { continue };
                let message = |reply| DeviceMsg::Remove { replica, returning, reply };
                // One that is gone has nothing left to remove.
                let _ = ractor::rpc::call(actor, message, None).await;
            }
            for (device, placed) in placements {
                if let Some(actor) = actors.get(&device) {
                    let _ = actor.send_message(DeviceMsg::Place(placed));
                }
            }
            // Who asked may be gone, and the tree may have ended.
            let _ = me.send_message(HouseMsg::ApplyDone);
            let _ = reply.send(applied);
        });
    }

    fn stop(&mut self, reply: RpcReplyPort<()>) {
        self.stopping = true;
        let devices: Vec<ActorRef<DeviceMsg>> = self.devices.values().filter_map(|child| child.actor.clone()).collect();
        let (me, router) = (self.me.clone(), self.router.clone());
        tokio::spawn(async move {
            if let Some(router) = router.current() {
                let message = |reply| RouterMsg::Drain { deadline: Duration::ZERO, reply };
                let _ = ractor::rpc::call(&router, message, Some(STATUS_TIMEOUT)).await;
            }
            // All devices at once; on each, the replicas one by one.
            let stops: Vec<_> = devices
                .into_iter()
                .map(|device| tokio::spawn(async move { ractor::rpc::call(&device, DeviceMsg::Stop, None).await }))
                .collect();
            for stop in stops {
                // One that failed has killed its workers with its links.
                let _ = stop.await;
            }
            let _ = me.send_message(HouseMsg::Stopped);
            let _ = reply.send(());
        });
    }

    fn status(&self, reply: RpcReplyPort<HouseStatus>) {
        let devices: Vec<ActorRef<DeviceMsg>> = self.devices.values().filter_map(|child| child.actor.clone()).collect();
        let (router, uptime) = (self.router.current(), self.clock.now());
        tokio::spawn(async move {
            let mut status = HouseStatus { devices: Vec::new(), router: None, uptime };
            for device in devices {
                let asked = ractor::rpc::call(&device, DeviceMsg::Status, Some(STATUS_TIMEOUT)).await;
                status.devices.extend(asked.ok().and_then(answer));
            }
            if let Some(router) = router {
                let asked = ractor::rpc::call(&router, RouterMsg::Status, Some(STATUS_TIMEOUT)).await;
                status.router = asked.ok().and_then(answer);
            }
            // Who asked may be gone.
            let _ = reply.send(status);
        });
    }
}

/// A device's record of failures; the seed makes the jitter of its restarts.
fn record_of(policy: &Supervision, seed: u64, device: &DeviceId) -> Arc<Mutex<RestartRecord>> {
    let seed = device.as_str().bytes().fold(seed, |seed, byte| mix(seed ^ u64::from(byte)));
    Arc::new(Mutex::new(RestartRecord::new(policy.clone(), seed)))
}

/// What going over from one configuration with its plan to another would do.
pub fn preview(old: (&Config, &Plan), new: (&Config, &Plan)) -> Applied {
    let (running, wanted) = (placed_of(old.0, old.1), placed_of(new.0, new.1));
    let mut applied = Applied::default();
    for (device, placed) in &running {
        for here in placed {
            let there = wanted.get(device).map_or(&[][..], Vec::as_slice);
            let model = new.0.model(&here.spec.replica.model);
            let kept = there.iter().any(|wanted| is_same(here, wanted, model));
            let list = if kept { &mut applied.kept } else { &mut applied.stopped };
            list.push(here.spec.replica.clone());
        }
    }
    let started = wanted.into_values().flatten().map(|placed| placed.spec.replica);
    applied.started = started.filter(|replica| !applied.kept.contains(replica)).collect();
    applied
}

/// Whether a replica that runs may go on as the one that is wanted. If the planner chose its memory for KV, it may go on
/// with less than it could have now, but not with more: somebody else is to have that.
fn is_same(old: &Placed, new: &Placed, model: Option<&Model>) -> bool {
    let planned = model.is_some_and(|model| model.kv_budget_bytes.is_none());
    let kv_fits = if planned { old.spec.kv_bytes <= new.spec.kv_bytes } else { old.spec.kv_bytes == new.spec.kv_bytes };
    kv_fits && old.spec == WorkerSpec { kv_bytes: old.spec.kv_bytes, ..new.spec.clone() }
}

/// What is to run where.
fn placed_of(config: &Config, plan: &Plan) -> BTreeMap<DeviceId, Vec<Placed>> {
    let mut placed: BTreeMap<DeviceId, Vec<Placed>> = BTreeMap::new();
    for (device, placement) in plan.placements() {
        let Some(model) = config.model(&placement.model) else { continue };
        let isolation = match (model.isolation, device.is_cpu()) {
            (Isolation::Auto, true) => Isolation::Thread,
            (Isolation::Auto, false) => Isolation::Process,
            (chosen, _) => chosen,
        };
        let spec = WorkerSpec {
            replica: ReplicaId { model: model.name.clone(), index: placement.replica },
            incarnation: 0,
            device: device.clone(),
            source: model.source.clone(),
            kv_bytes: placement.kv_bytes,
            memory_bytes_max: placement.limit_bytes,
            kv_type: model.kv_type,
            context: model.context,
            max_sequences: model.max_sequences,
            max_batch_tokens: model.max_batch_tokens,
            isolation,
            heartbeat: config.supervision.heartbeat,
        };
        let kv_min_bytes = placement.kv_min_bytes;
        placed.entry(device.clone()).or_default().push(Placed { spec, kv_min_bytes });
    }
    placed
}
