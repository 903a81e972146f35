//! `POST /v1/responses`: OpenAI's newer form of a chat. Text in and out, calls of functions, nothing kept: a response
//! cannot be asked for again, and none goes on from another.
//!
//! An answer is a list of items, reasoning, message or call; a stream tells when each begins, grows and ends. Whole
//! answers are made by the same machine with nobody listening.

use super::super::App;
use super::super::body::Json;
use super::super::bounded::{self, Object, Tree, Trees};
use super::super::error::ApiError;
use super::super::guard::Shown;
use super::super::id;
use super::super::sse::{self, Chunks, Running};
use super::answer::{Usage, finish_reason, key_place, unix};
use super::chat::{choices, refused, request};
use super::choice::{ChatChoice, Delta};
use super::request::ChatBody;
use crate::client::{Event, TokenStream};
use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::{self, Deserializer};
use serde_json::{Map, Value, json};
use std::time::SystemTime;

/// The body.
#[derive(Debug, Deserialize)]
pub(in crate::http) struct ResponseBody {
    model: String,
    input: Input,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    stream: Option<bool>,
    tools: Option<Trees>,
    tool_choice: Option<Tree>,
    parallel_tool_calls: Option<bool>,
    text: Option<TextOptions>,
    reasoning: Option<Reasoning>,
    previous_response_id: Option<String>,
    background: Option<bool>,
    metadata: Option<Object>,
}

#[derive(Debug)]
enum Input {
    Text(String),
    Items(Vec<Value>),
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Tree::deserialize(deserializer)?.0 {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(items) => Ok(Self::Items(items)),
            _ => Err(de::Error::custom("expected a text or a list of items")),
        }
    }
}

#[derive(Debug, Deserialize)]
struct TextOptions {
    format: Option<Tree>,
}

#[derive(Debug, Deserialize)]
struct Reasoning {
    effort: Option<String>,
}

/// The endpoint.
pub(in crate::http) async fn responses(
    State(app): State<App>,
    shown: Option<Extension<Shown>>,
    Json(body): Json<ResponseBody>,
) -> Result<Response, ApiError> {
    let handle = app.client.model(&body.model)?;
    let card = handle.card().clone();
    let place = key_place(&app, shown)?;
    let streams = body.stream.unwrap_or(false);
    let echo = Echo::of(&body);
    let mut chat = as_chat(body)?;
    let (request, spoken) = request(&mut chat, &card)?;
    let mut meter = app.metrics.request(&card.name, request.generate.n, request.generate.max_tokens);
    let stream = match handle.chat(request).await {
        Ok(stream) => stream,
        Err(error) => {
            meter.refused();
            return Err(refused(error, spoken.is_forced));
        }
    };
    let n_prompt = stream.prompt().len() as u64;
    meter.accepted(n_prompt);
    app.log_prompt(&handle, &stream);
    let choice = choices(&card, spoken, &stream).swap_remove(0);
    let running = Running::new(meter, place, app.settings.keep_alive, n_prompt);
    let items = Items::new(&card.name, choice, n_prompt, echo);
    if streams {
        return sse::respond(stream, items, running).await;
    }
    Ok(axum::Json(collect(items, stream, running).await?).into_response())
}

async fn collect(mut items: Items, mut stream: TokenStream, mut running: Running) -> Result<Value, ApiError> {
    let mut unheard = Vec::new();
    while let Some(event) = stream.next().await {
        running.event(&event);
        items.event(&event, &mut unheard)?;
        unheard.clear();
    }
    Ok(items.response(items.status()))
}

/// What a response repeats of its request.
struct Echo {
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    tools: Vec<Value>,
    tool_choice: Value,
    parallel_tool_calls: bool,
    metadata: Map<String, Value>,
}

