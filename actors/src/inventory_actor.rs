//! Watches the devices. Owns: the [`Inventory`]. Never: a decision.
//! Started by `house`; if it dies it is started again, over the same inventory, which it gives back.
//!
//! ```text
//! [Watching] --poll--> asks the inventory on a blocking thread, keeps the answer --> [Watching]
//!     beside it: a task that carries the health events of the inventory's own thread to the house
//! ```

use crate::events::EventBus;
use crate::house::HouseMsg;
use crate::inventory::{Device, Inventory, InventoryError};
use crate::messages::HouseEvent;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What the inventory actor is told.
#[derive(Debug)]
pub enum InventoryMsg {
    /// List the devices now.
    Devices(RpcReplyPort<Result<Vec<Device>, InventoryError>>),
    /// What the last look brought, without another one.
    Last(RpcReplyPort<Vec<Device>>),
    #[doc(hidden)]
    Poll,
    #[doc(hidden)]
    Polled(Result<Vec<Device>, InventoryError>),
}

/// What the house gives.
pub struct InventoryArgs {
    /// Shared with the house, so that it outlives this actor.
    pub inventory: Arc<Mutex<Box<dyn Inventory>>>,
    /// How often to look; `None` looks only when asked.
    pub poll: Option<Duration>,
    /// Who is told of health events.
    pub house: ActorRef<HouseMsg>,
    /// Where news go.
    pub events: EventBus,
}

/// The actor.
#[derive(Debug)]
pub struct InventoryActor;

/// What only the actor changes.
pub struct InventoryState {
    args: InventoryArgs,
    last: Vec<Device>,
    polling: bool,
}

impl Actor for InventoryActor {
    type Msg = InventoryMsg;
    type State = InventoryState;
    type Arguments = InventoryArgs;

    async fn pre_start(
        &self,
        me: ActorRef<InventoryMsg>,
        args: InventoryArgs,
    ) -> Result<InventoryState, ActorProcessingErr> {
        if let Some(period) = args.poll {
            me.send_interval(period, || InventoryMsg::Poll);
        }
        let events = args.inventory.lock().unwrap_or_else(PoisonError::into_inner).take_events();
        if let Some(mut events) = events {
            let (bus, house) = (args.events.clone(), args.house.clone());
            // Not a part of this actor: the channel is given once, and outlives it.
            tokio::spawn(async move {
                while let Some(event) = events.recv().await {
                    bus.tell(HouseEvent::Health { device: event.uuid.clone(), kind: event.kind });
                    if house.send_message(HouseMsg::Health(event)).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(InventoryState { args, last: Vec::new(), polling: false })
    }

    async fn handle(
        &self,
        me: ActorRef<InventoryMsg>,
        message: InventoryMsg,
        state: &mut InventoryState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            InventoryMsg::Devices(reply) => {
                let inventory = state.args.inventory.clone();
                tokio::spawn(async move {
                    // Who asked may be gone.
                    let _ = reply.send(look(inventory).await);
                });
            }
            InventoryMsg::Last(reply) => {
                let _ = reply.send(state.last.clone());
            }
            InventoryMsg::Poll if state.polling => {}
            InventoryMsg::Poll => {
                state.polling = true;
                let inventory = state.args.inventory.clone();
                tokio::spawn(async move {
                    let _ = me.send_message(InventoryMsg::Polled(look(inventory).await));
                });
            }
            InventoryMsg::Polled(result) => {
                state.polling = false;
                match result {
                    Ok(devices) => state.last = devices,
                    Err(error) => tracing::warn!(%error, "the devices could not be listed"),
                }
            }
        }
        Ok(())
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
