//! One request's life in the engine, as an enum with its transition table, and the tokens and blocks that go with it.
//!
//! ```text
//!   Waiting ──Admit──> Prefill ──TokensComputed──> Decode
//!      ^                 │                           │
//!      └────Preempt──────┴───────────Preempt─────────┘        any ──End──> Ended
//! ```

use super::kv::{BlockHash, BlockTable, KvCache};
use crate::backend::BLOCK_TOKENS;
use playhouse_actors::engine::{EngineRequest, FinishReason, Usage};
use std::cmp::Reverse;

/// Where a sequence is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Holds no blocks; nothing is computed.
    Waiting,
    /// Holds blocks; more than one of its tokens is still to be computed.
    Prefill,
    /// Holds blocks; each step computes its last token and chooses the next.
    Decode,
    /// Its terminal event is out. Holds nothing.
    Ended,
}

/// What moves a sequence from phase to phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// It was given blocks.
    Admit,
    /// All its tokens were computed and the next was chosen.
    TokensComputed,
    /// Its blocks were taken for another; it will be computed again.
    Preempt,
    /// It finished, failed, was cancelled or ran out of time.
    End,
}

impl Phase {
    /// The transition table. `None`: that cannot happen to a sequence in this phase.
    pub fn after(self, transition: Transition) -> Option<Self> {
        match (self, transition) {
            (Self::Waiting, Transition::Admit) => Some(Self::Prefill),
            (Self::Prefill | Self::Decode, Transition::TokensComputed) => Some(Self::Decode),
            (Self::Prefill | Self::Decode, Transition::Preempt) => Some(Self::Waiting),
            (Self::Waiting | Self::Prefill | Self::Decode, Transition::End) => Some(Self::Ended),
            _ => None,
        }
    }

    /// Whether a sequence in this phase may hold blocks and take part in steps.
    pub fn is_running(self) -> bool {
        matches!(self, Self::Prefill | Self::Decode)
    }
}

/// The order in which sequences are served: higher priority first, then the order of arrival. A preempted sequence keeps
/// its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueKey {
    priority: Reverse<i32>,
    arrival: u64,
}

impl QueueKey {
    /// The key of the `arrival`-th request.
    pub fn new(priority: i32, arrival: u64) -> Self {
        Self { priority: Reverse(priority), arrival }
    }
}

/// A request with its tokens and blocks.
#[derive(Debug)]
pub struct Sequence {
    request: EngineRequest,
    phase: Phase,
    /// Prompt, then everything emitted.
    tokens: Vec<u32>,
    /// Hashes of the full blocks of `tokens`.
    hashes: Vec<BlockHash>,
    /// Tokens whose keys and values are in the blocks of `table`.
    n_computed: usize,
    /// The same once the steps are done that have begun.
    n_planned: usize,
    /// Tokens after `tokens` that are chosen by steps that have begun.
    n_awaited: usize,
    /// Where the last of them is chosen: its row in its step.
    awaited_row: u32,
    /// Times it was preempted: what a step computed for an earlier term is gone.
    term: u32,
    n_cached: Option<u32>,
    pub(super) table: BlockTable,
}

impl Sequence {
    /// A waiting sequence.
    pub fn new(request: EngineRequest, kv: &KvCache) -> Self {
        let tokens = [request.prompt.as_slice(), &request.emitted].concat();
        let mut sequence = Self {
            request,
            phase: Phase::Waiting,
            tokens,
            hashes: Vec::new(),
            n_computed: 0,
            n_planned: 0,
            n_awaited: 0,
            awaited_row: 0,
            term: 0,
            n_cached: None,
            table: BlockTable::default(),
        };
        sequence.hash_full_blocks(kv);
        sequence
    }

