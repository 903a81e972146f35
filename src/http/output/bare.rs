//! Calls as bare JSON, `{"name": ..., "parameters": {...}}`, that are the whole answer: Llama 3.
//!
//! An answer that begins with `{` is held back until the brace is closed. If it is a call, more may follow after `;` or
//! white space; if it is none, it was text all along.

use super::{Piece, content, read_call};

/// Llama 3.1's mark of a call; a control token, so usually not in the text.
const MARK: &str = "<|python_tag|>";

/// See the module.
#[derive(Debug, Default)]
pub(in crate::http) struct Bare {
    held: String,
    is_text: bool,
    n_calls: u32,
    scan: Scan,
}

/// How far the object at the beginning of the held text was looked at.
#[derive(Debug, Default)]
struct Scan {
    at: usize,
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    /// Where the object ends, once it does.
    fn end(&mut self, text: &str) -> Option<usize> {
        for byte in text.bytes().skip(self.at) {
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' if !self.in_string => self.depth += 1,
                b'}' if !self.in_string => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Some(self.at);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

impl Bare {
    pub(super) fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        if self.is_text {
            content(text, pieces);
            return;
        }
        self.held.push_str(text);
        loop {
            if self.scan.at == 0 && !self.skip_to_object() {
                break;
            }
            let Some(end) = self.scan.end(&self.held) else { return };
            let Some((name, arguments)) = read_call(&self.held[..end]) else { break };
            pieces.push(Piece::Call(name));
            pieces.push(Piece::Arguments(arguments));
            self.n_calls += 1;
            self.held.drain(..end);
            self.scan = Scan::default();
        }
        if self.may_begin() {
            return;
        }
        self.is_text = true;
        content(&std::mem::take(&mut self.held), pieces);
    }

    /// Takes away what may stand before an object; whether one begins then.
    fn skip_to_object(&mut self) -> bool {
        let between = |c: char| c.is_whitespace() || (c == ';' && self.n_calls > 0);
        let rest = self.held.trim_start_matches(between);
        let rest = rest.strip_prefix(MARK).map_or(rest, str::trim_start);
        let is_object = rest.starts_with('{');
        if is_object {
            self.held.drain(..self.held.len() - rest.len());
        }
        is_object
    }

    /// Whether what is held may still be the beginning of what stands before an object.
    fn may_begin(&self) -> bool {
        let between = |c: char| c.is_whitespace() || (c == ';' && self.n_calls > 0);
        let rest = self.held.trim_start_matches(between);
        self.scan.at == 0
            && (MARK.starts_with(rest) || rest.strip_prefix(MARK).is_some_and(|r| r.trim_start().is_empty()))
    }

    pub(super) fn finish(&mut self, pieces: &mut Vec<Piece>) {
        let held = std::mem::take(&mut self.held);
        // Between and after calls white space means nothing.
        if self.n_calls == 0 || !held.trim_matches(|c: char| c.is_whitespace() || c == ';').is_empty() {
            content(&held, pieces);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::split;
    use super::super::{Splitter, Syntax};
    use super::*;

    fn bare(text: &str) -> Vec<Piece> {
        split(Splitter::new(Syntax::Bare, "", ""), &[text])
    }

    #[test]
    fn an_answer_that_is_a_call() {
        let call = |name: &str, arguments: &str| [Piece::Call(name.into()), Piece::Arguments(arguments.into())];
        assert_eq!(bare("\n{\"name\": \"f\", \"parameters\": {\"a\": \"}\"}}"), call("f", r#"{"a":"}"}"#));
        assert_eq!(bare("<|python_tag|>{\"name\": \"f\"}"), call("f", "{}"));
        let two = bare("{\"name\": \"f\"}; {\"name\": \"g\"}\n");
        assert_eq!(two, [call("f", "{}"), call("g", "{}")].concat());
    }

    #[test]
    fn an_answer_that_is_none() {
        for text in ["moon", " {\"a\": 1} is JSON", "{\"name\": ", "{oops}", "", "<|python"] {
            let expected: Vec<Piece> = if text.is_empty() { vec![] } else { vec![Piece::Content(text.into())] };
            assert_eq!(joined_text(bare(text)), joined_text(expected), "{text:?}");
        }
    }

    fn joined_text(pieces: Vec<Piece>) -> String {
        let text = |piece: Piece| if let Piece::Content(text) = piece { text } else { panic!("{piece:?}") };
        // White space before what looked like an object is not kept.
        pieces.into_iter().map(text).collect::<String>().trim_start().to_owned()
    }
}
