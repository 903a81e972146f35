//! What every request passes before an endpoint sees it: an id, the Host and Origin checks, and the key. None of it
//! reads the body.

use super::error::ApiError;
use super::keys::KeyId;
use super::server::Peer;
use super::{App, id, trace};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http_body_util::BodyExt;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};
use tracing::Instrument;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Bytes of a request id that is echoed.
const REQUEST_ID_MAX: usize = 128;

/// Who may use an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody.
    Public,
    /// Whoever has a key, if there are keys.
    Key,
    /// Whoever has an admin key, or comes by the Unix socket.
    Admin,
}

/// Which key a request has shown, for limits of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown(pub(super) KeyId);

/// Stands in front of everything: gives the request its id, a span and a line in the log, and turns a panic of ours into
/// an answer.
pub(super) async fn outermost(State(app): State<App>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let span = trace::span(id.to_str().unwrap_or_default(), &method, &path, request.headers());
    let mut response = async {
        match check_origin(&app, request.headers(), request.uri()) {
            Err(error) => refuse(request, error).await,
            Ok(()) => match AssertUnwindSafe(next.run(request)).catch_unwind().await {
                Ok(response) => response,
                Err(_) => ApiError::internal(&"an endpoint panicked").into_response(),
            },
        }
    }
    .instrument(span.clone())
    .await;
    let took = start.elapsed();
    // Neither the address's query nor the body: they may hold what users wrote.
    tracing::debug!(parent: &span, status = response.status().as_u16(), ms = took.as_millis() as u64, "answered");
    span.record("status", response.status().as_u16());
    app.metrics.http(&method, &path, response.status().as_u16(), took);
    response.headers_mut().insert(REQUEST_ID, id);
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response.map(|body| trace::carry(span, body))
}

/// The client's own id, if it is one that can be echoed and logged safely.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_plain = |value: &&HeaderValue| {
        (1..=REQUEST_ID_MAX).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    let shown = headers.get(REQUEST_ID).filter(is_plain).cloned();
    shown.unwrap_or_else(|| HeaderValue::from_str(&id::new("req-")).expect("hexadecimal digits are visible"))
}

/// Refuses names that are not ours, so that no page can reach a local house by rebinding its own name to 127.0.0.1; and
/// requests that a page of another origin makes, which browsers send without asking.
fn check_origin(app: &App, headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
    let settings = &app.settings;
    let host = uri.authority().map(|authority| authority.as_str());
    let host = host.or_else(|| headers.get(header::HOST).and_then(|host| host.to_str().ok()));
    // HTTP/1.0 has no Host, and no browser speaks it.
    if let Some(host) = host {
        let name = host_name(host);
        let is_ours = is_local_name(name)
            || settings.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
            || (settings.allowed_hosts.is_empty() && !app.keys.load().users.is_empty());
        if !is_ours {
            let shown: String = name.chars().take(100).collect();
            return Err(ApiError::forbidden(format!("the name `{shown}` is not among the allowed hosts")));
        }
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().unwrap_or("null");
    let allowed = &settings.cors_origins;
    let is_allowed = allowed.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin));
    let is_own = origin.split_once("://").is_some_and(|(_, authority)| host == Some(authority));
    if is_allowed || is_own {
        return Ok(());
    }
    Err(ApiError::forbidden("pages of this origin may not use this API; the setting is `cors_origins`"))
}

/// The name of `name:port`, `[::1]:port`.
fn host_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    host.rsplit_once(':').map_or(host, |(name, _)| name)
}

/// An address cannot be rebound, and `localhost` is resolved by the machine itself.
fn is_local_name(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || name.to_ascii_lowercase().ends_with(".localhost")
}

/// Asks for the key that `access` needs.
pub(super) async fn check_key(
    State((app, access)): State<(App, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    if request.extensions().get::<Peer>() == Some(&Peer::Unix) || access == Access::Public {
        return next.run(request).await;
    }
    let keys = app.keys.load_full();
    let shown = shown_key(request.headers());
    let admin = shown.and_then(|key| keys.admins.find(key));
    let user = shown.and_then(|key| keys.users.find(key));
    match access {
        // Clients of the OpenAI API always show something: where there are no keys it does not matter what.
        Access::Key if keys.users.is_empty() || admin.or(user).is_some() => {}
        Access::Admin if admin.is_some() => {}
        Access::Admin if user.is_some() || keys.admins.is_empty() => {
            return refuse(request, ApiError::forbidden("this needs an admin key, or the admin socket")).await;
        }
        _ => return refuse(request, ApiError::unauthenticated()).await,
    }
    if let Some(user) = user.filter(|_| admin.is_none()) {
        request.extensions_mut().insert(Shown(user));
    }
    next.run(request).await
}

/// Bytes of a refused body that are taken in.
const UNREAD_MAX: usize = 64 << 10;
/// For taking them in.
const UNREAD_PATIENCE: Duration = Duration::from_millis(250);

/// Answers a request whose body nobody read. Over HTTP/2 the rest of such a request is reset, and some clients (curl 7.88
/// is one) take that for the end of everything and never show the answer; so a small body is taken in, and thrown away.
async fn refuse(request: Request, error: ApiError) -> Response {
    if request.version() == Version::HTTP_2 {
        let mut body = request.into_body();
        let rest = async {
            let mut n_bytes = 0;
            while let Some(Ok(frame)) = body.frame().await {
                n_bytes += frame.data_ref().map_or(0, bytes::Bytes::len);
                if n_bytes > UNREAD_MAX {
                    return;
                }
            }
        };
        // Who sends slowly, or much, is answered all the same.
        let _ = tokio::time::timeout(UNREAD_PATIENCE, rest).await;
    }
    error.into_response()
}

fn shown_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let bearer = bearer.and_then(|value| {
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key.trim_ascii())
    });
    bearer.or_else(|| headers.get(API_KEY).map(HeaderValue::as_bytes))
}

/// The answer to addresses that are none.
pub(super) async fn no_such_page(request: Request) -> Response {
    let error = ApiError::no_such_page(request.uri().path());
    refuse(request, error).await
}

/// The answer to methods that an endpoint does not take.
pub(super) async fn wrong_method(request: Request) -> Response {
    let error = ApiError::wrong_method(request.method().as_str(), request.uri().path());
    refuse(request, error).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_from_their_ports() {
        assert_eq!(host_name("localhost:7070"), "localhost");
        assert_eq!(host_name("[::1]:7070"), "::1");
        assert_eq!(host_name("moon.example"), "moon.example");
        assert!(is_local_name("127.0.0.1") && is_local_name("::1") && is_local_name("LOCALHOST"));
        assert!(!is_local_name("moon.example") && !is_local_name("localhost.example") && !is_local_name(""));
    }

    #[test]
    fn ids_that_could_break_a_log_line_are_replaced() {
        let echoed = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(id).expect("a header"));
            request_id(&headers) == id
        };
        assert!(echoed("a-1") && echoed(&"x".repeat(128)));
        assert!(!echoed("") && !echoed("a b") && !echoed(&"x".repeat(129)));
    }
}
