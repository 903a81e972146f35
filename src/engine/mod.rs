//! Paged KV, scheduler, interpreter, sampler: requests in, token events out.

mod step_model;
mod llm;
pub mod sequence;
pub mod scheduler;
mod batch;
pub mod kv;
pub mod sampler;
mod validate;

pub use llm::{EngineOptions, LlmEngine, engine_error};
pub use step_model::{StepCapacity, StepModel};
pub use validate::validate;
