//! Properties of the scheduler under random requests, cancellations, deadlines and pool sizes, and a few exact plans.
//!
//! The model is a few lines: it keeps what each slot holds, checks that every position of a sequence holds that sequence's
//! token when it is computed, and chooses the next token by a hash of all of them.

use super::*;
use playhouse_actors::engine::{SamplingParams, Task};
use proptest::prelude::*;
use std::time::Duration;

fn request(id: u64, prompt: Vec<u32>, max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: Task::Generate,
        prompt,
        emitted: vec![],
        sampling: SamplingParams::greedy(),
        max_tokens,
        min_tokens: 0,
        stop_ids: vec![],
        logprobs: None,
        constraint: None,
        priority: 0,
        deadline: None,
    }
}

fn limits(n_kv_blocks: usize) -> SchedulerLimits {
    SchedulerLimits {
        n_ctx: 512,
        n_kv_blocks,
        max_batch_tokens: 64,
        max_sequences: 8,
        prefill_chunk: 48,
        prefix_cache: true,
    }
}

/// A scheduler with its toy model, and everything that must hold of them.
struct Rig {
    scheduler: Scheduler,
    /// What each slot holds: position and token.
    slots: HashMap<u32, (usize, u32)>,
    now: Instant,
    /// Steps left in which the model does not run, as after an out-of-memory error.
    n_failing_steps: u32,
    ended: HashMap<RequestId, FinishReason>,
    outputs: HashMap<RequestId, Vec<u32>>,
    n_preempted: u32,
}

impl Rig {
    fn new(limits: SchedulerLimits) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            slots: HashMap::new(),
            now: Instant::now(),
            n_failing_steps: 0,
            ended: HashMap::new(),
            outputs: HashMap::new(),
            n_preempted: 0,
        }
    }

    fn step(&mut self) -> StepPlan {
        let plan = self.scheduler.plan(self.now);
        self.n_preempted += plan.n_preempted;
        self.check_plan(&plan);
        self.note_ended(&plan.ended);
        if self.n_failing_steps > 0 {
            self.n_failing_steps -= 1;
        } else {
            let outcomes = self.compute(&plan);
            let ended = self.scheduler.commit(&plan, &outcomes);
            self.note_ended(&ended);
        }
        self.scheduler.check_integrity().unwrap();
        plan
    }

    fn check_plan(&self, plan: &StepPlan) {
        let limits = self.scheduler.limits;
        assert!(plan.work.iter().map(|work| work.n_tokens).sum::<usize>() <= limits.max_batch_tokens);
        assert!(plan.work.len() <= limits.max_sequences);
        let mut written = std::collections::HashSet::new();
        for work in &plan.work {
            let sequence = self.scheduler.sequence(work.key);
            assert!(
                sequence.request().deadline.is_none_or(|deadline| self.now < deadline),
                "no step after the deadline"
            );
            assert!(work.n_tokens >= 1 && (work.n_tokens <= limits.prefill_chunk));
            for position in work.first..work.first + work.n_tokens {
                assert!(written.insert(sequence.table().slot(position)), "a slot is written twice in a step");
            }
        }
        self.scheduler.check_integrity().unwrap();
    }

    fn compute(&mut self, plan: &StepPlan) -> Vec<Outcome> {
        for work in &plan.work {
            let sequence = self.scheduler.sequence(work.key);
            for position in work.first..work.first + work.n_tokens {
                self.slots.insert(sequence.table().slot(position), (position, sequence.tokens()[position]));
            }
        }
        let mut outcomes = Vec::new();
        for work in &plan.work {
            let sequence = self.scheduler.sequence(work.key);
            for (position, &token) in sequence.tokens()[..work.first + work.n_tokens].iter().enumerate() {
                assert_eq!(self.slots[&sequence.table().slot(position)], (position, token), "another's keys");
            }
            if work.chooses {
                let token = next_token(sequence.tokens());
                // Prompts that begin with 13 make the model fail at a place that depends on the text.
                let fails = sequence.tokens()[0] == 13 && token.is_multiple_of(5);
                outcomes.push(if fails { Outcome::Without } else { Outcome::Token(token) });
                let id = sequence.request().id;
                if fails {
                    assert!(!self.ended.contains_key(&id), "an end after the end");
                    self.ended.insert(id, FinishReason::Stop);
                } else {
                    self.outputs.entry(id).or_default().push(token);
                }
            }
        }
        outcomes
    }

    fn note_ended(&mut self, ended: &[Ended]) {
        for end in ended {
            assert!(self.ended.insert(end.id, end.reason).is_none(), "{:?} ended twice", end.id);
            let n_out = self.outputs.get(&end.id).map_or(0, Vec::len);
            assert_eq!(end.usage.completion_tokens as usize, n_out);
        }
    }

    /// Steps until all is done.
    fn drain(&mut self) {
        let mut n_idle = 0;
        while self.scheduler.is_busy() {
            let before = (self.ended.len(), self.outputs.values().map(Vec::len).sum::<usize>());
            let plan = self.step();
            let after = (self.ended.len(), self.outputs.values().map(Vec::len).sum::<usize>());
            assert!(!plan.work.is_empty() || after != before || plan.n_preempted > 0, "a step without work");
            // The longest prompt of the tests takes fewer chunks than this.
            n_idle = if before == after { n_idle + 1 } else { 0 };
            assert!(n_idle < 600, "no token and no end in {n_idle} steps");
        }
        let kv = self.scheduler.kv();
        assert_eq!(kv.n_available(), kv.n_total(), "a block leaked");
    }
}

