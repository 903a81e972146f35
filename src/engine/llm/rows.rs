//! What the rows of a step are chosen under, and their choice: as a device makes it, or here.

use super::{LlmEngine, index_of};
use crate::backend::SampleRow;
use crate::engine::StepModel;
use crate::engine::sampler::{Chosen, RowOptions, SampleError, Sampler, TokenMask};
use crate::engine::scheduler::{Scheduler, StepPlan, Work};
use playhouse_actors::engine::{RequestError, RequestId, Task};
use rayon::prelude::*;
use std::collections::HashMap;

/// Ids that a sequence has seen, each with how often it is in the output.
type Seen = Vec<(u32, u32)>;

/// A row of logits of a step, and what its token is chosen under.
pub(super) struct Row {
    pub(super) work: Work,
    /// Index of the token in the output.
    pub(super) index: u32,
    /// The tokens that may follow, or why that cannot be said; `None` where all may.
    mask: Option<Result<TokenMask, RequestError>>,
    /// The slot in which the device counts the sequence's tokens, and what is to be written there first, if ids are penalised.
    history: Option<(u32, Option<Seen>)>,
}

/// What became of a row.
pub(super) enum Settled {
    Chosen(Chosen),
    Embedded,
    Failed(RequestError),
}

impl Row {
    /// Why the request cannot go on, whatever the model says.
    pub(super) fn take_failure(&mut self) -> Option<RequestError> {
        self.mask.take().and_then(Result::err)
    }

    /// Whether the device counts the token that it chooses.
    pub(super) fn is_counted(&self) -> bool {
        self.history.is_some()
    }
}

impl<M: StepModel> LlmEngine<M> {
    /// The rows of a step that is about to begin.
    pub(super) fn rows(&mut self, plan: &StepPlan) -> Vec<Row> {
        plan.work.iter().filter(|work| work.chooses).map(|work| self.row(*work)).collect()
    }

    fn row(&mut self, work: Work) -> Row {
        let sequence = self.scheduler.sequence(work.key);
        let (id, index) = (sequence.request().id, index_of(sequence.next_index()));
        let n_vocab = self.model.n_vocab();
        let mask = self.constrained.get_mut(&id).map(|held| held.mask(n_vocab));
        let sampler = &self.samplers[&id];
        let (scheduler, histories) = (&self.scheduler, &mut self.histories);
        let history = (self.chooses_there && sampler.is_penalised()).then(|| {
            let (slot, is_right) = histories.slot(work.key, index, |key| scheduler.is_running(key));
            (slot, (!is_right).then(|| sampler.counts()))
        });
        Row { work, index, mask, history }
    }

    /// Chooses from the logits of the last step, each row on its own.
    pub(super) fn choose_here(&mut self, rows: &[Row]) -> Vec<Settled> {
        let (scheduler, samplers) = (&self.scheduler, &self.samplers);
        let choose = |(row, logits): (&Row, &mut [f32])| {
            if scheduler.sequence(row.work.key).request().task == Task::Embed {
                return Settled::Embedded;
            }
            if let Some(Err(error)) = &row.mask {
                return Settled::Failed(error.clone());
            }
            let (sampler, options) = under(row, scheduler, samplers);
            settled(sampler.choose(logits, row.index, options), row.index)
        };
        rows.par_iter().zip(self.logits.par_chunks_mut(self.model.n_vocab())).map(choose).collect()
    }
}

/// The rows as a device samples them; `None` if one of them is for the host. A row whose request has failed is sampled like any other, and
/// the result ignored.
pub(super) fn on_device<'a>(
    rows: &'a [Row],
    scheduler: &'a Scheduler,
    samplers: &'a HashMap<RequestId, Sampler>,
) -> Option<Vec<SampleRow<'a>>> {
    let on_device = |row: &'a Row| {
        let (sampler, options) = under(row, scheduler, samplers);
        let history = row.history.as_ref().map(|(slot, fresh)| (*slot, fresh.as_deref()));
        let is_for_host = scheduler.sequence(row.work.key).request().task == Task::Embed;
        (!is_for_host).then(|| sampler.on_device(row.index, options, history))
    };
    rows.iter().map(on_device).collect()
}

fn under<'a>(
    row: &'a Row,
    scheduler: &'a Scheduler,
    samplers: &'a HashMap<RequestId, Sampler>,
) -> (&'a Sampler, RowOptions<'a>) {
    let sequence = scheduler.sequence(row.work.key);
    let request = sequence.request();
    let forbidden: &[u32] = if row.index < request.min_tokens { &request.stop_ids } else { &[] };
    let mask = row.mask.as_ref().and_then(|mask| mask.as_ref().ok());
    (&samplers[&request.id], RowOptions { forbidden, mask, n_logprobs: request.logprobs })
}

pub(super) fn settled(choice: Result<Chosen, SampleError>, index: u32) -> Settled {
    match choice {
        Ok(chosen) => Settled::Chosen(chosen),
        Err(SampleError::NotFinite { token, found }) => {
            Settled::Failed(RequestError::BadLogits { index, token, found: found.to_string() })
        }
        Err(SampleError::NothingToChoose) => Settled::Failed(RequestError::NothingToChoose { index }),
    }
}
