//! What is no text: the small endpoints, metrics, the document, the dashboard.

use crate::http_support::client::{get, post, raw};
use crate::http_support::{PATIENCE, Setup};
use http_body_util::BodyExt;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn small_endpoints() {
    let house = Setup::default().start().await;
    let at = house.address;
    for path in ["/health", "/v1/health", "/health/live", "/health/ready", "/health/ready?model=poet"] {
        let answer = get(at, path).send().await;
        assert_eq!((answer.status, answer.json()), (200, json!({"status": "ok"})), "{path}");
    }
    assert_eq!(get(at, "/health/ready?model=nobody").send().await.status, 404);
    assert_eq!(get(at, "/version").send().await.json(), json!({"version": "0.0.0-test", "commit": "0123456789abcdef"}));
    let models = get(at, "/v1/models").send().await.json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("basho")));
    let one = get(at, "/v1/models/poet").send().await.json();
    assert_eq!((&one["id"], &one["object"], &one["max_model_len"]), (&json!("basho"), &json!("model"), &json!(256)));
    let none = get(at, "/v1/models/a/b").send().await;
    assert_eq!((none.status, none.error("code")), (404, json!("model_not_found")));
    assert_eq!(get(at, "/models").send().await.json()["data"][0]["status"]["value"], "loaded");

    let tokens = post(at, "/tokenize", &json!({"content": "the moon", "with_pieces": true})).send().await.json();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().expect("list").len());
    let ids: Vec<Value> = tokens["tokens"].as_array().expect("list").iter().map(|token| token["id"].clone()).collect();
    let text = post(at, "/detokenize", &json!({"model": "basho", "tokens": ids})).send().await.json();
    assert_eq!(text["content"], "the moon");
    let prompt =
        post(at, "/apply-template", &json!({"messages": [{"role": "user", "content": "the moon"}]})).send().await;
    assert!(prompt.json()["prompt"].as_str().is_some_and(|prompt| prompt.contains("the moon")));
    for (path, body, param) in [
        ("/tokenize", json!({}), "content"),
        ("/tokenize", json!({"content": "a", "messages": []}), "messages"),
        ("/detokenize", json!({"tokens": [4_000_000_000u32]}), "tokens[0]"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens[0]"),
        ("/apply-template", json!({"messages": []}), "messages"),
        ("/apply-template", json!({}), "messages"),
    ] {
        let answer = post(at, path, &body).send().await;
        assert_eq!((answer.status, answer.error("param")), (400, json!(param)), "{path} {body}");
    }
    let nothing = get(at, "/v2/moon").send().await;
    assert_eq!((nothing.status, nothing.error("type")), (404, json!("not_found_error")));
    let wrong = get(at, "/v1/chat/completions").send().await;
    assert_eq!(wrong.status, 405);
    assert!(wrong.error("message").as_str().is_some_and(|message| message.contains("GET")));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_a_known_workload() {
    let house = Setup::default().start().await;
    for seed in 0..3 {
        let body = json!({"model": "basho", "prompt": "the moon", "max_tokens": 8, "seed": seed, "ignore_eos": true, "stream": seed == 1});
        assert_eq!(post(house.address, "/v1/completions", &body).send().await.status, 200);
    }
    assert_eq!(post(house.address, "/v1/completions", &json!({"model": "basho"})).send().await.status, 400);
    let tokens =
        post(house.address, "/tokenize", &json!({"content": "the moon", "add_special": true})).send().await.json();
    let n_prompt = 3 * tokens["count"].as_u64().expect("a count");
    // What the engine counts comes with its heartbeats.
    let counted = |status: &playhouse_actors::HouseStatus| {
        status.devices[0].replicas[0].stats.is_some_and(|stats| stats.decode_tokens == 24)
    };
    house.wait("counted", counted).await;
    let answer = get(house.address, "/metrics").send().await;
    assert_eq!(answer.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    let text = answer.text();
    assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1);
    let value = |series: &str| -> f64 {
        let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
        let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    };
    let model = "model=\"basho\",model_name=\"basho\",engine=\"0\"";
    for prefix in ["vllm:", "playhouse_"] {
        assert_eq!(value(&format!("{prefix}prompt_tokens_total{{{model}}}")), n_prompt as f64);
        assert_eq!(value(&format!("{prefix}generation_tokens_total{{{model}}}")), 24.0);
        assert_eq!(value(&format!("{prefix}request_success_total{{{model},finished_reason=\"length\"}}")), 3.0);
        assert_eq!(value(&format!("{prefix}time_to_first_token_seconds_count{{{model}}}")), 3.0);
        assert_eq!(value(&format!("{prefix}inter_token_latency_seconds_count{{{model}}}")), 21.0);
        assert_eq!(value(&format!("{prefix}e2e_request_latency_seconds_bucket{{le=\"+Inf\",{model}}}")), 3.0);
        assert_eq!(value(&format!("{prefix}request_generation_tokens_sum{{{model}}}")), 24.0);
        assert_eq!(value(&format!("{prefix}request_params_max_tokens_sum{{{model}}}")), 24.0);
    }
    for (name, status) in [("200", 3.0), ("400", 1.0)] {
        let series = format!("http_requests_total{{method=\"POST\",path=\"/v1/completions\",status=\"{name}\"}}");
        assert_eq!(value(&series), status);
    }
    assert_eq!(value("playhouse_requests_total{end=\"accepted\"}"), 3.0);
    assert_eq!(value("playhouse_requests_total{end=\"completed\"}"), 3.0);
    assert_eq!(value(&format!("vllm:num_requests_running{{{model}}}")), 0.0);
    let replica = "model=\"basho\",device=\"cpu\",replica=\"0\"";
    assert_eq!(value(&format!("playhouse_engine_decode_tokens_total{{{replica}}}")), 24.0);
    assert_eq!(value(&format!("playhouse_replica_state{{{replica},state=\"ready\"}}")), 1.0);
    assert!(value(&format!("vllm:kv_cache_usage_perc{{{model}}}")) <= 1.0);
    assert_eq!(value(&format!("playhouse_http_streams_open{{{model}}}")), 0.0);

    house.kill_worker();
    house.wait("restarted", |status| status.is_ready() && status.devices[0].replicas[0].incarnation == 2).await;
    let text = get(house.address, "/metrics").send().await.text().to_owned();
    let restarts = format!("playhouse_actor_restarts_total{{{replica},reason=\"signalled\"}} 1");
    assert!(text.contains(&restarts), "{text}");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_has_every_endpoint_and_the_dashboard_stays_at_home() {
    let house = Setup::default().start().await;
    let document = get(house.address, "/openapi.json").send().await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let schemas = document["components"]["schemas"].as_object().expect("schemas");
    let examples: Vec<_> = schemas
        .values()
        .flat_map(|schema| schema.get("examples"))
        .flat_map(|list| list.as_array().expect("a list"))
        .collect();
    assert!(examples.len() >= 10 && examples.iter().all(|example| example["model"] == "basho"), "{examples:?}");
    for (path, operations) in document["paths"].as_object().expect("paths") {
        for method in operations.as_object().expect("operations").keys() {
            // An endpoint that is there answers with anything but these two.
            let path = path.replace("{id}", "basho");
            if path == "/api/events" {
                continue;
            }
            let answer = raw(house.address, &path, "{}").method(&method.to_uppercase()).send().await;
            assert!(![404, 405].contains(&answer.status), "{method} {path}: {}", answer.status);
        }
    }
    for (path, kind) in [("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")] {
        let answer = get(house.address, path).send().await;
        assert!(answer.header("content-type").is_some_and(|found| found.starts_with(kind)), "{path}");
        let policy = answer.header("content-security-policy").expect("a policy");
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
        let text = answer.text();
        assert!(!text.contains("http://") || path == "/app.js", "{path} loads nothing from elsewhere");
        assert!(!text.contains("https://") && !text.contains("innerHTML"), "{path}");
    }
    let status = get(house.address, "/api/status").send().await.json();
    assert_eq!(status["models"][0]["name"], "basho");
    assert_eq!(status["house"]["devices"][0]["replicas"][0]["phase"], "ready");
    let mut events = get(house.address, "/api/events").open().await;
    let mut text = String::new();
    while !text.contains("event: status") {
        let frame =
            tokio::time::timeout(PATIENCE, events.frame()).await.expect("in time").expect("more").expect("whole");
        text.push_str(std::str::from_utf8(frame.data_ref().expect("data")).expect("UTF-8"));
    }
    assert!(text.starts_with("event: log\n") && text.contains("worker_ready"), "{text}");
    house.shut_down().await;
}
