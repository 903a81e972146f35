//! One model of a running house.

use super::card::ModelCard;
use super::error::RequestError;
use super::limits;
use super::request::{ChatRequest, GenerateRequest, Prompt};
use super::stream::{Choice, TokenStream};
use crate::text::{ChatPrompt, Detokenizer, EncodeOptions, TextStream};
use playhouse_actors::engine::{FinishReason, RequestId, SamplingParams, Task};
use playhouse_actors::messages::{Failure, ServiceStatus, StreamEvent, Terminal};
use playhouse_actors::{Generate, HouseHandle};
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

/// A text as a vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// Of length 1, `[C]`.
    pub values: Vec<f32>,
    /// Tokens of the text.
    pub prompt_tokens: u32,
}

/// A model by its name: texts, conversations, tokens. Cheap to clone. It stays usable after a reload; if the model is
/// gone by then, requests are refused.
#[derive(Debug, Clone)]
pub struct ModelHandle {
    card: Arc<ModelCard>,
    tree: HouseHandle,
}

impl ModelHandle {
    pub(super) fn new(card: Arc<ModelCard>, tree: HouseHandle) -> Self {
        Self { card, tree }
    }

    /// What is known of the model.
    pub fn card(&self) -> &Arc<ModelCard> {
        &self.card
    }

    /// Goes on with a text, or several times with the same.
    ///
    /// # Errors
    /// [`RequestError`]; nothing was started.
    pub async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, RequestError> {
        limits::check(&request)?;
        let prompt = self.tokens_of(&request.prompt).await?;
        self.start(request, prompt).await
    }

    /// Goes on with a conversation.
    ///
    /// # Errors
    /// [`RequestError`]; nothing was started.
    pub async fn chat(&self, request: ChatRequest) -> Result<TokenStream, RequestError> {
        let ChatRequest { messages, options, mut generate } = request;
        generate.prompt = Prompt::Text(String::new());
        limits::check(&generate)?;
        let card = self.card.clone();
        let tokens = blocking(move || {
            let prompt = render(&card, &messages, &options)?;
            limits::at_most("messages", prompt.text().len() as u64, 0, limits::PROMPT_BYTES_MAX as u64)?;
            Ok(card.tokenizer.encode_prompt(&prompt)?)
        });
        self.start(generate, tokens.await?).await
    }

