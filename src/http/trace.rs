//! The span of a request, from its headers to the last byte of its answer. What the house does for it (queue, prefill,
//! decode, resume) is part of it, see `playhouse_actors`; what the client traces is what it is part of.

use axum::body::Body;
use axum::http::{HeaderMap, Method};
use hyper::body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use tracing::Span;

/// A span for a request with this id. A `traceparent` that is whole is continued: its trace id is in the log, and where
/// traces are exported the span is part of the client's.
pub(super) fn span(id: &str, method: &Method, path: &str, headers: &HeaderMap) -> Span {
    let trace = trace_id(headers).unwrap_or_default();
    let span = tracing::info_span!("request", id, %method, path, trace, status = tracing::field::Empty);
    if !trace.is_empty() {
        continue_trace(&span, headers);
    }
    span
}

/// The trace id of a W3C `traceparent`: `00-<32 hex digits>-<16>-<2>`.
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let parts: Vec<&str> = headers.get("traceparent")?.to_str().ok()?.split('-').collect();
    let is_hex = |part: &str, n| part.len() == n && part.bytes().all(|b| b.is_ascii_hexdigit());
    match parts[..] {
        ["00", trace, span, flags] if is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2) => Some(trace),
        _ => None,
    }
}

#[cfg(feature = "otlp")]
fn continue_trace(span: &Span, headers: &HeaderMap) {
    use opentelemetry::propagation::TextMapPropagator;
    use tracing_opentelemetry::OpenTelemetrySpanExt;
    let propagator = opentelemetry_sdk::propagation::TraceContextPropagator::new();
    // Fails where nobody exports traces.
    let _ = span.set_parent(propagator.extract(&opentelemetry_http::HeaderExtractor(headers)));
}

#[cfg(not(feature = "otlp"))]
fn continue_trace(_: &Span, _: &HeaderMap) {}

/// An answer that is part of `span` until it is sent, or given up.
pub(super) fn carry(span: Span, body: Body) -> Body {
    if span.is_disabled() {
        return body;
    }
    Body::new(Spanned { body, span })
}

struct Spanned {
    body: Body,
    span: Span,
}

impl Drop for Spanned {
    fn drop(&mut self) {
        // Exporters take the last time that a span was left for its end; otherwise that would be the answer's headers.
        drop(self.span.enter());
    }
}

impl hyper::body::Body for Spanned {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn only_whole_traceparents_are_read() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_static(text));
            trace_id(&headers).map(str::to_owned)
        };
        let whole = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(read(whole).as_deref(), Some("0af7651916cd43dd8448eb211c80319c"));
        assert_eq!(read("00-0af7-b7ad6b7169203331-01"), None);
        assert_eq!(read(""), None);
    }
}
