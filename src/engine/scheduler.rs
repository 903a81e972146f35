//! Decides what each step computes. Pure: no clock, no locks, no device; time is passed in.
//!
//! A step is [`Scheduler::plan`], then the model, then [`Scheduler::commit`]. Between the two nothing is lost: a plan that
//! was not carried out is simply made again. [`Scheduler::begin`] says that a plan is being carried out; the next one builds on it
//! before it is committed, without knowing the tokens that it chooses. So a device has a step to do while the host settles the
//! one before:
//!
//! ```text
//! plan 1, begin 1, plan 2, begin 2, commit 1, plan 3, begin 3, commit 2 ...
//! ```
//!
//! - A sequence that turns out to have ended in step 1 has a row in step 2 that nobody wants. Its blocks are free at once: the device
//!   runs one step after the other, and whoever gets them writes them in step 3.
//! - One that is held to a form sits out every other step, because what may follow a token is known when the token is. Where half of the
//!   running sequences or more would sit out, the plan is empty: all take part in the step after.
//! - One that is preempted while it is in a step keeps the token which that step chooses.
//!
//! The rules, in the order of the queue (higher priority first, then arrival):
//!
//! - Cancelled and expired sequences end first; their blocks are free for the same step.
//! - Every running sequence whose tokens are all computed but the last takes one token of the step's budget. What is left goes
//!   to prompts, at most `prefill_chunk` tokens each.
//! - Where blocks run out, idle blocks of the prefix cache are evicted, then the last running sequence of the queue is preempted:
//!   it gives its blocks back, keeps its place, and is computed again later.
//! - A waiting sequence is admitted when its tokens and everything that running sequences still need fit together. The queue is
//!   not overtaken for want of blocks. One that could share a block which a running sequence is about to compute waits for
//!   it: that is how the `n` choices of a request share their prompt.
//!
//! The first sequence of the queue always gets its blocks, because a sequence never has more tokens than the pool: every
//! request ends.

use super::kv::{FoundPrefix, IntegrityError, KvCache, blocks_for};
use super::sequence::{Phase, QueueKey, Sequence};
use crate::backend::BLOCK_TOKENS;
use playhouse_actors::engine::{EngineRequest, FinishReason, RequestError, RequestId, Usage};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

/// What the scheduler works within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Most tokens a sequence may have.
    pub n_ctx: usize,
    /// KV blocks in all.
    pub n_kv_blocks: usize,
    /// Most tokens in one step.
    pub max_batch_tokens: usize,
    /// Most sequences that run at once; at most `max_batch_tokens`.
    pub max_sequences: usize,
    /// Most tokens of one prompt in one step.
    pub prefill_chunk: usize,
    /// Whether full blocks are kept for later requests with the same beginning.
    pub prefix_cache: bool,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub key: QueueKey,
    /// Index of the first of its tokens to compute.
    pub first: usize,
    /// How many.
    pub n_tokens: usize,
    /// Whether they include its last token, so that the next is chosen.
    pub chooses: bool,
    /// Row of the step before which chooses its last token, if the host does not know that yet.
    pub feed: Option<u32>,
    /// Times that the sequence had been preempted.
    term: u32,
}

/// A sequence that ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The request.
    pub id: RequestId,
    /// Why.
    pub reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// What a step does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Sequences that ended before the step: cancelled, expired, or resumed when they were complete.
    pub ended: Vec<Ended>,
    /// Who takes part.
    pub work: Vec<Work>,
    /// Sequences sent back to the queue.
    pub n_preempted: u32,
}

/// What became of a sequence whose next token was to be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// This token.
    Token(u32),
    /// None: the sequence ends without one.
    Without,
}

/// Lookups in the prefix cache, in prompt tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Tokens looked up.
    pub queries: u64,
    /// Tokens found.
    pub hits: u64,
}

/// All sequences and all blocks of an engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    kv: KvCache,
    sequences: BTreeMap<QueueKey, Sequence>,
    keys: HashMap<RequestId, QueueKey>,
    waiting: BTreeSet<QueueKey>,
    running: BTreeSet<QueueKey>,
    /// Ends that the next plan reports.
    ending: BTreeMap<QueueKey, FinishReason>,
    n_arrived: u64,
    prefix_stats: PrefixStats,
}

impl Scheduler {
    /// Nothing to do, every block free.
    ///
    /// # Panics
    /// If a limit is zero or there are more sequences than tokens in a step.
    pub fn new(limits: SchedulerLimits) -> Self {
        Self::with_kv(limits, KvCache::new(limits.n_kv_blocks, limits.prefix_cache))
    }

