//! The CPU backend: the oracle that every other backend is compared with, and the engine where there is no GPU.
//!
//! f32 activations times decoded weights: a quantised matrix gives the very bits that its decoded f32 copy would.
//! Sums follow the order of `lanes`, so results are the same on every CPU, for every number of threads, for a row
//! alone or among others. Weights stay in the file's memory map; keys and values are paged as the engine says.
//!
//! | file | what it is |
//! |---|---|
//! | `lanes.rs` | sixteen f32 lanes in three spellings (portable, AVX2, AVX-512) and the order of every sum |
//! | `math.rs` | `exp` and its kin with the same bits everywhere |
//! | `unpack.rs` | the sixteen formats, decoded in registers |
//! | `pool.rs` | threads that share the tasks of one op |
//! | `weight.rs`, `kv.rs` | what is resident |
//! | `limits.rs` | the machine's limits, measured |
//! | `embed.rs` `norm.rs` `matmul.rs` `qkv.rs` `rope.rs` `attention.rs` `gated.rs` `moe.rs` `head.rs` | one op each |

mod lanes;
mod math;
mod unpack;
mod pool;
mod weight;
mod kv;
mod embed;
mod norm;
mod matmul;
mod rope;
mod qkv;
mod attention;
mod gated;
mod moe;
mod head;
mod limits;
#[cfg(test)]
mod tests;

pub use limits::{measure_multiply_adds, measure_read_bandwidth};
pub use weight::CpuWeight;

use super::routes::Routing;
use super::{
    AttentionOp, Backend, BackendError, Batch, GatedOp, HeadOp, KvLayout, Linear, MemoryUse, MoeOp, QkvOp,
    RouteDifference, Routes, WeightSource,
};
use kv::KvCache;
use lanes::Isa;
use pool::Pool;
use std::collections::HashMap;

#[cfg(target_endian = "big")]
compile_error!("GGUF tensors are little-endian and used where they lie: big-endian CPUs are not supported");

/// Runs models on the CPU.
pub struct CpuBackend {
    ctx: Ctx,
    batch: Batch,
    kv: Option<KvCache>,
    /// The normalised input of the op in progress, `[T, C]`.
    normed: Vec<f32>,
    /// Keys and values of the step before they go into the cache, `[T, NKV * HS]` each.
    fresh: (Vec<f32>, Vec<f32>),
    moe: moe::Scratch,
    routing: Routing,
    /// Bytes of weights by address: tied tensors are one.
    weights: HashMap<usize, u64>,
    tensor_bytes: u64,
}

/// What every op needs: the instruction set and the threads.
struct Ctx {
    isa: Isa,
    pool: Pool,
}

/// An activation buffer: row-major f32.
#[derive(Debug, Clone)]
pub struct CpuTensor {
    data: Vec<f32>,
    cols: usize,
}

impl CpuTensor {
    /// The first `n` rows, which must be `cols` wide.
    ///
    /// # Panics
    /// If the tensor has fewer rows or another width: shapes are validated when a model is loaded.
    fn rows(&self, n: usize, cols: usize) -> &[f32] {
        self.check(n, cols);
        &self.data[..n * cols]
    }

    fn rows_mut(&mut self, n: usize, cols: usize) -> &mut [f32] {
        self.check(n, cols);
        &mut self.data[..n * cols]
    }

    fn check(&self, n: usize, cols: usize) {
        assert!(
            self.cols == cols && n * cols <= self.data.len(),
            "an op needs {n} rows of {cols}, the tensor has {} of {}",
            self.data.len() / self.cols.max(1),
            self.cols
        );
    }

