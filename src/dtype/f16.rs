//! `F16`: IEEE 754 binary16, little-endian. 16 bits per weight. Also the scale of most quantised blocks.

use bytemuck::{Pod, Zeroable};

/// Elements of a block.
pub const ELEMS: usize = 1;

/// One element.
pub type Block = Half;

/// A binary16 as it lies in a file. Alignment 1, so that blocks can be viewed wherever a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Half(pub [u8; 2]);

const _: () = assert!(size_of::<Half>() == 2 && align_of::<Half>() == 1);

impl Half {
    /// The value, exactly. NaNs keep sign and payload and come out quiet, as from `vcvtph2ps`.
    ///
    /// Selects instead of branching, and is inlined: a block's scale is on the critical path of every dot product.
    #[inline(always)]
    pub const fn to_f32(self) -> f32 {
        let bits = u16::from_le_bytes(self.0);
        let sign = ((bits & 0x8000) as u32) << 16;
        let magnitude = (bits & 0x7fff) as u32;
        let subnormal = (magnitude as f32 * (1.0 / 16_777_216.0)).to_bits();
        let normal = (magnitude << 13) + ((127 - 15) << 23);
        let infinite = 0x7f80_0000 | (magnitude << 13) | if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        let magnitude = if magnitude < 0x0400 {
            subnormal
        } else if magnitude < 0x7c00 {
            normal
        } else {
            infinite
        };
        f32::from_bits(sign | magnitude)
    }

    /// The nearest binary16, ties to even; infinite from 65520 on.
    #[inline]
    pub fn from_f32(x: f32) -> Half {
        Half(half::f16::from_f32(x).to_le_bytes())
    }

    /// The same 16 bits as a number.
    #[inline]
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// From the 16 bits as a number.
    #[inline]
    pub const fn from_bits(bits: u16) -> Half {
        Half(bits.to_le_bytes())
    }
}

/// `out[0] = x`.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    out[0] = block.to_f32();
}

/// The nearest binary16 of each element, ties to even; infinite from 65520 on. NaNs keep sign and upper payload.
pub(super) fn encode(x: &[f32], bytes: &mut [u8]) -> Result<(), super::DTypeError> {
    for (x, block) in x.iter().zip(bytemuck::cast_slice_mut::<u8, Block>(bytes)) {
        *block = Half::from_f32(*x);
    }
    Ok(())
}
