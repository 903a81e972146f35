//! What is to be seen, as texts and shares: everything is decided here, and [`super::draw`] only puts it in its place.

use std::cmp::Reverse;

use playhouse_actors::inventory::Device;
use playhouse_actors::messages::{DeviceStatus, Phase, ReplicaStatus, RouterStatus};

use super::sample::Sample;
use crate::cli::show;

/// What the keys say.
#[derive(Debug, Clone)]
pub(super) struct Controls {
    pub(super) sort: Sort,
    pub(super) paused: bool,
    pub(super) help: bool,
    pub(super) selected: usize,
    pub(super) color: bool,
}

impl Controls {
    pub(super) fn new(color: bool) -> Self {
        Self { sort: Sort::Device, paused: false, help: false, selected: 0, color }
    }
}

/// By what replicas are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Device,
    Model,
    Speed,
    Kv,
    Restarts,
}

impl Sort {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Device => Self::Model,
            Self::Model => Self::Speed,
            Self::Speed => Self::Kv,
            Self::Kv => Self::Restarts,
            Self::Restarts => Self::Device,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Model => "model",
            Self::Speed => "tokens/s",
            Self::Kv => "KV",
            Self::Restarts => "restarts",
        }
    }
}

/// How well something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    Plain,
    Good,
    Busy,
    Bad,
}

/// A bar: a share of 0 to 100, and the text on its right end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) percent: u64,
    pub(super) label: String,
}

/// A row of the table of devices.
#[derive(Debug, Clone)]
pub(super) struct DeviceRow {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) vram: Option<Bar>,
    pub(super) utilization: String,
    pub(super) temperature: String,
    pub(super) power: String,
    /// Why it was given up, if so; shown in the place of name and memory.
    pub(super) quarantined: Option<String>,
}

/// A row of the table of replicas.
#[derive(Debug, Clone)]
pub(super) struct ReplicaRow {
    pub(super) replica: String,
    pub(super) device: String,
    pub(super) phase: String,
    pub(super) mood: Mood,
    pub(super) running: String,
    pub(super) waiting: String,
    pub(super) speed: Option<f64>,
    pub(super) kv: Option<Bar>,
    pub(super) restarts: u64,
    pub(super) step: String,
}

/// Everything that is to be seen.
#[derive(Debug, Clone)]
pub(super) struct Screen {
    pub(super) headline: String,
    pub(super) headline_mood: Mood,
    pub(super) summary: String,
    pub(super) devices: Vec<DeviceRow>,
    pub(super) replicas: Vec<ReplicaRow>,
    /// Newest first.
    pub(super) events: Vec<String>,
    pub(super) footer: String,
    pub(super) help: bool,
    pub(super) selected: usize,
    pub(super) color: bool,
}

impl Screen {
    /// What is to be seen of `newest`; speeds since `oldest`.
    pub(super) fn new(oldest: &Sample, newest: &Sample, controls: &Controls, error: Option<&str>) -> Self {
        let (headline, headline_mood) = headline(newest, error);
        let mut replicas: Vec<ReplicaRow> =
            newest.house.replicas().map(|replica| replica_row(oldest, newest, replica)).collect();
        sort(&mut replicas, controls.sort);
        // Not `sum`: that of nothing is -0.
        let speed = replicas.iter().filter_map(|row| row.speed).fold(0.0, |sum, speed| sum + speed);
        let events = newest.events.iter().rev();
        let paused = if controls.paused { "   PAUSED" } else { "" };
        Self {
            headline,
            headline_mood,
            summary: summary(newest.house.router.as_ref(), speed),
            devices: newest.house.devices.iter().map(|status| device_row(status, &newest.devices)).collect(),
            replicas,
            events: events
                .map(|stamped| format!("{} {}", show::time_of_day(stamped.unix_ms), show::event(&stamped.event)))
                .collect(),
            footer: format!("q quit  ↑↓ move  s sort: {}  p pause  ? help{paused}", controls.sort.name()),
            help: controls.help,
            selected: controls.selected,
            color: controls.color,
        }
    }
}

fn headline(sample: &Sample, error: Option<&str>) -> (String, Mood) {
    if let Some(error) = error {
        let first = error.lines().next().unwrap_or_default();
        return (first.strip_prefix("error: ").unwrap_or(first).to_owned(), Mood::Bad);
    }
    let (host, house) = (&sample.host, &sample.house);
    let (state, mood) = match &house.router {
        _ if house.is_ready() => ("ready", Mood::Good),
        Some(router) if router.draining => ("draining", Mood::Busy),
        _ => ("not ready", Mood::Bad),
    };
    let uptime = show::time(house.uptime);
    (format!("playhouse {}  process {}  up {uptime}  {state}", host.version, host.pid), mood)
}

