//! `Q5_1`: blocks of 32, `x = d * q + m`, `q` in 0..32. 24 bytes, 6 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::{fifth_bits, finite_half, inverse_or_zero, nibbles, range};
use super::f16::Half;

/// Elements of a block.
pub const ELEMS: usize = 32;

/// 32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Scale.
    pub d: Half,
    /// Minimum: the value of `q = 0`.
    pub m: Half,
    /// The fifth bits: bit `i` of the little-endian `u32` belongs to element `i`.
    pub qh: [u8; 4],
    /// Lower four bits: element `i` is the low half of byte `i`, element `i + 16` the high half.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 24 && align_of::<Block>() == 1);

/// `out[i] = d * q[i] + m`, the product rounded before the sum.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let (d, m) = (block.d.to_f32(), block.m.to_f32());
    let qh = u32::from_le_bytes(block.qh);
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block.qs.iter().enumerate() {
        let q_low = (byte & 0x0f) as u32 | ((qh >> i) & 1) << 4;
        let q_high = (byte >> 4) as u32 | ((qh >> (i + 16)) & 1) << 4;
        low[i] = d * q_low as f32 + m;
        high[i] = d * q_high as f32 + m;
    }
}

/// The smallest element becomes code 0, the largest 31, the others the nearest, ties upwards. The same bytes as ggml.
///
/// `None` if an element is not finite, or the scale or the minimum exceeds the range of f16.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let (min, max) = range(x)?;
    let scale = (max - min) / 31.0;
    let inverse = inverse_or_zero(scale);
    let q = std::array::from_fn(|i| (((x[i] - min) * inverse + 0.5) as i32).min(31) as u8);
    Some(Block { d: finite_half(scale)?, m: finite_half(min)?, qh: fifth_bits(&q), qs: nibbles(&q) })
}
