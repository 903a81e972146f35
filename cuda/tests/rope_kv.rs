//! Rotation of queries and keys, and the paged cache they and the values are written to, against f64.

mod support;

use half::f16;
use playhouse_cuda::launch::attention::{BLOCK_TOKENS, Heads, KvFormat, KvLayer, RopeKv, rope_kv};
use support::kv::encode;
use support::{Bench, Random, bench, download};

/// A layer's shape and what its rotation looks like.
#[derive(Debug, Clone, Copy)]
struct Layer {
    heads: Heads,
    n_rot: usize,
    interleaved: bool,
    norm_eps: Option<f32>,
    /// Of the table, as YaRN has it; 1 is plain RoPE.
    attention_factor: f64,
}

const N_CTX: usize = 600;
const N_BLOCKS: usize = 12;

/// `[n_ctx, n_rot]`: cosines, then sines, of angles that YaRN interpolates for the slow half of the pairs (Peng et al. 2023).
fn table(layer: Layer) -> Vec<f32> {
    let half = layer.n_rot / 2;
    let mut out = Vec::with_capacity(N_CTX * layer.n_rot);
    for position in 0..N_CTX {
        let angle = |i: usize| {
            let stretch = if i >= half / 2 && layer.attention_factor != 1.0 { 32.0 } else { 1.0 };
            position as f64 * 10_000f64.powf(-2.0 * i as f64 / layer.n_rot as f64) / stretch
        };
        out.extend((0..half).map(|i| (angle(i).cos() * layer.attention_factor) as f32));
        out.extend((0..half).map(|i| (angle(i).sin() * layer.attention_factor) as f32));
    }
    out
}

struct Step {
    layer: Layer,
    n: usize,
    stride: usize,
    k_first: usize,
    v_first: usize,
    qkv: Vec<f32>,
    table: Vec<f32>,
    norms: [Vec<f32>; 2],
    positions: Vec<u32>,
    slots: Vec<u32>,
}

impl Step {
    /// `n` tokens whose q, k and v lie apart, as the rows of a product of padded parts do.
    fn new(random: &mut Random, layer: Layer, n: usize) -> Step {
        let Heads { n_heads, n_kv_heads, head_dim } = layer.heads;
        let k_first = n_heads * head_dim + 16;
        let v_first = k_first + n_kv_heads * head_dim + 32;
        let stride = v_first + n_kv_heads * head_dim + 5;
        let mut slots: Vec<u32> = (0..(N_BLOCKS * BLOCK_TOKENS) as u32).collect();
        for i in (1..slots.len()).rev() {
            slots.swap(i, random.next() as usize % (i + 1));
        }
        slots.truncate(n);
        let positions = (0..n).map(|_| (random.next() as usize % N_CTX) as u32).collect();
        let qkv = (0..n * stride).map(|_| 3.0 * random.normal()).collect();
        let norms = [0; 2].map(|_| (0..head_dim).map(|_| 0.5 + random.unit()).collect());
        Step { layer, n, stride, k_first, v_first, qkv, table: table(layer), norms, positions, slots }
    }

    /// First element in qkv of a head: query heads, then key heads, then value heads.
    fn source(&self, token: usize, head: usize) -> usize {
        let Heads { n_heads, n_kv_heads, head_dim } = self.layer.heads;
        let part = if head < n_heads {
            head * head_dim
        } else if head < n_heads + n_kv_heads {
            self.k_first + (head - n_heads) * head_dim
        } else {
            self.v_first + (head - n_heads - n_kv_heads) * head_dim
        };
        token * self.stride + part
    }

