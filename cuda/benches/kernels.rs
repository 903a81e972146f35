//! Every kernel on its own: time, bytes or operations per second, and their share of the limit measured in the same run.
//!
//! `cargo bench -p playhouse-cuda --bench kernels [part of a name]`. Each line is the median of 7 replays of a graph of
//! launches over rotating copies of the data, together larger than the L2 cache; random numbers throughout. The limit of
//! bytes is a kernel that does nothing but read (`probe.cu`; it gets a little more than a copy does, which is printed beside
//! it); that of operations is `PLAYHOUSE_PEAK_TFLOPS`, by default the 797 TFLOP/s that an H200's library product reaches.

#[path = "../tests/support/mod.rs"]
mod support;

use half::f16;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::graph::Capture;
use playhouse_cuda::kernels::{Args, Launch};
use playhouse_cuda::launch::attention::{
    Attention, BLOCK_TOKENS, DECODE_ROWS, DecodeItems, Heads, Item, KvFormat, KvLayer, PREFILL_ROWS, RopeKv, SPLIT,
    decode_partial_len, rope_kv, rows_of_one_token,
};
use playhouse_cuda::launch::matmul::{Experts, NormInput, Output, Product, Rows};
use playhouse_cuda::launch::matrix::{Format, HalfRows, Layout, Matrix, Part};
use playhouse_cuda::launch::moe::Choices;
use playhouse_cuda::launch::norm::{RmsNorm, rms_norm};
use playhouse_cuda::launch::router::Router;
use playhouse_cuda::launch::sample::{Limits, Request, Sampler, pack};
use playhouse_cuda::loader::{LoadError, Loader, LoaderSizes, Piece, Source};
use playhouse_cuda::stream::Event;
use std::time::Instant;
use support::formats::random_rows;
use support::{Bench, Random, bench};

/// Bytes that a measurement's rotating copies have together: several times the L2 cache.
const ROTATION: usize = 384 << 20;
const REPLAYS: usize = 7;

/// What a launch moves or computes.
#[derive(Clone, Copy)]
enum Work {
    Bytes(f64),
    Flops(f64),
}

struct Ceilings {
    bytes_per_second: f64,
    flops_per_second: f64,
}

struct Runner {
    bench: Bench,
    ceilings: Ceilings,
    filter: Option<String>,
    random: Random,
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let Some(bench) = bench("the kernel bench") else { return };
    let peak = std::env::var("PLAYHOUSE_PEAK_TFLOPS").ok().and_then(|v| v.parse().ok()).unwrap_or(797.0);
    let (read, copied) = bandwidth(&bench);
    let ceilings = Ceilings { bytes_per_second: read, flops_per_second: peak * 1e12 };
    println!(
        "{}: memory {:.2} TB/s read, {:.2} TB/s read and written by a copy, products {peak:.0} TFLOP/s",
        bench.gpu.info().name,
        read / 1e12,
        copied / 1e12
    );
    println!("{:<48} {:>10} {:>14} {:>8}", "kernel", "us", "", "limit");
    let mut runner = Runner { bench, ceilings, filter, random: Random(1) };
    runner.norms();
    runner.rotations();
    runner.samplers();
    runner.attention_decode();
    runner.attention_prefill();
    runner.products();
    runner.mixtures();
    runner.loading();
}

/// Bytes per second of a kernel that reads 7 GiB of random numbers and does nothing else, and of a copy, read and written. Of what
/// is read the cache can keep less than one part in a hundred for the next launch.
fn bandwidth(bench: &Bench) -> (f64, f64) {
    let n = 7_usize << 30;
    let mut random = Random(7);
    let block: Vec<u64> = (0..1 << 20).map(|_| random.next()).collect();
    let x = bench.arena.alloc::<u64>(n / 8, "bench data").expect("the arena is large enough");
    for first in (0..n / 8).step_by(block.len()) {
        x.slice(first..first + block.len()).write(&block).expect("a copy to the device");
    }
    let sink = bench.zeros::<u64>(2);
    let kernel = bench.kernels.get("probe", "probe_read", 0).expect("a kernel");
    let seconds = median_seconds(bench, 4, |_| {
        let args = Args::new().with(sink.ptr()).with(x.ptr()).with((n / 16) as u64);
        let blocks = 8 * bench.gpu.info().n_sms;
        // SAFETY: the arguments are the kernel's parameters in order; x has `n` bytes, the sink 16.
        unsafe { kernel.launch(&bench.gpu, Launch::new((blocks, 1, 1), (256, 1, 1)), args) }
    });
    let half = n / 16;
    let (from, to) = (x.slice(0..half), x.slice(half..2 * half));
    // Not in a graph, which would leave it to a copy engine that is slower than the multiprocessors.
    let copy = || {
        let (begin, end) = (Event::timed(&bench.gpu)?, Event::timed(&bench.gpu)?);
        to.copy_from(&from)?;
        begin.record(None)?;
        (0..4).try_for_each(|_| to.copy_from(&from))?;
        end.record(None)?;
        end.synchronize()?;
        Ok::<f64, CudaError>(f64::from(end.since(&begin)?) / 4e3)
    };
    let copied = copy();
    bench.arena.reset();
    (n as f64 / seconds.expect("a launch"), n as f64 / copied.expect("a copy"))
}

