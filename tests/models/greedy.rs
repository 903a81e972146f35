//! Greedy answers of 64 tokens against transformers, by hand and through the engine.

use super::driver::{Sequence, push, runner, runner_with};
use super::golden::{self, Prompt, argmax, checkpoint, golden};
use playhouse::backend::{Batch, KvDtype};
use playhouse::engine::{EngineOptions, LlmEngine, RunnerLimits, StepModel};
use playhouse_actors::engine::{Engine, EngineEvent, EngineRequest, RequestId, SamplingParams, Task};
use std::collections::BTreeMap;

#[test]
fn greedy_answers_are_those_of_transformers() {
    for name in golden::ALL {
        let file = checkpoint(name);
        for prompt in &golden(name).prompts {
            let mut runner = runner(&file, prompt.n_ctx);
            let mut sequence = Sequence::new(&runner, 2);
            let (mut next, mut answer, mut logits) = (prompt.tokens.clone(), Vec::<u32>::new(), Vec::new());
            while answer.len() < prompt.greedy.len() {
                let mut batch = Batch::default();
                push(&mut batch, &mut sequence, &next, false);
                runner.run(&batch, &mut logits).unwrap();
                next = vec![argmax(&logits)];
                answer.extend(&next);
            }
            assert_eq!(answer, prompt.greedy, "{name}, {} tokens", prompt.tokens.len());
        }
    }
}

fn request(id: u64, prompt: &Prompt) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: Task::Generate,
        prompt: prompt.tokens.clone(),
        emitted: Vec::new(),
        sampling: SamplingParams::greedy(),
        max_tokens: prompt.greedy.len() as u32,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        deadline: None,
    }
}

/// All prompts at once, in small chunks, in a pool too small for all of them: the scheduler must preempt.
#[test]
fn the_engine_gives_the_same_answers_under_pressure() {
    for name in golden::ALL {
        let golden = golden(name);
        let n_ctx = golden.prompts.iter().map(|p| p.n_ctx).max().unwrap();
        let prompts: Vec<&Prompt> = golden.prompts.iter().filter(|p| p.n_ctx == n_ctx).collect();
        let limits =
            RunnerLimits { max_batch_tokens: 48, n_kv_blocks: 12, ..RunnerLimits::new(n_ctx, 8, KvDtype::F32) };
        let runner = runner_with(&checkpoint(name), limits);
        let options = EngineOptions { prefill_chunk: 16, ..EngineOptions::default() };
        let mut engine = LlmEngine::new(runner, options);
        for (id, prompt) in prompts.iter().enumerate() {
            engine.submit(request(id as u64, prompt)).unwrap();
        }
        let (mut events, mut answers) = (Vec::new(), BTreeMap::<u64, Vec<u32>>::new());
        while engine.step(&mut events).unwrap().busy {}
        for event in events {
            match event {
                EngineEvent::Token { id, token, .. } => answers.entry(id.0).or_default().push(token),
                EngineEvent::Finished { .. } => {}
                EngineEvent::Embedded { .. } => panic!("nobody asked for an embedding"),
                EngineEvent::Failed { error, .. } => panic!("{name}: {error}"),
            }
        }
        for (id, prompt) in prompts.iter().enumerate() {
            assert_eq!(answers[&(id as u64)], prompt.greedy, "{name}, {} tokens", prompt.tokens.len());
        }
    }
}
