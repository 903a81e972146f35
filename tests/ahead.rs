//! The engine a step ahead of a model that runs its steps as late as it may: the same bytes as one step at a time, whatever happens
//! between a step's beginning and its end.

mod engine_support;

use engine_support::delayed::Delayed;
use engine_support::{FakeModel, Fault, Told, capacity, collect, drain, request};
use playhouse::engine::{Constrain, Constrainer, EngineOptions, LlmEngine, StepCapacity, StepModel, TokenMask};
use playhouse_actors::engine::{
    Constraint, Engine, EngineError, EngineEvent, EngineRequest, FinishReason, RequestError, RequestId, SamplingParams,
    Task,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Allows about two thirds of the vocabulary, which ones depends on all tokens so far; gives up after a number of tokens that the
/// constraint says.
struct Toy;

struct ToyText {
    state: u64,
    left: u32,
}

fn mix(state: u64, token: u32) -> u64 {
    (state ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

impl Constrainer for Toy {
    fn start(&self, how: &Constraint, _: &[u32], emitted: &[u32]) -> Result<Box<dyn Constrain>, RequestError> {
        let Constraint::Regex(left) = how else { panic!("{how:?}") };
        let state = emitted.iter().fold(7, |state, token| mix(state, *token));
        Ok(Box::new(ToyText { state, left: left.parse::<u32>().unwrap() - emitted.len() as u32 }))
    }
}

impl Constrain for ToyText {
    fn mask(&mut self, n_vocab: usize) -> Result<TokenMask, RequestError> {
        if self.left == 0 {
            return Err(RequestError::OutOfMemory("the toy's limit".into()));
        }
        let mut mask = TokenMask::none(n_vocab);
        (0..n_vocab as u32)
            .filter(|token| !mix(self.state, *token).is_multiple_of(3))
            .for_each(|token| mask.allow(token));
        Ok(mask)
    }

    fn push(&mut self, token: u32) -> Result<(), RequestError> {
        assert!(!mix(self.state, token).is_multiple_of(3), "{token} was not allowed");
        (self.state, self.left) = (mix(self.state, token), self.left - 1);
        Ok(())
    }
}

const NAN: Fault = Fault::NanFor(9, 40);

fn ahead(n_kv_blocks: usize, options: EngineOptions) -> LlmEngine<Delayed> {
    let model = Delayed::new(FakeModel::new(capacity(n_kv_blocks)).with_faults(&[NAN]));
    LlmEngine::new(model, options).with_constrainer(Box::new(Toy))
}

/// What a request gives by itself, one step at a time, its tokens chosen by the engine.
fn alone(request: EngineRequest) -> Told {
    let model = FakeModel::new(capacity(64)).with_faults(&[NAN]);
    let mut engine = LlmEngine::new(model, EngineOptions::default()).with_constrainer(Box::new(Toy));
    let id = request.id;
    engine.submit(request).unwrap();
    drain(&mut engine).remove(&id).unwrap()
}

#[derive(Debug, Clone)]
enum Act {
    Submit(Box<EngineRequest>),
    Cancel(u64),
    Step(u32),
    DropCache,
}

fn any_request() -> impl Strategy<Value = EngineRequest> {
    let sampling = (any::<[bool; 4]>(), 0u64..50).prop_map(|([warm, penalised, seen, cut], seed)| SamplingParams {
        logit_bias: if cut { vec![(3, 2.0), (5, -1.0), (3, 0.5)] } else { vec![] },
        repetition_penalty: if penalised { 1.3 } else { 1.0 },
        frequency_penalty: if seen { 0.7 } else { 0.0 },
        presence_penalty: if penalised && seen { 0.4 } else { 0.0 },
        temperature: if warm { 0.9 } else { 0.0 },
        top_p: if cut { 0.9 } else { 1.0 },
        seed,
        ..SamplingParams::greedy()
    });
    let rest = (1usize..100, 5u32..14, 0u32..50, any::<[bool; 4]>(), prop::option::of(3u32..30), -1i32..2, 0usize..12);
    (sampling, rest).prop_map(|(sampling, (n_prompt, first, max_tokens, flags, held, priority, n_emitted))| {
        let [stops, reports, embeds, resumes] = flags;
        let mut prompt: Vec<u32> = (0..n_prompt as u32).map(|i| i * 7 % 90).collect();
        prompt[0] = first;
        EngineRequest {
            task: if embeds && stops && reports { Task::Embed } else { Task::Generate },
            emitted: if resumes && !embeds { (0..n_emitted as u32).map(|i| 60 + i % 5).collect() } else { vec![] },
            sampling,
            min_tokens: max_tokens / 4,
            stop_ids: if stops { (10..16).collect() } else { vec![] },
            logprobs: reports.then_some(2),
            constraint: held.filter(|_| first % 2 == 0).map(|n| Constraint::Regex((n + 12).to_string())),
            priority,
            ..request(0, &prompt, max_tokens.max(n_emitted as u32))
        }
    })
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => any_request().prop_map(|request| Act::Submit(Box::new(request))),
        1 => (0u64..30).prop_map(Act::Cancel),
        4 => (1u32..12).prop_map(Act::Step),
        1 => Just(Act::DropCache),
    ]
}

/// Steps once; a step that finds no memory is stepped again by the next.
fn step(engine: &mut LlmEngine<Delayed>, events: &mut Vec<EngineEvent>) -> bool {
    let busy = match engine.step(events) {
        Ok(report) => report.busy,
        Err(EngineError::OutOfMemory { .. }) => true,
        Err(other) => panic!("{other}"),
    };
    engine.scheduler().check_integrity().unwrap();
    busy
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_request_gets_the_bytes_it_has_alone(
        (n_kv_blocks, max_sequences, prefill_chunk) in (5usize..24, 1usize..9, 1usize..80),
        (step_ahead, prefix_cache, leaves_logprobs) in (prop::bool::weighted(0.8), any::<bool>(), any::<bool>()),
        (refused, failing) in (prop::collection::vec(0u64..200, 0..6), prop::collection::vec(0u64..200, 0..6)),
        acts in prop::collection::vec(any_act(), 1..40),
    ) {
        let capacity = StepCapacity { n_kv_blocks, max_batch_tokens: 8 + prefill_chunk, max_logit_rows: 8 };
        let mut faults: Vec<Fault> = failing.into_iter().map(Fault::OutOfMemory).collect();
        faults.push(NAN);
        let mut model = Delayed::new(FakeModel::new(capacity).with_faults(&faults));
        (model.refused, model.leaves_logprobs) = (refused, leaves_logprobs);
        let options = EngineOptions { max_sequences, prefill_chunk, prefix_cache, step_ahead };
        let mut engine = LlmEngine::new(model, options).with_constrainer(Box::new(Toy));
        let mut accepted: BTreeMap<RequestId, EngineRequest> = BTreeMap::new();
        let mut events = Vec::new();
        for (id, act) in (0u64..).zip(acts) {
            match act {
                Act::Submit(request) => {
                    let request = EngineRequest { id: RequestId(id), ..*request };
                    match engine.submit(request.clone()) {
                        Ok(()) => _ = accepted.insert(request.id, request),
                        Err(RequestError::ContextExceeded { .. }) => {}
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                Act::Cancel(id) => {
                    let is_alive = accepted.contains_key(&RequestId(id)) && !has_ended(&events, RequestId(id));
                    engine.cancel(RequestId(id));
                    step(&mut engine, &mut events);
                    prop_assert!(!is_alive || has_ended(&events, RequestId(id)), "it ends with the next step");
                }
                Act::Step(n) => {
                    for _ in 0..n {
                        step(&mut engine, &mut events);
                    }
                }
                Act::DropCache => _ = engine.drop_prefix_cache(),
            }
        }
        let mut n_steps = 0;
        while step(&mut engine, &mut events) {
            n_steps += 1;
            prop_assert!(n_steps < 20_000, "the engine does not come to its end");
        }
        let kv = engine.scheduler().kv();
        prop_assert_eq!(kv.n_available(), kv.n_total(), "a block leaked");
        prop_assert!(engine.model().most <= 1 + usize::from(step_ahead));
        let mut told = BTreeMap::new();
        collect(&mut told, &events);
        prop_assert_eq!(told.len(), accepted.len());
        for (id, request) in accepted {
            let (found, expected) = (&told[&id], alone_with(&request, engine.scheduler().n_limit()));
            if found.reason() == Some(FinishReason::Cancelled) {
                prop_assert!(expected.tokens.starts_with(&found.tokens), "{:?}", request);
                continue;
            }
            prop_assert_eq!(&found.tokens, &expected.tokens, "{:?}", request);
            prop_assert_eq!(found.bits(), expected.bits(), "{:?}", request);
            // Bits, because the fake's fault makes a NaN of an embedding, too.
            let bits = |told: &Told| told.embedding.as_ref().map(|values| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
            prop_assert_eq!(bits(found), bits(&expected));
            let end = |told: &Told| told.end.clone().map(|end| end.map(|(reason, usage)| (reason, usage.completion_tokens)));
            prop_assert_eq!(end(found), end(&expected), "{:?}", request);
        }
    }
}

fn has_ended(events: &[EngineEvent], wanted: RequestId) -> bool {
    events.iter().any(|event| match event {
        EngineEvent::Finished { id, .. } | EngineEvent::Failed { id, .. } | EngineEvent::Embedded { id, .. } => {
            *id == wanted
        }
        EngineEvent::Token { .. } => false,
    })
}

/// Alone, where a sequence may have as many tokens as in the pool of the test.
fn alone_with(request: &EngineRequest, n_limit: usize) -> Told {
    let room = (n_limit - request.prompt.len()) as u32;
    alone(EngineRequest { max_tokens: request.max_tokens.min(room), ..request.clone() })
}

fn steps(engine: &mut LlmEngine<Delayed>, events: &mut Vec<EngineEvent>, n: usize) {
    for _ in 0..n {
        engine.step(events).unwrap();
    }
}

fn tokens_of(events: &[EngineEvent], wanted: u64) -> Vec<u32> {
    let token = |event: &EngineEvent| match event {
        EngineEvent::Token { id, token, .. } if id.0 == wanted => Some(*token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

#[test]
fn the_next_step_begins_before_the_last_one_is_known() {
    let mut engine = ahead(64, EngineOptions::default());
    engine.submit(request(1, &[1, 2, 3], 20)).unwrap();
    let mut events = vec![];
    for n in 1..=20 {
        engine.step(&mut events).unwrap();
        assert_eq!(tokens_of(&events, 1).len(), n, "each call settles a step");
    }
    assert_eq!((engine.model().most, engine.model().n_fed), (2, 19));
    assert_eq!(engine.model().fake.n_tokens, 3 + 19, "its length is known beforehand: no row is wasted");
    assert_eq!(tokens_of(&events, 1), alone(request(1, &[1, 2, 3], 20)).tokens);
}

#[test]
fn without_the_option_nothing_is_under_way_between_calls() {
    let mut engine = ahead(64, EngineOptions { step_ahead: false, ..EngineOptions::default() });
    engine.submit(request(1, &[1, 2, 3], 20)).unwrap();
    let told = drain(&mut engine);
    assert_eq!((engine.model().most, engine.model().n_fed), (1, 0));
    assert_eq!(told[&RequestId(1)].tokens, alone(request(1, &[1, 2, 3], 20)).tokens);
}

#[test]
fn a_stop_wastes_one_row_and_its_id_can_come_again() {
    let free = alone(request(1, &[1, 2, 3], 30)).tokens;
    let n = free.iter().position(|token| *token == free[6]).unwrap() + 1;
    let stopping = EngineRequest { stop_ids: vec![free[6]], ..request(1, &[1, 2, 3], 30) };
    let mut engine = ahead(64, EngineOptions { prefix_cache: false, ..EngineOptions::default() });
    engine.submit(stopping.clone()).unwrap();
    let mut events = vec![];
    while engine.step(&mut events).unwrap().busy {}
    assert_eq!(tokens_of(&events, 1), free[..n]);
    assert_eq!(engine.stats().kv_blocks_used, 0, "its blocks are free though the wasted row is under way");
    // The same id again, with other tokens, while that row is still to come.
    engine.submit(request(1, &[4, 4], 5)).unwrap();
    let told = drain(&mut engine);
    assert_eq!(told[&RequestId(1)].tokens, alone(request(1, &[4, 4], 5)).tokens);
    assert_eq!(engine.model().fake.n_tokens as usize, 3 + n + 2 + 4, "one row more than were wanted");
}

#[test]
fn a_cancelled_sequence_frees_its_blocks_with_the_next_step_though_it_is_in_one() {
    let mut engine = ahead(8, EngineOptions { prefix_cache: false, ..EngineOptions::default() });
    engine.submit(request(1, &[1; 100], 100)).unwrap();
    engine.submit(request(2, &[2; 10], 100)).unwrap();
    let mut events = vec![];
    steps(&mut engine, &mut events, 3);
    engine.cancel(RequestId(1));
    let before = events.len();
    engine.step(&mut events).unwrap();
    assert_eq!((engine.stats().kv_blocks_used, engine.stats().running), (1, 1));
    assert!(matches!(events[before], EngineEvent::Finished { id: RequestId(1), reason: FinishReason::Cancelled, .. }));
    // Somebody else gets the blocks while the old rows are still under way.
    engine.submit(request(3, &[3; 90], 20)).unwrap();
    while engine.step(&mut events).unwrap().busy {}
    let mut told = BTreeMap::new();
    collect(&mut told, &events);
    for (id, prompt, n) in [(2, vec![2; 10], 100), (3, vec![3; 90], 20)] {
        assert_eq!(told[&RequestId(id)].tokens, alone(request(id, &prompt, n)).tokens);
    }
}

#[test]
fn a_sequence_that_is_held_to_a_form_sits_out_every_other_step_of_a_company() {
    let held = |id| EngineRequest { constraint: Some(Constraint::Regex("1000".into())), ..request(id, &[2, 2], 12) };
    let counts = |n_free: u64, n_held: u64, n_steps: usize| {
        let mut engine = ahead(64, EngineOptions::default());
        (0..n_free).for_each(|id| engine.submit(request(id, &[1, id as u32], 100)).unwrap());
        (n_free..n_free + n_held).for_each(|id| engine.submit(held(id)).unwrap());
        let mut events = vec![];
        steps(&mut engine, &mut events, n_steps);
        let all: Vec<usize> = (0..n_free + n_held).map(|id| tokens_of(&events, id).len()).collect();
        (all, engine.model().most)
    };
    assert_eq!(counts(0, 2, 10), (vec![10, 10], 1), "by themselves they are in step with the host");
    assert_eq!(counts(1, 1, 10), (vec![10, 10], 1), "half of the company waits for the other half");
    assert_eq!(counts(3, 1, 10), (vec![10, 10, 10, 5], 2), "a few do not hold up the rest");
    let mut engine = ahead(64, EngineOptions::default());
    (0..3).for_each(|id| engine.submit(request(id, &[1, id as u32], 30)).unwrap());
    engine.submit(held(3)).unwrap();
    assert_eq!(drain(&mut engine)[&RequestId(3)].tokens, alone(held(3)).tokens);
}

#[test]
fn what_is_preempted_while_its_token_is_chosen_keeps_the_token() {
    let mut engine = ahead(6, EngineOptions { prefix_cache: false, ..EngineOptions::default() });
    for id in 0..4 {
        engine.submit(request(id, &[id as u32 + 1; 20], 90)).unwrap();
    }
    let told = drain(&mut engine);
    assert!(engine.stats().preemptions > 0);
    for id in 0..4 {
        assert_eq!(told[&RequestId(id)].tokens, alone(request(id, &[id as u32 + 1; 20], 90)).tokens);
    }
}

#[test]
fn a_step_that_finds_no_memory_is_repeated_and_so_is_what_built_on_it() {
    for (refused, failing) in [(vec![3, 4, 9], vec![]), (vec![], vec![3, 9]), (vec![5], vec![5, 6, 7])] {
        let faults: Vec<Fault> = failing.iter().copied().map(Fault::OutOfMemory).collect();
        let mut model = Delayed::new(FakeModel::new(capacity(64)).with_faults(&faults));
        model.refused = refused.clone();
        let mut engine = LlmEngine::new(model, EngineOptions::default());
        let penalised = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::greedy() };
        let requests = [request(0, &[1, 2, 3], 15), EngineRequest { sampling: penalised, ..request(1, &[7; 40], 15) }];
        requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
        let (mut events, mut n_failed) = (vec![], 0);
        loop {
            match engine.step(&mut events) {
                Ok(report) if report.busy => {}
                Ok(_) => break,
                Err(EngineError::OutOfMemory { requested: 2, free: 1, .. }) => n_failed += 1,
                Err(other) => panic!("{other}"),
            }
            engine.scheduler().check_integrity().unwrap();
        }
        assert!(n_failed >= refused.len().max(failing.len()) - 1, "{n_failed}");
        for request in requests {
            assert_eq!(tokens_of(&events, request.id.0), alone(request).tokens);
        }
    }
}

#[test]
fn a_lost_device_is_said_so_after_what_was_known() {
    let model = Delayed::new(FakeModel::new(capacity(8)).with_faults(&[Fault::DeviceLost(2)]));
    let mut engine = LlmEngine::new(model, EngineOptions::default());
    engine.submit(request(1, &[1], 10)).unwrap();
    let mut events = vec![];
    engine.step(&mut events).unwrap();
    engine.step(&mut events).unwrap();
    assert_eq!(tokens_of(&events, 1).len(), 2);
    assert_eq!(engine.step(&mut events).unwrap_err().to_string(), "device fake failed in run: trap");
    Box::new(engine).teardown();
}

#[test]
fn a_step_for_the_host_waits_for_those_under_way() {
    let mut engine = ahead(64, EngineOptions::default());
    engine.submit(request(1, &[1, 2, 3], 20)).unwrap();
    let mut events = vec![];
    steps(&mut engine, &mut events, 4);
    engine.submit(EngineRequest { task: Task::Embed, ..request(2, &[5, 6, 7], 1) }).unwrap();
    while engine.step(&mut events).unwrap().busy {}
    let mut told = BTreeMap::new();
    collect(&mut told, &events);
    assert_eq!(told[&RequestId(1)].tokens, alone(request(1, &[1, 2, 3], 20)).tokens);
    let embedded = alone(EngineRequest { task: Task::Embed, ..request(2, &[5, 6, 7], 1) });
    assert_eq!(told[&RequestId(2)].embedding, embedded.embedding);
    assert!(engine.model().n_vocab() == 97 && engine.model().n_fed > 10);
}
