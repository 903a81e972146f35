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

use super::admin::House;
use playhouse_actors::HouseStatus;
use playhouse_actors::engine::LoadPhase;
use playhouse_actors::messages::{Phase, ReplicaStatus, ServiceStatus};
use sd_notify::NotifyState;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

/// How often the house is looked at, if the watchdog does not ask for more.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How much longer than now a load, reload or drain may take; told again at every look.
const EXTENSION: Duration = Duration::from_secs(30);

/// For the supervisor to answer, if there is no watchdog.
const PATIENCE: Duration = Duration::from_secs(20);

/// For the service manager to take a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Changes of the host's life that wait to be told.
const CHANGES_MAX: usize = 64;

/// Models named in the status.
const MODELS_MAX: usize = 8;

/// What was seen.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen<'a> {
    /// The supervisor says how everything is.
    Status(&'a HouseStatus),
    /// The supervisor did not answer in time, or has ended.
    Silent,
    /// A reload begins.
    Reloading,
    /// It is over, well or not.
    Reloaded,
    /// The host was told to stop.
    Stopping,
}

/// What is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tell {
    /// The start, or a reload, is complete.
    Ready,
    /// A reload begins.
    Reloading,
    /// The host stops.
    Stopping,
    /// The state in words.
    Status(String),
    /// It may take so much longer from now on.
    ExtendTimeout(Duration),
    /// The supervisor is alive.
    Watchdog,
}

/// Decides what to tell.
///
/// ```text
/// [Starting] --ready--> [Running] --Reloading--> [Reloading] --Reloaded--> [Running]
///      \--------------------+-----------Stopping------+--> [Stopping]
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notifier {
    phase: HostPhase,
    watchdog: bool,
    status: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HostPhase {
    Starting,
    Running,
    Reloading,
    Stopping,
}

impl Notifier {
    /// For a host that starts; `watchdog` if the service manager waits for signs of life.
    pub fn new(watchdog: bool) -> Self {
        Self { phase: HostPhase::Starting, watchdog, status: String::new() }
    }

    /// What follows from what was seen.
    pub fn see(&mut self, seen: Seen<'_>) -> Vec<Tell> {
        match (seen, self.phase) {
            (Seen::Status(house), _) => self.looked(house),
            (Seen::Silent, _) => Vec::new(),
            (Seen::Reloading, HostPhase::Running) => {
                self.phase = HostPhase::Reloading;
                vec![Tell::Reloading]
            }
            (Seen::Reloaded, HostPhase::Reloading) => {
                self.phase = HostPhase::Running;
                vec![Tell::Ready]
            }
            // A reload while the host starts is part of the start, and a host that stops only stops.
            (Seen::Reloading | Seen::Reloaded, _) => Vec::new(),
            (Seen::Stopping, HostPhase::Stopping) => Vec::new(),
            (Seen::Stopping, _) => {
                self.phase = HostPhase::Stopping;
                vec![Tell::Stopping]
            }
        }
    }

    fn looked(&mut self, house: &HouseStatus) -> Vec<Tell> {
        let mut tell = Vec::new();
        if self.phase == HostPhase::Starting && house.is_ready() {
            self.phase = HostPhase::Running;
            tell.push(Tell::Ready);
        }
        if self.needs_time(house) {
            tell.push(Tell::ExtendTimeout(EXTENSION));
        }
        let status = describe(house);
        if status != self.status {
            self.status.clone_from(&status);
            tell.push(Tell::Status(status));
        }
        if self.watchdog {
            tell.push(Tell::Watchdog);
        }
        tell
    }

    /// Whether the service manager is waiting, and there is something to wait for.
    fn needs_time(&self, house: &HouseStatus) -> bool {
        match self.phase {
            HostPhase::Running => false,
            HostPhase::Reloading => true,
            HostPhase::Starting => house.replicas().any(|replica| is_coming(replica.phase)),
            // The drain and the workers' shutdown have deadlines of their own.
            HostPhase::Stopping => house.replicas().any(|replica| replica.phase != Phase::Stopped),
        }
    }
}

/// Whether a replica is on its way to being ready.
fn is_coming(phase: Phase) -> bool {
    match phase {
        Phase::Waiting | Phase::Loading | Phase::Down | Phase::Backoff | Phase::Ready => true,
        Phase::Stopping | Phase::Quarantined | Phase::Failed | Phase::Stopped => false,
    }
}

/// The state in words: `not ready: phi 0/1 (weights 43%), qwen 2/2`.
fn describe(house: &HouseStatus) -> String {
    let Some(router) = &house.router else { return "the router is being restarted".to_owned() };
    let state = match () {
        () if router.draining => "draining",
        () if house.is_ready() => "ready",
        () => "not ready",
    };
    let mut models: Vec<String> =
        router.services.iter().take(MODELS_MAX).map(|service| describe_model(house, service)).collect();
    match router.services.len().saturating_sub(MODELS_MAX) {
        0 => {}
        more => models.push(format!("{more} more")),
    }
    format!("{state}: {}", models.join(", "))
}

fn describe_model(house: &HouseStatus, service: &ServiceStatus) -> String {
    let loading = house.replicas().filter(|replica| replica.replica.model == service.model).find_map(load);
    let loading = loading.map_or(String::new(), |load| format!(" ({load})"));
    format!("{} {}/{}{loading}", service.model, service.ready, service.replicas)
}

/// How far a load has come, in tenths: a finer number would be told at every look.
fn load(replica: &ReplicaStatus) -> Option<String> {
    let progress = replica.progress.as_ref().filter(|_| replica.phase == Phase::Loading)?;
    if progress.phase != LoadPhase::Weights {
        return Some("loading".to_owned());
    }
    let tenths = (u128::from(progress.bytes_done) * 10).checked_div(u128::from(progress.bytes_total)).unwrap_or(0);
    Some(format!("weights {}%", tenths * 10))
}

/// The service manager that started us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its socket, as `NOTIFY_SOCKET` names it: a path, or `@` and an abstract name.
    pub socket: OsString,
    /// It ends us when it hears nothing for so long.
    pub watchdog: Option<Duration>,
}

