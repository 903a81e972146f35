//! The HTTP front over the real supervision tree, with a real client on a real socket: the OpenAI API as its clients
//! read it.

mod http_support;

use http_body_util::BodyExt;
use http_support::client::{chunks_of, get, post, raw};
use http_support::engines::{Counts, Gate, Pace, Speaker};
use http_support::{PATIENCE, Setup, TestHouse, card_with_template};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn haiku(stream: bool) -> Value {
    json!({
        "model": "basho",
        "messages": [{"role": "user", "content": "the moon"}],
        "seed": 7,
        "max_tokens": 40,
        "stream": stream,
    })
}

/// The text of a chat's chunks.
fn text_of(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_the_same_whole_and_streamed() {
    let house = Setup::default().start().await;
    let whole = post(house.address, "/v1/chat/completions", &haiku(false)).send().await;
    assert_eq!(whole.status, 200, "{}", whole.text());
    let whole = whole.json();
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));
    assert_eq!(whole["model"], "basho");
    assert_eq!(whole["system_fingerprint"], "playhouse-0.0.0-test-01234567");
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().expect("text");
    assert!(!text.is_empty() && choice["message"]["role"] == "assistant" && choice["message"]["refusal"].is_null());
    assert!(choice["logprobs"].is_null());
    let usage = &whole["usage"];
    let sum = usage["prompt_tokens"].as_u64().expect("a count") + usage["completion_tokens"].as_u64().expect("a count");
    assert_eq!(usage["total_tokens"], sum);

    let mut streamed = haiku(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = chunks_of(&post(house.address, "/v1/chat/completions", &streamed).events().await);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}), "the role comes first");
    assert_eq!(text_of(&chunks), text, "the same seed gives the same text");
    let (usage_chunk, rest) = chunks.split_last().expect("chunks");
    assert_eq!(usage_chunk["choices"], json!([]));
    assert_eq!(usage_chunk["usage"], *usage);
    assert!(rest.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    let last = rest.last().expect("chunks");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], choice["finish_reason"]);
    assert!(rest[..rest.len() - 1].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk"));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_seeds_and_log_probabilities() {
    let house = Setup::default().start().await;
    let mut body = haiku(false);
    body["n"] = json!(3);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    body["max_tokens"] = json!(6);
    let answer = post(house.address, "/v1/chat/completions", &body).send().await.json();
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(
        choices.iter().map(|choice| choice["index"].clone()).collect::<Vec<_>>(),
        [json!(0), json!(1), json!(2)]
    );
    let mut n_tokens = 0;
    for choice in choices {
        let content = choice["logprobs"]["content"].as_array().expect("log probabilities");
        n_tokens += content.len();
        for entry in content {
            assert!(entry["logprob"].as_f64().is_some_and(|logprob| logprob <= 0.0));
            assert_eq!(entry["top_logprobs"].as_array().map(Vec::len), Some(2));
            let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).expect("bytes");
            assert_eq!(entry["token"], *String::from_utf8_lossy(&bytes));
        }
    }
    assert_eq!(answer["usage"]["completion_tokens"], n_tokens);
    let texts: std::collections::BTreeSet<&str> =
        choices.iter().filter_map(|choice| choice["message"]["content"].as_str()).collect();
    assert!(texts.len() > 1, "choices differ: {texts:?}");

    body["stream"] = json!(true);
    let chunks = chunks_of(&post(house.address, "/v1/chat/completions", &body).events().await);
    for (index, choice) in choices.iter().enumerate() {
        let mine = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let text: String =
            chunks.iter().filter(mine).filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(choice["message"]["content"], text);
        let entries: Vec<Value> = chunks
            .iter()
            .filter(mine)
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(choice["logprobs"]["content"], json!(entries));
    }
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_in_all_their_forms() {
    let house = Setup::default().start().await;
    let ask = async |extra: Value| {
        let mut body = json!({"model": "poet", "prompt": "the moon", "max_tokens": 8, "seed": 3, "temperature": 0});
        body.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        post(house.address, "/v1/completions", &body).send().await
    };
    let plain = ask(json!({})).await.json();
    assert_eq!((&plain["object"], &plain["model"]), (&json!("text_completion"), &json!("basho")));
    assert!(plain["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    let text = plain["choices"][0]["text"].as_str().expect("text").to_owned();
    assert_eq!(
        (&plain["usage"]["completion_tokens"], &plain["choices"][0]["finish_reason"]),
        (&json!(8), &json!("length"))
    );
    let echoed = ask(json!({"echo": true})).await.json();
    assert_eq!(echoed["choices"][0]["text"], format!("the moon{text}"));

    // The same prompt as tokens, and two prompts at once.
    let tokens =
        post(house.address, "/tokenize", &json!({"content": "the moon", "add_special": true})).send().await.json();
    let by_tokens = ask(json!({"prompt": tokens["tokens"]})).await.json();
    assert_eq!(by_tokens["choices"][0]["text"], text.as_str());
    let two = ask(json!({"prompt": ["the moon", "a river"], "n": 2})).await.json();
    let choices = two["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 4);
    assert_eq!(choices[0]["text"], text.as_str());
    assert_ne!(choices[2]["text"], text.as_str());

    let logprobs = ask(json!({"logprobs": 3})).await.json()["choices"][0]["logprobs"].clone();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().map(Vec::len), Some(8), "{list}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
    let joined: String = logprobs["tokens"].as_array().expect("list").iter().filter_map(Value::as_str).collect();
    assert!(joined.contains(text.trim()), "{joined:?} {text:?}");

    let events = post(
        house.address,
        "/v1/completions",
        &json!({"model": "basho", "prompt": "the moon", "max_tokens": 8, "seed": 3, "temperature": 0, "stream": true, "echo": true}),
    );
    let chunks = chunks_of(&events.events().await);
    let streamed: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(streamed, format!("the moon{text}"));
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");

    // A stop string ends the text before it, and is named.
    let word = text.split_whitespace().nth(1).expect("two words");
    let stopped = ask(json!({"stop": [word]})).await.json();
    assert_eq!(
        (&stopped["choices"][0]["finish_reason"], &stopped["choices"][0]["stop_reason"]),
        (&json!("stop"), &json!(word))
    );
    assert!(text.starts_with(stopped["choices"][0]["text"].as_str().expect("text")));
    house.shut_down().await;
}

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

/// Sends these bytes and nothing more; what comes back until the front hangs up or has answered.
async fn half_sent(house: &TestHouse, bytes: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(house.address).await.expect("the front listens");
    socket.write_all(bytes.as_bytes()).await.expect("sent");
    let mut answer = vec![0; 4096];
    let n = tokio::time::timeout(PATIENCE, socket.read(&mut answer)).await.expect("in time").unwrap_or(0);
    String::from_utf8_lossy(&answer[..n]).into_owned()
}

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
async fn names_origins_and_ids() {
    let house = Setup::default().start().await;
    let at = house.address;
    let status = async |name: &str, value: &str| get(at, "/health").header(name, value).send().await.status;
    assert_eq!(status("host", "localhost:7070").await, 200);
    assert_eq!(status("host", "[::1]:7070").await, 200);
    assert_eq!(status("host", "moon.example").await, 403, "a rebound name");
    assert_eq!(status("origin", "https://moon.example").await, 403, "a page of somebody else");
    assert_eq!(status("origin", &format!("http://{at}")).await, 200, "our own page");
    assert_eq!(status("origin", "null").await, 403);
    let echoed = get(at, "/health").header("x-request-id", "mine-1").send().await;
    assert_eq!(echoed.header("x-request-id"), Some("mine-1"));
    let made = get(at, "/health").send().await;
    assert!(made.header("x-request-id").is_some_and(|id| id.starts_with("req-")));
    assert_eq!(made.header("access-control-allow-origin"), None);
    house.shut_down().await;

    let mut setup = Setup::default();
    setup.settings.cors_origins = vec!["https://moon.example".into()];
    setup.settings.allowed_hosts = vec!["house.example".into()];
    let house = setup.start().await;
    let allowed =
        get(house.address, "/health").header("origin", "https://moon.example").header("host", "house.example");
    let answer = allowed.send().await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, Some("https://moon.example")));
    let asked = get(house.address, "/v1/models").method("OPTIONS").header("origin", "https://moon.example");
    let asked = asked.header("access-control-request-method", "POST").send().await;
    assert_eq!((asked.status, asked.header("access-control-allow-methods")), (200, Some("*")));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for_before_the_body() {
    let mut setup = Setup::default();
    setup.settings.api_keys = ["sk-moon", "sk-river"].into_iter().collect();
    setup.settings.admin_keys = ["sk-admin"].into_iter().collect();
    let house = setup.start().await;
    let at = house.address;
    for open in ["/health", "/health/live", "/health/ready", "/openapi.json", "/"] {
        assert_eq!(get(at, open).send().await.status, 200, "{open} needs no key");
    }
    for closed in ["/v1/models", "/metrics", "/api/status", "/version", "/models"] {
        let answer = get(at, closed).send().await;
        assert_eq!((answer.status, answer.error("code")), (401, json!("invalid_api_key")), "{closed}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(get(at, closed).header("authorization", "Bearer sk-moon").send().await.status, 200, "{closed}");
        assert_eq!(get(at, closed).header("x-api-key", "sk-river").send().await.status, 200, "{closed}");
        assert_eq!(get(at, closed).header("authorization", "Bearer SK-MOON").send().await.status, 401, "{closed}");
        assert_eq!(get(at, closed).header("authorization", "Basic sk-moon").send().await.status, 401, "{closed}");
    }
    // The answer comes although the body never does.
    let unsent = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n";
    assert!(half_sent(&house, unsent).await.starts_with("HTTP/1.1 401"));
    let load = post(at, "/models/load", &json!({"model": "basho"}));
    assert_eq!(load.clone().send().await.status, 401);
    assert_eq!(load.clone().header("authorization", "Bearer sk-moon").send().await.status, 403);
    assert_eq!(load.clone().header("authorization", "Bearer sk-admin").send().await.json(), json!({"success": true}));
    let unload = post(at, "/models/unload", &json!({"model": "../basho"})).header("authorization", "Bearer sk-admin");
    assert_eq!(unload.send().await.status, 404, "models are named by the configuration");
    assert_eq!(*house.control.calls.lock().expect("not poisoned"), ["load basho"]);
    house.shut_down().await;

    let house = Setup::default().start().await;
    let load = post(house.address, "/models/load", &json!({"model": "basho"}));
    assert_eq!(load.send().await.status, 403, "without an admin key only the socket may");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_socket_needs_no_key() {
    let mut setup = Setup::default();
    setup.settings.api_keys = ["sk-moon"].into_iter().collect();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    setup.unix = Some(tokio::net::UnixListener::bind(&path).expect("a socket"));
    let house = setup.start().await;
    let socket = tokio::net::UnixStream::connect(&path).await.expect("it listens");
    let unload = post(house.address, "/models/unload", &json!({"model": "basho"})).over(socket).await;
    assert_eq!(unload.status(), 200);
    assert_eq!(*house.control.calls.lock().expect("not poisoned"), ["unload basho"]);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_request() {
    let (gate, counts) = (Arc::new(Gate::default()), Counts::default());
    let (pace, seen) = (Pace::Permits(gate.clone()), counts.clone());
    let setup = Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, pace.clone(), seen.clone())));
    let house = setup.start().await;
    for stream in [true, false] {
        let before = counts.cancelled.load(Ordering::SeqCst);
        let body = json!({"model": "basho", "prompt": "a", "max_tokens": 1000, "stream": stream});
        let call = post(house.address, "/v1/completions", &body);
        if stream {
            gate.give(3);
            let mut response = call.open().await;
            assert!(response.frame().await.is_some());
            drop(response);
        } else {
            // An answer that is not streamed has nothing to show yet: the client hangs up while it waits.
            let waiting = tokio::spawn(call.open());
            house
                .wait("running", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 1))
                .await;
            waiting.abort();
        }
        house.wait("free", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 0)).await;
        let is_cancelled = || counts.cancelled.load(Ordering::SeqCst) == before + 1;
        house.wait("idle", |_| is_cancelled() && counts.running.load(Ordering::SeqCst) == 0).await;
    }
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_filled_with_comments_and_a_death_with_patience() {
    let gate = Arc::new(Gate::default());
    let pace = Pace::Permits(gate.clone());
    let mut setup =
        Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, pace.clone(), Counts::default())));
    setup.settings.keep_alive = Duration::from_millis(50);
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 4, "stream": true});
    gate.give(1);
    let mut response = post(house.address, "/v1/completions", &body).open().await;
    let mut text = String::new();
    let mut killed = false;
    while let Some(frame) = tokio::time::timeout(PATIENCE, response.frame()).await.expect("in time") {
        text.push_str(
            std::str::from_utf8(frame.expect("whole").data_ref().expect("data")).expect("no character is cut"),
        );
        if text.contains(": ping\n\n") && !killed {
            killed = true;
            house.kill_worker();
            gate.give(100);
        }
    }
    let chunks = chunks_of(&http_support::client::events_of(&text));
    let n_texts =
        chunks.iter().filter(|chunk| chunk["choices"][0]["text"].as_str().is_some_and(|t| !t.is_empty())).count();
    assert!(killed && n_texts > 0, "{text}");
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    assert_eq!(house.started.load(Ordering::SeqCst), 2, "a second worker went on");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_status_before_the_stream_and_an_event_in_it() {
    let gate = Arc::new(Gate::default());
    let pace = Pace::Permits(gate.clone());
    let mut setup =
        Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, pace.clone(), Counts::default())));
    setup.config.host.limits.request_timeout = Duration::from_millis(300);
    let house = setup.start().await;
    let body = |stream: bool| json!({"model": "basho", "prompt": "a", "max_tokens": 100, "stream": stream});
    for stream in [false, true] {
        let late = post(house.address, "/v1/completions", &body(stream)).send().await;
        assert_eq!((late.status, late.error("code")), (504, json!("deadline_exceeded")), "stream: {stream}");
    }
    gate.give(2);
    let events = post(house.address, "/v1/completions", &body(true)).events().await;
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let error: Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
    assert_eq!(error["error"]["code"], "deadline_exceeded");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_at_two_deaths_is_poison() {
    let pace = Pace::Permits(Arc::new(Gate::default()));
    let setup =
        Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, pace.clone(), Counts::default())));
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 10});
    let asked = tokio::spawn(post(house.address, "/v1/completions", &body).send());
    for death in 1..=2 {
        house
            .wait("asked", |status| {
                let replica = &status.devices[0].replicas[0];
                replica.incarnation == death && status.is_ready() && replica.running == 1
            })
            .await;
        house.kill_worker();
    }
    let poisoned = asked.await.expect("no panic");
    assert_eq!((poisoned.status, poisoned.error("code")), (422, json!("poison_request")));
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

