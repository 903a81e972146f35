//! `Q4_K`: blocks of 256 in 8 sub-blocks of 32, `x = (d * scale) * q - (dmin * min)`, `q` in 0..16.
//! 144 bytes, 4.5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::f16::Half;
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
