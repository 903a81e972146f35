//! The one error of this module: which file, where in it, which key or tensor, what was expected, what was found.

use std::fmt;
use std::sync::Arc;

/// Why a GGUF file was refused. A caller that needs to tell cases apart matches on this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GgufErrorKind {
    /// There is no file at the path, or it may not be read.
    NotFound,
    /// The path is a directory, a pipe or a device.
    NotAFile,
    /// The operating system failed to read or map the file.
    Io,
    /// The file's length or modification time changed while it was in use.
    Changed,
    /// The first four bytes are not `GGUF`.
    BadMagic,
    /// The version is neither 2 nor 3.
    BadVersion,
    /// The file was written on a big-endian machine.
    BigEndian,
    /// A field reaches beyond the end of the file.
    Truncated,
    /// A count or length is above our cap although the file might hold it.
    TooLarge,
    /// A key or tensor name is empty.
    EmptyName,
    /// A key or tensor name is longer than the format allows.
    NameTooLong,
    /// A string is not UTF-8.
    InvalidUtf8,
    /// Two entries of the metadata have the same key.
    DuplicateKey,
    /// Two tensors have the same name.
    DuplicateTensor,
    /// The id of a metadata value's type is not one of 0 to 12.
    UnknownValueType,
    /// An array's elements are arrays.
    NestedArray,
    /// A boolean is neither 0 nor 1.
    BadBool,
    /// `general.alignment` is not a `u32`, not a power of two, or out of bounds.
    BadAlignment,
    /// A tensor has no dimension or more than four.
    BadDimCount,
    /// A dimension is zero.
    ZeroDim,
    /// The product of a tensor's dimensions, or its size in bytes, does not fit 63 bits.
    SizeOverflow,
    /// The id of a tensor's type is not a ggml type.
    UnknownTensorType,
    /// The tensor's type is known to ggml, but Playhouse cannot run it.
    UnsupportedTensorType,
    /// The length of a tensor's row is not a multiple of the elements in a block of its type.
    RaggedRow,
    /// A tensor's offset is not a multiple of the alignment.
    MisalignedTensor,
    /// A tensor's bytes reach beyond the end of the file.
    TensorOutside,
    /// Two tensors share bytes.
    TensorOverlap,
    /// The parts of a split file do not fit together.
    BadSplit,
    /// A part of a split file is absent.
    MissingShard,
    /// A required key is absent.
    MissingKey,
    /// A key's value has another type than its reader needs.
    WrongType,
    /// A key's value has the right type but is not acceptable.
    BadValue,
    /// A required tensor is absent.
    MissingTensor,
}

impl GgufErrorKind {
    /// What is wrong, in a few words.
    pub fn message(self) -> &'static str {
        use GgufErrorKind::*;
        match self {
            NotFound => "cannot be opened",
            NotAFile => "is not a regular file",
            Io => "reading failed",
            Changed => "the file changed while it was in use",
            BadMagic => "not a GGUF file",
            BadVersion => "unsupported GGUF version",
            BigEndian => "big-endian GGUF files are not supported",
            Truncated => "reaches beyond the end of the file",
            TooLarge => "above the limit",
            EmptyName => "empty name",
            NameTooLong => "name too long",
            InvalidUtf8 => "invalid UTF-8",
            DuplicateKey => "duplicate key",
            DuplicateTensor => "duplicate tensor",
            UnknownValueType => "unknown value type",
            NestedArray => "array of arrays",
            BadBool => "invalid boolean",
            BadAlignment => "bad alignment",
            BadDimCount => "bad number of dimensions",
            ZeroDim => "zero dimension",
            SizeOverflow => "tensor too large",
            UnknownTensorType => "unknown tensor type",
            UnsupportedTensorType => "unsupported tensor type",
            RaggedRow => "row is not a whole number of blocks",
            MisalignedTensor => "misaligned tensor",
            TensorOutside => "tensor data outside the file",
            TensorOverlap => "tensors overlap",
            BadSplit => "parts of a split file do not fit together",
            MissingShard => "part of a split file is missing",
            MissingKey => "missing key",
            WrongType => "wrong type",
            BadValue => "unacceptable value",
            MissingTensor => "missing tensor",
        }
    }

    /// What the user can do about it, where that is not obvious.
    fn advice(self) -> Option<&'static str> {
        use GgufErrorKind::*;
        match self {
            Truncated | TensorOutside => Some("the file may be incomplete: compare its size with the source's"),
            BadVersion | BigEndian => Some("convert the model again with a current llama.cpp"),
            UnsupportedTensorType => Some("use a file in one of the types that `docs/src/formats.md` lists"),
            MissingShard => Some("keep all parts in one folder under their original names"),
            _ => None,
        }
    }
}