impl Echo {
    fn of(body: &ResponseBody) -> Self {
        Self {
            instructions: body.instructions.clone(),
            max_output_tokens: body.max_output_tokens,
            temperature: body.temperature,
            top_p: body.top_p,
            tools: body.tools.as_ref().map(|tools| tools.0.clone()).unwrap_or_default(),
            tool_choice: body.tool_choice.as_ref().map_or_else(|| "auto".into(), |choice| choice.0.clone()),
            parallel_tool_calls: body.parallel_tool_calls.unwrap_or(true),
            metadata: body.metadata.as_ref().map(|metadata| metadata.0.clone()).unwrap_or_default(),
        }
    }
}

/// The same request in the older form.
fn as_chat(body: ResponseBody) -> Result<ChatBody, ApiError> {
    if body.previous_response_id.is_some() {
        let message = "responses are not kept: send the whole conversation as `input`";
        return Err(ApiError::not_supported("previous_response_id", message));
    }
    if body.background.unwrap_or(false) {
        return Err(ApiError::not_supported("background", "`background` is not supported"));
    }
    let mut messages: Vec<Value> = Vec::new();
    if let Some(instructions) = body.instructions {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    match body.input {
        Input::Text(text) => messages.push(json!({ "role": "user", "content": text })),
        Input::Items(items) => {
            for (at, item) in items.into_iter().enumerate() {
                messages.extend(message(at, item)?);
            }
        }
    }
    let tools: Option<Vec<Value>> = body.tools.map(|tools| tools.0.into_iter().map(nested).collect());
    let chat = json!({
        "model": body.model,
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "tools": tools,
        "tool_choice": body.tool_choice.map(|choice| choice.0),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": body.text.and_then(|text| text.format).map(|format| format.0),
        "reasoning_effort": body.reasoning.and_then(|reasoning| reasoning.effort),
    });
    serde_json::from_value(chat).map_err(|error| {
        let message = error.to_string();
        let (message, _) = bounded::read_refusal(&message).unwrap_or((&message, None));
        ApiError::param("text.format", message)
    })
}

/// An item as a message; reasoning of earlier turns is left out, as the models' makers advise.
fn message(at: usize, item: Value) -> Result<Option<Value>, ApiError> {
    let kind = item.get("type").and_then(Value::as_str).unwrap_or("message");
    match kind {
        "message" => Ok(Some(item)),
        "reasoning" => Ok(None),
        "function_call" => {
            let function = json!({ "name": item["name"], "arguments": item["arguments"] });
            let call = json!({ "id": item["call_id"], "type": "function", "function": function });
            Ok(Some(json!({ "role": "assistant", "content": null, "tool_calls": [call] })))
        }
        "function_call_output" => {
            Ok(Some(json!({ "role": "tool", "tool_call_id": item["call_id"], "content": item["output"] })))
        }
        _ => {
            let shown: String = kind.chars().take(40).collect();
            Err(ApiError::not_supported(&format!("input[{at}]"), format!("items of type `{shown}` are not supported")))
        }
    }
}

/// `{"type": "function", "name": ...}` as `{"type": "function", "function": {"name": ...}}`.
fn nested(tool: Value) -> Value {
    match tool {
        Value::Object(mut fields) if !fields.contains_key("function") => {
            let kind = fields.remove("type").unwrap_or_else(|| "function".into());
            json!({ "type": kind, "function": fields })
        }
        tool => tool,
    }
}

/// See the module.
struct Items {
    id: String,
    created: u64,
    model: String,
    echo: Echo,
    choice: ChatChoice,
    usage: Usage,
    sequence: u64,
    done: Vec<Value>,
    open: Option<Open>,
    is_cut: bool,
}

/// The item that grows.
struct Open {
    kind: Kind,
    id: String,
    text: String,
    call: Option<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call,
}

impl Open {
    fn json(&self, status: &str) -> Value {
        let text = &self.text;
        match (self.kind, &self.call) {
            (Kind::Call, Some((call_id, name))) => json!({
                "type": "function_call", "id": self.id, "call_id": call_id, "name": name, "arguments": text, "status": status,
            }),
            (Kind::Reasoning, _) => {
                let content = json!([{ "type": "reasoning_text", "text": text }]);
                json!({ "type": "reasoning", "id": self.id, "summary": [], "content": content, "status": status })
            }
            _ => {
                let is_begun = status != "in_progress";
                let content = if is_begun { json!([part(text)]) } else { json!([]) };
                json!({ "type": "message", "id": self.id, "role": "assistant", "content": content, "status": status })
            }
        }
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

impl Items {
    fn new(model: &str, choice: ChatChoice, n_prompt: u64, echo: Echo) -> Self {
        Self {
            id: id::new("resp_"),
            created: unix(SystemTime::now()),
            model: model.to_owned(),
            echo,
            choice,
            usage: Usage { prompt: n_prompt, ..Usage::default() },
            sequence: 0,
            done: Vec::new(),
            open: None,
            is_cut: false,
        }
    }

    fn status(&self) -> &'static str {
        if self.is_cut { "incomplete" } else { "completed" }
    }

    fn response(&self, status: &str) -> Value {
        let usage = (status != "in_progress").then(|| {
            json!({
                "input_tokens": self.usage.prompt,
                "input_tokens_details": { "cached_tokens": self.usage.cached.unwrap_or(0) },
                "output_tokens": self.usage.completion,
                "output_tokens_details": { "reasoning_tokens": self.usage.reasoning },
                "total_tokens": self.usage.prompt + self.usage.completion,
            })
        });
        let echo = &self.echo;
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": null,
            "incomplete_details": self.is_cut.then(|| json!({ "reason": "max_output_tokens" })),
            "instructions": echo.instructions,
            "max_output_tokens": echo.max_output_tokens,
            "model": self.model,
            "output": self.done,
            "parallel_tool_calls": echo.parallel_tool_calls,
            "previous_response_id": null,
            "temperature": echo.temperature,
            "top_p": echo.top_p,
            "tool_choice": echo.tool_choice,
            "tools": echo.tools,
            "metadata": echo.metadata,
            "usage": usage,
        })
    }

    fn tell(&mut self, out: &mut Vec<u8>, kind: &str, mut members: Value) {
        members["type"] = kind.into();
        members["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        out.extend_from_slice(format!("event: {kind}\n").as_bytes());
        sse::data(out, &members);
    }

    fn begin_item(&mut self, out: &mut Vec<u8>, kind: Kind, call: Option<(String, String)>) {
        self.end_item(out, "completed");
        let prefix = match kind {
            Kind::Reasoning => "rs_",
            Kind::Message => "msg_",
            Kind::Call => "fc_",
        };
        let open = Open { kind, id: id::new(prefix), text: String::new(), call };
        let at = self.done.len();
        self.tell(out, "response.output_item.added", json!({ "output_index": at, "item": open.json("in_progress") }));
        if kind == Kind::Message {
            let members = json!({ "item_id": open.id, "output_index": at, "content_index": 0, "part": part("") });
            self.tell(out, "response.content_part.added", members);
        }
        self.open = Some(open);
    }

    fn grow(&mut self, out: &mut Vec<u8>, kind: Kind, text: &str) {
        if self.open.as_ref().is_none_or(|open| open.kind != kind) {
            self.begin_item(out, kind, None);
        }
        let at = self.done.len();
        let Some(open) = &mut self.open else { return };
        open.text.push_str(text);
        let mut members = json!({ "item_id": open.id, "output_index": at, "delta": text });
        let event = match kind {
            Kind::Call => "response.function_call_arguments.delta",
            Kind::Reasoning => "response.reasoning_text.delta",
            Kind::Message => "response.output_text.delta",
        };
        if kind != Kind::Call {
            members["content_index"] = 0.into();
        }
        if kind == Kind::Message {
            members["logprobs"] = json!([]);
        }
        self.tell(out, event, members);
    }

    fn end_item(&mut self, out: &mut Vec<u8>, status: &str) {
        let Some(open) = self.open.take() else { return };
        let at = self.done.len();
        let members = |extra: Value| {
            let mut members = json!({ "item_id": open.id, "output_index": at });
            if let (Value::Object(members), Value::Object(extra)) = (&mut members, extra) {
                members.extend(extra);
            }
            members
        };
        match open.kind {
            Kind::Call => {
                let done = members(json!({ "arguments": open.text }));
                self.tell(out, "response.function_call_arguments.done", done);
            }
            Kind::Reasoning => {
                let done = members(json!({ "content_index": 0, "text": open.text }));
                self.tell(out, "response.reasoning_text.done", done);
            }
            Kind::Message => {
                let done = members(json!({ "content_index": 0, "text": open.text, "logprobs": [] }));
                self.tell(out, "response.output_text.done", done);
                let done = members(json!({ "content_index": 0, "part": part(&open.text) }));
                self.tell(out, "response.content_part.done", done);
            }
        }
        let item = open.json(status);
        self.tell(out, "response.output_item.done", json!({ "output_index": at, "item": item }));
        self.done.push(item);
    }

    fn take(&mut self, deltas: Vec<Delta>, out: &mut Vec<u8>) {
        for delta in deltas {
            match delta {
                Delta::Content(text) => self.grow(out, Kind::Message, &text),
                Delta::Reasoning(text) => self.grow(out, Kind::Reasoning, &text),
                Delta::Call { id, name, .. } => self.begin_item(out, Kind::Call, Some((id, name))),
                Delta::Arguments { text, .. } => self.grow(out, Kind::Call, &text),
            }
        }
    }
}

impl Chunks for Items {
    fn begin(&mut self, out: &mut Vec<u8>) {
        let response = self.response("in_progress");
        self.tell(out, "response.created", json!({ "response": response }));
        self.tell(out, "response.in_progress", json!({ "response": response }));
    }

    fn event(&mut self, event: &Event, out: &mut Vec<u8>) -> Result<(), ApiError> {
        let mut deltas = Vec::new();
        match event {
            Event::Token(token) => {
                self.choice.token(&token.text, &mut deltas);
                self.take(deltas, out);
            }
            Event::End(end) => {
                self.is_cut = finish_reason(&end.outcome)? == "length";
                self.choice.finish(&end.text, &mut deltas);
                self.take(deltas, out);
                self.usage.add(end);
                self.usage.reasoning = self.choice.reasoning_tokens;
                self.end_item(out, self.status());
            }
        }
        Ok(())
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        let (event, response) = (format!("response.{}", self.status()), self.response(self.status()));
        self.tell(out, &event, json!({ "response": response }));
    }

    fn failed(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        let error = error.json()["error"].clone();
        let members = json!({ "code": error["code"], "message": error["message"], "param": error["param"] });
        self.tell(out, "error", members);
        let mut response = self.response("failed");
        response["error"] = json!({ "code": error["code"], "message": error["message"] });
        self.tell(out, "response.failed", json!({ "response": response }));
    }

    /// The last event says that it is the last.
    fn last(&self, _: &mut Vec<u8>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_messages() {
        let call = json!({"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"});
        let message_of = |item| message(0, item).expect("supported");
        assert_eq!(message_of(call).expect("a message")["tool_calls"][0]["function"]["name"], "f");
        let output = message_of(json!({"type": "function_call_output", "call_id": "c1", "output": "rain"}));
        assert_eq!(output.expect("a message"), json!({"role": "tool", "tool_call_id": "c1", "content": "rain"}));
        assert_eq!(message_of(json!({"type": "reasoning", "summary": []})), None);
        assert!(message(3, json!({"type": "computer_call"})).is_err());
    }

    #[test]
    fn tools_are_nested_once() {
        let flat = nested(json!({"type": "function", "name": "f", "parameters": {}}));
        assert_eq!(flat, json!({"type": "function", "function": {"name": "f", "parameters": {}}}));
        assert_eq!(nested(flat.clone()), flat);
    }
}
