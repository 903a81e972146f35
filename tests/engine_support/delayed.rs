//! A model that runs its steps as late as it may, as a device does that is behind its host: when the result is asked for.
//!
//! It chooses tokens itself and counts, per slot, what it chose, as a GPU's memory does: a slot that the engine did not write anew, or
//! wrote with the wrong counts, changes the text.

use super::FakeModel;
use playhouse::backend::{BackendError, Batch, MemoryUse, SampleRow, Sampled};
use playhouse::engine::sampler::{RowOptions, SampleError, Sampler};
use playhouse::engine::{StepCapacity, StepModel, TokenMask};
use playhouse_actors::engine::SamplingParams;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// The model.
#[derive(Debug)]
pub(crate) struct Delayed {
    pub(crate) fake: FakeModel,
    /// Steps, counted from 0 in the order of their beginning, that are refused for want of memory.
    pub(crate) refused: Vec<u64>,
    /// Whether rows with log probabilities are left to the host.
    pub(crate) leaves_logprobs: bool,
    n_begun: u64,
    is_lost: bool,
    /// Steps under way that build on one that failed: they write what they like, and choose nothing.
    n_doomed: usize,
    under_way: VecDeque<(Batch, Vec<Row>)>,
    chosen: Vec<u32>,
    histories: HashMap<u32, BTreeMap<u32, u32>>,
    /// Tokens that were fed from the step before.
    pub(crate) n_fed: u64,
    /// The most steps that were under way at once.
    pub(crate) most: usize,
}

/// Ids with how often they are in the output.
type Seen = Vec<(u32, u32)>;

/// A [`SampleRow`] that owns what it points to.
#[derive(Debug, Clone)]
struct Row {
    params: SamplingParams,
    index: u32,
    history: Option<(u32, Option<Seen>)>,
    mask: Option<Vec<u64>>,
    forbidden: Vec<u32>,
    n_logprobs: Option<u32>,
}

impl Row {
    fn of(row: &SampleRow<'_>) -> Row {
        let SampleRow { temperature, top_k, top_p, min_p, seed, choice, .. } = *row;
        let penalties = row.penalties.map_or((1.0, 0.0, 0.0), |p| (p.repetition, p.presence, p.frequency));
        let params = SamplingParams {
            logit_bias: row.bias.to_vec(),
            repetition_penalty: penalties.0,
            presence_penalty: penalties.1,
            frequency_penalty: penalties.2,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            choice,
        };
        Row {
            params,
            index: row.index,
            history: row.penalties.map(|p| (p.history, p.fresh.map(<[_]>::to_vec))),
            mask: row.mask.map(<[u64]>::to_vec),
            forbidden: row.forbidden.to_vec(),
            n_logprobs: row.n_logprobs,
        }
    }
}

impl Delayed {
    pub(crate) fn new(fake: FakeModel) -> Self {
        Self {
            fake,
            refused: vec![],
            leaves_logprobs: false,
            n_begun: 0,
            is_lost: false,
            n_doomed: 0,
            under_way: VecDeque::new(),
            chosen: vec![],
            histories: HashMap::new(),
            n_fed: 0,
            most: 0,
        }
    }

