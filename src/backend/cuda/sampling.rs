//! The choice of tokens on the GPU, and the way of requests and tokens over the bus.

use super::CudaBackend;
use super::tensor::CudaTensor;
use crate::backend::{ModelShape, SampleRow, Sampled};
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Arena;
use playhouse_cuda::gpu::Gpu;
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::sample::{self, Limits, Outcome, Request, RowParams, RowResult, Sampler};
use playhouse_cuda::pinned::Pinned;

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
    rows: Pinned<RowParams>,
    results: Pinned<RowResult>,
    top_tokens: Pinned<u32>,
    top_logprobs: Pinned<f32>,
    /// What histories that begin are to hold: pairs of id and count.
    fresh: Pinned<u32>,
}

impl Sampling {
    pub(super) fn new(gpu: &Gpu, arena: &Arena, limits: Limits) -> Result<Self, CudaError> {
        Ok(Self {
            sampler: Sampler::new(arena, limits)?,
            rows: Pinned::new(gpu, limits.rows)?,
            results: Pinned::new(gpu, limits.rows)?,
            top_tokens: Pinned::new(gpu, limits.rows * limits.top)?,
            top_logprobs: Pinned::new(gpu, limits.rows * limits.top)?,
            fresh: Pinned::new(gpu, 2 * FRESH.max(limits.n_vocab))?,
        })
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

    /// Writes the histories that begin with these rows.
    fn begin_histories(&mut self, gpu: &Gpu, kernels: &Kernels, rows: &[SampleRow<'_>]) -> Result<(), CudaError> {
        let mut at = 0;
        for (slot, seen) in rows.iter().filter_map(|row| row.penalties).filter_map(|p| Some((p.history, p.fresh?))) {
            let history = self.sampler.history(slot);
            history.clear()?;
            if seen.is_empty() {
                continue;
            }
            if at + 2 * seen.len() > self.fresh.len() {
                // An id is listed once, so that one sequence's always fit.
                gpu.synchronize()?;
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

impl CudaBackend {
    /// Chooses a token from each of the first rows of `logits`, which are adjusted in place; `None` where the buffers do not take
    /// the requests.
    pub(super) fn run_choose<'a>(
        &mut self,
        logits: &CudaTensor,
        rows: &[SampleRow<'a>],
    ) -> Result<Option<Vec<Sampled>>, CudaError> {
        let Some(sampling) = self.sampling.as_mut().filter(|s| s.takes(rows)) else { return Ok(None) };
        let limits = sampling.sampler.limits;
        let n = rows.len();
        let mut n_masks = 0;
        let mut request_of = |row: &SampleRow<'a>| {
            let mask = row.mask.map(|_| n_masks);
            n_masks += u32::from(mask.is_some());
            Some(Request { mask, ..request(row) })
        };
        let requests: Vec<Option<Request<'_>>> = rows.iter().map(&mut request_of).collect();
        let packed = sample::pack(&requests, &limits)?;
        let inputs = &sampling.sampler.inputs;
        sampling.rows[..n].copy_from_slice(&packed.rows);
        sampling.rows.copy_to(&inputs.rows, n)?;
        if !packed.bias_ids.is_empty() {
            inputs.bias_ids.slice(0..packed.bias_ids.len()).write(&packed.bias_ids)?;
            inputs.biases.slice(0..packed.biases.len()).write(&packed.biases)?;
        }
        if !packed.forbidden.is_empty() {
            inputs.forbidden.slice(0..packed.forbidden.len()).write(&packed.forbidden)?;
        }
        let masks: Vec<u64> = rows.iter().filter_map(|row| row.mask).flatten().copied().collect();
        if !masks.is_empty() {
            inputs.masks.slice(0..masks.len()).write(&masks)?;
        }
        sampling.begin_histories(&self.gpu, &self.kernels, rows)?;
        sampling.sampler.launch(&self.kernels, &logits.full(limits.n_vocab)?, n)?;
        let outputs = &sampling.sampler.outputs;
        sampling.results.copy_from(&outputs.results, n)?;
        if rows.iter().any(|r| r.n_logprobs.unwrap_or(0) > 0) {
            sampling.top_tokens.copy_from(&outputs.top_tokens, n * limits.top)?;
            sampling.top_logprobs.copy_from(&outputs.top_logprobs, n * limits.top)?;
        }
        self.gpu.synchronize()?;
        let sampled = |(i, row): (usize, &SampleRow<'_>)| {
            Ok(match sampling.results[i].outcome() {
                Outcome::Chosen { token, logprob, n_top } => {
                    let top =
                        |j: usize| (sampling.top_tokens[i * limits.top + j], sampling.top_logprobs[i * limits.top + j]);
                    let n_top = n_top.min(row.n_logprobs.unwrap_or(0) as usize);
                    let logprobs = row.n_logprobs.map(|_| (logprob, (0..n_top).map(top).collect()));
                    Sampled::Token { token, logprobs }
                }
                Outcome::NotFinite { token, found } => Sampled::NotFinite { token, found },
                Outcome::NothingToChoose => Sampled::NothingToChoose,
                Outcome::Unused => return Err(super::misuse("sample", "a row in use", "an unused one")),
            })
        };
        rows.iter().enumerate().map(sampled).collect::<Result<_, _>>().map(Some)
    }
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
