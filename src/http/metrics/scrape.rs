//! `/metrics`: what was recorded, and what the house says now.

use super::super::App;
use super::super::error::ApiError;
use super::ModelLabels;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use playhouse_actors::HouseStatus;
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
    let mut now = Snapshot::default();
    if let Some(status) = &status {
        now.house(&app, status);
        now.memory(status, &devices);
    }
    now.devices(&devices);
    now.events(&app);
    let mut text = String::new();
    encode_registry(&mut text, &app.metrics.registry)
        .and_then(|()| encode_registry(&mut text, &now.registry))
        .and_then(|()| encode_eof(&mut text))
        .map_err(|error| ApiError::internal(&error))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
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
/// Our name, vLLM's if it has one, what it means, and how to read it.
type Count = (&'static str, Option<&'static str>, &'static str, fn(&Stats) -> u64);

/// A registry that lives for one scrape.
#[derive(Default)]
struct Snapshot {
    registry: Registry,
}

impl Snapshot {
    fn gauges<L, V>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (L, V)>)
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

    fn counters<L>(&mut self, name: &str, help: &str, values: impl IntoIterator<Item = (L, u64)>)
    where
        L: Clone + Debug + Eq + Hash + EncodeLabelSet + Send + Sync + 'static,
    {
        let family: Family<L, Counter> = Family::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        self.registry.register(name, help, family);
    }

    fn house(&mut self, app: &App, status: &HouseStatus) {
        let build =
            BuildLabels { version: app.build.version.clone(), commit: app.build.commit.clone().unwrap_or_default() };
        self.gauges("playhouse_build_info", "What this program is; always 1", [(build, 1.0)]);
        self.replicas(status);
        if let Some(router) = &status.router {
            self.router(router);
        }
        self.engines(status);
    }

    fn router(&mut self, router: &RouterStatus) {
        let each = |value: fn(&playhouse_actors::messages::ServiceStatus) -> f64| {
            router.services.iter().map(move |service| (ModelLabels::of(&service.model), value(service)))
        };
        let help = "Accepted, unfinished requests that an engine has";
        let running: Vec<_> = each(|s| f64::from(s.open_requests.saturating_sub(s.waiting))).collect();
        self.gauges("playhouse_requests_running", help, running.clone());
        self.gauges("vllm:num_requests_running", help, running);
        let help = "Accepted requests that wait for a replica";
        let waiting: Vec<_> = each(|s| f64::from(s.waiting)).collect();
        self.gauges("playhouse_requests_waiting", help, waiting.clone());
        self.gauges("vllm:num_requests_waiting", help, waiting);
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

    /// What the engines count, by replica under our names and by model under vLLM's.
    fn engines(&mut self, status: &HouseStatus) {
        let with_stats = || all(status).filter_map(|r| Some((r, r.stats?)));
        let counters: [Count; 6] = [
            ("steps", None, "Steps of an engine", |s| s.steps),
            ("prefill_tokens", None, "Prompt tokens computed", |s| s.prefill_tokens),
            ("decode_tokens", None, "Tokens emitted by an engine", |s| s.decode_tokens),
            ("preemptions", Some("num_preemptions"), "Sequences sent back to the queue", |s| s.preemptions),
            (
                "prefix_cache_queries",
                Some("prefix_cache_queries"),
                "Prompt tokens looked up in the prefix cache",
                |s| s.prefix_queries,
            ),
            ("prefix_cache_hits", Some("prefix_cache_hits"), "Prompt tokens found in the prefix cache", |s| {
                s.prefix_hits
            }),
        ];
        for (name, vllm, help, value) in counters {
            let each = with_stats().map(|(r, s)| (labels(r), value(&s)));
            self.counters(&format!("playhouse_engine_{name}"), help, each);
            if let Some(vllm) = vllm {
                let each = with_stats().map(|(r, s)| (ModelLabels::of(&r.replica.model), value(&s)));
                self.counters(&format!("vllm:{vllm}"), help, each);
            }
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
        let help = "Share of a model's KV blocks that sequences use, 0 to 1";
        let mut blocks = std::collections::BTreeMap::<&str, (u64, u64)>::new();
        for (replica, stats) in with_stats() {
            let (used, total) = blocks.entry(&replica.replica.model).or_default();
            *used += u64::from(stats.kv_blocks_used.saturating_sub(stats.kv_blocks_cached));
            *total += u64::from(stats.kv_blocks_total);
        }
        let usage = |(model, (used, total)): (&&str, &(u64, u64))| {
            (ModelLabels::of(model), *used as f64 / (*total).max(1) as f64)
        };
        let usage: Vec<_> = blocks.iter().map(usage).collect();
        self.gauges("vllm:kv_cache_usage_perc", help, usage.clone());
        self.gauges("playhouse_kv_cache_usage_ratio", help, usage);
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

    fn events(&mut self, app: &App) {
        let counts = app.control.events().counts();
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

fn all(status: &HouseStatus) -> impl Iterator<Item = &ReplicaStatus> {
    status.devices.iter().flat_map(|device| &device.replicas)
}

fn labels(replica: &ReplicaStatus) -> ReplicaLabels {
    let model = replica.replica.model.clone();
    ReplicaLabels { model, device: replica.device.to_string(), replica: replica.replica.index }
}
