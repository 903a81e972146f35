//! What the replicas of a model say together, under our names and vLLM's.

use super::ModelLabels;
use super::scrape::{Snapshot, all};
use playhouse_actors::HouseStatus;
use playhouse_actors::engine::{EngineStats, StepTokens};
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::{MetricType, TypedMetric};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// vLLM tells what it was started with in the labels of a series.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    model: String,
    model_name: String,
    engine: &'static str,
    block_size: u32,
    num_gpu_blocks: u32,
    enable_prefix_caching: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LoraLabels {
    model: String,
    model_name: String,
    engine: &'static str,
    max_lora: u32,
    running_lora_adapters: &'static str,
    waiting_lora_adapters: &'static str,
}

impl Snapshot {
    /// Sums over the replicas of each model.
    pub(super) fn models(&mut self, status: &HouseStatus) {
        let mut models = BTreeMap::<&str, EngineStats>::new();
        for replica in all(status) {
            if let Some(stats) = &replica.stats {
                add(models.entry(&replica.replica.model).or_default(), stats);
            }
        }
        self.queues(status, &models);
        let each = |value: fn(&EngineStats) -> u64| {
            models.iter().map(|(model, stats)| (ModelLabels::of(model), value(stats))).collect::<Vec<_>>()
        };
        self.counters("vllm:num_preemptions", "Sequences sent back to the queue", each(|s| s.preemptions));
        let help = "Prompt tokens looked up in the prefix cache";
        self.counters("vllm:prefix_cache_queries", help, each(|s| s.prefix_queries));
        let help = "Prompt tokens found in the prefix cache";
        self.counters("vllm:prefix_cache_hits", help, each(|s| s.prefix_hits));
        let usage: Vec<_> = models.iter().map(|(model, stats)| (ModelLabels::of(model), kv_usage(stats))).collect();
        let help = "Share of a model's KV blocks that sequences use, 0 to 1";
        for name in ["playhouse_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"] {
            self.gauges(name, help, usage.clone());
        }
        self.step_tokens(&models);
        self.settings(&models);
    }

    /// Who waits and who does not: the router knows who waits for a replica, an engine who waits in it.
    fn queues(&mut self, status: &HouseStatus, models: &BTreeMap<&str, EngineStats>) {
        let services = status.router.iter().flat_map(|router| &router.services);
        let counts: Vec<_> = services
            .map(|service| {
                let in_engines = models.get(service.model.as_str()).map_or(0, |stats| stats.waiting);
                // What an engine says is as old as its last heartbeat.
                let waiting = service.waiting.saturating_add(in_engines).min(service.open_requests);
                (ModelLabels::of(&service.model), service.open_requests - waiting, waiting)
            })
            .collect();
        let running: Vec<_> = counts.iter().map(|(labels, running, _)| (labels.clone(), f64::from(*running))).collect();
        let waiting: Vec<_> = counts.into_iter().map(|(labels, _, waiting)| (labels, f64::from(waiting))).collect();
        let help = "Accepted, unfinished requests that an engine has begun";
        self.gauges("playhouse_requests_running", help, running.clone());
        self.gauges("vllm:num_requests_running", help, running);
        let help = "Accepted requests that wait for a replica, or in an engine";
        self.gauges("playhouse_requests_waiting", help, waiting.clone());
        self.gauges("vllm:num_requests_waiting", help, waiting);
    }

    fn step_tokens(&mut self, models: &BTreeMap<&str, EngineStats>) {
        for name in ["playhouse_iteration_tokens_total", "vllm:iteration_tokens_total"] {
            let family: Family<ModelLabels, Counted> = Family::default();
            for (model, stats) in models {
                family.get_or_create(&ModelLabels::of(model)).set(stats.step_tokens);
            }
            self.registry.register(name, "Tokens computed in a step", family);
        }
    }

    fn settings(&mut self, models: &BTreeMap<&str, EngineStats>) {
        let cache = models.iter().map(|(model, stats)| {
            let ModelLabels { model, model_name, engine } = ModelLabels::of(model);
            let (block_size, num_gpu_blocks) = (stats.kv_block_tokens, stats.kv_blocks_total);
            let labels =
                CacheLabels { model, model_name, engine, block_size, num_gpu_blocks, enable_prefix_caching: "True" };
            (labels, 1.0)
        });
        self.gauges("vllm:cache_config_info", "What the KV cache is like; always 1", cache.collect::<Vec<_>>());
        let lora = models.keys().map(|model| {
            let ModelLabels { model, model_name, engine } = ModelLabels::of(model);
            let (running_lora_adapters, waiting_lora_adapters) = ("", "");
            let labels =
                LoraLabels { model, model_name, engine, max_lora: 0, running_lora_adapters, waiting_lora_adapters };
            (labels, 0.0)
        });
        self.gauges("vllm:lora_requests_info", "There are no LoRA adapters here; always 0", lora.collect::<Vec<_>>());
    }
}

