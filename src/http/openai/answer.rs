//! The pieces that all answers share.

use super::super::App;
use super::super::error::ApiError;
use super::super::guard::Shown;
use super::super::id;
use super::super::quota::Place;
use crate::client::{End, ModelCard, Outcome, Token};
use axum::Extension;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What every chunk and answer of one request begins with.
#[derive(Debug, Clone)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
}

impl Head {
    pub(super) fn new(app: &App, prefix: &str, model: &str) -> Self {
        let created = unix(SystemTime::now());
        Self { id: id::new(prefix), created, model: model.to_owned(), fingerprint: app.fingerprint.clone() }
    }

    pub(super) fn json(&self, object: &str) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        })
    }
}

/// Seconds since 1970.
pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Tokens of a request with all its choices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt: u64,
    pub(super) completion: u64,
    pub(super) reasoning: u64,
    pub(super) cached: Option<u64>,
}

impl Usage {
    /// Adds what one choice took. The prompt is counted by whoever knows how many choices share one.
    pub(super) fn add(&mut self, end: &End) {
        self.completion += u64::from(end.completion_tokens);
        if let Some(cached) = end.cached_tokens {
            self.cached = Some(self.cached.unwrap_or(0).max(u64::from(cached)));
        }
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": self.cached.map(|cached| json!({ "cached_tokens": cached })),
            "completion_tokens_details": { "reasoning_tokens": self.reasoning },
        })
    }
}

/// How a choice ended, in the API's words.
///
/// # Errors
/// It did not end well.
pub(super) fn finish_reason(outcome: &Outcome) -> Result<&'static str, ApiError> {
    match outcome {
        Outcome::Stop { .. } => Ok("stop"),
        Outcome::Length => Ok("length"),
        Outcome::Failed(failure) => Err(failure.clone().into()),
        Outcome::Cancelled => {
            Err(ApiError::unavailable("the request was cancelled by the host", std::time::Duration::from_secs(1)))
        }
    }
}

/// The stop string that ended a choice: vLLM's `stop_reason`.
pub(super) fn stop_reason(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Stop { hit: Some(hit) } => Value::String(hit.clone()),
        _ => Value::Null,
    }
}

/// A place among the requests of the key that was shown, if one was.
///
/// # Errors
/// 429 if the key has as much as it may.
pub(super) fn key_place(app: &App, shown: Option<Extension<Shown>>) -> Result<Option<Place>, ApiError> {
    shown.map(|Extension(Shown(key))| app.quotas.open(key, &app.settings.per_key)).transpose()
}

/// Tokens as texts and bytes, for log probabilities.
#[derive(Debug, Clone)]
pub(super) struct TokenTexts(pub(super) Arc<ModelCard>);

impl TokenTexts {
    fn bytes(&self, id: u32) -> &[u8] {
        self.0.tokenizer.token_bytes(id)
    }

    pub(super) fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.bytes(id)).into_owned()
    }

    fn entry(&self, id: u32, logprob: f32) -> Value {
        json!({ "token": self.text(id), "logprob": finite(logprob), "bytes": self.bytes(id) })
    }

    /// One element of `logprobs.content` of a chat.
    pub(super) fn chat(&self, token: &Token) -> Option<Value> {
        let logprobs = token.logprobs.as_ref()?;
        let mut entry = self.entry(token.id, logprobs.chosen);
        entry["top_logprobs"] = logprobs.top.iter().map(|top| self.entry(top.token, top.logprob)).collect();
        Some(entry)
    }
}

/// JSON has no minus infinity; OpenAI writes this for what is as good as impossible.
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Log probabilities of a completion, as parallel lists.
#[derive(Debug, Default)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    pub(super) fn push(&mut self, texts: &TokenTexts, token: &Token, offset: usize) {
        let Some(logprobs) = &token.logprobs else { return };
        self.tokens.push(texts.text(token.id));
        self.token_logprobs.push(finite(logprobs.chosen));
        let top = logprobs.top.iter().map(|top| (texts.text(top.token), finite(top.logprob).into()));
        self.top_logprobs.push(Value::Object(top.collect()));
        self.text_offset.push(offset);
    }

    pub(super) fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}
