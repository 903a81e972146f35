//! A worker's way from its start to its first token, from a warm page cache, against the limit of the bus.
//!
//! The limit is what the file takes at 55 GB/s, and 0.15 s for a context; three times that must be kept. The worker is started as
//! the host starts it, a prompt of 20 tokens is in its queue before it is ready.

use crate::worker::{Model, Worker, request};
use crate::{Trouble, Verdicts, middle, name_of};
use playhouse::backend::Batch;
use playhouse::backend::cuda::CudaBackend;
use playhouse::backend::{BLOCK_TOKENS, SeqSpan};
use playhouse::engine::{DeviceName, Runner, RunnerLimits, StepModel};
use playhouse::gguf::GgufFile;
use playhouse_actors::engine::SamplingParams;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

const RUNS: usize = 5;
const BUS_BYTES_PER_S: f64 = 55e9;
const CONTEXT_S: f64 = 0.15;

pub(crate) fn check(path: &Path, verdicts: &mut Verdicts) -> Result<(), Trouble> {
    let name = name_of(path);
    warm(path)?;
    let model = Model::open(path)?;
    let limit = model.file_bytes as f64 / BUS_BYTES_PER_S + CONTEXT_S;
    let mut totals = Vec::new();
    let mut phases: Vec<(String, Vec<f64>)> = Vec::new();
    let mut note = |name: String, seconds: f64| match phases.iter_mut().find(|(known, _)| *known == name) {
        Some((_, all)) => all.push(seconds),
        None => phases.push((name, vec![seconds])),
    };
    for _ in 0..RUNS {
        let mut worker = Worker::start(model.worker(4096, 16, 4)?)?;
        let prompt = (0..20).map(|i| i * 37 % 1000).collect();
        worker.submit(request(1, prompt, 1, SamplingParams::greedy()))?;
        let (reached, _) = worker.await_ready()?;
        let ready = worker.since.elapsed().as_secs_f64();
        worker.first_token()?;
        let total = worker.since.elapsed().as_secs_f64();
        totals.push(total);
        reached.into_iter().for_each(|(phase, at)| note(format!("{phase:?}").to_lowercase(), at));
        note("takes requests".into(), ready);
        note("first token".into(), total);
        worker.kill()?;
    }
    let (best, worst) =
        (totals.iter().copied().fold(f64::INFINITY, f64::min), totals.iter().copied().fold(0.0, f64::max));
    let median = middle(totals);
    verdicts.figure(
        median <= 3.0 * limit,
        &format!(
            "start {name}: {median:.2} s to the first token ({best:.2} to {worst:.2}, {RUNS} runs), {:.2} must be kept, limit \
             {limit:.2}",
            3.0 * limit
        ),
    );
    let reached: Vec<String> = phases.into_iter().map(|(name, all)| format!("{name} {:.3}", middle(all))).collect();
    println!("     {name}: seconds from the start to: {}", reached.join(", "));
    breakdown(path, &name)
}

/// Brings the file into the page cache.
fn warm(path: &Path) -> Result<(), Trouble> {
    let (mut file, mut buffer) = (std::fs::File::open(path)?, vec![0; 16 << 20]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// The same in this process, part by part.
fn breakdown(path: &Path, name: &str) -> Result<(), Trouble> {
    let start = Instant::now();
    let mut parts: Vec<String> = Vec::new();
    let mut last = start;
    let mut lap = |what: &str| {
        parts.push(format!("{what} {:.3}", last.elapsed().as_secs_f64()));
        last = Instant::now();
    };
    let file = GgufFile::open(path)?;
    lap("file");
    let device = DeviceName::find("gpu")?;
    lap("driver");
    let backend = CudaBackend::open(&device.to_string(), None)?;
    lap("context");
    let n_ctx = playhouse::models::describe(&file)?.n_ctx_train.min(4096);
    let limits = RunnerLimits::new(n_ctx, 4, device.default_kv());
    let mut phase = None;
    let mut model = Runner::load(&file, backend, limits, &mut |progress| {
        if let Some(before) = phase.replace(progress.phase).filter(|before| *before != progress.phase) {
            lap(&format!("{before:?}").to_lowercase());
        }
    })?;
    let mut logits = Vec::new();
    for what in ["first prompt", "second prompt"] {
        model.run(&batch(0..20), &mut logits)?;
        lap(what);
    }
    for what in ["first token", "recorded token", "replayed token"] {
        model.run(&batch(20..21), &mut logits)?;
        lap(what);
    }
    println!("     {name}: seconds in one process for: {}", parts.join(", "));
    Ok(())
}

fn batch(range: std::ops::Range<u32>) -> Batch {
    let (n_tokens, kv_len) = (range.len(), range.end as usize);
    Batch {
        tokens: range.clone().map(|i| i * 37 % 1000).collect(),
        positions: range.clone().collect(),
        slots: range.clone().collect(),
        spans: vec![SeqSpan {
            first: 0,
            n_tokens,
            kv_len,
            blocks: (0..kv_len.div_ceil(BLOCK_TOKENS) as u32).collect(),
        }],
        logit_rows: vec![n_tokens as u32 - 1],
        feeds: Vec::new(),
    }
}