fn add(sum: &mut EngineStats, stats: &EngineStats) {
    sum.waiting += stats.waiting;
    sum.kv_blocks_used += stats.kv_blocks_used;
    sum.kv_blocks_cached += stats.kv_blocks_cached;
    sum.kv_blocks_total += stats.kv_blocks_total;
    sum.kv_block_tokens = stats.kv_block_tokens;
    sum.preemptions += stats.preemptions;
    sum.prefix_queries += stats.prefix_queries;
    sum.prefix_hits += stats.prefix_hits;
    sum.step_tokens.sum += stats.step_tokens.sum;
    for (sum, steps) in sum.step_tokens.steps.iter_mut().zip(stats.step_tokens.steps) {
        *sum += steps;
    }
}

fn kv_usage(stats: &EngineStats) -> f64 {
    let used = stats.kv_blocks_used.saturating_sub(stats.kv_blocks_cached);
    f64::from(used) / f64::from(stats.kv_blocks_total.max(1))
}

/// A histogram that somebody else counted.
#[derive(Debug, Default)]
struct Counted(Mutex<StepTokens>);

impl Counted {
    fn set(&self, counts: StepTokens) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }
}

impl TypedMetric for Counted {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Counted {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let StepTokens { steps, sum } = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bounds = StepTokens::BOUNDS.map(f64::from).into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(steps).collect();
        encoder.encode_histogram::<NoLabelSet>(sum as f64, steps.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::inventory::DeviceId;
    use playhouse_actors::messages::{DeviceStatus, Phase, ReplicaId, ReplicaStatus, RouterStatus, ServiceStatus};
    use playhouse_actors::policy::ladder::RungCounts;
    use prometheus_client::encoding::text::encode_registry;
    use std::time::Duration;

    fn replica(index: u32, stats: EngineStats) -> ReplicaStatus {
        ReplicaStatus {
            replica: ReplicaId { model: "m".into(), index },
            device: DeviceId::cpu(),
            phase: Phase::Ready,
            incarnation: 1,
            pid: None,
            progress: None,
            running: 0,
            kv_bytes: 0,
            last_heard: None,
            step_age: None,
            stats: Some(stats),
            last_end: None,
        }
    }

    #[test]
    fn replicas_are_added_up() {
        let mut steps = StepTokens::default();
        [1, 2, 8, 9, 20_000].into_iter().for_each(|n| steps.observe(n));
        let one = EngineStats {
            waiting: 2,
            preemptions: 3,
            kv_blocks_used: 30,
            kv_blocks_cached: 10,
            kv_blocks_total: 50,
            step_tokens: steps,
            ..EngineStats::default()
        };
        let replicas = vec![replica(0, one), replica(1, one)];
        let device = DeviceStatus {
            device: DeviceId::cpu(),
            quarantined: None,
            recent_failures: 0,
            failures: 0,
            oom: RungCounts::default(),
            replicas,
        };
        let service = ServiceStatus {
            model: "m".into(),
            ready: 2,
            replicas: 2,
            open_requests: 9,
            open_tokens: 0,
            waiting: 1,
            tokens_per_second: None,
            required: true,
        };
        let router = RouterStatus {
            services: vec![service],
            requests: playhouse_actors::messages::RequestCounters::default(),
            draining: false,
        };
        let status = HouseStatus { devices: vec![device], router: Some(router), uptime: Duration::ZERO };
        let mut now = Snapshot::default();
        now.models(&status);
        let mut text = String::new();
        encode_registry(&mut text, &now.registry).expect("a string takes everything");
        let labels = "model=\"m\",model_name=\"m\",engine=\"0\"";
        for line in [
            format!("vllm:num_requests_waiting{{{labels}}} 5.0"),
            format!("vllm:num_requests_running{{{labels}}} 4.0"),
            format!("vllm:num_preemptions_total{{{labels}}} 6"),
            format!("vllm:kv_cache_usage_perc{{{labels}}} 0.4"),
            format!("vllm:iteration_tokens_total_bucket{{le=\"1.0\",{labels}}} 2"),
            format!("vllm:iteration_tokens_total_bucket{{le=\"8.0\",{labels}}} 6"),
            format!("vllm:iteration_tokens_total_bucket{{le=\"16384.0\",{labels}}} 8"),
            format!("vllm:iteration_tokens_total_bucket{{le=\"+Inf\",{labels}}} 10"),
            format!("vllm:iteration_tokens_total_sum{{{labels}}} 40040.0"),
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
    }
}
