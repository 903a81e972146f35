//! The engine: a resident model, a scheduler and a sampler per sequence. Schedule, run, choose, take note.

use super::constrain::{Constrain, Constrainer};
use super::sampler::{Chosen, RowOptions, SampleError, Sampler, TokenMask};
use super::scheduler::{Ended, Outcome, Scheduler, SchedulerLimits, StepPlan, Work};
use super::validate::validate;
use super::{StepModel, batch};
use crate::backend::{BackendError, Batch, SampleRow};
use playhouse_actors::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, EngineStats, RequestError, RequestId, StepReport, Task,
};
use rayon::prelude::*;
use std::collections::HashMap;
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
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_sequences: usize::MAX, prefill_chunk: 512, prefix_cache: true }
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
    batch: Batch,
    logits: Vec<f32>,
    counters: Counters,
}

/// The tokens that may follow, or why that cannot be said; `None` where all may.
type Mask = Option<Result<TokenMask, RequestError>>;

/// What became of a row.
enum Settled {
    Chosen(Chosen),
    Embedded,
    Failed(RequestError),
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
            model,
            scheduler,
            samplers: HashMap::new(),
            constrainer: None,
            constrained: HashMap::new(),
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

    /// Runs the step and chooses the next token of every sequence whose logits it computed, each on its own: on the device if
    /// it can, for all or for none.
    fn run_and_choose(&mut self, plan: &StepPlan) -> Result<Vec<(Work, Settled)>, BackendError> {
        let works: Vec<Work> = plan.work.iter().copied().filter(|work| work.chooses).collect();
        let masks = self.masks(&works);
        let (scheduler, samplers) = (&self.scheduler, &self.samplers);
        let of = |work: &Work| {
            let sequence = scheduler.sequence(work.key);
            let request = sequence.request();
            let options = RowOptions { forbidden: sequence.forbidden(), mask: None, n_logprobs: request.logprobs };
            (request, &samplers[&request.id], index_of(sequence.n_emitted()), options)
        };
        let on_device = |(work, mask): (&Work, &Mask)| {
            let (request, sampler, index, options) = of(work);
            let is_plain = request.task == Task::Generate && mask.is_none();
            is_plain.then(|| sampler.on_device(index, options)).flatten()
        };
        let rows: Option<Vec<SampleRow<'_>>> = works.iter().zip(&masks).map(on_device).collect();
        let sampled = match rows.filter(|rows| !rows.is_empty()) {
            Some(rows) => self.model.run_and_choose(&self.batch, &rows, &mut self.logits)?,
            None => self.model.run(&self.batch, &mut self.logits).map(|()| None)?,
        };
        if let Some(sampled) = sampled {
            let settled =
                works.iter().zip(sampled).map(|(work, sampled)| settled(Chosen::on_device(sampled), of(work).2));
            let settled: Vec<Settled> = settled.collect();
            return Ok(works.into_iter().zip(settled).collect());
        }
        let rows = self.logits.par_chunks_mut(self.model.n_vocab());
        let choose_row = |((work, mask), row): ((&Work, Mask), &mut [f32])| {
            let (request, sampler, index, options) = of(work);
            if request.task == Task::Embed {
                return (*work, Settled::Embedded);
            }
            match mask.transpose() {
                Ok(mask) => {
                    let options = RowOptions { mask: mask.as_ref(), ..options };
                    (*work, settled(sampler.choose(row, index, options), index))
                }
                Err(error) => (*work, Settled::Failed(error)),
            }
        };
        Ok(works.par_iter().zip(masks).zip(rows).map(choose_row).collect())
    }

    /// What may follow in each of `works` that is held to a form.
    fn masks(&mut self, works: &[Work]) -> Vec<Mask> {
        let n_vocab = self.model.n_vocab();
        let id = |work: &Work| self.scheduler.sequence(work.key).request().id;
        let ids: Vec<RequestId> = works.iter().map(id).collect();
        ids.iter().map(|id| Some(self.constrained.get_mut(id)?.mask(n_vocab))).collect()
    }

