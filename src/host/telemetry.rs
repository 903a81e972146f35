//! What the host tells those who watch it: its log, lines for people or JSON for machines, on stderr; and, where it is
//! built with the feature `otlp` and told where to, the traces of requests.

#[cfg(feature = "otlp")]
mod otlp;

use playhouse_config::Host;
use playhouse_config::checked::LogFormat;
use tokio::runtime::Handle;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt};

/// What is logged where `RUST_LOG` does not say: what an operator must know, and nothing about clients' texts.
const DEFAULT_FILTER: &str = "info";

type BoxLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Why nobody can watch.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter of the log is none.
    #[error("RUST_LOG is `{text}`: {why}")]
    Filter {
        /// What it is.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// Traces were asked for.
    #[error("there can be no traces: {0}")]
    Traces(String),
}

/// What runs beside the host for those who watch.
#[derive(Debug, Default)]
#[must_use = "the last traces are sent by `finish`"]
pub struct Telemetry {
    #[cfg(feature = "otlp")]
    exporter: Option<otlp::Exporter>,
}

impl Telemetry {
    /// Sends what is left to send.
    pub async fn finish(self) {
        #[cfg(feature = "otlp")]
        if let Some(exporter) = self.exporter {
            exporter.finish().await;
        }
    }
}

/// Starts logging, and exporting traces if the configuration or `OTEL_EXPORTER_OTLP_ENDPOINT` says where to. Does nothing
/// if the program logs already.
///
/// # Errors
/// [`TelemetryError`].
pub fn start(host: &Host, runtime: &Handle) -> Result<Telemetry, TelemetryError> {
    let mut telemetry = Telemetry::default();
    let filter = filter()?;
    let mut layers = vec![log(host.log)];
    layers.extend(traces(host, runtime, &mut telemetry)?);
    // A program that has a subscriber of its own keeps it.
    let _ = tracing_subscriber::registry().with(layers).with(filter).try_init();
    Ok(telemetry)
}

fn filter() -> Result<EnvFilter, TelemetryError> {
    match std::env::var("RUST_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|why| TelemetryError::Filter { text, why: why.to_string() }),
        Err(_) => Ok(EnvFilter::new(DEFAULT_FILTER)),
    }
}

fn log(format: LogFormat) -> BoxLayer {
    let log = fmt::layer().with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => Box::new(log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))),
        LogFormat::Json => Box::new(log.json().flatten_event(true)),
    }
}

#[cfg(feature = "otlp")]
fn traces(host: &Host, runtime: &Handle, telemetry: &mut Telemetry) -> Result<Option<BoxLayer>, TelemetryError> {
    let endpoint = host.otlp_endpoint.clone().or_else(|| std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok());
    let Some(endpoint) = endpoint else { return Ok(None) };
    let (exporter, layer) =
        otlp::open(&endpoint, runtime).map_err(|why| TelemetryError::Traces(format!("{endpoint}: {why}")))?;
    telemetry.exporter = Some(exporter);
    Ok(Some(layer))
}

#[cfg(not(feature = "otlp"))]
fn traces(host: &Host, _: &Handle, _: &mut Telemetry) -> Result<Option<BoxLayer>, TelemetryError> {
    match &host.otlp_endpoint {
        None => Ok(None),
        Some(_) => Err(TelemetryError::Traces(
            "`host.otlp_endpoint` is set, and this program was built without the feature `otlp`".into(),
        )),
    }
}
