//! The CUDA backend: one GPU, its memory and its kernels, behind the same ops as the CPU.
//!
//! Activations are f16 where a product reads them and f32 where they are summed; weights become f16 in registers; keys and
//! values are f16. Steps that decode are recorded as CUDA graphs, one per bucket of sequences and of context, and
//! replayed. All device code and all `unsafe` are in the crate `playhouse_cuda`.
//!
//! | file | what it is |
//! |---|---|
//! | `plan.rs` | bytes that a model takes, from its shape alone |
//! | `weight.rs`, `staging.rs` | resident weights, and their way there |
//! | `tensor.rs`, `work.rs` | activations, and the work space of ops |
//! | `step.rs` | what a step uploads, and which steps can be recorded |
//! | `ops.rs`, `sampling.rs` | the ops, and the choice of tokens |
//! | `measure.rs` | what the GPU's memory and tensor cores give |
//! | `warm.rs` | a context made ahead of time |

mod plan;
mod tensor;
mod work;
mod staging;
mod weight;
mod step;
mod ops;
mod sampling;
mod measure;
mod warm;

pub use measure::{GpuSpeed, measure};
pub use plan::memory_use;
pub use playhouse_cuda::gpu::{GpuInfo, visible_gpus};
#[cfg(any(debug_assertions, feature = "fault-injection"))]
pub use playhouse_cuda::trap::trap;
pub use tensor::CudaTensor;
pub use warm::{Warm, warm};
pub use weight::CudaWeight;

use super::{
    AttentionOp, Backend, BackendError, Batch, Begun, GatedOp, HeadOp, Join, KvDtype, KvLayout, Linear, MemoryUse,
    ModelShape, MoeOp, QkvOp, Routes, SampleRow, Sampled, WeightShape, WeightSource,
};
use ops::Rotation;
use plan::{WorkSizes, heads};
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Cap};
use playhouse_cuda::gpu::Gpu;
use playhouse_cuda::graph::{Capture, Graph};
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::attention::{HEAD_DIMS, Heads, KvFormat, KvLayer, SPLIT};
use playhouse_cuda::launch::moe::{MAX_EXPERTS, MAX_USED};
use playhouse_cuda::pinned::Pinned;
use sampling::Sampling;
use staging::Staging;
use std::collections::HashMap;
use step::{Arrangement, Bucket, Inputs, StepInputs};
use weight::{Target, WeightError};
use work::Work;

/// Whether this binary has kernels; if not, why.
///
/// # Errors
/// [`CudaError::Unavailable`].
pub fn kernels_built() -> Result<(), CudaError> {
    playhouse_cuda::kernels::built()
}

/// Runs models on one GPU.
pub struct CudaBackend {
    // Dropped in this order: what uses memory before the memory.
    capture: Option<(Bucket, Capture)>,
    /// Of the layer whose attention comes next, where that rotates.
    rotation: Option<Rotation>,
    recordings: HashMap<Bucket, Recording>,
    inputs: Option<StepInputs>,
    sampling: Option<Sampling>,
    /// Where small results land on the host.
    landing: Pinned<f32>,
    staging: Option<Staging>,
    kv: Option<KvCache>,
    work: Work,
    weights: Arena,
    kernels: Kernels,
    gpu: Gpu,
    cap: Option<Cap>,
    shape: Option<ModelShape>,
    /// Of the model, or of the last attention: what decides how spans are cut.
    heads: Heads,
    batch: Batch,
    /// Where the choices of experts are told, if somebody asked.
    routes: Option<Routes>,
    /// The first failure of an op; nothing after it is to be trusted.
    failed: Option<CudaError>,
}

/// A step of some shape: seen once, or ready to replay.
enum Recording {
    /// Its kernels are loaded: recording may not load any.
    Seen,
    Ready(Graph),
}

struct KvCache {
    layers: Vec<KvLayer>,
    arena: Arena,
    /// Bytes of a block of one layer's keys.
    block_bytes: usize,
}

/// Elements that are read through page-locked memory; longer reads go straight.
const LANDING: usize = 1 << 20;

