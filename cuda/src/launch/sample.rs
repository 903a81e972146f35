//! The choice of tokens from logits: bias, penalties, mask, temperature, top-k, top-p, min-p, the draw, log probabilities.
//!
//! What a row is sampled under changes from step to step and lies in device memory, so that a captured graph serves every
//! step: [`pack`] turns requests into the arrays that the caller copies there.

use super::matmul::Rows;
use crate::arena::{Arena, Buffer, Element};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::kernels::{Args, Kernels, Launch};
use crate::pinned::Pinned;

/// Largest vocabulary: sums of weights stay below 2^64, and a block's tiles fit its table.
pub const MAX_VOCAB: usize = 1 << 20;
/// Most likely ids that can be reported.
pub const MAX_TOP: usize = 256;
/// Threads of a block. Mirrors `THREADS`.
const THREADS: u32 = 512;
/// Rows up to which the largest cluster is used: a cluster of 16 has to find that many free multiprocessors side by side.
const LARGEST_CLUSTER_ROWS: usize = 4;

/// What one row is sampled under.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request<'a> {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 is off.
    pub top_k: u32,
    /// Keep the most likely ids whose mass reaches this; 1 is off.
    pub top_p: f32,
    /// Drop ids less likely than this times the most likely; 0 is off.
    pub min_p: f32,
    /// Divides or multiplies the logits of ids that were seen; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from ids that were emitted; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted times the count; 0 is off.
    pub frequency_penalty: f32,
    /// Key of the random numbers, with `choice` and `index`.
    pub seed: u64,
    /// Which of a request's choices this is.
    pub choice: u32,
    /// Index of the token in the output.
    pub index: u32,
    /// Added to the logits of these ids, in this order.
    pub bias: &'a [(u32, f32)],
    /// Ids that may not be chosen.
    pub forbidden: &'a [u32],
    /// Which of the masks holds the ids that may.
    pub mask: Option<u32>,
    /// Which slot of the history counts the sequence's tokens. Penalties apply only with one; the chosen token is counted.
    pub history: Option<u32>,
    /// Report log probabilities: of the chosen token and of so many most likely.
    pub n_logprobs: Option<u32>,
}

impl Request<'_> {
    /// The most likely id, nothing else.
    pub fn greedy() -> Request<'static> {
        Request {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            choice: 0,
            index: 0,
            bias: &[],
            forbidden: &[],
            mask: None,
            history: None,
            n_logprobs: None,
        }
    }
}

/// A row as the kernel reads it. Mirrors `SampleRow`. All zeros: a place without a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct RowParams {
    temperature: f32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    top_k: u32,
    seed_low: u32,
    seed_high: u32,
    choice: u32,
    index: u32,
    history: i32,
    mask: i32,
    bias_first: i32,
    n_bias: i32,
    forbidden_first: i32,
    n_forbidden: i32,
    n_top: i32,
    is_used: i32,
}

// SAFETY: nineteen numbers of four bytes, no padding.
unsafe impl Element for RowParams {}
const _: () = assert!(size_of::<RowParams>() == 19 * 4);

/// What became of a row. Mirrors `SampleResult`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub struct RowResult {
    status: u32,
    token: u32,
    value: f32,
    n_top: u32,
}

// SAFETY: four numbers of four bytes, no padding.
unsafe impl Element for RowResult {}
const _: () = assert!(size_of::<RowResult>() == 4 * 4);

/// A [`RowResult`] in words.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// A token.
    Chosen {
        /// Its id.
        token: u32,
        /// Its log probability, if asked for.
        logprob: f32,
        /// Entries of the most likely ids that were written.
        n_top: usize,
    },
    /// A logit is not finite: the model's fault.
    NotFinite {
        /// The first such id.
        token: u32,
        /// Its logit.
        found: f32,
    },
    /// Bias, mask or forbidden ids leave nothing.
    NothingToChoose,
    /// The place had no sequence.
    Unused,
}

