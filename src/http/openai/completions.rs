//! `POST /v1/completions`: texts that go on from prompts.

use super::super::App;
use super::super::body::Json;
use super::super::error::ApiError;
use super::super::guard::Shown;
use super::super::sse::{self, Chunks, Running};
use super::answer::{CompletionLogprobs, Head, TokenTexts, Usage, finish_reason, key_place, stop_reason};
use super::request::{CompletionBody, StreamOptions};
use crate::client::{End, Event, GenerateRequest, ModelHandle, Prompt, Token, TokenStream, limits};
use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use serde_json::{Value, json};
use std::io::Write;
use std::pin::Pin;

/// Tokens where the client does not say: OpenAI's default, and everybody's.
const MAX_TOKENS: u32 = 16;

/// The endpoint.
pub(in crate::http) async fn completions(
    State(app): State<App>,
    shown: Option<Extension<Shown>>,
    Json(mut body): Json<CompletionBody>,
) -> Result<Response, ApiError> {
    let handle = app.client.model(&body.model)?;
    let place = key_place(&app, shown)?;
    let mut generate = GenerateRequest::text("");
    generate.max_tokens = Some(MAX_TOKENS);
    body.sampling().apply(&mut generate)?;
    generate.logprobs = body.logprobs;
    refuse_what_is_not_done(&body)?;
    let prompts = body.prompt.clone().prompts();
    let n_choices = limits::N_MAX.min(generate.n) * u32::try_from(prompts.len()).unwrap_or(u32::MAX);
    let mut meter = app.metrics.request(&handle.card().name, n_choices, generate.max_tokens);
    let started = match start(&handle, &generate, &prompts).await {
        Ok(started) => started,
        Err(error) => {
            meter.refused();
            return Err(error);
        }
    };
    let echo = body.echo.unwrap_or(false);
    let completion = Completion::new(&app, &handle, &started, &prompts, echo);
    let n_prompt = completion.usage.prompt;
    meter.accepted(n_prompt);
    started.iter().for_each(|stream| app.log_prompt(&handle, stream));
    let running = Running::new(meter, place, app.settings.keep_alive, n_prompt);
    let events = merged(started, generate.n);
    if body.stream.unwrap_or(false) {
        let chunks = CompletionChunks::new(completion, StreamOptions::include_usage(body.stream_options.as_ref()));
        return sse::respond(events, chunks, running).await;
    }
    Ok(axum::Json(completion.collect(events, running).await?).into_response())
}

fn refuse_what_is_not_done(body: &CompletionBody) -> Result<(), ApiError> {
    if body.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::not_supported("suffix", "`suffix` is not supported"));
    }
    if body.echo.unwrap_or(false) && body.logprobs.is_some() {
        return Err(ApiError::not_supported("echo", "`echo` with `logprobs` is not supported"));
    }
    Ok(())
}

/// One stream for each prompt; if one is refused, the others are dropped here and so cancelled.
async fn start(
    handle: &ModelHandle,
    generate: &GenerateRequest,
    prompts: &[Prompt],
) -> Result<Vec<TokenStream>, ApiError> {
    let mut streams = Vec::new();
    // The same seed for every prompt, also if it is drawn.
    let mut seed = generate.seed;
    for prompt in prompts {
        let stream = handle.generate(GenerateRequest { prompt: prompt.clone(), seed, ..generate.clone() }).await?;
        seed = Some(stream.seed());
        streams.push(stream);
    }
    Ok(streams)
}

type Events = SelectAll<Pin<Box<dyn futures_core::Stream<Item = Event> + Send>>>;

/// All streams as one: choice `j` of prompt `i` is number `i * n + j`.
fn merged(streams: Vec<TokenStream>, n: u32) -> Events {
    let number = |(at, stream): (usize, TokenStream)| -> Pin<Box<dyn futures_core::Stream<Item = Event> + Send>> {
        let first = u32::try_from(at).unwrap_or(u32::MAX) * n;
        Box::pin(stream.map(move |event| match event {
            Event::Token(token) => Event::Token(Token { choice: first + token.choice, ..token }),
            Event::End(end) => Event::End(End { choice: first + end.choice, ..end }),
        }))
    };
    streams.into_iter().enumerate().map(number).collect()
}

/// What an answer is made with.
struct Completion {
    head: Head,
    texts: TokenTexts,
    usage: Usage,
    /// By choice.
    choices: Vec<Growing>,
}

#[derive(Default)]
struct Growing {
    /// What is echoed before the text.
    echo: String,
    text: String,
    /// Characters given out so far: where the next token's text begins.
    n_chars: usize,
    logprobs: CompletionLogprobs,
    has_logprobs: bool,
    finish_reason: &'static str,
    stop_reason: Value,
}

