//! The actors of Playhouse and the traits they drive.
//!
//! [`engine`] is what a model actor needs of an engine: requests of tokens in, token events out.

pub mod engine;
pub mod inventory;
pub mod policy;
pub mod sim;
