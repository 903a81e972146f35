//! Attention of new tokens with rotation and merge in one kernel, against the launches that it stands for, bit for bit; those are held
//! against f64 elsewhere.

mod support;

use half::f16;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::attention::{
    Attention, BLOCK_TOKENS, DECODE_ROWS, DecodeItems, Heads, Item, KvFormat, KvLayer, NO_SLOT, RopeKv, SPLIT,
    decode_partial_len, rope_kv, rows_of_one_token,
};
use playhouse_cuda::launch::matrix::HalfRows;
use support::kv::head_rows;
use support::{Bench, Random, bench, download};

fn floats(bench: &Bench, random: &mut Random, n: usize) -> Buffer<f32> {
    bench.upload(&(0..n).map(|_| random.normal()).collect::<Vec<_>>())
}

/// What of an attention layer varies beside the heads.
#[derive(Debug, Clone, Copy)]
struct Style {
    window: Option<usize>,
    sinks: bool,
    softcap: Option<f32>,
    n_rot: usize,
    interleaved: bool,
    norm: bool,
}

/// A step of one new token for each sequence, of which so many tokens are cached.
struct Scene {
    heads: Heads,
    cached: Vec<usize>,
    qkv: Buffer<f32>,
    stride: usize,
    table: Buffer<f32>,
    norms: [Buffer<f32>; 2],
    sinks: Buffer<f32>,
    tables: Buffer<u32>,
    positions: Buffer<u32>,
    slots: Buffer<u32>,
    items: Vec<i32>,
    k: Vec<u8>,
    v: Vec<u8>,
}

impl Scene {
    fn new(
        bench: &Bench,
        random: &mut Random,
        heads: Heads,
        format: KvFormat,
        n_rot: usize,
        cached: &[usize],
    ) -> Scene {
        let Heads { n_heads, n_kv_heads, head_dim } = heads;
        let n_blocks: usize = cached.iter().map(|n| n / BLOCK_TOKENS + 1).sum();
        let mut blocks: Vec<u32> = (0..n_blocks as u32).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, random.next() as usize % (i + 1));
        }
        let (mut tables, mut items, mut slots) = (Vec::new(), Vec::new(), Vec::new());
        for (i, n) in cached.iter().enumerate() {
            items.extend(Item::cut(i, 1, tables.len(), heads, DECODE_ROWS).flat_map(Item::words));
            tables.extend(blocks.drain(..n / BLOCK_TOKENS + 1));
            slots.push(tables[tables.len() - 1] * BLOCK_TOKENS as u32 + (n % BLOCK_TOKENS) as u32);
        }
        // A slot of the batch without a sequence.
        items.extend([0; 4]);
        slots.push(NO_SLOT);
        let mut positions: Vec<u32> = cached.iter().map(|n| *n as u32).collect();
        positions.push(0);
        let n = cached.len() + 1;
        let mut side = || {
            let rows: Vec<f32> =
                (0..n_blocks * n_kv_heads * BLOCK_TOKENS * head_dim).map(|_| random.normal()).collect();
            head_rows(format, &rows, head_dim)
        };
        let (k, v) = (side(), side());
        let stride = (n_heads + 2 * n_kv_heads) * head_dim;
        let n_ctx = cached.iter().max().expect("there are sequences") + 1;
        Scene {
            heads,
            cached: cached.to_vec(),
            qkv: floats(bench, random, n * stride),
            stride,
            table: floats(bench, random, n_ctx * n_rot),
            norms: [0; 2].map(|_| floats(bench, random, head_dim)),
            sinks: floats(bench, random, n_heads),
            tables: bench.upload(&tables),
            positions: bench.upload(&positions),
            slots: bench.upload(&slots),
            items,
            k,
            v,
        }
    }

    /// Output, keys and values after the step.
    fn run(&self, bench: &Bench, format: KvFormat, style: Style, one_kernel: bool) -> (Vec<u16>, Vec<u8>, Vec<u8>) {
        let Heads { n_heads, n_kv_heads, head_dim } = self.heads;
        let (n, width) = (self.cached.len() + 1, n_heads * head_dim);
        let kv = KvLayer { format, k: bench.upload(&self.k), v: bench.upload(&self.v) };
        let q: Buffer<f16> = bench.upload(&vec![f16::NAN; n * width]);
        let out = HalfRows { data: bench.zeros(n * width), stride: width };
        let rope = RopeKv {
            heads: self.heads,
            qkv: &self.qkv,
            stride: self.stride,
            k_first: width,
            v_first: width + n_kv_heads * head_dim,
            table: &self.table,
            n_rot: style.n_rot,
            interleaved: style.interleaved,
            norm: style.norm.then_some((&self.norms[0], &self.norms[1], 1e-6)),
            positions: &self.positions,
            slots: &self.slots,
            q_out: &q,
            kv: &kv,
        };
        let attention = Attention {
            heads: self.heads,
            q: &q,
            kv: &kv,
            out: &out,
            sinks: style.sinks.then_some(&self.sinks),
            tables: &self.tables,
            positions: &self.positions,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: style.softcap,
            window: style.window,
        };
        let (rows, n_items) = (rows_of_one_token(self.heads), self.items.len() / 4);
        let max_splits = self.cached.iter().map(|n| n / SPLIT + 1).max().expect("there are sequences") + 1;
        let partial = bench.upload(&vec![f32::NAN; decode_partial_len(self.heads, n_items, rows, max_splits)]);
        let items = DecodeItems { items: &bench.upload(&self.items), n_items, rows, max_splits };
        if one_kernel {
            let tickets = bench.zeros::<u32>(n_items * n_kv_heads);
            // Twice: the tickets must be as new, and what the first has written changes nothing.
            for _ in 0..2 {
                attention.decode_step(&bench.kernels, (&rope, n), &items, &partial, &tickets).expect("launches");
            }
            assert!(download(&tickets).iter().all(|ticket| *ticket == 0));
        } else {
            rope_kv(&bench.kernels, &rope, n).expect("launches");
            attention.decode(&bench.kernels, &items, &partial).expect("launches");
        }
        (download(&out.data).iter().map(|v| v.to_bits()).collect(), download(&kv.k), download(&kv.v))
    }
}

