//! `Q2_K`: blocks of 256 in 16 sub-blocks of 16, `x = (d * scale) * q - (dmin * min)`, `q` in 0..4.
//! 84 bytes, 2.625 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::f16::Half;
use super::fit;

/// Elements of a block.
pub const ELEMS: usize = 256;

/// 256 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Sub-block `s`: scale in the low half of byte `s`, minimum in the high half.
    pub scales: [u8; 16],
    /// Element `i` of half `h` (128 elements): bits `2 * (i / 32)` and up of byte `32 * h + i % 32`.
    pub qs: [u8; 64],
    /// Scale of the scales.
    pub d: Half,
    /// Scale of the minima.
    pub dmin: Half,
}

const _: () = assert!(size_of::<Block>() == 84 && align_of::<Block>() == 1);

/// `out[i] = (d * scale) * q[i] - (dmin * min)`, each operation rounded.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let (d, dmin) = (block.d.to_f32(), block.dmin.to_f32());
    for (sub_idx, sub) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * (block.scales[sub_idx] & 0x0f) as f32;
        let min = dmin * (block.scales[sub_idx] >> 4) as f32;
        let first = 32 * (sub_idx / 8) + 16 * (sub_idx % 2);
        let shift = 2 * (sub_idx % 8 / 2);
        for (x, &byte) in sub.iter_mut().zip(&block.qs[first..first + 16]) {
            *x = scale * ((byte >> shift) & 3) as f32 - min;
        }
    }
}

/// Scales, minima and codes for the least squared error that the search in `fit.rs` finds.
///
/// `None` if an element is not finite or a scale exceeds the range of f16.
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let fit = fit::affine_block::<16, 16>(x, 3.0, 15.0)?;
    let mut block = Block {
        scales: std::array::from_fn(|s| fit.scales[s] | fit.mins[s] << 4),
        qs: [0; 64],
        d: fit.d,
        dmin: fit.dmin,
    };
    for (i, q) in fit.q.iter().enumerate() {
        block.qs[32 * (i / 128) + i % 32] |= q << (2 * (i % 128 / 32));
    }
    Some(block)
}
