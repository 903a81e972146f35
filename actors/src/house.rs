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

mod change;
mod children;
mod handle;

pub use change::Applied;
pub use handle::HouseHandle;

use crate::ask::ask;
use crate::device_supervisor::{DeviceMsg, Lives};
use crate::events::{Clock, EventBus};
use crate::inventory::{Device, DeviceId, HealthEvent, Inventory};
use crate::inventory_actor::InventoryMsg;
use crate::link::WorkerFactory;
use crate::messages::{HouseEvent, HouseStatus, ReplicaId};
use crate::policy::placement::Plan;
use crate::policy::restart::RestartRecord;
use crate::router::{RouterHandle, RouterMsg};
use change::{Change, Removal, placed_of};
use children::DeviceChild;
use handle::STATUS_TIMEOUT;
use playhouse_config::Config;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the house is told.
#[derive(Debug)]
pub enum HouseMsg {
    /// The configuration changed; the plan is made for it. Answered when everything old is gone and everything new is
    /// started (not: loaded).
    Apply(Box<Config>, Plan, RpcReplyPort<Applied>),
    /// Answered with what [`HouseMsg::Apply`] would do.
    Preview(Box<Config>, Plan, RpcReplyPort<Applied>),
    /// A device reports.
    Health(HealthEvent),
    /// A replica goes on with less memory for KV than was planned.
    Shrunk {
        /// Which.
        replica: ReplicaId,
        /// Bytes it has now.
        kv_bytes: u64,
    },
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
    /// Makes the jitter of restarts.
    pub seed: u64,
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
        for placed in placed_of(&state.config, &args.plan) {
            state.child(&placed.spec.device).placed.push(placed);
        }
        state.spawn_missing_devices().await;
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
            HouseMsg::Preview(config, plan, reply) => {
                // Who asked may be gone.
                let _ = reply.send(state.change_to(&config, &plan).applied);
            }
            HouseMsg::Health(event) => state.health(&event),
            HouseMsg::Shrunk { replica, kv_bytes } => state.shrunk(&replica, kv_bytes),
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
            let listed = ask(&actor, InventoryMsg::Devices, Some(STATUS_TIMEOUT)).await;
            // Who asked may be gone.
            let _ = reply.send(listed.and_then(Result::ok).unwrap_or_default());
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

    fn change_to(&self, config: &Config, plan: &Plan) -> Change {
        Change::between(self.devices.values().flat_map(|child| &child.placed), config, plan)
    }

    /// Goes over to `config`: replicas that are to be as they are stay as they are.
    async fn apply(&mut self, config: Config, plan: &Plan, reply: RpcReplyPort<Applied>) {
        let change = self.change_to(&config, plan);
        self.configure(config);
        for child in self.devices.values_mut() {
            child.placed.retain(|old| change.applied.kept.contains(&old.spec.replica));
        }
        for new in &change.placements {
            self.child(&new.spec.device);
        }
        self.spawn_missing_devices().await;
        // A supervisor starts what it is given at its own start; of the rest it is told when everything old is gone.
        for new in &change.placements {
            self.child(&new.spec.device).placed.push(new.clone());
        }
        let actors = self.devices.iter().filter_map(|(device, child)| Some((device.clone(), child.actor.clone()?)));
        tokio::spawn(carry_out(change, actors.collect(), self.me.clone(), reply));
    }

    fn configure(&mut self, config: Config) {
        let (supervision, limits) = (config.supervision.clone(), config.host.limits.clone());
        self.record.set_policy(supervision.clone());
        self.router.tell(RouterMsg::Configure { models: config.models.clone(), limits: limits.clone() });
        self.tell_devices(|| DeviceMsg::Configure(supervision.clone(), limits.clone()));
        self.config = config;
    }

    /// So a later change leaves the replica alone, and a new supervisor does not begin with what did not fit.
    fn shrunk(&mut self, replica: &ReplicaId, kv_bytes: u64) {
        let mut placed = self.devices.values_mut().flat_map(|child| &mut child.placed);
        if let Some(placed) = placed.find(|placed| placed.spec.replica == *replica) {
            placed.spec.kv_bytes = kv_bytes;
        }
    }

    fn stop(&mut self, reply: RpcReplyPort<()>) {
        self.stopping = true;
        let devices: Vec<ActorRef<DeviceMsg>> = self.devices.values().filter_map(|child| child.actor.clone()).collect();
        let lives: Vec<Lives> = self.devices.values().map(|child| child.lives.clone()).collect();
        let (me, router) = (self.me.clone(), self.router.clone());
        tokio::spawn(async move {
            if let Some(router) = router.current() {
                let message = |reply| RouterMsg::Drain { deadline: Duration::ZERO, reply };
                let _ = ask(&router, message, Some(STATUS_TIMEOUT)).await;
            }
            // All devices at once; on each, the replicas one by one.
            let stops: Vec<_> = devices
                .into_iter()
                .map(|device| tokio::spawn(async move { ask(&device, DeviceMsg::Stop, None).await }))
                .collect();
            for stop in stops {
                // One that failed has killed its workers with its links.
                let _ = stop.await;
            }
            // So has one that failed before, and was not back yet.
            for device in lives {
                device.ended().await;
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
                status.devices.extend(ask(&device, DeviceMsg::Status, Some(STATUS_TIMEOUT)).await);
            }
            if let Some(router) = router {
                status.router = ask(&router, RouterMsg::Status, Some(STATUS_TIMEOUT)).await;
            }
            // Who asked may be gone.
            let _ = reply.send(status);
        });
    }
}

/// Ends what is to end, then starts what is new.
async fn carry_out(
    change: Change,
    actors: BTreeMap<DeviceId, ActorRef<DeviceMsg>>,
    house: ActorRef<HouseMsg>,
    reply: RpcReplyPort<Applied>,
) {
    for Removal { device, replica, returning } in change.removals {
        let Some(actor) = actors.get(&device) else { continue };
        // One that is gone has nothing left to remove.
        let _ = ask(actor, |reply| DeviceMsg::Remove { replica, returning, reply }, None).await;
    }
    for placed in change.placements {
        if let Some(actor) = actors.get(&placed.spec.device) {
            let _ = actor.send_message(DeviceMsg::Place(placed));
        }
    }
    // Who asked may be gone, and the tree may have ended.
    let _ = house.send_message(HouseMsg::ApplyDone);
    let _ = reply.send(change.applied);
}
