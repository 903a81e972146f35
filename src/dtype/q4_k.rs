//! `Q4_K`: blocks of 256 in 8 sub-blocks of 32, `x = (d * scale) * q - (dmin * min)`, `q` in 0..16.
//! 144 bytes, 4.5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::f16::Half;
use super::fit;
use super::k_scales;

/// Elements of a block.
pub const ELEMS: usize = 256;

/// 256 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Scale of the scales.
    pub d: Half,
    /// Scale of the minima.
    pub dmin: Half,
    /// Eight scales and eight minima of 6 bits, see [`k_scales`].
    pub scales: [u8; 12],
    /// Sub-blocks `2 p` (low halves) and `2 p + 1` (high halves) share bytes `32 p .. 32 p + 32`.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<Block>() == 144 && align_of::<Block>() == 1);

/// `out[i] = (d * scale) * q[i] - (dmin * min)`, each operation rounded.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let (d, dmin) = (block.d.to_f32(), block.dmin.to_f32());
    let (scales, mins) = k_scales::unpack(&block.scales);
    for (sub_idx, sub) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = d * scales[sub_idx] as f32;
        let min = dmin * mins[sub_idx] as f32;
        let (first, shift) = (32 * (sub_idx / 2), 4 * (sub_idx % 2));
        for (x, &byte) in sub.iter_mut().zip(&block.qs[first..first + 32]) {
            *x = scale * ((byte >> shift) & 0x0f) as f32 - min;
        }
    }
}

/// Scales, minima and codes for the least squared error that the search in `fit.rs` finds.
///
/// `None` if an element is not finite or a scale exceeds the range of f16.
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let fit = fit::affine_block::<32, 8>(x, 15.0, 63.0)?;
    Some(Block { d: fit.d, dmin: fit.dmin, scales: k_scales::pack(&fit.scales, &fit.mins), qs: low_nibbles(&fit.q) })
}

/// The lower four bits of 256 codes, in the order of [`Block::qs`].
#[inline]
pub(super) fn low_nibbles(q: &[u8; 256]) -> [u8; 128] {
    std::array::from_fn(|i| {
        let first = 64 * (i / 32) + i % 32;
        (q[first] & 0x0f) | q[first + 32] << 4
    })
}
