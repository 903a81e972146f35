//! What Prometheus reads. Histograms and counts of requests are recorded here, as they happen; what the house knows is
//! asked for at each scrape (`scrape`).
//!
//! Every series of a model has the labels `model` (ours), and `model_name` and `engine` (vLLM's), so that the boards
//! made for vLLM read the same series under vLLM's names.

mod meter;
mod scrape;
mod of_models;

pub(super) use meter::RequestMeter;
pub(super) use scrape::scrape;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::time::Duration;

/// Buckets as vLLM has them: its boards compute quantiles from these.
const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const GAP: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0, 200_000.0,
];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Ours: an inter-token gap on a good card is far below vLLM's first bucket.
const HTTP: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0];

/// Labels of everything that belongs to a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ModelLabels {
    model: String,
    model_name: String,
    engine: &'static str,
}

impl ModelLabels {
    fn of(model: &str) -> Self {
        Self { model: model.to_owned(), model_name: model.to_owned(), engine: "0" }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    model: String,
    model_name: String,
    engine: &'static str,
    finished_reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabels {
    method: String,
    path: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    method: String,
    path: String,
}

type HistogramFamily<L> = Family<L, Histogram, fn() -> Histogram>;

macro_rules! histogram {
    ($buckets:expr) => {
        Family::new_with_constructor((|| Histogram::new($buckets.iter().copied())) as fn() -> Histogram)
    };
}

/// Everything that is recorded in the front.
pub(super) struct Metrics {
    registry: Registry,
    models: ModelFamilies,
    http_requests: Family<HttpLabels, Counter>,
    http_seconds: HistogramFamily<PathLabels>,
}

/// One family for each thing that is recorded of a model's requests.
#[derive(Clone)]
struct ModelFamilies {
    ttft: HistogramFamily<ModelLabels>,
    gap: HistogramFamily<ModelLabels>,
    e2e: HistogramFamily<ModelLabels>,
    queue: HistogramFamily<ModelLabels>,
    prefill: HistogramFamily<ModelLabels>,
    inference: HistogramFamily<ModelLabels>,
    decode: HistogramFamily<ModelLabels>,
    prompt_tokens_each: HistogramFamily<ModelLabels>,
    generation_tokens_each: HistogramFamily<ModelLabels>,
    generation_tokens_longest: HistogramFamily<ModelLabels>,
    n: HistogramFamily<ModelLabels>,
    max_tokens: HistogramFamily<ModelLabels>,
    prompt_tokens: Family<ModelLabels, Counter>,
    generation_tokens: Family<ModelLabels, Counter>,
    ended: Family<EndLabels, Counter>,
    open: Family<ModelLabels, Gauge>,
}

impl Metrics {
    /// Nothing recorded yet.
    pub(super) fn new() -> Self {
        let mut registry = Registry::default();
        let models = ModelFamilies::register(&mut registry);
        let http_requests = Family::default();
        let http_seconds: HistogramFamily<PathLabels> = histogram!(HTTP);
        registry.register("http_requests", "Answers by method, path and status", http_requests.clone());
        let help = "Seconds from a request's headers to its answer's headers";
        registry.register("http_request_duration_seconds", help, http_seconds.clone());
        Self { registry, models, http_requests, http_seconds }
    }

    /// An endpoint answered.
    pub(super) fn http(&self, method: &axum::http::Method, path: &str, status: u16, took: Duration) {
        // Clients can make up methods; labels must not be theirs to choose.
        let method = match method.as_str() {
            known @ ("GET" | "POST" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "PATCH") => known,
            _ => "other",
        };
        let (method, path) = (method.to_owned(), path.to_owned());
        self.http_seconds
            .get_or_create(&PathLabels { method: method.clone(), path: path.clone() })
            .observe(took.as_secs_f64());
        self.http_requests.get_or_create(&HttpLabels { method, path, status }).inc();
    }

    /// Begins to measure a request for a model that exists.
    pub(super) fn request(&self, model: &str, n: u32, max_tokens: Option<u32>) -> RequestMeter {
        RequestMeter::new(&self.models, model, n, max_tokens)
    }
}

impl ModelFamilies {
    fn register(registry: &mut Registry) -> Self {
        let this = Self {
            ttft: histogram!(TTFT),
            gap: histogram!(GAP),
            e2e: histogram!(LATENCY),
            queue: histogram!(LATENCY),
            prefill: histogram!(LATENCY),
            inference: histogram!(LATENCY),
            decode: histogram!(LATENCY),
            prompt_tokens_each: histogram!(TOKENS),
            generation_tokens_each: histogram!(TOKENS),
            generation_tokens_longest: histogram!(TOKENS),
            n: histogram!(CHOICES),
            max_tokens: histogram!(TOKENS),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            ended: Family::default(),
            open: Family::default(),
        };
        for prefix in ["vllm:", "playhouse_"] {
            let mut put = |name: &str, help: &str, family: &HistogramFamily<ModelLabels>| {
                registry.register(format!("{prefix}{name}"), help, family.clone());
            };
            put("time_to_first_token_seconds", "From a request to its first token", &this.ttft);
            put("inter_token_latency_seconds", "From one token of a text to the next", &this.gap);
            put("e2e_request_latency_seconds", "From a request to its end", &this.e2e);
            put("request_queue_time_seconds", "From a request to the step that began with it", &this.queue);
            put("request_prefill_time_seconds", "From that step to the first token", &this.prefill);
            put("request_decode_time_seconds", "From a request's first token to its last", &this.decode);
            put(
                "request_inference_time_seconds",
                "From the step that began with it to its last token",
                &this.inference,
            );
            put("request_prompt_tokens", "Prompt tokens of a request", &this.prompt_tokens_each);
            put("request_generation_tokens", "Tokens of a text", &this.generation_tokens_each);
            let help = "Tokens of the longest text of a request";
            put("request_max_num_generation_tokens", help, &this.generation_tokens_longest);
            if prefix == "vllm:" {
                // What it was called before; boards of those days ask for it.
                put("time_per_output_token_seconds", "From one token of a text to the next", &this.gap);
            }
            put("request_params_n", "Texts asked for", &this.n);
            put("request_params_max_tokens", "Most tokens asked for", &this.max_tokens);
            let help = "Prompt tokens of requests that were accepted";
            registry.register(format!("{prefix}prompt_tokens"), help, this.prompt_tokens.clone());
            let help = "Tokens that were generated for clients";
            registry.register(format!("{prefix}generation_tokens"), help, this.generation_tokens.clone());
            registry.register(format!("{prefix}request_success"), "Texts that ended, by reason", this.ended.clone());
        }
        registry.register("playhouse_http_streams_open", "Requests that clients are waiting for", this.open.clone());
        this
    }
}
