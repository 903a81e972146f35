//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`): pre-tokenize, spell the bytes, merge.

use ahash::AHashMap;
use tokenizers::Model as _;
use tokenizers::models::bpe::BPE;

use super::byte_level::Alphabet;
use super::error::TextError;
use super::merge::{Merge, MergeTable};
use super::pretokenize::{self, Stage};

/// Words up to this length go through the `tokenizers` crate, whose cache of words pays off there. Longer ones
/// would cost it some 100 bytes of memory per byte of text (symbols, agenda, and a string per token); they are merged
/// by [`MergeTable`], with equal result.
const WORD_MAX_BYTES: usize = 512;

/// What a byte-level vocabulary consists of.
pub(crate) struct BpeParts {
    /// Tokens that merges may make, spelled in the byte alphabet, and their ids.
    pub(crate) vocab: AHashMap<String, u32>,
    /// Pairs in order of rank.
    pub(crate) merges: Vec<(String, String)>,
    pub(crate) stages: Vec<Stage>,
    pub(crate) ignore_merges: bool,
    pub(crate) unknown: Option<u32>,
}

/// A byte-level BPE model.
#[derive(Debug)]
pub(crate) struct ByteBpe {
    stages: Vec<Stage>,
    words: BPE,
    merges: MergeTable,
    byte_ids: [Option<u32>; 256],
    /// Every byte that UTF-8 can contain has a token.
    is_complete: bool,
    unknown: Option<u32>,
    word_max_bytes: usize,
}

impl ByteBpe {
    pub(crate) fn new(parts: BpeParts, file: &str) -> Result<ByteBpe, TextError> {
        let BpeParts { vocab, merges, stages, ignore_merges, unknown } = parts;
        let table = merge_table(&vocab, &merges, file)?;
        let alphabet = Alphabet::get();
        let byte_ids = std::array::from_fn(|b| vocab.get(alphabet.char_of(b as u8).encode_utf8(&mut [0; 4])).copied());
        let in_utf8 = |b: usize| !matches!(b, 0xC0 | 0xC1 | 0xF5..);
        let is_complete = (0..256).all(|b| !in_utf8(b) || byte_ids[b].is_some());
        let longest = vocab.keys().map(String::len).max().unwrap_or(0);
        let words = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(ignore_merges)
            .build()
            .map_err(|source| TextError::Library { file: file.into(), source })?;
        let word_max_bytes = WORD_MAX_BYTES.max(longest);
        Ok(ByteBpe { stages, words, merges: table, byte_ids, is_complete, unknown, word_max_bytes })
    }

    /// Appends the tokens of `text`.
    pub(crate) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        let mut spelled = String::new();
        let mut result = Ok(());
        pretokenize::split(&self.stages, text, &mut |word| {
            if result.is_ok() {
                result = self.encode_word(word, &mut spelled, out);
            }
        });
        result
    }

    fn encode_word(&self, word: &str, spelled: &mut String, out: &mut Vec<u32>) -> Result<(), TextError> {
        if !self.is_complete || word.len() > self.word_max_bytes {
            return self.encode_bytes(word, out);
        }
        Alphabet::get().spell(word, spelled);
        let tokens = self
            .words
            .tokenize(spelled)
            .map_err(|source| TextError::Library { file: "the vocabulary".into(), source })?;
        out.extend(tokens.iter().map(|t| t.id));
        Ok(())
    }

    /// Merges without a detour through strings.
    fn encode_bytes(&self, word: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        if self.words.ignore_merges && word.len() <= self.word_max_bytes {
            let mut spelled = String::new();
            Alphabet::get().spell(word, &mut spelled);
            if let Some(id) = self.words.token_to_id(&spelled) {
                out.push(id);
                return Ok(());
            }
        }
        let mut symbols = Vec::with_capacity(word.len());
        for (at, byte) in word.bytes().enumerate() {
            let id = self.byte_ids[usize::from(byte)].or(self.unknown);
            symbols.push(id.ok_or(TextError::NoToken { byte, at })?);
        }
        self.merges.apply(&mut symbols);
        out.append(&mut symbols);
        Ok(())
    }
}

fn merge_table(
    vocab: &AHashMap<String, u32>,
    merges: &[(String, String)],
    file: &str,
) -> Result<MergeTable, TextError> {
    let mut table = MergeTable::with_capacity(merges.len());
    let mut whole = String::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        whole.clear();
        whole.push_str(left);
        whole.push_str(right);
        let id = |token: &str| {
            vocab.get(token).copied().ok_or_else(|| TextError::BadVocabulary {
                file: file.into(),
                what: format!("merge {rank} ({left:?} {right:?})"),
                expected: "tokens that the vocabulary has and that are not control tokens".into(),
                found: format!("{token:?}"),
            })
        };
        table.insert(id(left)?, id(right)?, Merge { rank: rank as u32, id: id(&whole)? });
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All bytes, and random merges of what is there so far.
    fn model(seed: &[(u8, u8)]) -> ByteBpe {
        let alphabet = Alphabet::get();
        let mut tokens: Vec<String> = (0..=255u8).map(|b| alphabet.char_of(b).to_string()).collect();
        let mut merges = Vec::new();
        let letters = b"abcd ";
        for &(a, b) in seed {
            let pick = |x: u8, tokens: &[String]| match usize::from(x) {
                x if x < 128 => tokens[usize::from(letters[x % letters.len()])].clone(),
                x => tokens[(256 + x).min(tokens.len() - 1)].clone(),
            };
            let (left, right) = (pick(a, &tokens), pick(b, &tokens));
            if !tokens.contains(&(left.clone() + &right)) {
                tokens.push(left.clone() + &right);
            }
            if !merges.contains(&(left.clone(), right.clone())) {
                merges.push((left, right));
            }
        }
        let vocab = tokens.into_iter().zip(0..).collect();
        let parts = BpeParts { vocab, merges, stages: Vec::new(), ignore_merges: false, unknown: None };
        ByteBpe::new(parts, "test").unwrap()
    }

    proptest! {
        #[test]
        fn long_words_are_merged_as_the_library_merges_short_ones(
            seed in prop::collection::vec(any::<(u8, u8)>(), 0..60),
            text in "[abcd ]{0,400}",
        ) {
            let model = model(&seed);
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            model.encode_bytes(&text, &mut ours).unwrap();
            model.encode_word(&text, &mut String::new(), &mut theirs).unwrap();
            prop_assert_eq!(ours, theirs);
        }
    }

    #[test]
    fn a_merge_of_an_unknown_token_is_refused() {
        let vocab = [("a", 0), ("b", 1)].map(|(t, i)| (t.to_string(), i)).into_iter().collect();
        let merges = vec![("a".into(), "b".into())];
        let parts = BpeParts { vocab, merges, stages: Vec::new(), ignore_merges: false, unknown: None };
        let error = ByteBpe::new(parts, "f.gguf").unwrap_err().to_string();
        assert_eq!(
            error,
            "f.gguf: merge 0 (\"a\" \"b\"): expected tokens that the vocabulary has and that are not control tokens, \
             found \"ab\""
        );
    }
}