/// Median seconds of one of `n` launches in a graph.
fn median_seconds(
    bench: &Bench,
    n: usize,
    mut launch: impl FnMut(usize) -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    for i in 0..n {
        launch(i)?; // loads the kernel, and fails here rather than in a capture
    }
    let capture = Capture::begin(&bench.gpu)?;
    (0..n).try_for_each(&mut launch)?;
    let graph = capture.finish()?;
    let (begin, end) = (Event::timed(&bench.gpu)?, Event::timed(&bench.gpu)?);
    graph.launch()?;
    let replay = |_| {
        begin.record(None)?;
        graph.launch()?;
        end.record(None)?;
        end.synchronize()?;
        Ok(f64::from(end.since(&begin)?) / 1e3 / n as f64)
    };
    let mut seconds = (0..REPLAYS).map(replay).collect::<Result<Vec<f64>, CudaError>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[REPLAYS / 2])
}

impl Runner {
    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|part| name.contains(part.as_str()))
    }

    /// Measures and prints a line. `copies` launches rotate over as many copies of the data.
    fn line(&self, name: &str, work: Work, copies: usize, launch: impl FnMut(usize) -> Result<(), CudaError>) {
        let n = copies.max(16).next_multiple_of(copies);
        match median_seconds(&self.bench, n, launch) {
            Ok(seconds) => self.print(name, work, seconds),
            Err(error) => println!("{name:<48} {error}"),
        }
    }

    fn print(&self, name: &str, work: Work, seconds: f64) {
        let (rate, share) = match work {
            Work::Bytes(bytes) => {
                (format!("{:.0} GB/s", bytes / seconds / 1e9), bytes / seconds / self.ceilings.bytes_per_second)
            }
            Work::Flops(flops) => {
                (format!("{:.1} TFLOP/s", flops / seconds / 1e12), flops / seconds / self.ceilings.flops_per_second)
            }
        };
        println!("{name:<48} {:>10.2} {rate:>14} {:>7.1}%", seconds * 1e6, share * 100.0);
    }

    fn halves(&mut self, n: usize) -> Buffer<f16> {
        let block: Vec<f16> = (0..n.min(1 << 20)).map(|_| f16::from_f32(self.random.normal())).collect();
        self.repeated(&block, n)
    }

    fn floats(&mut self, n: usize, size: f32) -> Buffer<f32> {
        let block: Vec<f32> = (0..n.min(1 << 21)).map(|_| size * self.random.normal()).collect();
        self.repeated(&block, n)
    }

    /// A buffer of `n` elements that repeats a block of random ones.
    fn repeated<T: playhouse_cuda::arena::Element>(&self, block: &[T], n: usize) -> Buffer<T> {
        let buffer = self.bench.arena.alloc::<T>(n, "bench data").expect("the arena is large enough");
        for first in (0..n).step_by(block.len()) {
            let len = block.len().min(n - first);
            buffer.slice(first..first + len).write(&block[..len]).expect("a copy to the device");
        }
        buffer
    }

    fn norms(&mut self) {
        for (rows, n_cols) in [(1, 4096), (64, 4096), (512, 4096), (4096, 4096)] {
            let name = format!("rms_norm {rows} x {n_cols}");
            if !self.wants(&name) {
                continue;
            }
            self.bench.arena.reset();
            let bytes = rows * n_cols * 6;
            let copies = (ROTATION / bytes).clamp(1, 64);
            let x: Vec<Buffer<f32>> = (0..copies).map(|_| self.floats(rows * n_cols, 1.0)).collect();
            let weight = self.floats(n_cols, 1.0);
            let y = HalfRows { data: self.halves(rows * n_cols), stride: n_cols };
            self.line(&name, Work::Bytes(bytes as f64), copies, |i| {
                let op = RmsNorm { x: &x[i % copies], weight: &weight, rows: None, eps: 1e-5, y: &y };
                rms_norm(&self.bench.kernels, &op, rows)
            });
        }
    }

    fn rotations(&mut self) {
        for heads in HEADS {
            for n in [256, 4096] {
                let name = format!("rope_kv {}, {n}", shape(heads));
                if !self.wants(&name) {
                    continue;
                }
                self.bench.arena.reset();
                let Heads { n_heads, n_kv_heads, head_dim } = heads;
                let stride = (n_heads + 2 * n_kv_heads) * head_dim;
                let copies = (ROTATION / (4 * n * stride)).clamp(1, 16);
                let qkv: Vec<Buffer<f32>> = (0..copies).map(|_| self.floats(n * stride, 1.0)).collect();
                let kv = self.layer(KvFormat::F16, n * n_kv_heads * head_dim * 2);
                let table = self.floats(n * head_dim, 1.0);
                let each: Vec<u32> = (0..n as u32).collect();
                let (positions, slots) = (self.bench.upload(&each), self.bench.upload(&each));
                let q_out = self.bench.zeros::<f16>(n * n_heads * head_dim);
                self.line(&name, Work::Bytes((6 * n * stride) as f64), copies, |i| {
                    let op = RopeKv {
                        heads,
                        qkv: &qkv[i % copies],
                        stride,
                        k_first: n_heads * head_dim,
                        v_first: (n_heads + n_kv_heads) * head_dim,
                        table: &table,
                        n_rot: head_dim,
                        interleaved: false,
                        norm: None,
                        positions: &positions,
                        slots: &slots,
                        q_out: &q_out,
                        kv: &kv,
                    };
                    rope_kv(&self.bench.kernels, &op, n)
                });
            }
        }
    }

    fn samplers(&mut self) {
        let n_vocab = 151_936;
        let base = Request { temperature: 0.8, seed: 3, ..Request::greedy() };
        let cases = [
            ("greedy", Request::greedy()),
            ("greedy, 5 logprobs", Request { n_logprobs: Some(5), ..Request::greedy() }),
            ("temperature", base),
            ("min-p 0.05", Request { min_p: 0.05, ..base }),
            ("top-p 0.95", Request { top_p: 0.95, ..base }),
            ("top-k 50, top-p 0.9", Request { top_k: 50, top_p: 0.9, ..base }),
        ];
        for (what, request) in cases {
            for rows in [1, 64, 256] {
                let name = format!("sample {rows} x {n_vocab}, {what}");
                if !self.wants(&name) {
                    continue;
                }
                self.bench.arena.reset();
                let limits = Limits { n_vocab, rows, bias: 1, forbidden: 1, masks: 1, histories: 1, top: 8 };
                let sampler = Sampler::new(&self.bench.arena, limits).expect("fits");
                let packed = pack(&vec![Some(request); rows], &limits).expect("within the limits");
                sampler.inputs.rows.write(&packed.rows).expect("a copy to the device");
                let bytes = rows * n_vocab * 4;
                let copies = (ROTATION / bytes).clamp(1, 64);
                // Peaked, as a model's are: a few hundred candidates above a broad floor.
                let logits: Vec<Rows<f32>> =
                    (0..copies).map(|_| Rows { data: self.floats(rows * n_vocab, 2.5), stride: n_vocab }).collect();
                self.line(&name, Work::Bytes(bytes as f64), copies, |i| {
                    sampler.launch(&self.bench.kernels, &logits[i % copies], rows)
                });
            }
        }
    }

    fn attention_decode(&mut self) {
        for heads in HEADS {
            for format in [KvFormat::F16, KvFormat::Q8_0] {
                for (batch, context) in [(1, 1024), (1, 8192), (64, 1024), (256, 1024)] {
                    let name = format!("attention_decode {} {format:?}, {batch} x {context}", shape(heads));
                    if self.wants(&name) {
                        self.bench.arena.reset();
                        self.decode(&name, heads, format, batch, context);
                    }
                }
            }
        }
    }

    fn decode(&mut self, name: &str, heads: Heads, format: KvFormat, batch: usize, context: usize) {
        let per_sequence = context.div_ceil(BLOCK_TOKENS);
        let side = batch * per_sequence * heads.n_kv_heads * format.head_bytes(heads.head_dim);
        let copies = (ROTATION / (2 * side)).clamp(1, 64);
        if side * 2 * copies > 6 << 30 {
            return println!("{name:<48} left out: {} GiB", side >> 29);
        }
        let layers: Vec<KvLayer> = (0..copies).map(|_| self.layer(format, side)).collect();
        let tables: Vec<u32> = (0..(batch * per_sequence) as u32).collect();
        let cut = |b: usize| Item::cut(b, 1, b * per_sequence, heads, DECODE_ROWS);
        let items: Vec<i32> = (0..batch).flat_map(cut).flat_map(Item::words).collect();
        let (rows, max_splits, n_items) = (rows_of_one_token(heads), context.div_ceil(SPLIT), items.len() / 4);
        let partial = self.bench.zeros::<f32>(decode_partial_len(heads, n_items, rows, max_splits));
        let loaded = self.queries(heads, &tables, &vec![context as u32 - 1; batch]);
        let items = self.bench.upload(&items);
        let decode = DecodeItems { items: &items, n_items, rows, max_splits };
        self.line(name, Work::Bytes(2.0 * side as f64), copies, |i| {
            loaded.op(heads, &layers[i % copies]).decode(&self.bench.kernels, &decode, &partial)
        });
    }

    fn attention_prefill(&mut self) {
        for heads in HEADS {
            for format in [KvFormat::F16, KvFormat::Q8_0] {
                for n in [512, 4096] {
                    let name = format!("attention_prefill {} {format:?}, {n}", shape(heads));
                    if !self.wants(&name) {
                        continue;
                    }
                    self.bench.arena.reset();
                    let n_blocks = n / BLOCK_TOKENS;
                    let layer = self.layer(format, n_blocks * heads.n_kv_heads * format.head_bytes(heads.head_dim));
                    let tables: Vec<u32> = (0..n_blocks as u32).collect();
                    let loaded = self.queries(heads, &tables, &(0..n as u32).collect::<Vec<_>>());
                    let items: Vec<i32> = Item::cut(0, n, 0, heads, PREFILL_ROWS).flat_map(Item::words).collect();
                    let (n_items, items) = (items.len() / 4, self.bench.upload(&items));
                    let flops = 2.0 * heads.n_heads as f64 * heads.head_dim as f64 * (n * n) as f64;
                    self.line(&name, Work::Flops(flops), 1, |_| {
                        loaded.op(heads, &layer).prefill(&self.bench.kernels, &items, n_items)
                    });
                }
            }
        }
    }

    /// A layer of random keys and values; scales of 8-bit ones are random small numbers.
    fn layer(&mut self, format: KvFormat, bytes: usize) -> KvLayer {
        let mut side = || {
            let block: Vec<u8> = match format {
                KvFormat::F16 => (0..1 << 19).flat_map(|_| f16::from_f32(self.random.normal()).to_le_bytes()).collect(),
                // Bytes below 0x28 are small positive numbers when two of them are read as f16.
                KvFormat::Q8_0 => (0..1 << 20).map(|_| (self.random.next() % 40) as u8).collect(),
            };
            self.repeated(&block, bytes)
        };
        KvLayer { format, k: side(), v: side() }
    }

    fn queries(&mut self, heads: Heads, tables: &[u32], positions: &[u32]) -> Loaded {
        let width = heads.n_heads * heads.head_dim;
        let q = self.halves(positions.len() * width);
        let out = HalfRows { data: self.bench.zeros(positions.len() * width), stride: width };
        Loaded { q, out, tables: self.bench.upload(tables), positions: self.bench.upload(positions) }
    }

    fn products(&mut self) {
        for name in ["F16", "Q8_0", "Q4_K", "Q2_K", "MXFP4", "Q5_0", "Q6_K"] {
            for (n_rows, n_cols) in SHAPES {
                let format = Format::by_name(name).expect("listed");
                if format.row_bytes(n_cols).is_some() {
                    self.bench.arena.reset();
                    self.product(format, n_rows, n_cols);
                }
            }
        }
    }

    fn product(&mut self, format: Format, n_rows: usize, n_cols: usize) {
        let of = |n: usize| format!("product {} {n_rows} x {n_cols}, {n}", format.name);
        let widths: Vec<usize> = [1, 8, 64, 256, 512, 4096].into_iter().filter(|n| self.wants(&of(*n))).collect();
        let Some(most) = widths.last().copied() else { return };
        let encoded = n_rows * format.row_bytes(n_cols).expect("whole blocks");
        let copies = (ROTATION / encoded).clamp(2, 64);
        let rows = random_rows(&mut self.random, format, 64, n_cols);
        let source = self.repeated(&rows, encoded);
        let matrix = |_| {
            let part = Part { format, n_rows };
            let matrix = Matrix::new(&self.bench.arena, "w", &[part], Layout::Stacked, n_cols, 1)?;
            matrix.fill(&self.bench.kernels, 0, format, &[&source])?;
            Ok(matrix)
        };
        let matrices: Vec<Matrix> = (0..copies).map(matrix).collect::<Result<_, CudaError>>().expect("fits");
        let x = HalfRows { data: self.halves(most * n_cols), stride: n_cols };
        let y = self.bench.zeros::<f32>(most * n_rows);
        for n in widths {
            let product = |matrix| {
                let output = Output::Store(Rows { data: y.clone(), stride: n_rows });
                Product { matrix, x: &x, n, bias: None, bias_up: None, experts: Experts::One, output }
            };
            let partial = self.bench.zeros::<f32>(product(&matrices[0]).partial_len(&self.bench.kernels).max(1));
            let work = if n <= 64 {
                Work::Bytes((encoded + n * (2 * n_cols + 4 * n_rows)) as f64)
            } else {
                Work::Flops(2.0 * (n_rows * n_cols * n) as f64)
            };
            self.line(&of(n), work, copies, |i| product(&matrices[i % copies]).launch(&self.bench.kernels, &partial));
        }
    }

    /// What GPT-OSS-20B does around its experts' first product: the router as one launch and as the three that it takes the place of, and
    /// the second product with its sum.
    fn mixtures(&mut self) {
        let (n_experts, n_used, dim) = (32, 4, 2880);
        if !self.wants("moe router") && !self.wants("moe down") {
            return;
        }
        self.bench.arena.reset();
        let encoded = |format: Format, n_rows: usize| n_rows * format.row_bytes(dim).expect("whole blocks");
        let mut stack = |name, n_mats: usize, n_rows: usize| {
            let format = Format::by_name(name).expect("listed");
            let rows = random_rows(&mut self.random, format, 32, dim);
            let source = self.repeated(&rows, n_mats * encoded(format, n_rows));
            let part = Part { format, n_rows };
            let matrix = Matrix::new(&self.bench.arena, "w", &[part], Layout::Stacked, dim, n_mats)?;
            matrix.fill(&self.bench.kernels, 0, format, &[&source])?;
            Ok::<Matrix, CudaError>(matrix)
        };
        let router = stack("F32", 1, n_experts).expect("fits");
        let down = stack("MXFP4", n_experts, dim).expect("fits");
        let (x, weight) = (self.floats(8 * dim, 1.0), self.floats(dim, 1.0));
        let rows = |data| HalfRows { data, stride: dim };
        let (normed, hidden) = (rows(self.halves(8 * dim)), rows(self.halves(8 * n_used * dim)));
        let scores = self.bench.zeros::<f32>(8 * n_experts);
        // Each launch has other experts: together they are larger than the cache.
        let choices: Vec<Choices> = (0..8)
            .map(|first| {
                let experts: Vec<i32> = (0..8 * n_used as i32).map(|i| (4 * first + i) % n_experts as i32).collect();
                let weights = self.bench.upload(&vec![0.25_f32; 8 * n_used]);
                Choices { experts: self.bench.upload(&experts), weights, n_experts, n_used }
            })
            .collect();
        let routed = Choices { experts: self.bench.zeros(8 * n_used), ..choices[0].clone() };
        let (y, nothing) = (self.bench.zeros::<f32>(8 * n_used * dim), self.bench.zeros::<f32>(1));
        let (kernels, sum) = (&self.bench.kernels, Rows { data: self.bench.zeros::<f32>(8 * dim), stride: dim });
        for n in [1, 8] {
            let work = Work::Bytes((4 * n_experts * dim) as f64);
            self.line(&format!("moe router {n_experts} x {dim}, {n}, one launch"), work, 1, |_| {
                let norm = NormInput { x: &x, weight: &weight, eps: 1e-5 };
                let (scores, choices) = (&scores, &routed);
                Router { norm, matrix: &router, bias: None, normed: &normed, scores, choices }.launch(kernels, n)
            });
            self.line(&format!("moe router {n_experts} x {dim}, {n}, three"), work, 1, |_| {
                rms_norm(kernels, &RmsNorm { x: &x, weight: &weight, rows: None, eps: 1e-5, y: &normed }, n)?;
                let output = Output::Store(Rows { data: scores.clone(), stride: n_experts });
                let (matrix, experts) = (&router, Experts::One);
                let product = Product { matrix, x: &normed, n, bias: None, bias_up: None, experts, output };
                product.launch(kernels, &nothing)?;
                routed.route(kernels, &scores, n)
            });
            let work = Work::Bytes((n * n_used * encoded(Format::by_name("MXFP4").expect("listed"), dim)) as f64);
            self.line(&format!("moe down {n_used} x {dim} x {dim}, {n}"), work, 8, |i| {
                let experts = Experts::Jobs { mats: choices[i % 8].experts.clone(), per_row: 1 };
                let output = Output::Store(Rows { data: y.clone(), stride: dim });
                let (matrix, n_jobs) = (&down, n * n_used);
                let product = Product { matrix, x: &hidden, n: n_jobs, bias: None, bias_up: None, experts, output };
                product.launch(kernels, &nothing)?;
                choices[i % 8].combine(kernels, (&sum.data, &y), dim, None, n)
            });
        }
    }

    /// Weights from memory to the device: the bus is the limit, so the share is of 55 GB/s.
    fn loading(&mut self) {
        for n_readers in [1, 4, 8, 16] {
            let name = format!("load, {n_readers} readers");
            if !self.wants(&name) {
                continue;
            }
            self.bench.arena.reset();
            let bytes: Vec<u8> = self.random.next().to_le_bytes().repeat(128 << 20);
            let sizes = LoaderSizes { n_readers, ..LoaderSizes::default() };
            let mut loader = Loader::new(&self.bench.gpu, sizes).expect("fits");
            let chunk = loader.chunk_bytes();
            let piece = |at: usize| Piece {
                source: Source::Bytes(&bytes),
                offset: at as u64,
                len: chunk.min(bytes.len() - at),
            };
            let chunks: Vec<Vec<Piece<'_>>> = (0..bytes.len()).step_by(chunk).map(|at| vec![piece(at)]).collect();
            let target = self.bench.zeros::<u8>(chunk);
            let mut run = || {
                let begin = Instant::now();
                let copy = |part: &Buffer<u8>| target.slice(0..part.len()).copy_from(part);
                loader
                    .load(&chunks, |arrival| arrival.pieces.iter().try_for_each(copy).map_err(LoadError::from))
                    .expect("loads");
                self.bench.gpu.synchronize().expect("runs");
                begin.elapsed().as_secs_f64()
            };
            let mut seconds: Vec<f64> = (0..4).map(|_| run()).skip(1).collect();
            seconds.sort_by(f64::total_cmp);
            let rate = bytes.len() as f64 / seconds[1] / 1e9;
            println!("{name:<48} {:>10.0} {:>9.1} GB/s {:>7.1}%", seconds[1] * 1e6, rate, rate / 55.0 * 100.0);
        }
    }
}