impl RowResult {
    /// What the numbers say.
    pub fn outcome(self) -> Outcome {
        match self.status {
            0 => Outcome::Chosen { token: self.token, logprob: self.value, n_top: self.n_top as usize },
            1 => Outcome::NotFinite { token: self.token, found: self.value },
            2 => Outcome::NothingToChoose,
            _ => Outcome::Unused,
        }
    }
}

/// Sizes of the arrays that a step's requests are copied into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Ids of a row.
    pub n_vocab: usize,
    /// Rows.
    pub rows: usize,
    /// Bias entries of all rows.
    pub bias: usize,
    /// Forbidden ids of all rows.
    pub forbidden: usize,
    /// Masks.
    pub masks: usize,
    /// Slots of the history.
    pub histories: usize,
    /// Most likely ids reported of a row.
    pub top: usize,
}

impl Limits {
    /// Bytes that [`Sampler::new`] takes from an arena.
    pub fn bytes(&self) -> u64 {
        let words = self.n_vocab.div_ceil(64);
        let listed = [self.bias, self.bias, self.forbidden, self.histories * self.n_vocab].map(|n| 4 * n);
        let reported = [self.rows, self.rows * self.top, self.rows * self.top].map(|n| 4 * n);
        let others = [self.rows * size_of::<RowParams>(), 8 * self.masks * words, self.rows * size_of::<RowResult>()];
        let all = listed.into_iter().chain(reported).chain(others);
        all.map(|bytes| (bytes as u64).next_multiple_of(crate::arena::ALIGN)).sum()
    }
}

/// A step's requests as flat arrays, for the buffers of [`Inputs`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Packed {
    /// `[rows]`.
    pub rows: Vec<RowParams>,
    /// Ids of bias entries; those of one row are sorted, so that entries of one id are neighbours.
    pub bias_ids: Vec<u32>,
    /// What is added to them.
    pub biases: Vec<f32>,
    /// Forbidden ids.
    pub forbidden: Vec<u32>,
}

/// Packs a step's requests, `None` for places without a sequence.
///
/// # Errors
/// [`CudaError::Contract`] for what the limits or the kernel do not allow: nothing that passes makes the kernel leave its buffers.
pub fn pack(requests: &[Option<Request<'_>>], limits: &Limits) -> Result<Packed, CudaError> {
    let mut packed = Packed::default();
    if requests.len() > limits.rows {
        return Err(contract("rows", format!("at most {}", limits.rows), requests.len()));
    }
    for request in requests {
        let row = request.as_ref().map_or(Ok(RowParams::default()), |r| packed.row(r, limits))?;
        packed.rows.push(row);
    }
    Ok(packed)
}

impl Packed {
    fn row(&mut self, request: &Request<'_>, limits: &Limits) -> Result<RowParams, CudaError> {
        request.check(limits)?;
        let (bias_first, forbidden_first) = (self.bias_ids.len(), self.forbidden.len());
        let mut bias = request.bias.to_vec();
        bias.sort_by_key(|&(token, _)| token); // stable: entries of one id stay in their order
        self.bias_ids.extend(bias.iter().map(|&(token, _)| token));
        self.biases.extend(bias.iter().map(|&(_, bias)| bias));
        self.forbidden.extend(request.forbidden);
        if self.biases.len() > limits.bias || self.forbidden.len() > limits.forbidden {
            let expected = format!("at most {} bias entries, {} forbidden ids", limits.bias, limits.forbidden);
            return Err(contract("lists", expected, format!("{}, {}", self.biases.len(), self.forbidden.len())));
        }
        let place = |place: Option<u32>| place.map_or(-1, |p| p as i32);
        Ok(RowParams {
            temperature: request.temperature,
            top_p: request.top_p,
            min_p: request.min_p,
            repetition: request.repetition_penalty,
            presence: request.presence_penalty,
            frequency: request.frequency_penalty,
            top_k: request.top_k,
            seed_low: request.seed as u32,
            seed_high: (request.seed >> 32) as u32,
            choice: request.choice,
            index: request.index,
            history: place(request.history),
            mask: place(request.mask),
            bias_first: bias_first as i32,
            n_bias: bias.len() as i32,
            forbidden_first: forbidden_first as i32,
            n_forbidden: request.forbidden.len() as i32,
            n_top: place(request.n_logprobs),
            is_used: 1,
        })
    }
}

impl Request<'_> {
    fn check(&self, limits: &Limits) -> Result<(), CudaError> {
        let is_finite =
            [self.repetition_penalty, self.presence_penalty, self.frequency_penalty].iter().all(|p| p.is_finite());
        let in_range = |share: f32| (0.0..=1.0).contains(&share);
        let is_warm = self.temperature >= 0.0 && self.temperature.is_finite();
        if !(is_warm && is_finite && in_range(self.top_p) && in_range(self.min_p)) {
            return Err(contract(
                "parameters",
                "a temperature from 0, shares in 0 ..= 1, finite penalties",
                format!("{self:?}"),
            ));
        }
        let ids = self.bias.iter().map(|(token, _)| token).chain(self.forbidden);
        if let Some(id) = ids.copied().find(|id| *id as usize >= limits.n_vocab) {
            return Err(contract("ids", format!("below {}", limits.n_vocab), id));
        }
        if self.bias.iter().any(|(_, bias)| bias.is_nan()) {
            return Err(contract("bias", "numbers", "NaN"));
        }
        let places = [(self.mask, limits.masks, "mask"), (self.history, limits.histories, "history")];
        for (place, n, what) in places {
            if place.is_some_and(|place| place as usize >= n) {
                return Err(contract(what, format!("below {n}"), format!("{place:?}")));
            }
        }
        match self.n_logprobs {
            Some(n) if n as usize > limits.top => {
                Err(contract("log probabilities", format!("at most {}", limits.top), n))
            }
            _ => Ok(()),
        }
    }
}

