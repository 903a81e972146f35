//! A [`Playhouse`] as its operator sees it: what the admin socket and the service manager are given.

use super::House;
use super::protocol::{Failure, FailureKind, Reloaded, Restarted};
use crate::host::{PlanError, Playhouse, ReloadError};
use playhouse_actors::inventory::Device;
use playhouse_actors::{HouseEvent, HouseStatus};
use std::error::Error;
use std::time::Duration;
use tokio::sync::{broadcast, mpsc};

/// A house, and the way to ask its process to end.
#[derive(Debug, Clone)]
pub struct Operated {
    house: Playhouse,
    stop: mpsc::Sender<()>,
}

impl Operated {
    /// Operates `house`. Whoever runs the process reads from the channel that it is to stop, as it hears SIGTERM.
    pub fn new(house: Playhouse) -> (Self, mpsc::Receiver<()>) {
        // One wish is enough: a second one says the same.
        let (stop, asked) = mpsc::channel(1);
        (Self { house, stop }, asked)
    }
}

impl House for Operated {
    async fn status(&self) -> Option<HouseStatus> {
        self.house.status().await
    }

    async fn devices(&self) -> Vec<Device> {
        self.house.devices().await
    }

    fn events(&self) -> broadcast::Receiver<HouseEvent> {
        self.house.events()
    }

    async fn reload(&self, dry_run: bool) -> Result<Reloaded, Failure> {
        self.house.reload_file(dry_run).await.map_err(|error| Failure::new(kind(&error), chain(&error)))
    }

    async fn restart(&self, target: &str) -> Result<Restarted, Failure> {
        let restarted = self.house.restart(target).await;
        restarted.map_err(|error| Failure::new(FailureKind::NoSuchTarget, error.to_string()))
    }

    async fn drain(&self, deadline: Option<Duration>) -> u32 {
        let deadline = deadline.unwrap_or_else(|| self.house.config().host.drain);
        self.house.drain(deadline).await
    }

    fn stop(&self) {
        // Full: it was asked before. Closed: it is stopping.
        let _ = self.stop.try_send(());
    }
}

fn kind(error: &ReloadError) -> FailureKind {
    match error {
        ReloadError::NoFile => FailureKind::NotPossible,
        ReloadError::Config(_) | ReloadError::Plan(PlanError::Model { .. } | PlanError::Settings { .. }) => {
            FailureKind::BadConfig
        }
        ReloadError::Plan(PlanError::Placement(_)) => FailureKind::DoesNotFit,
        ReloadError::Plan(PlanError::Inventory(_)) => FailureKind::Internal,
        ReloadError::Ended => FailureKind::Ended,
    }
}

/// The error and its causes, a line each: they end here, and a person reads them.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // A transparent error says what its cause says.
        let line = error.to_string();
        if !text.ends_with(&line) {
            text.push_str(&format!("\n  caused by: {line}"));
        }
        source = error.source();
    }
    text
}
