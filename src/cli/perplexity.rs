//! `playhouse perplexity`: how well a model predicts a text.
//!
//! The text's tokens are cut into windows of `--ctx` tokens. In each window the first half is context, and every token
//! of the second half is scored by its probability given all before it in the window: each has at least half a window
//! of context, and each window is independent. A vocabulary that wants a BOS gets one as the first token of each
//! window. That is the rule of llama.cpp's `llama-perplexity`, so that figures compare.

use std::path::PathBuf;

use super::load::{LoadedModel, ModelArgs};
use super::{CliError, Exit, RunCommand};
use crate::backend::{BLOCK_TOKENS, Batch, SeqSpan};
use crate::engine::{RunnerLimits, StepModel, kv_blocks};
use crate::text::EncodeOptions;

/// The arguments of `perplexity`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text, in UTF-8
    #[arg(value_name = "TEXTFILE")]
    text: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Tokens per window unless `--ctx` says otherwise.
const WINDOW: usize = 512;
/// Rows of logits at a time: 32 rows of a vocabulary of 200,000 are 26 MB.
const ROWS: usize = 32;
/// Tokens of context at a time.
const CHUNK: usize = 512;

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let bytes = std::fs::read(&self.text).map_err(|e| CliError::io(&self.text, e))?;
        let text = String::from_utf8(bytes)
            .map_err(|e| CliError::usage(format!("{}: expected UTF-8, {e}", self.text.display())))?;
        let asked = self.model.ctx;
        let mut model = self.model.load(|n_ctx, kv_dtype| {
            let n_ctx = asked.unwrap_or(WINDOW.min(n_ctx));
            RunnerLimits {
                n_ctx,
                max_batch_tokens: CHUNK.min(n_ctx),
                max_logit_rows: ROWS,
                n_kv_blocks: kv_blocks(n_ctx, 1),
                kv_dtype,
            }
        })?;
        let score = score_text(&mut model, &text)?;
        let Score { nll_sum, n_scored, .. } = score;
        if n_scored == 0 {
            let message = format!("{}: too short, expected at least 4 tokens", self.text.display());
            return Err(CliError::usage(message));
        }
        let (mean, error) = score.mean_and_error();
        let report = Report {
            model: model.file.label().to_owned(),
            text: self.text.display().to_string(),
            perplexity: mean.exp(),
            // The perplexity's error to first order.
            error: mean.exp() * error,
            nll_per_token: nll_sum / n_scored as f64,
            tokens_scored: n_scored,
            window: model.runner.n_ctx(),
        };
        if self.json {
            return super::print_json(&report);
        }
        super::print(&format!(
            "perplexity {:.4} +/- {:.4} ({} tokens scored, windows of {})\n",
            report.perplexity, report.error, report.tokens_scored, report.window
        ))
    }
}

/// The result.
#[derive(Debug, Clone, serde::Serialize)]
struct Report {
    model: String,
    text: String,
    perplexity: f64,
    error: f64,
    nll_per_token: f64,
    tokens_scored: usize,
    window: usize,
}

/// Negative log likelihoods so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Score {
    n_scored: usize,
    nll_sum: f64,
    nll_square_sum: f64,
}

impl Score {
    fn add(&mut self, nll: f64) {
        self.n_scored += 1;
        self.nll_sum += nll;
        self.nll_square_sum += nll * nll;
    }

    /// The mean, and its standard error.
    fn mean_and_error(&self) -> (f64, f64) {
        let n = self.n_scored as f64;
        let mean = self.nll_sum / n;
        let variance = (self.nll_square_sum / n - mean * mean).max(0.0);
        (mean, (variance / (n - 1.0).max(1.0)).sqrt())
    }
}

fn score_text(model: &mut LoadedModel, text: &str) -> Result<Score, CliError> {
    let tokens = model.tokenizer.encode(text, EncodeOptions { add_special: false, parse_special: false })?;
    let bos = model.tokenizer.adds_bos().then(|| model.tokenizer.special_ids().bos).flatten();
    let mut score = Score::default();
    let windows = windows(tokens.len(), model.runner.n_ctx());
    for (i, window) in windows.iter().enumerate() {
        let mut tokens = tokens[window.clone()].to_vec();
        if let Some(bos) = bos {
            tokens[0] = bos;
        }
        score_window(&mut model.runner, &tokens, &mut score)?;
        if score.n_scored > 0 {
            let so_far = score.mean_and_error().0.exp();
            super::note(&format!("window {} of {}: perplexity so far {so_far:.4}", i + 1, windows.len()));
        }
    }
    Ok(score)
}

/// Whole windows; one shorter one if there is no whole one.
fn windows(n_tokens: usize, n_ctx: usize) -> Vec<std::ops::Range<usize>> {
    let len = n_ctx.min(n_tokens);
    if len < 4 {
        return Vec::new();
    }
    (0..n_tokens / len).map(|i| i * len..(i + 1) * len).collect()
}