    /// A head after the norm and the rotation in f64, with the magnitudes that errors are relative to.
    fn reference(&self, token: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
        let Heads { n_heads, n_kv_heads, head_dim } = self.layer.heads;
        let input = &self.qkv[self.source(token, head)..][..head_dim];
        let mut x: Vec<f64> = input.iter().map(|x| f64::from(*x)).collect();
        if let Some(eps) = self.layer.norm_eps.filter(|_| head < n_heads + n_kv_heads) {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
            let norm = &self.norms[usize::from(head >= n_heads)];
            x.iter_mut().zip(norm).for_each(|(x, w)| *x *= f64::from(*w) / (mean + f64::from(eps)).sqrt());
        }
        let mut size: Vec<f64> = x.iter().map(|x| x.abs()).collect();
        if head < n_heads + n_kv_heads {
            let half = self.layer.n_rot / 2;
            let row = &self.table[self.positions[token] as usize * self.layer.n_rot..][..self.layer.n_rot];
            for i in 0..half {
                let (a, b) = if self.layer.interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                let (cos, sin) = (f64::from(row[i]), f64::from(row[half + i]));
                (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
                let both = size[a] + size[b];
                (size[a], size[b]) = (both, both);
            }
        }
        (x, size)
    }
}

struct Result {
    q: Vec<f16>,
    k: Vec<u8>,
    v: Vec<u8>,
}

/// What slots hold that were not written: a NaN in f16.
const UNTOUCHED: u8 = 0x7f;

fn run(bench: &Bench, step: &Step, format: KvFormat, n: usize) -> Result {
    let Heads { n_heads, n_kv_heads, head_dim } = step.layer.heads;
    let cache = vec![UNTOUCHED; N_BLOCKS * n_kv_heads * format.head_bytes(head_dim)];
    let kv = KvLayer { format, k: bench.upload(&cache), v: bench.upload(&cache) };
    let q_out = bench.upload(&vec![f16::NAN; step.n * n_heads * head_dim]);
    let norms = [0, 1].map(|i| bench.upload(&step.norms[i]));
    let op = RopeKv {
        heads: step.layer.heads,
        qkv: &bench.upload(&step.qkv),
        stride: step.stride,
        k_first: step.k_first,
        v_first: step.v_first,
        table: &bench.upload(&step.table),
        n_rot: step.layer.n_rot,
        interleaved: step.layer.interleaved,
        norm: step.layer.norm_eps.map(|eps| (&norms[0], &norms[1], eps)),
        positions: &bench.upload(&step.positions),
        slots: &bench.upload(&step.slots),
        q_out: &q_out,
        kv: &kv,
    };
    rope_kv(&bench.kernels, &op, n).expect("launches");
    Result { q: download(&q_out), k: download(&kv.k), v: download(&kv.v) }
}

/// The cache that holds a head, and the number of the head's row in it.
fn cached<'a>(step: &Step, result: &'a Result, token: usize, head: usize) -> (&'a [u8], usize) {
    let Heads { n_heads, n_kv_heads, .. } = step.layer.heads;
    let slot = step.slots[token] as usize;
    let row = (slot / BLOCK_TOKENS * n_kv_heads + (head - n_heads) % n_kv_heads) * BLOCK_TOKENS + slot % BLOCK_TOKENS;
    (if head < n_heads + n_kv_heads { &result.k } else { &result.v }, row)
}

/// The f16 row of a head, from the queries or from the cache.
fn row(step: &Step, result: &Result, token: usize, head: usize) -> Vec<f16> {
    let Heads { n_heads, head_dim, .. } = step.layer.heads;
    if head < n_heads {
        return result.q[(token * n_heads + head) * head_dim..][..head_dim].to_vec();
    }
    let (cache, row) = cached(step, result, token, head);
    cache[row * 2 * head_dim..][..2 * head_dim].chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()
}

/// Quants and scales of a head in the 8-bit cache.
fn byte_row(step: &Step, result: &Result, token: usize, head: usize) -> (Vec<i8>, Vec<f16>) {
    let head_dim = step.layer.heads.head_dim;
    let (cache, row) = cached(step, result, token, head);
    let (groups, in_block) = (head_dim.div_ceil(32), row % BLOCK_TOKENS);
    let block = &cache[row / BLOCK_TOKENS * KvFormat::Q8_0.head_bytes(head_dim)..];
    let quants = block[in_block * 32 * groups..][..head_dim].iter().map(|q| (i16::from(*q) - 128) as i8).collect();
    let scale = |group: usize| {
        let at = BLOCK_TOKENS * 32 * groups + 2 * (group * BLOCK_TOKENS + in_block);
        f16::from_le_bytes([block[at], block[at + 1]])
    };
    (quants, (0..groups).map(scale).collect())
}

