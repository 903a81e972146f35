//! The engine: a resident model, a scheduler and a sampler per sequence. Schedule, run, choose, take note.
//!
//! Where the model chooses tokens itself, the engine is a step ahead: a call of [`Engine::step`] gives the device its next step before it
//! waits for the one under way, and settles that while the device computes (`flight`). Elsewhere a call is a step.

mod flight;
mod rows;

use super::StepModel;
use super::constrain::{Constrain, Constrainer};
use super::histories::Histories;
use super::sampler::Sampler;
use super::scheduler::{Ended, Scheduler, SchedulerLimits};
use super::validate::validate;
use crate::backend::{BackendError, Batch};
use flight::Flight;
use playhouse_actors::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, EngineStats, RequestError, RequestId, StepReport,
};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// How an engine uses what its model can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Most sequences that run at once; never more than the model has rows of logits.
    pub max_sequences: usize,
    /// Most tokens of one prompt in one step. Changes the time to the first token, never the tokens.
    pub prefill_chunk: usize,
    /// Whether full blocks are kept for later requests with the same beginning.
    pub prefix_cache: bool,
    /// Whether the next step begins before the tokens of the one under way are known, where the model can do that.
    /// Changes the speed, never the tokens.
    pub step_ahead: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_sequences: usize::MAX, prefill_chunk: 512, prefix_cache: true, step_ahead: true }
    }
}

/// A model with everything that serving it takes. See [`Engine`] for the contract.
///
/// The tokens of a request, and the bits of its log probabilities, are a function of its prompt, its parameters and the model.
/// Other requests, the options, the size of the pool, preemption and the split between `prompt`, `emitted` and new tokens do
/// not change them.
pub struct LlmEngine<M: StepModel> {
    model: M,
    scheduler: Scheduler,
    samplers: HashMap<RequestId, Sampler>,
    constrainer: Option<Box<dyn Constrainer>>,
    constrained: HashMap<RequestId, Box<dyn Constrain>>,
    histories: Histories,
    /// Steps that have begun, oldest first.
    flights: VecDeque<Flight>,
    /// Steps that may be under way when another begins.
    n_ahead: usize,
    /// Whether the device chooses tokens, and counts them.
    chooses_there: bool,
    batch: Batch,
    logits: Vec<f32>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    steps: u64,
    prefill_tokens: u64,
    decode_tokens: u64,
    preemptions: u64,
}

