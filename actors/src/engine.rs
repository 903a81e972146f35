//! What a model actor needs of an engine, and the plain data that crosses that line.
//!
//! An engine knows tokens, never text. It is owned by one OS thread, blocks in [`Engine::step`], and is driven:
//! submit and cancel between steps, one step at a time.

use crate::policy::ladder::RungCounts;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Identifies a request for as long as it lives; chosen by the host, unique within an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// How the next token is chosen from the logits. Applied in the order of the fields.
///
/// `temperature == 0` is greedy: the highest logit after bias and penalties, ties by the lower id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Added to the logits of these ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Logits of ids seen in prompt or output are divided (if positive) or multiplied by this; 1 is off (CTRL, Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted once from ids seen in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted times the count in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 is off.
    pub top_k: u32,
    /// Keep the smallest set of most likely ids whose mass reaches this (Holtzman et al. 2020); 1 is off.
    pub top_p: f32,
    /// Drop ids less likely than this times the most likely (Nguyen et al. 2024); 0 is off.
    pub min_p: f32,
    /// The random numbers are a function of (seed, choice, token index) alone.
    pub seed: u64,
    /// Which of the `n` choices of a request this is.
    pub choice: u32,
}

impl SamplingParams {
    /// Greedy decoding with nothing else switched on.
    pub fn greedy() -> Self {
        Self {
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
        }
    }
}

/// What an engine is to make of a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Go on with it, token by token.
    #[default]
    Generate,
    /// The normalised hidden state of its last token, which has seen the whole prompt. No token is chosen.
    Embed,
}

/// What a generated text must be: the ids that cannot lead there are masked before a token is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema accepts (JSON Schema, as JSON text).
    JsonSchema(String),
    /// Text that matches this regular expression as a whole.
    Regex(String),
    /// Text of this grammar, in Lark's notation.
    Lark(String),
}

/// One sequence to generate. `n` choices are `n` requests that share their prompt's KV blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineRequest {
    /// The request.
    pub id: RequestId,
    /// What to make of the prompt.
    pub task: Task,
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// Tokens already emitted for this request by an engine that died. Generation continues after them, at
    /// token index `emitted.len()`; they are not emitted again.
    pub emitted: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to emit, those in `emitted` included.
    pub max_tokens: u32,
    /// End-of-sequence and stop ids are not chosen before this many tokens are emitted.
    pub min_tokens: u32,
    /// Ids that end the sequence; the id itself is emitted as the last token.
    pub stop_ids: Vec<u32>,
    /// Report log probabilities: `Some(n)` for the chosen token and the `n` most likely.
    pub logprobs: Option<u32>,
    /// What the text must be.
    pub constraint: Option<Constraint>,
    /// Higher goes first when requests wait.
    pub priority: i32,
    /// No step is begun for the request after this instant. Not sent between processes: the host keeps it.
    #[serde(skip)]
    pub deadline: Option<Instant>,
}

/// Log probability of a token under the untempered distribution after bias and penalties.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Logprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm.
    pub logprob: f32,
}

/// Log probabilities of one emitted token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Of the emitted token.
    pub chosen: f32,
    /// The most likely tokens, descending, ties by the lower id.
    pub top: Vec<Logprob>,
}

/// Why a sequence ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop id was emitted, or the host found a stop string.
    Stop,
    /// `max_tokens` or the context is full.
    Length,
    /// The host cancelled it.
    Cancelled,
    /// Its deadline passed.
    Deadline,
}

/// Tokens a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache when the sequence was first scheduled.
    pub cached_tokens: u32,
    /// Emitted tokens, those in `EngineRequest::emitted` included.
    pub completion_tokens: u32,
}

/// What an engine says of a request. `Finished`, `Embedded` and `Failed` are terminal: exactly one of them, and nothing
/// after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EngineEvent {
    /// The token at `index`, counted from 0 over the request's whole life.
    Token {
        /// The request.
        id: RequestId,
        /// 0, 1, 2 ... without gap or repeat.
        index: u32,
        /// The id.
        token: u32,
        /// If asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The sequence ended.
    Finished {
        /// The request.
        id: RequestId,
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// What [`Task::Embed`] asked for.
    Embedded {
        /// The request.
        id: RequestId,
        /// The hidden state, `[C]`.
        values: Vec<f32>,
        /// What it took.
        usage: Usage,
    },
    /// This request cannot go on; others can.
    Failed {
        /// The request.
        id: RequestId,
        /// Why.
        error: RequestError,
    },
}

/// Why one request was refused or failed, while the engine is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RequestError {
    /// Prompt and `max_tokens` do not fit the context or the whole KV pool.
    #[error("{needed} tokens do not fit the context of {limit}")]
    ContextExceeded {
        /// Prompt plus one.
        needed: u32,
        /// Most tokens a sequence may have.
        limit: u32,
    },
    /// A parameter is out of range.
    #[error("{param} is {found}, expected {expected}")]
    InvalidParam {
        /// The field.
        param: String,
        /// What it was.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A request with this id is alive.
    #[error("request {0:?} is already running")]
    DuplicateId(RequestId),
    /// The model gave a logit that is not a finite number.
    #[error("logit of token {token} at index {index} is {found}, expected a finite number")]
    BadLogits {
        /// Index of the token that was to be chosen.
        index: u32,
        /// The first vocabulary id whose logit is not finite.
        token: u32,
        /// What the logit was.
        found: String,
    },
    /// Bias, mask or `min_tokens` forbid every id of the vocabulary.
    #[error("no token may be chosen at index {index}: bias, mask or min_tokens forbid the whole vocabulary")]
    NothingToChoose {
        /// Index of the token that was to be chosen.
        index: u32,
    },
    /// The device had no memory left for this request.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
}

/// The engine itself failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum EngineError {
    /// No room, at load or in a step. The device is unharmed.
    #[error("out of memory on {device}: {what} needs {requested} bytes, {free} are free")]
    OutOfMemory {
        /// The device.
        device: String,
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes free.
        free: u64,
    },
    /// The model cannot be loaded, whoever tries.
    #[error("{0}")]
    BadModel(String),
    /// The device failed: this process must end, its context is lost.
    #[error("device {device} failed in {op}: {detail}")]
    DeviceLost {
        /// The device.
        device: String,
        /// The operation.
        op: String,
        /// The driver's code and words.
        detail: String,
    },
}

