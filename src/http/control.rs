//! What the front needs of its host besides a way to the models: devices, the configured models, and what happened.

use playhouse_actors::EventLog;
use playhouse_actors::inventory::Device;
use serde::Serialize;
use std::future::Future;
use std::pin::Pin;

/// A future that a trait object can give back.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A model of the configuration, whether it runs or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfiguredModel {
    /// Its name.
    pub name: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Whether the house is to have it running.
    pub wanted: bool,
}

/// Why the host did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The configuration has no such model. Models are named, never found by a path.
    #[error("there is no model `{0}` in the configuration")]
    UnknownModel(String),
    /// There is no room for it, or its file cannot be read.
    #[error("{0}")]
    Refused(String),
    /// The host is about to stop.
    #[error("the host is stopping")]
    Stopping,
}

/// What the host does for the front. Nothing here may block.
pub trait Control: Send + Sync + 'static {
    /// The devices now; empty where there is no GPU.
    fn devices(&self) -> BoxFuture<'_, Vec<Device>>;

    /// The models of the configuration in its order.
    fn models(&self) -> Vec<ConfiguredModel>;

    /// Has a configured model run. Returns when its replicas are started, not when they are ready.
    fn load<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>>;

    /// Ends the replicas of a model; its requests go on to their end or are refused as the house does at a reload.
    fn unload<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>>;

    /// What the dashboard shows of the configuration. No secrets.
    fn config(&self) -> serde_json::Value;

    /// What happened since the host's start.
    fn events(&self) -> &EventLog;
}
