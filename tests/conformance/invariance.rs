//! The same bits, whatever else is going on: a small model run alone, among strangers, in chunks, in other blocks,
//! with other numbers of threads and on other instruction sets.

use crate::device::{Device, Random, on_every_backend};
use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::{
    Activation, AttentionOp, BLOCK_TOKENS, Backend, Batch, GatedOp, HeadDims, HeadOp, KvDtype, Linear, MoeOp,
    MoeWeighting, Norm, Pairing, QkvOp, Rope, SeqSpan,
};
use playhouse::dtype::DType;

const C: usize = 64;
const F: usize = 96;
const V: usize = 101;
const DIMS: HeadDims = HeadDims { n_heads: 6, n_kv_heads: 2, head_dim: 32 };
const N_EXPERTS: usize = 5;
const N_CTX: usize = 128;
const EPS: f32 = 1e-5;

/// A model of two layers: one gated with full attention, one of experts with a window and sinks.
struct Model<'a, B: Backend> {
    device: &'a mut Device<B>,
    embed: B::Weight,
    norm: B::Weight,
    rope: B::Weight,
    sinks: B::Weight,
    layers: Vec<Layer<B::Weight>>,
}

struct Layer<W> {
    q: W,
    k: W,
    v: W,
    o: W,
    gate: W,
    up: W,
    down: W,
    router: W,
}

impl<'a, B: Backend> Model<'a, B> {
    fn new(device: &'a mut Device<B>) -> Self {
        let mut random = Random(42);
        let n_q = DIMS.n_heads * DIMS.head_dim;
        let n_kv = DIMS.n_kv_heads * DIMS.head_dim;
        let mut matrix =
            |dtype, n_mats, n_rows, n_cols| device.matrices(&mut random, dtype, (n_mats, n_rows, n_cols), 0.5).weight;
        let embed = matrix(DType::F16, 1, V, C);
        let layers = [(DType::Q8_0, 1), (DType::MXFP4, N_EXPERTS)]
            .map(|(dtype, n_mats)| Layer {
                q: matrix(dtype, 1, n_q, C),
                k: matrix(DType::Q4_0, 1, n_kv, C),
                v: matrix(DType::F32, 1, n_kv, C),
                o: matrix(DType::Q5_0, 1, C, n_q),
                gate: matrix(dtype, n_mats, F, C),
                up: matrix(dtype, n_mats, F, C),
                down: matrix(DType::IQ4_NL, n_mats, C, F),
                router: matrix(DType::F32, 1, N_EXPERTS, C),
            })
            .into();
        let norm = device.vector(&Random(7).f32s(C, 1.0));
        let angle = |p: usize, i: usize| p as f32 / 50f32.powf(i as f32 / 16.0);
        let table: Vec<f32> = (0..N_CTX)
            .flat_map(|p| (0..16).map(move |i| angle(p, i).cos()).chain((0..16).map(move |i| angle(p, i).sin())))
            .collect();
        let rope = device.matrix_of(&table, N_CTX);
        let sinks = device.vector(&Random(8).f32s(DIMS.n_heads, 1.0));
        device.kv(2, DIMS.n_kv_heads, DIMS.head_dim, KvDtype::F32);
        Self { device, embed, norm, rope, sinks, layers }
    }

    /// Runs a batch and returns a row of logits per wanted token.
    fn step(&mut self, batch: &Batch) -> Vec<Vec<u32>> {
        let n = batch.tokens.len();
        let backend = &mut self.device.backend;
        let n_q = DIMS.n_heads * DIMS.head_dim;
        let [mut x, mut q, mut a, mut h] = [C, n_q, n_q, F].map(|cols| backend.tensor(n, cols).unwrap());
        let mut logits = backend.tensor(batch.logit_rows.len().max(1), V).unwrap();
        let norm = Norm { weight: &self.norm, eps: EPS };
        backend.begin(batch).unwrap();
        backend.embed(&self.embed, 1.0, &mut x);
        for (layer, w) in self.layers.iter().enumerate() {
            let plain = |weight| Linear { weight, bias: None };
            let rope = Rope { table: &self.rope, n_rot: 32, pairing: Pairing::Halves };
            let (q_w, k_w, v_w) = (plain(&w.q), plain(&w.k), plain(&w.v));
            let op = QkvOp { layer, norm, q: q_w, k: k_w, v: v_w, qk_norm: None, rope, dims: DIMS };
            backend.qkv(&op, &x, &mut q);
            let experts = layer == 1;
            let op = AttentionOp {
                layer,
                dims: DIMS,
                scale: 0.2,
                window: experts.then_some(19),
                sinks: experts.then_some(&self.sinks),
                softcap: None,
            };
            backend.attention(&op, &q, &mut a);
            backend.linear_residual(plain(&w.o), &a, &mut x);
            let (gate, up, down) = (plain(&w.gate), plain(&w.up), plain(&w.down));
            if experts {
                let op = MoeOp {
                    norm,
                    router: plain(&w.router),
                    gate,
                    up,
                    down,
                    n_experts: N_EXPERTS,
                    n_used: 2,
                    weighting: MoeWeighting::SoftmaxOfChosen,
                    activation: Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 },
                };
                backend.moe(&op, &mut x);
            } else {
                backend.gated(&GatedOp { norm, gate, up, activation: Activation::SwiGlu }, &x, &mut h);
                backend.linear_residual(down, &h, &mut x);
            }
        }
        let output = Linear { weight: &self.embed, bias: None };
        backend.head(&HeadOp { norm, output, softcap: None }, &x, &mut logits);
        let flat = self.device.read(&logits, batch.logit_rows.len() * V);
        flat.chunks_exact(V).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
    }
}

/// A sequence of tokens in blocks of its own.
struct Sequence {
    tokens: Vec<u32>,
    blocks: Vec<u32>,
}