impl<M: StepModel> LlmEngine<M> {
    /// An idle engine. Options beyond the model's capacity are cut to it.
    ///
    /// # Panics
    /// If the model's vocabulary has more than 2^20 ids, or it has no room for one token.
    pub fn new(model: M, options: EngineOptions) -> Self {
        assert!(model.n_vocab() <= 1 << 20, "the sampler's sums are exact for up to 2^20 ids");
        let capacity = model.capacity();
        let scheduler = Scheduler::new(SchedulerLimits {
            n_ctx: model.n_ctx(),
            n_kv_blocks: capacity.n_kv_blocks,
            max_batch_tokens: capacity.max_batch_tokens,
            max_sequences: options.max_sequences.min(capacity.max_logit_rows).min(capacity.max_batch_tokens),
            prefill_chunk: options.prefill_chunk,
            prefix_cache: options.prefix_cache,
        });
        Self {
            n_ahead: usize::from(options.step_ahead && model.runs_ahead()),
            chooses_there: model.runs_ahead(),
            model,
            scheduler,
            samplers: HashMap::new(),
            constrainer: None,
            constrained: HashMap::new(),
            histories: Histories::new(index_of(capacity.max_logit_rows)),
            flights: VecDeque::new(),
            batch: Batch::default(),
            logits: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// With what can hold texts to constraints; without it, requests that have one are refused.
    #[must_use]
    pub fn with_constrainer(mut self, constrainer: Box<dyn Constrainer>) -> Self {
        self.constrainer = Some(constrainer);
        self
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, for calls that the engine does not make. Its KV is the engine's.
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    /// The queues and blocks, to look at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Forgets every block that only the prefix cache holds; returns how many.
    pub fn drop_prefix_cache(&mut self) -> usize {
        self.scheduler.drop_prefix_cache()
    }

    /// The constraint of a request, started.
    fn hold(&self, request: &EngineRequest) -> Result<Option<Box<dyn Constrain>>, RequestError> {
        let Some(constraint) = &request.constraint else { return Ok(None) };
        let Some(constrainer) = &self.constrainer else {
            let expected = "none: this engine was loaded without a vocabulary's texts".to_owned();
            return Err(RequestError::InvalidParam { param: "constraint".into(), found: "one".into(), expected });
        };
        constrainer.start(constraint, &request.stop_ids, &request.emitted).map(Some)
    }

    fn forget(&mut self, id: RequestId) {
        self.samplers.remove(&id);
        self.constrained.remove(&id);
    }

    fn report_ended(&mut self, ended: &[Ended], events: &mut Vec<EngineEvent>) {
        for &Ended { id, reason, usage } in ended {
            self.forget(id);
            events.push(EngineEvent::Finished { id, reason, usage });
        }
    }
}

impl<M: StepModel> Engine for LlmEngine<M> {
    fn submit(&mut self, request: EngineRequest) -> Result<(), RequestError> {
        validate(&request, self.model.n_vocab())?;
        let id = request.id;
        let held = self.hold(&request)?;
        let sampler = Sampler::new(&request.sampling, &request.prompt, &request.emitted);
        self.scheduler.submit(request)?;
        self.samplers.insert(id, sampler);
        self.constrained.extend(held.map(|held| (id, held)));
        Ok(())
    }

    fn cancel(&mut self, id: RequestId) {
        self.scheduler.cancel(id);
    }

    fn step(&mut self, events: &mut Vec<EngineEvent>) -> Result<StepReport, EngineError> {
        let mut n_preempted = 0;
        let mut settled = None;
        while settled.is_none() && self.flights.len() <= self.n_ahead {
            let plan = self.scheduler.plan(Instant::now());
            self.counters.preemptions += u64::from(plan.n_preempted);
            n_preempted += plan.n_preempted;
            self.report_ended(&plan.ended, events);
            if plan.work.is_empty() {
                break;
            }
            settled = self.carry_out(plan, events).map_err(engine_error)?;
        }
        let settled = match settled {
            Some(report) => Some(report),
            None => self.settle_oldest(events).map_err(engine_error)?,
        };
        let busy = self.scheduler.is_busy();
        Ok(StepReport { n_preempted, busy, ..settled.unwrap_or_default() })
    }

    fn stats(&self) -> EngineStats {
        let kv = self.scheduler.kv();
        let memory = self.model.memory();
        let prefix = self.scheduler.prefix_stats();
        EngineStats {
            running: index_of(self.scheduler.n_running()),
            waiting: index_of(self.scheduler.n_waiting()),
            queued_tokens: self.scheduler.n_queued_tokens() as u64,
            kv_blocks_used: index_of(kv.n_total() - kv.n_free()),
            kv_blocks_cached: index_of(kv.n_idle()),
            kv_blocks_total: index_of(kv.n_total()),
            kv_block_tokens: index_of(crate::backend::BLOCK_TOKENS),
            steps: self.counters.steps,
            prefill_tokens: self.counters.prefill_tokens,
            decode_tokens: self.counters.decode_tokens,
            preemptions: self.counters.preemptions,
            prefix_queries: prefix.queries,
            prefix_hits: prefix.hits,
            weight_bytes: memory.weights,
            kv_bytes: memory.kv,
            scratch_bytes: memory.scratch,
            // What to give up when a step finds no memory is decided by whoever drives the engine.
            ..EngineStats::default()
        }
    }

    fn teardown(self: Box<Self>) {
        drop(self);
    }
}

fn index_of(n: usize) -> u32 {
    u32::try_from(n).expect("tokens and blocks are counted in 32 bits")
}

/// A backend's error as the engine's owner sees it.
pub fn engine_error(error: BackendError) -> EngineError {
    match error {
        BackendError::OutOfMemory { device, what, requested, free } => {
            EngineError::OutOfMemory { device, what, requested, free }
        }
        BackendError::Unsupported { .. } => EngineError::BadModel(error.to_string()),
        BackendError::Device { device, op, detail } => EngineError::DeviceLost { device, op, detail },
    }
}
