//! SentencePiece BPE (`tokenizer.ggml.model` = `llama`): spaces become `▁`, characters merge by score, and what
//! the vocabulary cannot write becomes byte tokens `<0x00>` to `<0xFF>`.
//!
//! SentencePiece merges the pair whose *result* scores highest, the leftmost of equals. Neither model of the
//! `tokenizers` crate does that: its Unigram maximises a sum, and its BPE ranks every merge apart, so that the
//! space runs of Llama and Phi-3, which all score the same, come out differently. So the merges go through
//! [`MergeTable`], with one rank per distinct score.
//!
//! The whole text is one word here. Time stays linear because the text is cut wherever no token contains the two
//! characters side by side: no merge can cross such a place.

use ahash::{AHashMap, AHashSet};

use super::error::TextError;
use super::merge::{Merge, MergeTable};

/// What stands for a space.
pub(crate) const SPACE: char = '▁';

/// A SentencePiece BPE model.
#[derive(Debug)]
pub(crate) struct Spm {
    /// Characters that are tokens, or that occur in tokens; the latter have ids from `n_vocab` upwards.
    chars: AHashMap<char, u32>,
    n_vocab: u32,
    /// The characters of the ids from `n_vocab` upwards.
    pseudo: Vec<char>,
    merges: MergeTable,
    /// Pairs of characters that some merge puts side by side.
    adjacent: AHashSet<(char, char)>,
    byte_ids: [Option<u32>; 256],
    unknown: Option<u32>,
}

/// What a SentencePiece vocabulary consists of.
pub(crate) struct SpmParts {
    /// Tokens that merges may make, and their ids.
    pub(crate) vocab: AHashMap<String, u32>,
    pub(crate) n_vocab: u32,
    pub(crate) byte_ids: [Option<u32>; 256],
    pub(crate) unknown: Option<u32>,
}

impl Spm {
    /// Derives the merges from scores, higher ones first; `score` is asked for every token of `parts.vocab`.
    pub(crate) fn from_scores(parts: SpmParts, score: impl Fn(u32) -> f32) -> Spm {
        let ranks = ranks(parts.vocab.values().map(|&id| score(id)));
        let rank_of = |id: u32| ranks.get(&score(id).to_bits()).copied().unwrap_or(u32::MAX - 1);
        let mut spm = Spm::empty(&parts);
        for (text, &id) in &parts.vocab {
            for (cut, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(cut);
                if let (Some(l), Some(r)) = (spm.symbol(left, &parts.vocab), spm.symbol(right, &parts.vocab)) {
                    spm.add_merge((left, l), (right, r), Merge { rank: rank_of(id), id });
                }
            }
        }
        spm
    }

    /// Takes merges in order of rank, as a `tokenizer.json` lists them. Pairs that the vocabulary lacks are an error.
    pub(crate) fn from_merges(parts: SpmParts, merges: &[(String, String)], file: &str) -> Result<Spm, TextError> {
        let mut spm = Spm::empty(&parts);
        for (rank, (left, right)) in merges.iter().enumerate() {
            let id = |token: &str| {
                parts.vocab.get(token).copied().ok_or_else(|| TextError::BadVocabulary {
                    file: file.into(),
                    what: format!("merge {rank} ({left:?} {right:?})"),
                    expected: "tokens that the vocabulary has and that are not control tokens".into(),
                    found: format!("{token:?}"),
                })
            };
            let merge = Merge { rank: rank as u32, id: id(&format!("{left}{right}"))? };
            spm.add_merge((left, id(left)?), (right, id(right)?), merge);
        }
        Ok(spm)
    }

    fn empty(parts: &SpmParts) -> Spm {
        let mut spm = Spm {
            chars: AHashMap::new(),
            n_vocab: parts.n_vocab,
            pseudo: Vec::new(),
            merges: MergeTable::default(),
            adjacent: AHashSet::new(),
            byte_ids: parts.byte_ids,
            unknown: parts.unknown,
        };
        for (text, &id) in &parts.vocab {
            if let Some(c) = only_char(text) {
                spm.chars.insert(c, id);
            }
        }
        spm
    }

    /// The symbol for part of a token: a token, or a single character that is none but can still be merged.
    fn symbol(&mut self, text: &str, vocab: &AHashMap<String, u32>) -> Option<u32> {
        if let Some(&id) = vocab.get(text) {
            return Some(id);
        }
        let c = only_char(text)?;
        let next = self.n_vocab + self.pseudo.len() as u32;
        Some(*self.chars.entry(c).or_insert_with(|| {
            self.pseudo.push(c);
            next
        }))
    }

