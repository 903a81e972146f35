//! `POST /v1/chat/completions`.

use super::super::App;
use super::super::body::Json;
use super::super::error::ApiError;
use super::super::guard::Shown;
use super::super::output::{Splitter, Syntax};
use super::super::sse::{self, Running};
use super::answer::{Head, TokenTexts, Usage, finish_reason, key_place, stop_reason};
use super::chat_stream::ChatChunks;
use super::choice::{ChatChoice, MessageBuilder};
use super::request::{ChatBody, StreamOptions};
use super::tools::Tools;
use crate::client::{ChatRequest, Event, GenerateRequest, ModelCard, RequestError, TokenStream};
use crate::text::{Message, RenderOptions};
use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// Tokens at the end of a prompt in which an opened `<think>` can stand.
const PROMPT_END_TOKENS: usize = 8;

/// The endpoint.
pub(in crate::http) async fn chat(
    State(app): State<App>,
    shown: Option<Extension<Shown>>,
    Json(mut body): Json<ChatBody>,
) -> Result<Response, ApiError> {
    let handle = app.client.model(&body.model)?;
    let card = handle.card().clone();
    let place = key_place(&app, shown)?;
    let (request, spoken) = request(&mut body, &card)?;
    let (n, max_tokens) = (request.generate.n, request.generate.max_tokens);
    let is_forced = spoken.is_forced;
    let mut meter = app.metrics.request(&card.name, n, max_tokens);
    let stream = match handle.chat(request).await {
        Ok(stream) => stream,
        Err(error) => {
            meter.refused();
            return Err(refused(error, is_forced));
        }
    };
    let n_prompt = stream.prompt().len() as u64;
    meter.accepted(n_prompt);
    app.log_prompt(&handle, &stream);
    let chat = Chat { head: Head::new(&app, "chatcmpl-", &card.name), texts: TokenTexts(card.clone()), n_prompt };
    let choices = choices(&card, spoken, &stream);
    let running = Running::new(meter, place, app.settings.keep_alive, n_prompt);
    if body.stream.unwrap_or(false) {
        let chunks = ChatChunks::new(chat, choices, StreamOptions::include_usage(body.stream_options.as_ref()));
        return sse::respond(stream, chunks, running).await;
    }
    Ok(axum::Json(chat.collect(choices, stream, running).await?).into_response())
}

/// What a chat's answer is made with.
pub(super) struct Chat {
    pub(super) head: Head,
    pub(super) texts: TokenTexts,
    pub(super) n_prompt: u64,
}

/// The choices of a request, before their first token.
pub(super) fn choices(card: &ModelCard, spoken: Spoken, stream: &TokenStream) -> Vec<ChatChoice> {
    let template = card.template.as_ref().map_or("", |template| template.source());
    let prompt = stream.prompt();
    let end = card.tokenizer.decode(&prompt[prompt.len().saturating_sub(PROMPT_END_TOKENS)..], false);
    let choice = |number| {
        let splitter = Splitter::new(spoken.syntax, template, &end);
        ChatChoice::new(splitter, spoken.parallel_calls).ended_by(stream.ender(), number)
    };
    (0..).zip(stream.ids()).map(|(number, _)| choice(number)).collect()
}

impl Chat {
    /// Reads a request to its end. If the client goes away meanwhile, this is dropped, and the stream with it.
    async fn collect(
        self,
        choices: Vec<ChatChoice>,
        mut stream: TokenStream,
        mut running: Running,
    ) -> Result<Value, ApiError> {
        let mut choices: Vec<_> = choices.into_iter().map(|choice| (choice, Whole::default())).collect();
        let mut usage = Usage { prompt: self.n_prompt, ..Usage::default() };
        let mut deltas = Vec::new();
        while let Some(event) = stream.next().await {
            running.event(&event);
            match &event {
                Event::Token(token) => {
                    let (choice, whole) = &mut choices[token.choice as usize];
                    choice.token(&token.text, &mut deltas);
                    whole.message.add(&mut deltas);
                    whole.logprobs.extend(self.texts.chat(token));
                }
                Event::End(end) => {
                    let (choice, whole) = &mut choices[end.choice as usize];
                    choice.finish(&end.text, &mut deltas);
                    whole.message.add(&mut deltas);
                    whole.finish_reason = choice.finish_reason(finish_reason(&end.outcome)?);
                    whole.stop_reason = stop_reason(&end.outcome);
                    usage.add(end);
                    usage.reasoning += choice.reasoning_tokens;
                }
            }
        }
        let mut answer = self.head.json("chat.completion");
        let shown = choices.into_iter().enumerate().map(|(index, (_, whole))| whole.json(index));
        answer["choices"] = shown.collect();
        answer["usage"] = usage.json();
        Ok(answer)
    }
}

/// A whole choice.
#[derive(Default)]
struct Whole {
    message: MessageBuilder,
    logprobs: Vec<Value>,
    finish_reason: &'static str,
    stop_reason: Value,
}

impl Whole {
    fn json(self, index: usize) -> Value {
        let logprobs = (!self.logprobs.is_empty()).then(|| json!({ "content": self.logprobs, "refusal": null }));
        json!({
            "index": index,
            "message": self.message.json(),
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        })
    }
}

/// How an answer is to be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spoken {
    /// What the model will speak.
    syntax: Syntax,
    /// Whether it may have more than one call.
    parallel_calls: bool,
    /// Whether it must be one.
    pub(super) is_forced: bool,
}

/// Of a forced call the grammar is ours: what is wrong with it is a tool's schema.
pub(super) fn refused(error: RequestError, is_forced: bool) -> ApiError {
    match error {
        RequestError::Constraint(error) if is_forced => ApiError::param("tools", error.to_string()),
        RequestError::Invalid(invalid) if is_forced && invalid.param == "response_format" => {
            ApiError::param("tools", format!("the schemas of the tools are too large: {invalid}"))
        }
        error => error.into(),
    }
}

