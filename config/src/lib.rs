//! The configuration of Playhouse: one TOML file, read strictly and checked whole before anything is started.
//!
//! ```text
//! file, PLAYHOUSE_*, arguments ─ tree ─► raw types ─ check ─► Config
//!        texts with places      syntax,   serde,      units,     values that
//!                               ${env:},  spans       bounds,    nobody checks
//!                               keys                  names      again
//! ```
//!
//! Reading order: [`checked`] is what everyone else uses; `raw` is the file as written (and the JSON Schema);
//! [`overrides`] the layer above the file; [`error`] how a problem is shown; [`units`] and [`device`] the small grammars.
//!
//! This crate knows none of the others: it never opens a model, and never asks which devices there are.

pub mod checked;
pub mod device;
pub mod error;
pub mod overrides;
pub mod units;

mod check;
mod raw;
mod schema;
mod source;
mod tree;

pub use checked::{Config, Host, Limits, Model, ModelSource, PerKey, Replicas, SimulatedDevice, Supervision, Tls};
pub use device::{DeviceSelector, Devices, PciBusId, SelectError};
pub use error::{ConfigError, Diagnostic};
pub use overrides::Overrides;
pub use schema::json_schema;
pub use source::Place;