/// Characters of several tokens come whole, in every form of answer.
#[tokio::test(flavor = "multi_thread")]
async fn no_chunk_ends_inside_of_a_character() {
    let text = "月は🌙夜";
    let house = house_that_says(text, "{% for m in messages %}{{ m.content }}{% endfor %}").await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 100, "stream": true});
    let chunks = chunks_of(&post(house.address, "/v1/completions", &body).events().await);
    let pieces: Vec<&str> = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
    assert_eq!(pieces.concat().trim(), text);
    assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 1, "more than one chunk: {pieces:?}");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_share_of_connections_whatever_it_says_of_itself() {
    let gate = Arc::new(Gate::default());
    let pace = Pace::Permits(gate.clone());
    let mut setup =
        Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, pace.clone(), Counts::default())));
    setup.settings.limits.connections_per_ip = 2;
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 3});
    let asked: Vec<_> = (1..=2)
        .map(|n: u32| {
            let forwarded = format!("192.0.2.{n}");
            let call = post(house.address, "/v1/completions", &body).header("x-forwarded-for", &forwarded);
            tokio::spawn(call.send())
        })
        .collect();
    house.wait("asked", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 2)).await;
    // Each of the two said that it was somebody else. The third is answered before it says anything.
    let refused = half_sent(&house, "");
    assert!(refused.await.starts_with("HTTP/1.1 429"));
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.2:0".parse().expect("an address")).expect("Linux has all of 127.0.0.0/8");
    let other = get(house.address, "/health").header("x-forwarded-for", "127.0.0.1");
    let other = other.over(socket.connect(house.address).await.expect("it listens")).await;
    assert_eq!(other.status(), 200, "another address has its own share");
    gate.give(100);
    for answer in asked {
        assert_eq!(answer.await.expect("no panic").status, 200);
    }
    assert_eq!(get(house.address, "/health").send().await.status, 200);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_its_share_of_requests_and_tokens() {
    let mut setup = Setup::default();
    setup.settings.api_keys = ["sk-requests", "sk-tokens"].into_iter().collect();
    setup.settings.admin_keys = ["sk-admin"].into_iter().collect();
    setup.settings.per_key.requests_per_minute = Some(3);
    setup.settings.per_key.tokens_per_minute = Some(200);
    let house = setup.start().await;
    let ask = async |key: &str, path: &str, body: Value| {
        post(house.address, path, &body).header("authorization", &format!("Bearer {key}")).send().await
    };
    let complete = |n: u32| json!({"model": "basho", "prompt": "a", "max_tokens": n, "ignore_eos": true});
    for _ in 0..2 {
        assert_eq!(ask("sk-requests", "/v1/completions", complete(1)).await.status, 200);
    }
    let embed = json!({"model": "basho", "input": "a"});
    assert_eq!(ask("sk-requests", "/v1/embeddings", embed.clone()).await.status, 200);
    for (path, body) in [("/v1/completions", complete(1)), ("/v1/embeddings", embed)] {
        let refused = ask("sk-requests", path, body).await;
        assert_eq!((refused.status, refused.error("type")), (429, json!("rate_limit_error")), "{path}");
        let after: u64 = refused.header("retry-after").and_then(|after| after.parse().ok()).expect("a time");
        assert!((1..=20).contains(&after), "a third of a minute: {after}");
    }
    assert_eq!(ask("sk-tokens", "/v1/completions", complete(220)).await.status, 200, "what has begun is finished");
    let refused = ask("sk-tokens", "/v1/completions", complete(1)).await;
    assert_eq!(refused.status, 429);
    assert!(refused.error("message").as_str().is_some_and(|message| message.contains("200 tokens")));
    for _ in 0..5 {
        assert_eq!(ask("sk-admin", "/v1/completions", complete(1)).await.status, 200, "admins have no such bounds");
    }
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_loading_and_draining_say_when_to_come_back() {
    let gate = Arc::new(Gate::default());
    let pace = Pace::Permits(gate.clone());
    let mut setup =
        Setup::default().engine(move || Box::new(Speaker::new(vec![300], false, pace.clone(), Counts::default())));
    setup.config.host.limits.queued_requests = 1;
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let (inner, opened) = (setup.loader.clone(), std::sync::Mutex::new(opened));
    setup.loader = Arc::new(move |spec| {
        let _ = opened.lock().expect("not poisoned").recv_timeout(PATIENCE);
        inner(spec)
    });
    let house = setup.start_unready().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 10});
    let loading = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((loading.status, loading.error("type")), (503, json!("unavailable_error")));
    assert!(loading.header("retry-after").is_some_and(|after| after.parse::<u64>().is_ok_and(|s| s >= 1)));
    assert_eq!(get(house.address, "/health").send().await.status, 503);
    assert_eq!(get(house.address, "/health/live").send().await.status, 200);
    assert_eq!(get(house.address, "/models").send().await.json()["data"][0]["status"]["value"], "loading");
    open.send(()).expect("the loader waits");
    house.wait_ready().await;
    let first = tokio::spawn(post(house.address, "/v1/completions", &body).send());
    house.wait("busy", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 1)).await;
    let busy = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((busy.status, busy.error("type")), (429, json!("rate_limit_error")));
    assert!(busy.header("retry-after").is_some());
    gate.give(100);
    assert_eq!(first.await.expect("no panic").status, 200);
    house.client.tree().drain(Duration::ZERO).await;
    let draining = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((draining.status, draining.error("code")), (503, json!("draining")));
    assert_eq!(get(house.address, "/health/ready").send().await.status, 503);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_are_held_to_their_form() {
    let house = Setup::default().start().await;
    let schema = json!({
        "type": "object",
        "properties": {"season": {"enum": ["spring", "autumn"]}},
        "required": ["season"],
        "additionalProperties": false,
    });
    let mut body = haiku(false);
    body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "season", "schema": schema}});
    let answer = post(house.address, "/v1/chat/completions", &body).send().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let text = answer.json()["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
    let value: Value = serde_json::from_str(&text).expect("it is JSON");
    assert!(value == json!({"season": "spring"}) || value == json!({"season": "autumn"}), "{text}");
    let completion = json!({"model": "basho", "prompt": "the moon", "guided_regex": "(snow|rain)", "max_tokens": 20});
    let text = post(house.address, "/v1/completions", &completion).send().await.json()["choices"][0]["text"].clone();
    assert!(text == "snow" || text == "rain", "{text}");
    body["response_format"]["json_schema"]["schema"] = json!({"type": "moon"});
    let wrong = post(house.address, "/v1/chat/completions", &body).send().await;
    assert_eq!((wrong.status, wrong.error("param")), (400, json!("response_format")));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn responses_whole_and_streamed() {
    let house = Setup::default().start().await;
    let mut body = json!({"model": "basho", "input": "the moon", "seed": 7, "max_output_tokens": 5});
    let whole = post(house.address, "/v1/responses", &body).send().await.json();
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(whole["incomplete_details"]["reason"], "max_output_tokens");
    let text = whole["output"][0]["content"][0]["text"].as_str().expect("text");
    assert_eq!(whole["usage"]["output_tokens"], 5);
    body["stream"] = json!(true);
    let streamed = post(house.address, "/v1/responses", &body).send().await;
    let events: Vec<Value> = streamed
        .text()
        .split("\n\n")
        .filter_map(|event| event.split_once("data: "))
        .map(|(_, data)| serde_json::from_str(data).expect("JSON"))
        .collect();
    let kinds: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!(
        kinds[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    assert_eq!(kinds.last(), Some(&"response.incomplete"));
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(deltas, text);
    assert!(events.iter().enumerate().all(|(at, event)| event["sequence_number"] == at));
    assert_eq!(events.last().expect("events")["response"]["output"][0]["content"][0]["text"], text);
    body["previous_response_id"] = json!("resp_1");
    assert_eq!(post(house.address, "/v1/responses", &body).send().await.status, 501);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_have_length_one_in_both_encodings() {
    use base64::Engine as _;
    let house = Setup::default().start().await;
    let ask = async |extra: Value| {
        let mut body = json!({"model": "basho", "input": ["the moon", "a river"]});
        body.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        post(house.address, "/v1/embeddings", &body).send().await
    };
    let plain = ask(json!({})).await.json();
    let values: Vec<f32> = serde_json::from_value(plain["data"][0]["embedding"].clone()).expect("numbers");
    assert!((values.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-4);
    assert_ne!(plain["data"][0]["embedding"], plain["data"][1]["embedding"]);
    let coded = ask(json!({"encoding_format": "base64"})).await.json();
    let bytes = base64::engine::general_purpose::STANDARD.decode(coded["data"][0]["embedding"].as_str().expect("text"));
    let decoded: Vec<f32> =
        bytes.expect("base64").chunks(4).map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect();
    assert_eq!(decoded, values);
    assert_eq!(ask(json!({"dimensions": 8})).await.status, 501);
    assert_eq!(ask(json!({"encoding_format": "moon"})).await.error("param"), "encoding_format");
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

/// A house whose model says this text, with this chat template.
async fn house_that_says(text: &str, template: &str) -> TestHouse {
    let card = card_with_template("basho", template);
    let options = playhouse::text::EncodeOptions { add_special: false, parse_special: false };
    let script = card.tokenizer.encode(text, options).expect("tokens");
    let mut setup =
        Setup::default().engine(move || Box::new(Speaker::new(script.clone(), true, Pace::Free, Counts::default())));
    setup.cards = vec![card];
    setup.start().await
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_tools_whole_and_streamed() {
    let says = "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Edo\"}}\n</tool_call>";
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}<tool_call>{{ tools }}{% endif %}";
    let house = house_that_says(says, template).await;
    let mut body = haiku(false);
    body["tools"] = json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
    body["tool_choice"] = json!("auto");
    body["max_tokens"] = json!(200);
    let answer = post(house.address, "/v1/chat/completions", &body).send().await.json();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Let me see."))
    );
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "weather", "arguments": "{\"city\":\"Edo\"}"}));
    assert!(call["type"] == "function" && call["id"].as_str().is_some_and(|id| id.starts_with("call_")));

    body["stream"] = json!(true);
    let chunks = chunks_of(&post(house.address, "/v1/chat/completions", &body).events().await);
    assert_eq!(text_of(&chunks), "Let me see.");
    let calls: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0])
        .filter(|call| !call.is_null())
        .collect();
    assert_eq!((&calls[0]["index"], &calls[0]["function"]["name"]), (&json!(0), &json!("weather")));
    let arguments: String = calls.iter().filter_map(|call| call["function"]["arguments"].as_str()).collect();
    assert_eq!(arguments, "{\"city\":\"Edo\"}");
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "tool_calls");
    house.shut_down().await;
}

