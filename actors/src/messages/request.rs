//! What a client asks for, and what it gets: a stream of tokens and one end, or a refusal.

use crate::engine::{Constraint, FinishReason, RequestError, SamplingParams, Task, TokenLogprobs, Usage};
use crate::policy::admission::Full;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// A request of a client: one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Generate {
    /// Name or alias of the model.
    pub model: String,
    /// What to make of the prompt.
    pub task: Task,
    /// Prompt token ids; at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to emit.
    pub max_tokens: u32,
    /// Stop ids are not chosen before this many tokens.
    pub min_tokens: u32,
    /// Ids that end the sequence.
    pub stop_ids: Vec<u32>,
    /// Log probabilities of the chosen token and so many others.
    pub logprobs: Option<u32>,
    /// What the text must be.
    pub constraint: Option<Constraint>,
    /// Higher goes first where requests wait in an engine.
    pub priority: i32,
    /// How long it may take in all; without it, the host's limit.
    pub timeout: Option<Duration>,
}

/// Why a request was not accepted. Nothing was started, and no stream exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No model has this name.
    #[error("there is no model `{model}`")]
    UnknownModel {
        /// The name.
        model: String,
    },
    /// The model has taken on all it may.
    #[error("model `{model}` is busy: {full}")]
    Busy {
        /// The model.
        model: String,
        /// What is full, and when to ask again.
        full: Full,
    },
    /// The model has not been ready yet.
    #[error("model `{model}` is loading")]
    Loading {
        /// The model.
        model: String,
        /// When to ask again.
        retry_after: Duration,
    },
    /// Nobody can serve the model: its devices are quarantined, or its file is bad.
    #[error("model `{model}` is not available")]
    Unavailable {
        /// The model.
        model: String,
    },
    /// The prompt does not fit.
    #[error(transparent)]
    Invalid(RequestError),
    /// The host takes no more requests: it is about to stop.
    #[error("the host is draining")]
    Draining,
    /// Too many requests wait to be looked at.
    #[error("too many requests at once")]
    Overloaded,
    /// The router went away before it answered; the request was not accepted.
    #[error("the router did not answer")]
    RouterLost,
}

/// One token of a stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamToken {
    /// 0, 1, 2 ... without gap or repeat, whatever dies meanwhile.
    pub index: u32,
    /// The id.
    pub token: u32,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// When an engine began with the request, if it said so: waiting ended and computing began. The first token has it.
    #[serde(skip)]
    pub begun: Option<Instant>,
}

/// What a stream yields: tokens, then exactly one end.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEvent {
    /// A token.
    Token(StreamToken),
    /// The end; nothing follows.
    End(Terminal),
}

/// How an accepted request ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Terminal {
    /// Well.
    Completed {
        /// Why it ended.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// Well: what [`Task::Embed`] asked for.
    Embedded {
        /// The hidden state of the prompt's last token, `[C]`.
        values: Vec<f32>,
        /// What it took.
        usage: Usage,
    },
    /// Not well.
    Failed(Failure),
    /// The client cancelled it or went away.
    Cancelled,
}

/// Why an accepted request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// It was in flight at too many deaths of workers.
    #[error("the request was in flight when {deaths} workers died")]
    Poison {
        /// How many.
        deaths: u32,
    },
    /// The engine refused it or gave it up; others go on.
    #[error(transparent)]
    Request(RequestError),
    /// Its time was up.
    #[error("the request took longer than it may")]
    Deadline,
    /// The client did not read.
    #[error("the client did not read its stream in time")]
    SlowClient,
    /// The host stopped before it was done.
    #[error("the host stopped")]
    Draining,
    /// No replica of the model is left.
    #[error("no replica of the model is left")]
    Unavailable,
    /// Whoever had the request is gone. Only the end of the whole host does this.
    #[error("the host lost the request")]
    Lost,
}
