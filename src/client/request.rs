//! What a client asks for.

use crate::text::{Message, RenderOptions};
use playhouse_actors::engine::{Constraint, SamplingParams};
use std::time::Duration;

/// What a text goes on from.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Text. The text of control tokens in it is read as those tokens, as `run` does.
    Text(String),
    /// Token ids, as they are.
    Tokens(Vec<u32>),
}

/// A text to go on with.
///
/// [`GenerateRequest::text`] has the defaults of the command line: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05,
/// a random seed. The same seed gives the same text, whatever else the house does.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// What to go on from.
    pub prompt: Prompt,
    /// How many texts. They share their prompt.
    pub n: u32,
    /// How tokens are chosen. `seed` and `choice` are set when the request is sent.
    pub sampling: SamplingParams,
    /// The same seed gives the same text; without one it is drawn.
    pub seed: Option<u64>,
    /// Most tokens of each text; without it, until the context is full.
    pub max_tokens: Option<u32>,
    /// Tokens before a text may end.
    pub min_tokens: u32,
    /// Strings that end a text; they are not part of it.
    pub stop: Vec<String>,
    /// Token ids that end a text, besides the model's own.
    pub stop_ids: Vec<u32>,
    /// Go on past the model's own end-of-text tokens.
    pub ignore_eos: bool,
    /// Log probabilities of the chosen token and so many others.
    pub logprobs: Option<u32>,
    /// What the text must be: JSON, a schema, an expression, a grammar.
    pub constraint: Option<Constraint>,
    /// Whether control tokens are left out of the text.
    pub skip_special: bool,
    /// Higher goes first where requests wait.
    pub priority: i32,
    /// How long it may take in all; without it, the house's limit.
    pub timeout: Option<Duration>,
}

impl GenerateRequest {
    /// Goes on with `text`.
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Prompt::Text(text.into()))
    }

    /// Goes on with `prompt`.
    pub fn new(prompt: Prompt) -> Self {
        let sampling =
            SamplingParams { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, ..SamplingParams::greedy() };
        Self {
            prompt,
            n: 1,
            sampling,
            seed: None,
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            constraint: None,
            skip_special: true,
            priority: 0,
            timeout: None,
        }
    }

    /// With this seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// With at most so many tokens.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: u32) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// With this temperature; 0 always takes the most likely token.
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = temperature;
        self
    }

    /// Ending before this string, too.
    #[must_use]
    pub fn stop(mut self, stop: impl Into<String>) -> Self {
        self.stop.push(stop.into());
        self
    }

    /// With text that is held to this.
    #[must_use]
    pub fn constraint(mut self, constraint: Constraint) -> Self {
        self.constraint = Some(constraint);
        self
    }

    /// With so many texts.
    #[must_use]
    pub fn n(mut self, n: u32) -> Self {
        self.n = n;
        self
    }

    /// With log probabilities of the chosen token and `n` others.
    #[must_use]
    pub fn logprobs(mut self, n: u32) -> Self {
        self.logprobs = Some(n);
        self
    }
}

/// A conversation to go on with.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// What was said so far.
    pub messages: Vec<Message>,
    /// What the template takes besides: tools, further variables.
    pub options: RenderOptions,
    /// Everything else. Its prompt is replaced by the conversation.
    pub generate: GenerateRequest,
}

impl ChatRequest {
    /// Goes on with `messages`, with the defaults of [`GenerateRequest::text`].
    pub fn new(messages: Vec<Message>) -> Self {
        Self { messages, options: RenderOptions::default(), generate: GenerateRequest::text("") }
    }

    /// A conversation that begins with what the user says.
    pub fn user(text: impl Into<String>) -> Self {
        Self::new(vec![Message::new("user", text)])
    }
}
