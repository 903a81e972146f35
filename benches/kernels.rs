//! The CPU backend's ops at true shapes, in bytes of weights and in multiply-adds per second.
//!
//! One token is bound by reading the weights: compare with the first line. Many tokens are bound by arithmetic. `cargo bench --bench kernels`; a part of a name as argument picks benches.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use playhouse::backend::cpu::{CpuBackend, CpuTensor, CpuWeight, measure_multiply_adds, measure_read_bandwidth};
use playhouse::backend::{
    AttentionOp, BLOCK_TOKENS, Backend, Batch, HeadDims, KvDtype, KvLayout, Linear, SeqSpan, WeightSource, WeightUse,
};
use playhouse::dtype::{DType, RandomBlocks};
use playhouse::gguf::TensorBytes;

fn main() {
    let cpu = CpuBackend::new();
    println!(
        "{} threads, {}: {:.1} GB/s read from memory, {:.1} G multiply-adds/s",
        cpu.n_threads(),
        cpu.instruction_set(),
        measure_read_bandwidth(cpu.n_threads()) / 1e9,
        measure_multiply_adds(cpu.n_threads()) / 1e9
    );
    divan::main();
}

fn weight(cpu: &mut CpuBackend, dtype: DType, n_rows: usize, n_cols: usize) -> CpuWeight {
    let mut bytes = vec![0; dtype.row_bytes(n_rows * n_cols).expect("whole blocks")];
    RandomBlocks::new(dtype, 0.02, 1).expect("0.02 fits every format").fill(0, 0, &mut bytes).expect("whole blocks");
    let bytes = TensorBytes::from_vec(bytes);
    cpu.weight(WeightSource { name: "bench", dtype, n_mats: 1, n_rows, n_cols, bytes, uses: WeightUse::ANY })
        .expect("sizes fit")
}

fn tensor(cpu: &mut CpuBackend, rows: usize, cols: usize) -> CpuTensor {
    let mut tensor = cpu.tensor(rows, cols).expect("memory");
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    tensor.write(&values);
    tensor
}

/// `n` sequences of `kv_len` tokens that run their last `n_tokens` tokens.
fn batch(n: usize, n_tokens: usize, kv_len: usize) -> Batch {
    let mut batch = Batch::default();
    let n_blocks = kv_len.div_ceil(BLOCK_TOKENS);
    for seq in 0..n {
        let blocks: Vec<u32> = (0..n_blocks).map(|b| (seq * n_blocks + b) as u32).collect();
        let first = batch.tokens.len();
        for p in kv_len - n_tokens..kv_len {
            batch.tokens.push(0);
            batch.positions.push(p as u32);
            batch.slots.push(blocks[p / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (p % BLOCK_TOKENS) as u32);
        }
        batch.spans.push(SeqSpan { first, n_tokens, kv_len, blocks });
    }
    batch
}

fn bench_linear(bencher: Bencher<'_, '_>, dtype: DType, n_tokens: usize) {
    // The down projection of an 8B model's size class: 29 M elements, outside L2 in every format.
    let (n_out, n_in) = (4096, 7168);
    let mut cpu = CpuBackend::new();
    let weight = weight(&mut cpu, dtype, n_out, n_in);
    let (a, mut x) = (tensor(&mut cpu, n_tokens, n_in), tensor(&mut cpu, n_tokens, n_out));
    cpu.begin(&batch(1, n_tokens, n_tokens)).expect("a CPU does not fail");
    let n_bytes = dtype.row_bytes(n_out * n_in).expect("whole blocks");
    bencher
        .counter(BytesCount::new(n_bytes))
        .counter(ItemsCount::new(n_out * n_in * n_tokens))
        .bench_local(|| cpu.linear_residual(Linear { weight: &weight, bias: None }, &a, &mut x));
}

/// One token: the decode step of one request.
#[divan::bench(args = DType::ALL)]
fn linear_1_token(bencher: Bencher<'_, '_>, dtype: &DType) {
    bench_linear(bencher, *dtype, 1);
}

/// Four tokens: the decode step of four requests.
#[divan::bench(args = [DType::F16, DType::Q8_0, DType::Q4_K, DType::MXFP4])]
fn linear_4_tokens(bencher: Bencher<'_, '_>, dtype: DType) {
    bench_linear(bencher, dtype, 4);
}

/// A prefill chunk.
#[divan::bench(args = [DType::F32, DType::Q8_0, DType::Q4_K], sample_count = 5)]
fn linear_128_tokens(bencher: Bencher<'_, '_>, dtype: DType) {
    bench_linear(bencher, dtype, 128);
}

/// A matrix of a small model: mostly the price of fork and join.
#[divan::bench]
fn linear_small(bencher: Bencher<'_, '_>) {
    let mut cpu = CpuBackend::new();
    let weight = weight(&mut cpu, DType::Q8_0, 512, 256);
    let (a, mut x) = (tensor(&mut cpu, 1, 256), tensor(&mut cpu, 1, 512));
    cpu.begin(&batch(1, 1, 1)).expect("a CPU does not fail");
    bencher.counter(BytesCount::new(512usize * 256 * 34 / 32)).bench_local(|| {
        cpu.linear_residual(Linear { weight: &weight, bias: None }, &a, &mut x);
    });
}

/// `(sequences, tokens each, kv_len, KV type)`
const ATTENTION: [(usize, usize, usize, KvDtype); 6] = [
    (1, 1, 1024, KvDtype::F32),
    (1, 1, 1024, KvDtype::F16),
    (1, 1, 1024, KvDtype::Q8_0),
    (8, 1, 1024, KvDtype::F32),
    (1, 128, 128, KvDtype::F32),
    (1, 128, 1024, KvDtype::F32),
];

/// One layer of Qwen2.5-0.5B's attention: 14 heads on 2, of 64. Items are multiply-adds.
#[divan::bench(args = ATTENTION)]
fn attention(bencher: Bencher<'_, '_>, (n, n_tokens, kv_len, dtype): (usize, usize, usize, KvDtype)) {
    let dims = HeadDims { n_heads: 14, n_kv_heads: 2, head_dim: 64 };
    let mut cpu = CpuBackend::new();
    let n_blocks = n * kv_len.div_ceil(BLOCK_TOKENS);
    let layout = KvLayout { n_layers: 1, n_kv_heads: 2, head_dim: 64, n_blocks, dtype };
    cpu.kv_cache(layout).expect("memory");
    let q = tensor(&mut cpu, n * n_tokens, 14 * 64);
    let mut out = tensor(&mut cpu, n * n_tokens, 14 * 64);
    let batch = batch(n, n_tokens, kv_len);
    cpu.begin(&batch).expect("a CPU does not fail");
    let op = AttentionOp { layer: 0, dims, scale: 0.125, window: None, sinks: None, softcap: None };
    let seen = n * n_tokens * (2 * kv_len - n_tokens + 1) / 2;
    bencher.counter(ItemsCount::new(2 * seen * 14 * 64)).bench_local(|| cpu.attention(&op, &q, &mut out));
}
