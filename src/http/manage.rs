//! `/models`, `/models/load`, `/models/unload`: which models of the configuration run, and changing that. Models are
//! named; nothing here takes a path.

use super::App;
use super::body::Json;
use super::control::ControlError;
use super::error::ApiError;
use axum::extract::State;
use playhouse_actors::HouseStatus;
use playhouse_actors::messages::{Phase, ReplicaStatus};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

/// `GET /models`.
pub(super) async fn list(State(app): State<App>) -> axum::Json<Value> {
    let status = app.client.tree().status().await;
    let data: Vec<Value> = app
        .control
        .models()
        .into_iter()
        .map(|model| {
            let (state, reason) = state(status.as_ref(), &model.name, model.wanted);
            json!({
                "id": model.name,
                "object": "model",
                "aliases": model.aliases,
                "status": { "value": state, "reason": reason },
            })
        })
        .collect();
    axum::Json(json!({ "object": "list", "data": data }))
}

/// A model's state in one word, and why its last worker ended if it has failed.
pub(super) fn state(status: Option<&HouseStatus>, model: &str, wanted: bool) -> (&'static str, Option<String>) {
    let devices = status.iter().flat_map(|status| &status.devices);
    let replicas: Vec<&ReplicaStatus> =
        devices.flat_map(|device| &device.replicas).filter(|replica| replica.replica.model == model).collect();
    let any = |phases: &[Phase]| replicas.iter().any(|replica| phases.contains(&replica.phase));
    if replicas.is_empty() || (!wanted && !any(&[Phase::Ready, Phase::Stopping])) {
        return ("unloaded", None);
    }
    if any(&[Phase::Ready]) {
        return ("loaded", None);
    }
    if any(&[Phase::Waiting, Phase::Loading, Phase::Down, Phase::Backoff]) {
        return ("loading", None);
    }
    if any(&[Phase::Failed, Phase::Quarantined]) {
        let reason = replicas.iter().find_map(|replica| replica.last_end.as_ref());
        return ("failed", reason.map(|end| end.reason().to_owned()));
    }
    ("unloaded", None)
}

/// The body of both.
#[derive(Debug, Deserialize)]
pub(super) struct ModelBody {
    model: String,
}

/// `POST /models/load`.
pub(super) async fn load(State(app): State<App>, Json(body): Json<ModelBody>) -> Result<axum::Json<Value>, ApiError> {
    app.control.load(&body.model).await.map_err(refused)?;
    Ok(axum::Json(json!({ "success": true })))
}

/// `POST /models/unload`.
pub(super) async fn unload(State(app): State<App>, Json(body): Json<ModelBody>) -> Result<axum::Json<Value>, ApiError> {
    app.control.unload(&body.model).await.map_err(refused)?;
    Ok(axum::Json(json!({ "success": true })))
}

fn refused(error: ControlError) -> ApiError {
    match error {
        ControlError::UnknownModel(model) => ApiError::no_such_model(&model),
        ControlError::Refused(_) => ApiError::unavailable(error.to_string(), Duration::from_secs(30)).code("no_room"),
        ControlError::Stopping => ApiError::unavailable(error.to_string(), Duration::from_secs(5)),
    }
}
