//! basho, the embedded model: a real, trained llama of four million parameters that writes haiku, so that everything
//! can be tried without a download.
//!
//! What it was trained on is made here, too: [`poem`] and [`conversation`] write haiku from a grammar and a lexicon whose
//! words have their syllables counted, and the `haiku_corpus` example prints as many as `train/train.py` wants. `docs/`
//! tells how to repeat the training; [`scan`] is how a test knows that a poem is a poem.
//!
//! Imports nothing of the house: the model is bytes, and the words are words.

mod rng;
mod syllables;
mod inflect;
mod lexicon;
mod grammar;
mod prompts;

pub use grammar::{Theme, poem};
pub use lexicon::Topic;
pub use prompts::{Conversation, Exchange, conversation};
pub use syllables::{Scan, count_line, n_words, scan, syllables, words};

/// The model: GGUF v3, architecture `llama`, Q8_0 matrices and F32 norms, tokenizer and chat template included.
///
/// Made by `train/train.py` and `train/export.py`; `docs/src/basho.md` says on what, for how long and with which loss.
pub const GGUF: &[u8] = include_bytes!("basho.gguf");

/// What error messages and listings call the file that [`GGUF`] is.
pub const LABEL: &str = "embedded:basho";

/// All topics that a prompt may name.
pub fn topics() -> &'static [Topic] {
    &lexicon::lexicon().topics
}
