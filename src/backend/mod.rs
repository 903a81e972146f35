//! What a device must be able to do: memory for weights, activations and paged KV, and a dozen ops.
//!
//! The ops are cut where a GPU would fuse: "normalise, project to q, k and v, rotate, write K and V"
//! is one op, so that a backend may run it as one kernel. The interpreter in `engine::forward` calls
//! them in order, once per step; a backend may execute at once (CPU) or enqueue (CUDA) until
//! [`Backend::read`].
//!
//! **Invariance.** Every op computes a row of its output from the inputs of that row alone, and sums in
//! an order that depends only on the row's own length. The number of rows, their neighbours, the
//! chunking of a prompt and the number of threads change no bit. The conformance suite tests this.
//!
//! Letters: `T` tokens of the step, `C` hidden size, `NH` query heads, `NKV` key/value heads, `HS` head
//! size, `F` feed-forward size, `V` vocabulary, `E` experts, `K` experts used per token.

mod batch;
pub mod cpu;
pub mod cuda;
mod ops;
mod routes;
mod sample;
mod shape;

pub use batch::{BLOCK_TOKENS, Batch, Feed, SeqSpan};
pub use ops::{
    Activation, AttentionOp, GatedOp, HeadDims, HeadOp, Linear, MoeOp, MoeWeighting, Norm, Pairing, QkvOp, Rope,
};

pub use routes::{Route, RouteDifference, Routes};
pub use sample::{Penalties, SampleRow, Sampled};
pub use shape::{Join, ModelShape, WeightGroup, WeightShape, WeightUse};

use crate::dtype::DType;
use crate::gguf::TensorBytes;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// 4 bytes an element; the CPU's default, exact.
    F32,
    /// 2 bytes an element; the GPU's default.
    F16,
    /// 34 bytes per 32 elements of one head's row: 8 bits and an f16 scale, as in `Q8_0`.
    Q8_0,
}

impl KvDtype {
    /// Bytes of one head's row of `head_dim` elements; a last partial group of `Q8_0` takes a whole one.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            KvDtype::F32 => 4 * head_dim,
            KvDtype::F16 => 2 * head_dim,
            KvDtype::Q8_0 => 34 * head_dim.div_ceil(32),
        }
    }
}

/// Where a weight comes from: one contiguous run of encoded rows.
#[derive(Debug, Clone)]
pub struct WeightSource<'a> {
    /// The tensor's name in the file, for error messages.
    pub name: &'a str,
    /// The encoding of each row.
    pub dtype: DType,
    /// Number of stacked matrices; 1 unless the tensor holds one matrix per expert.
    pub n_mats: usize,
    /// Rows (outputs) of each matrix; 1 for a vector.
    pub n_rows: usize,
    /// Columns (inputs): the elements of one row.
    pub n_cols: usize,
    /// Exactly `n_mats * n_rows` encoded rows.
    pub bytes: TensorBytes,
    /// What it is for.
    pub uses: WeightUse,
}

impl WeightSource<'_> {
    /// The sizes without the bytes.
    pub fn shape(&self) -> WeightShape {
        let Self { dtype, n_mats, n_rows, n_cols, uses, .. } = *self;
        WeightShape { dtype, n_mats, n_rows, n_cols, uses }
    }
}

/// What is to be done in a step that [`Backend::begin_recorded`] began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// Call the ops, then [`Backend::end`].
    Call,
    /// Nothing: the ops were recorded by an earlier step of the same shape and are already enqueued.
    Replayed,
}

/// The shape of the paged KV cache.
///
/// A *slot* is the place of one token: `slot = block * BLOCK_TOKENS + offset`. For each layer a slot holds
/// `n_kv_heads * head_dim` keys and as many values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers that have attention.
    pub n_layers: usize,
    /// Key/value heads per layer (`NKV`).
    pub n_kv_heads: usize,
    /// Elements per head (`HS`).
    pub head_dim: usize,
    /// Number of blocks of [`BLOCK_TOKENS`] tokens.
    pub n_blocks: usize,
    /// Element storage.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one block of [`BLOCK_TOKENS`] tokens: keys and values of all layers and heads.
    pub fn block_bytes(&self) -> u64 {
        let rows = 2 * BLOCK_TOKENS as u64 * self.n_layers as u64 * self.n_kv_heads as u64;
        rows * self.dtype.row_bytes(self.head_dim) as u64
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> u64 {
        self.block_bytes().saturating_mul(self.n_blocks as u64)
    }
}

/// Bytes a backend holds, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUse {
    /// Encoded weights and tables.
    pub weights: u64,
    /// Paged keys and values.
    pub kv: u64,
    /// Activations and work space.
    pub scratch: u64,
}

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device has no room; nothing was allocated and everything else is still usable.
    #[error("out of memory on {device}: {what} needs {requested} bytes, {free} are free")]
    OutOfMemory {
        /// The device, by name or UUID.
        device: String,
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free at that moment.
        free: u64,
    },
    /// The device cannot take this tensor, with the reason.
    #[error("{device} cannot hold tensor `{tensor}`: {reason}")]
    Unsupported {
        /// The device, by name or UUID.
        device: String,
        /// The tensor's name.
        tensor: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// The device failed. Nothing on it can be trusted any more.
    #[error("{device} failed in {op}: {detail}")]
    Device {
        /// The device, by name or UUID.
        device: String,
        /// The operation, with its launch configuration.
        op: String,
        /// The driver's words.
        detail: String,
    },
}

