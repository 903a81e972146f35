//! `Q3_K`: blocks of 256 in 16 sub-blocks of 16, `x = (d * (scale - 32)) * q`, `q` in -4..4.
//! 110 bytes, 3.4375 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::f16::Half;
use super::fit;

/// Elements of a block.
pub const ELEMS: usize = 256;

/// 256 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Element `i`: bit `i / 32` of byte `i % 32`. Set means "nothing to subtract", clear means 4.
    pub hmask: [u8; 32],
    /// Element `i` of half `h` (128 elements): bits `2 * (i / 32)` and up of byte `32 * h + i % 32`.
    pub qs: [u8; 64],
    /// 16 scales of 6 bits with an offset of 32, see [`unpack_scales`].
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<Block>() == 110 && align_of::<Block>() == 1);

/// The 16 scales, offset removed: -32..32.
///
/// Lower four bits of scale `s`: byte `s % 8`, low half for `s < 8`, high half for the rest. Upper two bits:
/// byte `8 + s % 4`, bits `2 * (s / 4)` and up.
#[inline]
pub fn unpack_scales(packed: &[u8; 12]) -> [i8; 16] {
    std::array::from_fn(|s| {
        let low = (packed[s % 8] >> (4 * (s / 8))) & 0x0f;
        let high = (packed[8 + s % 4] >> (2 * (s / 4))) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// `out[i] = (d * scale) * q[i]`, each operation rounded.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = block.d.to_f32();
    let scales = unpack_scales(&block.scales);
    for (sub_idx, sub) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * scales[sub_idx] as f32;
        let first = 32 * (sub_idx / 8) + 16 * (sub_idx % 2);
        let shift = 2 * (sub_idx % 8 / 2);
        for (i, x) in sub.iter_mut().enumerate() {
            let low = (block.qs[first + i] >> shift) & 3;
            let high = (block.hmask[16 * (sub_idx % 2) + i] >> (sub_idx / 2)) & 1;
            *x = scale * (low as i32 - 4 * (1 - high as i32)) as f32;
        }
    }
}

/// The inverse of [`unpack_scales`].
#[inline]
pub fn pack_scales(scales: &[i8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (s, scale) in scales.iter().enumerate() {
        let bits = (scale + 32) as u8;
        packed[s % 8] |= (bits & 0x0f) << (4 * (s / 8));
        packed[8 + s % 4] |= ((bits >> 4) & 3) << (2 * (s / 4));
    }
    packed
}

/// Scales and codes for the least squared error that the search in `fit.rs` finds.
///
/// `None` if an element is not finite or a scale exceeds the range of f16.
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let fit = fit::symmetric_block::<16, 16>(x, 4.0, 32.0)?;
    let mut block = Block { hmask: [0; 32], qs: [0; 64], scales: pack_scales(&fit.scales), d: fit.d };
    for (i, q) in fit.q.iter().enumerate() {
        let bits = (q + 4) as u8;
        block.qs[32 * (i / 128) + i % 32] |= (bits & 3) << (2 * (i % 128 / 32));
        block.hmask[i % 32] |= (bits >> 2) << (i / 32);
    }
    Some(block)
}
