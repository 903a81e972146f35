//! The choice of tokens on the GPU, and the way of requests and tokens over the bus.
//!
//! Everything the host writes or reads exists twice: while the GPU has one step, the host prepares the next. The kernel reads what a step is
//! sampled under where the step's upload put it, and writes what it chose to the host's memory; an event says when that is there.

use super::tensor::CudaTensor;
use super::{CudaBackend, misuse};
use crate::backend::{ModelShape, SampleRow, Sampled};
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer};
use playhouse_cuda::gpu::Gpu;
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::feed::Piece;
use playhouse_cuda::launch::sample::{self, Landing, Limits, Outcome, Request, RowParams, Sampler};
use playhouse_cuda::pinned::Pinned;
use playhouse_cuda::stream::Event;
use std::collections::VecDeque;

/// Most likely ids of a row that are reported from the GPU; rows that want more stay with the host.
const MAX_TOP: usize = 20;
/// Ids that the histories of a step's new sequences may list before the stream is waited for.
const FRESH: usize = 1 << 16;
/// Entries of bias and forbidden ids of a step, per row; steps that want more stay with the host.
const LISTED: usize = 64;

/// What the sampling kernel is allocated for.
pub(super) fn limits(shape: &ModelShape) -> Limits {
    let rows = shape.max_logit_rows;
    let listed = LISTED * rows;
    Limits { n_vocab: shape.n_vocab, rows, bias: listed, forbidden: listed, masks: rows, histories: rows, top: MAX_TOP }
}

/// The kernel's buffers with their ends on the host.
pub(super) struct Sampling {
    sampler: Sampler,
    turns: [Turn; 2],
    /// The turn of the last step.
    turn: usize,
    /// Rows of the step that is about to begin or has begun, until their choice is enqueued.
    announced: Option<Announced>,
    /// Steps whose choice is enqueued and not taken, oldest first.
    flights: VecDeque<Flight>,
}

/// The host's memory of every other step.
struct Turn {
    rows: Pinned<RowParams>,
    bias_ids: Pinned<u32>,
    biases: Pinned<f32>,
    forbidden: Pinned<u32>,
    masks: Pinned<u64>,
    /// What histories that begin are to hold: pairs of id and count.
    fresh: Pinned<u32>,
    landing: Landing,
    /// The results have landed.
    landed: Event,
}

/// How much of a turn's memory a step uses, until it is uploaded.
struct Announced {
    n_logprobs: Vec<Option<u32>>,
    n_bias: usize,
    n_forbidden: usize,
    n_mask_words: usize,
    is_uploaded: bool,
}

struct Flight {
    turn: usize,
    /// Per row.
    n_logprobs: Vec<Option<u32>>,
}

impl Turn {
    fn new(gpu: &Gpu, limits: &Limits) -> Result<Self, CudaError> {
        Ok(Self {
            rows: Pinned::new(gpu, limits.rows)?,
            bias_ids: Pinned::new(gpu, limits.bias)?,
            biases: Pinned::new(gpu, limits.bias)?,
            forbidden: Pinned::new(gpu, limits.forbidden)?,
            masks: Pinned::new(gpu, limits.masks * limits.n_vocab.div_ceil(64))?,
            fresh: Pinned::new(gpu, 2 * FRESH.max(limits.n_vocab))?,
            landing: Landing::new(gpu, limits)?,
            landed: Event::new(gpu)?,
        })
    }

