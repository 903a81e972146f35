//! The engine's contract, request by request, over a model that is all bookkeeping.

mod engine_support;

use engine_support::{FakeModel, Fault, Told, capacity, collect, drain, request};
use playhouse::engine::{EngineOptions, LlmEngine};
use playhouse_actors::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, FinishReason, RequestError, RequestId, SamplingParams, Usage,
};
use std::collections::BTreeMap;
use std::time::Instant;

fn engine(n_kv_blocks: usize) -> LlmEngine<FakeModel> {
    LlmEngine::new(FakeModel::new(capacity(n_kv_blocks)), EngineOptions::default())
}

fn alone(request: EngineRequest) -> Told {
    let mut engine = engine(64);
    let id = request.id;
    engine.submit(request).unwrap();
    drain(&mut engine).remove(&id).unwrap()
}

fn greedy_tokens(prompt: &[u32], n: u32) -> Vec<u32> {
    alone(request(1, prompt, n)).tokens
}

#[test]
fn an_idle_step_returns_at_once() {
    let mut engine = engine(4);
    let mut events = vec![];
    let report = engine.step(&mut events).unwrap();
    assert!(!report.busy && events.is_empty());
    assert_eq!(engine.stats().steps, 0);
}

#[test]
fn max_tokens_ends_with_length_and_usage() {
    let told = alone(request(1, &[1, 2, 3], 7));
    assert_eq!(told.tokens.len(), 7);
    assert_eq!(told.first_index, Some(0));
    let usage = Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: 7 };
    assert_eq!(told.end, Some(Ok((FinishReason::Length, usage))));
}

#[test]
fn no_tokens_asked_none_given() {
    let told = alone(request(1, &[1, 2, 3], 0));
    assert!(told.tokens.is_empty());
    assert_eq!(told.reason(), Some(FinishReason::Length));
}

#[test]
fn the_context_ends_a_sequence_with_length() {
    let told = alone(request(1, &[5; 390], 1000));
    assert_eq!((told.tokens.len(), told.reason()), (10, Some(FinishReason::Length)));
}

#[test]
fn a_stop_id_is_emitted_and_is_the_last() {
    let free = greedy_tokens(&[1, 2, 3], 20);
    let told = alone(EngineRequest { stop_ids: vec![free[5]], ..request(1, &[1, 2, 3], 20) });
    let n = free.iter().position(|token| *token == free[5]).unwrap() + 1;
    assert_eq!((told.tokens, told.end.unwrap().unwrap().0), (free[..n].to_vec(), FinishReason::Stop));
}

#[test]
fn stop_ids_wait_for_min_tokens() {
    let free = greedy_tokens(&[1, 2, 3], 20);
    let stop_ids = vec![free[0], free[1], free[2], free[3]];
    let told = alone(EngineRequest { stop_ids: stop_ids.clone(), min_tokens: 10, ..request(1, &[1, 2, 3], 200) });
    assert!(told.tokens.len() > 10);
    assert!(told.tokens[..10].iter().all(|token| !stop_ids.contains(token)), "{told:?}");
    let at_once = alone(EngineRequest { stop_ids, ..request(1, &[1, 2, 3], 200) });
    assert_eq!(at_once.tokens.len(), 1);
}

#[test]
fn without_stop_ids_the_end_of_sequence_is_a_token_like_any_other() {
    // `ignore_eos`: the host leaves the id out.
    let free = greedy_tokens(&[1, 2, 3], 20);
    assert_eq!(free.len(), 20);
}

