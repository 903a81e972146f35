//! One choice of a chat while it grows: its text is taken apart into reasoning, answer and calls.

use super::super::id;
use super::super::output::{Piece, Splitter};
use crate::client::Ender;
use serde_json::{Value, json};

/// What a piece of text adds to a choice, in the API's terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Delta {
    Content(String),
    Reasoning(String),
    /// A call begins.
    Call {
        index: usize,
        id: String,
        name: String,
    },
    /// Its arguments.
    Arguments {
        index: usize,
        text: String,
    },
}

impl Delta {
    /// The delta object of a chunk, without its braces.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        use super::super::sse::json as put;
        match self {
            Self::Content(text) => {
                out.extend_from_slice(b"\"content\":");
                put(out, text);
            }
            Self::Reasoning(text) => {
                out.extend_from_slice(b"\"reasoning_content\":");
                put(out, text);
            }
            Self::Call { index, id, name } => {
                out.extend_from_slice(b"\"tool_calls\":");
                let function = json!({ "name": name, "arguments": "" });
                put(out, &json!([{ "index": index, "id": id, "type": "function", "function": function }]));
            }
            Self::Arguments { index, text } => {
                out.extend_from_slice(b"\"tool_calls\":");
                put(out, &json!([{ "index": index, "function": { "arguments": text } }]));
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct ChatChoice {
    splitter: Splitter,
    pieces: Vec<Piece>,
    n_calls: usize,
    /// Whether there may be more than one.
    parallel_calls: bool,
    /// Ends the text where nothing that follows would be wanted, and the number by which it knows this choice.
    ender: Option<(Ender, u32)>,
    /// Within a call that is one too many.
    is_dropping: bool,
    is_reasoning: bool,
    /// Tokens of reasoning so far.
    pub(super) reasoning_tokens: u64,
}

impl ChatChoice {
    pub(super) fn new(splitter: Splitter, parallel_calls: bool) -> Self {
        Self {
            splitter,
            pieces: Vec::new(),
            n_calls: 0,
            parallel_calls,
            ender: None,
            is_dropping: false,
            is_reasoning: false,
            reasoning_tokens: 0,
        }
    }

    /// One that may have a single call ends its text after it: what the model goes on to say would be thrown away.
    #[must_use]
    pub(super) fn ended_by(mut self, ender: Ender, number: u32) -> Self {
        self.ender = (!self.parallel_calls).then_some((ender, number));
        self
    }

    /// What one token's text adds.
    pub(super) fn token(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.splitter.push(text, &mut self.pieces);
        self.take(deltas);
        self.reasoning_tokens += u64::from(self.is_reasoning);
        if let Some((ender, number)) = &self.ender
            && self.n_calls > 0
            && self.splitter.call_is_complete()
        {
            ender.end(*number);
        }
    }

    /// What the end adds: its last text, and all that was held back.
    pub(super) fn finish(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.splitter.push(text, &mut self.pieces);
        self.splitter.finish(&mut self.pieces);
        self.take(deltas);
    }

    /// How it ended, given how its text ended.
    pub(super) fn finish_reason(&self, reason: &'static str) -> &'static str {
        if reason == "stop" && self.n_calls > 0 { "tool_calls" } else { reason }
    }

    fn take(&mut self, deltas: &mut Vec<Delta>) {
        for piece in self.pieces.drain(..) {
            self.is_reasoning = matches!(piece, Piece::Reasoning(_));
            match piece {
                Piece::Call(_) => self.is_dropping = !self.parallel_calls && self.n_calls > 0,
                Piece::Content(_) | Piece::Reasoning(_) => self.is_dropping = false,
                Piece::Arguments(_) => {}
            }
            if self.is_dropping {
                continue;
            }
            deltas.push(match piece {
                Piece::Content(text) => Delta::Content(text),
                Piece::Reasoning(text) => Delta::Reasoning(text),
                Piece::Call(name) => {
                    self.n_calls += 1;
                    Delta::Call { index: self.n_calls - 1, id: id::new("call_"), name }
                }
                Piece::Arguments(text) => Delta::Arguments { index: self.n_calls.saturating_sub(1), text },
            });
        }
    }
}

/// The message that the deltas of a choice make.
#[derive(Debug, Default)]
pub(super) struct MessageBuilder {
    content: String,
    reasoning: String,
    calls: Vec<(String, String, String)>,
}

impl MessageBuilder {
    pub(super) fn add(&mut self, deltas: &mut Vec<Delta>) {
        for delta in deltas.drain(..) {
            match delta {
                Delta::Content(text) => self.content.push_str(&text),
                Delta::Reasoning(text) => self.reasoning.push_str(&text),
                Delta::Call { id, name, .. } => self.calls.push((id, name, String::new())),
                Delta::Arguments { text, .. } => {
                    if let Some((_, _, arguments)) = self.calls.last_mut() {
                        arguments.push_str(&text);
                    }
                }
            }
        }
    }

    /// The `message` of a choice.
    pub(super) fn json(self) -> Value {
        let has_calls = !self.calls.is_empty();
        let content = (!self.content.is_empty() || !has_calls).then_some(self.content);
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.into();
        }
        if has_calls {
            let call = |(id, name, arguments): (String, String, String)| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
            message["tool_calls"] = self.calls.into_iter().map(call).collect();
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::output::Syntax;
    use super::*;

    #[test]
    fn a_call_ends_a_choice_as_a_call() {
        let mut choice = ChatChoice::new(Splitter::new(Syntax::Tagged, "", ""), true);
        let (mut deltas, mut message) = (Vec::new(), MessageBuilder::default());
        for text in ["Wait.\n<tool", "_call>{\"name\": \"f\", ", "\"arguments\": {\"a\": 1}}"] {
            choice.token(text, &mut deltas);
            message.add(&mut deltas);
        }
        choice.finish("</tool_call>", &mut deltas);
        message.add(&mut deltas);
        assert_eq!((choice.finish_reason("stop"), choice.finish_reason("length")), ("tool_calls", "length"));
        let message = message.json();
        assert_eq!(message["content"], "Wait.");
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"a\":1}");
        assert!(message["tool_calls"][0]["id"].as_str().is_some_and(|id| id.starts_with("call_")));
    }

    #[test]
    fn without_parallel_calls_there_is_one() {
        let mut choice = ChatChoice::new(Splitter::new(Syntax::Tagged, "", ""), false);
        let (mut deltas, mut message) = (Vec::new(), MessageBuilder::default());
        let call = |name: &str| format!("<tool_call>{{\"name\": \"{name}\", \"arguments\": {{}}}}</tool_call>");
        choice.token(&format!("{}{}{}done", call("f"), call("g"), call("h")), &mut deltas);
        choice.finish("", &mut deltas);
        message.add(&mut deltas);
        let message = message.json();
        assert_eq!(message["tool_calls"].as_array().map(Vec::len), Some(1));
        assert_eq!((&message["tool_calls"][0]["function"]["name"], &message["content"]), (&json!("f"), &json!("done")));
    }

    #[test]
    fn thoughts_are_counted_and_kept_apart() {
        let mut choice = ChatChoice::new(Splitter::new(Syntax::Harmony, "", ""), true);
        let (mut deltas, mut message) = (Vec::new(), MessageBuilder::default());
        for text in ["<|channel|>", "analysis", "<|message|>", "a", " moon", "<|end|>", "<|start|>", "assistant"] {
            choice.token(text, &mut deltas);
        }
        for text in ["<|channel|>", "final", "<|message|>", "moon", "<|return|>"] {
            choice.token(text, &mut deltas);
        }
        choice.finish("", &mut deltas);
        message.add(&mut deltas);
        let message = message.json();
        assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("moon"), &json!("a moon")));
        assert!(choice.reasoning_tokens >= 2);
    }
}