    /// Writes the histories that begin with these rows.
    fn begin_histories(
        &mut self,
        kernels: &Kernels,
        sampler: &Sampler,
        rows: &[SampleRow<'_>],
    ) -> Result<(), CudaError> {
        let mut at = 0;
        for (slot, seen) in rows.iter().filter_map(|row| row.penalties).filter_map(|p| Some((p.history, p.fresh?))) {
            let history = sampler.history(slot);
            history.clear()?;
            if seen.is_empty() {
                continue;
            }
            if at + 2 * seen.len() > self.fresh.len() {
                // An id is listed once, so that one sequence's always fit.
                kernels.gpu().synchronize()?;
                at = 0;
            }
            let pairs = self.fresh[at..].iter_mut().zip(seen.iter().flat_map(|(id, count)| [*id, *count]));
            pairs.for_each(|(place, value)| *place = value);
            history.write(kernels, &self.fresh, at, seen.len())?;
            at += 2 * seen.len();
        }
        Ok(())
    }
}

impl Sampling {
    pub(super) fn new(gpu: &Gpu, arena: &Arena, limits: Limits) -> Result<Self, CudaError> {
        Ok(Self {
            sampler: Sampler::new(arena, limits)?,
            turns: [Turn::new(gpu, &limits)?, Turn::new(gpu, &limits)?],
            turn: 0,
            announced: None,
            flights: VecDeque::new(),
        })
    }

    /// The ids that the last step chose, by row.
    pub(super) fn chosen(&self) -> &Buffer<u32> {
        &self.sampler.outputs.tokens
    }

