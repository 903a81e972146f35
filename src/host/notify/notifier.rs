//! What a service manager is told, from what is seen of the house. Pure: no clock, no socket.

use playhouse_actors::HouseStatus;
use playhouse_actors::engine::LoadPhase;
use playhouse_actors::messages::{Phase, ReplicaStatus, ServiceStatus};
use std::time::Duration;

/// How much longer than now a load, reload or drain may take; told again at every look.
const EXTENSION: Duration = Duration::from_secs(30);

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
}
