//! Hugging Face `tokenizer.json`: the same vocabularies in another dress.
//!
//! The file describes a pipeline: added tokens, normalizer, pre-tokenizer, model, post-processor. The pipelines of
//! byte-level BPE and of SentencePiece-like BPE are read into the form that GGUF metadata is read into, so that one
//! implementation serves both and the ids cannot differ. A part that is not known is refused by name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::added::AddedToken;
use super::error::TextError;
use super::pretokenize::{Pattern, Stage};
use super::special::{SpecialIds, TokenKind};
use super::spm;
use super::vocabulary::{ModelParts, Normalizer, SpacePrefix, Vocabulary};

/// GPT-2's expression, which the `ByteLevel` pre-tokenizer stands for.
const BYTE_LEVEL: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Ids beyond this are refused: the largest vocabularies have a quarter of a million tokens.
const N_VOCAB_MAX: u32 = 1 << 24;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    dropout: Option<f32>,
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Pair>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pair {
    Two(String, String),
    Line(String),
}

/// Reads a `tokenizer.json`.
pub(crate) fn read(file: &str, json: &[u8]) -> Result<Vocabulary, TextError> {
    let bad = |why: String| TextError::BadJson { file: file.into(), why };
    let parsed: File = serde_json::from_slice(json).map_err(|e| bad(e.to_string()))?;
    Converter { file }.convert(parsed)
}

/// Fills in what `tokenizer_config.json` knows and `tokenizer.json` does not: which token ends a text.
pub(crate) fn read_config(vocabulary: &mut Vocabulary, json: &[u8]) {
    let config: Value = serde_json::from_slice(json).unwrap_or_default();
    let id = |name: &str| {
        let text = config.get(name).and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()))?;
        vocabulary.added.iter().find(|t| t.text == text).map(|t| t.id)
    };
    let ids = SpecialIds {
        bos: id("bos_token").or(vocabulary.ids.bos),
        eos: id("eos_token").or(vocabulary.ids.eos),
        unknown: id("unk_token").or(vocabulary.ids.unknown),
        padding: id("pad_token").or(vocabulary.ids.padding),
        ..vocabulary.ids
    };
    vocabulary.ids = ids;
}

struct Converter<'f> {
    file: &'f str,
}

