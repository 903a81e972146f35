//! The configuration after every check: values with their units resolved, defaults filled in, nothing left to doubt.

use crate::device::Devices;
use crate::error::ConfigError;
use crate::overrides::Overrides;
pub use crate::raw::{Isolation, KvType, LogFormat, Restart, Strategy};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Models that are part of the program.
pub const EMBEDDED: &[&str] = &["basho"];

/// What the host was asked to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file it was read from.
    pub path: Option<PathBuf>,
    /// The host process.
    pub host: Host,
    /// The models in the order of the file; at least one.
    pub models: Vec<Model>,
    /// Restarts.
    pub supervision: Supervision,
    /// Devices that are not there; if there is one, the real ones are not looked at.
    pub simulate: Vec<SimulatedDevice>,
}

impl Config {
    /// Reads and checks a file under `overrides`. Without a file: the embedded model on every GPU, or on the CPU where
    /// there is none.
    ///
    /// # Errors
    /// [`ConfigError::Read`] if the file cannot be read, [`ConfigError::Invalid`] with everything that is wrong in it.
    pub fn open(path: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let Some(path) = path else { return Self::from_text("configuration", "", overrides) };
        let read_error = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read_error)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut config = crate::check::check(&path.display().to_string(), &text, folder, overrides)?;
        config.path = Some(path.to_owned());
        Ok(config)
    }

    /// Checks a text. `label` stands for the file in messages; relative paths stay as they are.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with everything that is wrong.
    pub fn from_text(label: &str, text: &str, overrides: &Overrides) -> Result<Self, ConfigError> {
        crate::check::check(label, text, Path::new(""), overrides)
    }

    /// The model that a client calls `name`: by name or alias.
    pub fn model(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|model| model.name == name || model.aliases.iter().any(|alias| alias == name))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: None,
            host: Host::default(),
            models: vec![Model::embedded_default()],
            supervision: Supervision::default(),
            simulate: Vec::new(),
        }
    }
}

/// The host process.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Where the HTTP server listens.
    pub address: SocketAddr,
    /// Whether it may listen where others can reach it without keys or certificate.
    pub insecure: bool,
    /// The local admin socket, if not the usual one.
    pub admin_socket: Option<PathBuf>,
    /// A Unix socket with HTTP for whoever may open it.
    pub http_socket: Option<PathBuf>,
    /// Keys of which a client must show one; with none, everybody who can connect may speak.
    pub api_keys: Vec<ApiKey>,
    /// File with more of them.
    pub api_keys_file: Option<PathBuf>,
    /// Keys that may also load and unload models.
    pub admin_keys: Vec<ApiKey>,
    /// File with more of them.
    pub admin_keys_file: Option<PathBuf>,
    /// Certificate and key; without them connections are plain.
    pub tls: Option<Tls>,
    /// Names of the server besides addresses and `localhost`.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may use the API; `*` is all.
    pub cors_origins: Vec<String>,
    /// Bounds of each key.
    pub per_key: PerKey,
    /// Silence in a stream after which a comment is sent.
    pub keep_alive: Duration,
    /// Between two looks at the files of keys and certificates.
    pub look_every: Duration,
    /// Where traces are sent.
    pub otlp_endpoint: Option<String>,
    /// How long streams may finish after a stop.
    pub drain: Duration,
    /// Format of the log.
    pub log: LogFormat,
    /// Whether prompts are logged.
    pub log_prompts: bool,
    /// Bounds.
    pub limits: Limits,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 7070)),
            insecure: false,
            admin_socket: None,
            http_socket: None,
            api_keys: Vec::new(),
            api_keys_file: None,
            admin_keys: Vec::new(),
            admin_keys_file: None,
            tls: None,
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            per_key: PerKey::default(),
            keep_alive: Duration::from_secs(15),
            look_every: Duration::from_secs(5),
            otlp_endpoint: None,
            drain: Duration::from_secs(30),
            log: LogFormat::Text,
            log_prompts: false,
            limits: Limits::default(),
        }
    }
}

/// Where certificate and key are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
}

/// Bounds of one key; `None` is no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerKey {
    /// Requests open at a time.
    pub streams: Option<u32>,
    /// Requests begun in a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers in a minute.
    pub tokens_per_minute: Option<u64>,
}

/// A secret that clients show. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    pub(crate) fn new(key: String) -> Self {
        Self(key)
    }

    /// The key itself, for comparing in constant time.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Bounds of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at a time.
    pub connections: u32,
    /// Connections open at a time from one address.
    pub connections_per_ip: u32,
    /// Requests open at a time on one HTTP/2 connection.
    pub http2_streams: u32,
    /// Bytes of a request body.
    pub body_bytes: u64,
    /// For a request's headers.
    pub header_timeout: Duration,
    /// For a request's body.
    pub body_timeout: Duration,
    /// For a connection without a request.
    pub idle_timeout: Duration,
    /// For a request in all.
    pub request_timeout: Duration,
    /// Accepted, unfinished requests of one model.
    pub queued_requests: u32,
    /// Tokens that those may still need.
    pub queued_tokens: u64,
    /// Events a stream may hold for a slow client.
    pub stream_events: u32,
    /// How long a stream may stay full.
    pub client_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_ip: 512,
            http2_streams: 256,
            body_bytes: 2 << 20,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(75),
            request_timeout: Duration::from_secs(600),
            queued_requests: 256,
            queued_tokens: 1 << 20,
            stream_events: 64,
            client_timeout: Duration::from_secs(30),
        }
    }
}

