//! A rendered conversation, and which of its text must stay text.

/// Text from a chat template, ready for [`Tokenizer::encode_prompt`](super::Tokenizer::encode_prompt).
///
/// The template writes control tokens (`<|im_start|>`) as text; users can type the same text. `guards` are byte
/// offsets inside what users wrote: a control token is never read across one of them. Everything else is encoded as
/// if the template's output were one text, so that guards change no ids but those of forged control tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatPrompt {
    text: String,
    guards: Vec<usize>,
}

impl ChatPrompt {
    pub(super) fn new(text: String, guards: Vec<usize>) -> ChatPrompt {
        ChatPrompt { text, guards }
    }

    /// The text, as Python's jinja2 would have rendered it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Byte offsets, sorted, that no control token may span.
    pub fn guards(&self) -> &[usize] {
        &self.guards
    }
}
