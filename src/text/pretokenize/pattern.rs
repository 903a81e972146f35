//! One regular expression of a pre-tokenizer, on a finite automaton.

use std::sync::LazyLock;

use regex_automata::meta::Regex;
use regex_automata::{Anchored, Input};

/// "White space, all but the last character if something follows."
const SPACES_BUT_LAST: &str = r"\s+(?!\S)";
const SPACES: &str = r"\s+";

/// Why an expression cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PatternError {
    /// Look-around other than the one that is understood, or back references.
    #[error("the look-around or assertion at byte {at} of {pattern:?} is not supported")]
    LookAround { pattern: String, at: usize },
    /// Not a regular expression.
    #[error("cannot compile {pattern:?}")]
    Syntax {
        pattern: String,
        #[source]
        source: Box<regex_automata::meta::BuildError>,
    },
}

/// A compiled expression.
#[derive(Debug)]
pub(crate) struct Pattern {
    regex: Regex,
    /// Which of the automaton's patterns is the shortened `\s+`.
    spaces: Option<usize>,
}

impl Pattern {
    /// Compiles an expression as tokenizer.json files write it.
    ///
    /// Understood beyond Rust's syntax: the alternative `\s+(?!\S)`, optionally followed by `\s+`; and possessive
    /// quantifiers, which here are read as greedy ones: in pre-tokenizers they stand where nothing could be given
    /// back anyway.
    ///
    /// # Errors
    /// Other look-around, and anything that does not compile.
    pub(crate) fn new(source: &str) -> Result<Pattern, PatternError> {
        let source = without_possessives(source);
        let alternatives = top_level_alternatives(&source);
        let spaces_at = alternatives.iter().position(|a| *a == SPACES_BUT_LAST);
        let (head, spaces) = match spaces_at {
            // A lone `\s+` afterwards catches the character that was left over, which `cut` does by itself.
            Some(at) if alternatives[at + 1..].iter().all(|a| *a == SPACES) => (&alternatives[..at], true),
            _ => (&alternatives[..], false),
        };
        let head = head.join("|");
        if let Some(at) = ["(?=", "(?!", "(?<=", "(?<!", "(?>"].iter().filter_map(|look| head.find(look)).min() {
            return Err(PatternError::LookAround { pattern: source, at });
        }
        let patterns: Vec<&str> =
            [(!head.is_empty()).then_some(head.as_str()), spaces.then_some(SPACES)].into_iter().flatten().collect();
        let regex = Regex::builder()
            .configure(Regex::config().nfa_size_limit(Some(64 << 20)))
            .build_many(&patterns)
            .map_err(|e| PatternError::Syntax { pattern: source.clone(), source: Box::new(e) })?;
        Ok(Pattern { regex, spaces: spaces.then(|| patterns.len() - 1) })
    }

    /// Compiles a literal text.
    ///
    /// # Errors
    /// [`PatternError::Syntax`] if it is too large to compile.
    pub(crate) fn literal(text: &str) -> Result<Pattern, PatternError> {
        let escaped: String = text.chars().map(|c| format!("\\x{{{:x}}}", c as u32)).collect();
        Pattern::new(&escaped)
    }

    /// Cuts `word` into matches and the gaps between them.
    pub(crate) fn cut<'t>(&self, word: &'t str, emit: &mut dyn FnMut(&'t str)) {
        let mut at = 0;
        while at < word.len() {
            let (start, end) = self.next_match(word, at).unwrap_or((word.len(), word.len()));
            if at < start {
                emit(&word[at..start]);
            }
            if start < end {
                emit(&word[start..end]);
            }
            at = end;
        }
    }

    /// The next non-empty match at or after `at`.
    fn next_match(&self, word: &str, mut at: usize) -> Option<(usize, usize)> {
        loop {
            // Nearly always a match starts right here; asking that first spares the search for its start.
            let here = Input::new(word).range(at..).anchored(Anchored::Yes);
            let found = self.regex.search(&here).or_else(|| self.regex.search(&Input::new(word).range(at..)))?;
            let (start, mut end) = (found.start(), found.end());
            if Some(found.pattern().as_usize()) == self.spaces && end < word.len() {
                let last = word[start..end].chars().next_back().map_or(0, char::len_utf8);
                if end - last > start {
                    end -= last;
                }
            }
            if start < end {
                return Some((start, end));
            }
            // An empty match cuts nothing: step over one character and look again.
            at = end + word[end..].chars().next()?.len_utf8();
        }
    }

