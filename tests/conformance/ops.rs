//! Each op against the f64 reference: odd sizes, every format, every switch.

use crate::device::{Device, Held, Random, on_every_backend, plain_batch};
use crate::reference::{self, Value, widen};
use playhouse::backend::{
    Activation, AttentionOp, BLOCK_TOKENS, Backend, Batch, GatedOp, HeadDims, HeadOp, Join, KvDtype, Linear, MoeOp,
    MoeWeighting, Norm, Pairing, QkvOp, Rope, SeqSpan,
};
use playhouse::dtype::DType;

const ODD: [usize; 7] = [1, 2, 3, 17, 31, 33, 127];
const EPS: f32 = 1e-5;

on_every_backend! {
    embed_decodes_and_scales = embed;
    linear_residual_in_every_format = linear_residual_formats;
    linear_residual_of_odd_sizes = linear_residual_sizes;
    gated_feed_forward = gated;
    attention_of_many_shapes = attention_shapes;
    attention_with_every_switch = attention_switches;
    attention_over_coarse_caches = attention_caches;
    sequences_do_not_see_each_other = attention_of_several_sequences;
    mixture_of_experts = moe;
    equal_scores_choose_the_lower_index = moe_ties;
    head_of_wanted_rows = head;
}

fn embed<B: Backend>(device: &mut Device<B>) {
    let mut random = Random(1);
    for &dtype in DType::ALL {
        let n = 2 * dtype.block_elems();
        let Held { weight, values } = device.matrices(&mut random, dtype, (1, 5, n), 1.0);
        for scale in [1.0, 0.3] {
            let mut batch = plain_batch(4);
            batch.tokens = vec![4, 0, 2, 2];
            let mut x = device.backend.tensor(6, n).unwrap();
            device.backend.begin(&batch).unwrap();
            device.backend.embed(&weight, scale, &mut x);
            let found = device.read(&x, 4 * n);
            let expected: Vec<f32> =
                batch.tokens.iter().flat_map(|t| &values[*t as usize * n..][..n]).map(|v| v * scale).collect();
            assert_eq!(found, expected, "{} {}", device.name, dtype.name());
        }
    }
}

fn check_linear<B: Backend>(device: &mut Device<B>, dtype: DType, n_out: usize, n_in: usize, n_tokens: usize) {
    let mut random = Random((n_out * 1000 + n_in * 10 + n_tokens) as u64);
    let w = device.matrices(&mut random, dtype, (1, n_out, n_in), 0.5);
    for with_bias in [false, true] {
        let (a, x) = (random.f32s(n_tokens * n_in, 1.0), random.f32s(n_tokens * n_out, 1.0));
        let bias = random.f32s(n_out, 1.0);
        let bias_weight = device.vector(&bias);
        let bias = with_bias.then_some(bias);
        let (a_tensor, mut x_tensor) = (device.tensor_of(&a, n_tokens), device.tensor_of(&x, n_tokens));
        let linear = Linear { weight: &w.weight, bias: bias.as_ref().map(|_| &bias_weight) };
        device.backend.linear_residual(linear, &a_tensor, &mut x_tensor);
        let found = device.read(&x_tensor, n_tokens * n_out);
        let expected: Vec<Value> = (0..n_tokens)
            .flat_map(|t| reference::linear(&w.values, bias.as_deref(), &widen(&a[t * n_in..][..n_in])))
            .zip(&x)
            .map(|((y, magnitude), x)| (f64::from(*x) + y, f64::from(x.abs()) + magnitude))
            .collect();
        let what = format!("{} {n_out} x {n_in}, {n_tokens} tokens, bias {with_bias}", dtype.name());
        device.assert_close(&what, &found, &expected, 1.0);
    }
}

fn linear_residual_formats<B: Backend>(device: &mut Device<B>) {
    for &dtype in DType::ALL {
        for n_tokens in [1, 2, 5, 33] {
            check_linear(device, dtype, 37, 3 * dtype.block_elems().max(16), n_tokens);
        }
    }
}

