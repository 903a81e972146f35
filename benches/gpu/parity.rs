//! `cargo run --example parity -- FILE...`: a model on the GPU against the CPU oracle, position by position.
//!
//! Runs the same 64 tokens on both devices and prints the divergence of the next token's distribution at each position: the
//! worst, the mean, and how often the most likely token is the same. Fails if the mean or, without experts, the worst is over the
//! budget: 1e-3 for F16 files, 1e-2 for quantised ones.

use playhouse::backend::{BLOCK_TOKENS, Batch, SeqSpan};
use playhouse::engine::{DeviceName, DeviceOptions, RunnerLimits, load_model};
use playhouse::gguf::GgufFile;
use playhouse::models::describe;
use std::path::Path;
use std::process::ExitCode;

const N_TOKENS: usize = 64;

fn main() -> ExitCode {
    let files: Vec<String> = std::env::args().skip(1).collect();
    let mut failed = files.is_empty();
    for path in &files {
        match compare(Path::new(path)) {
            Ok(report) => {
                println!("{path}: {}", report.line);
                failed |= !report.is_held;
            }
            Err(error) => {
                println!("{path}: {error}");
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}

struct Report {
    line: String,
    is_held: bool,
}

fn compare(path: &Path) -> Result<Report, Box<dyn std::error::Error>> {
    let file = GgufFile::open(path)?;
    let spec = describe(&file)?;
    let gpu = DeviceName::find("gpu")?;
    let expected = logits(&file, &DeviceName::Cpu, spec.n_vocab)?;
    let found = logits(&file, &gpu, spec.n_vocab)?;
    let rows = expected.chunks(spec.n_vocab).zip(found.chunks(spec.n_vocab));
    let all: Vec<f64> = rows.clone().map(|(e, f)| divergence(e, f)).collect();
    let same = rows.filter(|(e, f)| best(e) == best(f)).count();
    let (worst, mean) = (all.iter().copied().fold(0.0, f64::max), all.iter().sum::<f64>() / all.len() as f64);
    let is_f16 = file.tensors().all(|t| matches!(t.dtype.name(), "F16" | "F32" | "BF16"));
    let budget = if is_f16 { 1e-3 } else { 1e-2 };
    let is_held = all.iter().all(|d| d.is_finite()) && mean < budget && (spec.moe().is_some() || worst < budget);
    let line = format!(
        "divergence {worst:.2e} at worst, {mean:.2e} on average; {same} of {N_TOKENS} best tokens are the same"
    );
    Ok(Report { line, is_held })
}

/// `[N_TOKENS, V]`.
fn logits(file: &GgufFile, device: &DeviceName, n_vocab: usize) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let limits = RunnerLimits { max_logit_rows: N_TOKENS, ..RunnerLimits::new(N_TOKENS, 1, device.default_kv()) };
    let mut model = load_model(file, device, DeviceOptions::default(), limits, &mut |_| {})?;
    let ids = (0..N_TOKENS as u32).collect::<Vec<u32>>();
    let batch = Batch {
        tokens: ids.iter().map(|i| (i * 7919 + 11) % n_vocab as u32).collect(),
        positions: ids.clone(),
        slots: ids.clone(),
        spans: vec![SeqSpan {
            first: 0,
            n_tokens: N_TOKENS,
            kv_len: N_TOKENS,
            blocks: (0..N_TOKENS.div_ceil(BLOCK_TOKENS) as u32).collect(),
        }],
        logit_rows: ids,
    };
    let mut out = Vec::new();
    model.run(&batch, &mut out)?;
    Ok(out)
}

/// Sum of `p ln(p / q)` of the distributions that two rows of logits mean.
fn divergence(expected: &[f32], found: &[f32]) -> f64 {
    let norm = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + row.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln()
    };
    let (norm_p, norm_q) = (norm(expected), norm(found));
    let term = |(p, q): (&f32, &f32)| {
        let (ln_p, ln_q) = (f64::from(*p) - norm_p, f64::from(*q) - norm_q);
        ln_p.exp() * (ln_p - ln_q)
    };
    expected.iter().zip(found).map(term).sum()
}

fn best(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}
