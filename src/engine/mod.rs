//! Paged KV, scheduler, interpreter, sampler: requests in, token events out.

mod step_model;
pub mod weights;
pub mod forward;
mod runner;
pub mod device;
mod vram;
mod adapter;
mod llm;
pub mod sequence;
pub mod scheduler;
mod batch;
pub mod kv;
pub mod sampler;
mod constrain;
mod histories;
mod validate;

pub use adapter::{Adapter, AdapterError, Generation, SequenceId};
pub use constrain::{Constrain, Constrainer};
pub use device::{BoxedModel, DeviceError, DeviceName, DeviceOptions, gpu_memory, load_model};
pub use llm::{EngineOptions, LlmEngine, engine_error};
pub use runner::{LoadError, Runner, RunnerLimits};
pub use sampler::TokenMask;
pub use step_model::{StepCapacity, StepModel};
pub use validate::validate;
pub use vram::{kv_blocks, kv_layout, vram_usage};
