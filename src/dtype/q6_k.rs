//! `Q6_K`: blocks of 256 in 16 sub-blocks of 16, `x = (d * scale) * (q - 32)`, `q` in 0..64.
//! 210 bytes, 6.5625 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::f16::Half;
use super::fit;

/// Elements of a block.
pub const ELEMS: usize = 256;

/// 256 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Lower four bits. Element `i` of half `h` (128 elements): byte `64 * h + i % 64`, low half for `i < 64`.
    pub ql: [u8; 128],
    /// Upper two bits. Element `i` of half `h`: bits `2 * (i / 32)` and up of byte `32 * h + i % 32`.
    pub qh: [u8; 64],
    /// One scale per sub-block, two's complement.
    pub scales: [i8; 16],
    /// Scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<Block>() == 210 && align_of::<Block>() == 1);

/// `out[i] = (d * scale) * (q[i] - 32)`, each operation rounded.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = block.d.to_f32();
    for (sub_idx, sub) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * block.scales[sub_idx] as f32;
        let (half, place) = (sub_idx / 8, 16 * (sub_idx % 8));
        let (low_first, low_shift) = (64 * half + place % 64, 4 * (place / 64));
        let (high_first, high_shift) = (32 * half + place % 32, 2 * (place / 32));
        for (i, x) in sub.iter_mut().enumerate() {
            let low = (block.ql[low_first + i] >> low_shift) & 0x0f;
            let high = (block.qh[high_first + i] >> high_shift) & 3;
            *x = scale * ((low | high << 4) as i32 - 32) as f32;
        }
    }
}

/// Scales and codes for the least squared error that the search in `fit.rs` finds.
///
/// `None` if an element is not finite or a scale exceeds the range of f16.
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let fit = fit::symmetric_block::<16, 16>(x, 32.0, 128.0)?;
    let mut block = Block { ql: [0; 128], qh: [0; 64], scales: fit.scales, d: fit.d };
    for (i, q) in fit.q.iter().enumerate() {
        let bits = (q + 32) as u8;
        let (half, i) = (i / 128, i % 128);
        block.ql[64 * half + i % 64] |= (bits & 0x0f) << (4 * (i / 64));
        block.qh[32 * half + i % 32] |= (bits >> 4) << (2 * (i / 32));
    }
    Some(block)
}
