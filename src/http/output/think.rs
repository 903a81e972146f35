//! Thoughts between `<think>` and `</think>` at the beginning of an answer.
//!
//! ```text
//! [Start] --<think>--> [Thinking] --</think>--> [Answer]
//!     \--anything else--> [Answer]
//! ```

use super::{Piece, content, partial};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// See the module.
#[derive(Debug)]
pub(in crate::http) struct Think {
    state: State,
    held: String,
    /// White space after a tag belongs to the tag.
    skip_space: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Thinking,
    Answer,
}

impl Think {
    /// At the beginning of an answer; `is_open` if the prompt has opened the thoughts already.
    pub(super) fn new(is_open: bool) -> Self {
        Self { state: if is_open { State::Thinking } else { State::Start }, held: String::new(), skip_space: is_open }
    }

    /// For models that do not think aloud.
    pub(super) fn answer() -> Self {
        Self { state: State::Answer, held: String::new(), skip_space: false }
    }

    pub(super) fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        self.held.push_str(text);
        loop {
            if self.skip_space {
                let rest = self.held.trim_start();
                if rest.is_empty() {
                    self.held.clear();
                    return;
                }
                self.held.drain(..self.held.len() - rest.len());
                self.skip_space = false;
            }
            match self.state {
                State::Start => {
                    let begun = self.held.trim_start();
                    if let Some(rest) = begun.strip_prefix(OPEN) {
                        (self.held, self.state, self.skip_space) = (rest.to_owned(), State::Thinking, true);
                    } else if OPEN.starts_with(begun) {
                        return;
                    } else {
                        self.state = State::Answer;
                    }
                }
                State::Thinking => {
                    let Some(at) = self.held.find(CLOSE) else {
                        // White space before the tag belongs to the tag, too.
                        let kept = self.held.len() - partial(&self.held, CLOSE);
                        let certain = self.held[..kept].trim_end().len();
                        reasoning(self.held.drain(..certain).collect(), pieces);
                        return;
                    };
                    reasoning(self.held[..at].trim_end().to_owned(), pieces);
                    self.held.drain(..at + CLOSE.len());
                    (self.state, self.skip_space) = (State::Answer, true);
                }
                State::Answer => {
                    content(&std::mem::take(&mut self.held), pieces);
                    return;
                }
            }
        }
    }

    pub(super) fn finish(&mut self, pieces: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Thinking => reasoning(held, pieces),
            State::Start | State::Answer => content(&held, pieces),
        }
    }
}

fn reasoning(text: String, pieces: &mut Vec<Piece>) {
    if !text.is_empty() {
        pieces.push(Piece::Reasoning(text));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::split;
    use super::super::{Splitter, Syntax};
    use super::*;

    fn thinks(prompt_end: &str, text: &str) -> Vec<Piece> {
        split(Splitter::new(Syntax::Plain, "</think>", prompt_end), &[text])
    }

    #[test]
    fn thoughts_come_first_or_not_at_all() {
        let both = vec![Piece::Reasoning("a moon".into()), Piece::Content("moon".into())];
        assert_eq!(thinks("", "<think>\na moon\n</think>\n\nmoon"), both);
        assert_eq!(thinks("<think>\n", "a moon</think>moon"), both);
        assert_eq!(thinks("", "the <think> tag"), [Piece::Content("the <think> tag".into())]);
        assert_eq!(thinks("", "<think>never done"), [Piece::Reasoning("never done".into())]);
        assert_eq!(thinks("", "<thi"), [Piece::Content("<thi".into())]);
    }
}