    fn add_merge(&mut self, left: (&str, u32), right: (&str, u32), merge: Merge) {
        if let (Some(a), Some(b)) = (left.0.chars().next_back(), right.0.chars().next()) {
            self.adjacent.insert((a, b));
        }
        self.merges.insert(left.1, right.1, merge);
    }

    /// Appends the tokens of `text`, in which spaces are already written as [`SPACE`].
    pub(crate) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        let mut symbols = Vec::new();
        let mut previous = None;
        for (at, c) in text.char_indices() {
            if previous.is_some_and(|p| !self.adjacent.contains(&(p, c))) {
                self.flush(&mut symbols, at, out)?;
            }
            previous = Some(c);
            match self.chars.get(&c) {
                Some(&id) => symbols.push(id),
                None => {
                    self.flush(&mut symbols, at, out)?;
                    self.push_bytes(c, at, out)?;
                }
            }
        }
        self.flush(&mut symbols, text.len(), out)
    }

    fn flush(&self, symbols: &mut Vec<u32>, at: usize, out: &mut Vec<u32>) -> Result<(), TextError> {
        self.merges.apply(symbols);
        for symbol in symbols.drain(..) {
            match symbol.checked_sub(self.n_vocab) {
                None => out.push(symbol),
                Some(pseudo) => self.push_bytes(self.pseudo[pseudo as usize], at, out)?,
            }
        }
        Ok(())
    }

    fn push_bytes(&self, c: char, at: usize, out: &mut Vec<u32>) -> Result<(), TextError> {
        let bytes = c.encode_utf8(&mut [0; 4]).as_bytes().to_owned();
        if let Some(missing) = bytes.iter().find(|&&b| self.byte_ids[usize::from(b)].is_none()) {
            // One unknown token for the character, as SentencePiece does.
            out.push(self.unknown.ok_or(TextError::NoToken { byte: *missing, at })?);
            return Ok(());
        }
        out.extend(bytes.iter().filter_map(|&b| self.byte_ids[usize::from(b)]));
        Ok(())
    }
}

/// The character of a text that has exactly one.
fn only_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// One rank per distinct score, the highest first; keyed by the score's bits.
fn ranks(scores: impl Iterator<Item = f32>) -> AHashMap<u32, u32> {
    let mut distinct: Vec<f32> = scores.collect();
    distinct.sort_unstable_by(|a, b| b.total_cmp(a));
    distinct.dedup_by_key(|s| s.to_bits());
    distinct.iter().zip(0..).map(|(s, rank)| (s.to_bits(), rank)).collect()
}

/// The byte that a token such as `<0x0A>` stands for.
pub(crate) fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit())).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(tokens: &[(&str, f32)], with_bytes: bool) -> Spm {
        let first_byte = tokens.len() as u32;
        let parts = SpmParts {
            vocab: tokens.iter().zip(0..).map(|((t, _), i)| (t.to_string(), i)).collect(),
            n_vocab: first_byte + 256,
            byte_ids: std::array::from_fn(|b| with_bytes.then_some(first_byte + b as u32)),
            unknown: (!with_bytes).then_some(0),
        };
        Spm::from_scores(parts, |id| tokens[id as usize].1)
    }

    fn encode(spm: &Spm, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        spm.encode(text, &mut out).unwrap();
        out
    }

    #[test]
    fn the_best_score_wins_not_the_longest() {
        let spm = model(&[("a", 0.0), ("b", 0.0), ("c", 0.0), ("ab", -2.0), ("bc", -1.0)], true);
        assert_eq!(encode(&spm, "abc"), [0, 4]);
        assert_eq!(encode(&spm, "ab"), [3]);
    }

    #[test]
    fn equal_scores_go_from_the_left() {
        let spm = model(&[("▁", -5.0), ("▁▁", -9.0), ("▁▁▁", -9.0), ("▁▁▁▁", -9.0)], true);
        assert_eq!(encode(&spm, "▁▁▁▁▁▁▁"), [3, 2]);
    }

    #[test]
    fn unwritable_characters_become_bytes_or_unknown() {
        let tokens = [("a", 0.0)];
        assert_eq!(encode(&model(&tokens, true), "aéa"), [0, 1 + 0xC3, 1 + 0xA9, 0]);
        assert_eq!(encode(&model(&tokens, false), "aéa"), [0, 0, 0]);
    }

    #[test]
    fn characters_that_are_no_tokens_still_merge() {
        let spm = model(&[("xy", -1.0)], true);
        assert_eq!(encode(&spm, "xyx"), [0, 1 + u32::from(b'x')]);
    }

    #[test]
    fn byte_tokens_are_recognised() {
        assert_eq!(
            (byte_of("<0x0A>"), byte_of("<0xfF>"), byte_of("<0x0>"), byte_of("<s>")),
            (Some(10), Some(255), None, None)
        );
    }
}
