//! `Q4_1`: blocks of 32, `x = d * q + m`, `q` in 0..16. 20 bytes, 5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::{finite_half, inverse_or_zero, nibbles, range};
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
    /// Element `i` is the low half of byte `i`, element `i + 16` the high half.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 20 && align_of::<Block>() == 1);

/// `out[i] = d * q[i] + m`, the product rounded before the sum.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let (d, m) = (block.d.to_f32(), block.m.to_f32());
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block.qs.iter().enumerate() {
        low[i] = d * (byte & 0x0f) as f32 + m;
        high[i] = d * (byte >> 4) as f32 + m;
    }
}

/// The smallest element becomes code 0, the largest 15, the others the nearest, ties upwards. The same bytes as ggml.
///
/// `None` if an element is not finite, or the scale or the minimum exceeds the range of f16.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let (min, max) = range(x)?;
    let scale = (max - min) / 15.0;
    let inverse = inverse_or_zero(scale);
    let q = std::array::from_fn(|i| (((x[i] - min) * inverse + 0.5) as i32).min(15) as u8);
    Some(Block { d: finite_half(scale)?, m: finite_half(min)?, qs: nibbles(&q) })
}
