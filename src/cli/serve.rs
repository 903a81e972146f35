//! `playhouse serve`: open the house of a configuration and run it until it is told to stop.

use super::{CliError, Exit, RunCommand, print};
use crate::host::admin::SocketError;
use crate::host::admin::socket::BoundSocket;
use crate::host::front::HouseControl;
use crate::host::service::{Ending, run};
use crate::host::telemetry::TelemetryError;
use crate::host::{OpenError, Parts, Playhouse, telemetry};
use crate::http::{self, BuildInfo, Front, HttpSettings, Listeners, Reread};
use playhouse_actors::inventory::Device;
use playhouse_actors::policy::placement::Plan;
use playhouse_config::units::Bytes;
use playhouse_config::{Config, Overrides};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
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
    /// Certificate chain of the HTTP server, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<String>,
    /// Private key of the HTTP server, PEM
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<String>,
    /// Keys of which a client must show one: a key, or sha256: and its hash, in each line
    #[arg(long, value_name = "FILE")]
    api_keys_file: Option<String>,
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
        let insecure = self.insecure.then(|| "true".to_owned());
        let named = [
            ("--address", "host.address", &self.address),
            ("--insecure", "host.insecure", &insecure),
            ("--tls-certificate", "host.tls.certificate", &self.tls_certificate),
            ("--tls-key", "host.tls.key", &self.tls_key),
            ("--api-keys-file", "host.api_keys_file", &self.api_keys_file),
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
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.map_err(|error| CliError::new(Exit::Transient, error))?;
        let telemetry = telemetry::start(&config.host, runtime.handle())?;
        let ended = runtime.block_on(async {
            let ended = serve(config, overrides).await;
            telemetry.finish().await;
            ended
        });
        // A read that hangs, such as that of a reload from a network that is gone, does not keep a host that was stopped.
        runtime.shutdown_timeout(LEFT_BEHIND);
        ended
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, CliError> {
    let failed = |error| CliError::new(Exit::Transient, format!("cannot listen on {address}: {error}"));
    TcpListener::bind(address).await.map_err(failed)
}

/// Has the front read its files of keys and certificates again at every SIGHUP.
fn reread_at_hangup(reread: Reread) -> Result<(), CliError> {
    let mut hangups = signal(SignalKind::hangup()).map_err(|error| CliError::new(Exit::Transient, error))?;
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            reread.now();
        }
    });
    Ok(())
}

async fn serve(config: Config, overrides: Overrides) -> Result<(), CliError> {
    let settings = HttpSettings::from(&config.host);
    let scheme = if settings.tls.is_some() { "https" } else { "http" };
    reread_at_hangup(settings.reread.clone())?;
    // First of all: an address that is taken is found before anything is loaded.
    let tcp = bind(config.host.address).await?;
    let mut socket = config.host.http_socket.as_deref().map(BoundSocket::bind).transpose()?;
    let unix = socket.as_mut().and_then(BoundSocket::take_listener).map(UnixListener::from_std).transpose();
    let unix = unix.map_err(|error| CliError::new(Exit::Transient, error))?;
    let address = tcp.local_addr().map_err(|error| CliError::new(Exit::Transient, error))?;
    let house = Playhouse::open_with(config, Parts { overrides, ..Parts::default() }).await?;
    let url = format!("{scheme}://{}", shown_name(&settings, address));
    print(&welcome(&house.devices().await, &house.plan(), &url))?;
    let _greeting = AbortOnDrop(tokio::spawn(greet(house.clone(), url, settings.asks_for_keys())));
    let control = Arc::new(HouseControl::new(house.clone()));
    let front = Front { client: house.client().clone(), control, settings, build: BuildInfo::default() };
    let stop = CancellationToken::new();
    let mut serving = tokio::spawn(http::serve(front, Listeners { tcp, unix }, stop.clone()));
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

/// The name under which a client on this machine finds the front.
fn shown_name(settings: &HttpSettings, address: SocketAddr) -> String {
    let port = address.port();
    match (settings.allowed_hosts.first(), &settings.tls) {
        // A certificate is for a name.
        (Some(name), Some(_)) => format!("{name}:{port}"),
        (None, Some(_)) if address.ip().is_loopback() || address.ip().is_unspecified() => format!("localhost:{port}"),
        _ if address.ip().is_unspecified() => format!("127.0.0.1:{port}"),
        _ => address.to_string(),
    }
}

/// The devices found, what goes where, and the address.
fn welcome(devices: &[Device], plan: &Plan, url: &str) -> String {
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
    let _ = writeln!(text, "{url}");
    text
}

/// Once the models are ready: a line to try them with.
async fn greet(house: Playhouse, url: String, has_keys: bool) {
    if let Err(error) = house.ready().await {
        tracing::error!(%error, "the house is not ready");
        return;
    }
    let plan = house.plan();
    let Some((_, placement)) = plan.placements().next() else { return };
    let key = if has_keys { " -H \"authorization: Bearer $KEY\"" } else { "" };
    let body = format!(r#"{{"model": "{}", "prompt": "autumn moon", "max_tokens": 64}}"#, placement.model);
    // Nobody may be reading any more.
    let _ = print(&format!("curl {url}/v1/completions{key} -H 'content-type: application/json' -d '{body}'\n"));
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl From<OpenError> for CliError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Plan(error) => error.into(),
            OpenError::Tree(_) => Self::new(Exit::Software, error),
        }
    }
}

impl From<SocketError> for CliError {
    fn from(error: SocketError) -> Self {
        Self::new(Exit::Transient, error)
    }
}

impl From<TelemetryError> for CliError {
    fn from(error: TelemetryError) -> Self {
        match error {
            TelemetryError::Filter { .. } => Self::new(Exit::Usage, error),
            TelemetryError::Traces(_) => Self::new(Exit::BadConfig, error),
        }
    }
}
