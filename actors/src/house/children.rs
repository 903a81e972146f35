//! The children of the house: how each is started, found again when it ends, and started once more.

use super::{HouseMsg, HouseState, Part};
use crate::device_supervisor::{DeviceArgs, DeviceMsg, DeviceSupervisor, Lives, Placed};
use crate::inventory::DeviceId;
use crate::inventory_actor::{InventoryActor, InventoryArgs};
use crate::messages::HouseEvent;
use crate::policy::ladder::RungCounts;
use crate::policy::mix;
use crate::policy::restart::{Decision, End, RestartRecord};
use crate::router::{Router, RouterArgs};
use playhouse_config::Supervision;
use ractor::{Actor, ActorCell, ActorRef};
use std::sync::{Arc, Mutex};

/// A device, with its supervisor and what outlives that.
pub(super) struct DeviceChild {
    pub(super) actor: Option<ActorRef<DeviceMsg>>,
    pub(super) placed: Vec<Placed>,
    pub(super) quarantined: Option<String>,
    /// Its failures, which outlive its supervisor.
    record: Arc<Mutex<RestartRecord>>,
    /// What was given up on it for want of memory; likewise.
    oom: Arc<Mutex<RungCounts>>,
    /// Its replicas' workers; likewise.
    pub(super) lives: Lives,
}

impl DeviceChild {
    /// One on which nothing runs yet. The seed makes the jitter of its restarts.
    fn new(policy: &Supervision, seed: u64, device: &DeviceId) -> Self {
        let seed = device.as_str().bytes().fold(seed, |seed, byte| mix(seed ^ u64::from(byte)));
        let record = Arc::new(Mutex::new(RestartRecord::new(policy.clone(), seed)));
        Self {
            actor: None,
            placed: Vec::new(),
            quarantined: None,
            record,
            oom: Arc::default(),
            lives: Lives::default(),
        }
    }
}

impl HouseState {
    pub(super) async fn spawn_inventory(&mut self) {
        let args =
            InventoryArgs { inventory: self.inventory.clone(), house: self.me.clone(), events: self.events.clone() };
        match Actor::spawn_linked(None, InventoryActor, args, self.me.get_cell()).await {
            Ok((actor, _)) => self.inventory_actor = Some(actor),
            Err(error) => self.part_failed(Part::Inventory, &error.to_string()),
        }
    }

    pub(super) async fn spawn_router(&mut self) {
        let args = RouterArgs {
            models: self.config.models.clone(),
            limits: self.config.host.limits.clone(),
            handle: self.router.clone(),
            events: self.events.clone(),
            clock: self.clock,
        };
        match Actor::spawn_linked(None, Router, args, self.me.get_cell()).await {
            Ok((actor, _)) => {
                self.router.install(Some(actor));
                self.tell_devices(|| DeviceMsg::Announce);
            }
            Err(error) => self.part_failed(Part::Router, &error.to_string()),
        }
    }

    /// What is known of a device, from now on if it is new.
    pub(super) fn child(&mut self, device: &DeviceId) -> &mut DeviceChild {
        let (policy, seed) = (&self.config.supervision, self.seed);
        self.devices.entry(device.clone()).or_insert_with(|| DeviceChild::new(policy, seed, device))
    }

    pub(super) async fn spawn_missing_devices(&mut self) {
        let missing = self.devices.iter().filter(|(_, child)| child.actor.is_none());
        let missing: Vec<DeviceId> = missing.map(|(device, _)| device.clone()).collect();
        for device in missing {
            self.spawn_device(&device).await;
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
            lives: child.lives.clone(),
        };
        match Actor::spawn_linked(None, DeviceSupervisor, args, self.me.get_cell()).await {
            Ok((actor, _)) => {
                if let Some(child) = self.devices.get_mut(device) {
                    child.actor = Some(actor);
                }
            }
            Err(error) => self.part_failed(Part::Device(device.clone()), &error.to_string()),
        }
    }

    pub(super) fn tell_devices(&self, message: impl Fn() -> DeviceMsg) {
        for actor in self.devices.values().filter_map(|child| child.actor.as_ref()) {
            // One that is gone is respawned by its supervision event.
            let _ = actor.send_message(message());
        }
    }

    pub(super) async fn respawn(&mut self, part: &Part) {
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
    pub(super) fn child_failed(&mut self, actor: &ActorCell, reason: &str) -> bool {
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
}
