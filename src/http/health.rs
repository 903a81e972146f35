//! Health, version: for load balancers and the curious. Nothing here wakes or waits for a model.

use super::error::ApiError;
use super::{App, BuildInfo};
use axum::Json;
use axum::extract::{Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

/// When to ask again whether something is ready.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// `GET /health`: whether requests are taken, in llama.cpp's words.
pub(super) async fn health(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    ready(State(app), Query(ReadyQuery { model: None })).await
}

/// `GET /health/live`: the host answers. A process that does not should be started again.
pub(super) async fn live() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Of one model, or of all that are required.
#[derive(Debug, Deserialize)]
pub(super) struct ReadyQuery {
    model: Option<String>,
}

/// `GET /health/ready`: every required model has a ready replica and the host is not about to stop; or one model has.
pub(super) async fn ready(State(app): State<App>, Query(query): Query<ReadyQuery>) -> Result<Json<Value>, ApiError> {
    let not_ready = |message: &str| Err(ApiError::unavailable(message, RETRY_AFTER));
    let Some(status) = app.client.tree().status().await else { return not_ready("the house has stopped") };
    let Some(router) = &status.router else { return not_ready("the router is being restarted") };
    if router.draining {
        return not_ready("the host is draining");
    }
    let is_ready = match query.model {
        None => status.is_ready(),
        Some(name) => {
            let catalog = app.client.catalog();
            let card = catalog.get(&name).ok_or_else(|| ApiError::no_such_model(&name))?;
            router.services.iter().any(|service| service.model == card.name && service.ready > 0)
        }
    };
    if is_ready { Ok(Json(json!({ "status": "ok" }))) } else { not_ready("Loading model") }
}

/// `GET /version`.
pub(super) async fn version(State(app): State<App>) -> Json<BuildInfo> {
    Json(app.build.clone())
}
