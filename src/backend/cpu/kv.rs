//! The paged KV cache in memory.
//!
//! Keys and values are two arrays of rows, one row per head and token, ordered
//! `[layer][block][kv head][token in block]`: the 32 keys of a head in a block are one run, which attention reads
//! as a matrix of the row's format.

use super::matmul::Mat;
use crate::backend::{BLOCK_TOKENS, BackendError, KvDtype, KvLayout};
use crate::dtype::DType;

/// Keys and values of every layer.
pub(super) struct KvCache {
    layout: KvLayout,
    row_bytes: usize,
    /// Words, so that rows of f32 are aligned.
    keys: Vec<u32>,
    values: Vec<u32>,
}

impl KvCache {
    /// Allocates zeros.
    pub(super) fn new(layout: KvLayout) -> Result<Self, BackendError> {
        let half = usize::try_from(layout.bytes() / 2).unwrap_or(usize::MAX);
        let what = format!("the KV cache of {} blocks", layout.n_blocks);
        Ok(Self {
            layout,
            row_bytes: layout.dtype.row_bytes(layout.head_dim),
            keys: super::allocate(half.div_ceil(4), &what)?,
            values: super::allocate(half.div_ceil(4), &what)?,
        })
    }

    /// Bytes of keys and values.
    pub(super) fn bytes(&self) -> u64 {
        4 * (self.keys.len() + self.values.len()) as u64
    }

    /// Asserts that the heads of an op are those of the cache.
    pub(super) fn check(&self, layer: usize, n_kv_heads: usize, head_dim: usize) {
        let l = &self.layout;
        assert!(
            layer < l.n_layers && n_kv_heads == l.n_kv_heads && head_dim == l.head_dim,
            "layer {layer} with {n_kv_heads} heads of {head_dim}: the KV cache has {} layers, {} heads of {}",
            l.n_layers,
            l.n_kv_heads,
            l.head_dim
        );
    }

    fn head_bytes(&self) -> usize {
        BLOCK_TOKENS * self.row_bytes
    }

    fn block_bytes(&self) -> usize {
        self.layout.n_kv_heads * self.head_bytes()
    }

    /// Offset of a head's rows in a block.
    fn offset(&self, layer: usize, block: usize, head: usize) -> usize {
        assert!(block < self.layout.n_blocks, "KV block {block} of {}", self.layout.n_blocks);
        (layer * self.layout.n_blocks + block) * self.block_bytes() + head * self.head_bytes()
    }

    /// Stores the key and value of one token, `[NKV * HS]` each.
    pub(super) fn write(&mut self, layer: usize, slot: usize, key: &[f32], value: &[f32]) {
        let (block, token) = (slot / BLOCK_TOKENS, slot % BLOCK_TOKENS);
        let hs = self.layout.head_dim;
        for head in 0..self.layout.n_kv_heads {
            let at = self.offset(layer, block, head) + token * self.row_bytes;
            let (dtype, row) = (self.layout.dtype, at..at + self.row_bytes);
            encode(dtype, &key[head * hs..][..hs], &mut bytemuck::cast_slice_mut(&mut self.keys)[row.clone()]);
            encode(dtype, &value[head * hs..][..hs], &mut bytemuck::cast_slice_mut(&mut self.values)[row]);
        }
    }

    /// Keys and values of a head in a block, as matrices of [`BLOCK_TOKENS`] rows.
    pub(super) fn block(&self, layer: usize, block: usize, head: usize) -> (Mat<'_>, Mat<'_>) {
        let at = self.offset(layer, block, head);
        let mat = |bytes| Mat {
            dtype: row_dtype(self.layout.dtype),
            bytes,
            row_bytes: self.row_bytes,
            n_rows: BLOCK_TOKENS,
            n_cols: self.layout.head_dim,
        };
        (
            mat(&bytemuck::cast_slice(&self.keys)[at..][..self.head_bytes()]),
            mat(&bytemuck::cast_slice(&self.values)[at..][..self.head_bytes()]),
        )
    }

    /// Copies whole blocks in every layer.
    pub(super) fn copy_blocks(&mut self, pairs: &[(u32, u32)]) {
        let len = self.block_bytes();
        for layer in 0..self.layout.n_layers {
            for &(from, to) in pairs {
                let (from, to) = (self.offset(layer, from as usize, 0), self.offset(layer, to as usize, 0));
                bytemuck::cast_slice_mut::<u32, u8>(&mut self.keys).copy_within(from..from + len, to);
                bytemuck::cast_slice_mut::<u32, u8>(&mut self.values).copy_within(from..from + len, to);
            }
        }
    }
}

fn row_dtype(dtype: KvDtype) -> DType {
    match dtype {
        KvDtype::F32 => DType::F32,
        KvDtype::F16 => DType::F16,
        KvDtype::Q8_0 => DType::Q8_0,
    }
}

fn encode(dtype: KvDtype, row: &[f32], out: &mut [u8]) {
    match dtype {
        KvDtype::F32 => out.copy_from_slice(bytemuck::cast_slice(row)),
        KvDtype::F16 => {
            for (x, out) in row.iter().zip(out.chunks_exact_mut(2)) {
                out.copy_from_slice(&half::f16::from_f32(*x).to_le_bytes());
            }
        }
        KvDtype::Q8_0 => {
            for (x, out) in row.chunks(32).zip(out.chunks_exact_mut(34)) {
                encode_q8_0(x, out);
            }
        }
    }
}

/// At most 32 numbers as an f16 scale and 32 signed bytes; the largest magnitude becomes 127.
fn encode_q8_0(x: &[f32], out: &mut [u8]) {
    let max = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = max / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.fill(0);
    out[..2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes());
    for (x, q) in x.iter().zip(&mut out[2..]) {
        // `as` saturates, and `round` is exact: the same byte everywhere.
        *q = (x * inverse).round() as i8 as u8;
    }
}
