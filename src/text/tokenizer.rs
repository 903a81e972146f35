//! The tokenizer: text to token ids, and the bytes that each id stands for.

use std::path::Path;
use std::sync::Arc;

use ahash::AHashMap;
use serde::{Deserialize, Serialize};
use tokenizers::{NormalizedString, Normalizer as _};

use crate::gguf::GgufFile;

use super::added::{AddedTokens, Fragment};
use super::bpe::{BpeParts, ByteBpe};
use super::byte_level::Alphabet;
use super::detokenizer::Detokenizer;
use super::error::TextError;
use super::hf;
use super::prompt::ChatPrompt;
use super::special::{self, Affixes, SpecialIds, TokenKind};
use super::spm::{self, Spm, SpmParts};
use super::vocabulary::{ModelParts, Normalizer, SpacePrefix, Vocabulary};

/// The most text that is encoded at once: positions inside a text are 32-bit.
const TEXT_MAX_BYTES: usize = 1 << 30;

/// How [`Tokenizer::encode`] treats special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodeOptions {
    /// Adds BOS and EOS where the vocabulary wants them.
    pub add_special: bool,
    /// Reads the text of control tokens (`<|im_end|>`) as those tokens. Leave it off for text that users write.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// Text as it stands: no BOS or EOS, and the text of control tokens is text.
    pub const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };
    /// A whole prompt: BOS and EOS as the vocabulary wants, control tokens by their text.
    pub const PROMPT: EncodeOptions = EncodeOptions { add_special: true, parse_special: true };
}

/// A tokenizer. Cloning it is cheap, and it can be used from many threads at once.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    file: String,
    model: Model,
    normalizer: Normalizer,
    added: AddedTokens,
    /// All tokens' bytes, one after the other; token `i` ends at `ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    is_control: Vec<bool>,
    ids: SpecialIds,
    affixes: Affixes,
    stop_ids: Vec<u32>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("file", &self.file).field("n_vocab", &self.ends.len()).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Model {
    Bpe(Box<ByteBpe>),
    Spm(Box<Spm>),
}

