//! How much a worker must be able to take, and what that needs: the same arithmetic for the planner in the host, before
//! anything is loaded, and for the worker that loads. Pure.

use crate::backend::KvDtype;
use crate::engine::{RunnerLimits, gpu_memory, kv_blocks, kv_layout, vram_usage};
use crate::gguf::GgufFile;
use crate::models::ModelSpec;
use playhouse_actors::messages::WorkerSpec;
use playhouse_actors::policy::placement::Demand;
use playhouse_config::Model;
use playhouse_config::checked::KvType;

/// An allowance for what a process with a CUDA context and our kernels takes on a card before anything is loaded.
pub const CONTEXT_BYTES: u64 = 528 << 20;

/// What weights, KV and scratch may take together where a process may take so much: the rest is the context's.
pub fn arena_bytes(memory_bytes_max: u64) -> u64 {
    memory_bytes_max.saturating_sub(CONTEXT_BYTES)
}

/// Settings that a model cannot be run with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// The context is longer than the model's.
    #[error("context is {context}, expected 1 to {n_ctx_train}, the context the model was made for")]
    Context {
        /// What is asked for.
        context: u32,
        /// What there is.
        n_ctx_train: usize,
    },
    /// The file is not what its header says.
    #[error("{0}")]
    File(String),
    /// Not one sequence fits.
    #[error(
        "{kv_bytes} bytes for KV are less than the {kv_min_bytes} of one sequence of {n_ctx} tokens; give it more, or set a \
         smaller context"
    )]
    KvTooSmall {
        /// What there is.
        kv_bytes: u64,
        /// What one sequence takes.
        kv_min_bytes: u64,
        /// Its length.
        n_ctx: usize,
    },
}

/// The settings that decide about memory, wherever they are written.
#[derive(Debug, Clone, Copy)]
struct Shape {
    context: Option<u32>,
    max_sequences: u32,
    max_batch_tokens: u32,
    kv_type: KvType,
}

impl From<&WorkerSpec> for Shape {
    fn from(spec: &WorkerSpec) -> Self {
        let WorkerSpec { context, max_sequences, max_batch_tokens, kv_type, .. } = *spec;
        Self { context, max_sequences, max_batch_tokens, kv_type }
    }
}

impl From<&Model> for Shape {
    fn from(model: &Model) -> Self {
        let Model { context, max_sequences, max_batch_tokens, kv_type, .. } = *model;
        Self { context, max_sequences, max_batch_tokens, kv_type }
    }
}

impl Shape {
    /// The limits with KV for one sequence of the full context.
    fn limits_of_one(self, model: &ModelSpec) -> Result<RunnerLimits, SizingError> {
        let n_ctx = match self.context {
            None => model.n_ctx_train,
            Some(context) if context > 0 && context as usize <= model.n_ctx_train => context as usize,
            Some(context) => return Err(SizingError::Context { context, n_ctx_train: model.n_ctx_train }),
        };
        let kv_dtype = match self.kv_type {
            KvType::F32 => KvDtype::F32,
            KvType::F16 => KvDtype::F16,
            KvType::Q8_0 => KvDtype::Q8_0,
        };
        let max_sequences = self.max_sequences.max(1) as usize;
        Ok(RunnerLimits {
            n_ctx,
            // A step has a token of every sequence, or some would never run.
            max_batch_tokens: (self.max_batch_tokens as usize).max(max_sequences),
            max_logit_rows: max_sequences,
            n_kv_blocks: kv_blocks(n_ctx, 1),
            kv_dtype,
        })
    }
}

/// Bytes of KV of one sequence of the full context: with less, [`limits`] refuses.
///
/// # Errors
/// [`SizingError::Context`].
pub fn kv_min_bytes(spec: &WorkerSpec, model: &ModelSpec) -> Result<u64, SizingError> {
    Ok(kv_layout(model, &Shape::from(spec).limits_of_one(model)?).bytes())
}

/// What the worker of `spec` loads `model` with: as many blocks as `kv_bytes` have room for.
///
/// # Errors
/// [`SizingError`].
pub fn limits(spec: &WorkerSpec, model: &ModelSpec) -> Result<RunnerLimits, SizingError> {
    let one = Shape::from(spec).limits_of_one(model)?;
    let layout = kv_layout(model, &one);
    let kv_min_bytes = layout.bytes();
    if spec.kv_bytes < kv_min_bytes {
        return Err(SizingError::KvTooSmall { kv_bytes: spec.kv_bytes, kv_min_bytes, n_ctx: one.n_ctx });
    }
    let n_kv_blocks = usize::try_from(spec.kv_bytes / layout.block_bytes().max(1)).unwrap_or(usize::MAX);
    Ok(RunnerLimits { n_kv_blocks, ..one })
}

/// Multiprocessors that a GPU's work space is planned for: as many as the largest has. NVML does not tell, and asking CUDA
/// would take a context. A smaller GPU takes a few megabytes less.
const MULTIPROCESSORS: usize = 192;

/// What a replica of a configured model needs on a GPU, where weights are stored in tiles of their own.
///
/// # Errors
/// [`SizingError`]; [`SizingError::KvTooSmall`] if the configured budget is.
pub fn demand_on_gpu(config: &Model, model: &ModelSpec, file: &GgufFile) -> Result<Demand, SizingError> {
    let one = Shape::from(config).limits_of_one(model)?;
    let usage = gpu_memory(file, &one, MULTIPROCESSORS).map_err(|error| SizingError::File(error.to_string()))?;
    Ok(Demand { weights_bytes: usage.weights, scratch_bytes: usage.scratch, ..demand(config, model)? })
}

/// What a replica of a configured model needs on a device, for the planner. A worker that gets so many bytes for KV as
/// the plan says allocates what the plan says.
///
/// # Errors
/// [`SizingError`]; [`SizingError::KvTooSmall`] if the configured budget is.
pub fn demand(config: &Model, model: &ModelSpec) -> Result<Demand, SizingError> {
    let one = Shape::from(config).limits_of_one(model)?;
    let usage = vram_usage(model, &one);
    match config.kv_budget_bytes {
        Some(kv_bytes) if kv_bytes < usage.kv => {
            Err(SizingError::KvTooSmall { kv_bytes, kv_min_bytes: usage.kv, n_ctx: one.n_ctx })
        }
        _ => Ok(Demand {
            weights_bytes: usage.weights,
            scratch_bytes: usage.scratch,
            context_bytes: CONTEXT_BYTES,
            kv_min_bytes: usage.kv,
            kv_full_bytes: usage.kv.saturating_mul(u64::from(config.max_sequences.max(1))),
        }),
    }
}