impl Service {
    /// From `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`; `None` where no service manager listens.
    pub fn from_env() -> Option<Self> {
        Self::from_variables(|name| std::env::var_os(name), std::process::id())
    }

    /// From these variables, for the process `pid`.
    pub fn from_variables(get: impl Fn(&str) -> Option<OsString>, pid: u32) -> Option<Self> {
        let number = |name: &str| get(name).and_then(|text| text.to_str()?.parse::<u64>().ok());
        let socket = get("NOTIFY_SOCKET").filter(|socket| !socket.is_empty())?;
        // Without a process id it is meant for whoever has the variable.
        let ours = get("WATCHDOG_PID").is_none() || number("WATCHDOG_PID") == Some(u64::from(pid));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(Duration::from_micros);
        Some(Self { socket, watchdog })
    }

    fn connect(&self) -> io::Result<UnixDatagram> {
        let address = address(&self.socket)?;
        let socket = std::os::unix::net::UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket)
    }
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "NOTIFY_SOCKET is neither a path nor an abstract name")),
    }
}

/// What is told at one time, as one message: systemd wants the time of a reload together with it.
fn message(tell: &[Tell]) -> io::Result<String> {
    let mut lines = Vec::new();
    for tell in tell {
        lines.push(match tell {
            Tell::Ready => NotifyState::Ready.to_string(),
            Tell::Reloading => format!("{}\n{}", NotifyState::Reloading, NotifyState::monotonic_usec_now()?),
            Tell::Stopping => NotifyState::Stopping.to_string(),
            // A line break would begin another variable.
            Tell::Status(text) => NotifyState::Status(&text.replace('\n', " ")).to_string(),
            Tell::ExtendTimeout(more) => {
                NotifyState::ExtendTimeoutUsec(u32::try_from(more.as_micros()).unwrap_or(u32::MAX)).to_string()
            }
            Tell::Watchdog => NotifyState::Watchdog.to_string(),
        });
    }
    Ok(lines.join("\n"))
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::engine::LoadProgress;
    use playhouse_actors::inventory::DeviceId;
    use playhouse_actors::messages::{DeviceStatus, ReplicaId, RequestCounters, RouterStatus};

    fn house(phase: Phase, ready: u32) -> HouseStatus {
        let progress = LoadProgress { phase: LoadPhase::Weights, bytes_done: 43, bytes_total: 100 };
        let replica = ReplicaStatus {
            replica: ReplicaId { model: "m".into(), index: 0 },
            device: DeviceId::cpu(),
            phase,
            incarnation: 1,
            pid: None,
            progress: Some(progress),
            running: 0,
            kv_bytes: 0,
            last_heard: None,
            step_age: None,
            stats: None,
            last_end: None,
        };
        let service = ServiceStatus {
            model: "m".into(),
            ready,
            replicas: 1,
            open_requests: 0,
            open_tokens: 0,
            waiting: 0,
            tokens_per_second: None,
            required: true,
        };
        HouseStatus {
            devices: vec![DeviceStatus {
                device: DeviceId::cpu(),
                quarantined: None,
                recent_failures: 0,
                failures: 0,
                oom: Default::default(),
                replicas: vec![replica],
            }],
            router: Some(RouterStatus {
                services: vec![service],
                requests: RequestCounters::default(),
                draining: false,
            }),
            uptime: Duration::ZERO,
        }
    }

    fn status(text: &str) -> Tell {
        Tell::Status(text.to_owned())
    }

    #[test]
    fn a_start_extends_its_time_while_it_loads_and_is_ready_once() {
        let mut notifier = Notifier::new(false);
        let (loading, ready) = (house(Phase::Loading, 0), house(Phase::Ready, 1));
        let more = Tell::ExtendTimeout(EXTENSION);
        assert_eq!(notifier.see(Seen::Status(&loading)), [more.clone(), status("not ready: m 0/1 (weights 40%)")]);
        assert_eq!(notifier.see(Seen::Status(&loading)), [more], "the words are told when they change");
        assert_eq!(notifier.see(Seen::Status(&ready)), [Tell::Ready, status("ready: m 1/1")]);
        assert_eq!(notifier.see(Seen::Status(&ready)), []);
        // A crash later is no new start.
        assert_eq!(notifier.see(Seen::Status(&house(Phase::Backoff, 0))), [status("not ready: m 0/1")]);
        assert_eq!(notifier.see(Seen::Status(&ready)), [status("ready: m 1/1")]);
    }

    #[test]
    fn a_start_without_hope_is_not_extended() {
        let mut notifier = Notifier::new(false);
        assert_eq!(notifier.see(Seen::Status(&house(Phase::Failed, 0))), [status("not ready: m 0/1")]);
    }

    #[test]
    fn a_reload_is_told_from_its_begin_to_its_end() {
        let mut notifier = Notifier::new(false);
        assert_eq!(notifier.see(Seen::Reloading), [], "part of the start");
        assert_eq!(notifier.see(Seen::Reloaded), []);
        let ready = house(Phase::Ready, 1);
        notifier.see(Seen::Status(&ready));
        assert_eq!(notifier.see(Seen::Reloading), [Tell::Reloading]);
        assert_eq!(notifier.see(Seen::Status(&ready)), [Tell::ExtendTimeout(EXTENSION)]);
        assert_eq!(notifier.see(Seen::Reloaded), [Tell::Ready]);
        assert_eq!(notifier.see(Seen::Stopping), [Tell::Stopping]);
        assert_eq!(notifier.see(Seen::Stopping), [], "once");
        assert_eq!(notifier.see(Seen::Reloading), [], "a host that stops only stops");
    }

    #[test]
    fn the_watchdog_is_fed_by_answers_alone() {
        let mut notifier = Notifier::new(true);
        let ready = house(Phase::Ready, 1);
        assert!(notifier.see(Seen::Status(&ready)).contains(&Tell::Watchdog));
        assert_eq!(notifier.see(Seen::Silent), []);
        assert_eq!(notifier.see(Seen::Reloading), [Tell::Reloading]);
        assert!(notifier.see(Seen::Status(&house(Phase::Down, 0))).contains(&Tell::Watchdog), "alive, if not well");
    }

    #[test]
    fn the_variables_are_read_as_systemd_writes_them() {
        let read = |variables: &[(&str, &str)]| {
            let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into());
            Service::from_variables(get, 42)
        };
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("NOTIFY_SOCKET", "")]), None);
        let plain = read(&[("NOTIFY_SOCKET", "/run/systemd/notify")]).expect("a service");
        assert_eq!(plain.watchdog, None);
        let usec = ("WATCHDOG_USEC", "3000000");
        let watched = |pid| read(&[("NOTIFY_SOCKET", "@n"), usec, ("WATCHDOG_PID", pid)]).expect("a service").watchdog;
        assert_eq!(watched("42"), Some(Duration::from_secs(3)));
        assert_eq!(watched("43"), None, "meant for another process");
        let without_pid = read(&[("NOTIFY_SOCKET", "@n"), usec]).expect("a service");
        assert_eq!(without_pid.watchdog, Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_message_is_a_line_per_variable() {
        let tell = [Tell::Ready, status("two\nlines"), Tell::ExtendTimeout(Duration::from_secs(30)), Tell::Watchdog];
        let text = message(&tell).expect("the clock works");
        assert_eq!(text, "READY=1\nSTATUS=two lines\nEXTEND_TIMEOUT_USEC=30000000\nWATCHDOG=1");
        let reload = message(&[Tell::Reloading]).expect("the clock works");
        assert!(reload.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reload}");
    }
}
