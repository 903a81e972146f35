//! The block formats of tensor data: one table, one file per format.
//!
//! A tensor's rows are cut into blocks of [`DType::block_elems`] consecutive elements which take
//! [`DType::block_bytes`] bytes each. The numeric ids are those of `ggml_type` (ggml `docs/gguf.md`).
//!
//! Each format's file has its block as a plain struct (little-endian, alignment 1), its scalar decoder, which is the
//! reference for every kernel on every device, and its encoder. Decoders round after every operation, in the order that
//! the file's formula shows, so that the decoded bits are the same everywhere.

mod error;
pub mod f32;
pub mod f16;
pub mod bf16;
pub mod q4_0;
pub mod q4_1;
pub mod q5_0;
pub mod q5_1;
pub mod q8_0;
pub mod q2_k;
pub mod q3_k;
pub mod k_scales;
pub mod q4_k;
pub mod q5_k;
pub mod q6_k;
pub mod iq4_nl;
pub mod iq4_xs;
pub mod mxfp4;
mod encode;
mod fit;
mod random;

use bytemuck::Pod;

pub use error::DTypeError;
pub use random::{FILL_ELEMS, RandomBlocks};

/// A format of tensor data that Playhouse can load and run.
///
/// Serialises as its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[allow(non_camel_case_types, reason = "the field writes Q4_K, not Q4K")]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// 4 bits, one f16 scale per 32.
    Q4_0,
    /// 4 bits, one f16 scale and one f16 minimum per 32.
    Q4_1,
    /// 5 bits, one f16 scale per 32.
    Q5_0,
    /// 5 bits, one f16 scale and one f16 minimum per 32.
    Q5_1,
    /// 8 bits, one f16 scale per 32.
    Q8_0,
    /// 2 bits, 16 sub-blocks of 16 with 4-bit scales and minima per 256.
    Q2_K,
    /// 3 bits, 16 sub-blocks of 16 with 6-bit scales per 256.
    Q3_K,
    /// 4 bits, 8 sub-blocks of 32 with 6-bit scales and minima per 256.
    Q4_K,
    /// 5 bits, 8 sub-blocks of 32 with 6-bit scales and minima per 256.
    Q5_K,
    /// 6 bits, 16 sub-blocks of 16 with 8-bit scales per 256.
    Q6_K,
    /// 4-bit indices into a table of 16 values, one f16 scale per 32.
    IQ4_NL,
    /// 4-bit indices into a table of 16 values, 8 sub-blocks of 32 with 6-bit scales per 256.
    IQ4_XS,
    /// E2M1 values, one E8M0 scale per 32 (OCP Microscaling v1.0).
    MXFP4,
}

type DecodeFn = fn(&[u8], &mut [f32]);
type EncodeFn = fn(&[f32], &mut [u8]) -> Result<(), DTypeError>;

/// What there is to know about a format.
struct Row {
    dtype: DType,
    id: u32,
    name: &'static str,
    elems: usize,
    bytes: usize,
    /// Lengths are checked by the caller.
    decode: DecodeFn,
    /// Lengths are checked by the caller.
    encode: EncodeFn,
}

/// One row per format, in the order of [`DType`].
const TABLE: [Row; 16] = [
    Row {
        dtype: DType::F32,
        id: 0,
        name: "F32",
        elems: f32::ELEMS,
        bytes: size_of::<f32::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, f32::decode_block),
        encode: |x, bytes| encode::each_block(DType::F32, x, bytes, f32::encode_block),
    },
    Row {
        dtype: DType::F16,
        id: 1,
        name: "F16",
        elems: f16::ELEMS,
        bytes: size_of::<f16::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, f16::decode_block),
        encode: f16::encode,
    },
    Row {
        dtype: DType::BF16,
        id: 30,
        name: "BF16",
        elems: bf16::ELEMS,
        bytes: size_of::<bf16::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, bf16::decode_block),
        encode: |x, bytes| encode::each_block(DType::BF16, x, bytes, bf16::encode_block),
    },
    Row {
        dtype: DType::Q4_0,
        id: 2,
        name: "Q4_0",
        elems: q4_0::ELEMS,
        bytes: size_of::<q4_0::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q4_0::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q4_0, x, bytes, q4_0::encode_block),
    },
    Row {
        dtype: DType::Q4_1,
        id: 3,
        name: "Q4_1",
        elems: q4_1::ELEMS,
        bytes: size_of::<q4_1::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q4_1::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q4_1, x, bytes, q4_1::encode_block),
    },
    Row {
        dtype: DType::Q5_0,
        id: 6,
        name: "Q5_0",
        elems: q5_0::ELEMS,
        bytes: size_of::<q5_0::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q5_0::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q5_0, x, bytes, q5_0::encode_block),
    },
    Row {
        dtype: DType::Q5_1,
        id: 7,
        name: "Q5_1",
        elems: q5_1::ELEMS,
        bytes: size_of::<q5_1::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q5_1::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q5_1, x, bytes, q5_1::encode_block),
    },
    Row {
        dtype: DType::Q8_0,
        id: 8,
        name: "Q8_0",
        elems: q8_0::ELEMS,
        bytes: size_of::<q8_0::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q8_0::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q8_0, x, bytes, q8_0::encode_block),
    },
    Row {
        dtype: DType::Q2_K,
        id: 10,
        name: "Q2_K",
        elems: q2_k::ELEMS,
        bytes: size_of::<q2_k::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q2_k::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q2_K, x, bytes, q2_k::encode_block),
    },
    Row {
        dtype: DType::Q3_K,
        id: 11,
        name: "Q3_K",
        elems: q3_k::ELEMS,
        bytes: size_of::<q3_k::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q3_k::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q3_K, x, bytes, q3_k::encode_block),
    },
    Row {
        dtype: DType::Q4_K,
        id: 12,
        name: "Q4_K",
        elems: q4_k::ELEMS,
        bytes: size_of::<q4_k::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q4_k::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q4_K, x, bytes, q4_k::encode_block),
    },
    Row {
        dtype: DType::Q5_K,
        id: 13,
        name: "Q5_K",
        elems: q5_k::ELEMS,
        bytes: size_of::<q5_k::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q5_k::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q5_K, x, bytes, q5_k::encode_block),
    },
    Row {
        dtype: DType::Q6_K,
        id: 14,
        name: "Q6_K",
        elems: q6_k::ELEMS,
        bytes: size_of::<q6_k::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, q6_k::decode_block),
        encode: |x, bytes| encode::each_block(DType::Q6_K, x, bytes, q6_k::encode_block),
    },
    Row {
        dtype: DType::IQ4_NL,
        id: 20,
        name: "IQ4_NL",
        elems: iq4_nl::ELEMS,
        bytes: size_of::<iq4_nl::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, iq4_nl::decode_block),
        encode: |x, bytes| encode::each_block(DType::IQ4_NL, x, bytes, iq4_nl::encode_block),
    },
    Row {
        dtype: DType::IQ4_XS,
        id: 23,
        name: "IQ4_XS",
        elems: iq4_xs::ELEMS,
        bytes: size_of::<iq4_xs::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, iq4_xs::decode_block),
        encode: |x, bytes| encode::each_block(DType::IQ4_XS, x, bytes, iq4_xs::encode_block),
    },
    Row {
        dtype: DType::MXFP4,
        id: 39,
        name: "MXFP4",
        elems: mxfp4::ELEMS,
        bytes: size_of::<mxfp4::Block>(),
        decode: |bytes, out| each_decoded(bytes, out, mxfp4::decode_block),
        encode: |x, bytes| encode::each_block(DType::MXFP4, x, bytes, mxfp4::encode_block),
    },
];

