//! `Q8_0`: blocks of 32, `x = d * q`, `q` in -128..128. 34 bytes, 8.5 bits per weight.

use bytemuck::{Pod, Zeroable};

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
