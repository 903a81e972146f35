//! The block formats of tensor data: one table, one file per format.
//!
//! A tensor's rows are cut into blocks of [`DType::block_elems`] consecutive elements which take
//! [`DType::block_bytes`] bytes each. The numeric ids are those of `ggml_type` (ggml `docs/gguf.md`).

/// A format of tensor data that Playhouse can load and run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
