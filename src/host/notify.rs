//! Tells a service manager how the host is (`sd_notify`, systemd's `Type=notify-reload`).
//!
//! | what is seen | what is told |
//! |---|---|
//! | every required model is ready, for the first time | `READY=1` |
//! | something loads, is reloaded or drained | `EXTEND_TIMEOUT_USEC=`, again and again |
//! | the state in words changes | `STATUS=` |
//! | a reload begins, ends | `RELOADING=1` with `MONOTONIC_USEC=`, `READY=1` |
//! | the host is told to stop | `STOPPING=1` |
//! | the supervisor answers a status call in time | `WATCHDOG=1` |
//!
//! A supervisor that does not answer is told nothing of: then the service manager's watchdog ends the host. [`Notifier`]
//! decides and knows no clock and no socket; [`Service`] sends; [`Notify`] is what the host holds.

mod notifier;
mod service;

pub use notifier::{Notifier, Seen, Tell};
pub use service::Service;

use super::admin::House;
use service::message;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

/// How often the house is looked at, if the watchdog does not ask for more.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// For the supervisor to answer, if there is no watchdog.
const PATIENCE: Duration = Duration::from_secs(20);

/// For the service manager to take a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Changes of the host's life that wait to be told.
const CHANGES_MAX: usize = 64;

/// A change of the host's life.
#[derive(Debug, Clone, Copy)]
enum Change {
    Reloading,
    Reloaded,
    Stopping,
}

/// What the host holds: it looks at the house and tells the service manager until it is dropped. Without a service manager
/// it does nothing.
#[derive(Debug)]
pub struct Notify {
    changes: Option<mpsc::Sender<Change>>,
}

impl Notify {
    /// Begins, within a runtime. A service manager that cannot be reached is a warning in the log.
    pub fn start<H: House>(house: Arc<H>, service: Option<Service>) -> Self {
        let Some(service) = service else { return Self { changes: None } };
        match service.connect() {
            Ok(socket) => {
                let (changes, received) = mpsc::channel(CHANGES_MAX);
                tokio::spawn(tell_until_dropped(house, socket, service.watchdog, received));
                Self { changes: Some(changes) }
            }
            Err(error) => {
                tracing::warn!(%error, socket = ?service.socket, "the service manager cannot be reached");
                Self { changes: None }
            }
        }
    }

    /// A reload begins.
    pub fn reloading(&self) {
        self.tell(Change::Reloading);
    }

    /// It is over, well or not.
    pub fn reloaded(&self) {
        self.tell(Change::Reloaded);
    }

    /// The host was told to stop. It is told on what is left until this is dropped.
    pub fn stopping(&self) {
        self.tell(Change::Stopping);
    }

    fn tell(&self, change: Change) {
        if let Some(changes) = &self.changes {
            // Full only if the service manager takes nothing: then it would not take this either.
            let _ = changes.try_send(change);
        }
    }
}

async fn tell_until_dropped<H: House>(
    house: Arc<H>,
    socket: UnixDatagram,
    watchdog: Option<Duration>,
    mut changes: mpsc::Receiver<Change>,
) {
    let mut notifier = Notifier::new(watchdog.is_some());
    // Often enough that one look may fail.
    let every = watchdog.map_or(LOOK_EVERY, |interval| (interval / 4).clamp(Duration::from_millis(10), LOOK_EVERY));
    let patience = watchdog.map_or(PATIENCE, |interval| interval / 2);
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let look = async {
            ticks.tick().await;
            timeout(patience, house.status()).await.ok().flatten()
        };
        let tell = tokio::select! {
            biased;
            change = changes.recv() => match change {
                Some(Change::Reloading) => notifier.see(Seen::Reloading),
                Some(Change::Reloaded) => notifier.see(Seen::Reloaded),
                Some(Change::Stopping) => notifier.see(Seen::Stopping),
                None => return,
            },
            status = look => notifier.see(status.as_ref().map_or(Seen::Silent, Seen::Status)),
        };
        if let Err(error) = send(&socket, &tell).await {
            tracing::warn!(%error, ?tell, "the service manager was not told");
        }
    }
}

async fn send(socket: &UnixDatagram, tell: &[Tell]) -> io::Result<()> {
    if tell.is_empty() {
        return Ok(());
    }
    let message = message(tell)?;
    match timeout(SEND_TIMEOUT, socket.send(message.as_bytes())).await {
        Ok(sent) => sent.map(drop),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}
