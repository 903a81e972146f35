//! `/metrics`: what was recorded, and what the house says now.

use super::super::error::ApiError;
use super::super::{App, BuildInfo};
use super::{Metrics, ModelLabels};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use playhouse_actors::HouseStatus;
use playhouse_actors::event_log::EventCounts;
use playhouse_actors::inventory::Device;
use playhouse_actors::messages::{ReplicaStatus, RouterStatus};
use playhouse_actors::policy::ladder::Rung;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeGaugeValue, EncodeLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::AtomicU64;

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The endpoint.
pub(in crate::http) async fn scrape(State(app): State<App>) -> Result<Response, ApiError> {
    let (status, devices) = tokio::join!(app.client.tree().status(), app.control.devices());
    let now = Snapshot::of(&app.build, status.as_ref(), &devices, app.control.events().counts());
    let text = text(&app.metrics, &now).map_err(|error| ApiError::internal(&error))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}

fn text(recorded: &Metrics, now: &Snapshot) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    encode_registry(&mut text, &recorded.registry)?;
    encode_registry(&mut text, &now.registry)?;
    encode_eof(&mut text)?;
    Ok(text)
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReplicaLabels {
    model: String,
    device: String,
    replica: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    model: String,
    device: String,
    replica: u32,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RestartLabels {
    model: String,
    device: String,
    replica: u32,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    device: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MemoryLabels {
    device: String,
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct XidLabels {
    device: String,
    xid: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RungLabels {
    device: String,
    rung: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    end: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: String,
    commit: String,
}

type Stats = playhouse_actors::engine::EngineStats;
/// A name, what it means, and how to read it.
type Measure<T, V> = (&'static str, &'static str, fn(&T) -> V);

/// A registry that lives for one scrape.
#[derive(Default)]
pub(super) struct Snapshot {
    pub(super) registry: Registry,
}

impl Snapshot {
    fn of(build: &BuildInfo, status: Option<&HouseStatus>, devices: &[Device], counts: EventCounts) -> Self {
        let mut now = Self::default();
        let build = BuildLabels { version: build.version.clone(), commit: build.commit.clone().unwrap_or_default() };
        now.gauges("playhouse_build_info", "What this program is; always 1", [(build, 1.0)]);
        if let Some(status) = status {
            now.replicas(status);
            now.engines(status);
            now.models(status);
            now.memory(status, devices);
            if let Some(router) = &status.router {
                now.router(router);
            }
        }
        now.devices(devices);
        now.events(counts);
        now
    }

    pub(super) fn gauges<L, V>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (L, V)>)
    where
        L: Clone + Debug + Eq + Hash + EncodeLabelSet + Send + Sync + 'static,
        V: Into<f64> + EncodeGaugeValue,
    {
        let family: Family<L, Gauge<f64, AtomicU64>> = Family::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(value.into());
        }
        self.registry.register(name, help, family);
    }

    pub(super) fn counters<L>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (L, u64)>)
    where
        L: Clone + Debug + Eq + Hash + EncodeLabelSet + Send + Sync + 'static,
    {
        let family: Family<L, Counter> = Family::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        self.registry.register(name, help, family);
    }

    fn router(&mut self, router: &RouterStatus) {
        let each = |value: fn(&playhouse_actors::messages::ServiceStatus) -> f64| {
            router.services.iter().map(move |service| (ModelLabels::of(&service.model), value(service)))
        };
        let help = "Tokens that open requests may still need";
        self.gauges("playhouse_queue_tokens", help, each(|s| s.open_tokens as f64).collect::<Vec<_>>());
        let help = "Measured speed of all replicas of a model";
        let speeds: Vec<_> = each(|s| s.tokens_per_second.unwrap_or(0.0)).collect();
        self.gauges("playhouse_tokens_per_second", help, speeds);
        self.gauges(
            "playhouse_replicas_ready",
            "Replicas that take requests",
            each(|s| f64::from(s.ready)).collect::<Vec<_>>(),
        );
        let counts = &router.requests;
        let ends = [
            ("accepted", counts.accepted),
            ("refused", counts.refused),
            ("completed", counts.completed),
            ("failed", counts.failed),
            ("cancelled", counts.cancelled),
            ("poisoned", counts.poisoned),
        ];
        let ends = ends.map(|(end, count)| (EndLabels { end }, count));
        self.counters("playhouse_requests", "Requests of the house by what became of them", ends);
        let resumed: Counter = Counter::default();
        resumed.inc_by(counts.resumed);
        let help = "Requests that went on elsewhere after the death of a worker";
        self.registry.register("playhouse_requests_resumed", help, resumed);
        let draining: Gauge = Gauge::default();
        draining.set(i64::from(router.draining));
        self.registry.register("playhouse_draining", "1 once new requests are refused", draining);
    }

    fn replicas(&mut self, status: &HouseStatus) {
        let help = "1 for the state that a replica is in";
        let state = |replica: &ReplicaStatus| {
            let ReplicaLabels { model, device, replica: index } = labels(replica);
            (PhaseLabels { model, device, replica: index, state: replica.phase.name() }, 1.0)
        };
        self.gauges("playhouse_replica_state", help, all(status).map(state));
        let help = "Workers started so far";
        self.counters("playhouse_workers_started", help, all(status).map(|r| (labels(r), r.incarnation)));
        let help = "Seconds since a replica's worker was last heard, or how long its step has taken if that is longer";
        let age = |r: &ReplicaStatus| {
            let age = r.last_heard.max(r.step_age)?;
            Some((labels(r), age.as_secs_f64()))
        };
        self.gauges("playhouse_last_step_age_seconds", help, all(status).filter_map(age));
        let help = "Failures of a device's workers";
        let failures = status.devices.iter().map(|d| (DeviceLabels { device: d.device.to_string() }, d.failures));
        self.counters("playhouse_device_failures", help, failures);
        let help = "1 for a device on which nothing is started any more";
        let given_up = |d: &playhouse_actors::messages::DeviceStatus| {
            (DeviceLabels { device: d.device.to_string() }, f64::from(u8::from(d.quarantined.is_some())))
        };
        self.gauges("playhouse_device_quarantined", help, status.devices.iter().map(given_up));
        let rungs = status.devices.iter().flat_map(|d| {
            let labels =
                |(rung, times): (Rung, u64)| (RungLabels { device: d.device.to_string(), rung: rung.name() }, times);
            d.oom.taken().map(labels)
        });
        self.counters("playhouse_oom_ladder", "What was given up because memory ran out", rungs);
    }

    /// What the engines count, by replica.
    fn engines(&mut self, status: &HouseStatus) {
        let with_stats = || all(status).filter_map(|r| Some((r, r.stats?)));
        let counters: [Measure<Stats, u64>; 6] = [
            ("steps", "Steps of an engine", |s| s.steps),
            ("prefill_tokens", "Prompt tokens computed", |s| s.prefill_tokens),
            ("decode_tokens", "Tokens emitted by an engine", |s| s.decode_tokens),
            ("preemptions", "Sequences sent back to the queue", |s| s.preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", |s| s.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", |s| s.prefix_hits),
        ];
        for (name, help, value) in counters {
            let each = with_stats().map(|(r, s)| (labels(r), value(&s)));
            self.counters(&format!("playhouse_engine_{name}"), help, each);
        }
        let gauges: [Measure<Stats, f64>; 4] = [
            ("sequences_running", "Sequences in an engine's running set", |s| f64::from(s.running)),
            ("sequences_waiting", "Sequences that wait in an engine", |s| f64::from(s.waiting)),
            ("kv_blocks_used", "KV blocks in use by sequences or the prefix cache", |s| f64::from(s.kv_blocks_used)),
            ("kv_blocks", "KV blocks", |s| f64::from(s.kv_blocks_total)),
        ];
        for (name, help, value) in gauges {
            let each = with_stats().map(|(r, s)| (labels(r), value(&s)));
            self.gauges(&format!("playhouse_engine_{name}"), help, each);
        }
    }

    /// Memory by kind: what our replicas say they hold, what is foreign, and what nobody accounts for.
    fn memory(&mut self, status: &HouseStatus, devices: &[Device]) {
        let kinds = super::super::status::memory_kinds(status, devices);
        let each = kinds.iter().flat_map(|memory| {
            let device = memory.device.clone();
            memory.kinds().map(move |(kind, bytes)| (MemoryLabels { device: device.clone(), kind }, bytes as f64))
        });
        self.gauges("playhouse_vram_bytes", "Memory of a device by kind", each.collect::<Vec<_>>());
        let each = kinds.iter().map(|m| (DeviceLabels { device: m.device.clone() }, m.unaccounted as f64));
        let help = "Memory in use on a device that neither our replicas nor other processes account for";
        self.gauges("playhouse_vram_unaccounted_bytes", help, each.collect::<Vec<_>>());
    }

    fn devices(&mut self, devices: &[Device]) {
        let gauges: [Measure<Device, Option<f64>>; 6] = [
            ("vram_total_bytes", "Memory of a device", |d| Some(d.total_bytes as f64)),
            ("vram_used_bytes", "Memory in use, by anybody", |d| Some(d.used_bytes as f64)),
            ("device_utilization_ratio", "Share of time in which a kernel ran, 0 to 1", |d| {
                d.utilization_percent.map(|percent| f64::from(percent) / 100.0)
            }),
            ("device_temperature_celsius", "Temperature", |d| d.temperature_c.map(f64::from)),
            ("device_power_watts", "Power drawn", |d| d.power_mw.map(|mw| f64::from(mw) / 1000.0)),
            ("device_ecc_uncorrected", "Memory errors that were not mended", |d| d.ecc.map(|e| e.uncorrected as f64)),
        ];
        for (name, help, value) in gauges {
            let each = devices.iter().filter_map(|d| Some((DeviceLabels { device: d.uuid.clone() }, value(d)?)));
            self.gauges(&format!("playhouse_{name}"), help, each);
        }
    }

    fn events(&mut self, counts: EventCounts) {
        let restarts = counts
            .restarts
            .into_iter()
            .map(|((model, replica, device, reason), count)| (RestartLabels { model, device, replica, reason }, count));
        let help = "Workers that ended without being asked to, by reason";
        self.counters("playhouse_actor_restarts", help, restarts);
        let xids = counts.xids.into_iter().map(|((device, xid), count)| (XidLabels { device, xid }, count));
        self.counters("playhouse_gpu_xid", "XIDs that the driver reported", xids);
        let given_up = counts.quarantines.into_iter().map(|(device, count)| (DeviceLabels { device }, count));
        self.counters("playhouse_device_quarantines", "Times that a device was given up", given_up);
        let failures: Counter = Counter::default();
        failures.inc_by(counts.actor_failures);
        self.registry.register("playhouse_actor_failures", "Actors that failed and were started again", failures);
    }
}

pub(super) fn all(status: &HouseStatus) -> impl Iterator<Item = &ReplicaStatus> {
    status.devices.iter().flat_map(|device| &device.replicas)
}

fn labels(replica: &ReplicaStatus) -> ReplicaLabels {
    let model = replica.replica.model.clone();
    ReplicaLabels { model, device: replica.device.to_string(), replica: replica.replica.index }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{End, Event, Outcome, Token};
    use playhouse_actors::engine::EngineStats;
    use playhouse_actors::inventory::{DeviceId, DeviceProcess, Ecc};
    use playhouse_actors::messages::{DeviceStatus, Phase, ReplicaId, RequestCounters, ServiceStatus};
    use playhouse_actors::policy::ladder::RungCounts;
    use std::collections::BTreeSet;
    use std::time::{Duration, Instant};

    /// A scrape in which everything has happened.
    fn eventful() -> String {
        let device = DeviceId::gpu("GPU-a");
        let replica = ReplicaStatus {
            replica: ReplicaId { model: "m".into(), index: 0 },
            device: device.clone(),
            phase: Phase::Ready,
            incarnation: 2,
            pid: Some(7),
            progress: None,
            running: 1,
            kv_bytes: 50,
            last_heard: Some(Duration::from_millis(3)),
            step_age: None,
            stats: Some(EngineStats { weight_bytes: 100, kv_blocks_total: 4, ..EngineStats::default() }),
            last_end: None,
        };
        let replicas = vec![replica];
        let mut oom = RungCounts::default();
        Rung::ALL.into_iter().for_each(|rung| oom.add(rung, 1));
        let quarantined = Some("why".into());
        let ours = DeviceStatus { device, quarantined, recent_failures: 1, failures: 1, oom, replicas };
        let service = ServiceStatus {
            model: "m".into(),
            ready: 1,
            replicas: 1,
            open_requests: 1,
            open_tokens: 20,
            waiting: 0,
            tokens_per_second: Some(9.0),
            required: true,
        };
        let requests = RequestCounters::default();
        let router = RouterStatus { services: vec![service], requests, draining: false };
        let status = HouseStatus { devices: vec![ours], router: Some(router), uptime: Duration::ZERO };
        let card = Device {
            uuid: "GPU-a".into(),
            total_bytes: 1000,
            used_bytes: 300,
            processes: vec![DeviceProcess { pid: 7, used_bytes: Some(180) }],
            utilization_percent: Some(50),
            temperature_c: Some(40),
            power_mw: Some(90_000),
            ecc: Some(Ecc { corrected: 0, uncorrected: 0 }),
            ..Device::default()
        };
        let counts = EventCounts {
            restarts: [(("m".into(), 0, "GPU-a".into(), "signalled"), 1)].into(),
            xids: [(("GPU-a".into(), 43), 1)].into(),
            quarantines: [("GPU-a".into(), 1)].into(),
            ..EventCounts::default()
        };
        let recorded = Metrics::new();
        recorded.http(&axum::http::Method::GET, "/health", 200, Duration::from_millis(1));
        let mut request = recorded.request("m", 1, Some(2));
        request.accepted(3);
        for index in 0..2 {
            let begun = Some(Instant::now());
            request.event(&Event::Token(Token { choice: 0, index, id: 5, text: "a".into(), logprobs: None, begun }));
        }
        let outcome = Outcome::Length;
        let end = End {
            choice: 0,
            text: String::new(),
            outcome,
            prompt_tokens: 3,
            cached_tokens: None,
            completion_tokens: 2,
        };
        request.event(&Event::End(end));
        let build = BuildInfo { version: "1".into(), commit: None };
        text(&recorded, &Snapshot::of(&build, Some(&status), &[card], counts)).expect("a string takes everything")
    }

    /// Names of series, without labels.
    fn series(scrape: &str) -> BTreeSet<&str> {
        scrape.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split([' ', '{']).next()).collect()
    }

    /// Everything in `text` that is written like the name of a metric.
    fn names_in(text: &str) -> BTreeSet<&str> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        let words = text.split(|c| !is_name(c));
        words
            .filter(|word| ["playhouse_", "vllm:", "http_request"].iter().any(|p| word.starts_with(p) && word != p))
            .collect()
    }

    #[test]
    fn the_boards_panels_read_series_that_exist() {
        let scrape = eventful();
        let series = series(&scrape);
        let board: serde_json::Value =
            serde_json::from_str(include_str!("../../../docs/grafana/playhouse.json")).expect("JSON");
        assert!(board["schemaVersion"].as_u64().is_some_and(|version| version >= 36));
        for member in ["title", "uid"] {
            assert!(board[member].as_str().is_some_and(|text| !text.is_empty()), "{member}");
        }
        let (mut ids, mut used) = (BTreeSet::new(), BTreeSet::new());
        for panel in board["panels"].as_array().expect("panels") {
            let title = panel["title"].as_str().expect("a title");
            assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{title}: its id is another's");
            for place in ["x", "y", "w", "h"] {
                assert!(panel["gridPos"][place].is_u64(), "{title}: {place}");
            }
            assert_eq!(panel["datasource"]["type"], "prometheus", "{title}");
            assert!(panel["type"].is_string() && panel["fieldConfig"]["defaults"].is_object(), "{title}");
            let mut letters = BTreeSet::new();
            for target in panel["targets"].as_array().expect("targets") {
                assert!(letters.insert(target["refId"].as_str().expect("a refId")), "{title}");
                let expr = target["expr"].as_str().expect("an expression");
                let balance = |open, close| expr.matches(open).count() == expr.matches(close).count();
                assert!(balance('(', ')') && balance('{', '}') && balance('[', ']'), "{title}: {expr}");
                let names = names_in(expr);
                assert!(!names.is_empty(), "{title}: {expr}");
                for name in names {
                    assert!(series.contains(name), "{title}: no series {name} in\n{scrape}");
                    used.insert(name);
                }
            }
        }
        // What an operator looks for first.
        for name in [
            "playhouse_actor_restarts_total",
            "playhouse_oom_ladder_total",
            "playhouse_vram_bytes",
            "playhouse_vram_unaccounted_bytes",
            "playhouse_last_step_age_seconds",
            "playhouse_gpu_xid_total",
            "playhouse_requests_resumed_total",
            "playhouse_queue_tokens",
            "playhouse_request_queue_time_seconds_bucket",
        ] {
            assert!(used.contains(name), "no panel shows {name}");
        }
    }

    #[test]
    fn the_guide_names_what_exists_and_leaves_nothing_out() {
        let scrape = eventful();
        let series = series(&scrape);
        let guide = names_in(include_str!("../../../docs/src/observability.md"));
        let exists = |name: &str| ["", "_count"].iter().any(|end| series.contains(format!("{name}{end}").as_str()));
        for name in &guide {
            assert!(exists(name), "the guide names {name}, which no scrape has");
        }
        for name in series {
            let parts = ["_bucket", "_sum", "_count"];
            let name = parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name);
            assert!(guide.contains(name), "the guide leaves out {name}");
        }
    }
}