fn linear_residual_sizes<B: Backend>(device: &mut Device<B>) {
    for n_out in ODD {
        for n_in in ODD {
            for n_tokens in [1, 3, 17] {
                check_linear(device, DType::F32, n_out, n_in, n_tokens);
            }
        }
    }
    check_linear(device, DType::Q8_0, 301, 96, 127);
    check_linear(device, DType::F16, 257, 130, 4);
}

fn gated<B: Backend>(device: &mut Device<B>) {
    for join in [None, Some(Join::Gated)] {
        gated_joined(device, join);
    }
}

fn gated_joined<B: Backend>(device: &mut Device<B>, join: Option<Join>) {
    let clamped = Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 };
    for (activation, scale) in [(Activation::SwiGlu, 1.0), (clamped, 1.0), (clamped, 40.0)] {
        for (n_ff, n_in, n_tokens) in [(1, 1, 1), (3, 2, 2), (17, 31, 3), (33, 127, 17), (127, 33, 1), (130, 64, 33)] {
            let mut random = Random(n_ff as u64);
            let x = random.f32s(n_tokens * n_in, 3.0);
            let norm = random.f32s(n_in, 1.0);
            let size = scale / (n_in as f32).sqrt();
            let both = device.group(&mut random, DType::F32, &[(1, n_ff, n_in); 2], size, join);
            let (gate, up) = (&both[0], &both[1]);
            let (gate_bias, up_bias) = (random.f32s(n_ff, 1.0), random.f32s(n_ff, 1.0));
            let weights = [&norm, &gate_bias, &up_bias].map(|v| device.vector(v));
            let op = GatedOp {
                norm: Norm { weight: &weights[0], eps: EPS },
                gate: Linear { weight: &gate.weight, bias: Some(&weights[1]) },
                up: Linear { weight: &up.weight, bias: Some(&weights[2]) },
                activation,
            };
            let x_tensor = device.tensor_of(&x, n_tokens);
            let mut h = device.backend.tensor(n_tokens, n_ff).unwrap();
            device.backend.gated(&op, &x_tensor, &mut h);
            let found = device.read(&h, n_tokens * n_ff);
            let mut expected = Vec::new();
            for x in x.chunks_exact(n_in) {
                let n = reference::rms_norm(&widen(x), &norm, EPS);
                let g = reference::linear(&gate.values, Some(&gate_bias), &n);
                let u = reference::linear(&up.values, Some(&up_bias), &n);
                // The activation's slope is at most about 1.1 in g (times u) and 1 in u (times g).
                expected.extend(g.iter().zip(&u).map(|(g, u)| {
                    (reference::activate(activation, g.0, u.0), (g.1 + 1.0) * (u.1 + 1.0) * (1.0 + 1.702 * g.1))
                }));
            }
            device.assert_close(&format!("gated {n_ff} x {n_in}, {n_tokens} tokens"), &found, &expected, 2.0);
        }
    }
}

/// What one attention test varies.
#[derive(Debug, Clone, Copy)]
struct Case {
    dims: HeadDims,
    n_in: usize,
    /// Tokens per sequence, each run in chunks of `chunk`.
    n_tokens: &'static [usize],
    chunk: usize,
    n_rot: usize,
    pairing: Pairing,
    bias: bool,
    qk_norm: bool,
    window: Option<usize>,
    sinks: bool,
    softcap: Option<f32>,
    kv: KvDtype,
    /// Whether q, k and v, and their biases, were made resident by one call.
    joined: bool,
    slack: f64,
}

const PLAIN: Case = Case {
    dims: HeadDims { n_heads: 4, n_kv_heads: 2, head_dim: 16 },
    n_in: 24,
    n_tokens: &[40],
    chunk: 64,
    n_rot: 16,
    pairing: Pairing::Halves,
    bias: false,
    qk_norm: false,
    window: None,
    sinks: false,
    softcap: None,
    kv: KvDtype::F32,
    joined: false,
    slack: 8.0,
};