/// What the kernel reads beside the logits.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// `[rows]`.
    pub rows: Buffer<RowParams>,
    /// As in [`Packed`].
    pub bias_ids: Buffer<u32>,
    /// As in [`Packed`].
    pub biases: Buffer<f32>,
    /// As in [`Packed`].
    pub forbidden: Buffer<u32>,
    /// `[masks, ceil(n_vocab / 64)]`: bit `i % 64` of word `i / 64` allows id `i`.
    pub masks: Buffer<u64>,
    /// `[histories, n_vocab]`: 0 for ids not seen, else 1 + how often the id was emitted. A sequence's row is zeroed when it
    /// begins ([`History::clear`], [`History::write`]); the kernel counts what it chooses.
    pub history: Buffer<u32>,
}

/// What the kernel writes.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// `[rows]`.
    pub results: Buffer<RowResult>,
    /// `[rows]`: the chosen ids alone, as the next step's embedding reads them; 0 where there is none.
    pub tokens: Buffer<u32>,
    /// `[rows, top]`: the most likely ids in order.
    pub top_tokens: Buffer<u32>,
    /// `[rows, top]`: their log probabilities.
    pub top_logprobs: Buffer<f32>,
}

/// Where results land on the host.
#[derive(Debug)]
pub struct Landing {
    /// As [`Outputs::results`].
    pub results: Pinned<RowResult>,
    /// As [`Outputs::top_tokens`].
    pub top_tokens: Pinned<u32>,
    /// As [`Outputs::top_logprobs`].
    pub top_logprobs: Pinned<f32>,
}

impl Landing {
    /// Room for what a sampler with these limits gives.
    ///
    /// # Errors
    /// No memory to lock.
    pub fn new(gpu: &Gpu, limits: &Limits) -> Result<Landing, CudaError> {
        let n_top = limits.rows * limits.top;
        Ok(Landing {
            results: Pinned::new(gpu, limits.rows)?,
            top_tokens: Pinned::new(gpu, n_top)?,
            top_logprobs: Pinned::new(gpu, n_top)?,
        })
    }
}