#[test]
fn one_kernel_has_the_bits_of_three() {
    let Some(bench) = bench("one_kernel_has_the_bits_of_three") else { return };
    let mut random = Random(22);
    let plain = Style { window: None, sinks: false, softcap: None, n_rot: 16, interleaved: false, norm: false };
    let styles = [
        plain,
        Style { window: Some(100), sinks: true, norm: true, ..plain },
        Style { window: Some(1), interleaved: true, ..plain },
        Style { softcap: Some(4.0), sinks: true, interleaved: true, norm: true, ..plain },
        Style { window: Some(128), sinks: true, softcap: Some(30.0), ..plain },
    ];
    let sizes = [(14, 2, 64), (4, 4, 96), (8, 2, 128), (16, 2, 64), (2, 2, 16), (3, 1, 32), (20, 1, 128), (32, 32, 96)];
    for (case, (n_heads, n_kv_heads, head_dim)) in sizes.into_iter().enumerate() {
        for format in [KvFormat::F16, KvFormat::Q8_0] {
            let heads = Heads { n_heads, n_kv_heads, head_dim };
            for cached in [&[0][..], &[31, 32, 63, 64], &[127, 128, 129, 300, 1, 1500, 511]] {
                bench.arena.reset();
                for style in [plain, styles[1 + case % 4], styles[1 + (case + 1) % 4]] {
                    let style = Style { n_rot: if case % 2 == 0 { head_dim } else { head_dim / 2 }, ..style };
                    let scene = Scene::new(&bench, &mut random, heads, format, style.n_rot, cached);
                    let launches = scene.run(&bench, format, style, false);
                    let one = scene.run(&bench, format, style, true);
                    let same_cache = launches.1 == one.1 && launches.2 == one.2;
                    assert!(same_cache, "cache: {heads:?} {format:?} {style:?} {cached:?}");
                    assert!(launches.0 == one.0, "{heads:?} {format:?} {style:?} {cached:?}");
                }
            }
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let mut random = Random(23);
    let wrong = |error: Result<(), playhouse_cuda::CudaError>, expected: &str| {
        let error = error.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    let heads = Heads { n_heads: 4, n_kv_heads: 2, head_dim: 64 };
    let scene = Scene::new(&bench, &mut random, heads, KvFormat::F16, 64, &[5]);
    let kv = |format| KvLayer { format, k: bench.upload(&scene.k), v: bench.upload(&scene.v) };
    let (layer, other) = (kv(KvFormat::F16), kv(KvFormat::F16));
    let q = bench.zeros::<f16>(2 * 256);
    let out = HalfRows { data: bench.zeros(2 * 256), stride: 256 };
    let mut rope = RopeKv {
        heads,
        qkv: &scene.qkv,
        stride: scene.stride,
        k_first: 256,
        v_first: 384,
        table: &scene.table,
        n_rot: 64,
        interleaved: false,
        norm: None,
        positions: &scene.positions,
        slots: &scene.slots,
        q_out: &q,
        kv: &other,
    };
    let attention = Attention {
        heads,
        q: &q,
        kv: &layer,
        out: &out,
        sinks: None,
        tables: &scene.tables,
        positions: &scene.positions,
        scale: 1.0,
        softcap: None,
        window: None,
    };
    let items = bench.upload(&scene.items);
    let decode = |n_items: usize| DecodeItems { items: &items, n_items, rows: 2, max_splits: 1 };
    let partial = bench.zeros::<f32>(decode_partial_len(heads, 400, 2, 1));
    let tickets = bench.zeros::<u32>(4);
    let run = |rope: &RopeKv<'_>, n: usize, n_items: usize, partial: &Buffer<f32>, tickets: &Buffer<u32>| {
        attention.decode_step(&bench.kernels, (rope, n), &decode(n_items), partial, tickets)
    };
    wrong(run(&rope, 2, 2, &partial, &tickets), "one layer");
    rope.kv = &layer;
    wrong(run(&rope, 0, 2, &partial, &tickets), "qkv");
    wrong(run(&rope, 2, 3, &partial, &tickets), "items");
    wrong(run(&rope, 2, 2, &partial.slice(0..9), &tickets), "partial");
    wrong(run(&rope, 2, 2, &partial, &tickets.slice(0..3)), "tickets");
    run(&rope, 2, 2, &partial, &tickets).expect("is right");
}
