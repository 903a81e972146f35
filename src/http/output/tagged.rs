//! Calls as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen, Hermes and their kin.
//!
//! A call is held back until it is complete, because half of its JSON may yet turn out to be none; what is no call is
//! given out as the text it is.

use super::{Piece, content, partial, read_call};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// See the module.
#[derive(Debug, Default)]
pub(in crate::http) struct Tagged {
    is_in_call: bool,
    held: String,
    /// White space that is part of the answer only if more of it follows.
    space: String,
    /// White space after a call is not part of the answer.
    is_after_call: bool,
}

impl Tagged {
    pub(super) fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        self.held.push_str(text);
        loop {
            let tag = if self.is_in_call { CLOSE } else { OPEN };
            let Some(at) = self.held.find(tag) else { break };
            let before = self.held[..at].to_owned();
            self.held.drain(..at + tag.len());
            if self.is_in_call {
                self.call(&before, pieces);
            } else {
                self.text(&before, pieces);
            }
            self.is_in_call = !self.is_in_call;
        }
        if !self.is_in_call {
            let certain = self.held.len() - partial(&self.held, OPEN);
            let text: String = self.held.drain(..certain).collect();
            self.text(&text, pieces);
        }
    }

    pub(super) fn finish(&mut self, pieces: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        if self.is_in_call {
            // The end tag is often a token that ends the turn, or was cut off by the limit.
            self.is_in_call = false;
            match read_call(&held) {
                Some(call) => self.found(call, pieces),
                None => self.text(&format!("{OPEN}{held}"), pieces),
            }
        } else {
            self.text(&held, pieces);
        }
        if !self.is_after_call {
            content(&std::mem::take(&mut self.space), pieces);
        }
    }

    fn call(&mut self, json: &str, pieces: &mut Vec<Piece>) {
        match read_call(json) {
            Some(call) => self.found(call, pieces),
            None => self.text(&format!("{OPEN}{json}{CLOSE}"), pieces),
        }
    }

    fn found(&mut self, (name, arguments): (String, String), pieces: &mut Vec<Piece>) {
        self.space.clear();
        self.is_after_call = true;
        pieces.push(Piece::Call(name));
        pieces.push(Piece::Arguments(arguments));
    }

    /// Text outside of calls. White space between it and a call belongs to neither.
    fn text(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let text = if self.is_after_call { text.trim_start() } else { text };
        if text.is_empty() {
            return;
        }
        let body = text.trim_end();
        if !body.is_empty() {
            self.is_after_call = false;
            content(&std::mem::take(&mut self.space), pieces);
            content(body, pieces);
        }
        self.space.push_str(&text[body.len()..]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::split;
    use super::super::{Splitter, Syntax};
    use super::*;

    fn tagged(text: &str) -> Vec<Piece> {
        split(Splitter::new(Syntax::Tagged, "", ""), &[text])
    }

    fn call(name: &str, arguments: &str) -> [Piece; 2] {
        [Piece::Call(name.into()), Piece::Arguments(arguments.into())]
    }

    #[test]
    fn calls_are_found_and_text_stays() {
        let two = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
                   <tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>\n";
        let expected =
            [vec![Piece::Content("Let me see.".into())], call("f", r#"{"a":1}"#).into(), call("g", "{}").into()];
        assert_eq!(tagged(two), expected.concat());
        assert_eq!(tagged("no call \n"), [Piece::Content("no call \n".into())]);
        assert_eq!(tagged("<tool_call>{\"name\": \"f\"}"), call("f", "{}"));
    }

    #[test]
    fn what_is_no_call_is_text() {
        for text in ["<tool_call>{oops}</tool_call>", "<tool_call>{\"name\": ", "a <tool_ca"] {
            assert_eq!(tagged(text), [Piece::Content(text.into())]);
        }
    }
}
