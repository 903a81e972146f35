//! `playhouse bench`: prefill and decode speed of a model, each beside what this machine's memory and arithmetic allow.
//!
//! A figure is the median over runs of whole steps of the resident model, from token ids to the greedy choice of the next ones,
//! without tokenizing. Prefill runs a prompt in chunks (512 tokens on a CPU, 4096 on a GPU) and chooses the token after it;
//! decode runs one token of each of several sequences per step and chooses the next of each. As in the engine, a GPU gets its next
//! step before the one under way is done, with tokens that it chose itself.

use std::fmt::Write as _;
use std::time::Instant;

use super::load::{ModelArgs, backend_exit};
use super::{CliError, RunCommand};
use crate::backend::cpu::{CpuBackend, measure_multiply_adds, measure_read_bandwidth};
use crate::backend::cuda;
use crate::backend::{BLOCK_TOKENS, BackendError, Batch, Feed, KvDtype, KvLayout, SampleRow, SeqSpan};
use crate::engine::sampler::{RowOptions, Sampler};
use crate::engine::{DeviceName, LoadError, RunnerLimits, StepModel, kv_blocks, kv_layout};
use crate::gguf::GgufFile;
use crate::models::spec::{Ffn, Linear, TensorRule};
use crate::models::{ModelSpec, describe};
use playhouse_actors::engine::SamplingParams;
use rayon::prelude::*;

/// The arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt lengths to prefill [default: those of 32, 128 and 512 that the model's context takes]
    #[arg(long, short, value_name = "TOKENS", value_delimiter = ',')]
    prompt: Vec<usize>,
    /// Numbers of sequences to decode side by side
    #[arg(long, short, value_name = "SEQUENCES", value_delimiter = ',', default_values_t = [1, 4, 16])]
    batch: Vec<usize>,
    /// Tokens to decode per sequence and run
    #[arg(long, short = 'n', value_name = "TOKENS", default_value_t = 32)]
    decode: usize,
    /// Tokens that are in the cache of each sequence before decoding
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    depth: usize,
    /// Timed runs of each test
    #[arg(long, short, value_name = "N", default_value_t = 5)]
    runs: usize,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Prompt lengths unless the user asks for others.
const PROMPTS: [usize; 3] = [32, 128, 512];
/// Most tokens in a step on a CPU.
const CPU_CHUNK: usize = 512;
/// Most tokens in a step on a GPU.
const GPU_CHUNK: usize = 4096;

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let n_ctx_train = describe(&self.model.open()?).map_err(LoadError::from)?.n_ctx_train;
        let chunk = match self.model.device()? {
            DeviceName::Cpu => CPU_CHUNK,
            DeviceName::Gpu(_) => GPU_CHUNK,
        };
        let tests = self.tests(n_ctx_train, chunk)?;
        let n_ctx = tests.iter().map(|t| t.start() + t.n_tokens()).max().unwrap_or(1);
        let n_sequences = tests.iter().map(Test::n_sequences).max().unwrap_or(1);
        let limits = RunnerLimits {
            n_ctx,
            max_batch_tokens: n_ctx.clamp(n_sequences, n_sequences.max(chunk)),
            max_logit_rows: n_sequences,
            n_kv_blocks: kv_blocks(n_ctx, n_sequences),
            kv_dtype: KvDtype::F16,
        };
        let mut loaded = self.model.load(|_, kv_dtype| RunnerLimits { kv_dtype, ..limits })?;
        let limits = RunnerLimits { kv_dtype: loaded.device.default_kv(), ..limits };
        let machine = Machine::measure(&loaded.device, self.model.threads.map(usize::from))?;
        let cost = Cost::of(&loaded.file, &loaded.spec, kv_layout(&loaded.spec, &limits))?;
        let mut report = Report {
            model: loaded.file.label().to_owned(),
            architecture: loaded.spec.architecture,
            weight_bytes: loaded.runner.memory().weights,
            machine,
            results: Vec::new(),
        };
        for test in tests {
            super::note(&format!("{test} ..."));
            let seconds = measure(&mut loaded.runner, &test, self.runs, chunk)?;
            report.results.push(Outcome::new(&test, seconds, cost.limit(&test, &report.machine)));
        }
        if self.json { super::print_json(&report) } else { super::print(&report.table()) }
    }
}