/// Where a model's weights are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// In a GGUF file, or the first of a split one.
    File(PathBuf),
    /// In the program, under one of the names in [`EMBEDDED`].
    Embedded(String),
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Embedded(name) => write!(f, "embedded:{name}"),
        }
    }
}

/// How many copies of a model there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Replicas {
    /// So many, each on a device of its own (on the CPU they share).
    Count(u32),
    /// One on every device that is allowed.
    All,
}

/// The most that a replica takes of a device's memory: weights, KV, scratch and the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryLimit {
    /// So many bytes of whichever device.
    Bytes(u64),
    /// A share of the device, 1 to 100.
    Percent(u8),
}

impl MemoryLimit {
    /// Bytes of a device that has `total_bytes`.
    pub fn of(self, total_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            // Less than the whole, so it fits.
            Self::Percent(percent) => (u128::from(total_bytes) * u128::from(percent) / 100) as u64,
        }
    }
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => crate::units::Bytes(*bytes).fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// What clients call it; unique among names and aliases.
    pub name: String,
    /// What they may also call it.
    pub aliases: Vec<String>,
    /// Its weights.
    pub source: ModelSource,
    /// Where it may run.
    pub devices: Devices,
    /// How often.
    pub replicas: Replicas,
    /// Most tokens of a sequence; without it, what the model was trained for.
    pub context: Option<u32>,
    /// Sequences computed together.
    pub max_sequences: u32,
    /// Tokens computed in one step.
    pub max_batch_tokens: u32,
    /// Bytes for KV; without it, what full contexts need or the device has left.
    pub kv_budget_bytes: Option<u64>,
    /// Most memory of a device that a replica takes; without it, what is free.
    pub memory_limit: Option<MemoryLimit>,
    /// Number format of KV.
    pub kv_type: KvType,
    /// Process or thread.
    pub isolation: Isolation,
    /// Higher is placed first.
    pub priority: i32,
    /// Whether readiness waits for it.
    pub required: bool,
}

impl Model {
    /// The embedded model as it is served without a configuration: on every GPU, or on the CPU where there is none.
    pub fn embedded_default() -> Self {
        Self {
            name: EMBEDDED[0].to_owned(),
            aliases: Vec::new(),
            source: ModelSource::Embedded(EMBEDDED[0].to_owned()),
            devices: Devices::AutoElseCpu,
            replicas: Replicas::All,
            ..Self::default()
        }
    }
}

impl Default for Model {
    /// The defaults of a model's settings; name and source are empty.
    fn default() -> Self {
        Self {
            name: String::new(),
            aliases: Vec::new(),
            source: ModelSource::Embedded(String::new()),
            devices: Devices::Auto,
            replicas: Replicas::Count(1),
            context: None,
            max_sequences: 16,
            max_batch_tokens: 512,
            kv_budget_bytes: None,
            memory_limit: None,
            kv_type: KvType::F16,
            isolation: Isolation::Auto,
            priority: 0,
            required: true,
        }
    }
}

/// When and how often workers are restarted.
#[derive(Debug, Clone, PartialEq)]
pub struct Supervision {
    /// Whose end restarts whom on a device.
    pub strategy: Strategy,
    /// Failures of a device within `window` that quarantine it.
    pub max_restarts: u32,
    /// Over which failures are counted.
    pub window: Duration,
    /// Which ends are followed by a restart.
    pub restart: Restart,
    /// For a worker to end when asked.
    pub shutdown: Duration,
    /// Waiting before a restart.
    pub backoff: Backoff,
    /// Time without failure that clears the count.
    pub reset_after: Duration,
    /// A longer step is a hang.
    pub step_timeout: Duration,
    /// A longer load is a hang.
    pub load_timeout: Duration,
    /// Between two signs of life.
    pub heartbeat: Duration,
    /// Deaths in flight after which a request is poison.
    pub poison_deaths: u32,
}

impl Default for Supervision {
    fn default() -> Self {
        Self {
            strategy: Strategy::OneForOne,
            max_restarts: 4,
            window: Duration::from_secs(600),
            restart: Restart::Permanent,
            shutdown: Duration::from_secs(10),
            backoff: Backoff::default(),
            reset_after: Duration::from_secs(600),
            step_timeout: Duration::from_secs(30),
            load_timeout: Duration::from_secs(600),
            heartbeat: Duration::from_secs(1),
            poison_deaths: 2,
        }
    }
}

/// Waiting before a restart: nothing before the first, then `min`, doubled each time up to `max`.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    /// Before the second restart.
    pub min: Duration,
    /// At most.
    pub max: Duration,
    /// Share of a wait by which it varies, 0 to 1.
    pub jitter: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { min: Duration::from_secs(1), max: Duration::from_secs(60), jitter: 0.2 }
    }
}

/// A device that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimulatedDevice {
    /// What the card is called.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// Bytes of memory.
    pub vram_bytes: u64,
    /// Bytes of it that somebody else has.
    pub used_bytes: u64,
}
