//! `/v1/models`: the models that requests may name.

use super::super::App;
use super::super::error::ApiError;
use super::answer::unix;
use crate::client::ModelCard;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

/// `GET /v1/models`.
pub(in crate::http) async fn list(State(app): State<App>) -> Json<Value> {
    let catalog = app.client.catalog();
    let data: Vec<Value> = catalog.cards().map(|card| shown(card)).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// `GET /v1/models/{id}`, by name or alias.
pub(in crate::http) async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let catalog = app.client.catalog();
    catalog.get(&id).map(|card| Json(shown(card))).ok_or_else(|| ApiError::no_such_model(&id))
}

fn shown(card: &ModelCard) -> Value {
    json!({
        "id": card.name,
        "object": "model",
        "created": unix(card.created),
        "owned_by": "playhouse",
        "root": card.name,
        "parent": null,
        "max_model_len": card.context,
        "aliases": card.aliases,
        "meta": {
            "architecture": card.spec.architecture,
            "n_vocab": card.spec.n_vocab,
            "n_ctx_train": card.spec.n_ctx_train,
            "n_embd": card.spec.hidden_dim,
            "n_layers": card.spec.layers.len(),
            "size": card.file_bytes,
            "has_chat_template": card.template.is_some(),
        },
    })
}
