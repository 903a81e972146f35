//! Reloads of the configuration file, by signal or by the admin socket: one at a time, beside everything else that the host
//! does, and all of them told to the service manager.
//!
//! ```text
//! [Idle] --ask--> [Reloading] --over--> [Idle]
//!                   | ^
//!               ask | | over: the next begins, for all who asked meanwhile
//!                   v |
//!             [Reloading, once more wanted]
//! ```
//!
//! Who asks while one is under way gets the next one: the file may have changed after it was read.

use super::admin::{Failure, FailureKind, Reloaded};
use super::notify::Notify;
use super::{PlanError, Playhouse, ReloadError};
use crate::worker::chain;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// What a reload brought.
pub(super) type Outcome = Result<Reloaded, Failure>;
/// Where that goes.
pub(super) type Reply = oneshot::Sender<Outcome>;

/// The reload under way, and those who wait.
#[derive(Debug)]
pub(super) struct Reloads {
    house: Playhouse,
    now: Option<Now>,
    /// Who wants another one after it. A signal wants one without waiting for it.
    next: Option<Vec<Reply>>,
}

#[derive(Debug)]
struct Now {
    task: JoinHandle<Outcome>,
    replies: Vec<Reply>,
}

impl Reloads {
    pub(super) fn of(house: Playhouse) -> Self {
        Self { house, now: None, next: None }
    }

    /// Begins one, or has one begin after the one under way.
    pub(super) fn ask(&mut self, reply: Option<Reply>, notify: &Notify) {
        if self.now.is_some() {
            self.next.get_or_insert_default().extend(reply);
        } else {
            self.begin(reply.into_iter().collect(), notify);
        }
    }

    fn begin(&mut self, replies: Vec<Reply>, notify: &Notify) {
        notify.reloading();
        let house = self.house.clone();
        // A task of its own: it ends as a whole, whoever stops waiting for it.
        let task = tokio::spawn(async move { house.reload_file(false).await.map_err(|error| failure(&error)) });
        self.now = Some(Now { task, replies });
    }

    /// Waits for the end of the one under way, for ever if there is none. Nothing is lost when this is dropped.
    pub(super) async fn over(&mut self) -> Outcome {
        match &mut self.now {
            Some(now) => (&mut now.task).await.unwrap_or_else(|error| {
                Err(Failure::new(FailureKind::Internal, format!("the reload failed: {error}")))
            }),
            None => std::future::pending().await,
        }
    }

    /// Tells everybody what [`Reloads::over`] brought, and begins the next one if somebody wants one.
    pub(super) fn finish(&mut self, outcome: &Outcome, notify: &Notify) {
        log(outcome);
        notify.reloaded();
        for reply in self.now.take().into_iter().flat_map(|now| now.replies) {
            // Who asked may be gone.
            let _ = reply.send(outcome.clone());
        }
        if let Some(replies) = self.next.take() {
            self.begin(replies, notify);
        }
    }

    /// The host stops: what is under way is not waited for, and nothing begins any more.
    pub(super) fn give_up(self) {
        let waiting = self.now.into_iter().flat_map(|now| now.replies).chain(self.next.into_iter().flatten());
        for reply in waiting {
            let _ = reply.send(Err(Failure::stopping()));
        }
    }
}

fn log(outcome: &Outcome) {
    match outcome {
        Ok(Reloaded { applied, restart_needed, .. }) => {
            let (kept, started, stopped) = (applied.kept.len(), applied.started.len(), applied.stopped.len());
            tracing::info!(kept, started, stopped, ?restart_needed, "the configuration was read again");
        }
        Err(error) => tracing::error!("the configuration is not taken over, everything goes on as it was: {error}"),
    }
}

/// The failure that an operator is told.
pub(super) fn failure(error: &ReloadError) -> Failure {
    let kind = match error {
        ReloadError::NoFile => FailureKind::NotPossible,
        ReloadError::Config(_) | ReloadError::Plan(PlanError::Settings { .. }) => FailureKind::BadConfig,
        ReloadError::Plan(PlanError::Model { source, .. }) if source.is_missing() => FailureKind::NoModelFile,
        ReloadError::Plan(PlanError::Model { .. }) => FailureKind::BadModel,
        ReloadError::Plan(PlanError::Placement(_)) => FailureKind::DoesNotFit,
        ReloadError::Plan(PlanError::Inventory(_)) => FailureKind::NoDevices,
        ReloadError::Ended => return Failure::ended(),
    };
    Failure::new(kind, chain(error))
}
