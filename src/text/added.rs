//! Tokens that are found in text before anything else: control tokens and user-defined ones.

use ahash::AHashMap;
use aho_corasick::{AhoCorasick, Input, MatchKind};

/// A token with a text of its own, outside the merges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddedToken {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Steers the model (turns, end of text): found only where the caller trusts the text.
    pub(crate) control: bool,
    /// Swallows white space before it.
    pub(crate) lstrip: bool,
    /// Swallows white space after it.
    pub(crate) rstrip: bool,
}

/// A piece of text that is cut at added tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

/// Finds added tokens: the leftmost first, and the longest of those that start at the same place.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    tokens: Vec<AddedToken>,
    by_text: AHashMap<String, u32>,
    all: Option<AhoCorasick>,
    /// Those that are not control tokens, with their places in `tokens`.
    plain: Option<AhoCorasick>,
    plain_idx: Vec<usize>,
}

impl AddedTokens {
    /// Builds the automata; tokens with an empty text are left out.
    pub(crate) fn new(mut tokens: Vec<AddedToken>) -> Result<AddedTokens, aho_corasick::BuildError> {
        tokens.retain(|t| !t.text.is_empty());
        let plain_idx: Vec<usize> = (0..tokens.len()).filter(|&i| !tokens[i].control).collect();
        let build = |texts: Vec<&str>| {
            let mut builder = AhoCorasick::builder();
            (!texts.is_empty()).then(|| builder.match_kind(MatchKind::LeftmostLongest).build(texts)).transpose()
        };
        let all = build(tokens.iter().map(|t| t.text.as_str()).collect())?;
        let plain = build(plain_idx.iter().map(|&i| tokens[i].text.as_str()).collect())?;
        let by_text = tokens.iter().map(|t| (t.text.clone(), t.id)).collect();
        Ok(AddedTokens { tokens, by_text, all, plain, plain_idx })
    }

    /// The token with exactly this text.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).copied()
    }

    /// The texts of the control tokens.
    pub(crate) fn control_texts(&self) -> impl Iterator<Item = &str> {
        self.tokens.iter().filter(|t| t.control).map(|t| t.text.as_str())
    }

    /// Cuts `text` at the tokens found in it.
    ///
    /// With `control` false the text of control tokens stays text. A token is not taken where one of `guards`
    /// (sorted byte offsets) lies strictly inside it.
    pub(crate) fn split<'t>(&self, text: &'t str, control: bool, guards: &[usize], emit: &mut dyn FnMut(Fragment<'t>)) {
        let automaton = if control { &self.all } else { &self.plain };
        let (mut from, mut at) = (0, 0);
        while let Some(mut found) = automaton.as_ref().and_then(|a| a.find(Input::new(text).range(at..))) {
            if let Some(guard) = guard_inside(guards, found.start(), found.end()) {
                // Not across the guard; a shorter token may still stand before it.
                let before = Input::new(text).range(found.start()..guard);
                match automaton.as_ref().and_then(|a| a.find(before)).filter(|m| m.start() == found.start()) {
                    Some(shorter) => found = shorter,
                    None => {
                        at = found.start() + text[found.start()..].chars().next().map_or(1, char::len_utf8);
                        continue;
                    }
                }
            }
            let idx = found.pattern().as_usize();
            let token = &self.tokens[if control { idx } else { self.plain_idx[idx] }];
            let before = &text[from..found.start()];
            emit_text(if token.lstrip { before.trim_end() } else { before }, emit);
            emit(Fragment::Token(token.id));
            let after = &text[found.end()..];
            from = if token.rstrip { text.len() - after.trim_start().len() } else { found.end() };
            at = from;
        }
        emit_text(&text[from..], emit);
    }
}

fn emit_text<'t>(text: &'t str, emit: &mut dyn FnMut(Fragment<'t>)) {
    if !text.is_empty() {
        emit(Fragment::Text(text));
    }
}

/// The first guard strictly inside a range.
fn guard_inside(guards: &[usize], start: usize, end: usize) -> Option<usize> {
    guards.get(guards.partition_point(|&g| g <= start)).copied().filter(|&g| g < end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Fragment::{Text, Token};

    fn token(id: u32, text: &str, control: bool) -> AddedToken {
        AddedToken { id, text: text.into(), control, lstrip: false, rstrip: id == 9 }
    }

    fn split<'t>(text: &'t str, control: bool, guards: &[usize]) -> Vec<Fragment<'t>> {
        let tokens =
            vec![token(1, "<|a|>", true), token(2, "<|a|>b", true), token(3, "<t>", false), token(9, "<|r|>", true)];
        let mut out = Vec::new();
        AddedTokens::new(tokens).unwrap().split(text, control, guards, &mut |f| out.push(f));
        out
    }

    #[test]
    fn the_longest_of_the_leftmost_is_taken() {
        assert_eq!(split("x<|a|>b<|a|>c", true, &[]), [Text("x"), Token(2), Token(1), Text("c")]);
        assert_eq!(split("", true, &[]), []);
    }

    #[test]
    fn control_tokens_only_where_trusted() {
        assert_eq!(split("<|a|><t>", false, &[]), [Text("<|a|>"), Token(3)]);
    }

    #[test]
    fn guards_keep_text_as_text() {
        assert_eq!(split("<|a|><|a|>", true, &[1]), [Text("<|a|>"), Token(1)]);
        assert_eq!(split("<|a|><|a|>", true, &[0, 5, 9]), [Token(1), Text("<|a|>")]);
        assert_eq!(split("é<|a|>b", true, &[7]), [Text("é"), Token(1), Text("b")]);
        assert_eq!(split("é<|a|>b", true, &[8]), [Text("é"), Token(2)]);
    }

    #[test]
    fn white_space_after_a_token_can_be_swallowed() {
        assert_eq!(split("a <|r|> \n b", true, &[]), [Text("a "), Token(9), Text("b")]);
        assert_eq!(split("<|r|>  ", true, &[]), [Token(9)]);
    }
}
