//! One small interface to any model, for programs that use Playhouse as a library: sizes, prefill, decode, generate.

use super::sampler::{RowOptions, SampleError, Sampler};
use super::{LoadError, Runner, RunnerLimits, StepModel, vram_usage};
use crate::backend::{BLOCK_TOKENS, Backend, BackendError, Batch, MemoryUse, SeqSpan};
use crate::gguf::GgufFile;
use playhouse_actors::engine::{LoadProgress, SamplingParams};
use std::collections::HashMap;

#[cfg(doctest)]
#[doc = include_str!("../../docs/src/adapter.md")]
struct Guide;

/// A sequence of an [`Adapter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(u64);

/// What the adapter cannot do.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The device.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The logits are no numbers.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// No sequence has this id: it was closed, or belongs to another adapter.
    #[error("{0:?} is not open")]
    UnknownSequence(SequenceId),
    /// Prefill needs a token, and generation a prompt.
    #[error("expected at least 1 token, found none")]
    NoTokens,
    /// A token that the vocabulary does not have.
    #[error("token {token} is outside the vocabulary of {n_vocab}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// The sequence would outgrow the context that the model was loaded for.
    #[error("{needed} tokens do not fit the context of {limit}")]
    ContextExceeded {
        /// Tokens of the sequence with the new ones.
        needed: usize,
        /// Most tokens of a sequence.
        limit: usize,
    },
    /// Other sequences hold the KV blocks; close one.
    #[error("{needed} more KV blocks are needed, {free} are free")]
    OutOfBlocks {
        /// Blocks that the new tokens need.
        needed: usize,
        /// Blocks that no sequence holds.
        free: usize,
    },
}

/// How [`Adapter::generate`] chooses and stops.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate; fewer if the context is full.
    pub max_tokens: usize,
    /// Ids that end the answer; the id itself is its last token.
    pub stop_ids: Vec<u32>,
}

impl Generation {
    /// The most likely tokens, up to `max_tokens`.
    pub fn greedy(max_tokens: usize) -> Self {
        Self { sampling: SamplingParams::greedy(), max_tokens, stop_ids: Vec::new() }
    }
}

/// A model with its KV blocks dealt out to sequences, one step at a time.
///
/// Every architecture and every backend looks the same from here. It runs one sequence per step and does not share
/// prefixes; [`LlmEngine`](super::LlmEngine) schedules many. The logits are the same bits either way.
pub struct Adapter<B: Backend> {
    runner: Runner<B>,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: u64,
    free_blocks: Vec<u32>,
    logits: Vec<f32>,
}

#[derive(Debug, Default)]
struct Sequence {
    n_tokens: usize,
    blocks: Vec<u32>,
}

impl<B: Backend> Adapter<B> {
    /// Loads the model in `file`.
    ///
    /// # Errors
    /// As [`Runner::load`].
    pub fn load(
        file: &GgufFile,
        backend: B,
        limits: RunnerLimits,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        Ok(Self::new(Runner::load(file, backend, limits, progress)?))
    }

    /// An adapter with all blocks of `runner` free.
    pub fn new(runner: Runner<B>) -> Self {
        let free_blocks = (0..runner.capacity().n_kv_blocks as u32).rev().collect();
        Self { runner, sequences: HashMap::new(), next_id: 0, free_blocks, logits: Vec::new() }
    }

    /// Tokens in the vocabulary: the length of a row of logits.
    pub fn vocab_size(&self) -> usize {
        self.runner.spec().n_vocab
    }

    /// Elements of the residual stream.
    pub fn hidden_dim(&self) -> usize {
        self.runner.spec().hidden_dim
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.runner.spec().layers.len()
    }

    /// Bytes that this model takes when loaded for `sequences` sequences of `context` tokens, the other limits being
    /// what they are. Allocates nothing.
    pub fn vram_usage(&self, context: usize, sequences: usize) -> MemoryUse {
        let limits = RunnerLimits::new(context, sequences, self.runner.limits().kv_dtype);
        vram_usage(self.runner.spec(), &limits)
    }

    /// The runner, to look at.
    pub fn runner(&self) -> &Runner<B> {
        &self.runner
    }

