//! A house for tests of the admin socket and of the commands that use it: it answers what it was told to, and writes down
//! what it was asked.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use playhouse::host::admin::{Failure, FailureKind, House, Reloaded, Restarted};
use playhouse_actors::engine::EngineStats;
use playhouse_actors::house::Applied;
use playhouse_actors::inventory::{Device, DeviceId};
use playhouse_actors::messages::{
    DeviceStatus, Phase, ReplicaId, ReplicaStatus, RequestCounters, RouterStatus, ServiceStatus,
};
use playhouse_actors::policy::ladder::RungCounts;
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_actors::policy::placement::{DevicePlan, Placement, Plan};
use playhouse_actors::{Drained, EventLog, HouseEvent, HouseStatus};
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

/// What the reload of a [`FakeHouse`] says of a bad file.
pub(crate) const BAD_CONFIG: &str = "error: unknown key `adress` in [host]\n --> house.toml:2:1";

pub(crate) struct FakeHouse {
    pub(crate) status: Mutex<Option<HouseStatus>>,
    pub(crate) log: EventLog,
    /// What it was asked, in order.
    pub(crate) asked: Mutex<Vec<String>>,
    /// Whether the configuration file is bad.
    pub(crate) bad_config: bool,
    /// A drain ends when there is a permit.
    pub(crate) drained: Semaphore,
    /// Rung by an undrain.
    pub(crate) undrained: Notify,
}

impl FakeHouse {
    pub(crate) fn new() -> Self {
        Self {
            status: Mutex::new(Some(status())),
            log: EventLog::new(),
            asked: Mutex::default(),
            bad_config: false,
            drained: Semaphore::new(1),
            undrained: Notify::new(),
        }
    }

    pub(crate) fn tell(&self, event: HouseEvent) {
        self.log.add(event);
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no panics").clone()
    }

    fn note(&self, what: String) {
        self.asked.lock().expect("no panics").push(what);
    }
}

impl House for FakeHouse {
    async fn status(&self) -> Option<HouseStatus> {
        self.status.lock().expect("no panics").clone()
    }

    async fn devices(&self) -> Vec<Device> {
        devices()
    }

    fn log(&self) -> &EventLog {
        &self.log
    }

    async fn reload(&self, dry_run: bool) -> Result<Reloaded, Failure> {
        self.note(format!("reload dry_run={dry_run}"));
        if self.bad_config {
            return Err(Failure::new(FailureKind::BadConfig, BAD_CONFIG));
        }
        Ok(reloaded())
    }

    async fn restart(&self, target: &str) -> Result<Restarted, Failure> {
        self.note(format!("restart {target}"));
        match target {
            "qwen" => Ok(Restarted::Model { model: "qwen".into(), replicas: 2 }),
            "GPU-5d5b0001" => Ok(Restarted::Device { device: DeviceId::gpu(target) }),
            _ => Err(Failure::new(FailureKind::NoSuchTarget, format!("no model or device `{target}`"))),
        }
    }

    async fn drain(&self, deadline: Option<Duration>) -> Drained {
        self.note(format!("drain {deadline:?}"));
        tokio::select! {
            permit = self.drained.acquire() => {
                permit.expect("never closed").forget();
                Drained::Empty { ended: 3 }
            }
            () = self.undrained.notified() => Drained::Undone,
        }
    }

    async fn undrain(&self) -> Result<bool, Failure> {
        self.note("undrain".into());
        // Kept for a drain that does not wait yet.
        self.undrained.notify_one();
        Ok(true)
    }

    fn stop(&self) {
        self.note("stop".into());
    }
}

pub(crate) fn devices() -> Vec<Device> {
    let device = |index: u64, used_gib: u64| Device {
        uuid: format!("GPU-5d5b000{index}"),
        pci_bus_id: Some(format!("00000000:{index}B:00.0")),
        name: "NVIDIA H200".into(),
        total_bytes: 140 << 30,
        used_bytes: used_gib << 30,
        free_bytes: (140 - used_gib) << 30,
        utilization_percent: Some(93),
        temperature_c: Some(61),
        power_mw: Some(512_400),
        power_limit_mw: Some(700_000),
        ..Device::default()
    };
    vec![device(0, 21), device(1, 0)]
}

fn replica(model: &str, index: u32, device: u32, phase: Phase) -> ReplicaStatus {
    ReplicaStatus {
        replica: ReplicaId { model: model.into(), index },
        device: DeviceId::gpu(format!("GPU-5d5b000{device}")),
        phase,
        incarnation: 1,
        pid: None,
        progress: None,
        running: 0,
        kv_bytes: 8 << 30,
        last_heard: None,
        step_age: None,
        stats: None,
        last_end: None,
    }
}

pub(crate) fn status() -> HouseStatus {
    let ready = ReplicaStatus {
        incarnation: 3,
        pid: Some(4242),
        running: 5,
        last_heard: Some(Duration::from_millis(400)),
        step_age: Some(Duration::from_millis(12)),
        stats: Some(EngineStats {
            running: 5,
            waiting: 2,
            kv_blocks_used: 250,
            kv_blocks_total: 1000,
            decode_tokens: 10_000,
            ..EngineStats::default()
        }),
        last_end: Some(WorkerEnd::Signalled(9)),
        ..replica("qwen", 0, 0, Phase::Ready)
    };
    let service = |model: &str, ready, replicas, required| ServiceStatus {
        model: model.into(),
        ready,
        replicas,
        open_requests: 7,
        open_tokens: 900,
        waiting: 2,
        tokens_per_second: Some(1234.5),
        required,
    };
    HouseStatus {
        devices: vec![
            DeviceStatus {
                device: DeviceId::gpu("GPU-5d5b0000"),
                quarantined: None,
                recent_failures: 1,
                failures: 2,
                oom: RungCounts { refuse: 3, shrink_kv: 1, ..RungCounts::default() },
                replicas: vec![ready, replica("phi", 0, 0, Phase::Loading)],
            },
            DeviceStatus {
                device: DeviceId::gpu("GPU-5d5b0001"),
                quarantined: Some("Xid(79)".into()),
                recent_failures: 0,
                failures: 0,
                oom: RungCounts::default(),
                replicas: vec![replica("qwen", 1, 1, Phase::Quarantined)],
            },
        ],
        router: Some(RouterStatus {
            services: vec![service("phi", 0, 1, false), service("qwen", 1, 2, true)],
            requests: RequestCounters { accepted: 100, completed: 90, resumed: 4, ..RequestCounters::default() },
            draining: false,
        }),
        uptime: Duration::from_secs(3 * 3600 + 62),
    }
}

fn reloaded() -> Reloaded {
    let replica = |model: &str, index| ReplicaId { model: model.into(), index };
    let placement = Placement {
        model: "qwen".into(),
        replica: 0,
        weights_bytes: 1 << 30,
        kv_bytes: 8 << 30,
        scratch_bytes: 1 << 28,
        context_bytes: 1 << 29,
        limit_bytes: None,
        kv_min_bytes: 1 << 28,
    };
    let device = DevicePlan {
        device: DeviceId::gpu("GPU-5d5b0000"),
        name: "NVIDIA H200".into(),
        total_bytes: 140 << 30,
        foreign_bytes: 0,
        placements: vec![placement],
        headroom_bytes: 100 << 30,
    };
    Reloaded {
        applied: Applied {
            kept: vec![replica("qwen", 0), replica("qwen", 1)],
            started: vec![replica("llama", 0)],
            stopped: vec![replica("phi", 0)],
        },
        plan: Plan { devices: vec![device] },
        restart_needed: vec!["host.address".into()],
    }
}
