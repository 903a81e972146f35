//! A house that runs until it is told to stop: what `playhouse serve` does after it was opened.
//!
//! ```text
//! [Running] --SIGHUP, reload--> [Running]
//!     |--SIGTERM, SIGINT, stop--> [Draining] --streams finished, or the time is up, or a second signal--> Asked
//!     \--the supervisor gives up--> GaveUp
//! ```

use super::admin::{self, AdminServer, Failure, FailureKind, Options, Reloaded, Restarted, usual_path};
use super::notify::{Notify, Service};
use super::signals::{Asked, Signals};
use super::{NoSuchTarget, Playhouse, ReloadError};
use crate::worker::chain;
use playhouse_actors::inventory::Device;
use playhouse_actors::{HouseEvent, HouseStatus};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify as Bell, broadcast};

/// How a house's run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It was asked to stop, and did.
    Asked,
    /// The supervisor gave up: nothing is left that could serve.
    GaveUp(String),
}

/// A house with what an operator does to it.
#[derive(Debug, Clone)]
pub struct Operated {
    house: Playhouse,
    /// Rung when the admin socket asks to stop.
    stop: Arc<Bell>,
}

/// Runs `house` until it is told to stop.
///
/// # Errors
/// If the system gives no signals.
pub async fn run(house: Playhouse) -> std::io::Result<Ending> {
    let operated = Arc::new(Operated { house: house.clone(), stop: Arc::default() });
    let mut signals = Signals::listen()?;
    let mut events = house.events();
    let _admin = open_admin(&operated);
    let notify = Notify::start(operated.clone(), Service::from_env());
    loop {
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::Reload => {
                    notify.reloading();
                    reload(&house).await;
                    notify.reloaded();
                }
                Asked::Drain => break,
                Asked::Now => {
                    house.stop().await;
                    return Ok(Ending::Asked);
                }
            },
            () = operated.stop.notified() => break,
            event = events.recv() => if let Ok(HouseEvent::GaveUp { reason }) = event {
                tracing::error!(reason, "the supervisor gives up");
                house.stop().await;
                return Ok(Ending::GaveUp(reason));
            },
            () = house.ended() => return Ok(Ending::GaveUp("the supervision tree ended".into())),
        }
    }
    notify.stopping();
    let deadline = house.config().host.drain;
    tracing::info!(?deadline, "no new requests; open streams may finish");
    tokio::select! {
        ended = house.drain(deadline) => if ended > 0 {
            tracing::warn!(streams = ended, "the time for open streams was up");
        },
        () = second(&mut signals) => tracing::warn!("asked again: open streams end now"),
    }
    house.stop().await;
    Ok(Ending::Asked)
}

/// Waits for a second signal to stop.
async fn second(signals: &mut Signals) {
    while signals.next().await == Asked::Reload {}
}

async fn reload(house: &Playhouse) {
    match house.reload_file(false).await {
        Ok(Reloaded { applied, restart_needed, .. }) => {
            let (kept, started, stopped) = (applied.kept.len(), applied.started.len(), applied.stopped.len());
            tracing::info!(kept, started, stopped, ?restart_needed, "the configuration was read again");
        }
        Err(error) => tracing::error!("the configuration is not taken over, everything goes on as it was: {error}"),
    }
}

/// The admin socket. A host can do without: the reason is in the log.
fn open_admin(operated: &Arc<Operated>) -> Option<AdminServer> {
    let path = operated.house.config().host.admin_socket;
    let path: PathBuf = path.unwrap_or_else(|| usual_path(&admin::path::Surroundings::of_process()));
    match AdminServer::open(&path, operated.clone(), Options::default()) {
        Ok(server) => {
            tracing::info!(path = %path.display(), "the admin socket answers");
            Some(server)
        }
        Err(error) => {
            tracing::error!("there is no admin socket, the host goes on without: {error}");
            None
        }
    }
}

impl admin::House for Operated {
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
        self.house.reload_file(dry_run).await.map_err(|error| {
            let kind = match &error {
                ReloadError::NoFile => FailureKind::NotPossible,
                ReloadError::Config(_) => FailureKind::BadConfig,
                ReloadError::Plan(_) => FailureKind::DoesNotFit,
                ReloadError::Ended => return Failure::ended(),
            };
            Failure::new(kind, chain(&error))
        })
    }

    async fn restart(&self, target: &str) -> Result<Restarted, Failure> {
        let restarted = self.house.restart(target).await;
        restarted.map_err(|error: NoSuchTarget| Failure::new(FailureKind::NoSuchTarget, error.to_string()))
    }

    async fn drain(&self, deadline: Option<Duration>) -> u32 {
        self.house.drain(deadline.unwrap_or(self.house.config().host.drain)).await
    }

    fn stop(&self) {
        self.stop.notify_one();
    }
}
