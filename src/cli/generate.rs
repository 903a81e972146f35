//! Drives an engine for one prompt and up to `n` choices, and turns its tokens into text as they come.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use playhouse_actors::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, FinishReason, RequestError, RequestId, TokenLogprobs, Usage,
};

use super::{CliError, Exit};
use crate::text::{Detokenizer, StopOutput, TextStream, Tokenizer};

/// What is to be generated: the request of the first choice, and how its text ends.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// Choice `i` is this request with `sampling.choice = i`.
    pub(crate) request: EngineRequest,
    /// How many choices.
    pub(crate) n_choices: u32,
    /// Strings that end a choice's text.
    pub(crate) stops: Vec<String>,
}

/// One choice, as far as it has come.
#[derive(Debug)]
pub(crate) struct Choice {
    /// Its text.
    pub(crate) text: String,
    /// Its tokens, a stop id or the tokens of a stop string included.
    pub(crate) tokens: Vec<u32>,
    /// One for each token, if asked for.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// Why it ended.
    pub(crate) reason: FinishReason,
    stream: TextStream,
    end: Option<Usage>,
    is_stopped: bool,
}

/// All choices, and what they took.
#[derive(Debug)]
pub(crate) struct Generated {
    /// The choices in order.
    pub(crate) choices: Vec<Choice>,
    /// Prompt tokens, counted once.
    pub(crate) n_prompt: usize,
    /// From the submission to the first token.
    pub(crate) prefill_time: Duration,
    /// From the first token to the last.
    pub(crate) decode_time: Duration,
}

impl Generated {
    /// Tokens of all choices.
    pub(crate) fn n_tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.tokens.len()).sum()
    }

    /// Tokens a second after the first of each choice; `None` if there were no others.
    pub(crate) fn decode_speed(&self) -> Option<f64> {
        let n_later = self.n_tokens().saturating_sub(self.choices.len());
        (n_later > 0).then(|| n_later as f64 / self.decode_time.as_secs_f64().max(1e-9))
    }
}

/// Generates until every choice has ended. `on_text` gets the number of a choice and the text that became certain.
/// Once `interrupted` is set every choice is cancelled and keeps what it has.
///
/// # Errors
/// The request is refused or fails, the engine fails, or `on_text` does.
pub(crate) fn generate(
    engine: &mut dyn Engine,
    tokenizer: &Tokenizer,
    job: &Job,
    interrupted: &AtomicBool,
    on_text: &mut dyn FnMut(usize, &str) -> Result<(), CliError>,
) -> Result<Generated, CliError> {
    let mut run = Run::submit(engine, tokenizer, job)?;
    let result = run.drive(engine, interrupted, on_text);
    if result.is_err() {
        run.cancel_all(engine);
    }
    result?;
    Ok(run.into_generated(job))
}

struct Run {
    choices: Vec<Choice>,
    start: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Run {
    fn submit(engine: &mut dyn Engine, tokenizer: &Tokenizer, job: &Job) -> Result<Self, CliError> {
        let start = Instant::now();
        let mut run = Self { choices: Vec::new(), start, first_token: None, last_token: None };
        for choice in 0..job.n_choices {
            let mut request = job.request.clone();
            request.id = RequestId(u64::from(choice));
            request.sampling.choice = choice;
            if let Err(error) = engine.submit(request) {
                run.cancel_all(engine);
                return Err(error.into());
            }
            let detokenizer = Detokenizer::after(tokenizer, &job.request.prompt, true);
            run.choices.push(Choice {
                text: String::new(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                reason: FinishReason::Cancelled,
                stream: TextStream::new(detokenizer, job.stops.clone()),
                end: None,
                is_stopped: false,
            });
        }
        Ok(run)
    }

    fn drive(
        &mut self,
        engine: &mut dyn Engine,
        interrupted: &AtomicBool,
        on_text: &mut dyn FnMut(usize, &str) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let mut events = Vec::new();
        while self.choices.iter().any(|choice| choice.end.is_none()) {
            if interrupted.load(Ordering::Relaxed) {
                self.cancel_all(engine);
            }
            engine.step(&mut events)?;
            for event in events.drain(..) {
                self.take(event, engine, on_text)?;
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        event: EngineEvent,
        engine: &mut dyn Engine,
        on_text: &mut dyn FnMut(usize, &str) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        match event {
            EngineEvent::Token { id, token, logprobs, .. } => {
                let now = Instant::now();
                self.first_token.get_or_insert(now);
                self.last_token = Some(now);
                let index = index_of(id);
                let text = self.choices[index].push(token, logprobs);
                if self.choices[index].is_stopped {
                    engine.cancel(id);
                }
                if text.is_empty() { Ok(()) } else { on_text(index, &text) }
            }
            EngineEvent::Finished { id, reason, usage } => {
                let index = index_of(id);
                let text = self.choices[index].finish(reason, usage);
                if text.is_empty() { Ok(()) } else { on_text(index, &text) }
            }
            EngineEvent::Embedded { .. } => unreachable!("only generation was asked for"),
            EngineEvent::Failed { error, .. } => Err(error.into()),
        }
    }

    fn cancel_all(&self, engine: &mut dyn Engine) {
        (0u64..).take(self.choices.len()).for_each(|id| engine.cancel(RequestId(id)));
    }

    fn into_generated(self, job: &Job) -> Generated {
        let end = self.last_token.unwrap_or_else(Instant::now);
        let first = self.first_token.unwrap_or(end);
        Generated {
            choices: self.choices,
            n_prompt: job.request.prompt.len(),
            prefill_time: first.duration_since(self.start),
            decode_time: end.duration_since(first),
        }
    }
}

impl Choice {
    /// Takes a token; returns the text that became certain.
    fn push(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> String {
        // The engine may be a token ahead of a stop string. What comes after it was never said.
        if self.is_stopped {
            return String::new();
        }
        self.tokens.push(token);
        self.logprobs.extend(logprobs);
        let output = self.stream.push(token);
        self.take(output)
    }

    fn finish(&mut self, reason: FinishReason, usage: Usage) -> String {
        self.end = Some(usage);
        if self.is_stopped {
            return String::new();
        }
        self.reason = reason;
        let output = self.stream.finish();
        self.take(output)
    }

    fn take(&mut self, output: StopOutput) -> String {
        if output.hit.is_some() {
            self.is_stopped = true;
            self.reason = FinishReason::Stop;
        }
        self.text.push_str(&output.emit);
        output.emit
    }

    /// Prompt tokens that were found in the prefix cache.
    pub(crate) fn n_cached(&self) -> u32 {
        self.end.map_or(0, |usage| usage.cached_tokens)
    }
}

fn index_of(id: RequestId) -> usize {
    usize::try_from(id.0).expect("ids are the numbers of choices")
}

impl From<RequestError> for CliError {
    fn from(error: RequestError) -> Self {
        let exit = match &error {
            RequestError::OutOfMemory(_) => Exit::Transient,
            RequestError::BadLogits { .. } => Exit::BadModel,
            RequestError::DuplicateId(_) => Exit::Software,
            RequestError::ContextExceeded { .. }
            | RequestError::InvalidParam { .. }
            | RequestError::NothingToChoose { .. } => Exit::Usage,
        };
        Self::new(exit, error)
    }
}

impl From<EngineError> for CliError {
    fn from(error: EngineError) -> Self {
        let exit = match &error {
            EngineError::OutOfMemory { .. } => Exit::Transient,
            EngineError::BadModel(_) => Exit::BadModel,
            EngineError::DeviceLost { .. } => Exit::NoDevice,
        };
        Self::new(exit, error)
    }
}
