//! The text of one choice: tokens in, certain text out, until a stop string.

use serde::{Deserialize, Serialize};

use super::detokenizer::{Detokenizer, DetokenizerState};
use super::stop::{StopMatcher, StopOutput, StopState};
use super::tokenizer::Tokenizer;

/// All that is held back in one choice's text. A journal can carry it to another process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextStreamState {
    bytes: DetokenizerState,
    stop: StopState,
}

/// A [`Detokenizer`] whose text goes through a [`StopMatcher`].
#[derive(Debug, Clone)]
pub struct TextStream {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
}

impl TextStream {
    /// The stream of text for the tokens that `detokenizer` gets.
    pub fn new(detokenizer: Detokenizer, stops: Vec<String>) -> TextStream {
        TextStream { detokenizer, matcher: StopMatcher::new(stops) }
    }

    /// Goes on where another stream of the same vocabulary with the same stop strings stood.
    pub fn resume(tokenizer: &Tokenizer, skip_special: bool, stops: Vec<String>, state: TextStreamState) -> TextStream {
        let detokenizer = Detokenizer::resume(tokenizer, skip_special, state.bytes);
        TextStream { detokenizer, matcher: StopMatcher::resume(stops, state.stop) }
    }

    /// What to hand to [`TextStream::resume`].
    pub fn state(&self) -> TextStreamState {
        TextStreamState { bytes: self.detokenizer.state().clone(), stop: self.matcher.state().clone() }
    }

    /// The text that becomes certain with this token, and whether a stop string ended the text.
    pub fn push(&mut self, id: u32) -> StopOutput {
        let text = self.detokenizer.push(id);
        self.matcher.push(&text)
    }

    /// All that was held back, at the end. An open UTF-8 sequence can still complete a stop string.
    pub fn finish(&mut self) -> StopOutput {
        let mut output = self.matcher.push(&self.detokenizer.finish());
        output.emit.push_str(&self.matcher.finish());
        output
    }
}