fn next_token(tokens: &[u32]) -> u32 {
    (crate::engine::kv::chain_hash(None, tokens) % 50) as u32
}

/// What the toy model says after `prompt`, without any scheduler.
fn expected(request: &EngineRequest, n_limit: usize) -> Vec<u32> {
    let mut tokens = request.prompt.clone();
    let mut output = Vec::new();
    while output.len() < request.max_tokens as usize && tokens.len() < n_limit {
        let token = next_token(&tokens);
        if tokens[0] == 13 && token.is_multiple_of(5) {
            break;
        }
        tokens.push(token);
        output.push(token);
        if request.stop_ids.contains(&token) {
            break;
        }
    }
    output
}

#[derive(Debug, Clone)]
enum Act {
    Submit { n_prompt: usize, first: u32, family: u32, max_tokens: u32, priority: i32, stop: bool, ttl: Option<u64> },
    Cancel(u64),
    Step(u32),
    Fail,
    DropCache,
}

fn any_act() -> impl Strategy<Value = Act> {
    let submit = (1usize..140, 10u32..14, 0u32..3, 0u32..60, -1i32..2, any::<bool>(), prop::option::of(0u64..40))
        .prop_map(|(n_prompt, first, family, max_tokens, priority, stop, ttl)| Act::Submit {
            n_prompt,
            first,
            family,
            max_tokens,
            priority,
            stop,
            ttl,
        });
    prop_oneof![
        4 => submit,
        1 => (0u64..30).prop_map(Act::Cancel),
        4 => (1u32..12).prop_map(Act::Step),
        1 => Just(Act::Fail),
        1 => Just(Act::DropCache),
    ]
}

