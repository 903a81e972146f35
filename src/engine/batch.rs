//! A step plan as flat arrays for the model.

use super::kv::blocks_for;
use super::scheduler::{Scheduler, StepPlan, Work};
use crate::backend::{Batch, Feed, SeqSpan};

/// Fills `batch` with the work of `plan`: the sequences in the order of the plan, a row of logits for each that chooses. A token that is not
/// known yet is the one that the step before chooses.
pub(super) fn fill(batch: &mut Batch, plan: &StepPlan, scheduler: &Scheduler) {
    batch.tokens.clear();
    batch.positions.clear();
    batch.slots.clear();
    batch.spans.clear();
    batch.logit_rows.clear();
    batch.feeds.clear();
    for work in &plan.work {
        push(batch, work, scheduler);
    }
}

fn push(batch: &mut Batch, work: &Work, scheduler: &Scheduler) {
    let sequence = scheduler.sequence(work.key);
    let first = batch.tokens.len();
    let kv_len = work.first + work.n_tokens;
    let position = |index: usize| u32::try_from(index).expect("a context has fewer than 2^32 tokens");
    let n_known = sequence.tokens().len().min(kv_len);
    batch.tokens.extend_from_slice(&sequence.tokens()[work.first.min(n_known)..n_known]);
    if n_known < kv_len {
        let row = work.feed.expect("a token that is not known is awaited");
        batch.feeds.push(Feed { token: position(batch.tokens.len()), row });
        batch.tokens.push(0);
    }
    batch.positions.extend((work.first..kv_len).map(position));
    batch.slots.extend((work.first..kv_len).map(|index| sequence.table().slot(index)));
    let blocks = sequence.table().blocks()[..blocks_for(kv_len)].to_vec();
    batch.spans.push(SeqSpan { first, n_tokens: work.n_tokens, kv_len, blocks });
    if work.chooses {
        batch.logit_rows.push(position(batch.tokens.len() - 1));
    }
}
