//! A vocabulary as data: what a GGUF file or a `tokenizer.json` says, checked, before anything is built from it.

use crate::gguf::{GgufFile, Metadata};

use super::added::AddedToken;
use super::error::TextError;
use super::pretokenize::{self, Stage};
use super::special::{SpecialIds, TokenKind, looks_like_control};

/// Every token, and how text becomes tokens.
pub(crate) struct Vocabulary {
    /// The file's name, for errors.
    pub(crate) file: String,
    /// Texts as the file spells them; the index is the id.
    pub(crate) tokens: Vec<String>,
    /// One per token.
    pub(crate) kinds: Vec<TokenKind>,
    /// Tokens that are found before the merges.
    pub(crate) added: Vec<AddedToken>,
    pub(crate) model: ModelParts,
    pub(crate) ids: SpecialIds,
    pub(crate) add_bos: bool,
    pub(crate) add_eos: bool,
    /// What happens to text before the model sees it.
    pub(crate) normalizer: Normalizer,
}

/// How words become tokens.
pub(crate) enum ModelParts {
    /// Byte-level BPE.
    Bpe { merges: Vec<(String, String)>, stages: Vec<Stage>, ignore_merges: bool },
    /// SentencePiece, with a score for every token.
    SpmScores(Vec<f32>),
    /// SentencePiece, with merges in order.
    SpmMerges(Vec<(String, String)>),
}

/// What happens to text before the model sees it.
pub(crate) enum Normalizer {
    /// Nothing.
    None,
    /// SentencePiece: spaces become `▁`, and one is put before the text where `prefix` says.
    /// With `unless_there`, not where the text begins with one.
    Spaces { prefix: SpacePrefix, unless_there: bool },
    /// Whatever a `tokenizer.json` asks for.
    Library(Box<tokenizers::NormalizerWrapper>),
}

/// Where SentencePiece puts a space before text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpacePrefix {
    /// Nowhere.
    Never,
    /// Before the text, if it does not begin with a special token.
    First,
    /// Before every piece of text between special tokens.
    Always,
}

impl Vocabulary {
    /// Reads the `tokenizer.ggml.*` keys; `None` where the file has no tokenizer.
    ///
    /// # Errors
    /// Keys missing or of another type, unknown models and pre-tokenizers, tables of different lengths, ids out of
    /// range, tokens that occur twice.
    pub(crate) fn from_gguf(gguf: &GgufFile) -> Result<Option<Vocabulary>, TextError> {
        let meta = gguf.metadata();
        match meta.opt_str("tokenizer.ggml.model")? {
            None | Some("none" | "no_vocab") => Ok(None),
            Some("gpt2") => Reader::new(gguf)?.bpe().map(Some),
            Some("llama") => Reader::new(gguf)?.spm().map(Some),
            Some(other) => Err(TextError::UnknownModel { file: gguf.label().into(), found: other.into() }),
        }
    }

