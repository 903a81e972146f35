//! `F32`: IEEE 754 binary32, little-endian. 32 bits per weight.

use bytemuck::{Pod, Zeroable};

/// Elements of a block.
pub const ELEMS: usize = 1;

/// One element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Block(pub [u8; 4]);

const _: () = assert!(size_of::<Block>() == 4 && align_of::<Block>() == 1);

/// `out[0] = x`.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    out[0] = f32::from_le_bytes(block.0);
}

/// Exact; never `None`.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    Some(Block(x[0].to_le_bytes()))
}
