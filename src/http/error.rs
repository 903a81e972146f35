//! Why a request was refused or failed, as clients of the OpenAI API read it. Status, public text and cause are three
//! things: no path, address or internal name leaves the house.

use crate::client::{Invalid, RequestError};
use crate::text::TemplateError;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use playhouse_actors::Refusal;
use playhouse_actors::engine::RequestError as EngineRefusal;
use playhouse_actors::messages::Failure;
use playhouse_actors::policy::admission::Full;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;

/// Why the front cannot serve at all.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Others can reach the address and nothing would stop them.
    #[error(
        "{address} can be reached from other machines, and there {missing}: listen on 127.0.0.1, give keys and a \
         certificate, or say --insecure"
    )]
    Exposed {
        /// The address.
        address: SocketAddr,
        /// What is missing.
        missing: &'static str,
    },
    /// The listener is of no use.
    #[error("the listener failed")]
    Listener(#[from] std::io::Error),
    /// The front has a thread of its own for long bodies.
    #[error("no thread could be started")]
    Thread(#[source] std::io::Error),
    /// Certificate or key cannot be used.
    #[error("{path}: {why}")]
    Tls {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file of keys cannot be used. No key is in the text.
    #[error("{path}: {why}")]
    Keys {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<Box<str>>,
    message: Box<str>,
    retry_after: Option<Duration>,
    /// Further members of the error object.
    details: Vec<(&'static str, Value)>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into().into_boxed_str();
        Self { status, kind, code: None, param: None, message, retry_after: None, details: Vec::new() }
    }

    /// 400.
    pub(super) fn bad(param: impl Into<Option<String>>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        Self { param: param.into().map(String::into_boxed_str), ..error }
    }

    /// 400 naming a parameter.
    pub(super) fn param(param: &str, message: impl Into<String>) -> Self {
        Self::bad(param.to_owned(), message).code("invalid_value")
    }

    /// 401.
    pub(super) fn unauthenticated() -> Self {
        let message = "an API key is needed: `Authorization: Bearer KEY` or `x-api-key: KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message).code("invalid_api_key")
    }

    /// 403.
    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// 404 for an address.
    pub(super) fn no_such_page(path: &str) -> Self {
        let shown: String = path.chars().take(200).collect();
        Self::new(StatusCode::NOT_FOUND, "not_found_error", format!("there is nothing at {shown}"))
    }

    /// 404 for a model.
    pub(super) fn no_such_model(model: &str) -> Self {
        let shown: String = model.chars().take(200).collect();
        let error = Self::new(StatusCode::NOT_FOUND, "not_found_error", format!("there is no model `{shown}`"));
        Self { param: Some("model".into()), ..error }.code("model_not_found")
    }

    /// 405.
    pub(super) fn wrong_method(method: &str, path: &str) -> Self {
        let shown: String = path.chars().take(200).collect();
        let message = format!("{shown} does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 408.
    pub(super) fn body_timeout() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "the request's body did not come in time")
    }

    /// 413.
    pub(super) fn too_large(limit: u64) -> Self {
        let message = format!("the request's body has more than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message).code("request_too_large")
    }

    /// 429.
    pub(super) fn busy(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        error.code("rate_limit_exceeded").retry(retry_after)
    }

    /// 500: a mistake of ours. The cause is for the log.
    pub(super) fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed because of a mistake of ours");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "internal error; the log has it under this request's id",
        )
    }

    /// 501.
    pub(super) fn not_supported(param: &str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", message);
        Self { param: Some(param.into()), ..error }
    }

    /// 503.
    pub(super) fn unavailable(message: impl Into<String>, retry_after: Duration) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message).retry(retry_after)
    }

    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    fn retry(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// As it stands in a body, or in an event of a stream.
    pub(super) fn json(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        });
        for (name, value) in &self.details {
            error[*name] = value.clone();
        }
        json!({ "error": error })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        if let Some(after) = self.retry_after {
            // Whole seconds, and never 0: that would be no wait at all.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::param(invalid.param, invalid.to_string())
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Invalid(invalid) => invalid.into(),
            RequestError::NoTemplate { .. } => Self::param("messages", error.to_string()).code("no_chat_template"),
            RequestError::Template(error) => error.into(),
            RequestError::Text(error) => Self::param("prompt", error.to_string()),
            RequestError::Constraint(error) => Self::param("response_format", error.to_string()),
            RequestError::Refused(refusal) => refusal.into(),
            RequestError::Failed(failure) => failure.into(),
            RequestError::Stopped => Self::unavailable(error.to_string(), Duration::from_secs(5)),
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        // The words of the template engine name lines of the template, which is the model's and no secret of ours.
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        let param =
            if matches!(error, TemplateError::ReservedArgument { .. }) { "chat_template_kwargs" } else { "messages" };
        Self::param(param, format!("{error}{cause}"))
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let seconds = Duration::from_secs;
        match refusal {
            Refusal::UnknownModel { model } => Self::no_such_model(&model),
            Refusal::Busy { full: Full::TooLarge { .. }, .. } => {
                Self::param("max_tokens", message).code("request_too_large")
            }
            Refusal::Busy { full, .. } => Self::busy(message, full.retry_after().unwrap_or(seconds(1))),
            Refusal::Loading { retry_after, .. } => Self::unavailable(message, retry_after).code("model_loading"),
            Refusal::Unavailable { .. } => Self::unavailable(message, seconds(30)).code("model_unavailable"),
            Refusal::Invalid(error) => error.into(),
            Refusal::Draining => Self::unavailable(message, seconds(5)).code("draining"),
            Refusal::Overloaded => Self::busy(message, seconds(1)),
            Refusal::RouterLost => Self::unavailable(message, seconds(1)),
        }
    }
}

