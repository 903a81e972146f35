//! What a host holds of a running tree: typed calls to its actors.

use super::{Applied, House, HouseArgs, HouseMsg, HouseStart};
use crate::ask::ask;
use crate::engine::RequestId;
use crate::event_log::EventLog;
use crate::events::EventBus;
use crate::inventory::{Device, DeviceId};
use crate::messages::{Drained, Generate, HouseEvent, HouseStatus, Refusal, ReplicaId};
use crate::model::ModelMsg;
use crate::policy::placement::Plan;
use crate::router::{RouterHandle, RouterMsg};
use crate::stream::TokenStream;
use playhouse_config::Config;
use ractor::{ActorRef, ActorStatus, SpawnErr};
use std::time::Duration;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// How long an actor may take to say how it is.
pub(super) const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked whether there is a router again.
const ROUTER_LOOK: Duration = Duration::from_millis(20);

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
        ask(&router, message, Some(STATUS_TIMEOUT)).await.unwrap_or_default()
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
        ask(&self.actor, HouseMsg::Status, Some(STATUS_TIMEOUT)).await
    }

    /// The devices now; empty once the tree has ended.
    pub async fn devices(&self) -> Vec<Device> {
        ask(&self.actor, HouseMsg::Devices, Some(STATUS_TIMEOUT)).await.unwrap_or_default()
    }

    /// Goes over to another configuration; `None` once the tree has ended.
    pub async fn apply(&self, config: Config, plan: Plan) -> Option<Applied> {
        let message = |reply| HouseMsg::Apply(Box::new(config), plan, reply);
        ask(&self.actor, message, None).await
    }

    /// What [`HouseHandle::apply`] would do; `None` once the tree has ended.
    pub async fn preview(&self, config: Config, plan: Plan) -> Option<Applied> {
        let message = |reply| HouseMsg::Preview(Box::new(config), plan, reply);
        ask(&self.actor, message, Some(STATUS_TIMEOUT)).await
    }

    /// Ends the workers of a model and starts others. How many replicas it has.
    pub async fn restart_model(&self, model: &str) -> u32 {
        let message = |reply| HouseMsg::RestartModel(model.to_owned(), reply);
        ask(&self.actor, message, Some(STATUS_TIMEOUT)).await.unwrap_or(0)
    }

    /// Takes a device back from quarantine, or ends its workers and starts others. Whether there is such a device.
    pub async fn restart_device(&self, device: &DeviceId) -> bool {
        let message = |reply| HouseMsg::RestartDevice(device.clone(), reply);
        ask(&self.actor, message, Some(STATUS_TIMEOUT)).await.unwrap_or(false)
    }

    /// Takes no more requests and waits until the open ones have ended, or ends them when the time is up. The tree goes on,
    /// and takes no requests, until it is stopped or [`HouseHandle::undrain`] is called.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        let until = Instant::now() + deadline;
        while self.actor.get_status() < ActorStatus::Stopping {
            if let Some(router) = self.router.current() {
                let deadline = until.saturating_duration_since(Instant::now());
                let message = |reply| RouterMsg::Drain { deadline, reply };
                if let Some(drained) = ask(&router, message, None).await {
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
        ask(&router, RouterMsg::Undrain, Some(STATUS_TIMEOUT)).await.unwrap_or(false)
    }

    /// Ends the tree: every worker is gone when this returns.
    pub async fn stop(&self) {
        // A tree that has ended is stopped.
        let _ = ask(&self.actor, HouseMsg::Stop, None).await;
    }
}