impl Converter<'_> {
    fn convert(&self, parsed: File) -> Result<Vocabulary, TextError> {
        self.check_model(&parsed.model)?;
        let vocab: BTreeMap<String, u32> = serde_json::from_value(parsed.model.vocab)
            .map_err(|e| TextError::BadJson { file: self.file.into(), why: format!("model.vocab: {e}") })?;
        let (tokens, mut kinds) = self.table(&vocab, &parsed.added_tokens)?;
        let unknown = parsed.model.unk_token.as_ref().and_then(|t| vocab.get(t)).copied();
        let is_spm = parsed.model.byte_fallback || asks_for_spaces(&parsed.normalizer, &parsed.pre_tokenizer);
        if is_spm {
            for (kind, text) in kinds.iter_mut().zip(&tokens).filter(|(_, text)| spm::byte_of(text).is_some()) {
                *kind = if text.is_empty() { *kind } else { TokenKind::Byte };
            }
        }
        if let Some(id) = unknown {
            kinds[id as usize] = TokenKind::Unknown;
        }
        let merges = parsed.model.merges.into_iter().map(|pair| self.pair(pair)).collect::<Result<_, _>>()?;
        let (model, normalizer) = if is_spm {
            let normalizer = self.spaces(parsed.normalizer.as_ref(), parsed.pre_tokenizer.as_ref())?;
            (ModelParts::SpmMerges(merges), normalizer)
        } else {
            let mut stages = Vec::new();
            self.stages(parsed.pre_tokenizer.as_ref(), &mut stages)?;
            let ignore_merges = parsed.model.ignore_merges;
            (ModelParts::Bpe { merges, stages, ignore_merges }, self.normalizer(parsed.normalizer)?)
        };
        let (bos, eos) = affixes(parsed.post_processor.as_ref());
        let added = parsed.added_tokens.into_iter().map(|t| self.added(t)).collect::<Result<_, _>>()?;
        Ok(Vocabulary {
            file: self.file.into(),
            tokens,
            kinds,
            added,
            model,
            ids: SpecialIds { bos, eos, unknown, ..SpecialIds::default() },
            add_bos: bos.is_some(),
            add_eos: eos.is_some(),
            normalizer,
        })
    }

    fn unsupported(&self, part: &'static str, found: impl ToString, supported: &'static str) -> TextError {
        TextError::Unsupported { file: self.file.into(), part, found: found.to_string(), supported }
    }

    fn check_model(&self, model: &Model) -> Result<(), TextError> {
        if let Some(kind) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
            return Err(self.unsupported("model", kind, "BPE"));
        }
        if model.dropout.is_some_and(|d| d != 0.0) {
            return Err(self.unsupported("model.dropout", model.dropout.unwrap_or_default(), "none"));
        }
        let affix = [&model.continuing_subword_prefix, &model.end_of_word_suffix].into_iter().flatten();
        match affix.into_iter().find(|text| !text.is_empty()) {
            Some(text) => Err(self.unsupported("model.continuing_subword_prefix or end_of_word_suffix", text, "none")),
            None => Ok(()),
        }
    }

    /// Texts and kinds by id; ids that nothing names are unused tokens without text.
    fn table(
        &self,
        vocab: &BTreeMap<String, u32>,
        added: &[Added],
    ) -> Result<(Vec<String>, Vec<TokenKind>), TextError> {
        let ids = vocab.values().copied().chain(added.iter().map(|t| t.id));
        let Some(last) = ids.max() else { return Err(Vocabulary::bad(self.file, "model.vocab", "tokens", "none")) };
        if last >= N_VOCAB_MAX {
            return Err(Vocabulary::bad(self.file, "model.vocab", format!("ids below {N_VOCAB_MAX}"), last));
        }
        let mut tokens = vec![String::new(); last as usize + 1];
        let mut kinds = vec![TokenKind::Unused; last as usize + 1];
        for (text, &id) in vocab {
            if !tokens[id as usize].is_empty() {
                let found = format!("{:?} and {text:?} for {id}", tokens[id as usize]);
                return Err(Vocabulary::bad(self.file, "model.vocab", "every id once", found));
            }
            tokens[id as usize] = text.clone();
            kinds[id as usize] = TokenKind::Normal;
        }
        for token in added {
            tokens[token.id as usize] = token.content.clone();
            kinds[token.id as usize] = if token.special { TokenKind::Control } else { TokenKind::UserDefined };
        }
        Ok((tokens, kinds))
    }

    fn pair(&self, pair: Pair) -> Result<(String, String), TextError> {
        match pair {
            Pair::Two(left, right) => Ok((left, right)),
            Pair::Line(line) => match line.split_once(' ') {
                Some((left, right)) => Ok((left.into(), right.into())),
                None => Err(Vocabulary::bad(self.file, "model.merges", "two tokens and a space", format!("{line:?}"))),
            },
        }
    }

    fn added(&self, token: Added) -> Result<AddedToken, TextError> {
        if token.single_word {
            return Err(self.unsupported("added_tokens.single_word", &token.content, "false"));
        }
        let control = token.special || super::special::looks_like_control(&token.content);
        Ok(AddedToken { id: token.id, text: token.content, control, lstrip: token.lstrip, rstrip: token.rstrip })
    }

    fn normalizer(&self, value: Option<Value>) -> Result<Normalizer, TextError> {
        let Some(value) = value else { return Ok(Normalizer::None) };
        let kind = kind_of(&value).to_owned();
        if !steps(&value, "normalizers")
            .iter()
            .all(|v| matches!(kind_of(v), "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase"))
        {
            return Err(self.unsupported("normalizer", kind, "NFC, NFD, NFKC, NFKD, Lowercase, and sequences of them"));
        }
        let parsed = serde_json::from_value(value)
            .map_err(|e| TextError::BadJson { file: self.file.into(), why: format!("normalizer: {e}") })?;
        Ok(Normalizer::Library(Box::new(parsed)))
    }

    /// The two ways in which SentencePiece's spaces are written.
    fn spaces(&self, normalizer: Option<&Value>, pre: Option<&Value>) -> Result<Normalizer, TextError> {
        let (mut prefix, mut unless_there) = (SpacePrefix::Never, false);
        for step in normalizer.map(|n| steps(n, "normalizers")).unwrap_or_default() {
            match kind_of(step) {
                "Prepend" if step["prepend"] == "▁" => prefix = SpacePrefix::Always,
                "Replace" if step["pattern"]["String"] == " " && step["content"] == "▁" => {}
                _ => return Err(self.unsupported("normalizer", step, "Prepend ▁ and Replace \" \" by ▁")),
            }
        }
        for step in pre.map(|p| steps(p, "pretokenizers")).unwrap_or_default() {
            let is_plain = kind_of(step) == "Metaspace" && step["replacement"] == "▁" && step["split"] == false;
            prefix = match step["prepend_scheme"].as_str() {
                Some("first") if is_plain => SpacePrefix::First,
                Some("always") | None if is_plain => SpacePrefix::Always,
                Some("never") if is_plain => SpacePrefix::Never,
                _ => return Err(self.unsupported("pre_tokenizer", step, "Metaspace with split = false")),
            };
            unless_there = true;
        }
        Ok(Normalizer::Spaces { prefix, unless_there })
    }

    fn stages(&self, pre: Option<&Value>, stages: &mut Vec<Stage>) -> Result<(), TextError> {
        for step in pre.map(|p| steps(p, "pretokenizers")).unwrap_or_default() {
            if let Some(pattern) = self.pattern(step)? {
                let pattern = pattern
                    .map_err(|source| TextError::Library { file: self.file.into(), source: Box::new(source) })?;
                stages.push(Stage::Split(pattern));
            }
        }
        Ok(())
    }

    /// The expression that a pre-tokenizer stands for; none for the one that only spells bytes.
    #[allow(clippy::type_complexity, reason = "an expression that is missing, or does not compile")]
    fn pattern(&self, step: &Value) -> Result<Option<Result<Pattern, super::pretokenize::PatternError>>, TextError> {
        const SUPPORTED: &str =
            "ByteLevel without add_prefix_space, isolating Split, Digits, Punctuation, and sequences";
        let isolates = step["behavior"] == "Isolated" && step["invert"] != true;
        // Keeping only the matches of an expression that matches everything.
        let keeps = step["behavior"] == "Removed" && step["invert"] == true;
        Ok(match kind_of(step) {
            "ByteLevel" if step["add_prefix_space"] == true => {
                return Err(self.unsupported("pre_tokenizer", step, SUPPORTED));
            }
            "ByteLevel" => (step["use_regex"] != false).then(|| Pattern::new(BYTE_LEVEL)),
            "Split" if isolates || keeps => match (&step["pattern"]["Regex"], &step["pattern"]["String"]) {
                (Value::String(regex), _) => Some(Pattern::new(regex)),
                (_, Value::String(text)) => Some(Pattern::literal(text)),
                _ => return Err(self.unsupported("pre_tokenizer", step, SUPPORTED)),
            },
            "Digits" if step["individual_digits"] == true => Some(Pattern::new(r"\p{N}")),
            "Digits" => Some(Pattern::new(r"\p{N}+")),
            "Punctuation" if step["behavior"] == "Contiguous" => Some(Pattern::new(r"[\p{P}$+<=>^`|~]+")),
            "Punctuation" if matches!(step["behavior"].as_str(), None | Some("Isolated")) => {
                Some(Pattern::new(r"[\p{P}$+<=>^`|~]"))
            }
            _ => return Err(self.unsupported("pre_tokenizer", step, SUPPORTED)),
        })
    }
}

