//! `POST /v1/embeddings`: texts as vectors.

use super::super::App;
use super::super::body::Json;
use super::super::error::ApiError;
use super::super::guard::Shown;
use super::answer::key_place;
use super::request::PromptField;
use axum::Extension;
use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

/// The body.
#[derive(Debug, Deserialize)]
pub(in crate::http) struct EmbeddingBody {
    model: String,
    #[serde(deserialize_with = "PromptField::input")]
    input: PromptField,
    encoding_format: Option<Encoding>,
    dimensions: Option<u32>,
    #[serde(rename = "user")]
    _user: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    Float,
    Base64,
}

/// The endpoint.
pub(in crate::http) async fn embeddings(
    State(app): State<App>,
    shown: Option<Extension<Shown>>,
    Json(body): Json<EmbeddingBody>,
) -> Result<axum::Json<Value>, ApiError> {
    let handle = app.client.model(&body.model)?;
    let mut place = key_place(&app, shown)?;
    if body.dimensions.is_some() {
        return Err(ApiError::not_supported(
            "dimensions",
            "`dimensions` is not supported: the vector is the model's own",
        ));
    }
    let (mut data, mut n_tokens) = (Vec::new(), 0);
    for (index, prompt) in body.input.prompts().into_iter().enumerate() {
        let embedding = handle.embed(prompt).await?;
        n_tokens += u64::from(embedding.prompt_tokens);
        if let Some(place) = &mut place {
            place.spend(u64::from(embedding.prompt_tokens));
        }
        let shown = match body.encoding_format.unwrap_or(Encoding::Float) {
            Encoding::Float => json!(embedding.values),
            Encoding::Base64 => {
                let bytes: Vec<u8> = embedding.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                STANDARD.encode(bytes).into()
            }
        };
        data.push(json!({ "object": "embedding", "index": index, "embedding": shown }));
    }
    let usage = json!({ "prompt_tokens": n_tokens, "total_tokens": n_tokens });
    Ok(axum::Json(json!({ "object": "list", "data": data, "model": handle.card().name, "usage": usage })))
}
