//! What the engine asks of a resident model: run one batch, give logits. The engine's only view of weights and devices.

use crate::backend::{BackendError, Batch, MemoryUse, SampleRow, Sampled};

/// How much a resident model can take in one step. Fixed when it was loaded; the engine never exceeds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCapacity {
    /// KV blocks of [`BLOCK_TOKENS`](crate::backend::BLOCK_TOKENS) tokens in the pool.
    pub n_kv_blocks: usize,
    /// Most tokens in one [`Batch`].
    pub max_batch_tokens: usize,
    /// Most entries of [`Batch::logit_rows`], which is also the most sequences that run at once.
    pub max_logit_rows: usize,
}

/// A model whose weights and KV pool are resident on one device. Owned by one thread.
///
/// **Invariance.** A row of logits is a function of that sequence's tokens alone: neighbours in the batch, the way the
/// prompt was cut into steps, and which blocks the KV lies in change no bit of it. The engine's promise of the same
/// bytes every time rests on this.
///
/// **KV ownership.** The model owns the storage; which sequence may use which block is the engine's business. Keys and
/// values written by one step are there for the next until the engine writes those slots again.
pub trait StepModel {
    /// Size of the vocabulary: the length of one row of logits.
    fn n_vocab(&self) -> usize;

    /// Most tokens a sequence may have; positions `0 .. n_ctx` exist.
    fn n_ctx(&self) -> usize;

    /// What fits in one step, and the size of the KV pool.
    fn capacity(&self) -> StepCapacity;

    /// Runs one step: writes the keys and values of every token of `batch` at its slot, and fills `logits` with
    /// `batch.logit_rows.len() * n_vocab` values, one row after another (resized as needed, old content ignored). Nothing may be under way,
    /// and nothing be fed.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`]: nothing of the step may be relied on, but it can be run again.
    /// [`BackendError::Device`]: the model is lost.
    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError>;

    /// The hidden states of tokens of the last step, after the output norm: `rows` are indices into its
    /// [`Batch::tokens`]; fills `hidden` with `rows.len() * hidden_dim` values, one row after another. Invariant as
    /// logits are.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError>;

    /// Whether the model chooses tokens itself, and may be given a step while another is under way: whether
    /// [`StepModel::enqueue`] is of use.
    fn runs_ahead(&self) -> bool {
        false
    }

    /// Begins a step, and the choice of a token from each row of its logits, as [`super::sampler`] defines it; waits for nothing. At
    /// most one other may be under way, on whose choices [`Batch::feeds`] may rest. `false`, and nothing was done, where these rows are
    /// for the host.
    ///
    /// # Errors
    /// As [`StepModel::run`]; a step under way is not touched by it.
    fn enqueue(&mut self, _batch: &Batch, _rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Waits for the oldest step under way: what became of each of its rows. Without one there are none.
    ///
    /// # Errors
    /// As [`StepModel::run`]: it is not under way any more, and what was enqueued after it is as unreliable.
    fn collect(&mut self) -> Result<Vec<Sampled>, BackendError> {
        Ok(Vec::new())
    }

    /// Runs one step and chooses a token from each row of its logits where the model does that. `None` where it does not: then `logits` is as
    /// after [`StepModel::run`]. Nothing may be under way.
    ///
    /// # Errors
    /// As [`StepModel::run`].
    fn run_and_choose(
        &mut self,
        batch: &Batch,
        rows: &[SampleRow<'_>],
        logits: &mut Vec<f32>,
    ) -> Result<Option<Vec<Sampled>>, BackendError> {
        if self.enqueue(batch, rows)? {
            return self.collect().map(Some);
        }
        self.run(batch, logits)?;
        Ok(None)
    }

    /// Copies whole KV blocks (`from`, `to`) in every layer, before the next step.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError>;

    /// Bytes the model holds on its device.
    fn memory(&self) -> MemoryUse;
}

impl<M: StepModel + ?Sized> StepModel for Box<M> {
    fn n_vocab(&self) -> usize {
        (**self).n_vocab()
    }

    fn n_ctx(&self) -> usize {
        (**self).n_ctx()
    }

    fn capacity(&self) -> StepCapacity {
        (**self).capacity()
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        (**self).run(batch, logits)
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        (**self).hidden(rows, hidden)
    }

    fn runs_ahead(&self) -> bool {
        (**self).runs_ahead()
    }

    fn enqueue(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        (**self).enqueue(batch, rows)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, BackendError> {
        (**self).collect()
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        (**self).copy_blocks(pairs)
    }

    fn memory(&self) -> MemoryUse {
        (**self).memory()
    }
}