    fn choose(&mut self, row: &Row, logits: &mut [f32]) -> Sampled {
        let (mut prompt, mut emitted) = (Vec::new(), Vec::new());
        if let Some((slot, fresh)) = &row.history {
            assert!((*slot as usize) < self.fake.capacity.max_logit_rows, "slot {slot}");
            if let Some(fresh) = fresh {
                self.histories.insert(*slot, fresh.iter().copied().collect());
                assert_eq!(self.histories[slot].len(), fresh.len(), "an id is listed once");
            }
            for (&token, &count) in self.histories.get(slot).expect("a history begins with what it is to hold") {
                prompt.push(token);
                emitted.extend(std::iter::repeat_n(token, count as usize));
            }
        }
        let mask = row.mask.as_ref().map(|words| {
            let mut mask = TokenMask::none(logits.len());
            let is_allowed = |token: &u32| words[*token as usize / 64] >> (token % 64) & 1 == 1;
            (0..logits.len() as u32).filter(is_allowed).for_each(|token| mask.allow(token));
            mask
        });
        // The penalties know a prompt only for repetition; ids that are in both lists count as emitted.
        let sampler = Sampler::new(&row.params, &prompt, &emitted);
        let options = RowOptions { forbidden: &row.forbidden, mask: mask.as_ref(), n_logprobs: row.n_logprobs };
        match sampler.choose(logits, row.index, options) {
            Ok(chosen) => {
                if let Some((slot, _)) = row.history {
                    *self.histories.entry(slot).or_default().entry(chosen.token).or_insert(0) += 1;
                }
                let listed = |l: playhouse_actors::engine::TokenLogprobs| {
                    (l.chosen, l.top.iter().map(|t| (t.token, t.logprob)).collect())
                };
                Sampled::Token { token: chosen.token, logprobs: chosen.logprobs.map(listed) }
            }
            Err(SampleError::NotFinite { token, found }) => Sampled::NotFinite { token, found },
            Err(SampleError::NothingToChoose) => Sampled::NothingToChoose,
        }
    }
}

impl StepModel for Delayed {
    fn n_vocab(&self) -> usize {
        self.fake.n_vocab()
    }

    fn n_ctx(&self) -> usize {
        self.fake.n_ctx()
    }

    fn capacity(&self) -> StepCapacity {
        self.fake.capacity()
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        assert!(self.under_way.is_empty() && batch.feeds.is_empty(), "nothing is under way");
        self.n_begun += 1;
        self.fake.run(batch, logits)
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        assert!(self.under_way.is_empty(), "nothing is under way");
        self.fake.hidden(rows, hidden)
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn enqueue(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        if self.leaves_logprobs && rows.iter().any(|row| row.n_logprobs.is_some()) {
            return Ok(false);
        }
        assert!(self.under_way.len() < 2, "at most one other step is under way");
        assert_eq!(rows.len(), batch.logit_rows.len());
        let n_before = self.under_way.back().map_or(0, |(_, rows)| rows.len());
        assert!(batch.feeds.iter().all(|feed| (feed.row as usize) < n_before), "a feed is a row of the step before");
        let step = self.n_begun;
        self.n_begun += 1;
        if self.refused.contains(&step) {
            let (device, what) = ("fake".into(), "a step".into());
            return Err(BackendError::OutOfMemory { device, what, requested: 2, free: 1 });
        }
        self.under_way.push_back((batch.clone(), rows.iter().map(Row::of).collect()));
        self.most = self.most.max(self.under_way.len());
        Ok(true)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, BackendError> {
        let (mut batch, rows) = self.under_way.pop_front().expect("a step is under way");
        if self.is_lost {
            return Err(BackendError::Device { device: "fake".into(), op: "collect".into(), detail: "lost".into() });
        }
        for feed in std::mem::take(&mut batch.feeds) {
            // After a step that failed there may be nothing; then nobody will look at this one.
            batch.tokens[feed.token as usize] = self.chosen.get(feed.row as usize).copied().unwrap_or(0);
            self.n_fed += 1;
        }
        let mut logits = Vec::new();
        let result = self.fake.run(&batch, &mut logits);
        self.is_lost = matches!(result, Err(BackendError::Device { .. }));
        if self.n_doomed > 0 {
            self.n_doomed -= 1;
            return Ok(vec![Sampled::NothingToChoose; rows.len()]);
        }
        if let Err(error) = result {
            self.n_doomed = self.under_way.len();
            return Err(error);
        }
        let n_vocab = self.fake.n_vocab;
        let sampled: Vec<Sampled> =
            rows.iter().zip(logits.chunks_mut(n_vocab)).map(|(row, logits)| self.choose(row, logits)).collect();
        let token = |sampled: &Sampled| if let Sampled::Token { token, .. } = sampled { *token } else { 0 };
        self.chosen = sampled.iter().map(token).collect();
        Ok(sampled)
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.fake.copy_blocks(pairs)
    }

    fn memory(&self) -> MemoryUse {
        self.fake.memory()
    }
}
