//! `IQ4_NL`: blocks of 32, `x = d * VALUES[q]`, `q` in 0..16. 18 bytes, 4.5 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::{finite_half, nibbles};
use super::f16::Half;
use super::fit;

/// Elements of a block.
pub const ELEMS: usize = 32;

/// The 16 values of a code: finer near zero than a uniform grid, and not symmetric. Shared with `IQ4_XS`.
pub const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

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

/// `out[i] = d * VALUES[q[i]]`.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    decode_codes(block.d.to_f32(), &block.qs, out);
}

/// 32 codes in 16 bytes, the layout that `IQ4_XS` has in each sub-block.
#[inline]
pub(super) fn decode_codes(d: f32, qs: &[u8; 16], out: &mut [f32; ELEMS]) {
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in qs.iter().enumerate() {
        low[i] = d * VALUES[(byte & 0x0f) as usize] as f32;
        high[i] = d * VALUES[(byte >> 4) as usize] as f32;
    }
}

/// Scale and codes for the least squared error that the search in `fit.rs` finds.
///
/// `None` if an element is not finite or the scale exceeds the range of f16.
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    fit::fits(x)?;
    let d = finite_half(fit::table_scale(x, &VALUES))?;
    Some(Block { d, qs: nibbles(&fit::table_codes(x, d.to_f32(), &VALUES)) })
}
