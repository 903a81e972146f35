//! What loading reports and allocates, and what a probe sees.

use super::driver::{Sequence, push, runner, runner_with};
use super::golden::{self, checkpoint, golden};
use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::{Batch, KvDtype, MemoryUse};
use playhouse::engine::{LoadError, Runner, RunnerLimits, StepModel, vram_usage};
use playhouse::models::describe;
use playhouse_actors::engine::LoadPhase;

fn total(memory: MemoryUse) -> f64 {
    (memory.weights + memory.kv + memory.scratch) as f64
}

#[test]
fn vram_usage_is_what_a_runner_allocates() {
    for name in golden::ALL {
        for (n_ctx, n_sequences, kv_dtype) in [(128, 1, KvDtype::F32), (500, 3, KvDtype::F16), (64, 8, KvDtype::Q8_0)] {
            let file = checkpoint(name);
            let limits = RunnerLimits::new(n_ctx, n_sequences, kv_dtype);
            let predicted = vram_usage(&describe(&file).unwrap(), &limits);
            let mut runner = runner_with(&file, limits);
            // A full step, so that work space which grows on demand is there.
            let (mut batch, mut logits) = (Batch::default(), Vec::new());
            push(&mut batch, &mut Sequence::first_of(&runner), &vec![7; limits.max_batch_tokens.min(n_ctx)], false);
            runner.run(&batch, &mut logits).unwrap();
            let found = runner.memory();
            assert_eq!((predicted.weights, predicted.kv), (found.weights, found.kv), "{name} {limits:?}");
            let off = (total(predicted) / total(found) - 1.0).abs();
            assert!(off <= 0.02, "{name} {limits:?}: {predicted:?} predicted, {found:?} found");
        }
    }
}

#[test]
fn progress_counts_every_byte_once() {
    for name in golden::ALL {
        let mut reports = Vec::new();
        let limits = RunnerLimits::new(128, 1, KvDtype::F32);
        let runner =
            Runner::load(&checkpoint(name), CpuBackend::with_threads(1), limits, &mut |p| reports.push(p)).unwrap();
        let mut phases: Vec<LoadPhase> = reports.iter().map(|p| p.phase).collect();
        phases.dedup();
        assert_eq!(phases, [LoadPhase::Open, LoadPhase::Weights, LoadPhase::Allocate, LoadPhase::Ready], "{name}");
        assert!(reports.is_sorted_by_key(|p| p.bytes_done), "{name}");
        let last = reports.last().unwrap();
        assert_eq!((last.bytes_done, last.bytes_total), (runner.memory().weights, runner.memory().weights), "{name}");
        let weights: Vec<_> = reports.iter().filter(|p| p.phase == LoadPhase::Weights).collect();
        assert_eq!(weights.last().unwrap().bytes_done, last.bytes_total, "{name}: the weights are the whole of it");
    }
}

#[test]
fn a_probe_sees_every_layer() {
    for name in golden::ALL {
        let prompt = &golden(name).prompts[1];
        let mut runner = runner(&checkpoint(name), prompt.n_ctx);
        let (mut batch, mut logits, mut seen) = (Batch::default(), Vec::new(), Vec::new());
        push(&mut batch, &mut Sequence::new(&runner, 0), &prompt.tokens, true);
        let mut probe = |i: playhouse::engine::forward::Intermediate<'_>| {
            assert_eq!(i.values.len(), prompt.tokens.len() * i.n_cols, "{name} {}", i.name);
            assert!(i.values.iter().all(|x| x.is_finite()), "{name} {}", i.name);
            seen.push((i.layer, i.name));
        };
        runner.run_probed(&batch, &mut logits, Some(&mut probe)).unwrap();
        assert_eq!((seen[0], seen[seen.len() - 1]), ((None, "embedding"), (None, "logits")));
        for layer in 0..runner.spec().layers.len() {
            for point in ["q", "attended", "attention_residual", "ffn_residual"] {
                assert!(seen.contains(&(Some(layer), point)), "{name}: {point} of layer {layer}");
            }
        }
    }
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let file = checkpoint("qwen2");
    let good = RunnerLimits::new(128, 1, KvDtype::F32);
    let cases = [
        ("n_ctx", RunnerLimits { n_ctx: 0, ..good }),
        ("n_ctx", RunnerLimits { n_ctx: 513, ..good }),
        ("max_batch_tokens", RunnerLimits { max_batch_tokens: 0, ..good }),
        ("max_logit_rows", RunnerLimits { max_logit_rows: 0, ..good }),
        ("n_kv_blocks", RunnerLimits { n_kv_blocks: usize::MAX, ..good }),
    ];
    for (expected, limits) in cases {
        match Runner::load(&file, CpuBackend::with_threads(1), limits, &mut |_| ()) {
            Err(LoadError::Limit { limit, .. }) => assert_eq!(limit, expected),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{limits:?} was accepted"),
        }
    }
}
