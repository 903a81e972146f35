//! Attention against f64, and against itself: the same bits from prefill and decode, alone and in company, in any chunks.

mod support;

use half::f16;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::attention::{
    Attention, BLOCK_TOKENS, DECODE_ROWS, DecodeItems, Heads, Item, KvFormat, KvLayer, PREFILL_ROWS, SPLIT,
    decode_partial_len, rows_of_one_token,
};
use playhouse_cuda::launch::matrix::HalfRows;
use support::kv::{encode, head_rows};
use support::{Bench, Random, bench, download};

/// What of an attention layer varies beside the heads.
#[derive(Debug, Clone, Copy, Default)]
struct Style {
    window: Option<usize>,
    sinks: bool,
    softcap: Option<f32>,
}

/// A sequence's tokens of a step: positions `before .. before + n`, rows from `first` on.
#[derive(Debug, Clone)]
struct Span {
    first: usize,
    before: usize,
    n: usize,
    /// Where its block table begins.
    table: usize,
}

/// Queries, cache and tables, on the host.
#[derive(Clone)]
struct Scene {
    heads: Heads,
    spans: Vec<Span>,
    tables: Vec<u32>,
    positions: Vec<u32>,
    q: Vec<f16>,
    /// `[block][kv head][32 tokens][head_dim]`: what the cache holds, decoded.
    k: Vec<f32>,
    v: Vec<f32>,
    format: KvFormat,
    sinks: Vec<f32>,
}

