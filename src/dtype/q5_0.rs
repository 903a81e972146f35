//! `Q5_0`: blocks of 32, `x = d * (q - 16)`, `q` in 0..32. 22 bytes, 5.5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::{fifth_bits, finite_half, inverse_or_zero, nibbles, peak};
use super::f16::Half;

/// Elements of a block.
pub const ELEMS: usize = 32;

/// 32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Scale.
    pub d: Half,
    /// The fifth bits: bit `i` of the little-endian `u32` belongs to element `i`.
    pub qh: [u8; 4],
    /// Lower four bits: element `i` is the low half of byte `i`, element `i + 16` the high half.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 22 && align_of::<Block>() == 1);

/// `out[i] = d * (q[i] - 16)`.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = block.d.to_f32();
    let qh = u32::from_le_bytes(block.qh);
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block.qs.iter().enumerate() {
        let q_low = (byte & 0x0f) as u32 | ((qh >> i) & 1) << 4;
        let q_high = (byte >> 4) as u32 | ((qh >> (i + 16)) & 1) << 4;
        low[i] = d * (q_low as i32 - 16) as f32;
        high[i] = d * (q_high as i32 - 16) as f32;
    }
}

/// The element of largest magnitude becomes code 0, that is `d * -16`; the others go to the nearest code, ties
/// upwards, and stop at 31. The same bytes as ggml.
///
/// `None` if an element is not finite or the scale exceeds the range of f16.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let scale = peak(x)? / -16.0;
    let inverse = inverse_or_zero(scale);
    let q = std::array::from_fn(|i| ((x[i] * inverse + 16.5) as i32).min(31) as u8);
    Some(Block { d: finite_half(scale)?, qh: fifth_bits(&q), qs: nibbles(&q) })
}
