//! What can go wrong when tensor data is decoded or encoded.

use super::DType;

/// Why data could not be decoded or encoded. Nothing of the output is meaningful after an error.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum DTypeError {
    /// The number of elements is not a whole number of blocks.
    #[error("{dtype} holds whole blocks of {} elements, found {n_elems} elements; choose another type for this row length", dtype.block_elems())]
    PartialBlock {
        /// The format asked for.
        dtype: DType,
        /// Elements given.
        n_elems: usize,
    },
    /// The byte buffer does not fit the number of elements.
    #[error("{n_elems} elements of {dtype} take {expected} bytes, found {found}")]
    ByteLength {
        /// The format asked for.
        dtype: DType,
        /// Elements given.
        n_elems: usize,
        /// Bytes that these take.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// An infinity or NaN, which the format cannot hold.
    #[error("{dtype} cannot hold {value} at element {index}; quantised types take finite values only")]
    NotFinite {
        /// The format asked for.
        dtype: DType,
        /// Index of the element in the input.
        index: usize,
        /// The element.
        value: f32,
    },
    /// A finite element so large that the scale of its block overflows.
    #[error("{dtype} cannot hold {value} at element {index}: the scale of its block exceeds 65504, the largest f16")]
    TooLarge {
        /// The format asked for.
        dtype: DType,
        /// Index of the element in the input.
        index: usize,
        /// The element.
        value: f32,
    },
}
