//! Tensor descriptions: shape, type, and a byte range that is known to lie in the file and to be nobody else's.

use std::io::{BufRead, Seek};

use super::cursor::{Cursor, Place, StrRule};
use super::error::{GgufError, GgufErrorKind as Kind};
use super::limits::{MAX_DIMS, MAX_TENSOR_NAME_BYTES};
use crate::dtype::{self, DType};

/// A tensor of a file. Its bytes come from [`super::GgufFile::bytes`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, unique in the file.
    pub name: String,
    /// How the elements are encoded.
    pub dtype: DType,
    /// One to four sizes in ggml's order: `dims[0]` is the length of a row, neighbouring elements in memory.
    pub dims: Vec<u64>,
    pub(super) n_elems: u64,
    pub(super) n_bytes: u64,
    /// Bytes from the start of the file (of the part, where split).
    pub(super) offset: u64,
    /// Which part of a split file holds the data.
    pub(super) shard_idx: usize,
    /// Where the description's offset field stands, for errors.
    pub(super) field_offset: u64,
}

impl TensorInfo {
    /// The number of elements.
    pub fn n_elems(&self) -> u64 {
        self.n_elems
    }

    /// The number of bytes, without padding.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Elements of one row: `dims[0]`.
    pub fn row_len(&self) -> u64 {
        self.dims[0]
    }

    /// The number of rows: the product of all dimensions but the first.
    pub fn n_rows(&self) -> u64 {
        self.n_elems / self.dims[0]
    }

    /// Bytes from the start of the file (of the part, where split) to the data.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Which part of a split file holds the data; 0 for a single file.
    pub fn shard_idx(&self) -> usize {
        self.shard_idx
    }
}

/// Elements and bytes of a tensor, or why it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SizeError {
    Zero { dim: usize },
    Overflow,
    Ragged { block: usize },
}

/// Sizes below 2^63, so that no later sum of two can overflow 64 bits.
pub(super) fn tensor_size(dims: &[u64], dtype: DType) -> Result<(u64, u64), SizeError> {
    if let Some(dim) = dims.iter().position(|&d| d == 0) {
        return Err(SizeError::Zero { dim });
    }
    let max = i64::MAX as u64;
    let n_elems = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= max);
    let n_elems = n_elems.ok_or(SizeError::Overflow)?;
    let (elems, bytes) = (dtype.block_elems() as u64, dtype.block_bytes() as u64);
    let row_len = dims.first().copied().unwrap_or(0);
    if !row_len.is_multiple_of(elems) {
        return Err(SizeError::Ragged { block: dtype.block_elems() });
    }
    let n_bytes = (n_elems / elems).checked_mul(bytes).filter(|&n| n <= max).ok_or(SizeError::Overflow)?;
    Ok((n_elems, n_bytes))
}

/// Reads the tensor description with index `idx`; [`TensorInfo::offset`] is still relative to the data section.
pub(super) fn read_info<R: BufRead + Seek>(cur: &mut Cursor<R>, idx: u64) -> Result<TensorInfo, GgufError> {
    let rule = StrRule { max_bytes: MAX_TENSOR_NAME_BYTES, is_name: true };
    let name = cur.string(Place::TensorIndex(idx), rule, "tensor name")?;
    let place = Place::Tensor(&name);

    let offset = cur.pos();
    let n_dims = cur.u32(place, "number of dimensions")?;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(cur.error(Kind::BadDimCount, place, offset, format_args!("1 to {MAX_DIMS} dimensions"), n_dims));
    }
    let dims_offset = cur.pos();
    let dims = (0..n_dims).map(|_| cur.u64(place, "dimension")).collect::<Result<Vec<_>, _>>()?;
    let dtype = read_dtype(cur, place)?;
    let (n_elems, n_bytes) =
        tensor_size(&dims, dtype).map_err(|e| size_error(cur, place, dims_offset, &dims, dtype, e))?;
    let field_offset = cur.pos();
    let offset = cur.u64(place, "data offset")?;
    Ok(TensorInfo { name, dtype, dims, n_elems, n_bytes, offset, shard_idx: 0, field_offset })
}

fn read_dtype<R: BufRead + Seek>(cur: &mut Cursor<R>, place: Place<'_>) -> Result<DType, GgufError> {
    let offset = cur.pos();
    let id = cur.u32(place, "tensor type")?;
    if let Some(dtype) = DType::from_id(id) {
        return Ok(dtype);
    }
    let known = DType::ALL.iter().map(|d| d.name()).collect::<Vec<_>>().join(", ");
    Err(match dtype::type_name(id) {
        Some(name) => {
            let expected = format_args!("one of {known}");
            cur.error(Kind::UnsupportedTensorType, place, offset, expected, format_args!("{name} (type {id})"))
        }
        None => cur.error(Kind::UnknownTensorType, place, offset, "the id of a ggml type", id),
    })
}

fn size_error<R: BufRead + Seek>(
    cur: &Cursor<R>,
    place: Place<'_>,
    dims_offset: u64,
    dims: &[u64],
    dtype: DType,
    error: SizeError,
) -> GgufError {
    let shape = format!("{dims:?}");
    match error {
        SizeError::Zero { dim } => {
            let expected = "dimensions of at least 1";
            let found = format_args!("dimension {dim} of {shape} is 0");
            cur.error(Kind::ZeroDim, place, dims_offset + 8 * dim as u64, expected, found)
        }
        SizeError::Overflow => {
            let expected = "a tensor of less than 2^63 elements and bytes";
            cur.error(Kind::SizeOverflow, place, dims_offset, expected, format_args!("{} {shape}", dtype.name()))
        }
        SizeError::Ragged { block } => {
            let expected = format_args!("rows of a multiple of {block} elements for {}", dtype.name());
            cur.error(Kind::RaggedRow, place, dims_offset, expected, format_args!("rows of {}", dims[0]))
        }
    }
}

/// Checks that all data lies in the file, aligned and disjoint, and makes the offsets relative to the file's start.
pub(super) fn place_data<R: BufRead + Seek>(
    cur: &Cursor<R>,
    tensors: &mut [TensorInfo],
    data_start: u64,
    alignment: u64,
) -> Result<(), GgufError> {
    let file_len = cur.file_len();
    for t in tensors.iter_mut() {
        let place = Place::Tensor(&t.name);
        if t.offset % alignment != 0 {
            let expected = format_args!("a data offset that is a multiple of {alignment}");
            return Err(cur.error(Kind::MisalignedTensor, place, t.field_offset, expected, t.offset));
        }
        let start = data_start.checked_add(t.offset);
        let end = start.and_then(|s| s.checked_add(t.n_bytes));
        let (Some(start), Some(_)) = (start, end.filter(|&e| e <= file_len)) else {
            let expected = format_args!("data before the end of the file at byte {file_len}");
            let found = format_args!("{} bytes at {data_start} + {}", t.n_bytes, t.offset);
            return Err(cur.error(Kind::TensorOutside, place, t.field_offset, expected, found));
        };
        t.offset = start;
    }
    let mut by_start: Vec<&TensorInfo> = tensors.iter().collect();
    by_start.sort_unstable_by_key(|t| (t.offset, t.field_offset));
    for pair in by_start.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        if a.offset + a.n_bytes > b.offset {
            let expected = format_args!(
                "data that starts after tensor `{}` ends at byte {}",
                super::error::quote(&a.name),
                a.offset + a.n_bytes
            );
            let found = format_args!("data at byte {}", b.offset);
            return Err(cur.error(Kind::TensorOverlap, Place::Tensor(&b.name), b.field_offset, expected, found));
        }
    }
    Ok(())
}
