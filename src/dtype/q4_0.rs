//! `Q4_0`: blocks of 32, `x = d * (q - 8)`, `q` in 0..16. 18 bytes, 4.5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::{finite_half, inverse_or_zero, nibbles, peak};
use super::f16::Half;

/// Elements of a block.
pub const ELEMS: usize = 32;

/// 32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Scale.
    pub d: Half,
    /// Element `i` is the low half of byte `i`, element `i + 16` the high half.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 18 && align_of::<Block>() == 1);

/// `out[i] = d * (q[i] - 8)`.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = block.d.to_f32();
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block.qs.iter().enumerate() {
        low[i] = d * ((byte & 0x0f) as i32 - 8) as f32;
        high[i] = d * ((byte >> 4) as i32 - 8) as f32;
    }
}

/// The element of largest magnitude becomes code 0, that is `d * -8`; the others go to the nearest code, ties
/// upwards, and stop at 15. The same bytes as ggml.
///
/// `None` if an element is not finite or the scale exceeds the range of f16.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let scale = peak(x)? / -8.0;
    let inverse = inverse_or_zero(scale);
    let q = std::array::from_fn(|i| ((x[i] * inverse + 8.5) as i32).min(15) as u8);
    Some(Block { d: finite_half(scale)?, qs: nibbles(&q) })
}
