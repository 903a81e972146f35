//! The host: what a long-running Playhouse process is beside its supervision tree.

pub mod admin;
pub mod notify;
pub mod signals;
