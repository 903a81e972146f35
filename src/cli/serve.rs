//! `playhouse serve`: open the house of a configuration and run it until it is told to stop.

use super::{CliError, Exit, RunCommand, print};
use crate::host::front::HouseControl;
use crate::host::service::{Ending, run};
use crate::host::{OpenError, Parts, Playhouse, telemetry};
use crate::http::{self, BuildInfo, Front, HttpSettings};
use playhouse_actors::inventory::Device;
use playhouse_actors::policy::placement::Plan;
use playhouse_config::units::Bytes;
use playhouse_config::{Config, Overrides};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// For blocking calls that are under way when everything else has ended.
const LEFT_BEHIND: Duration = Duration::from_millis(500);

/// The flags of `serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The configuration [default: the embedded model on every GPU, or on the CPU where there is none]
    #[arg(value_name = "CONFIG")]
    config: Option<PathBuf>,
    /// Address and port of the HTTP server; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT")]
    address: Option<String>,
    /// The local admin socket
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<String>,
    /// Lines for people, or JSON for machines
    #[arg(long, value_name = "FORMAT", value_parser = ["text", "json"])]
    log: Option<String>,
    /// Serve on an address that other machines can reach without keys or TLS
    #[arg(long)]
    insecure: bool,
    /// How long streams may finish after a stop, such as 30s
    #[arg(long, value_name = "DURATION")]
    drain: Option<String>,
    /// Set any key of [host], [defaults] or [supervision], such as supervision.max_restarts=8; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, found `{text}`"))?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

impl Args {
    /// What outranks the file: the environment, and above it these flags.
    fn overrides(&self) -> Overrides {
        let named = [
            ("--address", "host.address", &self.address),
            ("--admin-socket", "host.admin_socket", &self.admin_socket),
            ("--log", "host.log", &self.log),
            ("--drain", "host.drain", &self.drain),
        ];
        let named = named.into_iter().filter_map(|(flag, key, value)| Some((flag, key, value.as_deref()?)));
        let set = self.set.iter().map(|(key, value)| ("--set", key.as_str(), value.as_str()));
        let start = Overrides::from_process_env();
        named.chain(set).fold(start, |overrides, (flag, key, value)| overrides.with_argument(flag, key, value))
    }
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let overrides = self.overrides();
        let config = Config::open(self.config.as_deref(), &overrides)?;
        telemetry::start(config.host.log).map_err(CliError::usage)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|error| CliError::new(Exit::Transient, error))?;
        let ended = runtime.block_on(serve(config, overrides, self.insecure));
        // A read that hangs, such as that of a reload from a network that is gone, does not keep a host that was stopped.
        runtime.shutdown_timeout(LEFT_BEHIND);
        ended
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, CliError> {
    let failed = |error| CliError::new(Exit::Transient, format!("cannot listen on {address}: {error}"));
    TcpListener::bind(address).await.map_err(failed)
}

async fn serve(config: Config, overrides: Overrides, insecure: bool) -> Result<(), CliError> {
    let settings = HttpSettings { insecure, ..HttpSettings::from(&config.host) };
    // First of all: an address that is taken is found before anything is loaded.
    let listener = bind(config.host.address).await?;
    let address = listener.local_addr().map_err(|error| CliError::new(Exit::Transient, error))?;
    let house = Playhouse::open_with(config, Parts { overrides, ..Parts::default() }).await?;
    print(&welcome(&house.devices().await, &house.plan(), address))?;
    let control = Arc::new(HouseControl::new(house.clone()));
    let build = BuildInfo { version: env!("CARGO_PKG_VERSION").to_owned(), commit: None };
    let front = Front { client: house.client().clone(), control, settings, build };
    let stop = CancellationToken::new();
    let mut serving = tokio::spawn(http::serve(front, listener, stop.clone()));
    let ending = tokio::select! {
        ending = run(house.clone()) => ending.map_err(|error| CliError::new(Exit::Transient, error))?,
        served = &mut serving => {
            house.stop().await;
            return match served {
                Ok(Err(error)) => Err(CliError::new(Exit::BadConfig, error)),
                Ok(Ok(())) | Err(_) => Err(CliError::new(Exit::Software, "the HTTP front ended")),
            };
        }
    };
    // Streams have had their ends; what is left is writing them out.
    stop.cancel();
    let _ = serving.await;
    match ending {
        Ending::Asked => Ok(()),
        Ending::GaveUp(reason) => Err(CliError::new(Exit::Software, format!("the supervisor gave up: {reason}"))),
    }
}

/// The devices found and what goes where.
fn welcome(devices: &[Device], plan: &Plan, address: SocketAddr) -> String {
    let mut text = String::new();
    if devices.is_empty() {
        text.push_str("no GPU found; models run on the CPU\n");
    }
    for device in devices {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}  {}  {} free", device.uuid, device.name, Bytes(device.free_bytes));
    }
    for (device, placement) in plan.placements() {
        let _ = writeln!(
            text,
            "{}/{} on {device}: {} of weights, {} for KV",
            placement.model,
            placement.replica,
            Bytes(placement.weights_bytes),
            Bytes(placement.kv_bytes)
        );
    }
    let _ = writeln!(text, "http://{address}");
    if let Some((_, placement)) = plan.placements().next() {
        let body = format!(r#"{{"model": "{}", "prompt": "autumn moon", "max_tokens": 64}}"#, placement.model);
        let _ = writeln!(text, "curl http://{address}/v1/completions -H 'content-type: application/json' -d '{body}'");
    }
    text
}

impl From<OpenError> for CliError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Plan(error) => error.into(),
            OpenError::Tree(_) => Self::new(Exit::Software, error),
        }
    }
}