fn attention_shapes<B: Backend>(device: &mut Device<B>) {
    let shapes = [
        (1, 1, 2, 2),
        (2, 1, 3, 2),
        (3, 3, 17, 16),
        (14, 2, 64, 64),
        (5, 1, 33, 8),
        (2, 2, 96, 96),
        (8, 1, 31, 30),
        (6, 3, 127, 64),
        (2, 1, 256, 128),
    ];
    for (n_heads, n_kv_heads, head_dim, n_rot) in shapes {
        for n_tokens in [&[1][..], &[33], &[70]] {
            let dims = HeadDims { n_heads, n_kv_heads, head_dim };
            check_attention(device, Case { dims, n_rot, n_tokens, ..PLAIN });
        }
    }
}

fn attention_switches<B: Backend>(device: &mut Device<B>) {
    let cases = [
        Case { pairing: Pairing::Interleaved, ..PLAIN },
        Case { n_rot: 8, ..PLAIN },
        Case { n_rot: 8, pairing: Pairing::Interleaved, ..PLAIN },
        Case { bias: true, ..PLAIN },
        Case { qk_norm: true, ..PLAIN },
        Case { sinks: true, ..PLAIN },
        Case { softcap: Some(0.5), ..PLAIN },
        Case { window: Some(1), ..PLAIN },
        Case { window: Some(5), sinks: true, ..PLAIN },
        Case { window: Some(33), n_tokens: &[100], ..PLAIN },
        Case { window: Some(1000), ..PLAIN },
        Case { chunk: 1, ..PLAIN },
        Case { chunk: 7, window: Some(9), bias: true, qk_norm: true, sinks: true, softcap: Some(2.0), ..PLAIN },
    ];
    for case in cases {
        check_attention(device, case);
        check_attention(device, Case { joined: true, ..case });
    }
}

fn attention_caches<B: Backend>(device: &mut Device<B>) {
    // Half of one unit in the last place of f16, and half a step of 127.
    let cases = [(KvDtype::F16, 2.0 / 2048.0), (KvDtype::Q8_0, 2.0 / 127.0)];
    for (kv, error) in cases {
        for (head_dim, n_rot) in [(16, 16), (33, 32), (64, 64), (96, 96)] {
            let dims = HeadDims { head_dim, ..PLAIN.dims };
            let slack = f64::max(error / device.tolerance, PLAIN.slack);
            check_attention(device, Case { kv, dims, n_rot, slack, ..PLAIN });
            check_attention(device, Case { kv, dims, n_rot, slack, chunk: 1, n_tokens: &[35], ..PLAIN });
        }
    }
}

fn attention_of_several_sequences<B: Backend>(device: &mut Device<B>) {
    for chunk in [1, 5, 64] {
        check_attention(device, Case { n_tokens: &[40, 1, 33, 7], chunk, ..PLAIN });
        check_attention(device, Case { n_tokens: &[3, 65, 32], chunk, window: Some(20), sinks: true, ..PLAIN });
    }
}

/// The inputs of an attention test, on the host.
struct Inputs {
    x: Vec<Vec<f32>>,
    norm: Vec<f32>,
    biases: [Vec<f32>; 3],
    head_norms: [Vec<f32>; 2],
    sinks: Vec<f32>,
}

