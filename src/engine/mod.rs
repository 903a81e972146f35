//! Paged KV, scheduler, interpreter, sampler: requests in, token events out.

mod step_model;

pub use step_model::{StepCapacity, StepModel};
