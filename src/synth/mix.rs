//! Which type each tensor gets: the mixes of llama.cpp's quantiser, without an importance matrix.
//!
//! Source: the rules in llama.cpp `src/llama-quant.cpp` (MIT licence), stated in our own words:
//! norms, biases, routers and sinks stay F32; a K-quant whose name ends in `_M` gives some layers' value and down
//! projections more bits; the output matrix gets 6 bits or more; a row that is no multiple of 256 falls back to a type
//! with blocks of 32. GPT-OSS's experts are MXFP4 in every published file whatever the rest is.

use super::shapes::{Arch, Shape};
use crate::dtype::DType;

/// A mix of tensor types, by the name that files carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs, reason = "the names that the field writes")]
pub enum FileType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Name, `general.file_type`, and the type of tensors that no rule is about.
const TABLE: &[(FileType, &str, u32, DType)] = &[
    (FileType::F32, "F32", 0, DType::F32),
    (FileType::F16, "F16", 1, DType::F16),
    (FileType::BF16, "BF16", 32, DType::BF16),
    (FileType::Q4_0, "Q4_0", 2, DType::Q4_0),
    (FileType::Q4_1, "Q4_1", 3, DType::Q4_1),
    (FileType::Q5_0, "Q5_0", 8, DType::Q5_0),
    (FileType::Q5_1, "Q5_1", 9, DType::Q5_1),
    (FileType::Q8_0, "Q8_0", 7, DType::Q8_0),
    (FileType::Q2_K, "Q2_K", 10, DType::Q2_K),
    (FileType::Q3_K_S, "Q3_K_S", 11, DType::Q3_K),
    (FileType::Q3_K_M, "Q3_K_M", 12, DType::Q3_K),
    (FileType::Q3_K_L, "Q3_K_L", 13, DType::Q3_K),
    (FileType::Q4_K_S, "Q4_K_S", 14, DType::Q4_K),
    (FileType::Q4_K_M, "Q4_K_M", 15, DType::Q4_K),
    (FileType::Q5_K_S, "Q5_K_S", 16, DType::Q5_K),
    (FileType::Q5_K_M, "Q5_K_M", 17, DType::Q5_K),
    (FileType::Q6_K, "Q6_K", 18, DType::Q6_K),
    (FileType::IQ4_NL, "IQ4_NL", 25, DType::IQ4_NL),
    (FileType::IQ4_XS, "IQ4_XS", 30, DType::IQ4_XS),
    (FileType::MXFP4, "MXFP4", 38, DType::MXFP4),
];

/// What a matrix does, as far as the rules care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Embedding,
    /// The output matrix, or the embedding where it is both.
    Output,
    Value,
    Qkv,
    AttnOutput,
    Gate,
    Up,
    Down,
    Experts,
    /// Query and key.
    Other,
}

impl FileType {
    /// Every type, in the order of the help text.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The type with this name, in any case.
    pub fn named(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1.eq_ignore_ascii_case(name)).map(|row| row.0)
    }

    /// The name, such as `Q4_K_M`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The value of `general.file_type` (llama.cpp's `llama_ftype`).
    pub fn id(self) -> u32 {
        self.row().2
    }

    fn row(self) -> &'static (Self, &'static str, u32, DType) {
        TABLE.iter().find(|row| row.0 == self).expect("every variant has a row")
    }

    /// The type of a matrix with rows of `row_len` in layer `layer`.
    pub(super) fn dtype(self, shape: &Shape, role: Role, layer: u32, row_len: u64) -> DType {
        fallback(self.wanted(shape, role, layer, row_len), row_len)
    }

    fn wanted(self, shape: &Shape, role: Role, layer: u32, row_len: u64) -> DType {
        use FileType::*;
        let base = self.row().3;
        let n_layers = shape.n_layers;
        let more_bits = use_more_bits(layer, n_layers);
        let grouped = shape.n_heads / shape.n_kv_heads >= 4;
        let is_moe = shape.experts.is_some();
        match (role, self) {
            (_, F32 | F16 | BF16) if role != Role::Experts => base,
            (Role::Experts, F32) => DType::F32,
            (Role::Experts, _) if shape.arch == Arch::GptOss => DType::MXFP4,
            // No dense MXFP4 files are published; this one serves tests of the format.
            (Role::Gate | Role::Up | Role::Down, MXFP4) if !is_moe => DType::MXFP4,
            (_, MXFP4) => DType::Q8_0,
            (Role::Output, Q8_0) => DType::Q8_0,
            (Role::Output, _) if !row_len.is_multiple_of(256) => DType::Q8_0,
            (Role::Output, _) => DType::Q6_K,

            (Role::Value, Q2_K) => {
                if grouped {
                    DType::Q4_K
                } else {
                    DType::Q3_K
                }
            }
            (Role::Value, Q3_K_M) => {
                if layer < 2 {
                    DType::Q5_K
                } else {
                    DType::Q4_K
                }
            }
            (Role::Value, Q3_K_L) => DType::Q5_K,
            (Role::Value, IQ4_NL | IQ4_XS) if grouped => DType::Q5_K,
            (Role::Value, Q4_K_M | Q5_K_M) if more_bits => DType::Q6_K,
            (Role::Value, Q4_K_S) if layer < 4 => DType::Q5_K,

            (Role::Down, Q2_K) => DType::Q3_K,
            (Role::Down, Q3_K_M) => {
                if layer < n_layers / 16 {
                    DType::Q5_K
                } else {
                    DType::Q4_K
                }
            }
            (Role::Down, Q3_K_L) => DType::Q5_K,
            (Role::Down, Q4_K_M | Q5_K_M) if more_bits => DType::Q6_K,
            (Role::Down, Q4_K_S | IQ4_NL | IQ4_XS) if layer < n_layers / 8 => DType::Q5_K,

            (Role::AttnOutput, Q2_K) => DType::Q3_K,
            (Role::AttnOutput, Q3_K_M) => DType::Q4_K,
            (Role::AttnOutput, Q3_K_L) => DType::Q5_K,

            (Role::Qkv, Q3_K_M | Q3_K_L) => DType::Q4_K,
            (Role::Qkv, Q4_K_M) => DType::Q5_K,
            (Role::Qkv, Q5_K_M) => DType::Q6_K,
            _ => base,
        }
    }
}

/// The first and last eighth of the layers, and every third between.
fn use_more_bits(layer: u32, n_layers: u32) -> bool {
    let eighth = n_layers / 8;
    layer < eighth || layer >= 7 * n_layers / 8 || (layer - eighth) % 3 == 2
}

/// The type itself where rows are whole blocks of it, otherwise one of about its size with smaller blocks.
fn fallback(dtype: DType, row_len: u64) -> DType {
    let fits = |d: DType| row_len.is_multiple_of(d.block_elems() as u64);
    if fits(dtype) {
        return dtype;
    }
    let smaller = match dtype {
        DType::Q2_K | DType::Q3_K | DType::IQ4_XS => DType::IQ4_NL,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    };
    if fits(smaller) { smaller } else { DType::F16 }
}