fn check_attention<B: Backend>(device: &mut Device<B>, case: Case) {
    let Case { dims, n_in, .. } = case;
    if !device.has_head(dims.head_dim) || device.kv_like(case.kv).is_none() {
        return;
    }
    let HeadDims { n_heads, n_kv_heads, head_dim } = dims;
    let widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim];
    let mut random = Random((n_heads * 31 + head_dim) as u64);
    let inputs = Inputs {
        x: case.n_tokens.iter().map(|n| random.f32s(n * n_in, 2.0)).collect(),
        norm: random.f32s(n_in, 1.5),
        biases: widths.map(|w| random.f32s(w, 0.5)),
        head_norms: [0, 1].map(|_| random.f32s(head_dim, 1.5)),
        sinks: random.f32s(n_heads, 3.0),
    };
    let join = case.joined.then_some(Join::Stacked);
    let projections = device.group(&mut random, DType::F32, &widths.map(|w| (1, w, n_in)), 0.5, join);
    let n_ctx = case.n_tokens.iter().copied().max().unwrap_or(1);
    let angles: Vec<Vec<f64>> = (0..n_ctx)
        .map(|p| (0..case.n_rot / 2).map(|i| p as f64 / 100f64.powf(2.0 * i as f64 / case.n_rot as f64)).collect())
        .collect();

    let found = run_attention(device, case, &inputs, &projections, &angles);
    for (seq, found) in found.iter().enumerate() {
        let expected = expected_attention(case, &inputs, &projections, &angles, seq);
        device.assert_close(&format!("sequence {seq} of {case:?}"), found, &expected, case.slack);
    }
}

/// Runs all sequences side by side, chunk by chunk, in scattered blocks; the attention outputs of each.
fn run_attention<B: Backend>(
    device: &mut Device<B>,
    case: Case,
    inputs: &Inputs,
    projections: &[Held<B::Weight>],
    angles: &[Vec<f64>],
) -> Vec<Vec<f32>> {
    let Case { dims, n_in, .. } = case;
    let width = dims.n_heads * dims.head_dim;
    // Layer 1 of 2, so that a wrong layer offset shows.
    device.kv(2, dims.n_kv_heads, dims.head_dim, case.kv);
    let norm = device.vector(&inputs.norm);
    let biases: Vec<B::Weight> = if case.joined {
        device.joined_vectors(&inputs.biases)
    } else {
        inputs.biases.iter().map(|b| device.vector(b)).collect()
    };
    let head_norms = [0, 1].map(|i| device.vector(&inputs.head_norms[i]));
    let sinks = device.vector(&inputs.sinks);
    let table: Vec<f32> =
        angles.iter().flat_map(|a| a.iter().map(|a| a.cos() as f32).chain(a.iter().map(|a| a.sin() as f32))).collect();
    let table = device.matrix_of(&table, angles.len());
    let linear = |i: usize| Linear { weight: &projections[i].weight, bias: case.bias.then_some(&biases[i]) };
    let qkv = QkvOp {
        layer: 1,
        norm: Norm { weight: &norm, eps: EPS },
        q: linear(0),
        k: linear(1),
        v: linear(2),
        qk_norm: case
            .qk_norm
            .then_some((Norm { weight: &head_norms[0], eps: EPS }, Norm { weight: &head_norms[1], eps: EPS })),
        rope: Rope { table: &table, n_rot: case.n_rot, pairing: case.pairing },
        dims,
    };
    let attention = AttentionOp {
        layer: 1,
        dims,
        scale: 1.0 / (dims.head_dim as f32).sqrt(),
        window: case.window,
        sinks: case.sinks.then_some(&sinks),
        softcap: case.softcap,
    };
    let mut found = vec![Vec::new(); case.n_tokens.len()];
    let mut done = 0;
    while case.n_tokens.iter().any(|n| *n > done) {
        let batch = chunk_batch(case, done);
        let rows: Vec<f32> = batch
            .spans
            .iter()
            .zip(case.n_tokens.iter().enumerate().filter(|(_, n)| **n > done))
            .flat_map(|(span, (seq, _))| &inputs.x[seq][done * n_in..][..span.n_tokens * n_in])
            .copied()
            .collect();
        let n = batch.tokens.len();
        let x = device.tensor_of(&rows, n);
        let (mut q, mut out) = (device.backend.tensor(n, width).unwrap(), device.backend.tensor(n, width).unwrap());
        device.backend.begin(&batch).unwrap();
        device.backend.qkv(&qkv, &x, &mut q);
        device.backend.attention(&attention, &q, &mut out);
        let out = device.read(&out, n * width);
        let seqs = case.n_tokens.iter().enumerate().filter(|(_, n)| **n > done);
        for (span, (seq, _)) in batch.spans.iter().zip(seqs) {
            found[seq].extend_from_slice(&out[span.first * width..][..span.n_tokens * width]);
        }
        done += case.chunk;
    }
    found
}

