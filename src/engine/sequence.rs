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

    /// Tokens to compute before the next can be chosen.
    pub fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Tokens emitted, by this engine and before.
    pub fn n_emitted(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Stop ids that may not be chosen yet: all of them until `min_tokens` are emitted.
    pub fn forbidden(&self) -> &[u32] {
        if self.n_emitted() < self.request.min_tokens as usize { &self.request.stop_ids } else { &[] }
    }

    /// Whether the sequence is at its end, for good, given that it may have `n_limit` tokens.
    pub fn finish(&self, n_limit: usize) -> Option<FinishReason> {
        let last_emitted = self.tokens[self.request.prompt.len()..].last();
        if last_emitted.is_some_and(|last| self.request.stop_ids.contains(last)) {
            return Some(FinishReason::Stop);
        }
        let is_full = self.n_emitted() >= self.request.max_tokens as usize || self.tokens.len() >= n_limit;
        is_full.then_some(FinishReason::Length)
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
        self.n_computed = n_computed;
        let n_cached = n_computed.min(self.request.prompt.len());
        let is_first = self.n_cached.is_none();
        self.n_cached.get_or_insert(u32::try_from(n_cached).expect("a context has fewer than 2^32 tokens"));
        is_first
    }

    /// Notes that the next `n_tokens` tokens are computed and makes the blocks they fill known to the prefix cache.
    pub(super) fn advance(&mut self, n_tokens: usize, kv: &mut KvCache) {
        let first_full = self.n_computed / BLOCK_TOKENS;
        self.n_computed += n_tokens;
        for index in first_full..self.n_computed / BLOCK_TOKENS {
            let tokens = &self.tokens[index * BLOCK_TOKENS..(index + 1) * BLOCK_TOKENS];
            kv.register(&mut self.table, index, self.hashes[index], tokens);
        }
    }

    /// Appends a chosen token.
    pub(super) fn push(&mut self, token: u32, kv: &KvCache) {
        self.transit(Transition::TokensComputed);
        self.tokens.push(token);
        self.hash_full_blocks(kv);
    }

    /// Gives its blocks back; everything is to be computed again.
    pub(super) fn preempt(&mut self, kv: &mut KvCache) {
        self.transit(Transition::Preempt);
        kv.release(&mut self.table);
        self.n_computed = 0;
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
