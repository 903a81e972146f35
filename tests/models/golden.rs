//! The goldens: what transformers computed with the checkpoints.

use playhouse::gguf::GgufFile;
use serde::Deserialize;
use std::path::PathBuf;

/// Every checkpoint with goldens.
pub(crate) const ALL: [&str; 7] = ["qwen2", "llama2", "llama31", "phi3", "phi3-longrope", "gpt-oss", "gpt-oss-mxfp4"];

/// What transformers said of one checkpoint.
#[derive(Debug, Deserialize)]
pub(crate) struct Golden {
    pub(crate) prompts: Vec<Prompt>,
}

/// What it said of one prompt of `N` tokens.
#[derive(Debug, Deserialize)]
pub(crate) struct Prompt {
    /// The context to load the model with: LongRoPE's factors depend on it.
    pub(crate) n_ctx: usize,
    pub(crate) tokens: Vec<u32>,
    /// The most likely next token at each position, `[N]`.
    pub(crate) argmax: Vec<u32>,
    /// `ln(sum(exp(logits)))` at each position, `[N]`.
    pub(crate) logsumexp: Vec<f32>,
    pub(crate) rows: Vec<Row>,
    /// The answer of 64 tokens.
    pub(crate) greedy: Vec<u32>,
}

/// Some logits at one position.
#[derive(Debug, Deserialize)]
pub(crate) struct Row {
    pub(crate) pos: usize,
    pub(crate) columns: Vec<usize>,
    pub(crate) logits: Vec<f32>,
}

pub(crate) fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(file)
}

pub(crate) fn checkpoint(name: &str) -> GgufFile {
    GgufFile::open(&path(&format!("{name}.gguf"))).unwrap()
}

pub(crate) fn golden(name: &str) -> Golden {
    let golden: Golden = serde_json::from_slice(&std::fs::read(path(&format!("{name}.json"))).unwrap()).unwrap();
    assert!(golden.prompts.len() >= 4, "{name}: goldens for several prompts");
    golden
}

/// Whether two logits agree: to 1e-4 of the larger of 1 and the golden.
pub(crate) fn agree(found: f32, golden: f32) -> bool {
    (found - golden).abs() <= 1e-4 * golden.abs().max(1.0)
}

pub(crate) fn argmax(row: &[f32]) -> u32 {
    let best = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (0..row.len()).fold(0, best) as u32
}

pub(crate) fn logsumexp(row: &[f32]) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
    max + sum.ln() as f32
}
