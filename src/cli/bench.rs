//! `playhouse bench`: prefill and decode speed of a model, each beside what this machine's memory and arithmetic allow.
//!
//! A figure is the median over runs of whole steps of the resident model, from token ids to the greedy choice of the next ones,
//! without tokenizing. Prefill runs a prompt in chunks (512 tokens on a CPU, 4096 on a GPU) and chooses the token after it;
//! decode runs one token of each of several sequences per step and chooses the next of each. As in the engine, a GPU gets its next
//! step before the one under way is done, with tokens that it chose itself.

mod limit;
mod measure;
mod report;
mod test;

use super::load::ModelArgs;
use super::{CliError, RunCommand};
use crate::backend::KvDtype;
use crate::engine::{DeviceName, LoadError, RunnerLimits, kv_blocks, kv_layout};
use crate::models::describe;
use limit::{Cost, Machine};
use measure::measure;
use report::{Outcome, Report};
use test::Test;

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
