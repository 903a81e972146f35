//! The stream of a request: tokens with the text that they make certain, then one end for each choice.

use super::error::RequestError;
use crate::text::TextStream;
use futures_core::Stream;
use futures_util::StreamExt;
use futures_util::stream::SelectAll;
use playhouse_actors::engine::{FinishReason, RequestId, TokenLogprobs};
use playhouse_actors::messages::{Failure, StreamEvent, Terminal};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

/// One token of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Which choice, from 0.
    pub choice: u32,
    /// 0, 1, 2 ... within the choice, without gap or repeat.
    pub index: u32,
    /// The id.
    pub id: u32,
    /// The text that became certain with this token; may be empty. Never part of a character, never part of a stop
    /// string.
    pub text: String,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// When an engine began with the request, if it said so: waiting ended and computing began. The first token has it.
    pub begun: Option<Instant>,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// At a stop id or a stop string.
    Stop {
        /// The stop string, if it was one.
        hit: Option<String>,
    },
    /// At `max_tokens` or the end of the context.
    Length,
    /// Not well.
    Failed(Failure),
    /// It was cancelled.
    Cancelled,
}

/// The end of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// Which choice.
    pub choice: u32,
    /// The last of its text, held back until it was certain.
    pub text: String,
    /// How.
    pub outcome: Outcome,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, found in the prefix cache; unknown if a stop string ended the choice or it did not end well.
    pub cached_tokens: Option<u32>,
    /// Tokens of this choice.
    pub completion_tokens: u32,
}

/// What a stream yields.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token.
    Token(Token),
    /// A choice ended; nothing follows from it.
    End(End),
}

/// The whole text of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Collected {
    /// The text.
    pub text: String,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// How it ended.
    pub end: End,
}

/// Ends single choices of a stream, for whoever reads in their text that they are complete. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ender(Arc<[AtomicBool]>);

impl Ender {
    /// Ends a choice as a stop id would: its request is cancelled, and its end is the next that the stream yields of it,
    /// if this is called before the stream is polled again. A choice that has ended, or that is none, stays as it is.
    pub fn end(&self, choice: u32) {
        if let Some(ended) = self.0.get(choice as usize) {
            ended.store(true, Ordering::Relaxed);
        }
    }

    fn has_ended(&self, choice: u32) -> bool {
        self.0.get(choice as usize).is_some_and(|ended| ended.load(Ordering::Relaxed))
    }
}

/// The stream of a request with one choice or several. Dropping it cancels what has not ended: the KV is free within a
/// step. It is also a [`Stream`].
pub struct TokenStream {
    choices: SelectAll<ChoiceStream>,
    ids: Vec<RequestId>,
    ender: Ender,
    seed: u64,
    prompt: Vec<u32>,
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenStream").field("ids", &self.ids).field("seed", &self.seed).finish_non_exhaustive()
    }
}

impl TokenStream {
    pub(super) fn new(parts: Vec<Choice>, seed: u64, prompt: Vec<u32>) -> Self {
        let ids = parts.iter().filter_map(|part| Some(part.inner.as_ref()?.id())).collect();
        let ender = Ender(parts.iter().map(|_| AtomicBool::new(false)).collect());
        let choices = parts.into_iter().map(|part| part.into_stream(ender.clone())).collect();
        Self { choices, ids, ender, seed, prompt }
    }

    /// Ends single choices of this stream.
    pub fn ender(&self) -> Ender {
        self.ender.clone()
    }

    /// The seed: asked for or drawn. With it the same request gives the same text again.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The requests of the choices, for [`super::ModelHandle::cancel`].
    pub fn ids(&self) -> &[RequestId] {
        &self.ids
    }

    /// The prompt's tokens.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The next event; `None` after every choice has ended. Safe to drop between polls.
    pub async fn next(&mut self) -> Option<Event> {
        self.choices.next().await
    }

