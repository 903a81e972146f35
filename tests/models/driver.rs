//! Drives a runner by hand: sequences whose KV blocks lie scattered over the pool.

use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::cuda::CudaBackend;
use playhouse::backend::{BLOCK_TOKENS, Batch, KvDtype, SeqSpan};
use playhouse::engine::{DeviceName, Runner, RunnerLimits, StepModel};
use playhouse::gguf::GgufFile;

/// A runner for up to eight sequences of `n_ctx` tokens.
pub(crate) fn runner(file: &GgufFile, n_ctx: usize) -> Runner<CpuBackend> {
    runner_with(
        file,
        RunnerLimits { max_batch_tokens: 1024, max_logit_rows: 1024, ..RunnerLimits::new(n_ctx, 8, KvDtype::F32) },
    )
}

pub(crate) fn runner_with(file: &GgufFile, limits: RunnerLimits) -> Runner<CpuBackend> {
    Runner::load(file, CpuBackend::with_threads(2), limits, &mut |_| ()).unwrap()
}

/// The first GPU, or `None` with a line that says why the test does not run on one.
pub(crate) fn gpu(test: &str) -> Option<CudaBackend> {
    let name = DeviceName::find("gpu").map_err(|e| e.to_string());
    let opened = name.and_then(|name| CudaBackend::open(&name.to_string(), None).map_err(|e| e.to_string()));
    opened.inspect_err(|reason| println!("{test} does not run on a GPU: {reason}")).ok()
}

/// A runner on the GPU for up to eight sequences of `n_ctx` tokens.
pub(crate) fn gpu_runner(test: &str, file: &GgufFile, n_ctx: usize) -> Option<Runner<CudaBackend>> {
    let limits =
        RunnerLimits { max_batch_tokens: 1024, max_logit_rows: 1024, ..RunnerLimits::new(n_ctx, 8, KvDtype::F16) };
    gpu(test).map(|backend| Runner::load(file, backend, limits, &mut |_| ()).unwrap())
}

/// A sequence: its tokens so far and its blocks, every eighth of the pool, last one first.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    n_done: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    /// The `idx`-th of eight sequences in the pool of `runner`.
    pub(crate) fn new(runner: &impl StepModel, idx: u32) -> Self {
        let n_blocks = runner.capacity().n_kv_blocks as u32;
        Self { n_done: 0, blocks: (0..n_blocks).rev().filter(|block| block % 8 == idx).collect() }
    }
}

/// Adds the next tokens of a sequence to a batch; asks for logits of all of them, or of the last one.
pub(crate) fn push(batch: &mut Batch, sequence: &mut Sequence, tokens: &[u32], all_logits: bool) {
    let first = batch.tokens.len();
    let start = sequence.n_done;
    sequence.n_done += tokens.len();
    let slot = |pos: usize| sequence.blocks[pos / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (pos % BLOCK_TOKENS) as u32;
    batch.tokens.extend(tokens);
    batch.positions.extend((start..sequence.n_done).map(|pos| pos as u32));
    batch.slots.extend((start..sequence.n_done).map(slot));
    let blocks = sequence.blocks[..sequence.n_done.div_ceil(BLOCK_TOKENS)].to_vec();
    batch.spans.push(SeqSpan { first, n_tokens: tokens.len(), kv_len: sequence.n_done, blocks });
    let skip = if all_logits { 0 } else { tokens.len() - 1 };
    batch.logit_rows.extend((first + skip..batch.tokens.len()).map(|row| row as u32));
}

/// The logits of every token, computed in steps of `chunk` tokens, `[N, V]`.
pub(crate) fn all_logits(
    runner: &mut impl StepModel,
    sequence: &mut Sequence,
    tokens: &[u32],
    chunk: usize,
) -> Vec<f32> {
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    for tokens in tokens.chunks(chunk) {
        let mut batch = Batch::default();
        push(&mut batch, sequence, tokens, true);
        runner.run(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    }
    all
}

impl Sequence {
    /// Takes another sequence's tokens as its own.
    pub(crate) fn continue_from(&mut self, other: &Sequence) {
        self.n_done = other.n_done;
    }

    /// The blocks in use, each with its counterpart in `other`.
    pub(crate) fn pairs(&self, other: &Sequence) -> Vec<(u32, u32)> {
        let n_blocks = self.n_done.div_ceil(BLOCK_TOKENS);
        self.blocks.iter().copied().zip(other.blocks.iter().copied()).take(n_blocks).collect()
    }
}

impl Sequence {
    /// The first blocks of the pool.
    pub(crate) fn first_of(runner: &impl StepModel) -> Self {
        Self { n_done: 0, blocks: (0..runner.capacity().n_kv_blocks as u32).collect() }
    }
}
