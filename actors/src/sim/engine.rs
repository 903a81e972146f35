//! An engine without a model: its tokens are a function of prompt, seed, choice and index, so that a transcript can be
//! checked without running anything. Sequences hold blocks of a pool, and the youngest gives its up when they run out.

use crate::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, EngineStats, FinishReason, RequestError, RequestId, StepReport,
    Task, Usage,
};
use crate::policy::ladder::RungCounts;
use crate::policy::mix;
use std::collections::BTreeSet;

/// Tokens per block.
const BLOCK_TOKENS: u32 = 16;

/// The hidden state that every simulated engine gives for such a prompt.
pub fn sim_embedding(prompt: &[u32]) -> Vec<f32> {
    (0..4).map(|i| (sim_token(prompt, i, 0, 0) % 1000) as f32).collect()
}

/// The token that every simulated engine emits at `index` of such a request; never a stop id below 2.
pub fn sim_token(prompt: &[u32], seed: u64, choice: u32, index: u32) -> u32 {
    let start = mix(seed ^ mix(u64::from(choice)));
    let hash = prompt.iter().fold(start, |hash, token| mix(hash ^ u64::from(*token)));
    // The remainder is below 2^16.
    u32::try_from(mix(hash ^ u64::from(index)) % 65_536).unwrap_or(0)
}

/// The engine.
#[derive(Debug)]
pub struct SimEngine {
    n_ctx: u32,
    max_sequences: usize,
    blocks_total: u32,
    running: Vec<EngineRequest>,
    waiting: Vec<EngineRequest>,
    cancelled: BTreeSet<RequestId>,
    stats: EngineStats,
}

impl SimEngine {
    /// An engine with room for so many blocks, sequences and tokens of a sequence.
    pub fn new(n_ctx: u32, max_sequences: u32, blocks_total: u32) -> Self {
        Self {
            n_ctx,
            max_sequences: usize::try_from(max_sequences).unwrap_or(usize::MAX),
            blocks_total,
            running: Vec::new(),
            waiting: Vec::new(),
            cancelled: BTreeSet::new(),
            stats: EngineStats { kv_blocks_total: blocks_total, ..EngineStats::default() },
        }
    }

    fn blocks_of(request: &EngineRequest) -> u32 {
        n_tokens(request).saturating_add(1).div_ceil(BLOCK_TOKENS)
    }

    fn blocks_used(&self) -> u32 {
        self.running.iter().map(Self::blocks_of).sum()
    }

    fn end_cancelled(&mut self, events: &mut Vec<EngineEvent>) {
        let cancelled = std::mem::take(&mut self.cancelled);
        for list in [&mut self.running, &mut self.waiting] {
            list.retain(|request| {
                let ended = cancelled.contains(&request.id);
                if ended {
                    events.push(finished(request, FinishReason::Cancelled));
                }
                !ended
            });
        }
    }

    /// Takes waiting sequences in while there is room for them.
    fn admit(&mut self) -> u32 {
        let mut prefilled = 0;
        while self.running.len() < self.max_sequences {
            let Some(next) = self.waiting.first() else { break };
            if self.blocks_used() + Self::blocks_of(next) > self.blocks_total {
                break;
            }
            let request = self.waiting.remove(0);
            prefilled += n_tokens(&request);
            self.running.push(request);
        }
        prefilled
    }

    /// Sends the youngest back to the queue until the rest has room to grow.
    fn preempt(&mut self) -> u32 {
        let mut preempted = 0;
        while self.blocks_used() > self.blocks_total && self.running.len() > 1 {
            if let Some(youngest) = self.running.pop() {
                self.waiting.insert(0, youngest);
                preempted += 1;
            }
        }
        preempted
    }
}

fn n_tokens(request: &EngineRequest) -> u32 {
    u32::try_from(request.prompt.len() + request.emitted.len()).unwrap_or(u32::MAX)
}

fn finished(request: &EngineRequest, reason: FinishReason) -> EngineEvent {
    let usage = Usage {
        prompt_tokens: u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
        cached_tokens: 0,
        completion_tokens: u32::try_from(request.emitted.len()).unwrap_or(u32::MAX),
    };
    EngineEvent::Finished { id: request.id, reason, usage }
}

impl Engine for SimEngine {
    fn submit(&mut self, request: EngineRequest) -> Result<(), RequestError> {
        if self.running.iter().chain(&self.waiting).any(|other| other.id == request.id) {
            return Err(RequestError::DuplicateId(request.id));
        }
        let needed = n_tokens(&request).saturating_add(1);
        let limit = self.n_ctx.min(self.blocks_total.saturating_mul(BLOCK_TOKENS));
        if needed > limit {
            return Err(RequestError::ContextExceeded { needed, limit });
        }
        self.waiting.push(request);
        Ok(())
    }