    /// The embedding of a text: the hidden state of its last token after the output norm, scaled to length 1. Of the
    /// models here none was trained for it; texts that go on alike are near each other.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn embed(&self, prompt: Prompt) -> Result<Embedding, RequestError> {
        let request = GenerateRequest { max_tokens: Some(1), ..GenerateRequest::new(prompt) };
        limits::check(&request)?;
        let prompt = self.tokens_of(&request.prompt).await?;
        let generate = Generate { task: Task::Embed, ..self.choice(&request, &prompt, 0, 0) };
        let mut stream = self.tree.generate(generate).await?;
        match stream.next().await {
            Some(StreamEvent::End(Terminal::Embedded { values, usage })) => {
                Ok(Embedding { values: unit(values), prompt_tokens: usage.prompt_tokens })
            }
            Some(StreamEvent::End(Terminal::Failed(failure))) => Err(RequestError::Failed(failure)),
            Some(StreamEvent::End(Terminal::Cancelled)) | None => Err(RequestError::Failed(Failure::Lost)),
            Some(StreamEvent::End(Terminal::Completed { reason: FinishReason::Deadline, .. })) => {
                Err(RequestError::Failed(Failure::Deadline))
            }
            // Cancelled. Tokens do not come: a worker that sends one breaks the rules of its link and is ended.
            Some(StreamEvent::End(Terminal::Completed { .. }) | StreamEvent::Token(_)) => {
                Err(RequestError::Failed(Failure::Lost))
            }
        }
    }

    /// The text that a conversation becomes.
    ///
    /// # Errors
    /// [`RequestError::NoTemplate`], [`RequestError::Template`].
    pub async fn apply_template(&self, request: ChatRequest) -> Result<String, RequestError> {
        let card = self.card.clone();
        blocking(move || Ok(render(&card, &request.messages, &request.options)?.text().to_owned())).await
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] if it is too long, [`RequestError::Text`].
    pub async fn tokenize(&self, text: String, options: EncodeOptions) -> Result<Vec<u32>, RequestError> {
        limits::at_most("prompt", text.len() as u64, 0, limits::PROMPT_BYTES_MAX as u64)?;
        let card = self.card.clone();
        blocking(move || Ok(card.tokenizer.encode(&text, options)?)).await
    }

    async fn tokens_of(&self, prompt: &Prompt) -> Result<Vec<u32>, RequestError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text(text) => self.tokenize(text.clone(), EncodeOptions::PROMPT).await,
        }
    }

    /// The text of tokens. Ids outside the vocabulary have no text.
    pub fn detokenize(&self, tokens: &[u32], skip_special: bool) -> String {
        self.card.tokenizer.decode(tokens, skip_special)
    }

    /// Ends a request. One that has ended already is ignored.
    pub fn cancel(&self, id: RequestId) {
        self.tree.cancel(id);
    }

    /// How many replicas are ready and what they have to do; `None` once the house has ended or the model is gone.
    pub async fn stats(&self) -> Option<ServiceStatus> {
        let services = self.tree.status().await?.router?.services;
        services.into_iter().find(|service| service.model == self.card.name)
    }

    async fn start(&self, request: GenerateRequest, prompt: Vec<u32>) -> Result<TokenStream, RequestError> {
        if let Some(constraint) = request.constraint.clone() {
            // A worker would refuse it, too, but only after the request was accepted.
            let card = self.card.clone();
            blocking(move || Ok(card.check(&constraint)?)).await?;
        }
        let seed = request.seed.unwrap_or_else(draw_seed);
        let mut choices = Vec::new();
        for number in 0..request.n {
            // If one is refused, those before it are dropped here and so cancelled.
            let inner = self.tree.generate(self.choice(&request, &prompt, seed, number)).await?;
            let detokenizer = Detokenizer::after(&self.card.tokenizer, &prompt, request.skip_special);
            choices.push(Choice {
                number,
                inner: Some(inner),
                text: TextStream::new(detokenizer, request.stop.clone()),
                stops: request.stop.clone(),
                n_prompt: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                n_tokens: 0,
            });
        }
        Ok(TokenStream::new(choices, seed, prompt))
    }

    fn choice(&self, request: &GenerateRequest, prompt: &[u32], seed: u64, choice: u32) -> Generate {
        let mut stop_ids = request.stop_ids.clone();
        if !request.ignore_eos {
            stop_ids.extend_from_slice(self.card.tokenizer.stop_ids());
        }
        // More than the context leaves room for cannot come; the house would set it aside all the same.
        let n_prompt = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let room = self.card.context.saturating_sub(n_prompt).max(1);
        Generate {
            model: self.card.name.clone(),
            task: Task::Generate,
            prompt: prompt.to_vec(),
            sampling: SamplingParams { seed, choice, ..request.sampling.clone() },
            max_tokens: request.max_tokens.unwrap_or(u32::MAX).min(room),
            min_tokens: request.min_tokens,
            stop_ids,
            logprobs: request.logprobs,
            constraint: request.constraint.clone(),
            priority: request.priority,
            timeout: request.timeout,
        }
    }
}

fn render(
    card: &ModelCard,
    messages: &[crate::text::Message],
    options: &crate::text::RenderOptions,
) -> Result<ChatPrompt, RequestError> {
    let template = card.template.as_ref().ok_or_else(|| RequestError::NoTemplate { model: card.name.clone() })?;
    Ok(template.prompt(&card.tokenizer, messages, options)?)
}

/// Templates and long texts take milliseconds: they do not belong on a thread that carries streams.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RequestError> + Send + 'static,
) -> Result<T, RequestError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(RequestError::Stopped))
}

/// Scaled to length 1; a vector of zeros stays one.
fn unit(mut values: Vec<f32>) -> Vec<f32> {
    let length = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    values
}

fn draw_seed() -> u64 {
    // 32 random bits, so that people can type it. The hasher's keys are the standard library's only source.
    std::hash::RandomState::new().build_hasher().finish() >> 32
}