fn summary(router: Option<&RouterStatus>, speed: f64) -> String {
    let Some(router) = router else { return "the router is being restarted".to_owned() };
    let sum = |read: fn(&playhouse_actors::messages::ServiceStatus) -> u32| -> u64 {
        router.services.iter().map(|service| u64::from(read(service))).sum()
    };
    let (open, waiting) = (sum(|service| service.open_requests), sum(|service| service.waiting));
    let counters = &router.requests;
    format!(
        "{open} open, {waiting} queued, {speed:.0} tok/s; {} done, {} failed, {} refused, {} resumed",
        counters.completed, counters.failed, counters.refused, counters.resumed
    )
}

fn device_row(status: &DeviceStatus, devices: &[Device]) -> DeviceRow {
    let known = devices.iter().find(|device| device.uuid == status.device.as_str());
    let number = |read: fn(&Device) -> Option<String>| known.and_then(read).unwrap_or_else(|| "-".to_owned());
    let vram = known.filter(|device| device.total_bytes > 0).map(|device| Bar {
        percent: show::percent(device.used_bytes, device.total_bytes),
        label: format!("{}/{}", show::gib(device.used_bytes), show::gib(device.total_bytes)),
    });
    DeviceRow {
        id: status.device.to_string(),
        name: known.map_or("-".to_owned(), |device| device.name.clone()),
        vram,
        utilization: number(|device| device.utilization_percent.map(|percent| format!("{percent}%"))),
        temperature: number(|device| device.temperature_c.map(|celsius| format!("{celsius}C"))),
        power: number(|device| device.power_mw.map(|milliwatts| format!("{}W", milliwatts / 1000))),
        quarantined: status.quarantined.as_ref().map(|reason| format!("QUARANTINED: {reason}")),
    }
}

fn replica_row(oldest: &Sample, newest: &Sample, replica: &ReplicaStatus) -> ReplicaRow {
    let mood = match replica.phase {
        Phase::Ready => Mood::Good,
        Phase::Waiting | Phase::Loading | Phase::Stopping | Phase::Backoff => Mood::Busy,
        Phase::Down | Phase::Quarantined | Phase::Failed => Mood::Bad,
        Phase::Stopped => Mood::Plain,
    };
    let stats = replica.stats.as_ref();
    ReplicaRow {
        replica: replica.replica.to_string(),
        device: replica.device.to_string(),
        phase: show::phase_and_progress(replica),
        mood,
        running: replica.running.to_string(),
        waiting: stats.map_or("-".to_owned(), |stats| stats.waiting.to_string()),
        speed: speed(oldest, newest, replica),
        kv: stats.filter(|stats| stats.kv_blocks_total > 0).map(|stats| {
            let percent = show::kv_percent(stats);
            Bar { percent, label: format!("{percent}%") }
        }),
        restarts: show::restarts(replica),
        step: show::step(replica),
    }
}

/// Tokens that the replica's worker emitted between the two looks, per second. Nothing if it is another worker, or another
/// host, or the same look.
fn speed(oldest: &Sample, newest: &Sample, replica: &ReplicaStatus) -> Option<f64> {
    let before = oldest.house.replicas().find(|before| before.replica == replica.replica)?;
    let same = before.incarnation == replica.incarnation && oldest.host.pid == newest.host.pid;
    let elapsed = newest.house.uptime.checked_sub(oldest.house.uptime)?.as_secs_f64();
    let tokens = replica.stats?.decode_tokens.checked_sub(before.stats?.decode_tokens)?;
    (same && elapsed > 0.0).then(|| tokens as f64 / elapsed)
}

fn sort(rows: &mut [ReplicaRow], by: Sort) {
    let hundredths = |row: &ReplicaRow| row.speed.map(|speed| (speed * 100.0) as u64);
    match by {
        // As the host gives them.
        Sort::Device => {}
        Sort::Model => rows.sort_by(|a, b| a.replica.cmp(&b.replica)),
        Sort::Speed => rows.sort_by_key(|row| Reverse(hundredths(row))),
        Sort::Kv => rows.sort_by_key(|row| Reverse(row.kv.as_ref().map(|bar| bar.percent))),
        Sort::Restarts => rows.sort_by_key(|row| Reverse(row.restarts)),
    }
}
