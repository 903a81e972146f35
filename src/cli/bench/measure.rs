//! Runs the steps of a test on a resident model, and times them.

use super::test::Test;
use crate::backend::{BLOCK_TOKENS, BackendError, Batch, Feed, SampleRow, SeqSpan};
use crate::cli::CliError;
use crate::cli::load::backend_exit;
use crate::engine::StepModel;
use crate::engine::sampler::{RowOptions, Sampler};
use playhouse_actors::engine::SamplingParams;
use rayon::prelude::*;
use std::time::Instant;

/// Seconds of each run, after one that is not counted.
pub(super) fn measure(
    model: &mut impl StepModel,
    test: &Test,
    runs: usize,
    chunk: usize,
) -> Result<Vec<f64>, CliError> {
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
