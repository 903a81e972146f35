//! A house that runs until it is told to stop: what `playhouse serve` does after it was opened.
//!
//! ```text
//! [Running] --SIGHUP, reload--> [Running]            the reload goes on beside: see `reloads`
//!     |--SIGTERM, SIGINT, stop--> [Draining] --streams finished, or the time is up, or a second signal--> Asked
//!     \--the supervisor gives up--> GaveUp
//! ```

use super::admin::{self, AdminServer, Failure, FailureKind, Options, Reloaded, Restarted, usual_path};
use super::notify::{Notify, Service};
use super::reloads::{self, Reloads};
use super::signals::{Asked, Signals};
use super::{NoSuchTarget, Playhouse};
use playhouse_actors::inventory::Device;
use playhouse_actors::{Drained, EventLog, HouseEvent, HouseStatus};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify as Bell, mpsc, oneshot};

/// Reloads that may be asked for and not be looked at yet; more than the admin socket has clients.
const ASKED_MAX: usize = 64;

/// How a house's run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// It was asked to stop, and did.
    Asked,
    /// The supervisor gave up: nothing is left that could serve.
    GaveUp(String),
}

/// A house with what an operator does to it.
#[derive(Debug)]
pub struct Operated {
    house: Playhouse,
    /// Rung when the admin socket asks to stop.
    stop: Bell,
    /// Reloads that the admin socket asks for.
    reloads: mpsc::Sender<reloads::Reply>,
    /// There is no way back.
    stopping: AtomicBool,
}

/// Runs `house` until it is told to stop.
///
/// # Errors
/// If the system gives no signals.
pub async fn run(house: Playhouse) -> std::io::Result<Ending> {
    let (asking, mut asked_for) = mpsc::channel(ASKED_MAX);
    let (stop, stopping) = (Bell::new(), AtomicBool::new(false));
    let operated = Arc::new(Operated { house: house.clone(), stop, reloads: asking, stopping });
    let mut signals = Signals::listen()?;
    let mut events = house.events();
    let _admin = open_admin(&operated);
    let notify = Notify::start(operated.clone(), Service::from_env());
    let mut reloads = Reloads::of(house.clone());
    // It may have happened before anybody listened.
    let mut reason = gave_up(house.tree().log());
    let is_now = loop {
        if let Some(reason) = reason.take() {
            tracing::error!(reason, "the supervisor gives up");
            house.stop().await;
            return Ok(Ending::GaveUp(reason));
        }
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::Reload => reloads.ask(None, &notify),
                Asked::Drain => break false,
                Asked::Now => break true,
            },
            () = operated.stop.notified() => break false,
            Some(reply) = asked_for.recv() => reloads.ask(Some(reply), &notify),
            outcome = reloads.over() => reloads.finish(&outcome, &notify),
            event = events.recv() => reason = match event {
                Ok(HouseEvent::GaveUp { reason }) => Some(reason),
                Err(RecvError::Lagged(_)) => gave_up(house.tree().log()),
                Ok(_) | Err(RecvError::Closed) => None,
            },
            () = house.ended() => {
                let told = gave_up(house.tree().log());
                reason = Some(told.unwrap_or_else(|| "the supervision tree ended".into()));
            }
        }
    };
    operated.stopping.store(true, Ordering::Relaxed);
    drop(asked_for);
    reloads.give_up();
    notify.stopping();
    if !is_now {
        drain(&house, &mut signals).await;
    }
    house.stop().await;
    Ok(Ending::Asked)
}

/// Why the supervisor has given up, if it has and no device was taken back since.
fn gave_up(log: &EventLog) -> Option<String> {
    let last = log.recent().into_iter().rev().find_map(|stamped| match stamped.event {
        HouseEvent::GaveUp { reason } => Some(Some(reason)),
        HouseEvent::Released { .. } => Some(None),
        _ => None,
    });
    last.flatten()
}

/// Lets open streams finish, until the time for that is up or a second signal comes.
async fn drain(house: &Playhouse, signals: &mut Signals) {
    let deadline = house.config().host.drain;
    tracing::info!(?deadline, "no new requests; open streams may finish");
    tokio::select! {
        drained = house.drain(deadline) => if let Drained::Empty { ended: ended @ 1.. } = drained {
            tracing::warn!(streams = ended, "the time for open streams was up");
        },
        () = second(signals) => tracing::warn!("asked again: open streams end now"),
    }
}

/// Waits for a second signal to stop.
async fn second(signals: &mut Signals) {
    while signals.next().await == Asked::Reload {}
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

    fn log(&self) -> &EventLog {
        self.house.tree().log()
    }

    async fn reload(&self, dry_run: bool) -> Result<Reloaded, Failure> {
        if dry_run {
            // Changes nothing, so nobody is told.
            return self.house.reload_file(true).await.map_err(|error| reloads::failure(&error));
        }
        let (reply, outcome) = oneshot::channel();
        self.reloads.send(reply).await.map_err(|_| Failure::stopping())?;
        // What was asked for and not looked at yet goes when the house stops, and when it ends.
        outcome.await.unwrap_or_else(|_| Err(unanswered(self.stopping.load(Ordering::Relaxed))))
    }

    async fn restart(&self, target: &str) -> Result<Restarted, Failure> {
        let restarted = self.house.restart(target).await;
        restarted.map_err(|error: NoSuchTarget| Failure::new(FailureKind::NoSuchTarget, error.to_string()))
    }

    async fn drain(&self, deadline: Option<Duration>) -> Drained {
        self.house.drain(deadline.unwrap_or(self.house.config().host.drain)).await
    }

    async fn undrain(&self) -> Result<bool, Failure> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Failure::stopping());
        }
        Ok(self.house.undrain().await)
    }

    fn stop(&self) {
        self.stop.notify_one();
    }
}

/// Why nobody answered.
fn unanswered(stopping: bool) -> Failure {
    if stopping { Failure::stopping() } else { Failure::ended() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::inventory::DeviceId;
    use playhouse_actors::messages::ReplicaId;

    #[test]
    fn who_is_not_answered_hears_whether_the_host_was_told_to_stop() {
        assert_eq!(unanswered(true).to_string(), "the host is stopping");
        assert_eq!(unanswered(false).to_string(), "the supervision tree has ended");
    }

    #[test]
    fn what_was_told_before_anybody_listened_is_in_the_log() {
        let log = EventLog::new();
        assert_eq!(gave_up(&log), None);
        log.add(HouseEvent::GaveUp { reason: "every device is quarantined".into() });
        log.add(HouseEvent::ModelFailed {
            replica: ReplicaId { model: "m".into(), index: 0 },
            reason: "unrelated".into(),
        });
        assert_eq!(gave_up(&log).as_deref(), Some("every device is quarantined"));
        log.add(HouseEvent::Released { device: DeviceId::gpu("GPU-a") });
        assert_eq!(gave_up(&log), None, "it serves again");
    }
}
