//! Counts syllables by the lexicon, and tells whether a text is a haiku of five, seven and five.
//!
//! The counts are facts written down in `syllables.txt`, not guessed by rule: a word that is not listed has no count, and
//! a line that holds one does not scan. Words that careful speakers count differently ("fire", "hour") are left out of
//! the training poems altogether.

use std::collections::HashMap;
use std::sync::LazyLock;

/// The counts, as text: `N: word word ...`, `#` starts a comment.
const TABLE: &str = include_str!("syllables.txt");

static COUNTS: LazyLock<HashMap<&'static str, u32>> = LazyLock::new(|| parse(TABLE));

fn parse(table: &str) -> HashMap<&str, u32> {
    let mut counts = HashMap::new();
    for line in table.lines().filter(|line| !line.starts_with('#')) {
        let Some((count, words)) = line.split_once(':') else { continue };
        let Ok(count) = count.trim().parse() else { continue };
        counts.extend(words.split_whitespace().map(|word| (word, count)));
    }
    counts
}

/// Number of words whose count is known.
pub fn n_words() -> usize {
    COUNTS.len()
}

/// Syllables of one word, in lower or upper case and without punctuation; `None` where the lexicon does not list it.
pub fn syllables(word: &str) -> Option<u32> {
    COUNTS.get(word).copied().or_else(|| COUNTS.get(word.to_lowercase().as_str()).copied())
}

/// The words of a line: runs of letters, apostrophes inside a word and hyphens apart.
///
/// A hyphen separates ("half-open" is two words), an apostrophe does not ("neighbor's" is one).
pub fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphabetic() || c == '\'' || c == '’'))
        .map(|word| word.trim_matches(['\'', '’']))
        .filter(|word| !word.is_empty())
}

/// Syllables of a line; the word that is not in the lexicon is the error.
///
/// # Errors
/// The first word that `syllables.txt` does not list.
pub fn count_line(line: &str) -> Result<u32, String> {
    words(line).try_fold(0, |sum, word| syllables(word).map(|n| sum + n).ok_or_else(|| word.to_string()))
}

/// How a text scans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// Syllables of each line that is not blank; `None` for a line with a word that the lexicon does not know.
    pub lines: Vec<Option<u32>>,
    /// Words that the lexicon does not know, in order of appearance.
    pub unknown: Vec<String>,
}

impl Scan {
    /// Whether the text is three lines of 5, 7 and 5 known syllables.
    pub fn is_haiku(&self) -> bool {
        self.lines == [Some(5), Some(7), Some(5)]
    }
}

/// Scans a text line by line; blank lines do not count.
///
/// ```
/// let scan = playhouse::basho::scan("the moon keeps my place\nthe old heron stands and waits\nsomewhere a door shuts");
/// assert!(scan.is_haiku());
/// ```
pub fn scan(text: &str) -> Scan {
    let mut scan = Scan { lines: Vec::new(), unknown: Vec::new() };
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let unknown: Vec<_> = words(line).filter(|word| syllables(word).is_none()).map(str::to_string).collect();
        scan.lines.push(count_line(line).ok());
        scan.unknown.extend(unknown);
    }
    scan
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, lines: &[Option<u32>]) {
        assert_eq!(scan(text).lines, lines, "{text}");
    }

    #[test]
    fn counts_whole_lines() {
        check("autumn moon rising", &[Some(5)]);
        check("Autumn MOON, rising —", &[Some(5)]);
        check("the half-open door", &[Some(5)]);
        check("the neighbor's window", &[Some(5)]);
        check("  \n\nthe moon\n", &[Some(2)]);
    }

    #[test]
    fn a_word_that_is_not_listed_has_no_count() {
        check("the qwyjibo moon", &[None]);
        assert_eq!(scan("the qwyjibo moon").unknown, ["qwyjibo"]);
        assert!(!scan("").is_haiku());
    }

    #[test]
    fn no_word_is_listed_twice() {
        let mut seen = std::collections::HashSet::new();
        for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
            let (count, words) = line.split_once(':').expect("every line is `N: words`");
            assert!((1..=6).contains(&count.parse::<u32>().expect("a count")), "{line}");
            for word in words.split_whitespace() {
                assert!(seen.insert(word), "{word} is listed twice");
                assert_eq!(word, word.to_lowercase());
            }
        }
        assert!(seen.len() > 1000);
    }
}