    /// As [`Scheduler::new`], over a cache that tests prepared.
    ///
    /// # Panics
    /// As [`Scheduler::new`].
    pub fn with_kv(limits: SchedulerLimits, kv: KvCache) -> Self {
        assert!(limits.n_ctx > 0 && limits.n_kv_blocks > 0 && limits.prefill_chunk > 0, "no limit is zero: {limits:?}");
        assert!(0 < limits.max_sequences && limits.max_sequences <= limits.max_batch_tokens, "{limits:?}");
        Self {
            limits,
            kv,
            sequences: BTreeMap::new(),
            keys: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            ending: BTreeMap::new(),
            n_arrived: 0,
            prefix_stats: PrefixStats::default(),
        }
    }

    /// Most tokens a sequence may have: the context, or the whole pool if that is smaller.
    pub fn n_limit(&self) -> usize {
        self.limits.n_ctx.min(self.limits.n_kv_blocks * BLOCK_TOKENS)
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// [`RequestError::DuplicateId`]; [`RequestError::ContextExceeded`] if there is no room for one more token after the prompt,
    /// or for what was emitted.
    pub fn submit(&mut self, request: EngineRequest) -> Result<(), RequestError> {
        let id = request.id;
        if self.keys.contains_key(&id) {
            return Err(RequestError::DuplicateId(id));
        }
        let n_needed = request.prompt.len() + request.emitted.len().max(1);
        if n_needed > self.n_limit() {
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            return Err(RequestError::ContextExceeded { needed: count(n_needed), limit: count(self.n_limit()) });
        }
        let key = QueueKey::new(request.priority, self.n_arrived);
        self.n_arrived += 1;
        let sequence = Sequence::new(request, &self.kv);
        if let Some(reason) = sequence.finish(self.n_limit()) {
            self.ending.insert(key, reason);
        }
        self.keys.insert(id, key);
        self.waiting.insert(key);
        self.sequences.insert(key, sequence);
        Ok(())
    }

    /// Ends a request with the next plan. Unknown ids are ignored.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(&key) = self.keys.get(&id) {
            self.ending.entry(key).or_insert(FinishReason::Cancelled);
        }
    }

    /// Whether any request is alive.
    pub fn is_busy(&self) -> bool {
        !self.sequences.is_empty()
    }

    /// A sequence, if it has not ended.
    pub fn find(&self, key: QueueKey) -> Option<&Sequence> {
        self.sequences.get(&key)
    }

    /// A live sequence.
    ///
    /// # Panics
    /// If it has ended.
    pub fn sequence(&self, key: QueueKey) -> &Sequence {
        &self.sequences[&key]
    }

    /// Whether a sequence runs.
    pub fn is_running(&self, key: QueueKey) -> bool {
        self.running.contains(&key)
    }

    /// Sequences that run.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// The running request that is preempted first: the last of the queue.
    pub fn youngest_running(&self) -> Option<RequestId> {
        self.running.last().map(|key| self.sequences[key].request().id)
    }

    /// Sequences that wait.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether a request waits, for the first time or again.
    pub fn is_waiting(&self, id: RequestId) -> bool {
        self.keys.get(&id).is_some_and(|key| self.waiting.contains(key))
    }

    /// Tokens of waiting sequences, all still to be computed.
    pub fn n_queued_tokens(&self) -> usize {
        self.waiting.iter().map(|key| self.sequences[key].tokens().len()).sum()
    }

    /// The blocks, to look at.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Prefix cache lookups so far.
    pub fn prefix_stats(&self) -> PrefixStats {
        self.prefix_stats
    }

    /// Forgets every block that only the prefix cache holds; returns how many.
    pub fn drop_prefix_cache(&mut self) -> usize {
        self.kv.drop_idle()
    }

    /// Decides the next step, to be begun at `now`.
    pub fn plan(&mut self, now: Instant) -> StepPlan {
        let mut plan = StepPlan::default();
        self.end_due(now, &mut plan);
        if self.waits_for_host() {
            return plan;
        }
        self.plan_running(&mut plan);
        if plan.n_preempted == 0 {
            self.admit_waiting(&mut plan);
        }
        plan
    }

    /// Takes note of a step that is being carried out: the next plan builds on it.
    ///
    /// # Panics
    /// If the plan is not the last that was made.
    pub fn begin(&mut self, plan: &StepPlan) {
        let mut rows = 0..;
        for work in &plan.work {
            let sequence = self.sequences.get_mut(&work.key).expect("planned sequences are alive");
            sequence.begin(work.n_tokens, work.chooses.then(|| rows.next()).flatten());
        }
    }

    /// Nothing will come of the steps that have begun and are not committed: they are planned again.
    pub fn forget_begun(&mut self) {
        self.sequences.values_mut().for_each(Sequence::forget_begun);
    }

    /// Whether a sequence is still where it was when this work was planned.
    pub fn is_current(&self, work: &Work) -> bool {
        self.find(work.key).is_some_and(|sequence| sequence.term() == work.term)
    }

    /// Takes note of a step that was carried out. `outcomes`: one for each work that chooses, in order; those of sequences that have ended
    /// since are ignored. Returns the sequences that ended well.
    ///
    /// # Panics
    /// If the number of outcomes is not that of the choices.
    pub fn commit(&mut self, plan: &StepPlan, outcomes: &[Outcome]) -> Vec<Ended> {
        let mut ended = Vec::new();
        let mut outcomes = outcomes.iter();
        for work in &plan.work {
            let outcome = work.chooses.then(|| *outcomes.next().expect("an outcome for each choice"));
            let Some(sequence) = self.sequences.get_mut(&work.key) else { continue };
            if sequence.term() == work.term {
                sequence.advance(work.n_tokens, &mut self.kv);
            }
            match outcome {
                None => {}
                Some(Outcome::Without) => drop(self.end(work.key)),
                Some(Outcome::Token(token)) => {
                    sequence.push(token, &self.kv);
                    if let Some(reason) = self.sequences[&work.key].finish(self.n_limit()) {
                        ended.push(self.finish(work.key, reason));
                    }
                }
            }
        }
        assert!(outcomes.next().is_none(), "more outcomes than choices");
        ended
    }

    /// Recounts every block and every queue.
    ///
    /// # Errors
    /// [`IntegrityError`].
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        self.kv.check_integrity(self.sequences.values().map(Sequence::table))?;
        for sequence in self.sequences.values().filter(|sequence| sequence.phase().is_running()) {
            let writable = sequence.table().blocks().iter().skip(sequence.n_computed() / BLOCK_TOKENS);
            if let Some(&block) = writable.into_iter().find(|&&block| !self.kv.is_private(block)) {
                return Err(IntegrityError::NotPrivate { block });
            }
        }
        Ok(())
    }

    fn end_due(&mut self, now: Instant, plan: &mut StepPlan) {
        for (&key, sequence) in &self.sequences {
            if sequence.request().deadline.is_some_and(|deadline| deadline <= now) {
                self.ending.entry(key).or_insert(FinishReason::Deadline);
            }
        }
        while let Some((key, reason)) = self.ending.pop_first() {
            plan.ended.push(self.finish(key, reason));
        }
    }

    /// Whether so many sequences cannot go on before the host has seen their last token that the others wait for them.
    fn waits_for_host(&self) -> bool {
        let running = self.running.iter().map(|key| &self.sequences[key]);
        let n_held = running.filter(|sequence| sequence.n_awaited() > 0 && sequence.is_held()).count();
        n_held > 0 && 2 * n_held >= self.running.len()
    }

    fn plan_running(&mut self, plan: &mut StepPlan) {
        let n_limit = self.n_limit();
        let goes_on = |key: &QueueKey| self.sequences[key].may_go_on(n_limit);
        let keys: Vec<QueueKey> = self.running.iter().copied().filter(goes_on).collect();
        let n_decoding = keys.iter().filter(|key| self.sequences[key].n_pending() == 1).count();
        let mut prefill_budget = self.limits.max_batch_tokens - n_decoding;
        for key in keys {
            let n_pending = self.sequences[&key].n_pending();
            let n_tokens = if n_pending == 1 { 1 } else { self.chunk(n_pending, prefill_budget) };
            // A sequence that was preempted for an earlier one of this loop is not running any more.
            if n_tokens == 0 || !self.running.contains(&key) || !self.make_room(key, n_tokens, plan) {
                continue;
            }
            if n_pending > 1 {
                prefill_budget -= n_tokens;
            }
            plan.work.push(self.work(key, n_tokens));
        }
    }

    /// Gives a running sequence the blocks for its next tokens, if need be those of the sequences after it in the queue.
    /// `false` if it had to give up its own.
    fn make_room(&mut self, key: QueueKey, n_tokens: usize, plan: &mut StepPlan) -> bool {
        loop {
            let sequence = self.sequences.get_mut(&key).expect("running sequences are alive");
            let n_wanted = sequence.n_planned() + n_tokens;
            if self.kv.grow(&mut sequence.table, n_wanted) {
                return true;
            }
            let victim = *self.running.last().expect("the sequence itself is running");
            self.preempt(victim);
            plan.n_preempted += 1;
            if victim == key {
                return false;
            }
        }
    }

    fn admit_waiting(&mut self, plan: &mut StepPlan) {
        let n_planned: usize = plan.work.iter().map(|work| work.n_tokens).sum();
        let mut budget = self.limits.max_batch_tokens - n_planned;
        let mut n_promised: usize = self.running.iter().map(|key| self.n_blocks_wanted(&self.sequences[key])).sum();
        let candidates: Vec<QueueKey> = self.waiting.iter().copied().collect();
        for key in candidates {
            let sequence = &self.sequences[&key];
            // Who was preempted while its token was being chosen has to know it first.
            if budget == 0 || self.running.len() == self.limits.max_sequences || sequence.n_awaited() > 0 {
                break;
            }
            let found = self.find_prefix(sequence);
            if self.will_be_shared(sequence, found.blocks.len()) {
                continue;
            }
            let n_wanted = self.n_blocks_wanted(sequence) - found.blocks.len();
            if n_wanted + n_promised + found.n_idle > self.kv.n_available() {
                break;
            }
            n_promised += self.admit(key, found, budget, plan);
            budget -= plan.work.last().expect("the admitted sequence has work").n_tokens;
        }
    }

    /// Starts a waiting sequence; returns the blocks it still wants.
    fn admit(&mut self, key: QueueKey, found: FoundPrefix, budget: usize, plan: &mut StepPlan) -> usize {
        let n_found = found.blocks.len() * BLOCK_TOKENS;
        let sequence = self.sequences.get_mut(&key).expect("waiting sequences are alive");
        self.kv.share(found, &mut sequence.table);
        if sequence.admit(n_found) && self.limits.prefix_cache {
            let usage = sequence.usage();
            self.prefix_stats.queries += u64::from(usage.prompt_tokens);
            self.prefix_stats.hits += u64::from(usage.cached_tokens);
        }
        let n_pending = sequence.n_pending();
        self.waiting.remove(&key);
        self.running.insert(key);
        let n_tokens = self.chunk(n_pending, budget);
        let sequence = self.sequences.get_mut(&key).expect("waiting sequences are alive");
        let has_room = self.kv.grow(&mut sequence.table, n_found + n_tokens);
        assert!(has_room, "room was counted before the sequence was admitted");
        plan.work.push(self.work(key, n_tokens));
        self.n_blocks_wanted(&self.sequences[&key])
    }

    /// Cached blocks for the start of a sequence. Its last token is always computed: its logits are needed.
    fn find_prefix(&self, sequence: &Sequence) -> FoundPrefix {
        let n_max = (sequence.tokens().len() - 1) / BLOCK_TOKENS;
        self.kv.find_prefix(sequence.tokens(), sequence.hashes(), n_max)
    }

    /// Whether a running sequence is about to compute the block after the `n_found` that `sequence` found. An equal hash is
    /// enough: a collision only delays.
    fn will_be_shared(&self, sequence: &Sequence, n_found: usize) -> bool {
        if !self.limits.prefix_cache || n_found >= (sequence.tokens().len() - 1) / BLOCK_TOKENS {
            return false;
        }
        let next = sequence.hashes()[n_found];
        self.running.iter().map(|key| &self.sequences[key]).any(|other| {
            other.n_computed() < (n_found + 1) * BLOCK_TOKENS && other.hashes().get(n_found) == Some(&next)
        })
    }

    /// Blocks that a sequence does not have yet and needs for its tokens and the one after them.
    fn n_blocks_wanted(&self, sequence: &Sequence) -> usize {
        let n_tokens = (sequence.tokens().len() + sequence.n_awaited() + 1).min(self.n_limit());
        blocks_for(n_tokens).saturating_sub(sequence.table().len())
    }

    fn chunk(&self, n_pending: usize, budget: usize) -> usize {
        n_pending.min(self.limits.prefill_chunk).min(budget)
    }

    fn work(&self, key: QueueKey, n_tokens: usize) -> Work {
        let sequence = &self.sequences[&key];
        let (first, chooses) = (sequence.n_planned(), n_tokens == sequence.n_pending());
        Work { key, first, n_tokens, chooses, feed: sequence.awaited_row(), term: sequence.term() }
    }

    fn preempt(&mut self, key: QueueKey) {
        let sequence = self.sequences.get_mut(&key).expect("running sequences are alive");
        sequence.preempt(&mut self.kv);
        debug_assert_eq!(sequence.phase(), Phase::Waiting);
        self.running.remove(&key);
        self.waiting.insert(key);
    }

    fn finish(&mut self, key: QueueKey, reason: FinishReason) -> Ended {
        let sequence = self.end(key);
        Ended { id: sequence.request().id, reason, usage: sequence.usage() }
    }

    fn end(&mut self, key: QueueKey) -> Sequence {
        let mut sequence = self.sequences.remove(&key).expect("a sequence ends once");
        sequence.end(&mut self.kv);
        self.waiting.remove(&key);
        self.running.remove(&key);
        self.keys.remove(&sequence.request().id);
        sequence
    }
}

#[cfg(test)]
mod tests;