impl Completion {
    fn new(app: &App, handle: &ModelHandle, streams: &[TokenStream], prompts: &[Prompt], echo: bool) -> Self {
        let mut choices = Vec::new();
        for (stream, prompt) in streams.iter().zip(prompts) {
            let text = match prompt {
                _ if !echo => String::new(),
                Prompt::Text(text) => text.clone(),
                Prompt::Tokens(tokens) => handle.detokenize(tokens, true),
            };
            for _ in stream.ids() {
                choices.push(Growing { echo: text.clone(), ..Growing::default() });
            }
        }
        let prompt = streams.iter().map(|stream| stream.prompt().len() as u64).sum();
        let head = Head::new(app, "cmpl-", &handle.card().name);
        let texts = TokenTexts(handle.card().clone());
        Self { head, texts, usage: Usage { prompt, ..Usage::default() }, choices }
    }

    async fn collect(mut self, mut events: Events, mut running: Running) -> Result<Value, ApiError> {
        while let Some(event) = events.next().await {
            running.event(&event);
            match &event {
                Event::Token(token) => {
                    let choice = &mut self.choices[token.choice as usize];
                    choice.has_logprobs |= token.logprobs.is_some();
                    choice.logprobs.push(&self.texts, token, choice.n_chars);
                    choice.n_chars += token.text.chars().count();
                    choice.text.push_str(&token.text);
                }
                Event::End(end) => {
                    let choice = &mut self.choices[end.choice as usize];
                    choice.text.push_str(&end.text);
                    choice.finish_reason = finish_reason(&end.outcome)?;
                    choice.stop_reason = stop_reason(&end.outcome);
                    self.usage.add(end);
                }
            }
        }
        let mut answer = self.head.json("text_completion");
        let shown = self.choices.into_iter().enumerate().map(|(index, choice)| choice.json(index));
        answer["choices"] = shown.collect();
        answer["usage"] = self.usage.json();
        Ok(answer)
    }
}

impl Growing {
    fn json(self, index: usize) -> Value {
        json!({
            "index": index,
            "text": self.echo + &self.text,
            "logprobs": self.has_logprobs.then(|| self.logprobs.json()),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        })
    }
}

/// The same as a stream.
struct CompletionChunks {
    completion: Completion,
    include_usage: bool,
    prefix: Vec<u8>,
}

impl CompletionChunks {
    fn new(completion: Completion, include_usage: bool) -> Self {
        let mut prefix = b"data: ".to_vec();
        sse::json(&mut prefix, &completion.head.json("text_completion"));
        prefix.pop();
        prefix.extend_from_slice(b",\"choices\":[{\"index\":");
        Self { completion, include_usage, prefix }
    }

    fn chunk(&self, out: &mut Vec<u8>, index: u32, text: &str, logprobs: Option<Value>, end: Option<&End>) {
        out.extend_from_slice(&self.prefix);
        // Writing into a vector does not fail.
        let _ = write!(out, "{index},\"text\":");
        sse::json(out, text);
        out.extend_from_slice(b",\"logprobs\":");
        sse::json(out, &logprobs);
        let reason = end.and_then(|end| finish_reason(&end.outcome).ok());
        out.extend_from_slice(b",\"finish_reason\":");
        sse::json(out, &reason);
        if let Some(end) = end {
            out.extend_from_slice(b",\"stop_reason\":");
            sse::json(out, &stop_reason(&end.outcome));
        }
        out.extend_from_slice(if self.include_usage { b"}],\"usage\":null}\n\n" } else { b"}]}\n\n" });
    }
}

impl Chunks for CompletionChunks {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.completion.choices.len() {
            let echo = std::mem::take(&mut self.completion.choices[index].echo);
            if !echo.is_empty() {
                self.chunk(out, u32::try_from(index).unwrap_or(u32::MAX), &echo, None, None);
            }
        }
    }

    fn event(&mut self, event: &Event, out: &mut Vec<u8>) -> Result<(), ApiError> {
        match event {
            Event::Token(token) => {
                let choice = &mut self.completion.choices[token.choice as usize];
                let offset = choice.n_chars;
                choice.n_chars += token.text.chars().count();
                let logprobs = token.logprobs.is_some().then(|| {
                    let mut logprobs = CompletionLogprobs::default();
                    logprobs.push(&self.completion.texts, token, offset);
                    logprobs.json()
                });
                if !token.text.is_empty() || logprobs.is_some() {
                    self.chunk(out, token.choice, &token.text, logprobs, None);
                }
            }
            Event::End(end) => {
                finish_reason(&end.outcome)?;
                self.completion.usage.add(end);
                self.chunk(out, end.choice, &end.text, None, Some(end));
            }
        }
        Ok(())
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.include_usage {
            let mut chunk = self.completion.head.json("text_completion");
            chunk["choices"] = json!([]);
            chunk["usage"] = self.completion.usage.json();
            sse::data(out, &chunk);
        }
    }
}
