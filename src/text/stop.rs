//! Stop strings, found across token boundaries, of which not one character leaks.
//!
//! Text that may be the beginning of a stop string is held back until it is clear. The result does not depend on how
//! the text was cut: the stop string that is complete first ends the text; of several that are complete at the same
//! character, the longest.

use aho_corasick::{AhoCorasick, MatchKind};
use serde::{Deserialize, Serialize};

/// What a matcher remembers between pieces of text. A journal can carry it to another process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopState {
    /// Text that may be the beginning of a stop string.
    held: String,
    /// The stop string that was found.
    hit: Option<usize>,
}

/// What becomes certain with a piece of text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text to hand on.
    pub emit: String,
    /// The index of the stop string that was found; no text comes after that.
    pub hit: Option<usize>,
}

/// Watches a stream of text for stop strings.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    /// Sorted, with their indices as the caller counts them.
    stops: Vec<(String, usize)>,
    automaton: Option<AhoCorasick>,
    max_bytes: usize,
    state: StopState,
}

impl StopMatcher {
    /// A matcher for some stop strings; empty ones are never found.
    pub fn new(stops: Vec<String>) -> StopMatcher {
        StopMatcher::resume(stops, StopState::default())
    }

    /// Goes on where another matcher with the same stop strings stood.
    pub fn resume(stops: Vec<String>, state: StopState) -> StopMatcher {
        let mut stops: Vec<(String, usize)> = stops.into_iter().zip(0..).filter(|(s, _)| !s.is_empty()).collect();
        stops.sort_unstable();
        let max_bytes = stops.iter().map(|(s, _)| s.len()).max().unwrap_or(0);
        let mut builder = AhoCorasick::builder();
        builder.match_kind(MatchKind::Standard);
        // Fails only beyond 2^31 patterns or states; without it the slow search below would still be right.
        let automaton = (!stops.is_empty()).then(|| builder.build(stops.iter().map(|(s, _)| s)).ok()).flatten();
        StopMatcher { stops, automaton, max_bytes, state }
    }

    /// What to hand to [`StopMatcher::resume`].
    pub fn state(&self) -> &StopState {
        &self.state
    }

    /// Adds text; yields what is certain not to belong to a stop string. After a hit it yields nothing more.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.state.hit.is_some() {
            return StopOutput { emit: String::new(), hit: self.state.hit };
        }
        let mut buffer = std::mem::take(&mut self.state.held);
        buffer.push_str(text);
        if let Some((start, hit)) = self.find(&buffer) {
            buffer.truncate(start);
            self.state.hit = Some(hit);
            return StopOutput { emit: buffer, hit: Some(hit) };
        }
        let held_from = self.held_from(&buffer);
        self.state.held = buffer.split_off(held_from);
        StopOutput { emit: buffer, hit: None }
    }

    /// The text that was held back and turned out to be no stop string, at the end of the stream.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.state.held)
    }

    fn find(&self, text: &str) -> Option<(usize, usize)> {
        match &self.automaton {
            Some(automaton) => {
                let found = automaton.find(text)?;
                Some((found.start(), self.stops[found.pattern().as_usize()].1))
            }
            None => self
                .stops
                .iter()
                .filter_map(|(stop, idx)| text.find(stop.as_str()).map(|at| (at + stop.len(), at, *idx)))
                .min()
                .map(|(_, at, idx)| (at, idx)),
        }
    }

    /// Where the longest suffix begins that is the beginning of a stop string.
    fn held_from(&self, text: &str) -> usize {
        let earliest = (text.len() + 1).saturating_sub(self.max_bytes);
        let starts = (earliest..text.len()).filter(|&at| text.is_char_boundary(at));
        starts.into_iter().find(|&at| self.is_stop_prefix(&text[at..])).unwrap_or(text.len())
    }

    fn is_stop_prefix(&self, text: &str) -> bool {
        let at = self.stops.partition_point(|(stop, _)| stop.as_str() < text);
        self.stops.get(at).is_some_and(|(stop, _)| stop.starts_with(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()).collect());
        let mut text = String::new();
        for piece in pieces {
            text.push_str(&matcher.push(piece).emit);
        }
        text.push_str(&matcher.finish());
        (text, matcher.state().hit)
    }

    /// The rule, spelled out: character by character, the longest stop string that ends here.
    fn expected(stops: &[&str], text: &str) -> (String, Option<usize>) {
        for (at, c) in text.char_indices() {
            let so_far = &text[..at + c.len_utf8()];
            let ending = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && so_far.ends_with(**s));
            if let Some((idx, stop)) = ending.max_by_key(|(idx, s)| (s.len(), std::cmp::Reverse(*idx))) {
                return (so_far[..so_far.len() - stop.len()].to_string(), Some(idx));
            }
        }
        (text.to_string(), None)
    }

    #[test]
    fn found_across_boundaries_and_nothing_leaks() {
        let mut matcher = StopMatcher::new(vec!["</s>".into(), "\n\nUser:".into()]);
        assert_eq!(matcher.push("Hi <").emit, "Hi ");
        assert_eq!(matcher.push("/").emit, "");
        assert_eq!(matcher.push("b> and\n").emit, "</b> and");
        assert_eq!(matcher.push("\nUse").emit, "");
        let output = matcher.push("r: x");
        assert_eq!((output.emit.as_str(), output.hit), ("", Some(1)));
        assert_eq!(matcher.push("more"), StopOutput { emit: String::new(), hit: Some(1) });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn held_text_is_flushed_at_the_end() {
        assert_eq!(run(&["STOP"], &["a S", "TO"]), ("a STO".into(), None));
        assert_eq!(run(&["aab"], &["aa", "a", "a"]), ("aaaa".into(), None));
        assert_eq!(run(&["aab"], &["aa", "a", "ab"]), ("aa".into(), Some(0)));
        assert_eq!(run(&[], &["x", ""]), ("x".into(), None));
        assert_eq!(run(&[""], &["x"]), ("x".into(), None));
    }

    #[test]
    fn the_first_complete_stop_string_wins_and_then_the_longest() {
        assert_eq!(run(&["abc", "b"], &["abc"]), ("a".into(), Some(1)));
        assert_eq!(run(&["bc", "abc"], &["xab", "c"]), ("x".into(), Some(1)));
        assert_eq!(run(&["é", "🚀🚀"], &["a🚀", "🚀é"]), ("a".into(), Some(1)));
    }

    #[test]
    fn the_state_survives_a_journal() {
        let stops = vec!["END".to_string()];
        let mut first = StopMatcher::new(stops.clone());
        assert_eq!(first.push("the EN").emit, "the ");
        let json = serde_json::to_string(first.state()).unwrap();
        let mut second = StopMatcher::resume(stops, serde_json::from_str(&json).unwrap());
        assert_eq!(second.push("D!").hit, Some(0));
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_cuts(
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            pieces in prop::collection::vec("[abcé]{0,5}", 0..8),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (text, hit) = run(&stops, &pieces);
            let (expected_text, expected_hit) = expected(&stops, &pieces.concat());
            prop_assert_eq!(text, expected_text);
            // Equal stop strings are the same stop string.
            prop_assert_eq!(hit.map(|i| stops[i]), expected_hit.map(|i| stops[i]));
        }
    }
}
