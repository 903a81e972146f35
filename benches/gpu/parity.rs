//! A model on the GPU against the CPU oracle, position by position.
//!
//! Runs the same 64 tokens on both and looks at the divergence of the next token's distribution at each position: it stays below
//! 1e-3 for F16 files and below 1e-2 for quantised ones.
//!
//! Where a router chooses experts, the oracle follows the GPU's choices: a token whose scores all but tie goes to one expert
//! here and to another there, and the distance of what follows says nothing about the kernels. The choices are held for themselves:
//! each is the best by the GPU's own scores, the scores are near the oracle's, and where the oracle would have chosen
//! otherwise, its scores differ by no more than that. How far two free runs part is printed beside it, and held to nothing.

use crate::{Trouble, Verdicts, middle, name_of};
use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::cuda::CudaBackend;
use playhouse::backend::{BLOCK_TOKENS, Backend, Batch, RouteDifference, SeqSpan};
use playhouse::engine::forward::Intermediate;
use playhouse::engine::{DeviceName, Runner, RunnerLimits};
use playhouse::gguf::GgufFile;
use playhouse::models::describe;
use std::path::Path;

const N_TOKENS: usize = 64;
/// Most that a router's score may be off by, where scores have a deviation of 2: about 2^-11 of f16, thirty layers deep.
const SCORE_ERROR: f64 = 0.1;

/// Logits `[N_TOKENS, V]`, and the residual stream after each layer.
type Run = (Vec<f32>, Vec<Vec<f32>>);

pub(crate) fn check(path: &Path, verdicts: &mut Verdicts) -> Result<(), Trouble> {
    let name = name_of(path);
    let file = GgufFile::open(path)?;
    let spec = describe(&file)?;
    let device = DeviceName::find("gpu")?;
    let limits = |kv| RunnerLimits { max_logit_rows: N_TOKENS, ..RunnerLimits::new(N_TOKENS, 1, kv) };

    let mut gpu = CudaBackend::open(&device.to_string(), None)?;
    let routes = gpu.tell_routes();
    let found = run(&mut Runner::load(&file, gpu, limits(device.default_kv()), &mut |_| {})?, spec.n_vocab)?;
    let on_cpu = |backend: CpuBackend| Runner::load(&file, backend, limits(DeviceName::Cpu.default_kv()), &mut |_| {});
    let mut follower = CpuBackend::new();
    if spec.moe().is_some() {
        follower.follow_routes(routes);
    }
    let mut oracle = on_cpu(follower)?;
    let expected = run(&mut oracle, spec.n_vocab)?;

    let is_f16 = file.tensors().all(|t| matches!(t.dtype.name(), "F16" | "F32" | "BF16"));
    let budget = if is_f16 { 1e-3 } else { 1e-2 };
    let compared = Compared::new(&expected.0, &found.0, spec.n_vocab);
    let holds = compared.worst < budget && compared.all_finite;
    verdicts.line(holds, &format!("parity {name}: {compared}, {budget:.0e} allowed"));
    println!(
        "     {name}: residual's relative error after each layer: {}",
        layers(&expected.1, &found.1, spec.hidden_dim)
    );
    if spec.moe().is_some() {
        hold_routes(&name, oracle.backend().route_difference(), verdicts);
        drop(oracle);
        let free = run(&mut on_cpu(CpuBackend::new())?, spec.n_vocab)?;
        println!(
            "     {name}: each with experts of its own choice: {}",
            Compared::new(&free.0, &found.0, spec.n_vocab)
        );
    }
    Ok(())
}

fn hold_routes(name: &str, routes: RouteDifference, verdicts: &mut Verdicts) {
    let RouteDifference { n_choices, n_flips, n_wrong, worst_error, worst_gap, .. } = routes;
    let holds = n_wrong == 0 && worst_error < SCORE_ERROR && worst_gap <= 2.0 * worst_error;
    verdicts.line(
        holds,
        &format!(
            "routes {name}: {n_flips} of {n_choices} choices differ, where scores are at most {worst_gap:.1e} apart; scores \
             are off by {worst_error:.1e} at worst ({SCORE_ERROR} allowed), {:.1e} on average; {n_wrong} are not the best of \
             their scores",
            routes.error()
        ),
    );
}

/// How far two runs are apart.
struct Compared {
    worst: f64,
    mean: f64,
    middle: f64,
    n_same: usize,
    all_finite: bool,
}

impl Compared {
    fn new(expected: &[f32], found: &[f32], n_vocab: usize) -> Self {
        let rows = || expected.chunks(n_vocab).zip(found.chunks(n_vocab));
        let all: Vec<f64> = rows().map(|(e, f)| divergence(e, f)).collect();
        Self {
            worst: all.iter().copied().fold(0.0, f64::max),
            mean: all.iter().sum::<f64>() / all.len() as f64,
            all_finite: all.iter().all(|d| d.is_finite()),
            middle: middle(all),
            n_same: rows().filter(|(e, f)| best(e) == best(f)).count(),
        }
    }
}

impl std::fmt::Display for Compared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { worst, mean, middle, n_same, .. } = self;
        write!(f, "divergence {worst:.2e} at worst, {mean:.2e} on average, {middle:.2e} in the middle; ")?;
        write!(f, "{n_same} of {N_TOKENS} best tokens are the same")
    }
}

/// Runs the tokens through a model.
fn run<B: Backend>(model: &mut Runner<B>, n_vocab: usize) -> Result<Run, Trouble> {
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
        feeds: Vec::new(),
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

fn layers(expected: &[Vec<f32>], found: &[Vec<f32>], n_cols: usize) -> String {
    let errors = expected.iter().zip(found).map(|(e, f)| format!("{:.1e}", median_error(e, f, n_cols)));
    errors.collect::<Vec<String>>().join(" ")
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
