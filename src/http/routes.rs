//! The table of endpoints: what the router, the OpenAPI document and the guide in `docs/` are made from and held
//! against.

use super::guard::{self, Access};
use super::{App, dashboard, health, manage, metrics, openai, openapi, server, status, tokens};
use axum::Router;
use axum::http::{HeaderName, HeaderValue};
use axum::routing::{MethodRouter, get, post};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

/// One endpoint.
pub(super) struct Endpoint {
    pub(super) method: &'static str,
    /// As OpenAPI writes it.
    pub(super) path: &'static str,
    pub(super) access: Access,
    /// A line of the guide.
    pub(super) summary: &'static str,
    /// Name of the schema of the body it takes.
    pub(super) takes: Option<&'static str>,
    pub(super) gives: Answer,
    handler: fn() -> MethodRouter<App>,
}

/// What an endpoint answers with. Documents are given by the names of their schemas.
pub(super) enum Answer {
    Json(&'static str),
    /// The first, or where the body asks for a stream: events with the second or an error each, until `[DONE]`.
    JsonOrChunks(&'static str, &'static str),
    /// The first, or where the body asks for a stream: events with the second each, which say themselves which is the last.
    JsonOrEvents(&'static str, &'static str),
    /// Events without an end, with an object or a list each.
    Events,
    /// Text of this kind.
    Text(&'static str),
}

use Answer::{Events, Json, JsonOrChunks, JsonOrEvents, Text};

macro_rules! endpoint {
    ($method:ident $path:literal, $access:ident, $takes:expr, $gives:expr, $handler:path, $summary:literal) => {
        Endpoint {
            method: stringify!($method),
            path: $path,
            access: Access::$access,
            summary: $summary,
            takes: $takes,
            gives: $gives,
            handler: || $method($handler),
        }
    };
}

/// All of them.
pub(super) const ENDPOINTS: &[Endpoint] = &[
    endpoint!(get "/v1/models", Key, None, Json("ModelList"), openai::list, "The models that requests may name"),
    endpoint!(get "/v1/models/{id}", Key, None, Json("Model"), openai::model, "One model, by name or alias"),
    endpoint!(post "/v1/chat/completions", Key, Some("ChatRequest"), JsonOrChunks("ChatCompletion", "ChatCompletionChunk"), openai::chat, "Go on with a conversation; a stream if `stream` is true"),
    endpoint!(post "/v1/completions", Key, Some("CompletionRequest"), JsonOrChunks("Completion", "CompletionChunk"), openai::completions, "Go on with a text; a stream if `stream` is true"),
    endpoint!(post "/v1/responses", Key, Some("ResponseRequest"), JsonOrEvents("Response", "ResponseEvent"), openai::responses, "Go on with a conversation in the newer form; a stream if `stream` is true"),
    endpoint!(post "/v1/embeddings", Key, Some("EmbeddingRequest"), Json("Embeddings"), openai::embeddings, "Texts as vectors"),
    endpoint!(post "/tokenize", Key, Some("TokenizeRequest"), Json("Tokens"), tokens::tokenize, "The tokens of a text or a conversation"),
    endpoint!(post "/detokenize", Key, Some("DetokenizeRequest"), Json("Text"), tokens::detokenize, "The text of tokens"),
    endpoint!(post "/apply-template", Key, Some("TemplateRequest"), Json("Prompt"), tokens::apply_template, "The prompt that a conversation becomes"),
    endpoint!(get "/models", Key, None, Json("ModelStates"), manage::list, "The models of the configuration with their state"),
    endpoint!(post "/models/load", Admin, Some("ModelName"), Json("Success"), manage::load, "Have a configured model run"),
    endpoint!(post "/models/unload", Admin, Some("ModelName"), Json("Success"), manage::unload, "End a model's replicas"),
    endpoint!(get "/health", Public, None, Json("Health"), health::health, "Whether requests are taken"),
    endpoint!(get "/v1/health", Public, None, Json("Health"), health::health, "The same"),
    endpoint!(get "/health/live", Public, None, Json("Health"), health::live, "Whether the host answers"),
    endpoint!(get "/health/ready", Public, None, Json("Health"), health::ready, "Whether the required models, or the one that is named, are ready"),
    endpoint!(get "/metrics", Key, None, Text("application/openmetrics-text"), metrics::scrape, "Metrics for Prometheus"),
    endpoint!(get "/version", Key, None, Json("Version"), health::version, "What this program is"),
    endpoint!(get "/openapi.json", Public, None, Json("Any"), openapi::document, "This document"),
    endpoint!(get "/api/status", Key, None, Json("Any"), status::status, "One picture of devices, replicas and queues"),
    endpoint!(get "/api/events", Key, None, Events, status::events, "What happens, as a stream"),
    endpoint!(get "/", Public, None, Text("text/html"), dashboard::page, "The dashboard"),
    endpoint!(get "/app.js", Public, None, Text("text/javascript"), dashboard::script, "The dashboard's script"),
    endpoint!(get "/style.css", Public, None, Text("text/css"), dashboard::style, "The dashboard's style"),
];

/// The router of all endpoints with what stands in front of them.
pub(super) fn router(app: &App) -> Router {
    let mut router = Router::new();
    for endpoint in ENDPOINTS {
        let key = axum::middleware::from_fn_with_state((app.clone(), endpoint.access), guard::check_key);
        // Names of models may have slashes.
        let path = endpoint.path.replace("{id}", "{*id}");
        router = router.route(&path, (endpoint.handler)().layer(key));
    }
    let router =
        router.method_not_allowed_fallback(guard::wrong_method).fallback(guard::no_such_page).with_state(app.clone());
    server::layered(app, with_cors(app, router))
}

fn with_cors(app: &App, router: Router) -> Router {
    let origins = &app.settings.cors_origins;
    if origins.is_empty() {
        return router;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    let shown = [HeaderName::from_static("x-request-id"), axum::http::header::RETRY_AFTER];
    router.layer(CorsLayer::new().allow_origin(allowed).allow_methods(Any).allow_headers(Any).expose_headers(shown))
}