impl Scene {
    /// Sequences given as (tokens before, tokens of the step), their blocks dealt out of order. Slots without a token are NaN.
    fn new(random: &mut Random, heads: Heads, format: KvFormat, sequences: &[(usize, usize)]) -> Scene {
        let n_blocks: usize = sequences.iter().map(|(before, n)| (before + n).div_ceil(BLOCK_TOKENS)).sum();
        let mut blocks: Vec<u32> = (0..n_blocks as u32 + 2).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.next() as usize % (i + 1));
        }
        let width = heads.n_heads * heads.head_dim;
        let cache_len = blocks.len() * heads.n_kv_heads * BLOCK_TOKENS * heads.head_dim;
        let (mut spans, mut tables, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for &(before, n) in sequences {
            spans.push(Span { first: positions.len(), before, n, table: tables.len() });
            positions.extend((before..before + n).map(|p| p as u32));
            tables.extend(blocks.drain(..(before + n).div_ceil(BLOCK_TOKENS)));
        }
        let mut normal = |len: usize| (0..len).map(|_| f16::from_f32(random.normal())).collect::<Vec<_>>();
        let q = normal(positions.len() * width);
        let [k, v] = [normal(cache_len), normal(cache_len)].map(|x| {
            let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
            // What the cache holds once it is written.
            x.chunks(heads.head_dim).flat_map(|row| encode(format, row).decoded).collect::<Vec<f32>>()
        });
        let sinks = (0..heads.n_heads).map(|h| 0.5 * (h % 5) as f32 - 1.0).collect();
        let mut scene = Scene { heads, spans, tables, positions, q, k, v, format, sinks };
        scene.forget_from(None);
        scene
    }

    /// Element of the cache of position `p` of a span.
    fn at(&self, span: &Span, p: usize, kv_head: usize) -> usize {
        let block = self.tables[span.table + p / BLOCK_TOKENS] as usize;
        ((block * self.heads.n_kv_heads + kv_head) * BLOCK_TOKENS + p % BLOCK_TOKENS) * self.heads.head_dim
    }

    /// Makes every slot of the cache NaN that holds no position below the limit, which is each span's end by default.
    fn forget_from(&mut self, limit: Option<usize>) {
        let mut keep = vec![false; self.k.len()];
        for span in &self.spans {
            for p in 0..(span.before + span.n).min(limit.unwrap_or(usize::MAX)) {
                for kv_head in 0..self.heads.n_kv_heads {
                    keep[self.at(span, p, kv_head)..][..self.heads.head_dim].fill(true);
                }
            }
        }
        for (i, keep) in keep.into_iter().enumerate() {
            if !keep {
                (self.k[i], self.v[i]) = (f32::NAN, f32::NAN);
            }
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    /// One head of one token in f64: the output, and the weighted magnitudes that errors are relative to.
    fn reference(&self, style: Style, span: &Span, i: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
        let Heads { n_heads, n_kv_heads, head_dim } = self.heads;
        let (kv_head, own) = (head / (n_heads / n_kv_heads), span.before + i);
        let seen = style.window.map_or(0, |w| (own + 1).saturating_sub(w))..own + 1;
        let q = &self.q[((span.first + i) * n_heads + head) * head_dim..][..head_dim];
        let logit = |p: usize| {
            let k = &self.k[self.at(span, p, kv_head)..][..head_dim];
            let dot: f64 = q.iter().zip(k).map(|(q, k)| q.to_f64() * f64::from(*k)).sum();
            let logit = dot * f64::from(self.scale());
            style.softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
        };
        let logits: Vec<f64> = seen.clone().map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
        let sink = if style.sinks { (f64::from(self.sinks[head]) - max).exp() } else { 0.0 };
        let total = weights.iter().sum::<f64>() + sink;
        let (mut out, mut size) = (vec![0.0; head_dim], vec![0.0; head_dim]);
        for (p, weight) in seen.zip(weights) {
            let v = &self.v[self.at(span, p, kv_head)..][..head_dim];
            for d in 0..head_dim {
                out[d] += weight / total * f64::from(v[d]);
                size[d] += weight / total * f64::from(v[d]).abs();
            }
        }
        (out, size)
    }
}

/// A scene in device memory.
struct Loaded {
    q: Buffer<f16>,
    kv: KvLayer,
    tables: Buffer<u32>,
    positions: Buffer<u32>,
    sinks: Buffer<f32>,
}

impl Loaded {
    fn new(bench: &Bench, scene: &Scene) -> Loaded {
        Loaded {
            q: bench.upload(&scene.q),
            kv: KvLayer {
                format: scene.format,
                k: bench.upload(&head_rows(scene.format, &scene.k, scene.heads.head_dim)),
                v: bench.upload(&head_rows(scene.format, &scene.v, scene.heads.head_dim)),
            },
            tables: bench.upload(&scene.tables),
            positions: bench.upload(&scene.positions),
            sinks: bench.upload(&scene.sinks),
        }
    }

    fn op<'a>(&'a self, scene: &Scene, style: Style, out: &'a HalfRows) -> Attention<'a> {
        Attention {
            heads: scene.heads,
            q: &self.q,
            kv: &self.kv,
            out,
            sinks: style.sinks.then_some(&self.sinks),
            tables: &self.tables,
            positions: &self.positions,
            scale: scene.scale(),
            softcap: style.softcap,
            window: style.window,
        }
    }
}

fn out_rows(bench: &Bench, scene: &Scene) -> HalfRows {
    let width = scene.heads.n_heads * scene.heads.head_dim;
    let stride = width.next_multiple_of(64);
    HalfRows { data: bench.upload(&vec![f16::NAN; scene.positions.len() * stride]), stride }
}

fn upload_items(bench: &Bench, items: &[Item]) -> Buffer<i32> {
    bench.upload(&items.iter().flat_map(|i| i.words()).collect::<Vec<_>>())
}

/// Items of whole spans for prefill.
fn prefill_items(scene: &Scene) -> Vec<Item> {
    let cut = |s: &Span| Item::cut(s.first, s.n, s.table, scene.heads, PREFILL_ROWS);
    scene.spans.iter().flat_map(cut).collect()
}

/// Items for decoding, and the most rows that one has.
struct Cut {
    items: Vec<Item>,
    rows: usize,
}

/// Every token as a span of its own, as decoding sees it.
fn one_by_one(scene: &Scene) -> Cut {
    let cut = |t: usize, s: &Span| Item::cut(t, 1, s.table, scene.heads, DECODE_ROWS).collect::<Vec<_>>();
    let items = scene.spans.iter().flat_map(|s| (s.first..s.first + s.n).flat_map(move |t| cut(t, s))).collect();
    Cut { items, rows: rows_of_one_token(scene.heads) }
}

/// Whole spans in items of 16 rows, as for a few tokens each.
fn sixteen_rows(scene: &Scene) -> Cut {
    let cut = |s: &Span| Item::cut(s.first, s.n, s.table, scene.heads, DECODE_ROWS);
    Cut { items: scene.spans.iter().flat_map(cut).collect(), rows: DECODE_ROWS }
}

fn prefill(bench: &Bench, scene: &Scene, loaded: &Loaded, style: Style, items: &[Item]) -> Vec<f16> {
    let out = out_rows(bench, scene);
    let op = loaded.op(scene, style, &out);
    op.prefill(&bench.kernels, &upload_items(bench, items), items.len()).expect("launches");
    download(&out.data)
}

fn decode(bench: &Bench, scene: &Scene, loaded: &Loaded, style: Style, cut: &Cut, max_splits: usize) -> Vec<f16> {
    let out = out_rows(bench, scene);
    let n_items = cut.items.len();
    // What a captured graph leaves behind: partial sums of another step must not matter.
    let partial = bench.upload(&vec![f32::NAN; decode_partial_len(scene.heads, n_items, cut.rows, max_splits)]);
    let op = loaded.op(scene, style, &out);
    let items = DecodeItems { items: &upload_items(bench, &cut.items), n_items, rows: cut.rows, max_splits };
    op.decode(&bench.kernels, &items, &partial).expect("launches");
    download(&out.data)
}

fn n_splits(scene: &Scene) -> usize {
    scene.spans.iter().map(|s| (s.before + s.n).div_ceil(SPLIT)).max().expect("there are sequences")
}

/// Splits of a grid so large that each of its blocks has one stage, whatever the head size: 32 blocks a multiprocessor are the most.
fn many_splits(bench: &Bench, scene: &Scene, cut: &Cut) -> usize {
    2 * 32 * bench.gpu.info().n_sms as usize / (cut.items.len() * scene.heads.n_kv_heads) + 1
}

/// Bits of the rows of some tokens, padding left out.
fn row_bits(scene: &Scene, out: &[f16], tokens: std::ops::Range<usize>) -> Vec<u16> {
    let width = scene.heads.n_heads * scene.heads.head_dim;
    let stride = out.len() / scene.positions.len();
    tokens.flat_map(|t| out[t * stride..][..width].iter().map(|v| v.to_bits())).collect()
}

fn assert_close(scene: &Scene, style: Style, out: &[f16], what: &str) {
    let Heads { n_heads, head_dim, .. } = scene.heads;
    let stride = out.len() / scene.positions.len();
    for span in &scene.spans {
        for i in (0..span.n).filter(|i| i % 11 == 0 || i + 2 > span.n) {
            for head in 0..n_heads {
                let (exact, size) = scene.reference(style, span, i, head);
                let found = &out[(span.first + i) * stride + head * head_dim..][..head_dim];
                for d in 0..head_dim {
                    // Weights, output and values of 8 bits are rounded to f16; weights below 2^-24 of the largest may vanish.
                    let (error, budget) = ((found[d].to_f64() - exact[d]).abs(), 2f64.powi(-9) * size[d] + 1e-5);
                    let at = span.before + i;
                    assert!(
                        error <= budget,
                        "{what} {style:?} {:?} {:?}: position {at}, head {head}, element {d}: {} is not {} +- {budget}",
                        scene.heads,
                        scene.format,
                        found[d],
                        exact[d]
                    );
                }
            }
        }
    }
}

const FORMATS: [KvFormat; 2] = [KvFormat::F16, KvFormat::Q8_0];
const SIZES: &[(usize, usize, usize)] =
    &[(14, 2, 64), (4, 4, 96), (8, 2, 128), (8, 1, 64), (16, 2, 64), (2, 2, 16), (3, 1, 32), (20, 1, 128)];

#[test]
fn prefill_and_decode_agree_with_f64_and_with_each_other() {
    let Some(bench) = bench("prefill_and_decode_agree_with_f64_and_with_each_other") else { return };
    let mut random = Random(11);
    let styles = [
        Style::default(),
        Style { window: Some(1), ..Style::default() },
        Style { window: Some(100), sinks: true, softcap: None },
        Style { window: Some(128), sinks: true, softcap: Some(4.0) },
        Style { window: None, sinks: false, softcap: Some(30.0) },
    ];
    for (case, (&(n_heads, n_kv_heads, head_dim), format)) in
        SIZES.iter().flat_map(|s| FORMATS.map(|f| (s, f))).enumerate()
    {
        bench.arena.reset();
        let heads = Heads { n_heads, n_kv_heads, head_dim };
        let sequences = [(0, 1), (0, 2), (31, 3), (0, 33), (130, 17), (259, 31), (0, 127), (511, 1)];
        let scene = Scene::new(&mut random, heads, format, &sequences);
        let loaded = Loaded::new(&bench, &scene);
        for style in [Style::default(), styles[1 + case % 4], styles[1 + (case + 1) % 4]] {
            let many = prefill(&bench, &scene, &loaded, style, &prefill_items(&scene));
            assert_close(&scene, style, &many, "prefill");
            let all = 0..scene.positions.len();
            // The third with a grid for longer sequences, as a captured graph has; the last with one stage a block.
            let (own, more) = (n_splits(&scene), n_splits(&scene) + 3);
            let many_blocks = many_splits(&bench, &scene, &one_by_one(&scene)).max(own);
            let cuts = [(one_by_one(&scene), own), (sixteen_rows(&scene), own), (one_by_one(&scene), more)];
            for (cut, max_splits) in cuts.into_iter().chain([(one_by_one(&scene), many_blocks)]) {
                let few = decode(&bench, &scene, &loaded, style, &cut, max_splits);
                let same = row_bits(&scene, &many, all.clone()) == row_bits(&scene, &few, all.clone());
                assert!(same, "{style:?} {heads:?}, items of {} rows", cut.rows);
            }
        }
    }
}

#[test]
fn neighbours_and_chunks_change_no_bit() {
    let Some(bench) = bench("neighbours_and_chunks_change_no_bit") else { return };
    let mut random = Random(12);
    for (head_dim, window, format) in [
        (64, None, KvFormat::F16),
        (128, Some(70), KvFormat::F16),
        (96, None, KvFormat::Q8_0),
        (64, Some(33), KvFormat::Q8_0),
    ] {
        bench.arena.reset();
        let heads = Heads { n_heads: 6, n_kv_heads: 2, head_dim };
        let style = Style { window, sinks: true, softcap: None };
        let scene = Scene::new(&mut random, heads, format, &[(0, 300), (64, 40), (5, 1)]);
        let loaded = Loaded::new(&bench, &scene);
        let together = prefill(&bench, &scene, &loaded, style, &prefill_items(&scene));
        for span in &scene.spans {
            let alone: Vec<Item> = Item::cut(span.first, span.n, span.table, heads, PREFILL_ROWS).collect();
            let alone = prefill(&bench, &scene, &loaded, style, &alone);
            let own = span.first..span.first + span.n;
            assert!(row_bits(&scene, &together, own.clone()) == row_bits(&scene, &alone, own), "alone");
        }
        // Chunks of the long sequence, last first, each with the cache as it is when the chunk runs.
        let table = scene.spans[0].table;
        for chunk in [1, 7, 64, 100, 256] {
            let mut scene = scene.clone();
            for first in (0..300).step_by(chunk).rev() {
                let n = chunk.min(300 - first);
                scene.forget_from(Some(first + n));
                bench.arena.reset();
                let loaded = Loaded::new(&bench, &scene);
                let items: Vec<Item> = Item::cut(first, n, table, heads, PREFILL_ROWS).collect();
                let out = prefill(&bench, &scene, &loaded, style, &items);
                let (found, expected) = (row_bits(&scene, &out, first..first + n), &together);
                assert!(found == row_bits(&scene, expected, first..first + n), "chunk of {chunk} at {first}");
            }
        }
    }
}

#[test]
fn an_unused_item_of_a_graph_does_nothing() {
    let Some(bench) = bench("an_unused_item_of_a_graph_does_nothing") else { return };
    let heads = Heads { n_heads: 4, n_kv_heads: 2, head_dim: 64 };
    for format in FORMATS {
        let scene = Scene::new(&mut Random(13), heads, format, &[(40, 1), (200, 1)]);
        let loaded = Loaded::new(&bench, &scene);
        let mut cut = one_by_one(&scene);
        let without = decode(&bench, &scene, &loaded, Style::default(), &cut, 2);
        cut.items.insert(1, Item { first_token: 0, first_row: 0, n_rows: 0, table: 0 });
        let with = decode(&bench, &scene, &loaded, Style::default(), &cut, 2);
        assert_eq!(row_bits(&scene, &with, 0..2), row_bits(&scene, &without, 0..2));
        let many_blocks = decode(&bench, &scene, &loaded, Style::default(), &cut, many_splits(&bench, &scene, &cut));
        assert_eq!(row_bits(&scene, &many_blocks, 0..2), row_bits(&scene, &without, 0..2), "one stage a block");
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let heads = Heads { n_heads: 4, n_kv_heads: 2, head_dim: 64 };
    let scene = Scene::new(&mut Random(14), heads, KvFormat::F16, &[(0, 5)]);
    let loaded = Loaded::new(&bench, &scene);
    let out = out_rows(&bench, &scene);
    let items = upload_items(&bench, &prefill_items(&scene));
    let check = |change: &dyn Fn(&mut Attention<'_>), n_items: usize, expected: &str| {
        let mut op = loaded.op(&scene, Style::default(), &out);
        change(&mut op);
        let error = op.prefill(&bench.kernels, &items, n_items).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&|op| op.heads.head_dim = 80, 1, "head size");
    check(&|op| op.heads.n_kv_heads = 3, 1, "whole groups");
    check(&|op| op.heads.n_kv_heads = 0, 1, "whole groups");
    check(&|_| (), 0, "items");
    check(&|_| (), 9, "items");
    let narrow = HalfRows { data: out.data.clone(), stride: 64 };
    let mut op = loaded.op(&scene, Style::default(), &out);
    op.out = &narrow;
    assert!(op.prefill(&bench.kernels, &items, 1).is_err_and(|e| e.to_string().contains("stride 64")));
    let few_sinks = bench.zeros::<f32>(3);
    let mut op = loaded.op(&scene, Style::default(), &out);
    op.sinks = Some(&few_sinks);
    assert!(op.prefill(&bench.kernels, &items, 1).is_err_and(|e| e.to_string().contains("sinks")));
    let bytes = KvLayer { format: KvFormat::Q8_0, ..loaded.kv.clone() };
    let mut op = loaded.op(&scene, Style::default(), &out);
    op.kv = &bytes;
    assert!(op.prefill(&bench.kernels, &items, 1).is_err_and(|e| e.to_string().contains("whole blocks")));
    let op = loaded.op(&scene, Style::default(), &out);
    let short = bench.zeros::<f32>(10);
    for (rows, max_splits, expected) in [(2, 1, "partial"), (0, 1, "rows"), (17, 1, "rows"), (2, 0, "splits")] {
        let items = DecodeItems { items: &items, n_items: 1, rows, max_splits };
        let error = op.decode(&bench.kernels, &items, &short).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}
