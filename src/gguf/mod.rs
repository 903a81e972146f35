//! A checked reader and a writer of GGUF files, the container that models come in.
//!
//! ```text
//! path ── shards ──> table (magic, version, metadata, tensors) ──> GgufFile ── bytes() ──> TensorBytes
//!           │          │ cursor: bounded reads, caps                              lazily memory-mapped
//!           └ joins    └ value, metadata, tensors
//! ```
//!
//! A file is data from strangers. Everything in front of the tensor data is read with bounded reads; every count,
//! length, offset and product is checked against the file's size before anything is allocated; the first thing that
//! is wrong ends the reading with one [`GgufError`] that says where and what. Tensor data is mapped into memory only
//! when [`GgufFile::bytes`] asks for it. The limits are in [`limits`].
//!
//! Source: ggml `docs/gguf.md` (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

mod error;
pub mod limits;
mod value;
mod metadata;
mod cursor;
mod tensors;
mod table;
mod bytes;
mod shards;
pub mod writer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

pub use bytes::TensorBytes;
pub(crate) use error::quote;
pub use error::{GgufError, GgufErrorKind, Subject};
pub use metadata::Metadata;
pub use tensors::TensorInfo;
pub use value::{Array, StrArray, Value, ValueType};

use bytes::Backing;
use shards::Shard;
use table::Table;

/// An open model file: its metadata, its tensors, and on demand their bytes.
#[derive(Debug)]
pub struct GgufFile {
    version: u32,
    alignment: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    shards: Vec<Shard>,
}

impl GgufFile {
    /// Opens a file. A file that says it is the first part of several is joined with the others in its folder.
    ///
    /// # Errors
    /// The first thing that is wrong; [`GgufErrorKind::NotFound`] where there is no file.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let (shards, table) = shards::open(path)?;
        Ok(Self::new(shards, table))
    }

    /// Reads a file that is part of the program; `label` names it in errors. Align the bytes to 8 or more, or they
    /// are copied.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn from_static(label: &str, bytes: &'static [u8]) -> Result<Self, GgufError> {
        let label: Arc<str> = label.into();
        let table = read_memory(&label, bytes)?;
        Ok(Self::new(vec![Shard::memory(label, Backing::from_static(bytes))], table))
    }

    /// Reads a file from memory; `label` names it in errors.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn from_vec(label: &str, bytes: Vec<u8>) -> Result<Self, GgufError> {
        let label: Arc<str> = label.into();
        let table = read_memory(&label, &bytes)?;
        Ok(Self::new(vec![Shard::memory(label, Backing::from_vec(bytes))], table))
    }

    fn new(shards: Vec<Shard>, table: Table) -> Self {
        let Table { version, alignment, metadata, tensors, by_name } = table;
        Self { version, alignment, metadata, tensors, by_name, shards }
    }

    /// The path, or the label given for bytes in memory. For a split file, the path of the first part.
    pub fn label(&self) -> &str {
        self.shards[0].label()
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of tensor data in bytes.
    pub fn alignment(&self) -> u32 {
        self.alignment
    }

    /// The number of parts; 1 unless split.
    pub fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// The metadata; for a split file that of the first part.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> + Clone + '_ {
        self.tensors.iter()
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&idx| &self.tensors[idx])
    }

    /// The tensor with this name.
    ///
    /// # Errors
    /// [`GgufErrorKind::MissingTensor`].
    pub fn require(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.tensor(name).ok_or_else(|| {
            let subject = Subject::Tensor(name.to_owned());
            let found = format_args!("{} tensors, none of this name", self.tensors.len());
            GgufError::new(GgufErrorKind::MissingTensor, self.shards[0].label().clone(), 0, subject, "a tensor", found)
        })
    }

    /// The bytes of a tensor of this file. The first call maps the file (or the part) into memory.
    ///
    /// # Errors
    /// [`GgufErrorKind::Changed`] where the file is not what it was when opened, [`GgufErrorKind::Io`] where it
    /// cannot be mapped, [`GgufErrorKind::TensorOutside`] where `info` belongs to another file.
    pub fn bytes(&self, info: &TensorInfo) -> Result<TensorBytes, GgufError> {
        let outside = || {
            let subject = Subject::Tensor(info.name.clone());
            let found = format_args!("{} bytes at {} of part {}", info.n_bytes, info.offset, info.shard_idx);
            let label = self.shards[0].label().clone();
            GgufError::new(
                GgufErrorKind::TensorOutside,
                label,
                info.field_offset,
                subject,
                "a tensor of this file",
                found,
            )
        };
        let shard = self.shards.get(info.shard_idx).ok_or_else(outside)?;
        let start = usize::try_from(info.offset).map_err(|_| outside())?;
        let end = usize::try_from(info.offset + info.n_bytes).map_err(|_| outside())?;
        TensorBytes::new(shard.backing()?, start..end).ok_or_else(outside)
    }

    /// An error about a tensor of this file, for checks that its reader makes, such as its shape.
    pub fn invalid_tensor(
        &self,
        info: &TensorInfo,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> GgufError {
        let label = self.shards.get(info.shard_idx).unwrap_or(&self.shards[0]).label().clone();
        let subject = Subject::Tensor(info.name.clone());
        GgufError::new(GgufErrorKind::BadValue, label, info.field_offset, subject, expected, found)
    }
}

fn read_memory(label: &Arc<str>, bytes: &[u8]) -> Result<Table, GgufError> {
    let table = table::read_table(std::io::Cursor::new(bytes), bytes.len() as u64, label)?;
    if table.metadata.opt_u32("split.count")?.is_some_and(|n| n > 1) {
        return Err(table.metadata.invalid("split.count", "an unsplit file in memory"));
    }
    Ok(table)
}

#[cfg(test)]
mod tests;