fn any_limits() -> impl Strategy<Value = SchedulerLimits> {
    (1usize..24, 1usize..9, 0usize..60, 1usize..80, any::<bool>(), 20usize..300).prop_map(
        |(n_kv_blocks, max_sequences, more_tokens, prefill_chunk, prefix_cache, n_ctx)| SchedulerLimits {
            n_ctx,
            n_kv_blocks,
            max_batch_tokens: max_sequences + more_tokens,
            max_sequences,
            prefill_chunk,
            prefix_cache,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// No block leaked, none used by two unless shared, every request ends exactly once, and with the tokens it has alone.
    #[test]
    fn requests_end_once_with_their_own_tokens(limits in any_limits(), acts in prop::collection::vec(any_act(), 1..40)) {
        let mut rig = Rig::new(limits);
        let mut accepted: Vec<EngineRequest> = Vec::new();
        for (id, act) in (0u64..).zip(acts) {
            match act {
                Act::Submit { n_prompt, first, family, max_tokens, priority, stop, ttl } => {
                    // Families share their beginnings, so that blocks are shared too.
                    let mut prompt: Vec<u32> = (0..n_prompt as u32).map(|i| (i * (family + 1)) % 50).collect();
                    prompt[0] = first;
                    let request = EngineRequest {
                        priority,
                        stop_ids: if stop { vec![7] } else { vec![] },
                        deadline: ttl.map(|ttl| rig.now + Duration::from_millis(ttl)),
                        ..request(id, prompt, max_tokens)
                    };
                    match rig.scheduler.submit(request.clone()) {
                        Ok(()) => accepted.push(request),
                        Err(RequestError::ContextExceeded { .. }) => {
                            prop_assert!(request.prompt.len() + 1 > rig.scheduler.n_limit());
                        }
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                Act::Cancel(id) => rig.scheduler.cancel(RequestId(id)),
                Act::Step(n) => for _ in 0..n {
                    rig.step();
                    rig.now += Duration::from_millis(1);
                },
                Act::Fail => rig.n_failing_steps = 1,
                Act::DropCache => drop(rig.scheduler.drop_prefix_cache()),
            }
        }
        rig.n_failing_steps = 0;
        rig.drain();
        prop_assert_eq!(rig.ended.len(), accepted.len());
        for request in accepted {
            let output = rig.outputs.remove(&request.id).unwrap_or_default();
            let alone = expected(&request, rig.scheduler.n_limit());
            match rig.ended[&request.id] {
                FinishReason::Stop | FinishReason::Length => prop_assert_eq!(output, alone),
                FinishReason::Cancelled | FinishReason::Deadline => prop_assert!(alone.starts_with(&output)),
            }
        }
    }
}

#[test]
fn decodes_come_before_prompts_and_prompts_share_what_is_left() {
    let mut rig = Rig::new(limits(100));
    rig.scheduler.submit(request(1, vec![1; 10], 100)).unwrap();
    rig.step();
    rig.scheduler.submit(request(2, vec![2; 100], 100)).unwrap();
    rig.scheduler.submit(request(3, vec![3; 100], 100)).unwrap();
    let sizes = |plan: StepPlan| plan.work.iter().map(|work| work.n_tokens).collect::<Vec<_>>();
    assert_eq!(sizes(rig.step()), [1, 48, 15], "a chunk of 48, then the rest of the 64");
    assert_eq!(sizes(rig.step()), [1, 48, 15]);
    assert_eq!(sizes(rig.step()), [1, 4, 48]);
    assert_eq!(sizes(rig.step()), [1, 1, 22]);
    assert_eq!(sizes(rig.step()), [1, 1, 1]);
}

#[test]
fn the_youngest_is_preempted_and_keeps_its_place() {
    let mut rig = Rig::new(SchedulerLimits { prefix_cache: false, ..limits(4) });
    for id in 1..=3 {
        rig.scheduler.submit(request(id, vec![id as u32; 20], 60)).unwrap();
    }
    let mut order = Vec::new();
    while rig.scheduler.is_busy() {
        rig.step();
        let mut ended: Vec<RequestId> = rig.ended.keys().copied().filter(|id| !order.contains(id)).collect();
        ended.sort_unstable();
        order.extend(ended);
    }
    assert!(rig.n_preempted > 0);
    assert_eq!(order, [RequestId(1), RequestId(2), RequestId(3)]);
}

#[test]
fn higher_priority_is_admitted_first() {
    let mut rig = Rig::new(SchedulerLimits { max_sequences: 1, ..limits(10) });
    rig.scheduler.submit(request(1, vec![1], 1)).unwrap();
    rig.scheduler.submit(EngineRequest { priority: 5, ..request(2, vec![2], 1) }).unwrap();
    rig.step();
    assert_eq!(rig.ended.keys().copied().collect::<Vec<_>>(), [RequestId(2)]);
}

#[test]
fn choices_of_one_prompt_share_its_blocks() {
    let mut rig = Rig::new(limits(100));
    let prompt: Vec<u32> = (0..100).collect();
    for id in 0..4 {
        rig.scheduler.submit(request(id, prompt.clone(), 8)).unwrap();
    }
    let mut n_computed = 0;
    while rig.scheduler.is_busy() {
        n_computed += rig.step().work.iter().map(|work| work.n_tokens).sum::<usize>();
    }
    // The prompt once, its last 4 tokens for each of the others, 7 decoded tokens each.
    assert_eq!(n_computed, 100 + 3 * 4 + 4 * 7);
    assert_eq!(rig.scheduler.prefix_stats(), PrefixStats { queries: 400, hits: 3 * 96 });
}

#[test]
fn cancelled_blocks_are_free_after_the_next_step() {
    let mut rig = Rig::new(SchedulerLimits { prefix_cache: false, ..limits(10) });
    rig.scheduler.submit(request(1, vec![1; 40], 100)).unwrap();
    rig.step();
    assert_eq!(rig.scheduler.kv().n_free(), 8);
    rig.scheduler.cancel(RequestId(1));
    rig.step();
    assert_eq!(rig.ended[&RequestId(1)], FinishReason::Cancelled);
    assert_eq!(rig.scheduler.kv().n_free(), 10);
}

#[test]
fn a_deadline_ends_waiting_and_running_requests() {
    let mut rig = Rig::new(SchedulerLimits { max_sequences: 1, ..limits(10) });
    let deadline = Some(rig.now + Duration::from_secs(1));
    for id in 1..=2 {
        rig.scheduler.submit(EngineRequest { deadline, ..request(id, vec![1; 4], 100) }).unwrap();
    }
    rig.step();
    assert!(rig.ended.is_empty());
    rig.now += Duration::from_secs(1);
    rig.step();
    assert_eq!(rig.ended[&RequestId(1)], FinishReason::Deadline);
    assert_eq!(rig.ended[&RequestId(2)], FinishReason::Deadline);
}

#[test]
fn refusals_are_typed() {
    let mut scheduler = Scheduler::new(limits(2));
    assert_eq!(scheduler.n_limit(), 64, "the pool is smaller than the context");
    scheduler.submit(request(1, vec![0; 63], 1000)).unwrap();
    assert_eq!(scheduler.submit(request(1, vec![0], 1)), Err(RequestError::DuplicateId(RequestId(1))));
    let refused = scheduler.submit(request(2, vec![0; 64], 1));
    assert_eq!(refused, Err(RequestError::ContextExceeded { needed: 65, limit: 64 }));
}

#[test]
fn a_resumed_request_that_was_complete_ends_without_a_step() {
    let mut rig = Rig::new(limits(10));
    let stopped = EngineRequest { emitted: vec![4, 9], stop_ids: vec![9], ..request(1, vec![1], 100) };
    let full = EngineRequest { emitted: vec![4, 9], ..request(2, vec![1], 2) };
    rig.outputs = [(RequestId(1), vec![4, 9]), (RequestId(2), vec![4, 9])].into();
    rig.scheduler.submit(stopped).unwrap();
    rig.scheduler.submit(full).unwrap();
    assert!(rig.step().work.is_empty());
    assert_eq!((rig.ended[&RequestId(1)], rig.ended[&RequestId(2)]), (FinishReason::Stop, FinishReason::Length));
}
