//! What is refused before it begins, and by which name.

use crate::half_sent;
use crate::http_support::Setup;
use crate::http_support::client::{post, raw};
use serde_json::{Value, json};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_by_name() {
    let house = Setup::default().start().await;
    let chat = json!({"model": "basho", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2});
    let completion = json!({"model": "basho", "prompt": "a", "max_tokens": 2});
    let many_biases: serde_json::Map<String, Value> = (0..2000).map(|id| (id.to_string(), json!(1))).collect();
    let schema = |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let deep = (0..50).fold(json!({}), |inner, _| json!({"properties": {"a": inner}}));
    let cases: &[(&str, &Value, Value, u16, &str)] = &[
        ("chat", &chat, json!({"model": "nobody"}), 404, "model"),
        ("chat", &chat, json!({"model": "/etc/passwd"}), 404, "model"),
        ("chat", &chat, json!({"model": 3}), 400, "model"),
        ("chat", &chat, json!({"messages": []}), 400, "messages"),
        ("chat", &chat, json!({"messages": "a"}), 400, "messages"),
        ("chat", &chat, json!({"messages": [{"role": "user", "content": 3}]}), 400, "messages[0].content"),
        ("chat", &chat, json!({"n": 0}), 400, "n"),
        ("chat", &chat, json!({"n": 1_000_000}), 400, "n"),
        ("chat", &chat, json!({"n": -1}), 400, "n"),
        ("chat", &chat, json!({"n": 1.5}), 400, "n"),
        ("chat", &chat, json!({"logprobs": true, "top_logprobs": 200}), 400, "logprobs"),
        ("chat", &chat, json!({"top_logprobs": 2}), 400, "top_logprobs"),
        ("chat", &chat, json!({"temperature": -1}), 400, "temperature"),
        ("chat", &chat, json!({"temperature": "hot"}), 400, "temperature"),
        ("chat", &chat, json!({"temperature": 1e39}), 400, "temperature"),
        ("chat", &chat, json!({"top_p": 2}), 400, "top_p"),
        ("chat", &chat, json!({"min_p": -0.5}), 400, "min_p"),
        ("chat", &chat, json!({"top_k": -7}), 400, "top_k"),
        ("chat", &chat, json!({"repetition_penalty": 0}), 400, "repetition_penalty"),
        ("chat", &chat, json!({"presence_penalty": 1000}), 400, "presence_penalty"),
        ("chat", &chat, json!({"frequency_penalty": -1000}), 400, "frequency_penalty"),
        ("chat", &chat, json!({"max_tokens": 0}), 400, "max_tokens"),
        ("chat", &chat, json!({"max_tokens": 1u64 << 40}), 400, "max_tokens"),
        ("chat", &chat, json!({"min_tokens": 9}), 400, "min_tokens"),
        ("chat", &chat, json!({"stop": vec!["x"; 100]}), 400, "stop"),
        ("chat", &chat, json!({"stop": ["x".repeat(5000)]}), 400, "stop"),
        ("chat", &chat, json!({"stop": vec!["x"; 50_000]}), 400, "stop"),
        ("chat", &chat, json!({"stop": [3]}), 400, "stop[0]"),
        ("chat", &chat, json!({"stop_token_ids": vec![1; 100]}), 400, "stop_token_ids"),
        ("chat", &chat, json!({"logit_bias": {"x": 1}}), 400, "logit_bias"),
        ("chat", &chat, json!({"logit_bias": {"1": 1000}}), 400, "logit_bias"),
        ("chat", &chat, json!({"logit_bias": many_biases}), 400, "logit_bias"),
        ("chat", &chat, json!({"logit_bias": {"1": "a"}}), 400, "logit_bias.1"),
        ("chat", &chat, json!({"seed": "seven"}), 400, "seed"),
        ("chat", &chat, json!({"seed": 1.5}), 400, "seed"),
        ("chat", &chat, json!({"top_p": -0.1}), 400, "top_p"),
        ("chat", &chat, json!({"repetition_penalty": -1}), 400, "repetition_penalty"),
        ("chat", &chat, json!({"stream_options": {"include_usage": 1}}), 400, "stream_options.include_usage"),
        ("chat", &chat, json!({"user": 3}), 400, "user"),
        (
            "chat",
            &chat,
            json!({"response_format": schema(json!({"const": "x".repeat(100_000)}))}),
            400,
            "response_format",
        ),
        ("chat", &chat, json!({"response_format": schema(json!({"enum": vec!["x"; 50_000]}))}), 400, "response_format"),
        ("chat", &chat, json!({"guided_json": {"enum": vec!["x"; 50_000]}}), 400, "response_format"),
        ("chat", &chat, json!({"messages": vec![json!([]); 70_000]}), 400, "messages[65536]"),
        ("chat", &chat, json!({"response_format": schema(deep)}), 400, "response_format"),
        ("chat", &chat, json!({"response_format": {"type": "json_object"}, "ignore_eos": true}), 400, "ignore_eos"),
        ("chat", &chat, json!({"stream": "yes"}), 400, "stream"),
        ("chat", &chat, json!({"response_format": {"type": "xml"}}), 400, "response_format"),
        ("chat", &chat, json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), 501, "tools"),
        ("chat", &chat, json!({"tools": [{"type": "function"}]}), 400, "tools[0]"),
        ("chat", &chat, json!({"tool_choice": "required"}), 400, "tool_choice"),
        ("chat", &chat, json!({"tool_choice": "always"}), 400, "tool_choice"),
        ("chat", &chat, json!({"parallel_tool_calls": "no"}), 400, "parallel_tool_calls"),
        ("chat", &chat, json!({"chat_template_kwargs": {"messages": []}}), 400, "chat_template_kwargs"),
        ("chat", &chat, json!({"continue_final_message": true}), 501, "continue_final_message"),
        ("", &completion, json!({"prompt": []}), 400, "prompt"),
        ("", &completion, json!({"prompt": [1, "a"]}), 400, "prompt"),
        ("", &completion, json!({"prompt": [4_000_000]}), 400, "prompt"),
        ("", &completion, json!({"prompt": vec!["a"; 100]}), 400, "prompt"),
        ("", &completion, json!({"suffix": "b"}), 501, "suffix"),
        ("", &completion, json!({"best_of": 4}), 501, "best_of"),
        ("", &completion, json!({"echo": true, "logprobs": 1}), 501, "echo"),
        ("", &completion, json!({"logprobs": 21}), 400, "logprobs"),
        ("", &completion, json!({"logprobs": -1}), 400, "logprobs"),
        ("", &completion, json!({"prompt": "the moon ".repeat(1000)}), 400, ""),
    ];
    for (kind, base, change, status, param) in cases {
        let mut body = (*base).clone();
        body.as_object_mut().expect("object").extend(change.as_object().expect("object").clone());
        let path = if *kind == "chat" { "/v1/chat/completions" } else { "/v1/completions" };
        let answer = post(house.address, path, &body).send().await;
        let named = answer.error("param").as_str().unwrap_or_default().to_owned();
        assert_eq!((answer.status, named.as_str()), (*status, *param), "{change}: {}", answer.text());
        assert!(answer.error("message").is_string() && answer.error("type").is_string());
    }
    // Of all these none has reached an engine.
    let status = house.client.tree().status().await.expect("alive");
    assert!(status.router.expect("a router").requests.completed == 0);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_bounded_in_every_way() {
    let mut setup = Setup::default();
    setup.settings.limits.body_bytes = 10_000;
    setup.settings.limits.body_timeout = Duration::from_millis(200);
    let house = setup.start().await;
    let path = "/v1/chat/completions";
    let large = raw(house.address, path, format!("{{\"model\": \"{}\"}}", "x".repeat(20_000))).send().await;
    assert_eq!((large.status, large.error("code")), (413, json!("request_too_large")));
    let deep =
        raw(house.address, path, format!("{{\"model\": \"basho\", \"messages\": {}", "[".repeat(9_000))).send().await;
    assert_eq!(deep.status, 400);
    for broken in ["", "{", "[]", "nonsense", "{\"model\": \"basho\", \"messages\": []} trailing", "\u{0}"] {
        let answer = raw(house.address, path, broken.to_owned()).send().await;
        assert_eq!((answer.status, answer.error("type")), (400, json!("invalid_request_error")), "{broken:?}");
    }
    let zipped = raw(house.address, path, "{}").header("content-encoding", "gzip").send().await;
    assert_eq!(zipped.status, 400);
    // Announced and never sent: the front does not wait for ever.
    let slow =
        half_sent(&house, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{").await;
    assert!(slow.starts_with("HTTP/1.1 408"), "{slow}");
    // Chunked, so that no size is announced.
    let chunk = format!("{:x}\r\n{}\r\n", 9_000, "x".repeat(9_000));
    let chunked = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{chunk}{chunk}"
    );
    let chunked = half_sent(&house, &chunked).await;
    assert!(chunked.starts_with("HTTP/1.1 413"), "{chunked}");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_does_not_fit_says_by_how_much() {
    let house = Setup::default().start().await;
    let body = json!({"model": "basho", "prompt": "the moon ".repeat(1000)});
    let answer = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((answer.status, answer.error("type")), (400, json!("exceed_context_size_error")));
    assert_eq!((answer.error("code"), answer.error("n_ctx")), (json!("context_length_exceeded"), json!(256)));
    assert!(answer.error("n_prompt_tokens").as_u64().is_some_and(|n| n > 256), "{}", answer.text());
    house.shut_down().await;
}
