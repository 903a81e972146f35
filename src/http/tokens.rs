//! `/tokenize`, `/detokenize`, `/apply-template`: a model's text side alone. Nothing of it reaches a device.

use super::App;
use super::body::Json;
use super::bounded::{Object, Trees};
use super::error::ApiError;
use super::openai::messages;
use super::output::Syntax;
use crate::client::{ChatRequest, limits};
use crate::text::{EncodeOptions, RenderOptions};
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};

/// The body of `/tokenize`: a text, or a conversation.
#[derive(Debug, Deserialize)]
pub(super) struct TokenizeBody {
    model: Option<String>,
    #[serde(alias = "prompt")]
    content: Option<String>,
    messages: Option<Trees>,
    #[serde(alias = "add_special_tokens")]
    add_special: Option<bool>,
    parse_special: Option<bool>,
    with_pieces: Option<bool>,
}

/// `POST /tokenize`.
pub(super) async fn tokenize(
    State(app): State<App>,
    Json(body): Json<TokenizeBody>,
) -> Result<axum::Json<Value>, ApiError> {
    let handle = app.client.model(&model_name(&app, body.model)?)?;
    let text = match (body.content, body.messages) {
        (Some(text), None) => text,
        (None, Some(list)) => handle.apply_template(ChatRequest::new(messages(list.0, Syntax::Plain)?)).await?,
        (Some(_), Some(_)) => return Err(ApiError::param("messages", "expected `content` or `messages`, not both")),
        (None, None) => return Err(ApiError::param("content", "expected `content`, a text, or `messages`")),
    };
    let options = EncodeOptions {
        add_special: body.add_special.unwrap_or(false),
        parse_special: body.parse_special.unwrap_or(true),
    };
    let tokens = handle.tokenize(text, options).await?;
    let shown: Value = if body.with_pieces.unwrap_or(false) {
        let tokenizer = &handle.card().tokenizer;
        let piece = |id: &u32| json!({ "id": id, "piece": String::from_utf8_lossy(tokenizer.token_bytes(*id)) });
        tokens.iter().map(piece).collect()
    } else {
        json!(tokens)
    };
    Ok(axum::Json(json!({ "tokens": shown, "count": tokens.len(), "max_model_len": handle.card().context })))
}

/// The body of `/detokenize`.
#[derive(Debug, Deserialize)]
pub(super) struct DetokenizeBody {
    model: Option<String>,
    tokens: Vec<u32>,
    skip_special_tokens: Option<bool>,
}

/// `POST /detokenize`.
pub(super) async fn detokenize(
    State(app): State<App>,
    Json(body): Json<DetokenizeBody>,
) -> Result<axum::Json<Value>, ApiError> {
    let handle = app.client.model(&model_name(&app, body.model)?)?;
    let n_vocab = handle.card().tokenizer.n_vocab();
    if let Some(wrong) = body.tokens.iter().position(|id| *id as usize >= n_vocab) {
        let message = format!("token {} is outside the vocabulary of {n_vocab}", body.tokens[wrong]);
        return Err(ApiError::param(&format!("tokens[{wrong}]"), message));
    }
    limits::at_most("tokens", body.tokens.len() as u64, 0, limits::PROMPT_BYTES_MAX as u64)?;
    let text = handle.detokenize(&body.tokens, body.skip_special_tokens.unwrap_or(false));
    // llama.cpp calls it `content`, vLLM `prompt`.
    Ok(axum::Json(json!({ "content": text, "prompt": text })))
}

/// The body of `/apply-template`.
#[derive(Debug, Deserialize)]
pub(super) struct TemplateBody {
    model: Option<String>,
    messages: Trees,
    tools: Option<Trees>,
    chat_template_kwargs: Option<Object>,
    add_generation_prompt: Option<bool>,
}

/// `POST /apply-template`.
pub(super) async fn apply_template(
    State(app): State<App>,
    Json(body): Json<TemplateBody>,
) -> Result<axum::Json<Value>, ApiError> {
    let handle = app.client.model(&model_name(&app, body.model)?)?;
    let template = handle.card().template.as_ref().map_or("", |template| template.source());
    let syntax = Syntax::of(template, body.tools.is_some());
    let options = RenderOptions {
        add_generation_prompt: body.add_generation_prompt.unwrap_or(true),
        tools: body.tools.map(|tools| tools.0),
        kwargs: body.chat_template_kwargs.map(|kwargs| kwargs.0).unwrap_or_default(),
        ..RenderOptions::default()
    };
    let request = ChatRequest { options, ..ChatRequest::new(messages(body.messages.0, syntax)?) };
    Ok(axum::Json(json!({ "prompt": handle.apply_template(request).await? })))
}

/// These endpoints come from servers with one model: where there is only one it need not be named.
fn model_name(app: &App, named: Option<String>) -> Result<String, ApiError> {
    if let Some(name) = named {
        return Ok(name);
    }
    let catalog = app.client.catalog();
    let mut names = catalog.cards().map(|card| card.name.clone());
    match (names.next(), names.next()) {
        (Some(only), None) => Ok(only),
        _ => Err(ApiError::param("model", "`model` is needed where there is more than one")),
    }
}
