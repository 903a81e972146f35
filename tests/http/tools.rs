//! Calls of tools and thoughts, by what models write.

use crate::http_support::client::{chunks_of, post};
use crate::http_support::engines::{Counts, Pace, Speaker};
use crate::http_support::{Setup, card_with_template};
use crate::{haiku, house_that_says, text_of};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