impl Tokenizer {
    /// Reads the tokenizer of a model: from the metadata or, where it has none, from the `tokenizer.json` beside
    /// the file.
    ///
    /// # Errors
    /// What the metadata or the JSON gets wrong, by name; [`TextError::NoTokenizer`] where there is neither.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Tokenizer, TextError> {
        if let Some(vocabulary) = Vocabulary::from_gguf(gguf)? {
            return Tokenizer::new(vocabulary);
        }
        let beside = Path::new(gguf.label()).with_file_name("tokenizer.json");
        if beside.is_file() {
            return Tokenizer::from_json_file(&beside);
        }
        Err(TextError::NoTokenizer { file: gguf.label().into() })
    }

    /// Reads a Hugging Face `tokenizer.json`, and which token ends a text from the `tokenizer_config.json` beside it.
    ///
    /// # Errors
    /// The file cannot be read or is no tokenizer, or has a part that is not supported; the part is named.
    pub fn from_json_file(path: &Path) -> Result<Tokenizer, TextError> {
        let json = std::fs::read(path).map_err(|source| TextError::Read { path: path.into(), source })?;
        let mut vocabulary = hf::read(&path.display().to_string(), &json)?;
        if let Ok(config) = std::fs::read(path.with_file_name("tokenizer_config.json")) {
            hf::read_config(&mut vocabulary, &config);
        }
        Tokenizer::new(vocabulary)
    }

    pub(crate) fn new(vocabulary: Vocabulary) -> Result<Tokenizer, TextError> {
        let Vocabulary { file, tokens, kinds, added, model, mut ids, add_bos, add_eos, normalizer } = vocabulary;
        let mut is_control: Vec<bool> =
            kinds.iter().map(|k| matches!(k, TokenKind::Control | TokenKind::Unknown)).collect();
        for token in added.iter().filter(|t| t.control) {
            is_control[token.id as usize] = true;
        }
        let (bytes, ends) = pieces(&model, &tokens, &kinds, &file)?;
        let model = build_model(&file, &tokens, &kinds, &is_control, model, ids.unknown)?;
        let added = AddedTokens::new(added)
            .map_err(|source| TextError::Library { file: file.clone(), source: Box::new(source) })?;
        let stop_ids = special::complete(&mut ids, |text| added.id(text));
        let affixes = Affixes::new(&ids, add_bos, add_eos, &file)?;
        let inner = Inner { file, model, normalizer, added, bytes, ends, kinds, is_control, ids, affixes, stop_ids };
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// The number of tokens; ids are below it.
    pub fn n_vocab(&self) -> usize {
        self.inner.ends.len()
    }

    /// Ids of the tokens with a role.
    pub fn special_ids(&self) -> SpecialIds {
        self.inner.ids
    }

    /// Whether the vocabulary wants a BOS token before a text.
    pub fn adds_bos(&self) -> bool {
        self.inner.affixes.bos.is_some()
    }

    /// Tokens that end generation: EOS, ends of turns and of messages; sorted.
    pub fn stop_ids(&self) -> &[u32] {
        &self.inner.stop_ids
    }

    /// The kind of a token; `None` for ids out of range.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.inner.kinds.get(id as usize).copied()
    }

    /// Whether a token steers the model instead of standing for text.
    pub fn is_control(&self, id: u32) -> bool {
        self.inner.is_control.get(id as usize).copied().unwrap_or(false)
    }

    /// The id of a control or user-defined token by its text.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.inner.added.id(text)
    }

    /// The bytes a token stands for: part of a UTF-8 sequence for some, the token's name for control tokens, nothing
    /// for ids out of range.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let (i, ends) = (id as usize, &self.inner.ends);
        let Some(&end) = ends.get(i) else { return &[] };
        let start = i.checked_sub(1).map_or(0, |before| ends[before]);
        &self.inner.bytes[start as usize..end as usize]
    }

    /// Whether text at the start gets a space that decoding has to take away again.
    pub(crate) fn has_space_prefix(&self) -> bool {
        match &self.inner.normalizer {
            Normalizer::Spaces { prefix, .. } => *prefix != SpacePrefix::Never,
            _ => false,
        }
    }

    pub(crate) fn control_texts(&self) -> impl Iterator<Item = &str> {
        self.inner.added.control_texts()
    }

    /// Turns text into token ids.
    ///
    /// Time and memory are linear in the text. Decoding gives the text back, except that SentencePiece writes a
    /// space and U+2581 alike.
    ///
    /// # Errors
    /// [`TextError::TooLong`]; [`TextError::NoToken`] for vocabularies that can write neither a byte nor "unknown".
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        self.encode_guarded(text, &[], options)
    }

    /// Turns a rendered conversation into token ids: control tokens of the template become tokens, the same text in
    /// what users wrote does not. BOS is added where the vocabulary wants it and the template has not written it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, prompt: &ChatPrompt) -> Result<Vec<u32>, TextError> {
        let options = EncodeOptions { add_special: false, parse_special: true };
        let mut ids = self.encode_guarded(prompt.text(), prompt.guards(), options)?;
        if let Some(bos) = self.inner.affixes.bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    fn encode_guarded(&self, text: &str, guards: &[usize], options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        if text.len() > TEXT_MAX_BYTES {
            return Err(TextError::TooLong { bytes: text.len(), max: TEXT_MAX_BYTES });
        }
        let affixes = options.add_special.then_some(self.inner.affixes);
        let mut ids: Vec<u32> = affixes.and_then(|a| a.bos).into_iter().collect();
        let (mut result, mut is_first) = (Ok(()), true);
        self.inner.added.split(text, options.parse_special, guards, &mut |fragment| {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) if result.is_ok() => result = self.inner.encode_text(text, is_first, &mut ids),
                Fragment::Text(_) => {}
            }
            is_first = false;
        });
        result?;
        ids.extend(affixes.and_then(|a| a.eos));
        Ok(ids)
    }

    /// Turns token ids into text, as [`Detokenizer`] does it piece by piece. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut detokenizer = Detokenizer::at_start(self, skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&detokenizer.push(id));
        }
        text.push_str(&detokenizer.finish());
        text
    }
}

