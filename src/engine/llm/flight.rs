//! Steps from their plan to their events: given to the device and settled later, or run here and settled at once.

use super::rows::{Row, Settled, on_device, settled};
use super::{LlmEngine, index_of};
use crate::backend::BackendError;
use crate::engine::sampler::Chosen;
use crate::engine::scheduler::{Outcome, StepPlan};
use crate::engine::{StepModel, batch};
use playhouse_actors::engine::{EngineEvent, StepReport, Task};

/// A step that the device has and whose tokens the host does not know.
pub(super) struct Flight {
    plan: StepPlan,
    rows: Vec<Row>,
    report: StepReport,
}

impl<M: StepModel> LlmEngine<M> {
    /// Gives a step to the device, to be settled later; or, where its tokens are to be chosen here, settles what is under way, runs it and
    /// settles it, too: then its report is returned.
    ///
    /// # Errors
    /// The step was not carried out. What was under way is settled, if the device is well.
    pub(super) fn carry_out(
        &mut self,
        plan: StepPlan,
        events: &mut Vec<EngineEvent>,
    ) -> Result<Option<StepReport>, BackendError> {
        batch::fill(&mut self.batch, &plan, &self.scheduler);
        let rows = self.rows(&plan);
        let there = self.chooses_there.then(|| on_device(&rows, &self.scheduler, &self.samplers)).flatten();
        match there.map_or(Ok(false), |rows| self.model.enqueue(&self.batch, &rows)) {
            Ok(true) => {
                for row in rows.iter().filter(|row| row.is_counted()) {
                    self.histories.counts(row.work.key, row.index + 1);
                }
                let report = self.count(&plan);
                self.scheduler.begin(&plan);
                self.flights.push_back(Flight { plan, rows, report });
                Ok(None)
            }
            Ok(false) => self.run_here(plan, rows, events).map(Some),
            Err(error) => {
                // The first error is the one that matters.
                let _ = self.settle_all(events);
                Err(error)
            }
        }
    }

    /// Runs a step whose tokens are chosen here. Nothing is under way meanwhile.
    fn run_here(
        &mut self,
        mut plan: StepPlan,
        mut rows: Vec<Row>,
        events: &mut Vec<EngineEvent>,
    ) -> Result<StepReport, BackendError> {
        if !self.flights.is_empty() {
            // Some may have ended; what the others chose is known now.
            self.settle_all(events)?;
            plan.work.retain(|work| self.scheduler.is_current(work));
            rows.retain(|row| self.scheduler.is_current(&row.work));
            batch::fill(&mut self.batch, &plan, &self.scheduler);
        }
        if plan.work.is_empty() {
            return Ok(StepReport::default());
        }
        self.model.run(&self.batch, &mut self.logits)?;
        let report = self.count(&plan);
        let settled = self.choose_here(&rows);
        let hidden = self.embed(&rows)?;
        self.settle(&plan, &rows, settled, hidden, events);
        Ok(report)
    }

    /// Waits for the oldest step that is under way and settles it; `None` if there is none.
    ///
    /// # Errors
    /// Nothing will come of any step that is under way: they are planned again.
    pub(super) fn settle_oldest(&mut self, events: &mut Vec<EngineEvent>) -> Result<Option<StepReport>, BackendError> {
        let Some(Flight { plan, mut rows, report }) = self.flights.pop_front() else { return Ok(None) };
        let sampled = match self.model.collect() {
            Ok(sampled) => sampled,
            Err(error) => {
                while self.flights.pop_front().is_some() {
                    // They were computed from what was lost.
                    let _ = self.model.collect();
                }
                self.scheduler.forget_begun();
                return Err(error);
            }
        };
        assert_eq!(sampled.len(), rows.len(), "a choice for each row");
        let of_row = |(row, sampled): (&mut Row, _)| match row.take_failure() {
            Some(error) => Settled::Failed(error),
            None => settled(Chosen::on_device(sampled), row.index),
        };
        let settled = rows.iter_mut().zip(sampled).map(of_row).collect();
        self.settle(&plan, &rows, settled, Vec::new(), events);
        Ok(Some(report))
    }

    fn settle_all(&mut self, events: &mut Vec<EngineEvent>) -> Result<(), BackendError> {
        while self.settle_oldest(events)?.is_some() {}
        Ok(())
    }

    /// Turns the choices into events and hands them to the scheduler. Sequences that have ended since their step began get none.
    fn settle(
        &mut self,
        plan: &StepPlan,
        rows: &[Row],
        settled: Vec<Settled>,
        hidden: Vec<Vec<f32>>,
        events: &mut Vec<EngineEvent>,
    ) {
        let mut hidden = hidden.into_iter();
        let mut outcomes = Vec::with_capacity(rows.len());
        for (row, settled) in rows.iter().zip(settled) {
            let Some(sequence) = self.scheduler.find(row.work.key) else {
                outcomes.push(Outcome::Without);
                continue;
            };
            let (id, index) = (sequence.request().id, row.index);
            let settled = match (settled, self.constrained.get_mut(&id)) {
                (Settled::Chosen(chosen), Some(held)) => {
                    held.push(chosen.token).map_or_else(Settled::Failed, |()| Settled::Chosen(chosen))
                }
                (settled, _) => settled,
            };
            outcomes.push(match settled {
                Settled::Chosen(Chosen { token, logprobs }) => {
                    self.samplers.get_mut(&id).expect("live requests have a sampler").push(token);
                    self.counters.decode_tokens += 1;
                    events.push(EngineEvent::Token { id, index, token, logprobs });
                    Outcome::Token(token)
                }
                Settled::Failed(error) => {
                    self.forget(id);
                    events.push(EngineEvent::Failed { id, error });
                    Outcome::Without
                }
                Settled::Embedded => {
                    let usage = sequence.usage();
                    self.forget(id);
                    let values = hidden.next().expect("a row for each embedding");
                    events.push(EngineEvent::Embedded { id, values, usage });
                    Outcome::Without
                }
            });
        }
        let ended = self.scheduler.commit(plan, &outcomes);
        self.report_ended(&ended, events);
    }

    /// The hidden states that embeddings asked for, in the order of `rows`.
    fn embed(&mut self, rows: &[Row]) -> Result<Vec<Vec<f32>>, BackendError> {
        let is_embed = |row: &Row| self.scheduler.sequence(row.work.key).request().task == Task::Embed;
        let rows: Vec<u32> =
            rows.iter().zip(&self.batch.logit_rows).filter(|(row, _)| is_embed(row)).map(|(_, row)| *row).collect();
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut hidden = Vec::new();
        self.model.hidden(&rows, &mut hidden)?;
        Ok(hidden.chunks_exact(hidden.len() / rows.len()).map(<[f32]>::to_vec).collect())
    }

    /// Counts a step that is carried out; it has not begun for the scheduler.
    fn count(&mut self, plan: &StepPlan) -> StepReport {
        let n_decode = plan.work.iter().filter(|work| {
            let sequence = self.scheduler.sequence(work.key);
            work.chooses && work.n_tokens == 1 && sequence.next_index() > 0
        });
        let n_decode = index_of(n_decode.count());
        let n_tokens = index_of(plan.work.iter().map(|work| work.n_tokens).sum());
        self.counters.steps += 1;
        self.counters.prefill_tokens += u64::from(n_tokens - n_decode);
        StepReport {
            n_sequences: index_of(plan.work.len()),
            n_prefill_tokens: n_tokens - n_decode,
            n_decode_tokens: n_decode,
            ..StepReport::default()
        }
    }
}