    /// An error about a part of this vocabulary.
    pub(crate) fn bad(file: &str, what: &str, expected: impl ToString, found: impl ToString) -> TextError {
        TextError::BadVocabulary {
            file: file.into(),
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

/// Reads the keys that all models share.
struct Reader<'f> {
    file: &'f str,
    meta: &'f Metadata,
    tokens: Vec<String>,
    kinds: Vec<TokenKind>,
}

impl<'f> Reader<'f> {
    fn new(gguf: &'f GgufFile) -> Result<Reader<'f>, TextError> {
        let (file, meta) = (gguf.label(), gguf.metadata());
        let tokens: Vec<String> = meta.strs("tokenizer.ggml.tokens")?.iter().map(str::to_owned).collect();
        if tokens.is_empty() || tokens.len() >= u32::MAX as usize / 2 {
            return Err(Vocabulary::bad(file, "tokenizer.ggml.tokens", "at least one token", tokens.len()));
        }
        let kinds = match meta.opt_i32s("tokenizer.ggml.token_type")? {
            Some(ids) => ids.iter().map(|&id| TokenKind::from_id(id)).collect(),
            None => vec![TokenKind::Normal; tokens.len()],
        };
        let reader = Reader { file, meta, tokens, kinds };
        reader.same_length("tokenizer.ggml.token_type", reader.kinds.len())?;
        Ok(reader)
    }

    fn same_length(&self, key: &str, found: usize) -> Result<(), TextError> {
        if found == self.tokens.len() {
            return Ok(());
        }
        let expected = format!("{} values, one per token", self.tokens.len());
        Err(Vocabulary::bad(self.file, key, expected, found))
    }

    fn bpe(self) -> Result<Vocabulary, TextError> {
        let name = self.meta.opt_str("tokenizer.ggml.pre")?.filter(|name| !name.is_empty()).unwrap_or("default");
        let row = self.pre_tokenizer(name)?;
        let stages = row.stages().map_err(|e| TextError::Library { file: self.file.into(), source: Box::new(e) })?;
        let merges = self.merges()?;
        // Files that name no BOS or EOS mean Falcon's <|endoftext|>, the first byte-level model that was converted.
        let falcon = Some(11).filter(|&id| matches!(self.kinds.get(id), Some(TokenKind::Control))).map(|id| id as u32);
        let no_bos = matches!(name, "chatglm-bpe" | "glm4" | "glm5");
        let defaults = SpecialIds { bos: falcon.filter(|_| !no_bos), eos: falcon, ..SpecialIds::default() };
        let model = ModelParts::Bpe { merges, stages, ignore_merges: row.ignore_merges };
        self.finish(model, defaults, row.add_bos, Normalizer::None)
    }

    fn spm(self) -> Result<Vocabulary, TextError> {
        if let Some(name) = self.meta.opt_str("tokenizer.ggml.pre")?.filter(|name| !name.is_empty()) {
            // SentencePiece has no pre-tokenizer, but a name that nobody knows is still a sign of something new.
            self.pre_tokenizer(name)?;
        }
        if self.meta.opt_bool("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
            return Err(self
                .meta
                .invalid("tokenizer.ggml.remove_extra_whitespaces", "false: nothing else is implemented")
                .into());
        }
        let scores = self.meta.f32s("tokenizer.ggml.scores")?.to_vec();
        self.same_length("tokenizer.ggml.scores", scores.len())?;
        let prefix = match self.meta.opt_bool("tokenizer.ggml.add_space_prefix")? {
            Some(false) => SpacePrefix::Never,
            _ => SpacePrefix::Always,
        };
        let in_range = |id: u32| (id < self.tokens.len() as u32).then_some(id);
        let defaults = SpecialIds { bos: in_range(1), eos: in_range(2), unknown: in_range(0), ..SpecialIds::default() };
        self.finish(ModelParts::SpmScores(scores), defaults, true, Normalizer::Spaces { prefix, unless_there: false })
    }

    fn pre_tokenizer(&self, name: &str) -> Result<&'static pretokenize::PreTokenizer, TextError> {
        pretokenize::find(name).ok_or_else(|| TextError::UnknownPreTokenizer {
            file: self.file.into(),
            found: name.into(),
            known: pretokenize::names().join(", "),
        })
    }

    fn merges(&self) -> Result<Vec<(String, String)>, TextError> {
        let key = "tokenizer.ggml.merges";
        let split = |(i, line): (usize, &str)| {
            // The left side may begin with a space, so the separator is looked for after its first byte.
            let at = line.bytes().skip(1).position(|b| b == b' ').map(|at| at + 1);
            let parts = at.map(|at| (line[..at].to_owned(), line[at + 1..].to_owned()));
            parts.ok_or_else(|| {
                Vocabulary::bad(self.file, &format!("{key}[{i}]"), "two tokens and a space", format!("{line:?}"))
            })
        };
        self.meta.strs(key)?.iter().enumerate().map(split).collect()
    }

    fn finish(
        self,
        model: ModelParts,
        defaults: SpecialIds,
        add_bos: bool,
        normalizer: Normalizer,
    ) -> Result<Vocabulary, TextError> {
        let ids = self.special_ids(defaults)?;
        let add_bos = self.meta.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos);
        let add_eos = self.meta.opt_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let added = self.added_tokens(matches!(model, ModelParts::SpmScores(_)))?;
        let Reader { file, tokens, kinds, .. } = self;
        Ok(Vocabulary { file: file.into(), tokens, kinds, added, model, ids, add_bos, add_eos, normalizer })
    }

    fn special_ids(&self, defaults: SpecialIds) -> Result<SpecialIds, TextError> {
        let id = |name: &str, default: Option<u32>| -> Result<Option<u32>, TextError> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match self.meta.opt_u32(&key)? {
                Some(id) if id as usize >= self.tokens.len() => {
                    Err(self.meta.invalid(&key, format_args!("less than the {} tokens", self.tokens.len())).into())
                }
                Some(id) => Ok(Some(id)),
                None => Ok(default),
            }
        };
        Ok(SpecialIds {
            bos: id("bos", defaults.bos)?,
            eos: id("eos", defaults.eos)?,
            eot: id("eot", None)?,
            eom: id("eom", None)?,
            unknown: id("unknown", defaults.unknown)?,
            padding: id("padding", None)?,
        })
    }