impl Args {
    fn tests(&self, n_ctx_train: usize, chunk: usize) -> Result<Vec<Test>, CliError> {
        let zero = |flag: &str| CliError::usage(format!("{flag} is 0, expected at least 1"));
        if self.runs == 0 {
            return Err(zero("--runs"));
        }
        if self.decode == 0 {
            return Err(zero("--decode"));
        }
        if self.prompt.contains(&0) {
            return Err(zero("--prompt"));
        }
        if self.batch.contains(&0) {
            return Err(zero("--batch"));
        }
        let fitting = || PROMPTS.into_iter().filter(|n| *n <= n_ctx_train).collect();
        let prompts = if self.prompt.is_empty() { fitting() } else { self.prompt.clone() };
        let prefill = prompts.into_iter().map(|n_tokens| Test::Prefill { n_tokens, chunk });
        let (n_tokens, depth) = (self.decode, self.depth);
        let decode = self.batch.iter().map(|n| Test::Decode { n_sequences: *n, n_tokens, depth });
        Ok(prefill.chain(decode).collect())
    }
}

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "test", rename_all = "lowercase")]
enum Test {
    /// A prompt of `n_tokens`, in steps of up to `chunk`.
    Prefill { n_tokens: usize, chunk: usize },
    /// `n_tokens` tokens of each of `n_sequences`, after `depth` tokens each.
    Decode { n_sequences: usize, n_tokens: usize, depth: usize },
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Test::Prefill { n_tokens, .. } => write!(f, "prefill {n_tokens}"),
            Test::Decode { n_sequences, n_tokens, depth: 0 } => write!(f, "decode {n_sequences} x {n_tokens}"),
            Test::Decode { n_sequences, n_tokens, depth } => write!(f, "decode {n_sequences} x {n_tokens} @ {depth}"),
        }
    }
}

impl Test {
    fn n_tokens(&self) -> usize {
        match self {
            Test::Prefill { n_tokens, .. } | Test::Decode { n_tokens, .. } => *n_tokens,
        }
    }

    fn n_sequences(&self) -> usize {
        match self {
            Test::Prefill { .. } => 1,
            Test::Decode { n_sequences, .. } => *n_sequences,
        }
    }

    fn start(&self) -> usize {
        match self {
            Test::Prefill { .. } => 0,
            Test::Decode { depth, .. } => *depth,
        }
    }

    /// The steps of a run: for each the first position and the tokens of every sequence.
    fn steps(&self) -> Vec<(usize, usize)> {
        let chunk = match self {
            Test::Prefill { chunk, .. } => *chunk,
            Test::Decode { .. } => 1,
        };
        let end = self.start() + self.n_tokens();
        (self.start()..end).step_by(chunk).map(|at| (at, chunk.min(end - at))).collect()
    }
}