/// The next chunk of every sequence that has one; block `b` of sequence `s` is block `31 - 7 s - b`.
fn chunk_batch(case: Case, done: usize) -> Batch {
    let mut batch = Batch::default();
    for (seq, n) in case.n_tokens.iter().enumerate().filter(|(_, n)| **n > done) {
        let end = (done + case.chunk).min(*n);
        let blocks: Vec<u32> = (0..end.div_ceil(BLOCK_TOKENS)).map(|b| (31 - 7 * seq - b) as u32).collect();
        batch.spans.push(SeqSpan {
            first: batch.tokens.len(),
            n_tokens: end - done,
            kv_len: end,
            blocks: blocks.clone(),
        });
        for p in done..end {
            batch.tokens.push(0);
            batch.positions.push(p as u32);
            batch.slots.push(blocks[p / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (p % BLOCK_TOKENS) as u32);
        }
    }
    batch
}

fn expected_attention<W>(
    case: Case,
    inputs: &Inputs,
    projections: &[Held<W>],
    angles: &[Vec<f64>],
    seq: usize,
) -> Vec<Value> {
    let HeadDims { n_heads, n_kv_heads, head_dim } = case.dims;
    let projected: Vec<[Vec<f64>; 3]> = inputs.x[seq]
        .chunks_exact(case.n_in)
        .enumerate()
        .map(|(p, x)| {
            let n = reference::rms_norm(&widen(x), &inputs.norm, EPS);
            std::array::from_fn(|i| {
                let bias = case.bias.then_some(inputs.biases[i].as_slice());
                let mut y = reference::values(&reference::linear(&projections[i].values, bias, &n));
                for head in y.chunks_exact_mut(head_dim).filter(|_| i < 2) {
                    if case.qk_norm {
                        head.copy_from_slice(&reference::rms_norm(head, &inputs.head_norms[i], EPS));
                    }
                    reference::rotate(head, &angles[p], case.pairing);
                }
                y
            })
        })
        .collect();
    let mut expected = Vec::new();
    for (p, [q, _, _]) in projected.iter().enumerate() {
        for (h, q) in q.chunks_exact(head_dim).enumerate() {
            let kv_head = h / (n_heads / n_kv_heads);
            let first = case.window.map_or(0, |w| (p + 1).saturating_sub(w));
            let part = |i: usize| -> Vec<&[f64]> {
                projected[first..=p].iter().map(|t| &t[i][kv_head * head_dim..][..head_dim]).collect()
            };
            let scale = 1.0 / (head_dim as f32).sqrt();
            let sink = case.sinks.then_some(inputs.sinks[h]);
            let values = part(2);
            let mut out = reference::attend(q, &part(1), &values, scale, case.softcap, sink);
            // An error of the scores moves weight between values: measure by the largest of the row, and by the query.
            let largest = out.iter().map(|o| o.1).fold(0.0, f64::max);
            let query: f64 = 1.0 + q.iter().map(|q| q.abs()).sum::<f64>();
            out.iter_mut().for_each(|o| o.1 = largest * query);
            expected.extend(out);
        }
    }
    expected
}

struct Experts<W> {
    router: Held<W>,
    gate: Held<W>,
    up: Held<W>,
    down: Held<W>,
}

fn moe<B: Backend>(device: &mut Device<B>) {
    let shapes = [
        (DType::F32, 1, 1, 3, 5, 2),
        (DType::F32, 4, 2, 17, 31, 1),
        (DType::F32, 8, 8, 33, 16, 3),
        (DType::MXFP4, 32, 4, 64, 96, 1),
        (DType::MXFP4, 5, 2, 32, 64, 33),
        (DType::Q4_K, 3, 1, 256, 256, 7),
        (DType::Q8_0, 6, 2, 64, 64, 90),
    ];
    for (join, (dtype, n_experts, n_used, n_in, n_ff, n_tokens)) in
        [None, Some(Join::Gated)].into_iter().flat_map(|join| shapes.map(|shape| (join, shape)))
    {
        let mut random = Random((n_experts * 100 + n_used) as u64);
        let scale = 1.0 / (n_in as f32).sqrt();
        let router = device.matrices(&mut random, DType::F32, (1, n_experts, n_in), 1.0);
        let mut both = device.group(&mut random, dtype, &[(n_experts, n_ff, n_in); 2], scale.max(0.25), join);
        let (up, gate) = (both.pop().expect("two"), both.pop().expect("two"));
        let experts = Experts {
            router,
            gate,
            up,
            down: device.matrices(&mut random, dtype, (n_experts, n_in, n_ff), scale.max(0.25)),
        };
        let x = random.f32s(n_tokens * n_in, 1.0);
        let vectors =
            [n_in, n_experts, n_experts * n_ff, n_experts * n_ff, n_experts * n_in].map(|n| random.f32s(n, 1.0));
        check_moe(device, &experts, &vectors, &x, (n_experts, n_used, n_ff));
    }
}

fn moe_ties<B: Backend>(device: &mut Device<B>) {
    let (n_experts, n_in, n_ff) = (6, 8, 4);
    let mut random = Random(77);
    let zeros = vec![0.0; n_experts * n_in];
    let experts = Experts {
        // Every expert scores zero plus its bias: the biases below tie 1, 2, 4 and 5.
        router: Held { weight: device.matrix_of(&zeros, n_experts), values: zeros },
        gate: device.matrices(&mut random, DType::F32, (n_experts, n_ff, n_in), 0.5),
        up: device.matrices(&mut random, DType::F32, (n_experts, n_ff, n_in), 0.5),
        down: device.matrices(&mut random, DType::F32, (n_experts, n_in, n_ff), 0.5),
    };
    let vectors = [
        vec![1.0; n_in],
        vec![0.0, 1.0, 1.0, 0.5, 1.0, 1.0],
        vec![0.0; n_experts * n_ff],
        vec![0.0; n_experts * n_ff],
        random.f32s(n_experts * n_in, 1.0),
    ];
    let x = random.f32s(3 * n_in, 1.0);
    check_moe(device, &experts, &vectors, &x, (n_experts, 2, n_ff));
}

fn check_moe<B: Backend>(
    device: &mut Device<B>,
    experts: &Experts<B::Weight>,
    vectors: &[Vec<f32>; 5],
    x: &[f32],
    (n_experts, n_used, n_ff): (usize, usize, usize),
) {
    let [norm, router_bias, gate_bias, up_bias, down_bias] = vectors;
    let n_in = norm.len();
    let n_tokens = x.len() / n_in;
    let activation = Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 };
    let norm_weight = device.vector(norm);
    let router_weight = device.vector(router_bias);
    let biases = [gate_bias, up_bias, down_bias].map(|b| device.matrix_of(b, n_experts));
    let op = MoeOp {
        norm: Norm { weight: &norm_weight, eps: EPS },
        router: Linear { weight: &experts.router.weight, bias: Some(&router_weight) },
        gate: Linear { weight: &experts.gate.weight, bias: Some(&biases[0]) },
        up: Linear { weight: &experts.up.weight, bias: Some(&biases[1]) },
        down: Linear { weight: &experts.down.weight, bias: Some(&biases[2]) },
        n_experts,
        n_used,
        weighting: MoeWeighting::SoftmaxOfChosen,
        activation,
    };
    let mut tensor = device.tensor_of(x, n_tokens);
    device.backend.moe(&op, &mut tensor);
    let found = device.read(&tensor, x.len());
    let mut expected: Vec<Value> = Vec::new();
    for x in x.chunks_exact(n_in) {
        let n = reference::rms_norm(&widen(x), norm, EPS);
        let scores = reference::values(&reference::linear(&experts.router.values, Some(router_bias), &n));
        let mut sum: Vec<Value> = x.iter().map(|x| (f64::from(*x), f64::from(x.abs()))).collect();
        for (e, weight) in reference::route(&scores, n_used) {
            let part = |held: &Held<B::Weight>| held.values[e * n_ff * n_in..][..n_ff * n_in].to_vec();
            let g = reference::linear(&part(&experts.gate), Some(&gate_bias[e * n_ff..][..n_ff]), &n);
            let u = reference::linear(&part(&experts.up), Some(&up_bias[e * n_ff..][..n_ff]), &n);
            let h: Vec<f64> = g.iter().zip(&u).map(|(g, u)| reference::activate(activation, g.0, u.0)).collect();
            let growth = g.iter().zip(&u).map(|(g, u)| 1.0 + g.1 + u.1).fold(0.0, f64::max);
            let y = reference::linear(&part(&experts.down), Some(&down_bias[e * n_in..][..n_in]), &h);
            for (sum, y) in sum.iter_mut().zip(y) {
                *sum = (sum.0 + weight * y.0, sum.1 + weight * y.1 * growth);
            }
        }
        expected.extend(sum);
    }
    device.assert_close(&format!("moe {n_used} of {n_experts}, {n_tokens} tokens"), &found, &expected, 4.0);
}