    /// What was asked for.
    pub fn request(&self) -> &EngineRequest {
        &self.request
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Prompt, then everything emitted.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Hashes of the full blocks of [`Sequence::tokens`].
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// The blocks it holds.
    pub fn table(&self) -> &BlockTable {
        &self.table
    }

    /// Tokens whose keys and values are in its blocks.
    pub fn n_computed(&self) -> usize {
        self.n_computed
    }

    /// Tokens that will be in its blocks when the steps are done that have begun.
    pub fn n_planned(&self) -> usize {
        self.n_planned
    }

    /// Tokens that no step computes yet and that are to be computed before the next can be chosen.
    pub fn n_pending(&self) -> usize {
        self.tokens.len() + self.n_awaited - self.n_planned
    }

    /// Tokens that are chosen by steps that have begun.
    pub fn n_awaited(&self) -> usize {
        self.n_awaited
    }

    /// Row in its step of the last token that is awaited.
    pub fn awaited_row(&self) -> Option<u32> {
        (self.n_awaited > 0).then_some(self.awaited_row)
    }

    /// Times it was preempted.
    pub fn term(&self) -> u32 {
        self.term
    }

    /// Whether each of its tokens must be seen by the host before the next can be chosen.
    pub fn is_held(&self) -> bool {
        self.request.constraint.is_some()
    }

    /// Whether its next step may begin: unless the host must see the token first that is awaited, or that token is its last, whichever it
    /// is, given that the sequence may have `n_limit` tokens.
    pub fn may_go_on(&self, n_limit: usize) -> bool {
        self.n_awaited == 0 || !(self.is_held() || self.is_full(self.n_awaited, n_limit))
    }

    /// Tokens emitted, by this engine and before.
    pub fn n_emitted(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Index in the output of the token that its next step chooses.
    pub fn next_index(&self) -> usize {
        self.n_emitted() + self.n_awaited
    }

    /// Whether the sequence is at its end, for good, given that it may have `n_limit` tokens.
    pub fn finish(&self, n_limit: usize) -> Option<FinishReason> {
        let last_emitted = self.tokens[self.request.prompt.len()..].last();
        if last_emitted.is_some_and(|last| self.request.stop_ids.contains(last)) {
            return Some(FinishReason::Stop);
        }
        self.is_full(0, n_limit).then_some(FinishReason::Length)
    }

    /// Whether it has room for no more tokens with `n_more`.
    fn is_full(&self, n_more: usize, n_limit: usize) -> bool {
        self.n_emitted() + n_more >= self.request.max_tokens as usize || self.tokens.len() + n_more >= n_limit
    }

    /// What it took so far.
    pub fn usage(&self) -> Usage {
        let count = |n: usize| u32::try_from(n).expect("a context has fewer than 2^32 tokens");
        Usage {
            prompt_tokens: count(self.request.prompt.len()),
            cached_tokens: self.n_cached.unwrap_or(0),
            completion_tokens: count(self.n_emitted()),
        }
    }

    /// Starts with `n_computed` tokens found in the prefix cache. Returns whether it is the first time.
    pub(super) fn admit(&mut self, n_computed: usize) -> bool {
        self.transit(Transition::Admit);
        (self.n_computed, self.n_planned) = (n_computed, n_computed);
        let n_cached = n_computed.min(self.request.prompt.len());
        let is_first = self.n_cached.is_none();
        self.n_cached.get_or_insert(u32::try_from(n_cached).expect("a context has fewer than 2^32 tokens"));
        is_first
    }

    /// Notes that a step has begun that computes the next `n_tokens` tokens, and chooses a token in `row`.
    pub(super) fn begin(&mut self, n_tokens: usize, row: Option<u32>) {
        self.n_planned += n_tokens;
        if let Some(row) = row {
            (self.n_awaited, self.awaited_row) = (self.n_awaited + 1, row);
        }
    }

    /// Forgets the steps that have begun: nothing will come of them.
    pub(super) fn forget_begun(&mut self) {
        (self.n_planned, self.n_awaited) = (self.n_computed, 0);
    }

    /// Notes that the next `n_tokens` tokens are computed and makes the blocks they fill known to the prefix cache.
    pub(super) fn advance(&mut self, n_tokens: usize, kv: &mut KvCache) {
        let first_full = self.n_computed / BLOCK_TOKENS;
        self.n_computed += n_tokens;
        self.n_planned = self.n_planned.max(self.n_computed);
        for index in first_full..self.n_computed / BLOCK_TOKENS {
            let tokens = &self.tokens[index * BLOCK_TOKENS..(index + 1) * BLOCK_TOKENS];
            kv.register(&mut self.table, index, self.hashes[index], tokens);
        }
    }

    /// Appends a chosen token. It may have been preempted since its step began.
    pub(super) fn push(&mut self, token: u32, kv: &KvCache) {
        if self.phase.is_running() {
            self.transit(Transition::TokensComputed);
        }
        self.n_awaited = self.n_awaited.saturating_sub(1);
        self.tokens.push(token);
        self.hash_full_blocks(kv);
    }

    /// Gives its blocks back; everything is to be computed again.
    pub(super) fn preempt(&mut self, kv: &mut KvCache) {
        self.transit(Transition::Preempt);
        kv.release(&mut self.table);
        (self.n_computed, self.n_planned) = (0, 0);
        self.term += 1;
    }

    /// Gives its blocks back for good.
    pub(super) fn end(&mut self, kv: &mut KvCache) {
        self.transit(Transition::End);
        kv.release(&mut self.table);
    }

    fn transit(&mut self, transition: Transition) {
        let next = self.phase.after(transition);
        self.phase = next.unwrap_or_else(|| panic!("{transition:?} cannot happen to a sequence in {:?}", self.phase));
    }

    fn hash_full_blocks(&mut self, kv: &KvCache) {
        for block in self.tokens.chunks_exact(BLOCK_TOKENS).skip(self.hashes.len()) {
            self.hashes.push(kv.hash(self.hashes.last().copied(), block));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Phase::*, Transition::*};

    #[test]
    fn the_transition_table_is_the_picture() {
        let arrows = [
            (Waiting, Admit, Prefill),
            (Waiting, End, Ended),
            (Prefill, TokensComputed, Decode),
            (Prefill, Preempt, Waiting),
            (Prefill, End, Ended),
            (Decode, TokensComputed, Decode),
            (Decode, Preempt, Waiting),
            (Decode, End, Ended),
        ];
        for from in [Waiting, Prefill, Decode, Ended] {
            for transition in [Admit, TokensComputed, Preempt, End] {
                let drawn = arrows.iter().find(|arrow| (arrow.0, arrow.1) == (from, transition)).map(|arrow| arrow.2);
                assert_eq!(from.after(transition), drawn, "{from:?} {transition:?}");
            }
        }
    }
}
