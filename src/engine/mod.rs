//! Paged KV, scheduler, interpreter, sampler: requests in, token events out.

mod step_model;
pub mod kv;
pub mod sampler;

pub use step_model::{StepCapacity, StepModel};