    fn added_tokens(&self, is_spm: bool) -> Result<Vec<AddedToken>, TextError> {
        // Phi-3's own tokenizer swallows the white space after its markup. GGUF has no key for that.
        let is_phi3 = is_spm && self.meta.opt_str("general.architecture")? == Some("phi3");
        let keeps_space = |text: &str| matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
        let is_added = |kind| matches!(kind, TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown);
        let tokens = self.tokens.iter().zip(&self.kinds).zip(0..);
        let added = tokens.filter(|((_, kind), _)| is_added(**kind)).map(|((text, kind), id)| AddedToken {
            id,
            text: text.clone(),
            control: *kind != TokenKind::UserDefined || looks_like_control(text),
            lstrip: false,
            rstrip: is_phi3 && !keeps_space(text),
        });
        Ok(added.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::{EncodeOptions, Tokenizer};
    use super::*;
    use crate::gguf::writer::GgufWriter;
    use crate::gguf::{Array, StrArray, Value};

    fn strings<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> Value {
        let mut array = StrArray::default();
        items.into_iter().for_each(|item| array.push(item.as_ref()));
        Value::Array(Array::Str(array))
    }

    /// All bytes, `ab`, `abc`, and two control tokens: what a small byte-level model has.
    fn bpe() -> GgufWriter {
        let alphabet = super::super::byte_level::Alphabet::get();
        let mut tokens: Vec<String> = (0..=255u8).map(|b| alphabet.char_of(b).to_string()).collect();
        tokens.extend(["ab", "abc", "<|im_start|>", "<|im_end|>"].map(String::from));
        let mut kinds = vec![1; 258];
        kinds.extend([3, 3]);
        let mut writer = GgufWriter::new();
        writer.set("general.architecture", "nosuch");
        writer.set("tokenizer.ggml.model", "gpt2");
        writer.set("tokenizer.ggml.pre", "gpt-2");
        writer.set("tokenizer.ggml.tokens", strings(tokens));
        writer.set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
        writer.set("tokenizer.ggml.merges", strings(["a b", "ab c"]));
        writer
    }

    fn spm() -> GgufWriter {
        let mut writer = GgufWriter::new();
        writer.set("tokenizer.ggml.model", "llama");
        writer.set("tokenizer.ggml.tokens", strings(["<unk>", "<s>", "</s>", "▁", "a", "▁a"]));
        writer.set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![2, 3, 3, 1, 1, 1])));
        writer.set("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0, 0.0, 0.0, -1.0, -2.0, -3.0])));
        writer
    }

    fn open(writer: GgufWriter) -> Result<Tokenizer, TextError> {
        Tokenizer::from_gguf(&GgufFile::from_vec("v.gguf", writer.to_vec(&[]).unwrap()).unwrap())
    }

    fn ids(writer: GgufWriter, text: &str) -> Vec<u32> {
        open(writer).unwrap().encode(text, EncodeOptions::PROMPT).unwrap()
    }

    fn with(mut writer: GgufWriter, key: &str, value: impl Into<Value>) -> GgufWriter {
        writer.set(key, value);
        writer
    }

