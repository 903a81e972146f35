//! What models say, taken apart: reasoning, answer, calls of tools. Pure: text in, pieces out, and the pieces do not
//! depend on how the text was cut.
//!
//! | syntax | how a template shows that its model speaks it | file |
//! |---|---|---|
//! | harmony | it writes `<|channel|>` | [`harmony`] |
//! | `<tool_call>` JSON | it writes `<tool_call>`, and tools were given | [`tagged`] |
//! | bare JSON | it tells the model to answer with `{"name": ..., "parameters": ...}`, and tools were given | [`bare`] |
//! | `<think>` | it writes `</think>` | [`think`] |

mod bare;
mod harmony;
mod tagged;
mod think;

use serde_json::Value;

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Of the answer itself.
    Content(String),
    /// Of what the model thought before.
    Reasoning(String),
    /// A call of this tool begins. Its arguments follow, and nothing else until they are complete.
    Call(String),
    /// Of the arguments of the last call: JSON, if the model keeps to the rules.
    Arguments(String),
}

/// What a model speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Syntax {
    /// Text.
    Plain,
    /// GPT-OSS.
    Harmony,
    /// JSON between tags.
    Tagged,
    /// JSON without tags.
    Bare,
}

impl Syntax {
    /// What the model of this template speaks, given tools or not.
    pub(super) fn of(template: &str, has_tools: bool) -> Self {
        if template.contains("<|channel|>") && template.contains("<|message|>") {
            Self::Harmony
        } else if !has_tools {
            Self::Plain
        } else if template.contains("<tool_call>") {
            Self::Tagged
        } else if template.contains("\"parameters\"") && template.contains("\"name\"") {
            Self::Bare
        } else {
            Self::Plain
        }
    }

    /// Whether a template of a model that speaks this can say what the tools are.
    pub(super) fn takes_tools(template: &str) -> bool {
        template.contains("tools")
    }

    /// Whether control tokens are part of the syntax, so that they must not be left out of the text.
    pub(super) fn needs_control_tokens(self) -> bool {
        self == Self::Harmony
    }
}

/// Takes one choice's text apart.
#[derive(Debug)]
pub(super) enum Splitter {
    /// Everything is the answer.
    Plain,
    /// GPT-OSS.
    Harmony(harmony::Harmony),
    /// Thoughts, then an answer that may hold calls.
    Thinking(think::Think, Calls),
}

/// The part of an answer after the thoughts.
#[derive(Debug)]
pub(super) enum Calls {
    /// No calls.
    None,
    /// Between tags.
    Tagged(tagged::Tagged),
    /// Without tags.
    Bare(bare::Bare),
}

impl Splitter {
    /// For an answer in `syntax` by the model of `template`, whose prompt ended with `prompt_end`.
    pub(super) fn new(syntax: Syntax, template: &str, prompt_end: &str) -> Self {
        let calls = match syntax {
            Syntax::Harmony => return Self::Harmony(harmony::Harmony::default()),
            Syntax::Plain => Calls::None,
            Syntax::Tagged => Calls::Tagged(tagged::Tagged::default()),
            Syntax::Bare => Calls::Bare(bare::Bare::default()),
        };
        if template.contains("</think>") {
            let is_open = prompt_end.trim_end().ends_with("<think>");
            return Self::Thinking(think::Think::new(is_open), calls);
        }
        match calls {
            Calls::None => Self::Plain,
            calls => Self::Thinking(think::Think::answer(), calls),
        }
    }

    /// The pieces that become certain with this text.
    pub(super) fn push(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        match self {
            Self::Plain => content(text, pieces),
            Self::Harmony(harmony) => harmony.push(text, pieces),
            Self::Thinking(think, calls) => {
                let mut parts = Vec::new();
                think.push(text, &mut parts);
                calls.take(parts, pieces);
            }
        }
    }

    /// Whether the arguments of the last call, if there was one, are complete.
    pub(super) fn call_is_complete(&self) -> bool {
        match self {
            Self::Harmony(harmony) => !harmony.is_in_call(),
            // These hold calls back until they are.
            Self::Plain | Self::Thinking(..) => true,
        }
    }

    /// All that was held back.
    pub(super) fn finish(&mut self, pieces: &mut Vec<Piece>) {
        match self {
            Self::Plain => {}
            Self::Harmony(harmony) => harmony.finish(pieces),
            Self::Thinking(think, calls) => {
                let mut parts = Vec::new();
                think.finish(&mut parts);
                calls.take(parts, pieces);
                match calls {
                    Calls::None => {}
                    Calls::Tagged(tagged) => tagged.finish(pieces),
                    Calls::Bare(bare) => bare.finish(pieces),
                }
            }
        }
    }
}

impl Calls {
    fn take(&mut self, parts: Vec<Piece>, pieces: &mut Vec<Piece>) {
        for part in parts {
            match (&mut *self, part) {
                (Self::Tagged(tagged), Piece::Content(text)) => tagged.push(&text, pieces),
                (Self::Bare(bare), Piece::Content(text)) => bare.push(&text, pieces),
                (_, part) => pieces.push(part),
            }
        }
    }
}

