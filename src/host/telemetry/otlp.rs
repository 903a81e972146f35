//! Traces for an OpenTelemetry collector, over OTLP/HTTP. The exporter has a thread of its own that collects spans and
//! blocks; the bytes are sent by the host's runtime.

use super::BoxLayer;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use opentelemetry::trace::TracerProvider;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Handle;

/// For one delivery.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a collector's answer.
const ANSWER_MAX: usize = 64 << 10;

/// Sends what is collected until it is finished.
#[derive(Debug)]
pub(super) struct Exporter(SdkTracerProvider);

impl Exporter {
    pub(super) async fn finish(self) {
        // It blocks until the last spans are sent.
        let ended = tokio::task::spawn_blocking(move || self.0.shutdown()).await;
        if let Ok(Err(error)) = ended {
            tracing::warn!(%error, "the last traces were not sent");
        }
    }
}

/// An exporter to the collector at `endpoint`, and what collects spans for it.
pub(super) fn open(endpoint: &str, runtime: &Handle) -> Result<(Exporter, BoxLayer), String> {
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Sender(runtime.clone()))
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .with_timeout(PATIENCE)
        .build()
        .map_err(|error| error.to_string())?;
    let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "playhouse".into());
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name(name).build())
        .build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("playhouse"));
    Ok((Exporter(provider), Box::new(layer)))
}

/// Sends on the host's runtime, a connection for each delivery: there is one in some seconds.
#[derive(Debug)]
struct Sender(Handle);

impl HttpClient for Sender {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        // The timer must be made on the runtime, too: the caller's thread has none.
        let sending = self.0.spawn(async { tokio::time::timeout(PATIENCE, send(request)).await });
        Box::pin(async move { sending.await?? })
    }
}

async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let uri = request.uri();
    let host = uri.host().ok_or("the address has no host")?;
    let socket = TcpStream::connect((host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(80))).await?;
    let authority = uri.authority().ok_or("the address has no host")?.to_string();
    let path = uri.path().to_owned();
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
    let connection = tokio::spawn(connection);
    let mut request = request.map(Full::new);
    *request.uri_mut() = path.parse()?;
    request.headers_mut().insert(hyper::header::HOST, authority.parse()?);
    let (parts, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, ANSWER_MAX).collect().await?.to_bytes();
    connection.abort();
    Ok(Response::from_parts(parts, body))
}