/// Buffers of a sampler: everything it needs from step to step.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// What they are made for.
    pub limits: Limits,
    /// Read.
    pub inputs: Inputs,
    /// Written.
    pub outputs: Outputs,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct SampleArgs {
    logits: u64,
    rows: u64,
    bias_ids: u64,
    biases: u64,
    forbidden: u64,
    masks: u64,
    history: u64,
    results: u64,
    tokens: u64,
    top_tokens: u64,
    top_logprobs: u64,
    n_vocab: i32,
    stride: i32,
    mask_words: i32,
    max_top: i32,
}

/// Most blocks that a device lets share a row: 16 on data-centre chips, 8 on others, 1 where it has no clusters, or the kernels were not
/// compiled for them ([`Kernels::has_clusters`]).
pub fn max_cluster(capability: (u32, u32), has_clusters: bool) -> u32 {
    match capability.0 {
        _ if !has_clusters => 1,
        9 | 10 => 16,
        _ => 8,
    }
}

/// Blocks that share a row: as many as keep the device's multiprocessors busy once. One row of a vocabulary of 151,936 is read by
/// sixteen on an H200; from 67 rows on each is read by one. The choice changes speed, never bits.
pub fn cluster(n_rows: usize, n_sms: u32, capability: (u32, u32), has_clusters: bool) -> u32 {
    let most = max_cluster(capability, has_clusters);
    if most > 8 && n_rows <= LARGEST_CLUSTER_ROWS {
        return most;
    }
    let mut size = most.min(8);
    while size > 1 && n_rows * size as usize > n_sms as usize {
        size /= 2;
    }
    size
}

impl Sampler {
    /// Takes the buffers.
    ///
    /// # Errors
    /// [`CudaError::Contract`] for limits beyond the kernel's; [`CudaError::OutOfMemory`].
    pub fn new(arena: &Arena, limits: Limits) -> Result<Sampler, CudaError> {
        if limits.n_vocab == 0 || limits.n_vocab > MAX_VOCAB || limits.top > MAX_TOP || limits.rows == 0 {
            let expected = format!("1 to {MAX_VOCAB} ids, 1 or more rows, at most {MAX_TOP} most likely");
            return Err(contract("limits", expected, format!("{limits:?}")));
        }
        let inputs = Inputs {
            rows: arena.alloc(limits.rows, "rows to sample")?,
            bias_ids: arena.alloc(limits.bias, "logit biases")?,
            biases: arena.alloc(limits.bias, "logit biases")?,
            forbidden: arena.alloc(limits.forbidden, "forbidden ids")?,
            masks: arena.alloc(limits.masks * limits.n_vocab.div_ceil(64), "token masks")?,
            history: arena.alloc(limits.histories * limits.n_vocab, "token counts")?,
        };
        let outputs = Outputs {
            results: arena.alloc(limits.rows, "sampled tokens")?,
            tokens: arena.alloc(limits.rows, "sampled tokens")?,
            top_tokens: arena.alloc(limits.rows * limits.top, "most likely tokens")?,
            top_logprobs: arena.alloc(limits.rows * limits.top, "most likely tokens")?,
        };
        Ok(Sampler { limits, inputs, outputs })
    }

