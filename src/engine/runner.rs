//! A resident model that runs batches: weights, KV cache and buffers on one backend.

use super::forward::{Activations, Probe, forward};
use super::vram::{kv_blocks, kv_layout};
use super::weights::{Resident, model_shape, resident_bytes};
use super::{StepCapacity, StepModel, engine_error};
use crate::backend::{Backend, BackendError, Batch, KvDtype, MemoryUse, SampleRow, Sampled};
use crate::gguf::GgufFile;
use crate::models::{ModelError, ModelSpec, describe};
use playhouse_actors::engine::{EngineError, LoadPhase, LoadProgress};

/// How much a runner must be able to take. Everything is allocated when it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunnerLimits {
    /// Most tokens of one sequence; at most the context the model was made for.
    pub n_ctx: usize,
    /// Most tokens in one step.
    pub max_batch_tokens: usize,
    /// Most rows of logits in one step, and so most sequences.
    pub max_logit_rows: usize,
    /// Blocks in the KV pool.
    pub n_kv_blocks: usize,
    /// How keys and values are stored.
    pub kv_dtype: KvDtype,
}

impl RunnerLimits {
    /// Room for `n_sequences` sequences of `n_ctx` tokens each, and prefill in chunks of up to 512 tokens.
    pub fn new(n_ctx: usize, n_sequences: usize, kv_dtype: KvDtype) -> Self {
        Self {
            n_ctx,
            max_batch_tokens: n_ctx.clamp(n_sequences, n_sequences.max(512)),
            max_logit_rows: n_sequences,
            n_kv_blocks: kv_blocks(n_ctx, n_sequences),
            kv_dtype,
        }
    }
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is no model that we can run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device could not take it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A limit makes no sense for this model.
    #[error("{limit} is {found}, expected {expected}")]
    Limit {
        /// The field of [`RunnerLimits`].
        limit: &'static str,
        /// What it was.
        found: usize,
        /// What it may be.
        expected: String,
    },
}

impl From<LoadError> for EngineError {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Backend(error) => engine_error(error),
            LoadError::Model(_) | LoadError::Limit { .. } => EngineError::BadModel(error.to_string()),
        }
    }
}

/// A model on a device, ready to run steps.
pub struct Runner<B: Backend> {
    backend: B,
    spec: ModelSpec,
    resident: Resident<B>,
    activations: Activations<B>,
    limits: RunnerLimits,
}

impl<B: Backend> Runner<B> {
    /// Describes the model in `file` and loads it.
    ///
    /// `progress` is called at each change of phase and after each weight.
    ///
    /// # Errors
    /// [`LoadError`]; the backend may hold what was loaded until then, and is dropped.
    pub fn load(
        file: &GgufFile,
        mut backend: B,
        limits: RunnerLimits,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let mut report = |phase, bytes_done, bytes_total| progress(LoadProgress { phase, bytes_done, bytes_total });
        report(LoadPhase::Open, 0, 0);
        let spec = describe(file)?;
        check_limits(&spec, &limits)?;

        let total = resident_bytes(&spec, limits.n_ctx);
        report(LoadPhase::Weights, 0, total);
        let mut weights_done = |done| report(LoadPhase::Weights, done, total);
        backend.reserve(&model_shape(file, &spec, &limits)?)?;
        let resident = Resident::load(file, &spec, limits.n_ctx, &mut backend, &mut weights_done)?;

        report(LoadPhase::Allocate, total, total);
        backend.kv_cache(kv_layout(&spec, &limits))?;
        let activations = Activations::new(&mut backend, &spec, limits.max_batch_tokens, limits.max_logit_rows)?;
        report(LoadPhase::Ready, total, total);
        Ok(Self { backend, spec, resident, activations, limits })
    }

    /// The model's description.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What it was loaded for.
    pub fn limits(&self) -> &RunnerLimits {
        &self.limits
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// [`StepModel::run`] that shows intermediate results to `probe`.
    ///
    /// # Errors
    /// As [`StepModel::run`].
    pub fn run_probed(
        &mut self,
        batch: &Batch,
        logits: &mut Vec<f32>,
        probe: Option<Probe<'_>>,
    ) -> Result<(), BackendError> {
        forward(&mut self.backend, &self.resident, &mut self.activations, batch, probe)?;
        logits.resize(batch.logit_rows.len() * self.spec.n_vocab, 0.0);
        self.backend.read(self.activations.logits(), logits)
    }
}

impl<B: Backend> StepModel for Runner<B> {
    fn n_vocab(&self) -> usize {
        self.spec.n_vocab
    }

    fn n_ctx(&self) -> usize {
        self.limits.n_ctx
    }

    fn capacity(&self) -> StepCapacity {
        let RunnerLimits { n_kv_blocks, max_batch_tokens, max_logit_rows, .. } = self.limits;
        StepCapacity { n_kv_blocks, max_batch_tokens, max_logit_rows }
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        self.run_probed(batch, logits, None)
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        let n_cols = self.spec.hidden_dim;
        let n_rows = rows.iter().max().map_or(0, |last| *last as usize + 1);
        let mut residual = vec![0.0; n_rows * n_cols];
        self.backend.read(self.activations.residual(), &mut residual)?;
        hidden.clear();
        for &row in rows {
            let row = &residual[row as usize * n_cols..][..n_cols];
            hidden.extend(rms_norm(row, &self.resident.output_norm, self.spec.output_norm.eps));
        }
        Ok(())
    }

    fn runs_ahead(&self) -> bool {
        self.backend.chooses()
    }

    fn enqueue(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        if !self.backend.will_choose(rows)? {
            return Ok(false);
        }
        forward(&mut self.backend, &self.resident, &mut self.activations, batch, None)?;
        self.backend.choose(self.activations.logits_mut())?;
        Ok(true)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, BackendError> {
        self.backend.chosen()
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.backend.copy_blocks(pairs)
    }

    fn memory(&self) -> MemoryUse {
        self.backend.memory()
    }
}

/// Root-mean-square normalisation of one row; summed in f64, so that the order is of no consequence.
fn rms_norm<'a>(row: &'a [f32], weight: &'a [f32], eps: f32) -> impl Iterator<Item = f32> + 'a {
    let squares: f64 = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let inverse = 1.0 / (squares / row.len() as f64 + f64::from(eps)).sqrt();
    row.iter().zip(weight).map(move |(x, w)| (f64::from(*x) * inverse * f64::from(*w)) as f32)
}

fn check_limits(spec: &ModelSpec, limits: &RunnerLimits) -> Result<(), LoadError> {
    let too_long = limits.n_ctx > spec.n_ctx_train;
    if limits.n_ctx == 0 || too_long {
        let expected = format!("1 to {}, the context the model was made for", spec.n_ctx_train);
        return Err(LoadError::Limit { limit: "n_ctx", found: limits.n_ctx, expected });
    }
    for (limit, found) in [
        ("max_batch_tokens", limits.max_batch_tokens),
        ("max_logit_rows", limits.max_logit_rows),
        ("n_kv_blocks", limits.n_kv_blocks),
    ] {
        // Slots are u32.
        let most = u32::MAX as usize / crate::backend::BLOCK_TOKENS;
        if found == 0 || found > most {
            return Err(LoadError::Limit { limit, found, expected: format!("1 to {most}") });
        }
    }
    Ok(())
}
