//! What is generated: chats, completions, responses and embeddings, whole and streamed.

use crate::http_support::Setup;
use crate::http_support::client::{chunks_of, post};
use crate::{haiku, house_that_says, text_of};
use serde_json::{Value, json};

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