impl Inner {
    /// Encodes text that has no added tokens in it.
    fn encode_text(&self, text: &str, is_first: bool, out: &mut Vec<u32>) -> Result<(), TextError> {
        match &self.normalizer {
            Normalizer::None => self.model.encode(text, out),
            Normalizer::Spaces { prefix, unless_there } => {
                let is_wanted = *prefix == SpacePrefix::Always || (*prefix == SpacePrefix::First && is_first);
                let with_prefix = is_wanted && !(*unless_there && text.starts_with([' ', spm::SPACE]));
                let mut spaced = String::with_capacity(text.len() + text.len() / 4 + 3);
                spaced.extend(with_prefix.then_some(spm::SPACE));
                spaced.extend(text.chars().map(|c| if c == ' ' { spm::SPACE } else { c }));
                self.model.encode(&spaced, out)
            }
            Normalizer::Library(normalizer) => {
                let mut normalized = NormalizedString::from(text);
                normalizer
                    .normalize(&mut normalized)
                    .map_err(|source| TextError::Library { file: self.file.clone(), source })?;
                self.model.encode(normalized.get(), out)
            }
        }
    }
}

impl Model {
    fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TextError> {
        match self {
            Model::Bpe(bpe) => bpe.encode(text, out),
            Model::Spm(spm) => spm.encode(text, out),
        }
    }
}

fn build_model(
    file: &str,
    tokens: &[String],
    kinds: &[TokenKind],
    is_control: &[bool],
    model: ModelParts,
    unknown: Option<u32>,
) -> Result<Model, TextError> {
    let byte_ids = byte_ids(tokens, kinds);
    let is_spm = !matches!(model, ModelParts::Bpe { .. });
    // Text never merges into a token that steers the model, or into the name of a byte.
    let can_be_made = |id: u32| !is_control[id as usize] && (!is_spm || kinds[id as usize] != TokenKind::Byte);
    let mut vocab = AHashMap::with_capacity(tokens.len());
    for (text, id) in tokens.iter().zip(0..).filter(|(text, id)| !text.is_empty() && can_be_made(*id)) {
        if let Some(other) = vocab.insert(text.clone(), id) {
            let found = format!("{text:?} as {other} and as {id}");
            return Err(Vocabulary::bad(file, "tokenizer.ggml.tokens", "every token once", found));
        }
    }
    let spm_parts = |vocab| SpmParts { vocab, n_vocab: tokens.len() as u32, byte_ids, unknown };
    Ok(match model {
        ModelParts::Bpe { merges, stages, ignore_merges } => {
            Model::Bpe(Box::new(ByteBpe::new(BpeParts { vocab, merges, stages, ignore_merges, unknown }, file)?))
        }
        // Adding zero makes one of the two zeros.
        ModelParts::SpmScores(scores) => {
            Model::Spm(Box::new(Spm::from_scores(spm_parts(vocab), |id| scores[id as usize] + 0.0)))
        }
        ModelParts::SpmMerges(merges) => Model::Spm(Box::new(Spm::from_merges(spm_parts(vocab), &merges, file)?)),
    })
}

/// The byte tokens of a SentencePiece vocabulary.
fn byte_ids(tokens: &[String], kinds: &[TokenKind]) -> [Option<u32>; 256] {
    let mut ids = [None; 256];
    for ((text, _), id) in tokens.iter().zip(kinds).zip(0..).filter(|((_, kind), _)| **kind == TokenKind::Byte) {
        if let Some(byte) = spm::byte_of(text) {
            ids[usize::from(byte)].get_or_insert(id);
        }
    }
    ids
}

/// The bytes of every token, one after the other, and where each ends.
fn pieces(
    model: &ModelParts,
    tokens: &[String],
    kinds: &[TokenKind],
    file: &str,
) -> Result<(Vec<u8>, Vec<u32>), TextError> {
    let is_bpe = matches!(model, ModelParts::Bpe { .. });
    let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(tokens.len()));
    for (text, kind) in tokens.iter().zip(kinds) {
        match kind {
            TokenKind::Byte if !is_bpe => match spm::byte_of(text) {
                Some(byte) => bytes.push(byte),
                None => bytes.extend_from_slice(text.as_bytes()),
            },
            TokenKind::Normal | TokenKind::Unused | TokenKind::Byte if is_bpe => match Alphabet::get().read(text) {
                Some(read) => bytes.extend_from_slice(&read),
                None => bytes.extend_from_slice(text.as_bytes()),
            },
            TokenKind::Normal | TokenKind::Unused => {
                bytes.extend_from_slice(text.replace(spm::SPACE, " ").as_bytes());
            }
            _ => bytes.extend_from_slice(text.as_bytes()),
        }
        let end = u32::try_from(bytes.len());
        ends.push(end.map_err(|_| Vocabulary::bad(file, "tokenizer.ggml.tokens", "less than 4 GiB of text", "more"))?);
    }
    Ok((bytes, ends))
}
