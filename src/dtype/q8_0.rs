//! `Q8_0`: blocks of 32, `x = d * q`, `q` in -128..128. 34 bytes, 8.5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::{finite_half, inverse_or_zero, largest_magnitude};
use super::f16::Half;

/// Elements of a block.
pub const ELEMS: usize = 32;

/// 32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Scale.
    pub d: Half,
    /// One element per byte, two's complement.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<Block>() == 34 && align_of::<Block>() == 1);

/// `out[i] = d * q[i]`.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = block.d.to_f32();
    for (x, &q) in out.iter_mut().zip(&block.qs) {
        *x = d * q as f32;
    }
}

/// Scale: the largest magnitude over 127. Codes: nearest, ties away from zero. The same bytes as ggml.
///
/// `None` if an element is not finite or the scale exceeds the range of f16.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let scale = largest_magnitude(x) / 127.0;
    let d = finite_half(scale)?;
    let inverse = inverse_or_zero(scale);
    let qs = std::array::from_fn(|i| {
        let t = x[i] * inverse;
        let whole = t.abs() as i32;
        let rounded = whole + (t.abs() - whole as f32 >= 0.5) as i32;
        (if t < 0.0 { -rounded } else { rounded }) as i8
    });
    Some(Block { d, qs })
}