/// `ggml_type` ids that we refuse, so that the refusal can name them. Some were withdrawn by ggml.
const REFUSED: &[(u32, &str)] = &[
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// The name of any `ggml_type` id we have heard of, those that Playhouse cannot load included.
pub fn type_name(id: u32) -> Option<&'static str> {
    let refused = || REFUSED.iter().find(|(other, _)| *other == id).map(|(_, name)| *name);
    DType::from_id(id).map(DType::name).or_else(refused)
}

impl DType {
    /// Every format, in the order of declaration.
    pub const ALL: &[DType] = &{
        let mut all = [DType::F32; TABLE.len()];
        let mut i = 0;
        while i < all.len() {
            all[i] = TABLE[i].dtype;
            i += 1;
        }
        all
    };

    const fn row(self) -> &'static Row {
        const ROWS: &[Row; 16] = &TABLE;
        &ROWS[self as usize]
    }

    /// The `ggml_type` number in a GGUF file.
    pub const fn id(self) -> u32 {
        self.row().id
    }

    /// The format with this `ggml_type` number; `None` if Playhouse cannot load it (see [`type_name`]).
    pub fn from_id(id: u32) -> Option<DType> {
        TABLE.iter().find(|row| row.id == id).map(|row| row.dtype)
    }

    /// The name as the field writes it: `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The format of this name, in either case.
    pub fn from_name(name: &str) -> Option<DType> {
        TABLE.iter().find(|row| row.name.eq_ignore_ascii_case(name)).map(|row| row.dtype)
    }

    /// Consecutive elements of a row that share a block; 1 for the floating-point formats.
    pub const fn block_elems(self) -> usize {
        self.row().elems
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.row().bytes
    }

    /// Bytes of `n_elems` consecutive elements; `None` if they are not whole blocks or the product overflows.
    pub const fn row_bytes(self, n_elems: usize) -> Option<usize> {
        let row = self.row();
        if !n_elems.is_multiple_of(row.elems) {
            return None;
        }
        (n_elems / row.elems).checked_mul(row.bytes)
    }

    /// Decodes `out.len()` elements: the reference for every kernel.
    ///
    /// Any bytes are valid data. A non-finite scale in them gives non-finite elements; a NaN's payload is not
    /// specified.
    ///
    /// # Errors
    /// [`DTypeError::PartialBlock`] and [`DTypeError::ByteLength`], before anything is written.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) -> Result<(), DTypeError> {
        self.check_lengths(out.len(), bytes.len())?;
        (self.row().decode)(bytes, out);
        Ok(())
    }

    /// Encodes `x`, rounding as the format's file says.
    ///
    /// # Errors
    /// [`DTypeError::PartialBlock`] and [`DTypeError::ByteLength`] before anything is written;
    /// [`DTypeError::NotFinite`] and [`DTypeError::TooLarge`] from the quantised formats.
    pub fn encode(self, x: &[f32], bytes: &mut [u8]) -> Result<(), DTypeError> {
        self.check_lengths(x.len(), bytes.len())?;
        (self.row().encode)(x, bytes)
    }

    fn check_lengths(self, n_elems: usize, found: usize) -> Result<(), DTypeError> {
        match self.row_bytes(n_elems) {
            None => Err(DTypeError::PartialBlock { dtype: self, n_elems }),
            Some(expected) if expected != found => {
                Err(DTypeError::ByteLength { dtype: self, n_elems, expected, found })
            }
            Some(_) => Ok(()),
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[inline(always)]
fn each_decoded<B: Pod, const N: usize>(bytes: &[u8], out: &mut [f32], decode: impl Fn(&B, &mut [f32; N])) {
    for (block, out) in bytemuck::cast_slice::<u8, B>(bytes).iter().zip(out.as_chunks_mut::<N>().0) {
        decode(block, out);
    }
}