    /// The hidden states that embeddings asked for, in the order of `works`.
    fn embed(&mut self, works: &[Work]) -> Result<Vec<Vec<f32>>, BackendError> {
        let is_embed = |work: &Work| self.scheduler.sequence(work.key).request().task == Task::Embed;
        let rows: Vec<u32> =
            works.iter().zip(&self.batch.logit_rows).filter(|(work, _)| is_embed(work)).map(|(_, row)| *row).collect();
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut hidden = Vec::new();
        self.model.hidden(&rows, &mut hidden)?;
        Ok(hidden.chunks_exact(hidden.len() / rows.len()).map(<[f32]>::to_vec).collect())
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

    /// Turns the choices into events and hands them to the scheduler.
    fn settle(
        &mut self,
        plan: &StepPlan,
        choices: Vec<(Work, Settled)>,
        events: &mut Vec<EngineEvent>,
    ) -> Result<(), BackendError> {
        let works: Vec<Work> = choices.iter().map(|(work, _)| *work).collect();
        let mut hidden = self.embed(&works)?.into_iter();
        let mut outcomes = Vec::new();
        for (work, chosen) in choices {
            let sequence = self.scheduler.sequence(work.key);
            let (id, index) = (sequence.request().id, index_of(sequence.n_emitted()));
            let chosen = match (chosen, self.constrained.get_mut(&id)) {
                (Settled::Chosen(chosen), Some(held)) => {
                    held.push(chosen.token).map_or_else(Settled::Failed, |()| Settled::Chosen(chosen))
                }
                (chosen, _) => chosen,
            };
            match chosen {
                Settled::Chosen(Chosen { token, logprobs }) => {
                    self.samplers.get_mut(&id).expect("live requests have a sampler").push(token);
                    self.counters.decode_tokens += 1;
                    events.push(EngineEvent::Token { id, index, token, logprobs });
                    outcomes.push(Outcome::Token(token));
                }
                Settled::Failed(error) => {
                    self.forget(id);
                    events.push(EngineEvent::Failed { id, error });
                    outcomes.push(Outcome::Without);
                }
                Settled::Embedded => {
                    let usage = sequence.usage();
                    self.forget(id);
                    let values = hidden.next().expect("a row for each embedding");
                    events.push(EngineEvent::Embedded { id, values, usage });
                    outcomes.push(Outcome::Without);
                }
            }
        }
        let ended = self.scheduler.commit(plan, &outcomes);
        self.report_ended(&ended, events);
        Ok(())
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

    fn count(&mut self, plan: &StepPlan) -> StepReport {
        let is_decode = |work: &&Work| {
            let sequence = self.scheduler.sequence(work.key);
            work.chooses && work.n_tokens == 1 && sequence.n_emitted() > 0
        };
        let n_decode = index_of(plan.work.iter().filter(is_decode).count());
        let n_tokens = index_of(plan.work.iter().map(|work| work.n_tokens).sum());
        self.counters.steps += 1;
        self.counters.prefill_tokens += u64::from(n_tokens - n_decode);
        StepReport {
            n_sequences: index_of(plan.work.len()),
            n_prefill_tokens: n_tokens - n_decode,
            n_decode_tokens: n_decode,
            n_preempted: plan.n_preempted,
            busy: false,
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
        let plan = self.scheduler.plan(Instant::now());
        self.counters.preemptions += u64::from(plan.n_preempted);
        self.report_ended(&plan.ended, events);
        if plan.work.is_empty() {
            let busy = self.scheduler.is_busy();
            return Ok(StepReport { n_preempted: plan.n_preempted, busy, ..StepReport::default() });
        }
        batch::fill(&mut self.batch, &plan, &self.scheduler);
        let choices = self.run_and_choose(&plan).map_err(engine_error)?;
        let report = self.count(&plan);
        self.settle(&plan, choices, events).map_err(engine_error)?;
        Ok(StepReport { busy: self.scheduler.is_busy(), ..report })
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

fn settled(choice: Result<Chosen, SampleError>, index: u32) -> Settled {
    match choice {
        Ok(chosen) => Settled::Chosen(chosen),
        Err(error) => Settled::Failed(request_error(error, index)),
    }
}

fn request_error(error: SampleError, index: u32) -> RequestError {
    match error {
        SampleError::NotFinite { token, found } => RequestError::BadLogits { index, token, found: found.to_string() },
        SampleError::NothingToChoose => RequestError::NothingToChoose { index },
    }
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
