//! Caps on what a file may claim. Each also holds relative to the bytes the file really has.
//!
//! The names follow the GGUF specification (ggml `docs/gguf.md`) where it states a limit; the others are at least
//! four times above what published files use, and low enough that the tables we build from a refused file stay
//! below 64 MiB beyond the file's own size.

/// Metadata entries in one file; published files have fewer than 100.
pub const MAX_KEYS: u64 = 1 << 16;
/// Tensors in one file or in all parts of a split file together; published files have fewer than 4,000.
pub const MAX_TENSORS: u64 = 1 << 16;
/// Bytes of a metadata key (specification: 2^16 - 1).
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Bytes of a tensor name (specification: 64).
pub const MAX_TENSOR_NAME_BYTES: u64 = 64;
/// Bytes of one string value; a chat template has some 10 kB, an embedded `tokenizer.json` some 20 MB.
pub const MAX_STRING_BYTES: u64 = 1 << 28;
/// Elements of one metadata array; the largest published vocabularies have some 260,000.
pub const MAX_ARRAY_LEN: u64 = 1 << 26;
/// Bytes of header, metadata and tensor descriptions together.
pub const MAX_METADATA_BYTES: u64 = 1 << 30;
/// Dimensions of a tensor (`GGML_MAX_DIMS`).
pub const MAX_DIMS: u32 = 4;
/// Smallest `general.alignment`; the specification demands a multiple of 8.
pub const MIN_ALIGNMENT: u32 = 8;
/// Largest `general.alignment`: a page.
pub const MAX_ALIGNMENT: u32 = 4096;
/// `general.alignment` where the key is absent (specification).
pub const DEFAULT_ALIGNMENT: u32 = 32;
/// Parts of a split file; each keeps a file descriptor open.
pub const MAX_SHARDS: u16 = 512;

/// The fewest bytes a metadata entry takes: length, one byte of key, type, one byte of value.
pub const MIN_KEY_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// The fewest bytes a tensor description takes: length, one byte of name, count, one dimension, type, offset.
pub const MIN_TENSOR_ENTRY_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;