    #[test]
    fn a_vocabulary_of_any_architecture() {
        assert_eq!(ids(bpe(), "abc<|im_end|>ab"), [257, 259, 256]);
        let tokenizer = open(bpe()).unwrap();
        assert_eq!((tokenizer.stop_ids(), tokenizer.special_ids().eot), (&[259][..], Some(259)));
        assert_eq!(tokenizer.n_vocab(), 260);
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_by_name() {
        for writer in [bpe(), spm()] {
            let error = open(with(writer, "tokenizer.ggml.pre", "future-9b")).unwrap_err();
            assert!(matches!(error, TextError::UnknownPreTokenizer { .. }));
            let message = error.to_string();
            assert!(
                message.starts_with("v.gguf: tokenizer.ggml.pre is \"future-9b\", which is not a known"),
                "{message}"
            );
            assert!(message.contains("qwen2") && message.contains("llama-bpe"), "{message}");
        }
    }

    #[test]
    fn other_models_are_refused_by_name() {
        for model in ["bert", "t5", "rwkv", "plamo2"] {
            let error = open(with(bpe(), "tokenizer.ggml.model", model)).unwrap_err().to_string();
            assert!(error.contains(&format!("tokenizer.ggml.model is {model:?}")), "{error}");
        }
        let error = open(with(bpe(), "tokenizer.ggml.model", "none")).unwrap_err();
        assert!(matches!(error, TextError::NoTokenizer { .. }));
    }

    #[test]
    fn affixes_and_spaces_as_the_metadata_says() {
        let bos = |w| with(w, "tokenizer.ggml.bos_token_id", 258u32);
        assert_eq!(ids(with(bos(bpe()), "tokenizer.ggml.add_bos_token", true), "ab"), [258, 256]);
        assert_eq!(ids(with(bos(bpe()), "tokenizer.ggml.pre", "llama-bpe"), "ab"), [258, 256]);
        let off = with(with(bos(bpe()), "tokenizer.ggml.pre", "llama-bpe"), "tokenizer.ggml.add_bos_token", false);
        assert_eq!(ids(off, "ab"), [256]);
        assert_eq!(ids(spm(), "a"), [1, 5]);
        assert_eq!(ids(with(spm(), "tokenizer.ggml.add_eos_token", true), "a"), [1, 5, 2]);
        assert_eq!(ids(with(spm(), "tokenizer.ggml.add_space_prefix", false), "a a"), [1, 4, 5]);
        assert_eq!(ids(spm(), "é"), [1, 3, 0]);
    }

    #[test]
    fn contradictions_are_named() {
        let i32s = |n| Value::Array(Array::I32(vec![1; n]));
        let mut twice: Vec<String> = (0..260).map(|i| format!("t{i}")).collect();
        twice[7] = "t9".into();
        for (writer, expected) in [
            (with(bpe(), "tokenizer.ggml.token_type", i32s(3)), "tokenizer.ggml.token_type: expected 260 values"),
            (with(bpe(), "tokenizer.ggml.tokens", strings(twice)), "\"t9\" as 7 and as 9"),
            (
                with(bpe(), "tokenizer.ggml.merges", strings(["a b", "ab"])),
                "tokenizer.ggml.merges[1]: expected two tokens",
            ),
            (with(bpe(), "tokenizer.ggml.merges", strings(["a c"])), "merge 0 (\"a\" \"c\")"),
            (with(bpe(), "tokenizer.ggml.merges", 7u32), "tokenizer.ggml.merges"),
            (with(bpe(), "tokenizer.ggml.eos_token_id", 260u32), "tokenizer.ggml.eos_token_id"),
            (with(bpe(), "tokenizer.ggml.add_bos_token", true), "tokenizer.ggml.bos_token_id is not set"),
            (with(bpe(), "tokenizer.ggml.tokens", strings::<&str>([])), "at least one token"),
            (
                with(spm(), "tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0]))),
                "tokenizer.ggml.scores: expected 6",
            ),
            (with(spm(), "tokenizer.ggml.remove_extra_whitespaces", true), "remove_extra_whitespaces"),
        ] {
            let error = open(writer).unwrap_err().to_string();
            assert!(error.contains("v.gguf") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_file_that_merges_text_into_a_control_token_is_refused() {
        let mut writer = bpe();
        writer.set("tokenizer.ggml.merges", strings(["a b", "ab c", "<|im_ start|>"]));
        assert!(open(writer).is_err());
        // Nor does SentencePiece make one, whatever its score.
        let mut writer = spm();
        writer.set("tokenizer.ggml.tokens", strings(["<unk>", "aa", "</s>", "▁", "a", "▁a"]));
        assert_eq!(open(writer).unwrap().encode("aa", EncodeOptions::PLAIN).unwrap(), [5, 4]);
    }
}