    fn cancel(&mut self, id: RequestId) {
        self.cancelled.insert(id);
    }

    fn step(&mut self, events: &mut Vec<EngineEvent>) -> Result<StepReport, EngineError> {
        self.end_cancelled(events);
        let n_preempted = self.preempt();
        let n_prefill_tokens = self.admit();
        let limit = self.n_ctx.min(self.blocks_total.saturating_mul(BLOCK_TOKENS));
        let mut n_decode_tokens = 0;
        self.running.retain(|request| {
            if request.task == Task::Embed {
                let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
                let usage = Usage { prompt_tokens, ..Usage::default() };
                events.push(EngineEvent::Embedded { id: request.id, values: sim_embedding(&request.prompt), usage });
            }
            request.task == Task::Generate
        });
        for request in &mut self.running {
            let index = u32::try_from(request.emitted.len()).unwrap_or(u32::MAX);
            let token = sim_token(&request.prompt, request.sampling.seed, request.sampling.choice, index);
            request.emitted.push(token);
            n_decode_tokens += 1;
            events.push(EngineEvent::Token { id: request.id, index, token, logprobs: None });
        }
        self.running.retain(|request| {
            let n_emitted = u32::try_from(request.emitted.len()).unwrap_or(u32::MAX);
            let last = request.emitted.last().copied().unwrap_or_default();
            let reason = match () {
                () if request.stop_ids.contains(&last) && n_emitted > request.min_tokens => FinishReason::Stop,
                () if n_emitted >= request.max_tokens || n_tokens(request) >= limit => FinishReason::Length,
                () => return true,
            };
            events.push(finished(request, reason));
            false
        });
        self.stats.steps += 1;
        self.stats.prefill_tokens += u64::from(n_prefill_tokens);
        self.stats.decode_tokens += u64::from(n_decode_tokens);
        self.stats.preemptions += u64::from(n_preempted);
        let busy = !self.running.is_empty() || !self.waiting.is_empty();
        Ok(StepReport { n_sequences: n_decode_tokens, n_prefill_tokens, n_decode_tokens, n_preempted, busy })
    }

    fn stats(&self) -> EngineStats {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        EngineStats {
            running: count(self.running.len()),
            waiting: count(self.waiting.len()),
            queued_tokens: self.waiting.iter().map(|request| u64::from(n_tokens(request))).sum(),
            kv_blocks_used: self.blocks_used(),
            oom: RungCounts { preempt: self.stats.preemptions, ..RungCounts::default() },
            ..self.stats
        }
    }

    fn teardown(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SamplingParams;

    fn request(id: u64, prompt_len: u32, max_tokens: u32) -> EngineRequest {
        EngineRequest {
            id: RequestId(id),
            task: Task::Generate,
            prompt: (0..prompt_len).collect(),
            emitted: Vec::new(),
            sampling: SamplingParams::greedy(),
            max_tokens,
            min_tokens: 0,
            stop_ids: Vec::new(),
            logprobs: None,
            constraint: None,
            priority: 0,
            deadline: None,
        }
    }

    fn run(engine: &mut SimEngine) -> Vec<EngineEvent> {
        let mut events = Vec::new();
        while engine.step(&mut events).expect("never fails").busy {}
        events
    }

    #[test]
    fn a_resumed_request_goes_on_with_the_same_tokens() {
        let mut whole = SimEngine::new(100, 4, 100);
        whole.submit(request(1, 5, 8)).expect("fits");
        let tokens = |events: Vec<EngineEvent>| -> Vec<(u32, u32)> {
            events
                .into_iter()
                .filter_map(|event| match event {
                    EngineEvent::Token { index, token, .. } => Some((index, token)),
                    _ => None,
                })
                .collect()
        };
        let all = tokens(run(&mut whole));
        assert_eq!(all.len(), 8);
        let mut resumed = request(1, 5, 8);
        resumed.emitted = all[..3].iter().map(|(_, token)| *token).collect();
        let mut other = SimEngine::new(100, 4, 100);
        other.submit(resumed).expect("fits");
        assert_eq!(tokens(run(&mut other)), all[3..]);
    }

    #[test]
    fn the_youngest_gives_its_blocks_up() {
        let mut engine = SimEngine::new(1000, 4, 4);
        engine.submit(request(1, 20, 30)).expect("fits");
        engine.submit(request(2, 20, 30)).expect("fits");
        let events = run(&mut engine);
        let ends = events.iter().filter(|event| matches!(event, EngineEvent::Finished { .. })).count();
        assert_eq!(ends, 2);
        assert!(engine.stats().preemptions > 0);
        assert_eq!(engine.stats().kv_blocks_used, 0);
    }
}