/// What an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// The file as a whole.
    File,
    /// A field before the metadata, by name.
    Header(&'static str),
    /// The metadata entry with this index, whose key is not known yet.
    KeyIndex(u64),
    /// A metadata entry.
    Key(String),
    /// The tensor description with this index, whose name is not known yet.
    TensorIndex(u64),
    /// A tensor.
    Tensor(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => write!(f, "file"),
            Self::Header(field) => write!(f, "header field `{field}`"),
            Self::KeyIndex(i) => write!(f, "metadata entry {i}"),
            Self::Key(key) => write!(f, "key `{}`", quote(key)),
            Self::TensorIndex(i) => write!(f, "tensor entry {i}"),
            Self::Tensor(name) => write!(f, "tensor `{}`", quote(name)),
        }
    }
}

/// Escapes and shortens text that comes from a file, so that a message stays one readable line.
pub(crate) fn quote(text: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    let mut out = String::new();
    for c in text.chars().take(SHOWN_CHARS) {
        match c {
            // Quotes are harmless and would only be harder to read.
            '"' | '\'' => out.push(c),
            c => out.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(SHOWN_CHARS).is_some() {
        out.push_str("...");
    }
    out
}

/// A file was refused. [`GgufError::kind`] tells the cases apart; the message is for people.
#[derive(Debug)]
pub struct GgufError {
    inner: Box<Inner>,
}

#[derive(Debug)]
struct Inner {
    kind: GgufErrorKind,
    file: Arc<str>,
    offset: u64,
    subject: Subject,
    expected: String,
    found: String,
    source: Option<std::io::Error>,
}

impl GgufError {
    /// An error at `offset` bytes from the start of `file`.
    pub(crate) fn new(
        kind: GgufErrorKind,
        file: Arc<str>,
        offset: u64,
        subject: Subject,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        let (expected, found) = (expected.to_string(), found.to_string());
        Self { inner: Box::new(Inner { kind, file, offset, subject, expected, found, source: None }) }
    }

    /// The same error with the operating system's reason.
    pub(crate) fn with_source(mut self, source: std::io::Error) -> Self {
        self.inner.source = Some(source);
        self
    }

    /// What is wrong.
    pub fn kind(&self) -> GgufErrorKind {
        self.inner.kind
    }

    /// The file's path, or its label for a file in memory. For a split file, the part concerned.
    pub fn file(&self) -> &str {
        &self.inner.file
    }

    /// Bytes from the start of the file to the offending field.
    pub fn offset(&self) -> u64 {
        self.inner.offset
    }

    /// The key, tensor or header field concerned.
    pub fn subject(&self) -> &Subject {
        &self.inner.subject
    }

    /// What would have been right.
    pub fn expected(&self) -> &str {
        &self.inner.expected
    }

    /// What was there.
    pub fn found(&self) -> &str {
        &self.inner.found
    }
}

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, file, offset, subject, expected, found, .. } = &*self.inner;
        write!(f, "{file}: byte {offset}: {subject}: {}: expected {expected}, found {found}", kind.message())?;
        match kind.advice() {
            Some(advice) => write!(f, " ({advice})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for GgufError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.source.as_ref().map(|e| e as _)
    }
}
