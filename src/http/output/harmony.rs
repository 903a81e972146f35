//! The harmony format of GPT-OSS: messages with channels.
//!
//! ```text
//! <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>
//! <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>
//!
//! [Start] --header--> [Header] --<|message|>--> [Body] --<|end|>, <|call|>, <|return|>--> [Between] --<|start|>--> [Header]
//!     \--plain text--> [Body: answer]                \--<|start|>--> [Header]
//! ```
//!
//! The prompt ends with `<|start|>assistant`, so an answer begins inside a header. Analysis is reasoning; final, and
//! commentary that is addressed to nobody, is the answer; what is addressed to somebody is a call.
//! Source: OpenAI, "Harmony response format" (cookbook.openai.com/articles/openai-harmony).

use super::{Piece, content, partial};

const MESSAGE: &str = "<|message|>";
const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const CONSTRAIN: &str = "<|constrain|>";
/// What ends a message.
const ENDS: [&str; 4] = ["<|end|>", "<|call|>", "<|return|>", START];

/// See the module.
#[derive(Debug, Default)]
pub(in crate::http) struct Harmony {
    state: State,
    held: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    Header,
    Body(Kind),
    Between,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Answer,
    Call,
}

impl Harmony {
    pub(super) fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        self.held.push_str(text);
        while self.advance(pieces) {}
    }

    pub(super) fn is_in_call(&self) -> bool {
        self.state == State::Body(Kind::Call)
    }

    /// One step of the machine; false when it needs more text.
    fn advance(&mut self, pieces: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Start => self.start(),
            State::Header => {
                let Some(at) = self.held.find(MESSAGE) else { return false };
                let kind = read_header(&self.held[..at], pieces);
                self.held.drain(..at + MESSAGE.len());
                self.state = State::Body(kind);
                true
            }
            State::Body(kind) => self.body(kind, pieces),
            State::Between => {
                let Some(at) = self.held.find(START) else {
                    let kept = partial(&self.held, START);
                    self.held.drain(..self.held.len() - kept);
                    return false;
                };
                self.held.drain(..at + START.len());
                self.state = State::Header;
                true
            }
        }
    }

    /// A model that forgets the header means its text to be the answer.
    fn start(&mut self) -> bool {
        let openings = [CHANNEL, MESSAGE, START, CONSTRAIN, " to=", "to="];
        if openings.iter().any(|opening| self.held.starts_with(opening)) {
            self.state = State::Header;
        } else if openings.iter().any(|opening| opening.starts_with(&self.held)) {
            return false;
        } else {
            self.state = State::Body(Kind::Answer);
        }
        true
    }

    fn body(&mut self, kind: Kind, pieces: &mut Vec<Piece>) -> bool {
        let first = ENDS.iter().filter_map(|end| Some((self.held.find(end)?, *end))).min();
        let Some((at, end)) = first else {
            let kept = ENDS.iter().map(|end| partial(&self.held, end)).max().unwrap_or(0);
            let certain: String = self.held.drain(..self.held.len() - kept).collect();
            emit(kind, &certain, pieces);
            return false;
        };
        let text: String = self.held.drain(..at).collect();
        emit(kind, &text, pieces);
        self.held.drain(..end.len());
        self.state = if end == START { State::Header } else { State::Between };
        true
    }

    pub(super) fn finish(&mut self, pieces: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Body(kind) => emit(kind, &held, pieces),
            // Part of a header says nothing to anybody; part of a text that could have become one does.
            State::Start if !held.starts_with('<') => content(&held, pieces),
            State::Start | State::Header | State::Between => {}
        }
    }
}

fn emit(kind: Kind, text: &str, pieces: &mut Vec<Piece>) {
    if text.is_empty() {
        return;
    }
    pieces.push(match kind {
        Kind::Reasoning => Piece::Reasoning(text.to_owned()),
        Kind::Answer => Piece::Content(text.to_owned()),
        Kind::Call => Piece::Arguments(text.to_owned()),
    });
}

/// What a message is by its header, `role? to=recipient? <|channel|>channel to=recipient? <|constrain|>type?`.
fn read_header(header: &str, pieces: &mut Vec<Piece>) -> Kind {
    let header = header.replace(CONSTRAIN, " ");
    let (before, after) = header.split_once(CHANNEL).unwrap_or((header.as_str(), ""));
    let mut words = before.split_whitespace().chain(after.split_whitespace());
    let recipient =
        words.find_map(|word| word.strip_prefix("to=")).filter(|to| !matches!(*to, "" | "user" | "assistant"));
    if let Some(recipient) = recipient {
        pieces.push(Piece::Call(recipient.strip_prefix("functions.").unwrap_or(recipient).to_owned()));
        return Kind::Call;
    }
    match after.split_whitespace().next() {
        Some("analysis") => Kind::Reasoning,
        _ => Kind::Answer,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::split;
    use super::super::{Splitter, Syntax};
    use super::*;

    fn harmony(text: &str) -> Vec<Piece> {
        split(Splitter::new(Syntax::Harmony, "", ""), &[text])
    }

    #[test]
    fn thoughts_and_answer() {
        let text =
            "<|channel|>analysis<|message|>a moon<|end|><|start|>assistant<|channel|>final<|message|>moon<|return|>";
        assert_eq!(harmony(text), [Piece::Reasoning("a moon".into()), Piece::Content("moon".into())]);
    }

    #[test]
    fn calls_in_both_orders() {
        let call = [Piece::Call("f".into()), Piece::Arguments("{\"a\": 1}".into())];
        for header in [
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
            " to=functions.f<|channel|>commentary<|constrain|>json<|message|>",
            "<|channel|>commentary to=functions.f<|message|>",
        ] {
            assert_eq!(harmony(&format!("{header}{{\"a\": 1}}<|call|>")), call, "{header}");
        }
        let preamble = "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant to=functions.f\
                        <|channel|>commentary<|message|>{}<|call|>";
        let expected = [Piece::Content("I will look.".into()), Piece::Call("f".into()), Piece::Arguments("{}".into())];
        assert_eq!(harmony(preamble), expected);
    }

    #[test]
    fn answers_that_break_off_or_break_the_rules() {
        assert_eq!(harmony("<|channel|>final<|message|>mo"), [Piece::Content("mo".into())]);
        assert_eq!(harmony("<|channel|>analysis<|message|>mo<|e"), [Piece::Reasoning("mo<|e".into())]);
        assert_eq!(harmony("<|channel|>ana"), []);
        assert_eq!(harmony("moon"), [Piece::Content("moon".into())]);
        assert_eq!(harmony("t"), [Piece::Content("t".into())]);
        let skipped_end = "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b";
        assert_eq!(harmony(skipped_end), [Piece::Reasoning("a".into()), Piece::Content("b".into())]);
    }
}
