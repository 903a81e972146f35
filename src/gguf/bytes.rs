//! Tensor data: cheap handles on ranges of a memory map or of memory.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of tensor data: a cheap handle on a range of a file's memory map or of memory.
///
/// Handles keep their backing alive. The bytes that [`super::GgufFile::bytes`] returns start at a multiple of 8 in
/// memory, so that the blocks of every [`crate::dtype::DType`] may be read in place.
#[derive(Clone)]
pub struct TensorBytes {
    backing: Arc<Backing>,
    range: Range<usize>,
}

/// Where bytes live.
#[derive(Debug)]
pub(super) enum Backing {
    Static(&'static [u8]),
    Owned(Vec<u8>),
    Aligned(AlignedBytes),
    Map(Mapped),
}

/// A read-only map of a whole file.
#[derive(Debug)]
pub(super) struct Mapped {
    map: memmap2::Mmap,
    path: PathBuf,
}

/// Memory whose first byte is aligned to 32, as a map's is to a page.
#[derive(Debug)]
pub(super) struct AlignedBytes {
    chunks: Vec<Chunk>,
    len: usize,
}

#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(32))]
struct Chunk([u8; 32]);

impl AlignedBytes {
    pub(super) fn copy_of(bytes: &[u8]) -> Self {
        let mut chunks = vec![Chunk([0; 32]); bytes.len().div_ceil(32)];
        bytemuck::cast_slice_mut(&mut chunks)[..bytes.len()].copy_from_slice(bytes);
        Self { chunks, len: bytes.len() }
    }
}

impl Deref for Backing {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Aligned(bytes) => &bytemuck::cast_slice(&bytes.chunks)[..bytes.len],
            Self::Map(mapped) => &mapped.map,
        }
    }
}

fn is_aligned(bytes: &[u8]) -> bool {
    bytes.as_ptr().addr().is_multiple_of(8)
}

impl Backing {
    /// Static memory in place where it is aligned to 8, otherwise a copy.
    pub(super) fn from_static(bytes: &'static [u8]) -> Self {
        if is_aligned(bytes) { Self::Static(bytes) } else { Self::Aligned(AlignedBytes::copy_of(bytes)) }
    }

    /// Memory in place where it is aligned to 8 (as allocators do), otherwise a copy.
    pub(super) fn from_vec(bytes: Vec<u8>) -> Self {
        if is_aligned(&bytes) { Self::Owned(bytes) } else { Self::Aligned(AlignedBytes::copy_of(&bytes)) }
    }

    /// Maps a whole file for reading.
    ///
    /// # Errors
    /// What `mmap` says.
    pub(super) fn map(file: &File, path: &Path) -> std::io::Result<Self> {
        // SAFETY: the file was opened read-only and is mapped privately for reading. The map is undefined behaviour,
        // or SIGBUS, if somebody truncates or writes the file while we use it. Nothing can rule that out for a file
        // that others may write; we narrow it down: the caller compares length and modification time before and
        // after mapping with those at parsing, nothing but tensor data is read through the map (a changed weight
        // is a wrong number, not a wrong length or offset), and only a process that runs a model ever maps, which
        // its supervisor restarts.
        let map = unsafe { memmap2::MmapOptions::new().map_copy_read_only(file)? };
        Ok(Self::Map(Mapped { map, path: path.to_owned() }))
    }
}

impl TensorBytes {
    /// `range` of `backing`, `None` where it is not inside.
    pub(super) fn new(backing: Arc<Backing>, range: Range<usize>) -> Option<Self> {
        backing.get(range.clone())?;
        Some(Self { backing, range })
    }

    /// Bytes in memory.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { backing: Arc::new(Backing::from_vec(bytes)), range }
    }

    /// A part of these bytes.
    ///
    /// # Panics
    /// Where `range` reaches beyond the end or is reversed, as for slices.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.range.len(),
            "slice {range:?} of {} bytes",
            self.range.len()
        );
        let start = self.range.start + range.start;
        Self { backing: self.backing.clone(), range: start..start + range.len() }
    }

    /// The file, offset and length behind these bytes, for loaders that read it directly; `None` for memory.
    pub fn file_range(&self) -> Option<(&Path, u64, u64)> {
        match &*self.backing {
            Backing::Map(mapped) => Some((&mapped.path, self.range.start as u64, self.range.len() as u64)),
            Backing::Static(_) | Backing::Owned(_) | Backing::Aligned(_) => None,
        }
    }
}

impl Deref for TensorBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.backing[self.range.clone()]
    }
}

impl std::fmt::Debug for TensorBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TensorBytes({} bytes)", self.range.len())
    }
}