fn layers() -> Vec<Layer> {
    let heads = |n_heads, n_kv_heads, head_dim| Heads { n_heads, n_kv_heads, head_dim };
    let plain = Layer { heads: heads(14, 2, 64), n_rot: 64, interleaved: false, norm_eps: None, attention_factor: 1.0 };
    vec![
        plain,
        Layer { interleaved: true, heads: heads(4, 4, 128), n_rot: 128, ..plain },
        Layer { heads: heads(3, 3, 96), n_rot: 96, ..plain },
        Layer { heads: heads(4, 1, 96), n_rot: 40, ..plain },
        Layer { heads: heads(2, 1, 16), n_rot: 6, interleaved: true, ..plain },
        Layer { heads: heads(2, 1, 32), n_rot: 2, ..plain },
        Layer { heads: heads(8, 1, 64), attention_factor: 1.3466, ..plain },
        Layer { heads: heads(4, 2, 128), n_rot: 128, norm_eps: Some(1e-6), ..plain },
        Layer { heads: heads(4, 2, 128), n_rot: 64, norm_eps: Some(1e-5), interleaved: true, ..plain },
    ]
}

#[test]
fn rotation_norm_and_cache_agree_with_f64() {
    let Some(bench) = bench("rotation_norm_and_cache_agree_with_f64") else { return };
    let mut random = Random(21);
    for layer in layers() {
        for n in [1, 2, 3, 17, 31, 33, 127] {
            bench.arena.reset();
            let step = Step::new(&mut random, layer, n);
            let result = run(&bench, &step, KvFormat::F16, n);
            for token in 0..n {
                for head in 0..layer.heads.n_heads + 2 * layer.heads.n_kv_heads {
                    let (exact, size) = step.reference(token, head);
                    for (d, found) in row(&step, &result, token, head).iter().enumerate() {
                        // One rounding to f16 of a value that is right to about 2^-20.
                        let budget = 2f64.powi(-11) * exact[d].abs() + 2f64.powi(-20) * size[d] + 2f64.powi(-25);
                        let error = (found.to_f64() - exact[d]).abs();
                        assert!(
                            error <= budget,
                            "{layer:?}: token {token}, head {head}, element {d}: {found}, {}",
                            exact[d]
                        );
                    }
                }
            }
            let untouched = result.k.chunks(2).filter(|k| k == &[UNTOUCHED; 2]).count();
            let written = n * layer.heads.n_kv_heads * layer.heads.head_dim;
            assert_eq!(untouched + written, result.k.len() / 2, "only the slots of the tokens are written");
        }
    }
}

#[test]
fn a_token_s_bits_do_not_depend_on_its_neighbours() {
    let Some(bench) = bench("a_token_s_bits_do_not_depend_on_its_neighbours") else { return };
    let mut random = Random(22);
    let step = Step::new(&mut random, layers()[7], 127);
    let all = run(&bench, &step, KvFormat::F16, 127);
    for n in [1, 2, 33] {
        let some = run(&bench, &step, KvFormat::F16, n);
        for token in 0..n {
            for head in 0..8 {
                let bits = |result| row(&step, result, token, head).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&some), bits(&all), "token {token} of {n}");
            }
        }
    }
}

#[test]
fn a_row_without_a_slot_writes_nothing() {
    let Some(bench) = bench("a_row_without_a_slot_writes_nothing") else { return };
    let mut step = Step::new(&mut Random(26), layers()[0], 3);
    step.slots[1] = u32::MAX;
    for format in [KvFormat::F16, KvFormat::Q8_0] {
        let written = run(&bench, &step, format, 3).v.iter().filter(|byte| **byte != UNTOUCHED).count();
        let rows = 2 * 2 * format.head_bytes(64) / BLOCK_TOKENS;
        assert!(written <= rows && written > rows / 2, "{written} of {rows} bytes");
    }
}

#[test]
fn values_beyond_f16_saturate() {
    let Some(bench) = bench("values_beyond_f16_saturate") else { return };
    let mut step = Step::new(&mut Random(23), layers()[0], 1);
    let at = step.source(0, 16);
    step.qkv[at] = 1e30;
    step.qkv[at + 1] = -1e30;
    let result = run(&bench, &step, KvFormat::F16, 1);
    assert_eq!(&row(&step, &result, 0, 16)[..2], &[f16::MAX, f16::MIN]);
}

