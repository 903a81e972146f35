//! Asks after the devices. Owns: the [`Inventory`]. Never: a decision.
//! Started by `house`; if it dies it is started again, over the same inventory, which it gives back.
//!
//! ```text
//! [Idle] --Devices: asks the inventory on a blocking thread, which answers--> [Idle]
//!     beside it: a task that carries the health events of the inventory's own thread to the house
//! ```

use crate::events::EventBus;
use crate::house::HouseMsg;
use crate::inventory::{Device, HealthEvent, Inventory, InventoryError};
use crate::messages::HouseEvent;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// What the inventory actor is told.
#[derive(Debug)]
pub enum InventoryMsg {
    /// List the devices now.
    Devices(RpcReplyPort<Result<Vec<Device>, InventoryError>>),
}

/// What the house gives.
pub struct InventoryArgs {
    /// Shared with the house, so that it outlives this actor.
    pub inventory: Arc<Mutex<Box<dyn Inventory>>>,
    /// Who is told of health events.
    pub house: ActorRef<HouseMsg>,
    /// Where news go.
    pub events: EventBus,
}

/// The actor.
#[derive(Debug)]
pub struct InventoryActor;

impl Actor for InventoryActor {
    type Msg = InventoryMsg;
    type State = Arc<Mutex<Box<dyn Inventory>>>;
    type Arguments = InventoryArgs;

    async fn pre_start(
        &self,
        _me: ActorRef<InventoryMsg>,
        args: InventoryArgs,
    ) -> Result<Self::State, ActorProcessingErr> {
        let InventoryArgs { inventory, house, events } = args;
        // Not a part of this actor: the channel is given once, and outlives it.
        if let Some(health) = inventory.lock().unwrap_or_else(PoisonError::into_inner).take_events() {
            tokio::spawn(carry(health, house, events));
        }
        Ok(inventory)
    }

    async fn handle(
        &self,
        _me: ActorRef<InventoryMsg>,
        message: InventoryMsg,
        inventory: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            InventoryMsg::Devices(reply) => {
                let inventory = inventory.clone();
                tokio::spawn(async move {
                    // Who asked may be gone.
                    let _ = reply.send(look(inventory).await);
                });
            }
        }
        Ok(())
    }
}

/// Carries health events to whoever listens and to the house, for as long as it lives.
async fn carry(mut health: mpsc::Receiver<HealthEvent>, house: ActorRef<HouseMsg>, news: EventBus) {
    while let Some(event) = health.recv().await {
        news.tell(HouseEvent::Health { device: event.uuid.clone(), kind: event.kind });
        if house.send_message(HouseMsg::Health(event)).is_err() {
            return;
        }
    }
}

/// Asks the inventory where blocking harms nobody.
async fn look(inventory: Arc<Mutex<Box<dyn Inventory>>>) -> Result<Vec<Device>, InventoryError> {
    let looking =
        tokio::task::spawn_blocking(move || inventory.lock().unwrap_or_else(PoisonError::into_inner).devices());
    let failed = |error: tokio::task::JoinError| InventoryError::Call {
        call: "listing the devices".into(),
        detail: error.to_string(),
    };
    looking.await.map_err(failed).and_then(|result| result)
}
