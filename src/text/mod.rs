//! Text to tokens and back: tokenizers, incremental detokenizer, stop strings, chat templates.
//!
//! ```text
//! messages -> ChatTemplate -> ChatPrompt -> Tokenizer -> token ids -> engine
//!                                                                       |
//!         certain text <- StopMatcher <- Detokenizer <- token ids <-----+     (TextStream = both)
//! ```
//!
//! Invariants: what users write never becomes a control token; no output splits a UTF-8 sequence; no character of a
//! stop string leaks; time is linear in the text; the state between two tokens is small and serialisable.

mod added;
mod bpe;
mod byte_level;
mod chat;
mod detokenizer;
mod error;
mod hf;
mod merge;
mod pretokenize;
mod prompt;
mod special;
mod spm;
mod stop;
mod stream;
mod tokenizer;
mod vocabulary;

pub use chat::{
    ChatTemplate, FUEL_MAX, Message, OUTPUT_BASE_BYTES, RenderOptions, SOURCE_MAX_BYTES, TemplateError, TemplateTokens,
};
pub use detokenizer::{Detokenizer, DetokenizerState};
pub use error::TextError;
pub use prompt::ChatPrompt;
pub use special::{SpecialIds, TokenKind};
pub use stop::{StopMatcher, StopOutput, StopState};
pub use stream::{TextStream, TextStreamState};
pub use tokenizer::{EncodeOptions, Tokenizer};