    /// Opens an empty sequence.
    pub fn open(&mut self) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence::default());
        id
    }

    /// Closes a sequence and frees its blocks. Closing it again does nothing.
    pub fn close(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.free_blocks.extend(sequence.blocks);
        }
    }

    /// Adds `tokens` to a sequence and returns the logits `[V]` after the last of them. May be called again: the tokens
    /// continue the sequence. How they are divided among calls changes no bit.
    ///
    /// # Errors
    /// [`AdapterError`]; unless it is [`AdapterError::Backend`], the sequence is as it was.
    pub fn prefill(&mut self, id: SequenceId, tokens: &[u32]) -> Result<&[f32], AdapterError> {
        self.admit(id, tokens)?;
        let chunk = self.runner.capacity().max_batch_tokens;
        let n_chunks = tokens.len().div_ceil(chunk);
        for (i, tokens) in tokens.chunks(chunk).enumerate() {
            let sequence = self.sequences.get_mut(&id).ok_or(AdapterError::UnknownSequence(id))?;
            let batch = sequence.batch(tokens, i + 1 == n_chunks);
            self.runner.run(&batch, &mut self.logits)?;
            sequence.n_tokens += tokens.len();
        }
        Ok(&self.logits)
    }

    /// Adds one token to a sequence and returns the logits `[V]` after it.
    ///
    /// # Errors
    /// As [`Adapter::prefill`].
    pub fn decode(&mut self, id: SequenceId, token: u32) -> Result<&[f32], AdapterError> {
        self.prefill(id, &[token])
    }

    /// Answers `prompt` in a sequence of its own. The tokens are those that the engine gives for the same parameters.
    ///
    /// # Errors
    /// As [`Adapter::prefill`].
    pub fn generate(&mut self, prompt: &[u32], how: &Generation) -> Result<Vec<u32>, AdapterError> {
        let id = self.open();
        let answer = self.answer(id, prompt, how);
        self.close(id);
        answer
    }

    fn answer(&mut self, id: SequenceId, prompt: &[u32], how: &Generation) -> Result<Vec<u32>, AdapterError> {
        let mut sampler = Sampler::new(&how.sampling, prompt, &[]);
        let mut answer: Vec<u32> = Vec::new();
        self.prefill(id, prompt)?;
        let room = (self.runner.n_ctx() - prompt.len()).min(how.max_tokens);
        while answer.len() < room {
            let token = sampler.choose(&mut self.logits, answer.len() as u32, RowOptions::default())?.token;
            sampler.push(token);
            answer.push(token);
            if how.stop_ids.contains(&token) {
                break;
            }
            if answer.len() < room {
                self.decode(id, token)?;
            }
        }
        Ok(answer)
    }

    /// Checks the tokens and gives the sequence the blocks that it needs for them.
    fn admit(&mut self, id: SequenceId, tokens: &[u32]) -> Result<(), AdapterError> {
        let (n_vocab, limit) = (self.runner.n_vocab(), self.runner.n_ctx());
        let sequence = self.sequences.get_mut(&id).ok_or(AdapterError::UnknownSequence(id))?;
        if tokens.is_empty() {
            return Err(AdapterError::NoTokens);
        }
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= n_vocab) {
            return Err(AdapterError::UnknownToken { token, n_vocab });
        }
        let total = sequence.n_tokens + tokens.len();
        if total > limit {
            return Err(AdapterError::ContextExceeded { needed: total, limit });
        }
        let (needed, free) =
            (total.div_ceil(BLOCK_TOKENS).saturating_sub(sequence.blocks.len()), self.free_blocks.len());
        if needed > free {
            return Err(AdapterError::OutOfBlocks { needed, free });
        }
        sequence.blocks.extend(self.free_blocks.drain(free - needed..).rev());
        Ok(())
    }
}

impl Sequence {
    /// The next tokens as a batch of their own.
    fn batch(&self, tokens: &[u32], wants_logits: bool) -> Batch {
        let positions = self.n_tokens..self.n_tokens + tokens.len();
        let slot = |pos: usize| self.blocks[pos / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (pos % BLOCK_TOKENS) as u32;
        let span = SeqSpan {
            first: 0,
            n_tokens: tokens.len(),
            kv_len: positions.end,
            blocks: self.blocks[..positions.end.div_ceil(BLOCK_TOKENS)].to_vec(),
        };
        Batch {
            tokens: tokens.to_vec(),
            slots: positions.clone().map(slot).collect(),
            positions: positions.map(|pos| pos as u32).collect(),
            spans: vec![span],
            logit_rows: wants_logits.then_some(tokens.len() as u32 - 1).into_iter().collect(),
            feeds: Vec::new(),
        }
    }
}