impl Sequence {
    fn new(seed: u64, n: usize, blocks: &[u32]) -> Self {
        let mut random = Random(seed);
        Self { tokens: (0..n).map(|_| (random.next() % V as u64) as u32).collect(), blocks: blocks.to_vec() }
    }

    /// Appends tokens `from .. to` to a batch, wanting the logits of all of them.
    fn push(&self, batch: &mut Batch, from: usize, to: usize) {
        let first = batch.tokens.len();
        batch.spans.push(SeqSpan { first, n_tokens: to - from, kv_len: to, blocks: self.blocks.clone() });
        for p in from..to {
            batch.logit_rows.push(batch.tokens.len() as u32);
            batch.tokens.push(self.tokens[p]);
            batch.positions.push(p as u32);
            batch.slots.push(self.blocks[p / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (p % BLOCK_TOKENS) as u32);
        }
    }
}

const N: usize = 75;

fn sequence(blocks: &[u32]) -> Sequence {
    Sequence::new(1, N, blocks)
}

/// Logits of every position of a sequence, run alone in chunks.
fn alone<B: Backend>(model: &mut Model<'_, B>, sequence: &Sequence, chunk: usize) -> Vec<Vec<u32>> {
    let n = sequence.tokens.len();
    (0..n)
        .step_by(chunk)
        .flat_map(|from| {
            let mut batch = Batch::default();
            sequence.push(&mut batch, from, (from + chunk).min(n));
            model.step(&batch)
        })
        .collect()
}

fn cpu(n_threads: usize) -> Device<CpuBackend> {
    Device::cpu("cpu", CpuBackend::with_threads(n_threads))
}

fn assert_same(what: &str, expected: &[Vec<u32>], found: &[Vec<u32>]) {
    assert_eq!(expected.len(), found.len(), "{what}");
    for (i, (e, f)) in expected.iter().zip(found).enumerate() {
        assert!(e == f, "{what}: the logits of position {i} differ");
    }
}

fn chunks_and_company<B: Backend>(device: &mut Device<B>) {
    let mut model = Model::new(device);
    for &kv in model.device.kv_dtypes {
        model.device.kv(2, DIMS.n_kv_heads, DIMS.head_dim, kv);
        let expected = alone(&mut model, &sequence(&[0, 1, 2]), N);
        for chunk in [1, 2, 7, 16, 32, 33, 64] {
            let found = alone(&mut model, &sequence(&[5, 9, 3]), chunk);
            assert_same(&format!("{} {kv:?} in chunks of {chunk}", model.device.name), &expected, &found);
        }
        let found = among_strangers(&mut model);
        assert_same(&format!("{} {kv:?} among strangers", model.device.name), &expected, &found);
        let found = on_copied_blocks(&mut model);
        assert_same(&format!("{} {kv:?} on copied blocks", model.device.name), &expected, &found);
    }
}

/// The sequence in chunks of 11 between others that are being decoded or prefilled.
fn among_strangers<B: Backend>(model: &mut Model<'_, B>) -> Vec<Vec<u32>> {
    let subject = sequence(&[20, 4, 11]);
    let strangers =
        [Sequence::new(2, 90, &[1, 2, 3]), Sequence::new(3, 90, &[6, 7, 8]), Sequence::new(4, 90, &[12, 13, 14])];
    let mut found = Vec::new();
    for (i, from) in (0..N).step_by(11).enumerate() {
        let to = (from + 11).min(N);
        let mut batch = Batch::default();
        strangers[0].push(&mut batch, i, i + 1);
        strangers[1].push(&mut batch, 12 * i, 12 * i + 12);
        let at = batch.logit_rows.len();
        subject.push(&mut batch, from, to);
        strangers[2].push(&mut batch, i, i + 1);
        found.extend_from_slice(&model.step(&batch)[at..at + to - from]);
    }
    found
}

/// The first 40 tokens in some blocks, which are then copied to others where the rest is run.
fn on_copied_blocks<B: Backend>(model: &mut Model<'_, B>) -> Vec<Vec<u32>> {
    let (old, new) = (sequence(&[0, 1, 2]), sequence(&[17, 18, 19]));
    let mut batch = Batch::default();
    old.push(&mut batch, 0, 40);
    let mut found = model.step(&batch);
    model.device.backend.copy_blocks(&[(0, 17), (1, 18)]).unwrap();
    // The old blocks are overwritten by somebody else before the copy is used.
    let mut batch = Batch::default();
    Sequence::new(9, 64, &[0, 1]).push(&mut batch, 0, 64);
    model.step(&batch);
    let mut batch = Batch::default();
    new.push(&mut batch, 40, N);
    found.extend(model.step(&batch));
    found
}

on_every_backend! {
    a_sequence_has_the_same_logits_in_chunks_in_company_and_in_other_blocks = chunks_and_company;
}

#[test]
fn threads_change_no_bit() {
    let expected = alone(&mut Model::new(&mut cpu(1)), &sequence(&[0, 1, 2]), N);
    for n_threads in [2, 3, 8] {
        for chunk in [1, N] {
            let found = alone(&mut Model::new(&mut cpu(n_threads)), &sequence(&[0, 1, 2]), chunk);
            assert_same(&format!("{n_threads} threads"), &expected, &found);
        }
    }
}

#[test]
fn instruction_sets_change_no_bit() {
    let mut all = CpuBackend::each_instruction_set(2).into_iter().map(|(name, backend)| {
        let mut device = Device::cpu(name, backend);
        (name, alone(&mut Model::new(&mut device), &sequence(&[0, 1, 2]), 10))
    });
    let (_, expected) = all.next().unwrap();
    for (name, found) in all {
        assert_same(name, &expected, &found);
    }
}