impl From<EngineRefusal> for ApiError {
    fn from(error: EngineRefusal) -> Self {
        let message = error.to_string();
        match error {
            EngineRefusal::ContextExceeded { needed, limit } => {
                let error = Self::new(StatusCode::BAD_REQUEST, "exceed_context_size_error", message);
                let details = vec![("n_prompt_tokens", needed.saturating_sub(1).into()), ("n_ctx", limit.into())];
                Self { details, ..error }.code("context_length_exceeded")
            }
            EngineRefusal::InvalidParam { param, .. } => Self::bad(param, message).code("invalid_value"),
            EngineRefusal::NothingToChoose { .. } => Self::param("logit_bias", message),
            EngineRefusal::OutOfMemory(_) => {
                Self::unavailable("no memory was left for this request", Duration::from_secs(5)).code("out_of_memory")
            }
            EngineRefusal::BadLogits { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).code("bad_logits")
            }
            EngineRefusal::DuplicateId(_) => Self::internal(&message),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        let seconds = Duration::from_secs;
        match failure {
            Failure::Poison { .. } => {
                let error = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error", message);
                error.code("poison_request")
            }
            Failure::Request(error) => error.into(),
            Failure::Deadline => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message).code("deadline_exceeded")
            }
            Failure::SlowClient => {
                Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message).code("slow_client")
            }
            Failure::Draining => Self::unavailable(message, seconds(5)).code("draining"),
            Failure::Unavailable => Self::unavailable(message, seconds(30)).code("model_unavailable"),
            Failure::Lost => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_its_status() {
        let model = || "m".to_owned();
        let wait = Duration::from_millis(1500);
        let full = Full::Requests { open: 1, limit: 1, retry_after: wait };
        let cases: Vec<(Refusal, u16, Option<&str>)> = vec![
            (Refusal::UnknownModel { model: model() }, 404, None),
            (Refusal::Busy { model: model(), full }, 429, Some("2")),
            (Refusal::Busy { model: model(), full: Full::TooLarge { needed: 2, limit: 1 } }, 400, None),
            (Refusal::Loading { model: model(), retry_after: wait }, 503, Some("2")),
            (Refusal::Unavailable { model: model() }, 503, Some("30")),
            (Refusal::Invalid(EngineRefusal::ContextExceeded { needed: 10, limit: 4 }), 400, None),
            (Refusal::Draining, 503, Some("5")),
            (Refusal::Overloaded, 429, Some("1")),
            (Refusal::RouterLost, 503, Some("1")),
        ];
        for (refusal, status, retry_after) in cases {
            let response = ApiError::from(refusal.clone()).into_response();
            let shown = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            assert_eq!((response.status().as_u16(), shown), (status, retry_after), "{refusal:?}");
        }
    }

    #[test]
    fn every_failure_has_its_status() {
        let cases = [
            (Failure::Poison { deaths: 2 }, 422),
            (Failure::Request(EngineRefusal::OutOfMemory("kv".into())), 503),
            (Failure::Request(EngineRefusal::NothingToChoose { index: 0 }), 400),
            (Failure::Deadline, 504),
            (Failure::SlowClient, 408),
            (Failure::Draining, 503),
            (Failure::Unavailable, 503),
            (Failure::Lost, 500),
        ];
        for (failure, status) in cases {
            assert_eq!(ApiError::from(failure.clone()).status.as_u16(), status, "{failure:?}");
        }
    }

    #[test]
    fn an_error_has_the_four_members_that_clients_read() {
        let error = ApiError::from(EngineRefusal::ContextExceeded { needed: 10, limit: 4 }).json();
        let error = &error["error"];
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!((&error["n_prompt_tokens"], &error["n_ctx"]), (&json!(9), &json!(4)));
        assert!(error["param"].is_null() && error["message"].is_string() && error["type"].is_string());
    }
}