/// Queries, outputs and tables of an attention step.
struct Loaded {
    q: Buffer<f16>,
    out: HalfRows,
    tables: Buffer<u32>,
    positions: Buffer<u32>,
}

impl Loaded {
    fn op<'a>(&'a self, heads: Heads, kv: &'a KvLayer) -> Attention<'a> {
        Attention {
            heads,
            q: &self.q,
            kv,
            out: &self.out,
            sinks: None,
            tables: &self.tables,
            positions: &self.positions,
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            softcap: None,
            window: None,
        }
    }
}

/// Qwen2.5-0.5B, Phi-3-mini, Llama-3-8B, GPT-OSS-20B.
const HEADS: [Heads; 4] = [
    Heads { n_heads: 14, n_kv_heads: 2, head_dim: 64 },
    Heads { n_heads: 32, n_kv_heads: 32, head_dim: 96 },
    Heads { n_heads: 32, n_kv_heads: 8, head_dim: 128 },
    Heads { n_heads: 64, n_kv_heads: 8, head_dim: 64 },
];

/// Rows and columns of matrices: Phi-3-mini's qkv, output, gate with up, down; Llama-3-8B's; Qwen2.5-0.5B's down.
const SHAPES: [(usize, usize); 9] = [
    (9216, 3072),
    (3072, 3072),
    (16_384, 3072),
    (3072, 8192),
    (6144, 4096),
    (4096, 4096),
    (28_672, 4096),
    (4096, 14_336),
    (896, 4864),
];

fn shape(heads: Heads) -> String {
    format!("{}:{} of {}", heads.n_heads, heads.n_kv_heads, heads.head_dim)
}