#[test]
fn the_last_logprobs_sum_to_one_and_descend() {
    let sampling = SamplingParams { temperature: 1.3, seed: 3, ..SamplingParams::greedy() };
    let told = alone(EngineRequest { sampling, logprobs: Some(97), ..request(1, &[1, 2, 3], 5) });
    for (token, logprobs) in told.tokens.iter().zip(&told.logprobs) {
        let sum: f64 = logprobs.top.iter().map(|top| f64::from(top.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert!(logprobs.top.is_sorted_by(|a, b| a.logprob >= b.logprob));
        let listed = logprobs.top.iter().find(|top| top.token == *token).unwrap();
        assert_eq!(listed.logprob.to_bits(), logprobs.chosen.to_bits());
    }
    assert_eq!(told.logprobs.len(), 5);
}

#[test]
fn choices_differ_and_share_the_prompt() {
    let mut engine = engine(64);
    let prompt: Vec<u32> = (0..80).collect();
    for choice in 0..4 {
        let sampling = SamplingParams { temperature: 1.0, seed: 5, choice, ..SamplingParams::greedy() };
        engine.submit(EngineRequest { sampling, ..request(u64::from(choice), &prompt, 12) }).unwrap();
    }
    let told = drain(&mut engine);
    for (a, b) in [(0, 1), (0, 2), (1, 3), (2, 3)] {
        assert_ne!(told[&RequestId(a)].tokens, told[&RequestId(b)].tokens);
    }
    // 80 tokens once, then two blocks shared and 16 tokens each, and 11 decoded tokens each.
    assert_eq!(engine.model().n_tokens, 80 + 3 * 16 + 4 * 11);
    let cached: Vec<u32> =
        told.values().map(|told| told.end.as_ref().unwrap().as_ref().unwrap().1.cached_tokens).collect();
    assert_eq!(cached, [0, 64, 64, 64]);
}

#[test]
fn bad_logits_fail_their_own_request_only() {
    let model = FakeModel::new(capacity(64)).with_faults(&[Fault::NanFor(9, 6)]);
    let mut engine = LlmEngine::new(model, EngineOptions::default());
    engine.submit(request(1, &[1, 2, 3], 10)).unwrap();
    engine.submit(request(2, &[9, 2, 3], 10)).unwrap();
    let told = drain(&mut engine);
    assert_eq!(told[&RequestId(1)].tokens, greedy_tokens(&[1, 2, 3], 10));
    assert_eq!(told[&RequestId(2)].tokens, greedy_tokens(&[9, 2, 3], 3));
    let error = RequestError::BadLogits { index: 3, token: 0, found: "NaN".into() };
    assert_eq!(told[&RequestId(2)].end, Some(Err(error)));
}

#[test]
fn forbidding_the_whole_vocabulary_fails_the_request() {
    let told = alone(EngineRequest { stop_ids: (0..97).collect(), min_tokens: 1, ..request(1, &[1], 4) });
    assert_eq!(told.end, Some(Err(RequestError::NothingToChoose { index: 0 })));
}

#[test]
fn a_step_that_ran_out_of_memory_is_repeated_without_a_trace() {
    let faults: Vec<Fault> = (0..20).step_by(2).map(Fault::OutOfMemory).collect();
    let mut engine = LlmEngine::new(FakeModel::new(capacity(64)).with_faults(&faults), EngineOptions::default());
    let prompts: [&[u32]; 2] = [&[1, 2, 3], &[7; 40]];
    engine.submit(request(0, prompts[0], 10)).unwrap();
    engine.submit(request(1, prompts[1], 10)).unwrap();
    let (mut told, mut events, mut n_failed) = (BTreeMap::new(), vec![], 0);
    loop {
        match engine.step(&mut events) {
            Ok(report) if report.busy => {}
            Ok(_) => break,
            Err(EngineError::OutOfMemory { requested: 2, free: 1, .. }) => n_failed += 1,
            Err(other) => panic!("{other}"),
        }
        engine.scheduler().check_integrity().unwrap();
    }
    collect(&mut told, &events);
    assert_eq!(n_failed, 10);
    for (id, prompt) in (0..).zip(prompts) {
        assert_eq!(told[&RequestId(id)].tokens, greedy_tokens(prompt, 10));
    }
}

#[test]
fn a_lost_device_is_said_so() {
    let mut engine =
        LlmEngine::new(FakeModel::new(capacity(8)).with_faults(&[Fault::DeviceLost(1)]), EngineOptions::default());
    engine.submit(request(1, &[1], 10)).unwrap();
    engine.step(&mut vec![]).unwrap();
    let error = engine.step(&mut vec![]).unwrap_err();
    assert_eq!(error.to_string(), "device fake failed in run: trap");
    Box::new(engine).teardown();
}

#[test]
fn cancelling_frees_the_blocks_within_a_step() {
    let options = EngineOptions { prefix_cache: false, ..EngineOptions::default() };
    let mut engine = LlmEngine::new(FakeModel::new(capacity(8)), options);
    engine.submit(request(1, &[1; 100], 100)).unwrap();
    engine.submit(request(2, &[2; 10], 100)).unwrap();
    let mut events = vec![];
    engine.step(&mut events).unwrap();
    assert_eq!(engine.stats().kv_blocks_used, 5);
    engine.cancel(RequestId(1));
    engine.cancel(RequestId(99));
    engine.step(&mut events).unwrap();
    assert_eq!((engine.stats().kv_blocks_used, engine.stats().running), (1, 1));
    assert!(
        events.iter().any(|event| matches!(
            event,
            EngineEvent::Finished { id: RequestId(1), reason: FinishReason::Cancelled, .. }
        ))
    );
    engine.cancel(RequestId(1));
    engine.cancel(RequestId(2));
    assert!(!engine.step(&mut events).unwrap().busy);
    assert_eq!(engine.stats().kv_blocks_used, 0);
}

#[test]
fn a_deadline_that_has_passed_ends_the_request() {
    let told = alone(EngineRequest { deadline: Some(Instant::now()), ..request(1, &[1], 10) });
    assert!(told.tokens.is_empty());
    assert_eq!(told.reason(), Some(FinishReason::Deadline));
}

#[test]
fn refusals_leave_nothing_behind() {
    let mut engine = engine(4);
    let too_long = engine.submit(request(1, &[1; 128], 1));
    assert_eq!(too_long, Err(RequestError::ContextExceeded { needed: 129, limit: 128 }));
    assert!(matches!(engine.submit(request(1, &[], 1)), Err(RequestError::InvalidParam { .. })));
    assert!(matches!(engine.submit(request(1, &[97], 1)), Err(RequestError::InvalidParam { .. })));
    engine.submit(request(1, &[1], 2)).unwrap();
    assert_eq!(engine.submit(request(1, &[1], 2)), Err(RequestError::DuplicateId(RequestId(1))));
    assert_eq!(drain(&mut engine).len(), 1);
    engine.submit(request(1, &[1], 2)).expect("the id is free again");
}

#[test]
fn the_counters_count() {
    let mut engine = engine(64);
    engine.submit(request(1, &[1; 70], 5)).unwrap();
    engine.submit(request(2, &[2; 3], 5)).unwrap();
    let mut events = vec![];
    let first = engine.step(&mut events).unwrap();
    assert_eq!((first.n_sequences, first.n_prefill_tokens, first.n_decode_tokens, first.busy), (2, 73, 0, true));
    let second = engine.step(&mut events).unwrap();
    assert_eq!((second.n_sequences, second.n_prefill_tokens, second.n_decode_tokens), (2, 0, 2));
    drain(&mut engine);
    let stats = engine.stats();
    assert_eq!((stats.steps, stats.prefill_tokens, stats.decode_tokens), (5, 73, 10));
    assert_eq!((stats.kv_blocks_used, stats.kv_blocks_cached, stats.kv_blocks_total), (2, 2, 64));
    assert_eq!((stats.prefix_queries, stats.prefix_hits), (73, 0));
    assert_eq!((stats.weight_bytes, stats.kv_bytes, stats.scratch_bytes), (1, 2, 3));
    assert_eq!(engine.drop_prefix_cache(), 2);
    assert_eq!(engine.stats().kv_blocks_used, 0);
}

#[test]
fn a_higher_priority_goes_first() {
    let options = EngineOptions { max_sequences: 1, ..EngineOptions::default() };
    let mut engine = LlmEngine::new(FakeModel::new(capacity(8)), options);
    engine.submit(request(1, &[1], 1)).unwrap();
    engine.submit(EngineRequest { priority: 1, ..request(2, &[1], 1) }).unwrap();
    let mut events = vec![];
    while engine.step(&mut events).unwrap().busy {}
    let ends: Vec<RequestId> = events
        .iter()
        .filter_map(|event| if let EngineEvent::Finished { id, .. } = event { Some(*id) } else { None })
        .collect();
    assert_eq!(ends, [RequestId(2), RequestId(1)]);
}
