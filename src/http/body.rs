//! Request bodies: JSON within bounds and in time, with errors that name the parameter.

use super::error::ApiError;
use super::server::Peer;
use super::{App, bounded};
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::header;
use http_body_util::{BodyExt, Limited};
use hyper::body::Body as _;
use serde::de::DeserializeOwned;

/// A request's body, read as `T`.
pub(super) struct Json<T>(pub(super) T);

/// What is longer is parsed in the [lane](super::lane): this much takes a tenth of a millisecond, in which the streams of the
/// same thread stand still.
const AT_ONCE_BYTES: usize = 16 << 10;

impl<T: DeserializeOwned + Send + 'static> FromRequest<App> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let encoding = request.headers().get(header::CONTENT_ENCODING);
        if encoding.is_some_and(|encoding| encoding != "identity") {
            return Err(ApiError::bad(None, "compressed bodies are not taken"));
        }
        let client = request.extensions().get::<Peer>().and_then(Peer::client);
        let bytes = read(app, request.into_body()).await?;
        if bytes.len() <= AT_ONCE_BYTES {
            return parse(&bytes).map(Json);
        }
        let parsed = app.lane.run(client, move || parse(&bytes)).await;
        parsed.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(Json)
    }
}

async fn read(app: &App, body: Body) -> Result<bytes::Bytes, ApiError> {
    let limits = &app.settings.limits;
    let most = usize::try_from(limits.body_bytes).unwrap_or(usize::MAX);
    // Announced sizes are refused before anything is read.
    if body.size_hint().lower() > limits.body_bytes {
        return Err(ApiError::too_large(limits.body_bytes));
    }
    let reading = tokio::time::timeout(limits.body_timeout, Limited::new(body, most).collect());
    match reading.await {
        Err(_) => Err(ApiError::body_timeout()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::too_large(limits.body_bytes)),
        Ok(Err(_)) => Err(ApiError::bad(None, "the request's body broke off")),
        Ok(Ok(body)) => Ok(body.to_bytes()),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let message = error.inner().to_string();
        let path = error.path().to_string();
        if let Some((message, named)) = bounded::read_refusal(&message) {
            let place = format!(" at line {} column {}", error.inner().line(), error.inner().column());
            let message = message.strip_suffix(&place).unwrap_or(message);
            return ApiError::param(named.unwrap_or(&path), message);
        }
        match error.inner().classify() {
            serde_json::error::Category::Data => {
                let (param, code) = blame(&path, &message);
                ApiError::bad(param, message).code(code)
            }
            _ => ApiError::bad(None, format!("the body is not JSON that can be read: {message}")).code("invalid_json"),
        }
    })?;
    json.end().map_err(|error| ApiError::bad(None, format!("the body goes on after its JSON: {error}")))?;
    Ok(value)
}

/// Which parameter is wrong, and how; one that is missing is named by the message alone.
fn blame(path: &str, message: &str) -> (Option<String>, &'static str) {
    let missing = message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
    match (path, missing) {
        (".", Some(missing)) => (Some(missing.to_owned()), "missing_required_parameter"),
        (path, Some(missing)) => (Some(format!("{path}.{missing}")), "missing_required_parameter"),
        (".", None) => (None, "invalid_type"),
        (path, None) => (Some(path.to_owned()), "invalid_type"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[expect(dead_code, reason = "only its type matters")]
        count: u32,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        #[expect(dead_code, reason = "only its type matters")]
        list: Vec<Inner>,
    }

    #[test]
    fn errors_name_the_parameter() {
        let error = |text: &str| parse::<Outer>(text.as_bytes()).expect_err("it is wrong").json()["error"].take();
        let param = |text: &str| error(text)["param"].as_str().map(str::to_owned);
        assert_eq!(error(r#"{"list": [{"count": "x"}]}"#)["code"], "invalid_type");
        assert_eq!(error("{}")["code"], "missing_required_parameter");
        assert_eq!(param(r#"{"list": [{"count": 1}, {"count": "x"}]}"#).as_deref(), Some("list[1].count"));
        assert_eq!(param(r#"{"list": [{}]}"#).as_deref(), Some("list[0].count"));
        assert_eq!(param("{}").as_deref(), Some("list"));
        assert_eq!(param(r#"{"list": []} x"#), None);
        assert_eq!(param(r#"{"list": "#), None);
        let deep = param(&format!("{{\"list\": {}", "[".repeat(100_000)));
        assert!(deep.is_none_or(|param| param.starts_with("list")), "depth is bounded");
    }
}
