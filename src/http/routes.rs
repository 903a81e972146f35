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
    /// Name of the schema of what it answers; `None` is text.
    pub(super) gives: Option<&'static str>,
    handler: fn() -> MethodRouter<App>,
}

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
    endpoint!(get "/v1/models", Key, None, Some("ModelList"), openai::list, "The models that requests may name"),
    endpoint!(get "/v1/models/{id}", Key, None, Some("Model"), openai::model, "One model, by name or alias"),
    endpoint!(post "/v1/chat/completions", Key, Some("ChatRequest"), Some("ChatCompletion"), openai::chat, "Go on with a conversation; a stream if `stream` is true"),
    endpoint!(post "/v1/completions", Key, Some("CompletionRequest"), Some("Completion"), openai::completions, "Go on with a text; a stream if `stream` is true"),
    endpoint!(post "/v1/responses", Key, Some("ResponseRequest"), Some("Response"), openai::responses, "Go on with a conversation in the newer form; a stream if `stream` is true"),
    endpoint!(post "/v1/embeddings", Key, Some("EmbeddingRequest"), Some("Embeddings"), openai::embeddings, "Texts as vectors"),
    endpoint!(post "/tokenize", Key, Some("TokenizeRequest"), Some("Tokens"), tokens::tokenize, "The tokens of a text or a conversation"),
    endpoint!(post "/detokenize", Key, Some("DetokenizeRequest"), Some("Text"), tokens::detokenize, "The text of tokens"),
    endpoint!(post "/apply-template", Key, Some("TemplateRequest"), Some("Prompt"), tokens::apply_template, "The prompt that a conversation becomes"),
    endpoint!(get "/models", Key, None, Some("ModelStates"), manage::list, "The models of the configuration with their state"),
    endpoint!(post "/models/load", Admin, Some("ModelName"), Some("Success"), manage::load, "Have a configured model run"),
    endpoint!(post "/models/unload", Admin, Some("ModelName"), Some("Success"), manage::unload, "End a model's replicas"),
    endpoint!(get "/health", Public, None, Some("Health"), health::health, "Whether requests are taken"),
    endpoint!(get "/v1/health", Public, None, Some("Health"), health::health, "The same"),
    endpoint!(get "/health/live", Public, None, Some("Health"), health::live, "Whether the host answers"),
    endpoint!(get "/health/ready", Public, None, Some("Health"), health::ready, "Whether the required models, or the one that is named, are ready"),
    endpoint!(get "/metrics", Key, None, None, metrics::scrape, "Metrics for Prometheus"),
    endpoint!(get "/version", Key, None, Some("Version"), health::version, "What this program is"),
    endpoint!(get "/openapi.json", Public, None, Some("Any"), openapi::document, "This document"),
    endpoint!(get "/api/status", Key, None, Some("Any"), status::status, "One picture of devices, replicas and queues"),
    endpoint!(get "/api/events", Key, None, None, status::events, "What happens, as a stream"),
    endpoint!(get "/", Public, None, None, dashboard::page, "The dashboard"),
    endpoint!(get "/app.js", Public, None, None, dashboard::script, "The dashboard's script"),
    endpoint!(get "/style.css", Public, None, None, dashboard::style, "The dashboard's style"),
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