/// Scores tokens `n / 2 + 1 .. n` of a window.
fn score_window(model: &mut impl StepModel, tokens: &[u32], score: &mut Score) -> Result<(), CliError> {
    let first = tokens.len() / 2;
    let mut logits = Vec::new();
    for from in (0..first).step_by(CHUNK) {
        step(model, &batch(tokens, from, (from + CHUNK).min(first), false), &mut logits)?;
    }
    let (last, n_vocab) = (tokens.len() - 1, model.n_vocab());
    for from in (first..last).step_by(ROWS) {
        let to = (from + ROWS).min(last);
        step(model, &batch(tokens, from, to, true), &mut logits)?;
        for (row, next) in logits.chunks_exact(n_vocab).zip(&tokens[from + 1..=to]) {
            score.add(nll(row, *next));
        }
    }
    Ok(())
}

fn step(model: &mut impl StepModel, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), CliError> {
    model.run(batch, logits).map_err(|e| CliError::new(Exit::Transient, e))
}

fn batch(tokens: &[u32], from: usize, to: usize, wants_logits: bool) -> Batch {
    let n_tokens = to - from;
    let blocks = (0..to.div_ceil(BLOCK_TOKENS) as u32).collect();
    let positions: Vec<u32> = (from as u32..to as u32).collect();
    Batch {
        tokens: tokens[from..to].to_vec(),
        slots: positions.clone(),
        positions,
        spans: vec![SeqSpan { first: 0, n_tokens, kv_len: to, blocks }],
        logit_rows: if wants_logits { (0..n_tokens as u32).collect() } else { Vec::new() },
        feeds: Vec::new(),
    }
}

/// `-ln softmax(logits)[token]`, in f64.
fn nll(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendError, MemoryUse};
    use crate::engine::StepCapacity;

    /// Gives the token `(last + 1) % 4` the odds 3 : 1 against each other one, and checks what it is asked.
    struct Successor {
        seen: Vec<u32>,
    }

    impl StepModel for Successor {
        fn n_vocab(&self) -> usize {
            4
        }
        fn n_ctx(&self) -> usize {
            2048
        }
        fn capacity(&self) -> StepCapacity {
            StepCapacity { n_kv_blocks: 64, max_batch_tokens: CHUNK, max_logit_rows: ROWS }
        }
        fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
            assert_eq!(batch.positions[0] as usize, self.seen.len(), "tokens come in order, without gaps");
            assert!(batch.tokens.len() <= CHUNK && batch.logit_rows.len() <= ROWS);
            self.seen.extend(&batch.tokens);
            logits.clear();
            for row in &batch.logit_rows {
                let likely = (batch.tokens[*row as usize] + 1) % 4;
                logits.extend((0..4).map(|t| if t == likely { 3f32.ln() } else { 0.0 }));
            }
            Ok(())
        }
        fn hidden(&mut self, _: &[u32], _: &mut Vec<f32>) -> Result<(), BackendError> {
            panic!("perplexity needs no hidden states")
        }
        fn copy_blocks(&mut self, _: &[(u32, u32)]) -> Result<(), BackendError> {
            Ok(())
        }
        fn memory(&self) -> MemoryUse {
            MemoryUse::default()
        }
    }

    #[test]
    fn the_second_half_of_a_window_is_scored() {
        for n in [4, 5, 63, 64, 65, 512, 1300] {
            let tokens: Vec<u32> = (0..n as u32).map(|i| i % 4).collect();
            let (mut model, mut score) = (Successor { seen: Vec::new() }, Score::default());
            score_window(&mut model, &tokens, &mut score).unwrap();
            assert_eq!(score.n_scored, n - 1 - n / 2, "window of {n}");
            assert!((score.mean_and_error().0.exp() - 2.0).abs() < 1e-6, "3 of 6 is a perplexity of 2");
            assert_eq!(model.seen, tokens[..n - 1]);
        }
    }

    #[test]
    fn windows_are_whole_or_the_only_one() {
        assert_eq!(windows(1030, 512), [0..512, 512..1024]);
        assert_eq!((windows(100, 512).len(), windows(100, 512).first()), (1, Some(&(0..100))));
        assert!(windows(3, 512).is_empty());
    }

    #[test]
    fn the_error_of_the_mean_is_that_of_a_sample() {
        let mut score = Score::default();
        for nll in [1.0, 2.0, 3.0, 4.0] {
            score.add(nll);
        }
        let (mean, error) = score.mean_and_error();
        assert_eq!(mean, 2.5);
        // Sample variance 5/3, over 4.
        assert!((error - (5.0f64 / 12.0).sqrt()).abs() < 1e-12);
    }
}