/// How far a load has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadProgress {
    /// What is being done.
    pub phase: LoadPhase,
    /// Bytes of weights made resident so far.
    pub bytes_done: u64,
    /// Bytes of weights in all.
    pub bytes_total: u64,
}

/// The phases of a load, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadPhase {
    /// Reading and checking the file's header.
    Open,
    /// Making weights resident.
    Weights,
    /// Allocating KV and scratch.
    Allocate,
    /// Capturing graphs, first step.
    WarmUp,
    /// Done.
    Ready,
}

/// What a step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// Sequences that took part.
    pub n_sequences: u32,
    /// Prompt tokens computed.
    pub n_prefill_tokens: u32,
    /// Tokens decoded.
    pub n_decode_tokens: u32,
    /// Sequences sent back to the queue for want of blocks.
    pub n_preempted: u32,
    /// Whether work is left: step again.
    pub busy: bool,
}

/// How many tokens the steps of an engine computed, each: prompts and continuations together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTokens {
    /// Steps by their tokens: at most [`StepTokens::BOUNDS`] each, and more than the last.
    pub steps: [u64; 14],
    /// Tokens of all of them.
    pub sum: u64,
}

impl StepTokens {
    /// vLLM's buckets.
    pub const BOUNDS: [u32; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384];

    /// Another step computed so many.
    pub fn observe(&mut self, n_tokens: u32) {
        self.steps[Self::BOUNDS.partition_point(|bound| *bound < n_tokens)] += 1;
        self.sum += u64::from(n_tokens);
    }
}

/// Counters and gauges of an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStats {
    /// Sequences in the running set.
    pub running: u32,
    /// Sequences waiting.
    pub waiting: u32,
    /// Tokens of waiting sequences still to be computed.
    pub queued_tokens: u64,
    /// KV blocks in use by sequences or the prefix cache.
    pub kv_blocks_used: u32,
    /// KV blocks held only by the prefix cache.
    pub kv_blocks_cached: u32,
    /// KV blocks in all.
    pub kv_blocks_total: u32,
    /// Steps since load.
    pub steps: u64,
    /// Prompt tokens computed since load.
    pub prefill_tokens: u64,
    /// Tokens emitted since load.
    pub decode_tokens: u64,
    /// Preemptions since load.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache since load.
    pub prefix_queries: u64,
    /// Prompt tokens found there since load.
    pub prefix_hits: u64,
    /// Tokens computed by the steps since load.
    pub step_tokens: StepTokens,
    /// Tokens of a KV block.
    pub kv_block_tokens: u32,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of KV.
    pub kv_bytes: u64,
    /// Bytes of scratch.
    pub scratch_bytes: u64,
    /// What the worker gave up for want of memory since load.
    pub oom: RungCounts,
}

/// A model on a device, ready to generate. Built by a loader on the thread that will own it.
pub trait Engine {
    /// Accepts a request or refuses it; an accepted one gets exactly one terminal event from [`Engine::step`].
    ///
    /// # Errors
    /// [`RequestError`]; nothing was accepted.
    fn submit(&mut self, request: EngineRequest) -> Result<(), RequestError>;

    /// Cancels a request. Its terminal event comes with the next step and its KV is free after it. Unknown ids are ignored:
    /// the request may have ended meanwhile.
    fn cancel(&mut self, id: RequestId);

    /// Runs one step and appends its events. With nothing to do it returns at once with `busy == false`.
    ///
    /// # Errors
    /// [`EngineError`]: the engine must not be stepped again, except after `OutOfMemory`.
    fn step(&mut self, events: &mut Vec<EngineEvent>) -> Result<StepReport, EngineError>;

    /// Counters and gauges now.
    fn stats(&self) -> EngineStats;

    /// Gives every resource back. Requests still alive get no more events.
    fn teardown(self: Box<Self>);
}
