//! `BF16`: bfloat16, the upper half of a binary32, little-endian. 16 bits per weight.

use bytemuck::{Pod, Zeroable};

/// Elements of a block.
pub const ELEMS: usize = 1;

/// One element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Block(pub [u8; 2]);

const _: () = assert!(size_of::<Block>() == 2 && align_of::<Block>() == 1);

/// `out[0] = x`: the bits moved to the upper half.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    out[0] = f32::from_bits((u16::from_le_bytes(block.0) as u32) << 16);
}

/// The nearest bfloat16, ties to even. NaNs keep sign and upper payload and become quiet, so that cutting the
/// payload cannot turn one into an infinity. Never `None`.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let bits = x[0].to_bits();
    let upper = if bits & 0x7fff_ffff > 0x7f80_0000 {
        (bits >> 16) | 0x0040
    } else {
        (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
    };
    Some(Block((upper as u16).to_le_bytes()))
}