/// What is asked of the house, and how its answer is to be read.
pub(super) fn request(body: &mut ChatBody, card: &Arc<ModelCard>) -> Result<(ChatRequest, Spoken), ApiError> {
    let template = card.template.as_ref().map_or("", |template| template.source());
    let mut generate = GenerateRequest::text("");
    body.sampling().apply(&mut generate)?;
    generate.logprobs = match (body.logprobs.unwrap_or(false), body.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::param("top_logprobs", "`top_logprobs` needs `logprobs: true`")),
    };
    if body.continue_final_message.unwrap_or(false) {
        return Err(ApiError::not_supported("continue_final_message", "`continue_final_message` is not supported"));
    }
    let tools = Tools::read(
        body.tools.take().map(|tools| tools.0),
        body.tool_choice.as_ref().map(|choice| &choice.0),
        body.parallel_tool_calls,
        template,
    )?;
    let syntax = Syntax::of(template, tools.shown.is_some());
    if syntax.needs_control_tokens() {
        generate.skip_special = false;
        if generate.constraint.is_some() {
            // The channels of its answers are text, too: no form but harmony's own would hold.
            let message = "this model's answers have channels, which a `response_format` does not allow for";
            return Err(ApiError::not_supported("response_format", message));
        }
    }
    let call = tools.constraint(syntax, card)?;
    let is_forced = call.is_some();
    if let Some(call) = call {
        if generate.constraint.is_some() {
            let message = "an answer cannot be both a forced call and held to a `response_format`";
            return Err(ApiError::param("tool_choice", message));
        }
        generate.constraint = Some(call);
    }
    let spoken = Spoken { syntax, parallel_calls: tools.parallel, is_forced };
    let mut kwargs = body.chat_template_kwargs.take().map(|kwargs| kwargs.0).unwrap_or_default();
    if let Some(effort) = body.reasoning_effort.take() {
        kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    let options = RenderOptions {
        add_generation_prompt: body.add_generation_prompt.unwrap_or(true),
        tools: tools.shown,
        kwargs,
        ..RenderOptions::default()
    };
    let messages = messages(std::mem::take(&mut body.messages.0), syntax)?;
    Ok((ChatRequest { messages, options, generate }, spoken))
}

/// The conversation as templates read it.
///
/// # Errors
/// A message that none could read, by its place in the list.
pub(in crate::http) fn messages(list: Vec<Value>, syntax: Syntax) -> Result<Vec<Message>, ApiError> {
    if list.is_empty() {
        return Err(ApiError::param("messages", "`messages` is empty, expected at least 1"));
    }
    list.into_iter().enumerate().map(|(at, value)| message(at, value, syntax)).collect()
}

fn message(at: usize, mut value: Value, syntax: Syntax) -> Result<Message, ApiError> {
    let wrong = |member: &str, why: String| Err(ApiError::param(&format!("messages[{at}]{member}"), why));
    let Some(fields) = value.as_object_mut() else {
        return wrong("", "a message is a JSON object".into());
    };
    match fields.get("content") {
        None | Some(Value::Null | Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            for (part_at, part) in parts.iter().enumerate() {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
                let is_text = matches!(kind, "text" | "input_text" | "output_text")
                    && part.get("text").is_some_and(Value::is_string);
                if !is_text {
                    let why = format!("a part of type `{}` is not supported; this model reads text", cut(kind));
                    return wrong(&format!(".content[{part_at}]"), why);
                }
            }
        }
        Some(_) => return wrong(".content", "content is a text or a list of text parts".into()),
    }
    if let Some(Value::Array(parts)) = fields.get_mut("content") {
        for part in parts {
            part["type"] = "text".into();
        }
    }
    if fields.get("role").and_then(Value::as_str) == Some("developer") && syntax != Syntax::Harmony {
        fields.insert("role".into(), "system".into());
    }
    if syntax == Syntax::Harmony
        && let Some(thoughts) = fields.remove("reasoning_content")
    {
        fields.insert("thinking".into(), thoughts);
    }
    Message::from_json(value).or_else(|error| wrong("", error.to_string()))
}

fn cut(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_checked_by_their_place() {
        let param = |list: Value| {
            let list = list.as_array().expect("a list").clone();
            let error = messages(list, Syntax::Plain).expect_err("it is wrong").json();
            error["error"]["param"].as_str().expect("named").to_owned()
        };
        let user = json!({"role": "user", "content": "moon"});
        assert_eq!(param(json!([])), "messages");
        assert_eq!(param(json!([user, 3])), "messages[1]");
        assert_eq!(param(json!([{"content": "moon"}])), "messages[0]");
        assert_eq!(param(json!([{"role": "<|im_end|>", "content": "moon"}])), "messages[0]");
        assert_eq!(param(json!([{"role": "user", "content": 3}])), "messages[0].content");
        let image = json!({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}});
        assert_eq!(
            param(json!([{"role": "user", "content": [{"type": "text", "text": "a"}, image]}])),
            "messages[0].content[1]"
        );
    }

    #[test]
    fn roles_and_thoughts_are_written_as_the_template_reads_them() {
        let one = |syntax| {
            let list = vec![json!({"role": "developer", "content": "a", "reasoning_content": "b"})];
            Value::from(messages(list, syntax).expect("fine").remove(0))
        };
        assert_eq!(one(Syntax::Plain)["role"], "system");
        let harmony = one(Syntax::Harmony);
        assert_eq!((&harmony["role"], &harmony["thinking"]), (&json!("developer"), &json!("b")));
    }
}
