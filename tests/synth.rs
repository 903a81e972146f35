//! Synthetic files are models: described, loaded, run; their logits are neither flat nor one spike.

use std::fs::File;

use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::{Batch, KvDtype, SeqSpan};
use playhouse::engine::{Runner, RunnerLimits, StepModel};
use playhouse::gguf::GgufFile;
use playhouse::models;
use playhouse::synth::{FileType, Plan, SHAPES, Shape};

const N_TOKENS: usize = 24;

fn tiny_file(shape: &Shape, file_type: FileType) -> GgufFile {
    let plan = Plan::new(shape, file_type, 11, None).unwrap();
    GgufFile::from_vec(shape.name, plan.write(Vec::new(), &mut |_| ()).unwrap()).unwrap()
}

/// The logits after a prompt of arbitrary tokens.
fn logits(file: &GgufFile) -> Vec<f32> {
    let limits = RunnerLimits::new(N_TOKENS, 1, KvDtype::F32);
    let mut runner = Runner::load(file, CpuBackend::new(), limits, &mut |_| ()).unwrap();
    let n_vocab = runner.n_vocab() as u32;
    let batch = Batch {
        tokens: (0..N_TOKENS as u32).map(|i| (i * 7919 + 300) % n_vocab).collect(),
        positions: (0..N_TOKENS as u32).collect(),
        slots: (0..N_TOKENS as u32).collect(),
        spans: vec![SeqSpan { first: 0, n_tokens: N_TOKENS, kv_len: N_TOKENS, blocks: vec![0] }],
        logit_rows: vec![N_TOKENS as u32 - 1],
        feeds: Vec::new(),
    };
    let mut logits = Vec::new();
    runner.run(&batch, &mut logits).unwrap();
    logits
}

/// Entropy as a share of that of the flat distribution, and the likeliest token's probability.
fn spread(logits: &[f32]) -> (f64, f64) {
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let entropy: f64 = weights.iter().map(|w| w / sum).filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum();
    (entropy / (logits.len() as f64).ln(), 1.0 / sum)
}

fn check(shape: &Shape, file_type: FileType) {
    let name = format!("{} {}", shape.name, file_type.name());
    let logits = logits(&tiny_file(shape, file_type));
    assert!(logits.iter().all(|l| l.is_finite()), "{name}: {logits:?}");
    let (entropy, top) = spread(&logits);
    println!("{name:<24} entropy {entropy:.2} of flat, likeliest token {top:.3}");
    assert!((0.25..0.95).contains(&entropy) && top < 0.6, "{name}: entropy {entropy:.3} of flat, top {top:.3}");
}

fn tiny() -> impl Iterator<Item = &'static Shape> {
    SHAPES.iter().filter(|s| s.name.starts_with("tiny"))
}

#[test]
fn tiny_models_run_and_are_neither_flat_nor_one_spike() {
    for shape in tiny() {
        check(shape, FileType::F16);
        check(shape, FileType::Q4_K_M);
    }
}

#[test]
fn every_type_runs() {
    let shape = Shape::named("tiny-llama-3").unwrap();
    FileType::all().for_each(|file_type| check(shape, file_type));
}

/// The true shapes of every type, without their data: the file has the length, but no blocks on disk.
#[test]
fn every_shape_of_every_type_is_described() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shape.gguf");
    for shape in SHAPES {
        for file_type in [FileType::F16, FileType::Q8_0, FileType::Q4_K_M, FileType::MXFP4] {
            let plan = Plan::new(shape, file_type, 1, None).unwrap();
            let mut file = File::create(&path).unwrap();
            plan.write_header(&mut file).unwrap();
            // Room for the data and for the padding between tensors.
            let padding = 32 * plan.tensors().count() as u64;
            file.set_len(file.metadata().unwrap().len() + plan.data_bytes() + padding).unwrap();
            let file = GgufFile::open(&path).unwrap();
            let spec = models::describe(&file).unwrap_or_else(|e| panic!("{} {}: {e}", shape.name, file_type.name()));
            assert_eq!(spec.layers.len(), shape.n_layers as usize);
            assert_eq!(spec.n_vocab as u64, shape.n_vocab);
        }
    }
}