fn head<B: Backend>(device: &mut Device<B>) {
    for (n_vocab, n_in, n_tokens) in [(1, 1, 1), (127, 33, 5), (300, 64, 17)] {
        for softcap in [None, Some(3.0)] {
            let mut random = Random(n_vocab as u64);
            let x = random.f32s(n_tokens * n_in, 1.0);
            let (norm, bias) = (random.f32s(n_in, 1.0), random.f32s(n_vocab, 1.0));
            let output = device.matrices(&mut random, DType::F32, (1, n_vocab, n_in), 1.0);
            let (norm_weight, bias_weight) = (device.vector(&norm), device.vector(&bias));
            let op = HeadOp {
                norm: Norm { weight: &norm_weight, eps: EPS },
                output: Linear { weight: &output.weight, bias: Some(&bias_weight) },
                softcap,
            };
            let tensor = device.tensor_of(&x, n_tokens);
            let mut batch = plain_batch(n_tokens);
            batch.logit_rows = (0..n_tokens as u32).step_by(2).collect();
            let n_rows = batch.logit_rows.len();
            device.backend.begin(&batch).unwrap();
            let mut logits = device.backend.tensor(n_rows, n_vocab).unwrap();
            device.backend.head(&op, &tensor, &mut logits);
            let found = device.read(&logits, n_rows * n_vocab);
            let mut expected = Vec::new();
            for row in &batch.logit_rows {
                let x = widen(&x[*row as usize * n_in..][..n_in]);
                let y = reference::linear(&output.values, Some(&bias), &reference::rms_norm(&x, &norm, EPS));
                let cap = |y: f64| softcap.map_or(y, |c| f64::from(c) * (y / f64::from(c)).tanh());
                expected.extend(y.iter().map(|y| (cap(y.0), y.1)));
            }
            device.assert_close(&format!("head {n_vocab} x {n_in}"), &found, &expected, 2.0);
        }
    }
}
