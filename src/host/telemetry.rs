//! The log of the host: lines for people, or JSON for machines, on stderr.

use playhouse_config::checked::LogFormat;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

/// What is logged where `RUST_LOG` does not say: what an operator must know, and nothing about clients' texts.
const DEFAULT_FILTER: &str = "info";

/// Starts logging. Does nothing if the program logs already.
///
/// # Errors
/// What is wrong with `RUST_LOG`.
pub fn start(format: LogFormat) -> Result<(), String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|error| format!("RUST_LOG is `{text}`: {error}"))?,
        Err(_) => EnvFilter::new(DEFAULT_FILTER),
    };
    let log = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A program that has a subscriber of its own keeps it.
    let _ = match format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    Ok(())
}