    /// Reads to the end: every choice, in order.
    ///
    /// # Errors
    /// Never for how a choice ended: that is in [`Collected::end`]. [`RequestError::Stopped`] if the house ended
    /// without a word.
    pub async fn collect(mut self) -> Result<Vec<Collected>, RequestError> {
        let mut texts = vec![(String::new(), Vec::new(), None); self.ids.len()];
        while let Some(event) = self.next().await {
            match event {
                Event::Token(token) => {
                    let choice = &mut texts[token.choice as usize];
                    choice.0.push_str(&token.text);
                    choice.1.push(token);
                }
                Event::End(end) => {
                    let choice = &mut texts[end.choice as usize];
                    choice.0.push_str(&end.text);
                    choice.2 = Some(end);
                }
            }
        }
        let whole = |(text, tokens, end): (_, _, Option<End>)| Some(Collected { text, tokens, end: end? });
        texts.into_iter().map(|choice| whole(choice).ok_or(RequestError::Stopped)).collect()
    }
}

impl Stream for TokenStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.choices.poll_next_unpin(cx)
    }
}

type ChoiceStream = Pin<Box<dyn Stream<Item = Event> + Send>>;

/// One choice while it runs.
pub(super) struct Choice {
    pub(super) number: u32,
    /// Gone once the choice has ended: dropping it cancels the request.
    pub(super) inner: Option<playhouse_actors::TokenStream>,
    pub(super) text: TextStream,
    pub(super) stops: Vec<String>,
    pub(super) n_prompt: u32,
    pub(super) n_tokens: u32,
}

impl Choice {
    fn into_stream(self, ender: Ender) -> ChoiceStream {
        // A stop string ends a choice in the middle of a token's event: the end follows as an event of its own.
        let start = (self, ender, None);
        Box::pin(futures_util::stream::unfold(start, |(mut choice, ender, pending)| async move {
            if let Some(end) = pending {
                return Some((Event::End(end), (choice, ender, None)));
            }
            if choice.inner.is_some() && ender.has_ended(choice.number) {
                let end = choice.end(String::new(), Outcome::Stop { hit: None }, None);
                return Some((Event::End(end), (choice, ender, None)));
            }
            let (event, pending) = choice.advance().await?;
            Some((event, (choice, ender, pending)))
        }))
    }

    async fn advance(&mut self) -> Option<(Event, Option<End>)> {
        match self.inner.as_mut()?.next().await? {
            StreamEvent::Token(token) => {
                self.n_tokens += 1;
                let output = self.text.push(token.token);
                let event = Token {
                    choice: self.number,
                    index: token.index,
                    id: token.token,
                    text: output.emit,
                    logprobs: token.logprobs,
                    begun: token.begun,
                };
                let hit = output.hit.map(|hit| self.stops[hit].clone());
                let end = hit.map(|hit| self.end(String::new(), Outcome::Stop { hit: Some(hit) }, None));
                Some((Event::Token(event), end))
            }
            StreamEvent::End(terminal) => {
                let rest = self.text.finish();
                let hit = rest.hit.map(|hit| self.stops[hit].clone());
                let (outcome, cached) = outcome_of(terminal, hit);
                Some((Event::End(self.end(rest.emit, outcome, cached)), None))
            }
        }
    }

    fn end(&mut self, text: String, outcome: Outcome, cached_tokens: Option<u32>) -> End {
        self.inner = None;
        End {
            choice: self.number,
            text,
            outcome,
            prompt_tokens: self.n_prompt,
            cached_tokens,
            completion_tokens: self.n_tokens,
        }
    }
}

fn outcome_of(terminal: Terminal, hit: Option<String>) -> (Outcome, Option<u32>) {
    match terminal {
        Terminal::Completed { reason, usage } => {
            let outcome = match reason {
                FinishReason::Stop => Outcome::Stop { hit },
                FinishReason::Length if hit.is_some() => Outcome::Stop { hit },
                FinishReason::Length => Outcome::Length,
                FinishReason::Cancelled => Outcome::Cancelled,
                FinishReason::Deadline => Outcome::Failed(Failure::Deadline),
            };
            (outcome, Some(usage.cached_tokens))
        }
        // Nobody asked; a worker that sends one breaks the rules of its link and is ended.
        Terminal::Embedded { .. } => (Outcome::Failed(Failure::Lost), None),
        Terminal::Failed(failure) => (Outcome::Failed(failure), None),
        Terminal::Cancelled => (Outcome::Cancelled, None),
    }
}