impl CudaBackend {
    /// Opens the GPU with this UUID. `memory_cap` limits what weights, cache and work space take together.
    ///
    /// # Errors
    /// [`BackendError::Device`] if there is no driver, no such GPU, or no kernels in this binary.
    pub fn open(uuid: &str, memory_cap: Option<u64>) -> Result<Self, BackendError> {
        Self::try_open(uuid, memory_cap).map_err(|e| backend_error(uuid, e))
    }

    fn try_open(uuid: &str, memory_cap: Option<u64>) -> Result<Self, CudaError> {
        let gpu = Gpu::open(uuid)?;
        let kernels = Kernels::new(&gpu)?;
        let cap = memory_cap.map(Cap::new);
        let reserve = gpu.info().memory_bytes;
        let work = Arena::with_cap(&gpu, "work space", reserve, cap.clone())?;
        let weights = Arena::with_cap(&gpu, "weights", reserve, cap.clone())?;
        Ok(Self {
            capture: None,
            rotation: None,
            recordings: HashMap::new(),
            inputs: None,
            sampling: None,
            landing: Pinned::new(&gpu, LANDING)?,
            staging: None,
            kv: None,
            work: Work::new(work),
            weights,
            kernels,
            gpu,
            cap,
            shape: None,
            heads: Heads { n_heads: 1, n_kv_heads: 1, head_dim: HEAD_DIMS[0] },
            batch: Batch::default(),
            routes: None,
            failed: None,
        })
    }

    /// What does not change about the GPU.
    pub fn info(&self) -> &GpuInfo {
        self.gpu.info()
    }

    /// Tells from now on which experts tokens go to, in steps that are not recorded as graphs. Each op waits for the device.
    pub fn tell_routes(&mut self) -> Routes {
        self.routes.get_or_insert_default().clone()
    }

    fn error(&self, error: CudaError) -> BackendError {
        backend_error(self.gpu.uuid(), error)
    }

    fn inputs(&self) -> Result<&Inputs, CudaError> {
        let inputs = self.inputs.as_ref().map(|inputs| &inputs.now);
        inputs.ok_or_else(|| misuse("an op", "begin before the first op", "no step"))
    }

    fn n_tokens(&self) -> usize {
        self.inputs.as_ref().map_or(0, |inputs| inputs.now.n_tokens)
    }

    fn kv_layer(&self, layer: usize) -> Result<&KvLayer, CudaError> {
        let kv = self.kv.as_ref().ok_or_else(|| misuse("an op", "kv_cache before attention", "no cache"))?;
        Ok(&kv.layers[layer])
    }

