//! What can go wrong between text and tokens.

use std::path::PathBuf;

use crate::gguf::GgufError;

/// Why a tokenizer could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A key of the metadata is missing, of another type, or out of range.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// `tokenizer.ggml.model` names a kind of tokenizer that is not implemented.
    #[error(
        "{file}: tokenizer.ggml.model is {found:?}; known models: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
    )]
    UnknownModel {
        /// The file's name.
        file: String,
        /// What it says.
        found: String,
    },
    /// `tokenizer.ggml.pre` names a pre-tokenizer that is not known; guessing one would give wrong ids.
    #[error("{file}: tokenizer.ggml.pre is {found:?}, which is not a known pre-tokenizer; known: {known}")]
    UnknownPreTokenizer {
        /// The file's name.
        file: String,
        /// What it says.
        found: String,
        /// All names that are known.
        known: String,
    },
    /// The file has no tokenizer, and there is no `tokenizer.json` beside it.
    #[error("{file}: no tokenizer.ggml.model in the metadata, and no tokenizer.json beside the file")]
    NoTokenizer {
        /// The file's name.
        file: String,
    },
    /// The vocabulary contradicts itself.
    #[error("{file}: {what}: expected {expected}, found {found}")]
    BadVocabulary {
        /// The file's name.
        file: String,
        /// Which part.
        what: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A `tokenizer.json` that cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A `tokenizer.json` that is not JSON, or not a tokenizer.
    #[error("{file}: not a tokenizer.json: {why}")]
    BadJson {
        /// The file's name.
        file: String,
        /// What the parser says.
        why: String,
    },
    /// A `tokenizer.json` with a part that is not implemented.
    #[error("{file}: {part} {found:?} is not supported; supported: {supported}")]
    Unsupported {
        /// The file's name.
        file: String,
        /// Which part of the pipeline.
        part: &'static str,
        /// What it asks for.
        found: String,
        /// What would be accepted.
        supported: &'static str,
    },
    /// A byte of the text has no token, and the vocabulary has none for unknown text either.
    #[error("no token for byte 0x{byte:02X} at offset {at} of the text, and the vocabulary has no unknown token")]
    NoToken {
        /// The byte.
        byte: u8,
        /// Its offset in the piece of text between two special tokens.
        at: usize,
    },
    /// More text than positions can be counted in.
    #[error("the text has {bytes} bytes; at most {max} can be encoded at once")]
    TooLong {
        /// Bytes given.
        bytes: usize,
        /// Bytes accepted.
        max: usize,
    },
    /// A BOS or EOS token is to be added, but the metadata does not say which.
    #[error("{file}: {flag} is true, but {id_key} is not set")]
    NoSuchSpecial {
        /// The file's name.
        file: String,
        /// The flag.
        flag: &'static str,
        /// The missing key.
        id_key: &'static str,
    },
    /// The underlying tokenizer library refused.
    #[error("{file}: the merges do not fit the vocabulary")]
    Library {
        /// The file's name.
        file: String,
        /// What it says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