    /// Enqueues the choice from the first `n` rows of `logits`, which are adjusted in place, under the first `n` rows of the inputs.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn launch(&self, kernels: &Kernels, logits: &Rows<f32>, n: usize) -> Result<(), CudaError> {
        let info = kernels.gpu().info();
        self.launch_with(kernels, logits, n, cluster(n, info.n_sms, info.capability, kernels.has_clusters()))
    }

    /// As [`Sampler::launch`] with a given number of blocks per row.
    ///
    /// # Errors
    /// As there.
    pub fn launch_with(&self, kernels: &Kernels, logits: &Rows<f32>, n: usize, cluster: u32) -> Result<(), CudaError> {
        let Outputs { results, top_tokens, top_logprobs, .. } = &self.outputs;
        self.launch_to(kernels, logits, n, cluster, [results.ptr(), top_tokens.ptr(), top_logprobs.ptr()])
    }

    /// As [`Sampler::launch`], with results written to the host's memory, to be read there once this has run. The chosen ids are in
    /// [`Outputs::tokens`], too.
    ///
    /// # Errors
    /// As there, and for a landing that is too small.
    pub fn launch_for_host(
        &self,
        kernels: &Kernels,
        logits: &Rows<f32>,
        n: usize,
        landing: &mut Landing,
    ) -> Result<(), CudaError> {
        let Limits { rows, top, .. } = self.limits;
        let lens = [landing.results.len(), landing.top_tokens.len(), landing.top_logprobs.len()];
        if lens[0] < rows || lens[1] < rows * top || lens[2] < rows * top {
            return Err(contract("landing", format!("room for {rows} rows, {top} most likely"), format!("{lens:?}")));
        }
        let info = kernels.gpu().info();
        let cluster = cluster(n, info.n_sms, info.capability, kernels.has_clusters());
        let Landing { results, top_tokens, top_logprobs } = landing;
        let places = [results.device_ptr(), top_tokens.device_ptr(), top_logprobs.device_ptr()];
        self.launch_to(kernels, logits, n, cluster, places)
    }

    fn launch_to(
        &self,
        kernels: &Kernels,
        logits: &Rows<f32>,
        n: usize,
        cluster: u32,
        [results, top_tokens, top_logprobs]: [u64; 3],
    ) -> Result<(), CudaError> {
        let Limits { n_vocab, rows, top, .. } = self.limits;
        if n == 0 || n > rows {
            return Err(contract("rows", format!("1 to {rows}"), n));
        }
        if logits.stride < n_vocab || logits.data.len() < n * logits.stride {
            let found = format!("{} elements, stride {}", logits.data.len(), logits.stride);
            return Err(contract("logits", format!("{n} rows of {n_vocab} or more"), found));
        }
        let most = max_cluster(kernels.gpu().info().capability, kernels.has_clusters());
        if !(1..=most).contains(&cluster) || !cluster.is_power_of_two() {
            return Err(contract("cluster", format!("a power of two up to {most}"), cluster));
        }
        let args = SampleArgs {
            logits: logits.data.ptr(),
            rows: self.inputs.rows.ptr(),
            bias_ids: self.inputs.bias_ids.ptr(),
            biases: self.inputs.biases.ptr(),
            forbidden: self.inputs.forbidden.ptr(),
            masks: self.inputs.masks.ptr(),
            history: self.inputs.history.ptr(),
            results,
            tokens: self.outputs.tokens.ptr(),
            top_tokens,
            top_logprobs,
            n_vocab: n_vocab as i32,
            stride: logits.stride as i32,
            mask_words: n_vocab.div_ceil(64) as i32,
            max_top: top as i32,
        };
        let mut launch = Launch::new((cluster, n as u32, 1), (THREADS, 1, 1));
        launch.overlap = true;
        let kernel = kernels.get("sample", "sample", 0)?;
        // SAFETY: SampleArgs mirrors the kernel's parameter; the buffers are as large as the limits say, and `pack` held every
        // row against the limits.
        unsafe { kernel.launch_clusters(kernels.gpu(), launch, cluster, Args::new().with(args)) }
    }

    /// A sequence's row of the history.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn history(&self, slot: u32) -> History {
        let first = slot as usize * self.limits.n_vocab;
        History { counts: self.inputs.history.slice(first..first + self.limits.n_vocab) }
    }
}

/// How often a sequence has seen each id.
#[derive(Debug, Clone)]
pub struct History {
    counts: Buffer<u32>,
}