    /// Uploads the batch, padded to a bucket if there is one.
    fn upload(&mut self, batch: &Batch, bucket: Option<Bucket>) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let max_decode = self.shape.as_ref().map_or(usize::MAX, |s| s.max_logit_rows.min(s.max_tokens));
        let arrangement = Arrangement::new(batch, self.heads, bucket, max_decode);
        let len = arrangement.sizes.len();
        if self.inputs.as_ref().is_none_or(|inputs| inputs.len() < len) {
            self.gpu.synchronize()?;
            self.inputs = Some(StepInputs::new(&self.gpu, &self.work.arena, len)?);
        }
        let chosen = self.sampling.as_ref().map(|sampling| sampling.chosen().clone());
        let pieces = self.sampling.as_mut().map_or(Ok(Vec::new()), Sampling::pieces)?;
        let inputs = self.inputs.as_mut().expect("made above");
        inputs.upload(&self.kernels, &arrangement, &pieces, chosen.as_ref())
    }

    /// Cuts spans anew if these heads need other pieces than those of the model.
    fn arrange_for(&mut self, heads: Heads) -> Result<(), CudaError> {
        let group = |heads: Heads| heads.n_heads / heads.n_kv_heads;
        let changed = group(heads) != group(self.heads);
        self.heads = heads;
        if !changed {
            return Ok(());
        }
        if self.capture.is_some() {
            return Err(misuse("attention", "the heads of the model", "others"));
        }
        self.gpu.synchronize()?;
        let batch = std::mem::take(&mut self.batch);
        let result = self.upload(&batch, None);
        self.batch = batch;
        result
    }

    /// Begins a step that may be recorded.
    fn try_begin_recorded(&mut self, batch: &Batch) -> Result<Begun, CudaError> {
        let bucket = self.shape.as_ref().and_then(|shape| {
            Bucket::of(batch, shape.max_logit_rows.min(shape.max_tokens), shape.n_ctx.div_ceil(SPLIT))
        });
        self.upload(batch, bucket)?;
        let Some(bucket) = bucket else { return Ok(Begun::Call) };
        match self.recordings.get(&bucket) {
            Some(Recording::Ready(graph)) => {
                graph.launch()?;
                Ok(Begun::Replayed)
            }
            Some(Recording::Seen) => {
                self.capture = Some((bucket, Capture::begin(&self.gpu)?));
                Ok(Begun::Call)
            }
            None => {
                self.recordings.insert(bucket, Recording::Seen);
                Ok(Begun::Call)
            }
        }
    }

    fn try_end(&mut self) -> Result<(), CudaError> {
        let capture = self.capture.take();
        self.check_failed()?;
        if let Some((bucket, capture)) = capture {
            let graph = capture.finish()?;
            graph.launch()?;
            self.recordings.insert(bucket, Recording::Ready(graph));
        }
        Ok(())
    }

    fn check_failed(&self) -> Result<(), CudaError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Runs an op unless an earlier one failed; notes its failure.
    fn op(&mut self, run: impl FnOnce(&mut Self) -> Result<(), CudaError>) {
        if self.failed.is_none() {
            self.failed = run(self).err();
        }
    }

    fn try_reserve(&mut self, shape: &ModelShape) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let n_sms = self.gpu.info().n_sms as usize;
        let usage = memory_use(shape, n_sms);
        let total = usage.weights + usage.kv + usage.scratch;
        let on_device = self.gpu.free_bytes()?;
        let free = on_device.min(self.cap.as_ref().map_or(u64::MAX, Cap::left));
        if total > free {
            let device = self.gpu.uuid().to_owned();
            let within = if free < on_device { ", within its memory limit" } else { "" };
            let what = format!(
                "the model ({} bytes of weights, {} of cache, {} of work space{within})",
                usage.weights, usage.kv, usage.scratch
            );
            return Err(CudaError::OutOfMemory { device, what, requested: total, free });
        }
        let sizes = WorkSizes::of(shape, n_sms);
        self.weights.commit(usage.weights)?;
        self.work.arena.commit(usage.scratch)?;
        self.work.reserve(&sizes)?;
        self.inputs = Some(StepInputs::new(&self.gpu, &self.work.arena, sizes.inputs)?);
        self.sampling = Some(Sampling::new(&self.gpu, &self.work.arena, sampling::limits(shape))?);
        self.heads = heads(shape.heads);
        self.shape = Some(shape.clone());
        Ok(())
    }

    fn try_kv_cache(&mut self, layout: KvLayout) -> Result<KvCache, CudaError> {
        self.gpu.bind()?;
        let format = if layout.dtype == KvDtype::Q8_0 { KvFormat::Q8_0 } else { KvFormat::F16 };
        let block_bytes = layout.n_kv_heads * format.head_bytes(layout.head_dim);
        let len = block_bytes * layout.n_blocks;
        let bytes = 2 * layout.n_layers as u64 * (len as u64).next_multiple_of(playhouse_cuda::arena::ALIGN);
        let arena = Arena::with_cap(&self.gpu, "keys and values", bytes, self.cap.clone())?;
        arena.commit(bytes)?;
        let layer = |_| {
            let (k, v) = (arena.alloc(len, "keys")?, arena.alloc(len, "values")?);
            // A block is read up to its end before it is full: what is there must be numbers.
            k.zero()?;
            v.zero()?;
            Ok(KvLayer { format, k, v })
        };
        let layers = (0..layout.n_layers).map(layer).collect::<Result<_, CudaError>>()?;
        Ok(KvCache { layers, arena: arena.clone(), block_bytes })
    }

    fn load(&mut self, sources: &[WeightSource<'_>], join: Join) -> Result<Vec<CudaWeight>, BackendError> {
        let name = sources.first().map_or("", |s| s.name);
        let result = self.try_load(sources, join);
        result.map_err(|error| match error {
            WeightError::Cuda(error) => self.error(error),
            WeightError::Unsupported(reason) => self.unsupported(name, reason),
        })
    }

    fn try_load(&mut self, sources: &[WeightSource<'_>], join: Join) -> Result<Vec<CudaWeight>, WeightError> {
        self.gpu.bind()?;
        if self.staging.is_none() {
            let largest = self.shape.as_ref().map_or(usize::MAX, largest_source);
            self.staging = Some(Staging::new(&self.gpu, largest)?);
        }
        let staging = self.staging.as_mut().expect("made above");
        Target { kernels: &self.kernels, arena: &self.weights, staging }.load(sources, join)
    }

    fn unsupported(&self, tensor: &str, reason: String) -> BackendError {
        BackendError::Unsupported { device: self.gpu.uuid().to_owned(), tensor: tensor.to_owned(), reason }
    }
}

impl Backend for CudaBackend {
    type Weight = CudaWeight;
    type Tensor = CudaTensor;

    fn device(&self) -> String {
        self.gpu.uuid().to_owned()
    }

    fn reserve(&mut self, shape: &ModelShape) -> Result<(), BackendError> {
        if let Some((n_experts, n_used)) = shape.moe.filter(|(n, used)| *n > MAX_EXPERTS || *used > MAX_USED) {
            let reason = format!("{n_used} of {n_experts} experts, at most {MAX_USED} of {MAX_EXPERTS} are supported");
            return Err(self.unsupported("experts", reason));
        }
        self.try_reserve(shape).map_err(|e| self.error(e))
    }

    fn weight(&mut self, source: WeightSource<'_>) -> Result<CudaWeight, BackendError> {
        let mut all = self.load(&[source], Join::Stacked)?;
        Ok(all.pop().expect("as many weights as sources"))
    }

    fn joined(&mut self, sources: Vec<WeightSource<'_>>, join: Join) -> Result<Vec<CudaWeight>, BackendError> {
        self.load(&sources, join)
    }

    fn tensor(&mut self, rows: usize, cols: usize) -> Result<CudaTensor, BackendError> {
        self.gpu.bind().map_err(|e| self.error(e))?;
        CudaTensor::new(&self.work.arena, rows, cols).map_err(|e| self.error(e))
    }

    fn kv_cache(&mut self, layout: KvLayout) -> Result<(), BackendError> {
        if layout.dtype == KvDtype::F32 {
            return Err(self.unsupported("keys and values", format!("{:?}, expected F16 or Q8_0", layout.dtype)));
        }
        if !HEAD_DIMS.contains(&layout.head_dim) {
            let reason = format!("heads of {}, expected one of {HEAD_DIMS:?}", layout.head_dim);
            return Err(self.unsupported("keys and values", reason));
        }
        self.recordings.clear();
        self.kv = None;
        // The weights are there; its memory is better used otherwise.
        self.staging = None;
        self.kv = Some(self.try_kv_cache(layout).map_err(|e| self.error(e))?);
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse {
            weights: self.weights.mapped_bytes(),
            kv: self.kv.as_ref().map_or(0, |kv| kv.arena.mapped_bytes()),
            scratch: self.work.arena.mapped_bytes(),
        }
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let result = self.check_failed().and_then(|()| self.upload(batch, None));
        self.batch.clone_from(batch);
        result.map_err(|e| self.error(e))
    }

    fn begin_recorded(&mut self, batch: &Batch) -> Result<Begun, BackendError> {
        let result = self.check_failed().and_then(|()| self.try_begin_recorded(batch));
        self.batch.clone_from(batch);
        result.map_err(|e| self.error(e))
    }

    fn end(&mut self) -> Result<(), BackendError> {
        self.try_end().map_err(|e| self.error(e))
    }

    fn embed(&mut self, table: &CudaWeight, scale: f32, x: &mut CudaTensor) {
        self.op(|this| this.run_embed(table, scale, x));
    }

    fn qkv(&mut self, op: &QkvOp<'_, Self>, x: &CudaTensor, q: &mut CudaTensor) {
        self.op(|this| this.run_qkv(op, x, q));
    }

    fn attention(&mut self, op: &AttentionOp<'_, Self>, q: &CudaTensor, out: &mut CudaTensor) {
        self.op(|this| this.run_attention(op, q, out));
    }

    fn linear_residual(&mut self, linear: Linear<'_, Self>, a: &CudaTensor, x: &mut CudaTensor) {
        self.op(|this| this.run_linear_residual(linear, a, x));
    }

    fn gated(&mut self, op: &GatedOp<'_, Self>, x: &CudaTensor, h: &mut CudaTensor) {
        self.op(|this| this.run_gated(op, x, h));
    }

    fn moe(&mut self, op: &MoeOp<'_, Self>, x: &mut CudaTensor) {
        self.op(|this| this.run_moe(op, x));
    }

    fn head(&mut self, op: &HeadOp<'_, Self>, x: &CudaTensor, logits: &mut CudaTensor) {
        self.op(|this| this.run_head(op, x, logits));
    }

    fn read(&mut self, tensor: &CudaTensor, out: &mut [f32]) -> Result<(), BackendError> {
        let landing = &mut self.landing;
        let mut read = || {
            if !tensor.is_full() || out.len() > landing.len() {
                return tensor.read(out);
            }
            landing.copy_from(tensor.data(), out.len())?;
            self.gpu.synchronize()?;
            out.copy_from_slice(&landing[..out.len()]);
            Ok(())
        };
        let result = self.failed.clone().map_or(Ok(()), Err).and_then(|()| read());
        result.map_err(|e| self.error(e))
    }

    fn chooses(&self) -> bool {
        self.sampling.is_some()
    }

    fn will_choose(&mut self, rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        let result = self.check_failed().and_then(|()| self.announce(rows));
        result.map_err(|e| self.error(e))
    }

    fn choose(&mut self, logits: &mut CudaTensor) -> Result<(), BackendError> {
        let result = self.check_failed().and_then(|()| self.run_choose(logits));
        result.map_err(|e| self.error(e))
    }

    fn chosen(&mut self) -> Result<Vec<Sampled>, BackendError> {
        let result = self.check_failed().and_then(|()| self.take_chosen());
        result.map_err(|e| self.error(e))
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        let kv = self.kv.as_ref().expect("copy_blocks before kv_cache");
        let copy = |&(from, to): &(u32, u32)| -> Result<(), CudaError> {
            let block = |i: u32| i as usize * kv.block_bytes..(i as usize + 1) * kv.block_bytes;
            kv.layers
                .iter()
                .flat_map(|layer| [&layer.k, &layer.v])
                .try_for_each(|side| side.slice(block(to)).copy_from(&side.slice(block(from))))
        };
        self.gpu.bind().and_then(|()| pairs.iter().try_for_each(copy)).map_err(|e| self.error(e))
    }
}

/// Bytes of the largest call that makes weights resident.
fn largest_source(shape: &ModelShape) -> usize {
    let bytes = |w: &WeightShape| w.n_mats * w.n_rows * w.dtype.row_bytes(w.n_cols).unwrap_or(0);
    shape.groups.iter().map(|group| group.weights.iter().map(bytes).sum()).max().unwrap_or(0)
}

fn misuse(op: &str, expected: &str, found: &str) -> CudaError {
    CudaError::Contract { op: op.to_owned(), expected: expected.to_owned(), found: found.to_owned() }
}

/// A device's error as the engine knows it.
fn backend_error(uuid: &str, error: CudaError) -> BackendError {
    match error {
        CudaError::OutOfMemory { device, what, requested, free } => {
            BackendError::OutOfMemory { device, what, requested, free }
        }
        CudaError::Driver { device, op, code, text } => {
            let device = if device == "-" { uuid.to_owned() } else { device };
            BackendError::Device { device, op, detail: format!("{code} ({text})") }
        }
        other => {
            BackendError::Device { device: uuid.to_owned(), op: "the CUDA backend".into(), detail: other.to_string() }
        }
    }
}