    /// `\d`: a decimal digit of any script.
    pub(crate) fn decimal_digit(c: char) -> bool {
        static DIGIT: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\A\d\z").ok());
        c.is_ascii_digit() || (!c.is_ascii() && is(&DIGIT, c))
    }

    /// `\w`: what a word boundary is measured by.
    pub(crate) fn word_char(c: char) -> bool {
        static WORD: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\A\w\z").ok());
        c.is_ascii_alphanumeric() || c == '_' || (!c.is_ascii() && is(&WORD, c))
    }
}

fn is(class: &LazyLock<Option<Regex>>, c: char) -> bool {
    class.as_ref().is_some_and(|regex| regex.is_match(c.encode_utf8(&mut [0; 4]) as &str))
}

/// Splits at the `|` that stand outside groups, classes and escapes.
fn top_level_alternatives(source: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth, mut in_class) = (Vec::new(), 0, 0usize, false);
    for_each_syntax_char(source, |at, c| match c {
        '[' => in_class = true,
        ']' => in_class = false,
        '(' if !in_class => depth += 1,
        ')' if !in_class => depth = depth.saturating_sub(1),
        '|' if !in_class && depth == 0 => {
            parts.push(&source[start..at]);
            start = at + 1;
        }
        _ => {}
    });
    parts.push(&source[start..]);
    parts
}

/// Drops the `+` of `?+`, `*+`, `++` and `}+`.
fn without_possessives(source: &str) -> String {
    let (mut drop, mut in_class, mut previous) = (Vec::new(), false, (usize::MAX, ' '));
    for_each_syntax_char(source, |at, c| {
        let after_quantifier = previous.0.wrapping_add(1) == at && matches!(previous.1, '?' | '*' | '+' | '}');
        let group_start = previous.1 == '?' && source[..at].ends_with("(?");
        match c {
            '[' => in_class = true,
            ']' => in_class = false,
            '+' if !in_class && after_quantifier && !group_start => drop.push(at),
            _ => {}
        }
        previous = (at, if in_class { ' ' } else { c });
    });
    source.char_indices().filter(|(at, _)| !drop.contains(at)).map(|(_, c)| c).collect()
}

/// Calls `see` for every character that is not escaped (`\p{..}` and `\x{..}` count as one escape).
fn for_each_syntax_char(source: &str, mut see: impl FnMut(usize, char)) {
    let mut chars = source.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if c != '\\' {
            see(at, c);
            continue;
        }
        let escaped = chars.next();
        if matches!(escaped, Some((_, 'p' | 'P' | 'x'))) && chars.next_if(|(_, c)| *c == '{').is_some() {
            for (_, c) in chars.by_ref() {
                if c == '}' {
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pattern: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        Pattern::new(pattern).unwrap().cut(text, &mut |w| out.push(w.to_string()));
        out
    }

    #[test]
    fn alternatives_are_cut_at_the_top_level_only() {
        assert_eq!(top_level_alternatives(r"a|(b|c)|[|]|\||\p{L}|d"), ["a", "(b|c)", "[|]", r"\|", r"\p{L}", "d"]);
    }

    #[test]
    fn possessive_quantifiers_become_greedy() {
        assert_eq!(without_possessives(r"[^a+]?+\p{L}++|x{1,3}+|a+|\++"), r"[^a+]?\p{L}+|x{1,3}|a+|\++");
        assert_eq!(cut(r"'(?i:[sdmt]|ll)|[^\r\n\p{L}]?+\p{L}+|\s+(?!\S)|\s+", "it's  so"), ["it", "'s", " ", " so"]);
    }

    #[test]
    fn spaces_without_the_catch_all_are_cut_alike() {
        for pattern in [r" ?\p{L}+|\s+(?!\S)", r" ?\p{L}+|\s+(?!\S)|\s+"] {
            assert_eq!(cut(pattern, "a\n\nb \tc  "), ["a", "\n", "\n", "b", " ", "\t", "c", "  "]);
        }
    }

    #[test]
    fn other_look_around_is_refused() {
        let error = Pattern::new(r"a(?=b)|c").unwrap_err();
        assert!(matches!(error, PatternError::LookAround { at: 1, .. }), "{error}");
        assert!(matches!(Pattern::new("a(").unwrap_err(), PatternError::Syntax { .. }));
    }

    #[test]
    fn literals_and_empty_matches() {
        let mut out = Vec::new();
        Pattern::literal(" .").unwrap().cut("a .b", &mut |w| out.push(w));
        assert_eq!(out, ["a", " .", "b"]);
        assert_eq!(cut("x*", "aébx"), ["aéb", "x"]);
    }
}