/// A device that can hold a model and run the ops of a step. One thread owns it.
///
/// All tensors are row-major f32 `[rows, cols]`; `rows` is the capacity given to [`Backend::tensor`], of which a
/// step uses the first `T` (or the first `batch.logit_rows.len()` for the output of [`Backend::head`]).
/// Shapes are validated when a model is loaded; ops only assert them.
pub trait Backend {
    /// A resident weight: a matrix, a stack of matrices, or a vector.
    type Weight;
    /// An activation buffer.
    type Tensor;

    /// The device as users know it: `cpu`, or a GPU's UUID.
    fn device(&self) -> String;

    /// Says what the model needs that is about to be made resident, so that memory can be taken at once.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`], [`BackendError::Unsupported`].
    fn reserve(&mut self, _shape: &ModelShape) -> Result<(), BackendError> {
        Ok(())
    }

    /// Makes a weight resident.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`], [`BackendError::Unsupported`], [`BackendError::Device`].
    fn weight(&mut self, source: WeightSource<'_>) -> Result<Self::Weight, BackendError>;

    /// Makes weights resident that one op uses together. A backend may keep them as one and run one product where the op has
    /// several; results are the same to the bit.
    ///
    /// # Errors
    /// As [`Backend::weight`].
    fn joined(&mut self, sources: Vec<WeightSource<'_>>, _join: Join) -> Result<Vec<Self::Weight>, BackendError> {
        sources.into_iter().map(|source| self.weight(source)).collect()
    }

    /// Allocates an activation buffer of `rows * cols` f32 zeros.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn tensor(&mut self, rows: usize, cols: usize) -> Result<Self::Tensor, BackendError>;

    /// Allocates the paged KV cache, replacing the present one.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    fn kv_cache(&mut self, layout: KvLayout) -> Result<(), BackendError>;

    /// Bytes allocated so far, by kind.
    fn memory(&self) -> MemoryUse;

    /// Starts a step: takes the batch's tokens, positions, slots and block tables.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn begin(&mut self, batch: &Batch) -> Result<(), BackendError>;

    /// Starts a step whose ops are the same calls, with the same weights and tensors, as those of every other step begun this
    /// way. A backend may record them once and replay them.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn begin_recorded(&mut self, batch: &Batch) -> Result<Begun, BackendError> {
        self.begin(batch)?;
        Ok(Begun::Call)
    }

    /// The ops of a step that was begun with [`Backend::begin_recorded`] have been called.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn end(&mut self) -> Result<(), BackendError> {
        Ok(())
    }

    /// `x[t] = scale * table[tokens[t]]`; `table` `[V, C]`, `x` `[T, C]`.
    fn embed(&mut self, table: &Self::Weight, scale: f32, x: &mut Self::Tensor);

    /// Normalises `x`, projects it to q, k and v, adds biases, normalises heads, rotates q and k, writes k and v into
    /// the cache at the batch's slots and leaves the rotated queries in `q`. `x` `[T, C]`, `q` `[T, NH * HS]`.
    fn qkv(&mut self, op: &QkvOp<'_, Self>, x: &Self::Tensor, q: &mut Self::Tensor);

    /// Causal attention of each token over its own sequence's cache. `q` and `out` `[T, NH * HS]`.
    fn attention(&mut self, op: &AttentionOp<'_, Self>, q: &Self::Tensor, out: &mut Self::Tensor);

    /// `x += W a + b`; `a` `[T, n_in]`, `x` `[T, n_out]`.
    fn linear_residual(&mut self, linear: Linear<'_, Self>, a: &Self::Tensor, x: &mut Self::Tensor);

    /// `h = act(W_gate n, W_up n)` with `n` the normalised `x`. `x` `[T, C]`, `h` `[T, F]`.
    fn gated(&mut self, op: &GatedOp<'_, Self>, x: &Self::Tensor, h: &mut Self::Tensor);

    /// Mixture of experts: `x += sum over the K chosen experts e of w_e * (W_down,e act(W_gate,e n, W_up,e n) + b_e)`.
    /// The sum runs in descending order of router score, ties by expert index. `x` `[T, C]`.
    fn moe(&mut self, op: &MoeOp<'_, Self>, x: &mut Self::Tensor);

    /// Normalises the rows `batch.logit_rows` of `x` and projects them to the vocabulary. `logits` `[R, V]`.
    fn head(&mut self, op: &HeadOp<'_, Self>, x: &Self::Tensor, logits: &mut Self::Tensor);

    /// Waits for everything enqueued and copies the first `out.len()` elements of `tensor` to the host.
    ///
    /// # Errors
    /// [`BackendError::Device`] if anything enqueued since the last call failed.
    fn read(&mut self, tensor: &Self::Tensor, out: &mut [f32]) -> Result<(), BackendError>;

    /// Whether this backend chooses tokens, and runs behind the host: whether the next three are of use.
    fn chooses(&self) -> bool {
        false
    }

    /// Says what the rows of the step that begins next are sampled under. `false`, and nothing changed, where the backend leaves these
    /// rows to the caller. At most one other step whose tokens were not taken may be under way.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn will_choose(&mut self, _rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        Ok(false)
    }

    /// Enqueues the choice, after the step's ops, of a token from each row that [`Backend::will_choose`] announced, as `engine::sampler`
    /// defines it. The logits may be changed.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn choose(&mut self, _logits: &mut Self::Tensor) -> Result<(), BackendError> {
        Ok(())
    }

    /// Waits for the oldest choice that was not taken, and takes it.
    ///
    /// # Errors
    /// [`BackendError::Device`] if anything enqueued up to it failed.
    fn chosen(&mut self) -> Result<Vec<Sampled>, BackendError> {
        Ok(Vec::new())
    }

    /// Copies whole KV blocks (`from`, `to`) in every layer, before anything of the next step.
    ///
    /// # Errors
    /// [`BackendError::Device`].
    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError>;
}