fn kind_of(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or("(none)")
}

/// The steps of a sequence, or the one step that stands alone.
fn steps<'v>(value: &'v Value, key: &str) -> Vec<&'v Value> {
    match value.get(key).and_then(Value::as_array) {
        Some(items) if kind_of(value) == "Sequence" => items.iter().flat_map(|item| steps(item, key)).collect(),
        _ if value.is_null() => Vec::new(),
        _ => vec![value],
    }
}

fn asks_for_spaces(normalizer: &Option<Value>, pre: &Option<Value>) -> bool {
    let any = |value: &Option<Value>, key, kind| {
        value.as_ref().is_some_and(|v| steps(v, key).iter().any(|step| kind_of(step) == kind))
    };
    any(normalizer, "normalizers", "Prepend") || any(pre, "pretokenizers", "Metaspace")
}

/// The tokens that the post-processor puts before and after a text.
fn affixes(processor: Option<&Value>) -> (Option<u32>, Option<u32>) {
    let (mut bos, mut eos) = (None, None);
    for step in processor.map(|p| steps(p, "processors")).unwrap_or_default() {
        let mut is_before = true;
        for item in step["single"].as_array().into_iter().flatten() {
            if item.get("Sequence").is_some() {
                is_before = false;
            }
            if let Some(name) = item["SpecialToken"]["id"].as_str() {
                let id = step["special_tokens"][name]["ids"][0].as_u64().and_then(|id| u32::try_from(id).ok());
                if is_before { bos = bos.or(id) } else { eos = eos.or(id) }
            }
        }
    }
    (bos, eos)
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::{EncodeOptions, Tokenizer};
    use super::*;
    use serde_json::json;

    fn spm_json() -> Value {
        json!({
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 6, "content": "<|x|>", "special": true, "rstrip": true},
            ],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "model": {
                "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
                "vocab": {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "▁a": 4, "<0x62>": 5},
                "merges": ["▁ a"],
            },
        })
    }

    fn tokenizer(json: &Value) -> Result<Tokenizer, TextError> {
        Tokenizer::new(read("t.json", json.to_string().as_bytes())?)
    }

    #[test]
    fn a_sentencepiece_file() {
        let t = tokenizer(&spm_json()).unwrap();
        assert_eq!(t.encode("a ab<|x|>  a", EncodeOptions::PROMPT).unwrap(), [1, 4, 4, 5, 6, 4]);
        assert_eq!(t.encode("<s>", EncodeOptions::PLAIN).unwrap(), [2, 0, 0, 0]);
        assert_eq!(t.decode(&[4, 4, 5], true), "a ab");
    }

    #[test]
    fn metaspace_puts_no_second_space() {
        let mut json = spm_json();
        json["normalizer"] = Value::Null;
        json["pre_tokenizer"] =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        let t = tokenizer(&json).unwrap();
        let plain = |text| t.encode(text, EncodeOptions { add_special: false, parse_special: true }).unwrap();
        assert_eq!((plain("a"), plain(" a"), plain("<|x|>a")), (vec![4], vec![4], vec![6, 3]));
    }

    #[test]
    fn unknown_parts_are_named() {
        let mut cases = Vec::new();
        for (part, value, expected) in [
            ("model", json!({"type": "Unigram"}), "t.json: model \"Unigram\" is not supported; supported: BPE"),
            ("normalizer", json!({"type": "BertNormalizer"}), "normalizer"),
            ("pre_tokenizer", json!({"type": "Whitespace"}), "pre_tokenizer"),
            ("model", json!({"vocab": {"a": 0, "b": 0}}), "every id once"),
            ("model", json!({"vocab": {"a": 4_000_000_000u32}}), "ids below"),
            ("model", json!([]), "not a tokenizer.json"),
        ] {
            let mut json = spm_json();
            json[part] = value;
            cases.push((tokenizer(&json).unwrap_err().to_string(), expected));
        }
        for (error, expected) in cases {
            assert!(error.contains(expected), "{error}");
        }
    }
}
