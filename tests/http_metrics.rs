//! `/metrics` against what boards that were made for vLLM ask for: every name, its type and its buckets, after real requests.

mod http_support;

use http_support::client::{get, post};
use http_support::{Setup, TestHouse};
use serde_json::json;
use std::sync::atomic::Ordering;
use std::time::Instant;

const TTFT: &str = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560";
const GAP: &str = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80";
const LATENCY: &str = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680";
const TOKENS: &str = "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000 200000";
const CHOICES: &str = "1 2 5 10 20";
const STEP: &str = "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384";

/// vLLM's names, their types, and the buckets of histograms.
const VLLM: &[(&str, &str, &str)] = &[
    ("num_requests_running", "gauge", ""),
    ("num_requests_waiting", "gauge", ""),
    ("kv_cache_usage_perc", "gauge", ""),
    ("gpu_cache_usage_perc", "gauge", ""),
    ("lora_requests_info", "gauge", ""),
    ("cache_config_info", "gauge", ""),
    ("prompt_tokens", "counter", ""),
    ("generation_tokens", "counter", ""),
    ("request_success", "counter", ""),
    ("num_preemptions", "counter", ""),
    ("prefix_cache_queries", "counter", ""),
    ("prefix_cache_hits", "counter", ""),
    ("time_to_first_token_seconds", "histogram", TTFT),
    ("inter_token_latency_seconds", "histogram", GAP),
    ("time_per_output_token_seconds", "histogram", GAP),
    ("e2e_request_latency_seconds", "histogram", LATENCY),
    ("request_queue_time_seconds", "histogram", LATENCY),
    ("request_inference_time_seconds", "histogram", LATENCY),
    ("request_prefill_time_seconds", "histogram", LATENCY),
    ("request_decode_time_seconds", "histogram", LATENCY),
    ("request_prompt_tokens", "histogram", TOKENS),
    ("request_generation_tokens", "histogram", TOKENS),
    ("request_max_num_generation_tokens", "histogram", TOKENS),
    ("request_params_n", "histogram", CHOICES),
    ("request_params_max_tokens", "histogram", TOKENS),
    ("iteration_tokens_total", "histogram", STEP),
];

/// What a scrape says.
struct Scrape(String);

impl Scrape {
    async fn of(house: &TestHouse) -> Self {
        Self(get(house.address, "/metrics").send().await.text().to_owned())
    }

    /// The value of the first series that begins like this.
    fn value(&self, start: &str) -> f64 {
        let line = self.0.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in\n{}", self.0));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// The bounds of a histogram's buckets, but the last.
    fn bounds(&self, name: &str) -> Vec<f64> {
        let bound = |line: &str| line.strip_prefix(&format!("{name}_bucket{{le=\""))?.split('"').next()?.parse().ok();
        self.0.lines().filter_map(bound).filter(|bound: &f64| bound.is_finite()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_that_vllms_boards_read_is_there() {
    let house = Setup::default().start().await;
    for stream in [false, true] {
        let body =
            json!({"model": "basho", "prompt": "the moon", "max_tokens": 8, "ignore_eos": true, "stream": stream});
        assert_eq!(post(house.address, "/v1/completions", &body).send().await.status, 200);
    }
    // What engines count comes with their heartbeats.
    let is_counted = |status: &playhouse_actors::HouseStatus| {
        status.devices[0].replicas[0].stats.is_some_and(|stats| stats.decode_tokens == 16)
    };
    house.wait("counted", is_counted).await;
    let scrape = Scrape::of(&house).await;
    for (name, kind, buckets) in VLLM {
        let name = format!("vllm:{name}");
        assert!(scrape.0.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind} in\n{}", scrape.0);
        let series = match *kind {
            "counter" => format!("{name}_total{{"),
            "histogram" => format!("{name}_count{{"),
            _ => format!("{name}{{"),
        };
        let line = scrape.0.lines().find(|line| line.starts_with(&series)).unwrap_or_else(|| panic!("no {series}"));
        assert!(line.contains("model_name=\"basho\"") && line.contains("engine=\"0\""), "{line}");
        let wanted: Vec<f64> = buckets.split_whitespace().map(|bound| bound.parse().expect("a number")).collect();
        assert_eq!(scrape.bounds(&name), wanted, "{name}");
    }
    for measured in ["request_queue_time_seconds", "request_prefill_time_seconds", "request_inference_time_seconds"] {
        assert_eq!(scrape.value(&format!("vllm:{measured}_count{{")), 2.0, "{measured}");
    }
    let sum = |name: &str| scrape.value(&format!("vllm:{name}_seconds_sum{{"));
    let parts = sum("request_queue_time") + sum("request_prefill_time");
    assert!((parts - sum("time_to_first_token")).abs() < 1e-6, "waiting and prefill are the time to the first token");
    let parts = sum("request_queue_time") + sum("request_inference_time");
    assert!((parts - sum("e2e_request_latency")).abs() < 1e-6, "waiting and inference are the whole");
    assert!(sum("request_decode_time") <= sum("request_inference_time"));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_time_is_the_time_until_the_first_step() {
    let (setup, gate, counts) = Setup::gated();
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 2});
    let before = Instant::now();
    let asking = tokio::spawn(post(house.address, "/v1/completions", &body).send());
    house.wait("asked", |_| counts.submitted.load(Ordering::SeqCst) == 1).await;
    // It has waited at least as long as this takes, and its two tokens come only now.
    let first = get(house.address, "/metrics").send().await;
    assert!(!first.text().contains("vllm:request_queue_time_seconds_count{"), "nothing has begun");
    gate.give(2);
    assert_eq!(asking.await.expect("no panic").status, 200);
    let most = before.elapsed().as_secs_f64();
    let scrape = Scrape::of(&house).await;
    let (queue, whole) =
        (scrape.value("vllm:request_queue_time_seconds_sum{"), scrape.value("vllm:e2e_request_latency_seconds_sum{"));
    assert!(0.0 < queue && queue <= whole && whole <= most, "{queue} {whole} {most}");
    house.shut_down().await;
}