/// A model that would go on for ever: after the one call that it may have its text ends, and its request with it.
#[tokio::test(flavor = "multi_thread")]
async fn without_parallel_calls_a_text_ends_with_its_first() {
    let tagged = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Edo\"}}\n</tool_call>";
    let bare = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Edo\"}}";
    let harmony = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\":\"Edo\"}<|end|>";
    let marks = [
        ("{# <tool_call> #}", tagged),
        ("{# \"name\" \"parameters\" #}", bare),
        ("{# <|channel|> <|message|> #}", harmony),
    ];
    for (mark, says) in marks {
        let mut card = card_with_template("basho", &format!("{mark}{TALK}"));
        Arc::get_mut(&mut card).expect("nobody else has it").context = u32::MAX;
        let options = playhouse::text::EncodeOptions { add_special: false, parse_special: false };
        let script = card.tokenizer.encode(says, options).expect("tokens");
        let n_tokens = script.len() as u64;
        let counts = Counts::default();
        let seen = counts.clone();
        let mut setup =
            Setup::default().engine(move || Box::new(Speaker::new(script.clone(), false, Pace::Free, seen.clone())));
        setup.cards = vec![card];
        let house = setup.start().await;
        let mut body = asking_for_weather(json!("auto"));
        body["parallel_tool_calls"] = json!(false);
        body["max_tokens"] = json!(1_000_000_000);
        body["n"] = json!(2);
        let whole = post(house.address, "/v1/chat/completions", &body).send().await.json();
        for choice in whole["choices"].as_array().expect("choices") {
            assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
            let calls = choice["message"]["tool_calls"].as_array().expect("calls");
            assert_eq!((calls.len(), &calls[0]["function"]["arguments"]), (1, &json!("{\"city\":\"Edo\"}")), "{mark}");
        }
        assert_eq!(whole["usage"]["completion_tokens"], 2 * n_tokens, "{mark}: what was read, and no more");

        body["n"] = json!(1);
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let chunks = chunks_of(&post(house.address, "/v1/chat/completions", &body).events().await);
        let [.., last, usage] = chunks.as_slice() else { panic!("{chunks:?}") };
        assert_eq!(last["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(usage["usage"]["completion_tokens"], n_tokens, "{mark}");

        let flat = json!({"type": "function", "name": "weather", "parameters": {"type": "object"}});
        let body = json!({"model": "basho", "input": "a", "tools": [flat], "parallel_tool_calls": false});
        let response = post(house.address, "/v1/responses", &body).send().await.json();
        assert_eq!(
            (&response["status"], &response["output"][0]["type"]),
            (&json!("completed"), &json!("function_call"))
        );
        assert_eq!(response["usage"]["output_tokens"], n_tokens, "{mark}");

        // All four texts were cancelled, and none is still made.
        house
            .wait("free", |status| {
                let is_free = status.router.as_ref().is_some_and(|router| router.services[0].open_requests == 0);
                is_free && counts.running.load(Ordering::SeqCst) == 0
            })
            .await;
        assert_eq!(counts.cancelled.load(Ordering::SeqCst), 4, "{mark}");
        house.shut_down().await;
    }
}

/// The conversation, and nothing of the tools: the embedded model's context is short, and it would not read them.
const TALK: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}\n{% endif %}";

fn asking_for_weather(choice: Value) -> Value {
    let weather = json!({
        "type": "object",
        "properties": {"city": {"enum": ["Edo", "Nara"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    let clock = json!({"type": "object", "properties": {}, "additionalProperties": false});
    let mut body = haiku(false);
    body["max_tokens"] = json!(200);
    body["tools"] = json!([
        {"type": "function", "function": {"name": "weather", "parameters": weather}},
        {"type": "function", "function": {"name": "clock", "parameters": clock}},
    ]);
    body["tool_choice"] = choice;
    body
}

/// Name and arguments, if they are as the tools' schemas say.
fn checked_call(call: &Value) -> (String, String) {
    let name = call["function"]["name"].as_str().expect("a name").to_owned();
    let arguments = call["function"]["arguments"].as_str().expect("arguments").to_owned();
    let read: Value = serde_json::from_str(&arguments).unwrap_or_else(|error| panic!("{error}: {arguments}"));
    match name.as_str() {
        "weather" => {
            assert!(["Edo", "Nara"].contains(&read["city"].as_str().expect("a text")), "{arguments}");
            assert!((1..=3).contains(&read["days"].as_u64().expect("a number")), "{arguments}");
            assert_eq!(read.as_object().map(serde_json::Map::len), Some(2), "{arguments}");
        }
        "clock" => assert_eq!(read, json!({})),
        other => panic!("there is no tool {other}"),
    }
    (name, arguments)
}

/// The real engine and a model that knows nothing of tools: what holds it to a call is the grammar.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_call_is_a_call_in_every_syntax_whole_and_streamed() {
    let marks = ["{# <tool_call> #}", "{# \"name\" \"parameters\" #}", "{# <|channel|> <|message|> #}"];
    for mark in marks {
        let setup = Setup { cards: vec![card_with_template("basho", &format!("{TALK}{mark}"))], ..Setup::default() };
        let house = setup.start().await;
        let named = json!({"type": "function", "function": {"name": "weather"}});
        for (choice, parallel) in [(json!("required"), None), (json!("required"), Some(false)), (named, None)] {
            let is_named = choice.is_object();
            for seed in 0..3 {
                let mut body = asking_for_weather(choice.clone());
                body["seed"] = json!(seed);
                if let Some(parallel) = parallel {
                    body["parallel_tool_calls"] = json!(parallel);
                }
                let whole = post(house.address, "/v1/chat/completions", &body).send().await;
                assert_eq!(whole.status, 200, "{}", whole.text());
                let whole = whole.json();
                let choice = &whole["choices"][0];
                assert_eq!(choice["finish_reason"], "tool_calls", "{mark} {whole}");
                assert!(choice["message"]["content"].is_null(), "{mark} {whole}");
                let calls: Vec<_> =
                    choice["message"]["tool_calls"].as_array().expect("calls").iter().map(checked_call).collect();
                assert!(!is_named || calls.iter().all(|(name, _)| name == "weather"), "{whole}");
                assert!(!calls.is_empty() && (calls.len() == 1 || (parallel.is_none() && !is_named)), "{whole}");

                body["stream"] = json!(true);
                let chunks = chunks_of(&post(house.address, "/v1/chat/completions", &body).events().await);
                let deltas = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].get(0));
                let mut streamed: Vec<(String, String)> = Vec::new();
                for delta in deltas {
                    let at = delta["index"].as_u64().expect("an index") as usize;
                    if at == streamed.len() {
                        streamed.push((delta["function"]["name"].as_str().expect("a name").into(), String::new()));
                    }
                    streamed[at].1.push_str(delta["function"]["arguments"].as_str().unwrap_or_default());
                }
                assert_eq!(streamed, calls, "the same seed gives the same calls");
                assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "tool_calls");
            }
        }
        house.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn choices_of_tools_besides() {
    let template = format!("{TALK}{{# <tool_call> #}}");
    let setup = Setup { cards: vec![card_with_template("basho", &template)], ..Setup::default() };
    let house = setup.start().await;
    let ask = async |body: Value| post(house.address, "/v1/chat/completions", &body).send().await;
    let none = ask(asking_for_weather(json!("none"))).await.json();
    let mut plain = asking_for_weather(Value::Null);
    plain.as_object_mut().expect("object").remove("tools");
    let without = ask(plain).await.json();
    let text = |answer: &Value| answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned();
    assert_eq!(text(&none), text(&without), "the template is not told of the tools");

    let mut both = asking_for_weather(json!("required"));
    both["response_format"] = json!({"type": "json_object"});
    let mut bad = asking_for_weather(json!("required"));
    bad["tools"][0]["function"]["parameters"] = json!({"type": "moon"});
    let mut large = asking_for_weather(json!("required"));
    large["tools"][0]["function"]["parameters"] = json!({"const": "x".repeat(100_000)});
    let missing = asking_for_weather(json!({"type": "function", "function": {"name": "moon"}}));
    for (body, param) in [(both, "tool_choice"), (bad, "tools"), (large, "tools"), (missing, "tool_choice")] {
        let refused = ask(body).await;
        assert_eq!((refused.status, refused.error("param")), (400, json!(param)), "{}", refused.text());
    }
    // The newer form, which nests tools less deeply.
    let tool = json!({"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Edo"]}}, "required": ["city"], "additionalProperties": false}});
    let choice = json!({"type": "function", "name": "weather"});
    let body = json!({"model": "basho", "input": "the moon", "tools": [tool], "tool_choice": choice, "parallel_tool_calls": false});
    let answer = post(house.address, "/v1/responses", &body).send().await.json();
    let item = &answer["output"][0];
    assert_eq!((&item["type"], &item["name"]), (&json!("function_call"), &json!("weather")), "{answer}");
    assert_eq!(item["arguments"], "{\"city\":\"Edo\"}");
    assert_eq!((&answer["tool_choice"], &answer["parallel_tool_calls"]), (&choice, &json!(false)));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn harmony_is_split_into_thoughts_and_answer() {
    let says =
        "<|channel|>analysis<|message|>A moon, then.<|end|><|start|>assistant<|channel|>final<|message|>the moon";
    let template = "{# <|channel|> <|message|> #}{% for m in messages %}{{ m.content }}{% endfor %}";
    let house = house_that_says(says, template).await;
    let body = json!({"model": "basho", "messages": [{"role": "user", "content": "a"}]});
    let answer = post(house.address, "/v1/chat/completions", &body).send().await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("A moon, then."), &json!("the moon")));
    assert!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().is_some_and(|n| n > 0));
    let mut body = body;
    body["stream"] = json!(true);
    let chunks = chunks_of(&post(house.address, "/v1/chat/completions", &body).events().await);
    let thoughts: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["reasoning_content"].as_str()).collect();
    assert_eq!((thoughts.as_str(), text_of(&chunks).as_str()), ("A moon, then.", "the moon"));
    house.shut_down().await;
}
