//! Logits against transformers: at every position, however the prompt is cut and whoever else is in the batch.

use super::driver::{Sequence, all_logits, push, runner, runner_with};
use super::golden::{self, Prompt, agree, argmax, checkpoint, golden, logsumexp};
use playhouse::backend::{Batch, KvDtype};
use playhouse::engine::{RunnerLimits, StepModel};

fn check_logits(name: &str) {
    let file = checkpoint(name);
    for prompt in &golden(name).prompts {
        let mut runner = runner(&file, prompt.n_ctx);
        let mut sequence = Sequence::new(&runner, 3);
        let logits = all_logits(&mut runner, &mut sequence, &prompt.tokens, prompt.tokens.len());
        compare(name, prompt, &logits, runner.n_vocab());
        for chunk in [1, 7, 32, 33] {
            let mut sequence = Sequence::new(&runner, 5);
            let chunked = all_logits(&mut runner, &mut sequence, &prompt.tokens, chunk);
            assert!(chunked == logits, "{name}: {} tokens in chunks of {chunk} differ in bits", prompt.tokens.len());
        }
    }
}

fn compare(name: &str, prompt: &Prompt, logits: &[f32], n_vocab: usize) {
    let mut worst = 0f32;
    let n = prompt.tokens.len();
    let row = |pos: usize| &logits[pos * n_vocab..][..n_vocab];
    for pos in 0..n {
        let (found, expected) = (logsumexp(row(pos)), prompt.logsumexp[pos]);
        assert!(agree(found, expected), "{name}, {n} tokens, position {pos}: logsumexp {found}, golden {expected}");
        assert_eq!(argmax(row(pos)), prompt.argmax[pos], "{name}, {n} tokens, position {pos}: arg max");
    }
    for golden in &prompt.rows {
        for (&column, &expected) in golden.columns.iter().zip(&golden.logits) {
            let found = row(golden.pos)[column];
            let place = (golden.pos, column);
            assert!(agree(found, expected), "{name}, {n} tokens, {place:?}: logit {found}, golden {expected}");
            worst = worst.max((found - expected).abs() / expected.abs().max(1.0));
        }
    }
    println!("{name}: {n} tokens, worst relative difference {worst:e}");
}

#[test]
fn smaller_keys_and_values_stay_near() {
    // Not of experts: rounding may move a token to another one, and any distance away.
    for name in ["qwen2", "llama2", "phi3"] {
        let file = checkpoint(name);
        let prompt = &golden(name).prompts[3];
        let exact = {
            let mut runner = runner(&file, prompt.n_ctx);
            let mut sequence = Sequence::new(&runner, 0);
            all_logits(&mut runner, &mut sequence, &prompt.tokens, 512)
        };
        for (kv_dtype, tolerance) in [(KvDtype::F16, 0.02), (KvDtype::Q8_0, 0.3)] {
            let limits = RunnerLimits { max_logit_rows: 512, ..RunnerLimits::new(prompt.n_ctx, 8, kv_dtype) };
            let mut runner = runner_with(&file, limits);
            let mut sequence = Sequence::new(&runner, 0);
            let found = all_logits(&mut runner, &mut sequence, &prompt.tokens, 512);
            let worst = found.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{name}: {kv_dtype:?} keys and values move a logit by up to {worst}");
            assert!(worst > 0.0 && worst < tolerance, "{name}, {kv_dtype:?}: {worst}");
        }
    }
}

#[test]
fn qwen2_logits_are_those_of_transformers() {
    check_logits("qwen2");
}

#[test]
fn llama_2_logits_are_those_of_transformers() {
    check_logits("llama2");
}

#[test]
fn llama_3_1_logits_are_those_of_transformers() {
    check_logits("llama31");
}

#[test]
fn phi3_logits_are_those_of_transformers_beyond_its_window() {
    check_logits("phi3");
}

#[test]
fn phi3_long_rope_logits_are_those_of_transformers_on_both_sides_of_the_original_context() {
    check_logits("phi3-longrope");
}

#[test]
fn gpt_oss_logits_are_those_of_transformers_beyond_window_and_original_context() {
    check_logits("gpt-oss");
}

#[test]
fn gpt_oss_logits_are_those_of_transformers_with_mxfp4_experts() {
    check_logits("gpt-oss-mxfp4");
}

#[test]
fn a_sequence_in_a_mixed_batch_gets_the_bits_it_gets_alone() {
    for name in golden::ALL {
        let golden = golden(name);
        let n_ctx = golden.prompts.iter().map(|p| p.n_ctx).max().unwrap();
        let prompts: Vec<&Prompt> = golden.prompts.iter().filter(|p| p.n_ctx == n_ctx).collect();
        let mut runner = runner(&checkpoint(name), n_ctx);
        let alone: Vec<Vec<f32>> = prompts
            .iter()
            .map(|prompt| {
                let mut sequence = Sequence::new(&runner, 0);
                all_logits(&mut runner, &mut sequence, &prompt.tokens, 512)
            })
            .collect();
        let (mut batch, mut together) = (Batch::default(), Vec::new());
        for (i, prompt) in prompts.iter().enumerate() {
            push(&mut batch, &mut Sequence::new(&runner, i as u32), &prompt.tokens, true);
        }
        runner.run(&batch, &mut together).unwrap();
        assert!(together == alone.concat(), "{name}: a mixed batch changes bits");
    }
}

#[test]
fn copied_blocks_hold_the_same_keys_and_values() {
    let golden = golden("gpt-oss");
    let prompt = &golden.prompts[3];
    let mut runner = runner(&checkpoint("gpt-oss"), prompt.n_ctx);
    let (head, tail) = prompt.tokens.split_at(64);
    let (mut original, mut copy) = (Sequence::new(&runner, 1), Sequence::new(&runner, 6));
    all_logits(&mut runner, &mut original, head, 64);
    copy.continue_from(&original);
    runner.copy_blocks(&original.pairs(&copy)).unwrap();
    let expected = all_logits(&mut runner, &mut original, tail, 64);
    assert!(all_logits(&mut runner, &mut copy, tail, 64) == expected);
}

#[test]
fn hidden_states_are_what_the_output_matrix_projects() {
    // In f32, untied or tied: the logits are the output matrix times the hidden state.
    for name in golden::ALL {
        let (golden, file) = (golden(name), checkpoint(name));
        let prompt = &golden.prompts[1];
        let mut runner = runner(&file, prompt.n_ctx);
        let mut sequence = Sequence::new(&runner, 0);
        let (mut batch, mut logits, mut hidden) = (Batch::default(), Vec::new(), Vec::new());
        push(&mut batch, &mut sequence, &prompt.tokens, false);
        runner.run(&batch, &mut logits).unwrap();
        runner.hidden(&batch.logit_rows, &mut hidden).unwrap();
        let info =
            file.tensor("output.weight").or(file.tensor("token_embd.weight")).expect("there is an output matrix");
        let mut matrix = vec![0.0; info.n_elems() as usize];
        info.dtype.decode(&file.bytes(info).unwrap(), &mut matrix).unwrap();
        assert_eq!(matrix.len(), logits.len() * hidden.len(), "{name}");
        for (row, logit) in matrix.chunks(hidden.len()).zip(&logits) {
            let exact: f64 = row.iter().zip(&hidden).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            assert!((exact - f64::from(*logit)).abs() < 2e-3, "{name}: {exact} and {logit}");
        }
    }
}