impl History {
    /// Enqueues forgetting everything: when a sequence begins.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn clear(&self) -> Result<(), CudaError> {
        self.counts.zero()
    }

    /// Enqueues writing, after a [`History::clear`], `n` pairs from element `first` of `seen` on: an id that was seen, once, below the
    /// vocabulary, and how often it was emitted. They must not change before it has run.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn write(&self, kernels: &Kernels, seen: &Pinned<u32>, first: usize, n: usize) -> Result<(), CudaError> {
        let pairs = first..first + 2 * n;
        let Some(pairs) = seen.get(pairs).filter(|pairs| n > 0 && first.is_multiple_of(2) && pairs.len() == 2 * n)
        else {
            return Err(contract(
                "history",
                format!("pairs within {} elements", seen.len()),
                format!("{n} from {first}"),
            ));
        };
        if let Some(id) = pairs.iter().step_by(2).find(|id| **id as usize >= self.counts.len()) {
            return Err(contract("history", format!("ids below {}", self.counts.len()), id));
        }
        let from = seen.device_ptr() + 4 * first as u64;
        let args = Args::new().with(self.counts.ptr()).with(from).with(n as i32);
        let mut launch = Launch::new((n.div_ceil(256) as u32, 1, 1), (256, 1, 1));
        launch.overlap = true;
        // SAFETY: the arguments are the kernel's parameters in order; the pairs are inside the host's memory, their ids inside the row.
        unsafe { kernels.get("sample", "sample_history", 0)?.launch(kernels.gpu(), launch, args) }
    }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: format!("sample: {what}"), expected: expected.to_string(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { n_vocab: 100, rows: 3, bias: 4, forbidden: 2, masks: 1, histories: 2, top: 5 };

    #[test]
    fn blocks_per_row_halve_as_rows_double() {
        let sizes: Vec<u32> =
            [1, 4, 5, 16, 17, 33, 34, 66, 67, 256].iter().map(|n| cluster(*n, 132, (9, 0), true)).collect();
        assert_eq!(sizes, [16, 16, 8, 8, 4, 4, 2, 2, 1, 1]);
        assert_eq!((cluster(1, 170, (12, 0), true), cluster(1, 108, (8, 0), false)), (8, 1));
        // Code for an older chip runs on a newer one, without clusters.
        assert_eq!(cluster(1, 148, (10, 0), false), 1);
    }

    #[test]
    fn biases_of_one_id_become_neighbours_in_their_order() {
        let first = Request { bias: &[(7, 1.0), (3, 2.0), (7, 3.0)], forbidden: &[9], ..Request::greedy() };
        let third = Request { bias: &[(1, 4.0)], n_logprobs: Some(0), history: Some(1), ..Request::greedy() };
        let packed = pack(&[Some(first), None, Some(third)], &LIMITS).expect("within the limits");
        assert_eq!((packed.bias_ids, packed.biases), (vec![3, 7, 7, 1], vec![2.0, 1.0, 3.0, 4.0]));
        assert_eq!(packed.rows[1], RowParams::default());
        let third = packed.rows[2];
        assert_eq!((third.bias_first, third.n_bias, third.n_forbidden), (3, 1, 0));
        assert_eq!((third.n_top, third.history, third.mask, third.is_used), (0, 1, -1, 1));
    }

    #[test]
    fn what_the_kernel_cannot_take_is_refused() {
        let greedy = Request::greedy();
        let cases = [
            (Request { temperature: -1.0, ..greedy }, "parameters"),
            (Request { temperature: f32::NAN, ..greedy }, "parameters"),
            (Request { top_p: 1.5, ..greedy }, "parameters"),
            (Request { min_p: f32::NAN, ..greedy }, "parameters"),
            (Request { presence_penalty: f32::INFINITY, ..greedy }, "parameters"),
            (Request { bias: &[(100, 0.0)], ..greedy }, "ids"),
            (Request { forbidden: &[100], ..greedy }, "ids"),
            (Request { bias: &[(1, f32::NAN)], ..greedy }, "NaN"),
            (Request { bias: &[(1, 0.0); 5], ..greedy }, "lists"),
            (Request { forbidden: &[1, 2, 3], ..greedy }, "lists"),
            (Request { mask: Some(1), ..greedy }, "mask"),
            (Request { history: Some(2), ..greedy }, "history"),
            (Request { n_logprobs: Some(6), ..greedy }, "log probabilities"),
        ];
        for (request, expected) in cases {
            let error = pack(&[Some(request)], &LIMITS).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(pack(&[None; 4], &LIMITS).is_err_and(|e| e.to_string().contains("rows")));
    }
}