fn content(text: &str, pieces: &mut Vec<Piece>) {
    if !text.is_empty() {
        pieces.push(Piece::Content(text.to_owned()));
    }
}

/// Bytes at the end of `text` that may be the beginning of `tag`.
fn partial(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|n| tag.is_char_boundary(*n) && text.ends_with(&tag[..*n])).unwrap_or(0)
}

/// The name and the arguments of a call written as JSON; `None` if it is no call.
fn read_call(json: &str) -> Option<(String, String)> {
    let call: Value = serde_json::from_str(json.trim()).ok()?;
    let call = call.get("function").filter(|inner| inner.is_object()).unwrap_or(&call);
    let name = call.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
        None => "{}".to_owned(),
        // Some models write the arguments as a string that holds JSON.
        Some(Value::String(text)) => text.clone(),
        Some(value @ Value::Object(_)) => value.to_string(),
        Some(_) => return None,
    };
    Some((name.to_owned(), arguments))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Neighbours of the same kind made one: what is left does not depend on where they were cut.
    pub(super) fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
        let mut joined: Vec<Piece> = Vec::new();
        for piece in pieces {
            match (joined.last_mut(), piece) {
                (Some(Piece::Content(last)), Piece::Content(text)) => last.push_str(&text),
                (Some(Piece::Reasoning(last)), Piece::Reasoning(text)) => last.push_str(&text),
                (Some(Piece::Arguments(last)), Piece::Arguments(text)) => last.push_str(&text),
                (_, piece) => joined.push(piece),
            }
        }
        joined
    }

    pub(super) fn split(mut splitter: Splitter, parts: &[&str]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        parts.iter().for_each(|part| splitter.push(part, &mut pieces));
        splitter.finish(&mut pieces);
        joined(pieces)
    }

    #[test]
    fn templates_tell_what_their_models_speak() {
        assert_eq!(Syntax::of("..<|channel|>..<|message|>", false), Syntax::Harmony);
        assert_eq!(Syntax::of("..<tool_call>", true), Syntax::Tagged);
        assert_eq!(Syntax::of("..<tool_call>", false), Syntax::Plain);
        assert_eq!(Syntax::of(r#"{"name": function, "parameters": ...}"#, true), Syntax::Bare);
        assert_eq!(Syntax::of("{{ messages }}", true), Syntax::Plain);
    }

    #[test]
    fn calls_are_read_in_the_forms_that_models_write() {
        let read = |json: &str| read_call(json).map(|(name, arguments)| format!("{name} {arguments}"));
        assert_eq!(read(r#" {"name": "f", "arguments": {"a": 1}} "#).as_deref(), Some(r#"f {"a":1}"#));
        assert_eq!(read(r#"{"name": "f", "parameters": {}}"#).as_deref(), Some("f {}"));
        assert_eq!(read(r#"{"name": "f", "arguments": "{\"a\":1}"}"#).as_deref(), Some(r#"f {"a":1}"#));
        assert_eq!(read(r#"{"function": {"name": "f"}}"#).as_deref(), Some("f {}"));
        for no_call in ["", "[]", "{}", r#"{"name": 1}"#, r#"{"name": ""}"#, r#"{"name": "f", "arguments": [1]}"#] {
            assert_eq!(read(no_call), None, "{no_call}");
        }
    }

    /// Text made of the tags and of what stands between them.
    fn any_output() -> impl Strategy<Value = String> {
        let words = prop::sample::select(vec![
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|start|>",
            "<|call|>",
            "<|return|>",
            "<|constrain|>",
            "analysis",
            "final",
            "commentary",
            "assistant",
            " to=functions.f",
            "json",
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            r#"{"name": "f", "arguments": {"a": "}"}}"#,
            r#"{"name": "g", "parameters": {}}"#,
            "{",
            "}",
            "\"",
            "\\",
            ";",
            "\n",
            " ",
            "moon",
            "月",
            "<",
            "<|",
            "</",
            "|>",
        ]);
        prop::collection::vec(words, 0..24).prop_map(|words| words.concat())
    }

    proptest! {
        /// However the text is cut, the pieces are the same; and of plain text nothing is lost.
        #[test]
        fn cuts_change_nothing(text in any_output(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let boundaries: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let parts: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let single: Vec<String> = text.chars().map(String::from).collect();
            let single: Vec<&str> = single.iter().map(String::as_str).collect();
            for (syntax, template, end) in [
                (Syntax::Plain, "", ""),
                (Syntax::Harmony, "", ""),
                (Syntax::Tagged, "", ""),
                (Syntax::Tagged, "</think>", ""),
                (Syntax::Bare, "", ""),
                (Syntax::Plain, "</think>", "<think>\n"),
            ] {
                let whole = split(Splitter::new(syntax, template, end), &[&text]);
                prop_assert_eq!(&split(Splitter::new(syntax, template, end), &parts), &whole, "{:?}", syntax);
                prop_assert_eq!(&split(Splitter::new(syntax, template, end), &single), &whole, "{:?}", syntax);
                if syntax == Syntax::Plain && template.is_empty() && !text.is_empty() {
                    prop_assert_eq!(whole, vec![Piece::Content(text.clone())]);
                }
            }
        }
    }
}
