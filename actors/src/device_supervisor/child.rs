//! A replica on a device, and what outlives its actors.

use super::Placed;
use crate::ask::ask;
use crate::messages::{Phase, ReplicaId, ReplicaStatus};
use crate::model::ModelMsg;
use ractor::ActorRef;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;

/// What is one and the same for all actors that a replica ever has.
#[derive(Debug, Clone)]
pub(super) struct Life {
    /// Held by the pump of its worker until that is reaped.
    pub(super) slot: Arc<Semaphore>,
    /// Counts its workers.
    pub(super) incarnations: Arc<AtomicU64>,
}

impl Default for Life {
    fn default() -> Self {
        Self { slot: Arc::new(Semaphore::new(1)), incarnations: Arc::default() }
    }
}

/// The replicas of a device, as its house keeps them: a worker is reaped when it is reaped, even if the supervisor that
/// started it is gone by then, and the next one must wait for that.
#[derive(Debug, Clone, Default)]
pub struct Lives(Arc<Mutex<BTreeMap<ReplicaId, Life>>>);

impl Lives {
    pub(super) fn of(&self, replica: &ReplicaId) -> Life {
        // A map: whole whoever panics between two changes.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(replica.clone()).or_default().clone()
    }

    /// The replica is taken away: the workers of another of its name are counted anew, and wait for its last one all the
    /// same.
    pub(super) fn count_anew(&self, replica: &ReplicaId) {
        if let Some(life) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(replica) {
            life.incarnations = Arc::default();
        }
    }

    /// Waits until no worker is left.
    pub(crate) async fn ended(&self) {
        let lives: Vec<Life> = self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for life in lives {
            // Never closed.
            let _ = life.slot.acquire().await;
        }
    }
}

pub(super) struct Child {
    pub(super) placed: Placed,
    pub(super) life: Life,
    pub(super) actor: Option<ActorRef<ModelMsg>>,
}

impl Child {
    pub(super) fn new(placed: Placed, lives: &Lives) -> Self {
        Self { life: lives.of(&placed.spec.replica), placed, actor: None }
    }

    /// A replica whose actor does not answer, because it is being restarted.
    pub(super) fn unknown(&self) -> ReplicaStatus {
        ReplicaStatus {
            replica: self.placed.spec.replica.clone(),
            device: self.placed.spec.device.clone(),
            phase: Phase::Down,
            incarnation: self.life.incarnations.load(Ordering::Relaxed),
            pid: None,
            progress: None,
            running: 0,
            kv_bytes: self.placed.spec.kv_bytes,
            last_heard: None,
            step_age: None,
            stats: None,
            last_end: None,
        }
    }

    /// Ends it: its worker in peace, then its actor, then waits until the worker was reaped.
    pub(super) async fn stop(self) {
        if let Some(actor) = self.actor {
            // An actor that died meanwhile has killed its worker; the slot says when that is over.
            let _ = ask(&actor, ModelMsg::Stop, None).await;
            actor.stop(None);
        }
        // Never closed.
        let _ = self.life.slot.acquire().await;
    }
}
