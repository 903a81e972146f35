//! Pre-tokenizers: cutting text into words, inside which the merges work.
//!
//! A vocabulary names its pre-tokenizer (`tokenizer.ggml.pre`), and the name stands for one or more regular
//! expressions, applied one after the other: each match, and each gap between matches, becomes a word that the
//! next expression cuts further. [`table`] holds the names.
//!
//! The expressions run on a finite automaton, so that time is linear in the text whatever it is; a backtracking
//! engine gives up, or takes for ever, on a few megabytes of spaces. The one thing that automata cannot express
//! is the `\s+(?!\S)` at the end of nearly all of them ("white space, but leave the last one to the next word").
//! It is compiled as a plain `\s+` of its own, and its match is shortened by a character when something follows.

mod pattern;
mod table;

pub(crate) use pattern::{Pattern, PatternError};
pub(crate) use table::{PreTokenizer, find, names};

/// One stage of a pre-tokenizer.
#[derive(Debug)]
pub(crate) enum Stage {
    /// Matches and the gaps between them become words.
    Split(Pattern),
    /// Digits in groups of three from the right.
    DigitGroups(DigitGroups),
}

/// Which runs of digits are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DigitGroups {
    /// `(?=(\d{3})+(?!\d))`: all of them.
    All,
    /// `\d{1,3}(?=(?:\d{3})*\b)`: those that end at a word boundary.
    WholeWords,
}

impl Stage {
    /// Cuts `word` and hands the pieces to `emit`, in order and without gaps.
    fn cut<'t>(&self, word: &'t str, emit: &mut dyn FnMut(&'t str)) {
        match self {
            Stage::Split(pattern) => pattern.cut(word, emit),
            Stage::DigitGroups(which) => cut_digit_groups(word, *which, emit),
        }
    }
}

/// Runs `text` through all `stages` and hands the words to `emit`.
pub(crate) fn split<'t>(stages: &[Stage], text: &'t str, emit: &mut dyn FnMut(&'t str)) {
    match stages {
        [] if text.is_empty() => {}
        [] => emit(text),
        [first, rest @ ..] => first.cut(text, &mut |word| split(rest, word, emit)),
    }
}

fn cut_digit_groups<'t>(word: &'t str, which: DigitGroups, emit: &mut dyn FnMut(&'t str)) {
    let is_digit = |c: char| c.is_numeric() && Pattern::decimal_digit(c);
    let mut start = 0;
    let mut chars = word.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if !is_digit(c) {
            continue;
        }
        let mut run = vec![at];
        let mut end = at + c.len_utf8();
        while let Some((next, c)) = chars.next_if(|(_, c)| is_digit(*c)) {
            run.push(next);
            end = next + c.len_utf8();
        }
        let at_boundary = !chars.peek().is_some_and(|(_, c)| Pattern::word_char(*c));
        if which == DigitGroups::All || at_boundary {
            for (i, &cut) in run.iter().enumerate() {
                let first_of_word = i == 0 && which == DigitGroups::WholeWords;
                if first_of_word || (i > 0 && (run.len() - i).is_multiple_of(3)) {
                    emit_range(word, start, cut, emit);
                    start = cut;
                }
            }
            if which == DigitGroups::WholeWords {
                emit_range(word, start, end, emit);
                start = end;
            }
        }
    }
    emit_range(word, start, word.len(), emit);
}

fn emit_range<'t>(word: &'t str, start: usize, end: usize, emit: &mut dyn FnMut(&'t str)) {
    if start < end {
        emit(&word[start..end]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(name: &str, text: &str) -> Vec<String> {
        let stages = find(name).unwrap().stages().unwrap();
        let mut out = Vec::new();
        split(&stages, text, &mut |word| out.push(word.to_string()));
        assert_eq!(out.concat(), text, "no byte may be lost");
        out
    }

    #[test]
    fn every_row_compiles_and_loses_nothing() {
        let text =
            "I'LL say: 12345 – Größe ΑΒΓ ÀÉ\u{301} 汉字かな\r\n\r\n  x\t\t y\u{a0}\u{3000}z 🚀😶\u{200d}🌫️ \u{85} \n ";
        for row in table::PRE_TOKENIZERS {
            for name in row.names {
                assert!(!words(name, text).is_empty());
                assert_eq!(words(name, "").len(), 0);
            }
        }
    }

    #[test]
    fn trailing_space_goes_to_the_next_word() {
        assert_eq!(words("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(words("gpt-2", "a \n\nb  "), ["a", " \n", "\n", "b", "  "]);
        assert_eq!(words("llama-bpe", "a \n\n b"), ["a", " \n\n", " b"]);
        assert_eq!(words("qwen2", " \u{3000} x"), [" \u{3000}", " x"]);
        assert_eq!(words("gpt-2", "x \u{3000}y"), ["x", " ", "\u{3000}", "y"]);
    }

    #[test]
    fn numbers() {
        assert_eq!(words("qwen2", "12345"), ["1", "2", "3", "4", "5"]);
        assert_eq!(words("llama-bpe", "12345"), ["123", "45"]);
        assert_eq!(words("gpt-2", "12345"), ["12345"]);
        assert_eq!(words("superbpe", "a12345b"), ["a", "12", "345", "b"]);
        assert_eq!(words("tiny_aya", "12345 1234x"), ["12", "345", " ", "123", "4", "x"]);
        assert_eq!(words("falcon", "1234567"), ["123", "456", "7"]);
    }

    #[test]
    fn contractions_and_case() {
        assert_eq!(words("gpt-2", "I'll DON'T"), ["I", "'ll", " DON", "'", "T"]);
        assert_eq!(words("llama-bpe", "I'LL"), ["I", "'LL"]);
        assert_eq!(words("gpt-4o", "HelloWorld's ABCdef"), ["Hello", "World's", " ABCdef"]);
        assert_eq!(words("tekken", "HelloWorld's"), ["Hello", "World", "'s"]);
    }

    #[test]
    fn unknown_names_are_not_found() {
        assert!(find("nosuch").is_none());
    }

    #[test]
    fn white_space_by_the_megabyte_is_linear() {
        for name in ["llama-bpe", "qwen2", "gpt-4o", "gpt-2", "default", "deepseek-llm"] {
            let text = " \t".repeat(2 << 20);
            assert_eq!(words(name, &text).len(), 1, "{name}");
        }
    }
}