/// Seconds of each run, after one that is not counted.
fn measure(model: &mut impl StepModel, test: &Test, runs: usize, chunk: usize) -> Result<Vec<f64>, CliError> {
    let mut logits = Vec::new();
    for at in (0..test.start()).step_by(chunk) {
        for seq in 0..test.n_sequences() {
            let batch = batch(model, seq..seq + 1, at, chunk.min(test.start() - at), false);
            step(model, &batch, &mut logits)?;
        }
    }
    let mut seconds = Vec::new();
    for i in 0..=runs {
        let start = Instant::now();
        run(model, test, &mut logits)?;
        if i > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

/// Runs the steps of a test once.
fn run(model: &mut impl StepModel, test: &Test, logits: &mut Vec<f32>) -> Result<(), CliError> {
    let failed = |e: BackendError| CliError::new(backend_exit(&e), e);
    let decodes = matches!(test, Test::Decode { .. });
    let mut n_under_way = 0;
    for (i, (at, n)) in test.steps().into_iter().enumerate() {
        let wants_logits = decodes || at + n == test.start() + test.n_tokens();
        let mut batch = batch(model, 0..test.n_sequences(), at, n, wants_logits);
        if !model.runs_ahead() {
            step(model, &batch, logits)?;
            continue;
        }
        if decodes && i > 0 {
            batch.feeds = (0..batch.tokens.len() as u32).map(|i| Feed { token: i, row: i }).collect();
        }
        let rows = vec![SampleRow::greedy(); batch.logit_rows.len()];
        let begun = model.enqueue(&batch, &rows).map_err(failed)?;
        assert!(begun, "the most likely token is never left to the host");
        n_under_way += 1;
        if n_under_way == 2 {
            model.collect().map_err(failed)?;
            n_under_way = 1;
        }
    }
    (0..n_under_way).try_for_each(|_| model.collect().map(drop)).map_err(failed)
}

fn step(model: &mut impl StepModel, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), CliError> {
    let failed = |e: BackendError| CliError::new(backend_exit(&e), e);
    let rows = vec![SampleRow::greedy(); batch.logit_rows.len()];
    if rows.is_empty() {
        return model.run(batch, logits).map_err(failed);
    }
    let sampled = model.run_and_choose(batch, &rows, logits).map_err(failed)?;
    if sampled.is_none() {
        std::hint::black_box(greedy(logits, model.n_vocab()));
    }
    Ok(())
}

/// The most likely token of each row, as the engine chooses it on the host.
fn greedy(logits: &mut [f32], n_vocab: usize) -> Vec<u32> {
    let sampler = Sampler::new(&SamplingParams::greedy(), &[], &[]);
    let choose = |row: &mut [f32]| sampler.choose(row, 0, RowOptions::default()).map_or(0, |chosen| chosen.token);
    logits.par_chunks_mut(n_vocab).map(choose).collect()
}

/// Tokens `at .. at + n` of some sequences, each in blocks of its own; ids that differ from token to token.
fn batch(model: &impl StepModel, seqs: std::ops::Range<usize>, at: usize, n: usize, wants_logits: bool) -> Batch {
    let blocks_each = model.n_ctx().div_ceil(BLOCK_TOKENS);
    let mut batch = Batch::default();
    for seq in seqs {
        let blocks: Vec<u32> = (0..(at + n).div_ceil(BLOCK_TOKENS)).map(|b| (seq * blocks_each + b) as u32).collect();
        let first = batch.tokens.len();
        for p in at..at + n {
            batch.tokens.push(((p * 7919 + seq * 104_729 + 1) % model.n_vocab()) as u32);
            batch.positions.push(p as u32);
            batch.slots.push(blocks[p / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (p % BLOCK_TOKENS) as u32);
        }
        batch.spans.push(SeqSpan { first, n_tokens: n, kv_len: at + n, blocks });
        batch.logit_rows.extend(wants_logits.then(|| batch.tokens.len() as u32 - 1));
    }
    batch
}

/// What a step must at least read and multiply.
#[derive(Debug, Clone, PartialEq)]
struct Cost {
    /// Bytes and multiply-adds per token of all matrices that every token uses.
    shared: (f64, f64),
    /// The same of the output.
    head: (f64, f64),
    /// The same of all experts together, and the part of them that a token uses.
    experts: (f64, f64, f64),
    /// Bytes of a token's keys and values, and multiply-adds per token seen, of each layer.
    layer_kv: (f64, f64),
    /// The window of each layer.
    windows: Vec<Option<usize>>,
}

impl Cost {
    fn of(file: &GgufFile, spec: &ModelSpec, kv: KvLayout) -> Result<Self, CliError> {
        let matrix = |linear: &Linear<TensorRule>| -> Result<(f64, f64), CliError> {
            let (n_mats, n_rows, n_cols) = linear.weight.shape().mats_rows_cols();
            let row_bytes = file.require(linear.weight.name())?.dtype.row_bytes(n_cols).unwrap_or_default();
            Ok(((n_mats * n_rows * row_bytes) as f64, (n_mats * n_rows * n_cols) as f64))
        };
        let mut cost = Self {
            shared: (0.0, 0.0),
            head: matrix(&spec.output)?,
            experts: (0.0, 0.0, spec.moe().map_or(0.0, |(n, used)| used as f64 / n as f64)),
            layer_kv: (kv.block_bytes() as f64 / (BLOCK_TOKENS * kv.n_layers.max(1)) as f64, 0.0),
            windows: spec.layers.iter().map(|l| l.attention.window).collect(),
        };
        cost.layer_kv.1 = 2.0 * (spec.heads.n_heads * spec.heads.head_dim) as f64;
        for layer in &spec.layers {
            let a = &layer.attention;
            let (mut shared, mut experts) = (vec![&a.q, &a.k, &a.v, &a.output], Vec::new());
            match &layer.ffn {
                Ffn::Gated { gate, up, down, .. } => shared.extend([gate, up, down]),
                Ffn::Moe { router, gate, up, down, .. } => {
                    shared.push(router);
                    experts.extend([gate, up, down]);
                }
            }
            for linear in shared {
                let (bytes, macs) = matrix(linear)?;
                cost.shared = (cost.shared.0 + bytes, cost.shared.1 + macs);
            }
            for linear in experts {
                let (bytes, macs) = matrix(linear)?;
                cost.experts = (cost.experts.0 + bytes, cost.experts.1 + macs, cost.experts.2);
            }
        }
        Ok(cost)
    }

    /// The most tokens per second that the machine's memory and its arithmetic allow, each on its own.
    fn limit(&self, test: &Test, machine: &Machine) -> Limit {
        let (mut bytes, mut macs) = (0.0, 0.0);
        let n_seqs = test.n_sequences() as f64;
        let n_logit_steps = if matches!(test, Test::Decode { .. }) { test.steps().len() } else { 1 };
        for (at, n) in test.steps() {
            let n_tokens = n as f64 * n_seqs;
            let read = (n_tokens * self.experts.2).min(1.0);
            bytes += self.shared.0 + self.experts.0 * read;
            macs += n_tokens * (self.shared.1 + self.experts.1 * self.experts.2);
            for window in &self.windows {
                let seen = |p: usize| (p + 1).min(window.unwrap_or(usize::MAX)) as f64;
                bytes += n_seqs * seen(at + n - 1) * self.layer_kv.0;
                macs += n_seqs * (at..at + n).map(seen).sum::<f64>() * self.layer_kv.1;
            }
        }
        bytes += n_logit_steps as f64 * self.head.0;
        macs += n_logit_steps as f64 * n_seqs * self.head.1;
        let n_tokens = (test.n_tokens() * test.n_sequences()) as f64;
        Limit {
            memory: n_tokens * machine.memory_read_bytes_per_s / bytes,
            arithmetic: n_tokens * machine.multiply_adds_per_s / macs,
        }
    }
}

/// Tokens per second that the machine allows.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
struct Limit {
    /// Every weight read once per step, at the measured bandwidth.
    memory: f64,
    /// Every product, at the measured rate.
    arithmetic: f64,
}

/// What was measured of the machine.
#[derive(Debug, Clone, serde::Serialize)]
struct Machine {
    device: String,
    instruction_set: String,
    threads: usize,
    memory_read_bytes_per_s: f64,
    multiply_adds_per_s: f64,
}

impl Machine {
    fn measure(device: &DeviceName, threads: Option<usize>) -> Result<Self, CliError> {
        match device {
            DeviceName::Cpu => {
                let cpu = threads.map_or_else(CpuBackend::new, CpuBackend::with_threads);
                Ok(Self {
                    device: "cpu".into(),
                    instruction_set: cpu.instruction_set().into(),
                    threads: cpu.n_threads(),
                    memory_read_bytes_per_s: measure_read_bandwidth(cpu.n_threads()),
                    multiply_adds_per_s: measure_multiply_adds(cpu.n_threads()),
                })
            }
            DeviceName::Gpu(uuid) => {
                let speed = cuda::measure(uuid).map_err(|e| CliError::new(backend_exit(&e), e))?;
                Ok(Self {
                    device: format!("{} ({uuid})", speed.name),
                    instruction_set: format!("sm_{}{}", speed.capability.0, speed.capability.1),
                    threads: speed.n_sms as usize,
                    memory_read_bytes_per_s: speed.copy_bytes_per_s,
                    multiply_adds_per_s: speed.multiply_adds_per_s,
                })
            }
        }
    }
}

/// A test's result, in tokens per second.
#[derive(Debug, Clone, serde::Serialize)]
struct Outcome {
    #[serde(flatten)]
    test: Test,
    runs: usize,
    median: f64,
    slowest: f64,
    fastest: f64,
    limit: Limit,
}

impl Outcome {
    fn new(test: &Test, mut seconds: Vec<f64>, limit: Limit) -> Self {
        seconds.sort_by(f64::total_cmp);
        let n_tokens = (test.n_tokens() * test.n_sequences()) as f64;
        let (middle, last) = (seconds.len() / 2, seconds.len() - 1);
        let median = if seconds.len().is_multiple_of(2) {
            (seconds[middle - 1] + seconds[middle]) / 2.0
        } else {
            seconds[middle]
        };
        Self {
            test: *test,
            runs: seconds.len(),
            median: n_tokens / median,
            slowest: n_tokens / seconds[last],
            fastest: n_tokens / seconds[0],
            limit,
        }
    }
}

/// The whole result.
#[derive(Debug, Clone, serde::Serialize)]
struct Report {
    model: String,
    architecture: &'static str,
    weight_bytes: u64,
    machine: Machine,
    results: Vec<Outcome>,
}

impl Report {
    fn table(&self) -> String {
        let Machine { device, instruction_set, threads, .. } = &self.machine;
        let mut out = format!(
            "{} ({}, {:.1} MB of weights) on {device}: {threads} threads, {instruction_set}, {:.1} GB/s from memory, \
             {:.1} G multiply-adds/s\n\n{:<24}{:>10}  {:<19}{:>10}  {}\n",
            self.model,
            self.architecture,
            self.weight_bytes as f64 / 1e6,
            self.machine.memory_read_bytes_per_s / 1e9,
            self.machine.multiply_adds_per_s / 1e9,
            "test",
            "tokens/s",
            "slowest .. fastest",
            "limit",
            "by"
        );
        for r in &self.results {
            let (limit, by) = if r.limit.memory < r.limit.arithmetic {
                (r.limit.memory, "memory")
            } else {
                (r.limit.arithmetic, "arithmetic")
            };
            let spread = format!("{:.1} .. {:.1}", r.slowest, r.fastest);
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "{:<24}{:>10.1}  {spread:<19}{limit:>10.1}  {by}, {:.0} %",
                r.test.to_string(),
                r.median,
                100.0 * r.median / limit
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine {
        device: String::new(),
        instruction_set: String::new(),
        threads: 1,
        memory_read_bytes_per_s: 1000.0,
        multiply_adds_per_s: 4000.0,
    };

    fn cost() -> Cost {
        Cost {
            shared: (100.0, 200.0),
            head: (50.0, 100.0),
            experts: (80.0, 160.0, 0.25),
            layer_kv: (2.0, 4.0),
            windows: vec![None, Some(2)],
        }
    }

    #[test]
    fn a_decode_step_reads_each_weight_once_and_a_quarter_of_the_experts() {
        let limit = cost().limit(&Test::Decode { n_sequences: 1, n_tokens: 1, depth: 9 }, &MACHINE);
        // 100 + 80 / 4 + 50, keys and values of 10 tokens in one layer and 2 in the other.
        assert_eq!(limit.memory, 1000.0 / (170.0 + 2.0 * 12.0));
        assert_eq!(limit.arithmetic, 4000.0 / (200.0 + 40.0 + 100.0 + 4.0 * 12.0));
    }

    #[test]
    fn a_batch_shares_the_weights_and_reads_all_experts_in_the_end() {
        let one = cost().limit(&Test::Decode { n_sequences: 1, n_tokens: 1, depth: 0 }, &MACHINE);
        let eight = cost().limit(&Test::Decode { n_sequences: 8, n_tokens: 1, depth: 0 }, &MACHINE);
        assert_eq!(eight.memory, 8.0 * 1000.0 / (230.0 + 8.0 * 4.0));
        assert!((eight.arithmetic - one.arithmetic).abs() < 1e-9);
    }

    #[test]
    fn prefill_runs_in_chunks_and_wants_one_row_of_logits() {
        let test = Test::Prefill { n_tokens: 1100, chunk: 512 };
        assert_eq!(test.steps(), [(0, 512), (512, 512), (1024, 76)]);
        let limit = cost().limit(&Test::Prefill { n_tokens: 4, chunk: 512 }, &MACHINE);
        assert_eq!(limit.memory, 4.0 * 1000.0 / (100.0 + 80.0 + 50.0 + 2.0 * 6.0));
        // Tokens see 1 + 2 + 3 + 4 in one layer and 1 + 2 + 2 + 2 in the other.
        assert_eq!(limit.arithmetic, 4.0 * 4000.0 / (4.0 * 240.0 + 100.0 + 4.0 * 17.0));
    }

    #[test]
    fn the_median_of_an_even_number_of_runs_is_between_the_middle_two() {
        let limit = Limit { memory: 1.0, arithmetic: 1.0 };
        let test = Test::Prefill { n_tokens: 10, chunk: 512 };
        let outcome = Outcome::new(&test, vec![4.0, 1.0, 3.0, 1.0], limit);
        assert_eq!((outcome.median, outcome.slowest, outcome.fastest), (5.0, 2.5, 10.0));
        assert_eq!(Outcome::new(&test, vec![5.0, 1.0, 2.0], limit).median, 5.0);
    }
}
