//! The HTTP front: the OpenAI API with server-sent events, health, metrics and a dashboard, for everybody who does not
//! speak the house's own messages.
//!
//! ```text
//! socket -> server (caps, timeouts, TLS) -> guard (id, Host, Origin, key) -> endpoint -> client -> house
//! ```
//!
//! Owns no model and no request: it reads [`crate::client::TokenStream`]s and drops them when a client goes away, which
//! cancels them. Bounds of requests are in [`crate::client::limits`]; what is bounded here is connections and bytes.
//!
//! Reading order: [`control`] says what the front needs of its host besides a client; `server` takes connections; `guard`
//! stands in front of every endpoint; `routes` is the table of endpoints; `openai` is the API; `output` parses what
//! models say.

pub mod control;
mod settings;
mod error;

mod server;
mod keys;
mod fresh;
mod guard;
mod trace;
mod quota;
mod bounded;
mod lane;
mod body;
mod routes;
mod id;

mod openai;
mod output;
mod sse;
mod tokens;
mod health;
mod manage;
mod metrics;
mod status;
mod openapi;
mod dashboard;

use crate::client::{Client, ModelHandle, TokenStream};
use arc_swap::ArcSwap;
use control::Control;
pub use error::ServeError;
pub use fresh::Reread;
use keys::Keys;
pub use keys::{KeyId, KeyRing};
pub use settings::{HttpSettings, TlsFiles};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

/// What this program is, for `/version` and `system_fingerprint`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct BuildInfo {
    /// The version of Playhouse.
    pub version: String,
    /// The commit it was built from, if known.
    pub commit: Option<String>,
}

impl Default for BuildInfo {
    fn default() -> Self {
        let commit = option_env!("PLAYHOUSE_COMMIT").map(str::to_owned);
        Self { version: env!("CARGO_PKG_VERSION").to_owned(), commit }
    }
}

/// What a front is made of. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    /// The way to the models.
    pub client: Client,
    /// The way to the host.
    pub control: Arc<dyn Control>,
    /// Bounds, keys, names.
    pub settings: HttpSettings,
    /// What this program is.
    pub build: BuildInfo,
}

/// What every endpoint sees.
struct Shared {
    client: Client,
    control: Arc<dyn Control>,
    settings: HttpSettings,
    build: BuildInfo,
    /// Same model, same seed, same fingerprint: same text.
    fingerprint: String,
    metrics: metrics::Metrics,
    keys: ArcSwap<Keys>,
    quotas: quota::Quotas,
    /// Where long bodies are read.
    lane: lane::Lane,
    /// Cancelled when the front stops: streams without an end of their own end then.
    stopping: CancellationToken,
}

type App = Arc<Shared>;

impl Shared {
    /// Logs what a model was asked, where the configuration asks for that.
    fn log_prompt(&self, handle: &ModelHandle, stream: &TokenStream) {
        if self.settings.log_prompts {
            let prompt = handle.detokenize(stream.prompt(), false);
            tracing::info!(model = handle.card().name, seed = stream.seed(), prompt, "a request was accepted");
        }
    }
}

impl Front {
    fn shared(self, stopping: CancellationToken) -> Result<App, ServeError> {
        let Front { client, control, settings, build } = self;
        let commit = build.commit.as_deref().map(|commit| format!("-{}", commit.get(..8).unwrap_or(commit)));
        let fingerprint = format!("playhouse-{}{}", build.version, commit.unwrap_or_default());
        let (metrics, quotas) = (metrics::Metrics::new(), quota::Quotas::default());
        let keys = Keys { users: settings.api_keys.clone(), admins: settings.admin_keys.clone() };
        let keys = ArcSwap::from_pointee(keys);
        let lane = lane::Lane::start().map_err(ServeError::Thread)?;
        Ok(Arc::new(Shared { client, control, settings, build, fingerprint, metrics, keys, quotas, lane, stopping }))
    }
}

impl Shared {
    fn key_files(&self) -> Vec<PathBuf> {
        let HttpSettings { api_keys_file, admin_keys_file, .. } = &self.settings;
        api_keys_file.iter().chain(admin_keys_file).cloned().collect()
    }

    /// Takes over what the files of keys hold now: of all of them, or of none.
    fn read_keys(&self) -> Result<(), ServeError> {
        let HttpSettings { api_keys, api_keys_file, admin_keys, admin_keys_file, .. } = &self.settings;
        let with = |keys: &KeyRing, file: &Option<PathBuf>| match file {
            Some(file) => keys.and_file(file),
            None => Ok(keys.clone()),
        };
        let keys = Keys { users: with(api_keys, api_keys_file)?, admins: with(admin_keys, admin_keys_file)? };
        self.keys.store(Arc::new(keys));
        Ok(())
    }
}

/// Where a front listens. Whatever comes in anywhere is one front: one set of counts, one set of limits.
#[derive(Debug)]
pub struct Listeners {
    /// For everybody who can reach the address.
    pub tcp: TcpListener,
    /// For whoever the permissions of the socket's file let through. They may do everything; keys are not asked for.
    pub unix: Option<UnixListener>,
}

/// Serves until `stop` is cancelled, then takes no more connections and waits for the requests in flight, at most
/// [`HttpSettings::drain`].
///
/// # Errors
/// [`ServeError::Exposed`] if the listener can be reached from outside and the settings have no keys or no TLS and do
/// not say that this is wanted; [`ServeError::Tls`] if certificate or key, [`ServeError::Keys`] if a file of keys
/// cannot be used, [`ServeError::Thread`] if the system has no thread left. Trouble with single connections ends those connections.
pub async fn serve(front: Front, listeners: impl Into<Listeners>, stop: CancellationToken) -> Result<(), ServeError> {
    let Listeners { tcp, unix } = listeners.into();
    let app = front.shared(stop.clone())?;
    let on_unix = async {
        match unix {
            Some(unix) => server::serve_unix(app.clone(), unix, stop.clone()).await,
            None => Ok(()),
        }
    };
    tokio::try_join!(server::serve_tcp(app.clone(), tcp, stop.clone()), on_unix).map(|_| ())
}

impl From<TcpListener> for Listeners {
    fn from(tcp: TcpListener) -> Self {
        Self { tcp, unix: None }
    }
}
