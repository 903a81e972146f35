//! What the front is told by its host.

use super::fresh::Reread;
use super::keys::KeyRing;
use playhouse_config::checked::{Host, Limits, PerKey};
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
    /// File with more of them, read when the front begins to serve and again when it changes.
    pub api_keys_file: Option<PathBuf>,
    /// Keys that may also load and unload models. With none, only the Unix socket may.
    pub admin_keys: KeyRing,
    /// File with more of them.
    pub admin_keys_file: Option<PathBuf>,
    /// How often to look whether the files of keys changed.
    pub look_every: Duration,
    /// Has files of keys and certificates read again at once.
    pub reread: Reread,
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
    /// What each of the keys may do; admin keys may do without bound.
    pub per_key: PerKey,
    /// A comment is sent into a stream that has been silent for so long.
    pub keep_alive: Duration,
    /// How long requests in flight may finish after a stop.
    pub drain: Duration,
    /// Whether prompts are logged.
    pub log_prompts: bool,
}

impl HttpSettings {
    /// Whether a client must show a key.
    pub fn asks_for_keys(&self) -> bool {
        !self.api_keys.is_empty() || self.api_keys_file.is_some()
    }
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self::from(&Host::default())
    }
}

impl From<&Host> for HttpSettings {
    fn from(host: &Host) -> Self {
        let tls = host.tls.clone();
        Self {
            limits: host.limits.clone(),
            api_keys: host.api_keys.as_slice().into(),
            api_keys_file: host.api_keys_file.clone(),
            admin_keys: host.admin_keys.as_slice().into(),
            admin_keys_file: host.admin_keys_file.clone(),
            look_every: host.look_every,
            reread: Reread::default(),
            tls: tls.map(|tls| TlsFiles { certificate: tls.certificate, key: tls.key, look_every: host.look_every }),
            insecure: host.insecure,
            allowed_hosts: host.allowed_hosts.clone(),
            cors_origins: host.cors_origins.clone(),
            h2_streams: host.limits.http2_streams,
            per_key: host.per_key,
            keep_alive: host.keep_alive,
            drain: host.drain,
            log_prompts: host.log_prompts,
        }
    }
}
