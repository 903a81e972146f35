//! A model that is all bookkeeping, and a driver that collects what an engine says of each request.
//!
//! The fake keeps the token of every KV slot. Its logits are a hash of what it *finds* there for positions `0 ..= p`, through the
//! batch's block tables: a block handed to the wrong sequence, evicted too early or shared with the wrong prefix changes
//! the text.

#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod delayed;

use playhouse::backend::{BLOCK_TOKENS, BackendError, Batch, MemoryUse};
use playhouse::engine::{LlmEngine, StepCapacity, StepModel};
use playhouse_actors::engine::{
    Engine, EngineEvent, EngineRequest, FinishReason, RequestError, RequestId, SamplingParams, Task, TokenLogprobs,
    Usage,
};
use std::collections::{BTreeMap, HashSet};

/// What the fake does instead of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The step at this count, from 0, runs out of memory after it wrote garbage over its own slots.
    OutOfMemory(u64),
    /// The step at this count loses the device.
    DeviceLost(u64),
    /// Rows of sequences whose first token is this are NaN once `kv_len` reaches the second number.
    NanFor(u32, usize),
}

/// The fake model.
#[derive(Debug)]
pub(crate) struct FakeModel {
    pub(crate) n_vocab: usize,
    pub(crate) n_ctx: usize,
    pub(crate) capacity: StepCapacity,
    pub(crate) faults: Vec<Fault>,
    pub(crate) n_steps: u64,
    pub(crate) n_tokens: u64,
    slots: Vec<Option<(u32, u32)>>,
    last: Batch,
}

impl FakeModel {
    pub(crate) fn new(capacity: StepCapacity) -> Self {
        let slots = vec![None; capacity.n_kv_blocks * BLOCK_TOKENS];
        Self {
            n_vocab: 97,
            n_ctx: 400,
            capacity,
            faults: vec![],
            n_steps: 0,
            n_tokens: 0,
            slots,
            last: Batch::default(),
        }
    }

    pub(crate) fn with_faults(mut self, faults: &[Fault]) -> Self {
        self.faults = faults.to_vec();
        self
    }

    fn check(&self, batch: &Batch) {
        let n = batch.tokens.len();
        assert!(n > 0 && n <= self.capacity.max_batch_tokens, "{n} tokens in a step");
        assert!(batch.positions.len() == n && batch.slots.len() == n);
        assert!(batch.logit_rows.len() <= self.capacity.max_logit_rows);
        assert!(batch.logit_rows.is_sorted());
        assert_eq!(batch.slots.iter().collect::<HashSet<_>>().len(), n, "a slot is written twice");
        assert!(batch.tokens.iter().all(|&token| (token as usize) < self.n_vocab));
        let mut first = 0;
        for span in &batch.spans {
            assert!(span.first == first && span.n_tokens > 0, "spans cover the batch in order");
            first += span.n_tokens;
            assert!(span.kv_len <= self.n_ctx && span.blocks.len() * BLOCK_TOKENS >= span.kv_len);
            for i in 0..span.n_tokens {
                let position = span.kv_len - span.n_tokens + i;
                assert_eq!(batch.positions[span.first + i] as usize, position);
                let slot = span.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS;
                assert_eq!(batch.slots[span.first + i] as usize, slot, "the slot is the table's");
            }
        }
        assert_eq!(first, n);
    }

    fn row(&self, batch: &Batch, row: usize) -> Vec<f32> {
        let span = batch.spans.iter().find(|span| (span.first..span.first + span.n_tokens).contains(&row)).unwrap();
        let n_seen = batch.positions[row] as usize + 1;
        let seen: Vec<(u32, u32)> = (0..n_seen)
            .map(|at| {
                let slot = span.blocks[at / BLOCK_TOKENS] as usize * BLOCK_TOKENS + at % BLOCK_TOKENS;
                self.slots[slot].expect("keys are read that were never written")
            })
            .collect();
        let is_nan =
            |fault: &Fault| matches!(fault, Fault::NanFor(first, len) if seen[0].1 == *first && n_seen >= *len);
        if self.faults.iter().any(is_nan) {
            return vec![f32::NAN; self.n_vocab];
        }
        let hash = seen
            .iter()
            .fold(1u64, |hash, &(position, token)| mix(hash ^ (u64::from(position) << 32 | u64::from(token))));
        (0..self.n_vocab as u64).map(|token| (mix(hash ^ token) >> 40) as f32 / (1u64 << 21) as f32 - 4.0).collect()
    }
}

fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl StepModel for FakeModel {
    fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    fn capacity(&self) -> StepCapacity {
        self.capacity
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        self.check(batch);
        let step = self.n_steps;
        self.n_steps += 1;
        if self.faults.contains(&Fault::DeviceLost(step)) {
            return Err(BackendError::Device { device: "fake".into(), op: "run".into(), detail: "trap".into() });
        }
        let fails = self.faults.contains(&Fault::OutOfMemory(step));
        for (i, &slot) in batch.slots.iter().enumerate() {
            self.slots[slot as usize] = Some(if fails { (0, 0) } else { (batch.positions[i], batch.tokens[i]) });
        }
        if fails {
            return Err(BackendError::OutOfMemory {
                device: "fake".into(),
                what: "scratch".into(),
                requested: 2,
                free: 1,
            });
        }
        self.n_tokens += batch.tokens.len() as u64;
        self.last = batch.clone();
        logits.clear();
        batch.logit_rows.iter().for_each(|&row| logits.extend(self.row(batch, row as usize)));
        Ok(())
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        hidden.clear();
        // What the last token has seen: the first logits are a function of it.
        rows.iter().for_each(|&row| hidden.extend(&self.row(&self.last, row as usize)[..4]));
        Ok(())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        for &(from, to) in pairs {
            let (from, to) = (from as usize * BLOCK_TOKENS, to as usize * BLOCK_TOKENS);
            self.slots.copy_within(from..from + BLOCK_TOKENS, to);
        }
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { weights: 1, kv: 2, scratch: 3 }
    }
}

/// One request's events.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Told {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) first_index: Option<u32>,
    pub(crate) embedding: Option<Vec<f32>>,
    pub(crate) end: Option<Result<(FinishReason, Usage), RequestError>>,
}

/// A token, the bits of its log probability, and the most likely tokens with the bits of theirs.
pub(crate) type TokenBits = (u32, u32, Vec<(u32, u32)>);

impl Told {
    /// Tokens, and every bit of the log probabilities.
    pub(crate) fn bits(&self) -> Vec<TokenBits> {
        let bits = |logprobs: &TokenLogprobs| {
            let top = logprobs.top.iter().map(|top| (top.token, top.logprob.to_bits())).collect();
            (logprobs.chosen.to_bits(), top)
        };
        let logprobs = self.logprobs.iter().map(bits);
        self.tokens.iter().zip(logprobs).map(|(&token, (chosen, top))| (token, chosen, top)).collect()
    }

    pub(crate) fn reason(&self) -> Option<FinishReason> {
        self.end.as_ref().and_then(|end| end.as_ref().ok()).map(|end| end.0)
    }
}

/// Adds events to what is known, checking that indices have no gap and that nothing follows the end.
pub(crate) fn collect(told: &mut BTreeMap<RequestId, Told>, events: &[EngineEvent]) {
    for event in events {
        match event {
            EngineEvent::Token { id, index, token, logprobs } => {
                let told = told.entry(*id).or_default();
                assert!(told.end.is_none(), "a token after the end of {id:?}");
                let first = *told.first_index.get_or_insert(*index);
                assert_eq!(*index, first + told.tokens.len() as u32, "a gap or a repeat in {id:?}");
                told.tokens.push(*token);
                told.logprobs.extend(logprobs.clone());
            }
            EngineEvent::Finished { id, reason, usage } => end(told, *id, Ok((*reason, *usage))),
            EngineEvent::Embedded { id, values, usage } => {
                told.entry(*id).or_default().embedding = Some(values.clone());
                end(told, *id, Ok((FinishReason::Stop, *usage)));
            }
            EngineEvent::Failed { id, error } => end(told, *id, Err(error.clone())),
        }
    }
}

fn end(told: &mut BTreeMap<RequestId, Told>, id: RequestId, end: Result<(FinishReason, Usage), RequestError>) {
    assert!(told.entry(id).or_default().end.replace(end).is_none(), "{id:?} ended twice");
}

/// Steps until the engine has nothing to do, checking the blocks after each step.
pub(crate) fn drain<M: StepModel>(engine: &mut LlmEngine<M>) -> BTreeMap<RequestId, Told> {
    let mut told = BTreeMap::new();
    let mut events = Vec::new();
    while engine.step(&mut events).expect("the engine is well").busy {
        engine.scheduler().check_integrity().unwrap();
    }
    collect(&mut told, &events);
    let kv = engine.scheduler().kv();
    assert_eq!(kv.n_available(), kv.n_total(), "a block leaked");
    told
}

/// A greedy request without anything else.
pub(crate) fn request(id: u64, prompt: &[u32], max_tokens: u32) -> EngineRequest {
    EngineRequest {
        id: RequestId(id),
        task: Task::Generate,
        prompt: prompt.to_vec(),
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

pub(crate) fn capacity(n_kv_blocks: usize) -> StepCapacity {
    StepCapacity { n_kv_blocks, max_batch_tokens: 512, max_logit_rows: 64 }
}
