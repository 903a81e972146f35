//! Tokens to text, one at a time, never half a UTF-8 sequence.
//!
//! A token is bytes, and an emoji is often three of them. Bytes that may still become a character are kept back
//! until they do, or until it is clear that they never will; then U+FFFD stands for them, exactly as
//! [`String::from_utf8_lossy`] would write it for the whole. Nothing is normalised, joined or reordered.

use serde::{Deserialize, Serialize};

use super::tokenizer::Tokenizer;

/// What a detokenizer remembers between tokens. A journal can carry it to another process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetokenizerState {
    /// The beginning of a UTF-8 sequence: at most three bytes.
    pending: Vec<u8>,
    /// The next space is the one that SentencePiece puts before a text.
    strip_space: bool,
}

/// Turns a stream of tokens into text.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    state: DetokenizerState,
}

impl Detokenizer {
    /// A detokenizer for tokens that go on after some text: every space is kept.
    ///
    /// With `skip_special`, control tokens yield nothing instead of their names.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Detokenizer {
        Detokenizer { tokenizer: tokenizer.clone(), skip_special, state: DetokenizerState::default() }
    }

    /// A detokenizer for tokens at the start of a text: the space that SentencePiece put there is taken away.
    pub fn at_start(tokenizer: &Tokenizer, skip_special: bool) -> Detokenizer {
        let mut detokenizer = Detokenizer::new(tokenizer, skip_special);
        detokenizer.state.strip_space = tokenizer.has_space_prefix();
        detokenizer
    }

    /// A detokenizer for the answer to a prompt: at the start of a text if the prompt is empty or ends with a control
    /// token, as chat prompts do; in the middle of one otherwise.
    pub fn after(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Detokenizer {
        match prompt.last() {
            Some(&last) if !tokenizer.is_control(last) => Detokenizer::new(tokenizer, skip_special),
            _ => Detokenizer::at_start(tokenizer, skip_special),
        }
    }

    /// Goes on where another detokenizer of the same vocabulary stood.
    pub fn resume(tokenizer: &Tokenizer, skip_special: bool, state: DetokenizerState) -> Detokenizer {
        Detokenizer { tokenizer: tokenizer.clone(), skip_special, state }
    }

    /// What to hand to [`Detokenizer::resume`].
    pub fn state(&self) -> &DetokenizerState {
        &self.state
    }

    /// The text that becomes certain with this token; often empty inside a multi-byte character.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_control(id) {
            if self.skip_special {
                return String::new();
            }
            // A name is text of its own: a sequence that was open before it stays broken.
            self.state.strip_space = false;
        }
        let mut bytes = self.tokenizer.token_bytes(id);
        if std::mem::take(&mut self.state.strip_space) && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        push_bytes(&mut self.state.pending, bytes)
    }

    /// The rest: U+FFFD if the last sequence was cut off, else nothing. The detokenizer then stands in the middle of a
    /// text.
    pub fn finish(&mut self) -> String {
        self.state.strip_space = false;
        String::from_utf8_lossy(&std::mem::take(&mut self.state.pending)).into_owned()
    }
}

/// Appends `bytes` to `pending` and takes out all that is certain.
fn push_bytes(pending: &mut Vec<u8>, bytes: &[u8]) -> String {
    pending.extend_from_slice(bytes);
    let mut text = String::with_capacity(pending.len());
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                pending.clear();
                return text;
            }
            Err(error) => {
                let (valid, after) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                let Some(n_bad) = error.error_len() else {
                    // An open sequence: keep it.
                    *pending = after.to_vec();
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &after[n_bad..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(chunks: &[&[u8]]) -> Vec<String> {
        let mut pending = Vec::new();
        let mut out: Vec<String> = chunks.iter().map(|chunk| push_bytes(&mut pending, chunk)).collect();
        assert!(pending.len() <= 3);
        out.push(String::from_utf8_lossy(&pending).into_owned());
        out
    }

    /// Every way to cut the bytes in up to three pieces gives the same text.
    fn check_every_split(bytes: &[u8]) {
        let whole = String::from_utf8_lossy(bytes);
        for a in 0..=bytes.len() {
            for b in a..=bytes.len() {
                let parts = stream(&[&bytes[..a], &bytes[a..b], &bytes[b..]]);
                assert_eq!(parts.concat(), whole, "cut at {a} and {b}");
                if !whole.contains('\u{FFFD}') {
                    assert!(!parts.concat().contains('\u{FFFD}'));
                }
            }
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(stream(&single).concat(), whole);
    }

    #[test]
    fn every_split_of_multibyte_texts() {
        for text in [
            "😶\u{200d}🌫️ 👩\u{200d}👩\u{200d}👧\u{200d}👦 🏳️\u{200d}🌈 🇩🇪 👍🏽", // emoji, ZWJ sequences, flags, skin tones
            "e\u{301} a\u{308}\u{323} Z\u{351}\u{36b}\u{343}",                  // combining marks, stacked
            "abc \u{202e}cba\u{202c} שלום مرحبا \u{2067}x\u{2069}",             // bidirectional text
            "a\u{200b}b\u{200c}c\u{feff}d\u{2060}e",                            // zero width
            "Å Å ﬁ ① é e\u{301}",                                               // several normal forms
            "កាន់តែពិសេសអាច 我想在apple工作 нещо",
            "\u{0}\u{7f}\u{80}\u{7ff}\u{800}\u{ffff}\u{10000}\u{10ffff}",
        ] {
            check_every_split(text.as_bytes());
        }
    }

    #[test]
    fn invalid_bytes_become_replacement_characters_as_in_the_whole() {
        for bytes in [
            b"a\x80b\xC0\xAFc".as_slice(),
            b"\xF0\x9F\x98",
            b"\xF0\x9F\x98 \xE2\x82",
            b"\xED\xA0\x80\xED\xB0\x80",
            b"\xFF\xFE\xF8\x88\x80\x80\x80",
            b"\xE2\xE2\x82\xAC\xF0\x9F\xF0\x9F\x9A\x80",
        ] {
            check_every_split(bytes);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces(bytes in prop::collection::vec(any::<u8>(), 0..64), size in 1usize..9) {
            let chunks: Vec<&[u8]> = bytes.chunks(size).collect();
            prop_assert_eq!(stream(&chunks).concat(), String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn any_text_in_any_pieces(text in "\\PC{0,40}", size in 1usize..9) {
            let chunks: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
            prop_assert_eq!(stream(&chunks).concat(), text);
        }
    }
}