    /// Overwrites the first `values.len()` elements; for tests and benchmarks of single ops.
    ///
    /// # Panics
    /// If the tensor has fewer elements.
    pub fn write(&mut self, values: &[f32]) {
        self.data[..values.len()].copy_from_slice(values);
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl CpuBackend {
    /// A backend with one thread per core that this process may use.
    pub fn new() -> Self {
        Self::with_threads(std::thread::available_parallelism().map_or(1, |n| n.get()))
    }

    /// A backend with `n_threads` threads, at least 1. The number changes no bit of any result.
    pub fn with_threads(n_threads: usize) -> Self {
        Self::with(n_threads, Isa::best())
    }

    /// A backend for each instruction set this CPU has, by name, the portable one first. Results are bit-equal.
    pub fn each_instruction_set(n_threads: usize) -> Vec<(&'static str, Self)> {
        Isa::available().into_iter().map(|isa| (isa.name(), Self::with(n_threads, isa))).collect()
    }

    fn with(n_threads: usize, isa: Isa) -> Self {
        Self {
            ctx: Ctx { isa, pool: Pool::new(n_threads.max(1)) },
            batch: Batch::default(),
            kv: None,
            normed: Vec::new(),
            fresh: (Vec::new(), Vec::new()),
            moe: moe::Scratch::default(),
            routing: Routing::default(),
            weights: HashMap::new(),
            tensor_bytes: 0,
        }
    }

    /// The instruction set in use: `portable`, `avx2` or `avx512`.
    pub fn instruction_set(&self) -> &'static str {
        self.ctx.isa.name()
    }

    /// Threads in use.
    pub fn n_threads(&self) -> usize {
        self.ctx.pool.n_threads()
    }

    /// Tells from now on which experts tokens go to.
    pub fn tell_routes(&mut self) -> Routes {
        self.routing.tell()
    }

    /// Sends tokens from now on to the experts that another backend chose, in the same steps of the same model.
    pub fn follow_routes(&mut self, routes: Routes) {
        self.routing.follow(routes);
    }

    /// How far the scores were from those that were followed.
    pub fn route_difference(&self) -> RouteDifference {
        self.routing.difference
    }

    fn scratch_bytes(&self) -> u64 {
        let own = self.normed.capacity() + self.fresh.0.capacity() + self.fresh.1.capacity() + self.moe.capacity();
        self.tensor_bytes + 4 * own as u64
    }
}

/// Zeroed elements, or a typed refusal.
fn allocate<T: bytemuck::Zeroable>(n: usize, what: &str) -> Result<Vec<T>, BackendError> {
    let requested = (n as u64).saturating_mul(size_of::<T>() as u64);
    let free = available_memory();
    let refuse = |free| BackendError::OutOfMemory { device: "cpu".into(), what: what.into(), requested, free };
    // The system grants more than it has and kills the process that uses it: ask what there is.
    if free.is_some_and(|free| requested > free) {
        return Err(refuse(free.unwrap_or_default()));
    }
    bytemuck::try_zeroed_vec(n).map_err(|()| refuse(free.unwrap_or_default()))
}

/// Bytes that can be allocated without swapping, where the system says so (Linux: `MemAvailable`).
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Makes `buffer` at least `n` long.
fn grow(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if buffer.len() < n {
        // Exactly: what a model takes is predicted before it is loaded.
        buffer.reserve_exact(n - buffer.len());
        buffer.resize(n, 0.0);
    }
    &mut buffer[..n]
}

impl Backend for CpuBackend {
    type Weight = CpuWeight;
    type Tensor = CpuTensor;

    fn device(&self) -> String {
        "cpu".into()
    }

    fn weight(&mut self, source: WeightSource<'_>) -> Result<CpuWeight, BackendError> {
        let weight = CpuWeight::new(source)?;
        let (address, bytes) = weight.extent();
        let known = self.weights.entry(address).or_default();
        *known = bytes.max(*known);
        Ok(weight)
    }

    fn tensor(&mut self, rows: usize, cols: usize) -> Result<CpuTensor, BackendError> {
        let n = rows.saturating_mul(cols);
        let data = allocate(n, &format!("activations {rows} x {cols}"))?;
        self.tensor_bytes += 4 * n as u64;
        Ok(CpuTensor { data, cols })
    }

    fn kv_cache(&mut self, layout: KvLayout) -> Result<(), BackendError> {
        self.kv = None;
        self.kv = Some(KvCache::new(layout)?);
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse {
            weights: self.weights.values().sum(),
            kv: self.kv.as_ref().map_or(0, KvCache::bytes),
            scratch: self.scratch_bytes(),
        }
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), BackendError> {
        let n = batch.tokens.len();
        assert!(batch.positions.len() == n && batch.slots.len() == n, "a batch has a position and a slot per token");
        self.batch.clone_from(batch);
        Ok(())
    }

    fn embed(&mut self, table: &CpuWeight, scale: f32, x: &mut CpuTensor) {
        embed::run(&self.ctx, &self.batch, table, scale, x);
    }

    fn qkv(&mut self, op: &QkvOp<'_, Self>, x: &CpuTensor, q: &mut CpuTensor) {
        let kv = self.kv.as_mut().expect("qkv before kv_cache");
        qkv::run(&mut self.ctx, &self.batch, kv, (&mut self.normed, &mut self.fresh), op, x, q);
    }

    fn attention(&mut self, op: &AttentionOp<'_, Self>, q: &CpuTensor, out: &mut CpuTensor) {
        let kv = self.kv.as_ref().expect("attention before kv_cache");
        attention::run(&mut self.ctx, &self.batch, kv, op, q, out);
    }

    fn linear_residual(&mut self, linear: Linear<'_, Self>, a: &CpuTensor, x: &mut CpuTensor) {
        gated::linear_residual(&mut self.ctx, self.batch.tokens.len(), linear, a, x);
    }

    fn gated(&mut self, op: &GatedOp<'_, Self>, x: &CpuTensor, h: &mut CpuTensor) {
        gated::run(&mut self.ctx, self.batch.tokens.len(), &mut self.normed, op, x, h);
    }

    fn moe(&mut self, op: &MoeOp<'_, Self>, x: &mut CpuTensor) {
        let work = (&mut self.normed, &mut self.moe);
        moe::run(&mut self.ctx, self.batch.tokens.len(), work, &mut self.routing, op, x);
    }

    fn head(&mut self, op: &HeadOp<'_, Self>, x: &CpuTensor, logits: &mut CpuTensor) {
        head::run(&mut self.ctx, &self.batch, &mut self.normed, op, x, logits);
    }

    fn read(&mut self, tensor: &CpuTensor, out: &mut [f32]) -> Result<(), BackendError> {
        out.copy_from_slice(&tensor.data[..out.len()]);
        Ok(())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.kv.as_mut().expect("copy_blocks before kv_cache").copy_blocks(pairs);
        Ok(())
    }
}