    /// Whether the buffers take these rows.
    fn takes(&self, rows: &[SampleRow<'_>]) -> bool {
        let limits = &self.sampler.limits;
        let sum = |len: fn(&SampleRow<'_>) -> usize| rows.iter().map(len).sum::<usize>();
        rows.len() <= limits.rows
            && sum(|r| r.bias.len()) <= limits.bias
            && sum(|r| r.forbidden.len()) <= limits.forbidden
            && rows.iter().all(|r| r.n_logprobs.unwrap_or(0) as usize <= limits.top)
    }

    /// Puts rows where the next step's upload takes them from; `false` where the buffers do not take them.
    fn announce(&mut self, kernels: &Kernels, rows: &[SampleRow<'_>]) -> Result<bool, CudaError> {
        if !self.takes(rows) {
            return Ok(false);
        }
        if self.flights.len() >= self.turns.len() {
            return Err(misuse("a step", "the tokens of the step before the last to be taken", "two steps under way"));
        }
        let limits = self.sampler.limits;
        let packed = sample::pack(&requests(rows), &limits)?;
        // The step before the last is over: its tokens were taken.
        self.turn = 1 - self.turn;
        let turn = &mut self.turns[self.turn];
        turn.rows[..rows.len()].copy_from_slice(&packed.rows);
        turn.bias_ids[..packed.bias_ids.len()].copy_from_slice(&packed.bias_ids);
        turn.biases[..packed.biases.len()].copy_from_slice(&packed.biases);
        turn.forbidden[..packed.forbidden.len()].copy_from_slice(&packed.forbidden);
        let n_words = limits.n_vocab.div_ceil(64);
        let masks: Vec<&[u64]> = rows.iter().filter_map(|row| row.mask).collect();
        for (place, mask) in turn.masks.chunks_exact_mut(n_words).zip(&masks) {
            place.copy_from_slice(mask);
        }
        turn.begin_histories(kernels, &self.sampler, rows)?;
        self.announced = Some(Announced {
            n_logprobs: rows.iter().map(|row| row.n_logprobs).collect(),
            n_bias: packed.biases.len(),
            n_forbidden: packed.forbidden.len(),
            n_mask_words: n_words * masks.len(),
            is_uploaded: false,
        });
        Ok(true)
    }

    /// What the upload of the step that begins takes along.
    pub(super) fn pieces(&mut self) -> Result<Vec<Piece<'_>>, CudaError> {
        let Some(announced) = self.announced.as_mut().filter(|announced| !announced.is_uploaded) else {
            return Ok(Vec::new());
        };
        announced.is_uploaded = true;
        let (turn, inputs) = (&self.turns[self.turn], &self.sampler.inputs);
        let pieces = [
            Piece::new(&turn.rows, &inputs.rows, announced.n_logprobs.len())?,
            Piece::new(&turn.bias_ids, &inputs.bias_ids, announced.n_bias)?,
            Piece::new(&turn.biases, &inputs.biases, announced.n_bias)?,
            Piece::new(&turn.forbidden, &inputs.forbidden, announced.n_forbidden)?,
            Piece::new(&turn.masks, &inputs.masks, announced.n_mask_words)?,
        ];
        Ok(pieces.into_iter().filter(|piece| !piece.is_empty()).collect())
    }

    /// Enqueues the choice of the announced rows.
    fn choose(&mut self, kernels: &Kernels, logits: &CudaTensor) -> Result<(), CudaError> {
        let announced = self.announced.take().filter(|announced| announced.is_uploaded);
        let announced = announced.ok_or_else(|| misuse("choose", "rows that were announced", "none"))?;
        let turn = &mut self.turns[self.turn];
        let n = announced.n_logprobs.len();
        if n > 0 {
            let logits = logits.full(self.sampler.limits.n_vocab)?;
            self.sampler.launch_for_host(kernels, &logits, n, &mut turn.landing)?;
        }
        turn.landed.record(None)?;
        self.flights.push_back(Flight { turn: self.turn, n_logprobs: announced.n_logprobs });
        Ok(())
    }

    /// Waits for the oldest choice and reads it.
    fn take(&mut self) -> Result<Vec<Sampled>, CudaError> {
        let Some(flight) = self.flights.pop_front() else { return Ok(Vec::new()) };
        let Turn { landing, landed, .. } = &self.turns[flight.turn];
        landed.synchronize()?;
        let top = self.sampler.limits.top;
        let sampled = |(i, n_logprobs): (usize, &Option<u32>)| {
            Ok(match landing.results[i].outcome() {
                Outcome::Chosen { token, logprob, n_top } => {
                    let one = |j: usize| (landing.top_tokens[i * top + j], landing.top_logprobs[i * top + j]);
                    let n_top = n_top.min(n_logprobs.unwrap_or(0) as usize);
                    Sampled::Token { token, logprobs: n_logprobs.map(|_| (logprob, (0..n_top).map(one).collect())) }
                }
                Outcome::NotFinite { token, found } => Sampled::NotFinite { token, found },
                Outcome::NothingToChoose => Sampled::NothingToChoose,
                Outcome::Unused => return Err(misuse("sample", "a row in use", "an unused one")),
            })
        };
        flight.n_logprobs.iter().enumerate().map(sampled).collect()
    }
}

impl CudaBackend {
    /// See `Backend::will_choose`.
    pub(super) fn announce(&mut self, rows: &[SampleRow<'_>]) -> Result<bool, CudaError> {
        self.gpu.bind()?;
        self.sampling.as_mut().map_or(Ok(false), |sampling| sampling.announce(&self.kernels, rows))
    }

    /// See `Backend::choose`.
    pub(super) fn run_choose(&mut self, logits: &CudaTensor) -> Result<(), CudaError> {
        let sampling =
            self.sampling.as_mut().ok_or_else(|| misuse("choose", "reserve before the first step", "none"))?;
        sampling.choose(&self.kernels, logits)
    }

    /// See `Backend::chosen`.
    pub(super) fn take_chosen(&mut self) -> Result<Vec<Sampled>, CudaError> {
        self.sampling.as_mut().map_or(Ok(Vec::new()), Sampling::take)
    }
}

/// Rows as the kernel's launcher takes them; masks are numbered as they come.
fn requests<'a>(rows: &[SampleRow<'a>]) -> Vec<Option<Request<'a>>> {
    let mut masks = 0..;
    rows.iter().map(|row| Some(Request { mask: row.mask.and_then(|_| masks.next()), ..request(row) })).collect()
}

fn request<'a>(row: &SampleRow<'a>) -> Request<'a> {
    let SampleRow { temperature, top_k, top_p, min_p, seed, choice, index, bias, forbidden, n_logprobs, .. } = *row;
    let plain = Request {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        choice,
        index,
        bias,
        forbidden,
        n_logprobs,
        ..Request::greedy()
    };
    match row.penalties {
        None => plain,
        Some(p) => Request {
            repetition_penalty: p.repetition,
            presence_penalty: p.presence,
            frequency_penalty: p.frequency,
            history: Some(p.history),
            ..plain
        },
    }
}
