//! `cargo run --example parity -- FILE...`: a model on the GPU against the CPU oracle, position by position.
//!
//! Runs the same 64 tokens on both devices and prints the divergence of the next token's distribution at each position: the
//! worst, the mean, and how often the most likely token is the same. Fails if the mean or, without experts, the worst is over the
//! budget: 1e-3 for F16 files, 1e-2 for quantised ones.

use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::cuda::CudaBackend;
use playhouse::backend::{BLOCK_TOKENS, Backend, Batch, SeqSpan};
use playhouse::engine::forward::Intermediate;
use playhouse::engine::{DeviceName, Runner, RunnerLimits};
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
    let limits = |kv| RunnerLimits { max_logit_rows: N_TOKENS, ..RunnerLimits::new(N_TOKENS, 1, kv) };
    let cpu = Runner::load(&file, CpuBackend::new(), limits(DeviceName::Cpu.default_kv()), &mut |_| {})?;
    let (expected, cpu_layers) = logits(cpu, spec.n_vocab)?;
    let on_gpu = CudaBackend::open(&gpu.to_string(), None)?;
    let (found, gpu_layers) =
        logits(Runner::load(&file, on_gpu, limits(gpu.default_kv()), &mut |_| {})?, spec.n_vocab)?;
    let rows = expected.chunks(spec.n_vocab).zip(found.chunks(spec.n_vocab));
    let all: Vec<f64> = rows.clone().map(|(e, f)| divergence(e, f)).collect();
    let same = rows.filter(|(e, f)| best(e) == best(f)).count();
    let (worst, mean) = (all.iter().copied().fold(0.0, f64::max), all.iter().sum::<f64>() / all.len() as f64);
    let is_f16 = file.tensors().all(|t| matches!(t.dtype.name(), "F16" | "F32" | "BF16"));
    let budget = if is_f16 { 1e-3 } else { 1e-2 };
    let is_held = all.iter().all(|d| d.is_finite()) && mean < budget && (spec.moe().is_some() || worst < budget);
    let errors = cpu_layers.iter().zip(&gpu_layers).map(|(c, g)| median_error(c, g, spec.hidden_dim));
    let errors: Vec<String> = errors.map(|error| format!("{error:.1e}")).collect();
    let line = format!(
        "divergence {worst:.2e} at worst, {mean:.2e} on average, {:.2e} in the middle; {same} of {N_TOKENS} best tokens are \
         the same; the residual's error after each layer: {}",
        middle(all),
        errors.join(" ")
    );
    Ok(Report { line, is_held })
}

/// Logits `[N_TOKENS, V]`, and the residual stream after each layer.
type Run = (Vec<f32>, Vec<Vec<f32>>);

/// Runs the tokens through a model.
fn logits<B: Backend>(mut model: Runner<B>, n_vocab: usize) -> Result<Run, Box<dyn std::error::Error>> {
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
    let (mut out, mut layers) = (Vec::new(), Vec::new());
    let mut look = |seen: Intermediate<'_>| {
        if seen.name == "ffn_residual" {
            layers.push(seen.values.to_vec());
        }
    };
    model.run_probed(&batch, &mut out, Some(&mut look))?;
    Ok((out, layers))
}

/// The relative error of the token in the middle.
fn median_error(expected: &[f32], found: &[f32], n_cols: usize) -> f64 {
    let error = |(e, f): (&[f32], &[f32])| {
        let square = |sum: f64, x: f64| sum + x * x;
        let off = e.iter().zip(f).map(|(e, f)| f64::from(e - f)).fold(0.0, square);
        (off / e.iter().map(|e| f64::from(*e)).fold(1e-30, square)).sqrt()
    };
    middle(expected.chunks(n_cols).zip(found.chunks(n_cols)).map(error).collect())
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
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