#[test]
fn the_8_bit_cache_rounds_as_the_cpu_does() {
    let Some(bench) = bench("the_8_bit_cache_rounds_as_the_cpu_does") else { return };
    let mut random = Random(25);
    for layer in layers() {
        for n in [1, 2, 3, 17, 31, 33, 127] {
            bench.arena.reset();
            let Heads { n_heads, n_kv_heads, head_dim } = layer.heads;
            let mut step = Step::new(&mut random, layer, n);
            // A row of zeros, one with ties at half a step, one of tiny numbers.
            for (head, value) in [(0, 0.0), (1, 63.5), (2, 1.0e-30)].into_iter().take(n_kv_heads) {
                let at = step.source(0, n_heads + n_kv_heads + head);
                step.qkv[at..at + head_dim].fill(value);
                step.qkv[at] *= 2.0;
            }
            let result = run(&bench, &step, KvFormat::Q8_0, n);
            let halves = run(&bench, &step, KvFormat::F16, n);
            for token in 0..n {
                for head in n_heads + n_kv_heads..n_heads + 2 * n_kv_heads {
                    let exact = encode(KvFormat::Q8_0, &step.qkv[step.source(token, head)..][..head_dim]);
                    let (quants, scales) = byte_row(&step, &result, token, head);
                    assert_eq!(
                        (quants, scales),
                        (exact.quants, exact.scales),
                        "{layer:?}: value {head} of token {token}"
                    );
                }
                for head in 0..n_heads {
                    assert_eq!(row(&step, &result, token, head), row(&step, &halves, token, head), "queries stay f16");
                }
                for head in n_heads..n_heads + n_kv_heads {
                    // The rotated key differs from f64 in the last bits of f32, so that a tie may fall either way.
                    let (exact, _) = step.reference(token, head);
                    let (quants, scales) = byte_row(&step, &result, token, head);
                    for (d, exact) in exact.iter().enumerate() {
                        let (scale, q) = (scales[d / 32].to_f64(), f64::from(quants[d]));
                        assert!(
                            (q * scale - exact).abs() <= scale * 0.51 + exact.abs() * 2f64.powi(-10),
                            "{q} x {scale}, {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let step = Step::new(&mut Random(24), layers()[0], 3);
    let Heads { n_heads, n_kv_heads, head_dim } = step.layer.heads;
    let format = KvFormat::F16;
    let cache = bench.zeros::<u8>(N_BLOCKS * n_kv_heads * format.head_bytes(head_dim));
    let kv = KvLayer { format, k: cache.clone(), v: cache };
    let bytes = KvLayer { format: KvFormat::Q8_0, ..kv.clone() };
    let qkv = bench.upload(&step.qkv);
    let table = bench.upload(&step.table);
    let (positions, slots) = (bench.upload(&step.positions), bench.upload(&step.slots));
    let q_out = bench.zeros::<f16>(3 * n_heads * head_dim);
    let (short_q, short_norm) = (q_out.slice(0..100), bench.zeros::<f32>(63));
    let good = RopeKv {
        heads: step.layer.heads,
        qkv: &qkv,
        stride: step.stride,
        k_first: step.k_first,
        v_first: step.v_first,
        table: &table,
        n_rot: 64,
        interleaved: false,
        norm: None,
        positions: &positions,
        slots: &slots,
        q_out: &q_out,
        kv: &kv,
    };
    let check = |op: RopeKv<'_>, n: usize, expected: &str| {
        let error = rope_kv(&bench.kernels, &op, n).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    let heads = |n_kv_heads, head_dim| Heads { n_kv_heads, head_dim, ..good.heads };
    check(RopeKv { q_out: &short_q, ..good.clone() }, 3, "q_out");
    check(RopeKv { norm: Some((&short_norm, &short_norm, 1e-6)), ..good.clone() }, 3, "norm");
    check(RopeKv { kv: &bytes, ..good.clone() }, 3, "whole blocks");
    check(good.clone(), 0, "qkv");
    check(good.clone(), 4, "qkv");
    check(RopeKv { stride: step.v_first, ..good.clone() }, 3, "qkv");
    check(RopeKv { n_rot: 66, ..good.clone() }, 3, "rotation");
    check(RopeKv { n_rot: 33, ..good.clone() }, 3, "rotation");
    check(RopeKv { heads: heads(2, 48), ..good.clone() }, 3, "head size");
    check(RopeKv { heads: heads(5, 64), ..good.clone() }, 3, "whole groups");
}
