//! What the front is told by its host.

use super::keys::KeyRing;
use playhouse_config::checked::{Host, Limits};
use std::path::PathBuf;
use std::time::Duration;

/// Where certificate and key are. They are read again when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// The private key, PEM.
    pub key: PathBuf,
    /// How often to look whether they changed.
    pub look_every: Duration,
}

/// What the front is told by its host.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Bounds of connections and bodies.
    pub limits: Limits,
    /// Keys of which a client must show one; with none, everybody who can connect may speak.
    pub api_keys: KeyRing,
    /// Keys that may also load and unload models. With none, only the Unix socket may.
    pub admin_keys: KeyRing,
    /// Certificate and key; without them, connections are plain.
    pub tls: Option<TlsFiles>,
    /// Serve on an address that others can reach without keys or TLS.
    pub insecure: bool,
    /// Host names under which clients may reach the front, besides addresses and `localhost`. If there are none and
    /// there are keys, every name will do: a page that rebinds a name has no key.
    pub allowed_hosts: Vec<String>,
    /// Origins whose pages may read answers; `*` is all. With none, no page but the front's own may.
    pub cors_origins: Vec<String>,
    /// Most requests at a time on one HTTP/2 connection.
    pub h2_streams: u32,
    /// Most streams open at a time for one key; `None` is no limit.
    pub streams_per_key: Option<u32>,
    /// A comment is sent into a stream that has been silent for so long.
    pub keep_alive: Duration,
    /// How long requests in flight may finish after a stop.
    pub drain: Duration,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self::from(&Host::default())
    }
}

impl From<&Host> for HttpSettings {
    fn from(host: &Host) -> Self {
        Self {
            limits: host.limits.clone(),
            api_keys: host.api_keys.iter().map(playhouse_config::checked::ApiKey::expose).collect(),
            admin_keys: KeyRing::default(),
            tls: None,
            insecure: false,
            allowed_hosts: Vec::new(),
            cors_origins: Vec::new(),
            h2_streams: 256,
            streams_per_key: None,
            keep_alive: Duration::from_secs(15),
            drain: host.drain,
        }
    }
}
