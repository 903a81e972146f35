//! Why a house does not open, or does not change.

use crate::client::CardError;
use playhouse_actors::inventory::InventoryError;
use playhouse_actors::policy::placement::PlacementError;
use playhouse_config::ConfigError;

/// Why there is no plan for a configuration on this box.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A model's file cannot be served.
    #[error("model `{model}` ({source_of}) cannot be served")]
    Model {
        /// The model.
        model: String,
        /// Its file.
        source_of: String,
        /// Why not.
        source: Box<CardError>,
    },
    /// A model's settings do not suit its file.
    #[error("model `{model}`: {why}")]
    Settings {
        /// The model.
        model: String,
        /// What was expected and found.
        why: String,
    },
    /// The devices could not be listed.
    #[error("the devices cannot be listed: {0}")]
    Inventory(#[from] InventoryError),
    /// There is no room, or no such device.
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

/// Why a house did not open. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The supervision tree could not be started.
    #[error("the supervision tree could not be started: {0}")]
    Tree(#[from] ractor::SpawnErr),
}

/// Why a configuration was not taken over. Everything goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The house was opened without a file.
    #[error("the house was opened without a configuration file: there is nothing to read again")]
    NoFile,
    /// The file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no plan for it.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The tree has ended.
    #[error("the house has ended")]
    Ended,
}

/// Why a house is not ready, and will not become so by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// No replica of a required model is left that could become ready.
    #[error("model `{model}` cannot be served: {why}")]
    Model {
        /// The model.
        model: String,
        /// How its last replica ended.
        why: String,
    },
    /// The tree has ended.
    #[error("the house has ended")]
    Ended,
}

/// There is nothing to restart under a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no model and no device `{target}`; expected one of: {targets}")]
pub struct NoSuchTarget {
    /// The name.
    pub target: String,
    /// What there is.
    pub targets: String,
}
