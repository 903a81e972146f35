//! The tokens with a role: which begin a text, which end one, which are looked for as markup.

use super::error::TextError;

/// The type of a token in `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Ordinary text.
    Normal,
    /// Stands for text that the vocabulary cannot write.
    Unknown,
    /// Steers the model; has no text of its own.
    Control,
    /// Markup or text that is found before the merges.
    UserDefined,
    /// Never made.
    Unused,
    /// One byte, in SentencePiece vocabularies.
    Byte,
}

impl TokenKind {
    /// The kind with this number in a file; numbers out of range count as normal, as in llama.cpp.
    pub fn from_id(id: i32) -> TokenKind {
        match id {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        }
    }
}

/// Ids of the tokens with a role; `None` where the vocabulary has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Ends a turn.
    pub eot: Option<u32>,
    /// Ends a message that goes on after a tool's answer.
    pub eom: Option<u32>,
    /// Stands for unknown text.
    pub unknown: Option<u32>,
    /// Fills batches.
    pub padding: Option<u32>,
}

/// Texts of tokens that end a turn or a text in some family of models. Files rarely say so: their metadata has one
/// EOS, and chat models end their turns with another token.
const STOP_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Texts of the token that ends a turn, tried in this order where the metadata names none.
const EOT_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Fills in turn ends that the metadata leaves out, and lists every token that ends generation, sorted.
///
/// `id` looks up a token that is not normal text.
pub(crate) fn complete(ids: &mut SpecialIds, id: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
    ids.eot = ids.eot.or_else(|| EOT_TEXTS.iter().find_map(|text| id(text)));
    ids.eom = ids.eom.or_else(|| id("<|eom_id|>"));
    let mut stops: Vec<u32> = STOP_TEXTS.iter().filter_map(|text| id(text)).collect();
    // In the harmony format a message ends with <|end|> and the turn goes on; only these two end it.
    let is_harmony = id("<|call|>").or(id("<|calls|>")).is_some() && id("<|return|>").or(id("<|flush|>")).is_some();
    if is_harmony {
        let end = id("<|end|>");
        stops.retain(|&stop| Some(stop) != end);
        if ids.eot == end {
            ids.eot = ids.eos;
        }
    }
    // Where these exist, `</s>` is a plain piece of text.
    if id("<|tool_response>").or(id("<|plamo:eos|>")).is_some() {
        stops.retain(|&stop| Some(stop) != id("</s>"));
    }
    stops.extend([ids.eos, ids.eot, ids.eom].into_iter().flatten());
    stops.sort_unstable();
    stops.dedup();
    stops
}

/// Whether a user-defined token is markup of the kind that steers a model, whatever its declared type.
pub(crate) fn looks_like_control(text: &str) -> bool {
    let framed = |open: &str, close: &str| text.len() > 4 && text.starts_with(open) && text.ends_with(close);
    framed("<|", "|>") || framed("<｜", "｜>") || STOP_TEXTS.contains(&text)
}

/// Which special tokens are added around a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Affixes {
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
}

impl Affixes {
    /// Checks that a token that is to be added exists.
    pub(crate) fn new(ids: &SpecialIds, add_bos: bool, add_eos: bool, file: &str) -> Result<Affixes, TextError> {
        let pick = |add: bool, id: Option<u32>, flag, id_key| match (add, id) {
            (true, None) => Err(TextError::NoSuchSpecial { file: file.into(), flag, id_key }),
            (true, id) => Ok(id),
            (false, _) => Ok(None),
        };
        Ok(Affixes {
            bos: pick(add_bos, ids.bos, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id")?,
            eos: pick(add_eos, ids.eos, "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(texts: &[&str], mut ids: SpecialIds) -> (Vec<u32>, SpecialIds) {
        let stops = complete(&mut ids, |t| texts.iter().position(|x| *x == t).map(|i| i as u32));
        (stops, ids)
    }

    #[test]
    fn turn_ends_are_found_by_their_text() {
        let (stops, ids) =
            stops(&["a", "<|endoftext|>", "<|im_end|>"], SpecialIds { eos: Some(1), ..Default::default() });
        assert_eq!((stops, ids.eot), (vec![1, 2], Some(2)));
    }

    #[test]
    fn harmony_messages_end_without_ending_the_turn() {
        let texts = ["<|return|>", "<|call|>", "<|end|>", "<|endoftext|>"];
        let (stops, ids) = stops(&texts, SpecialIds { eos: Some(0), ..Default::default() });
        assert_eq!((stops, ids.eot), (vec![0, 1, 3], Some(0)));
        assert_eq!(super::super::special::tests::stops(&["<|end|>"], SpecialIds::default()).0, [0]);
    }

    #[test]
    fn markup_that_steers() {
        assert!(looks_like_control("<|im_start|>") && looks_like_control("</s>") && looks_like_control("<｜User｜>"));
        assert!(!looks_like_control("<tool_call>") && !looks_like_control("<||>") && !looks_like_control("[PAD1]"));
    }

    #[test]
    fn an_affix_needs_its_token() {
        let error = Affixes::new(&SpecialIds::default(), true, false, "m.gguf").unwrap_err().to_string();
        assert_eq!(error, "m.gguf: tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is not set");
    }
}
