//! `IQ4_XS`: blocks of 256 in 8 sub-blocks of 32, `x = (d * (scale - 32)) * VALUES[q]`, with the table of
//! [`iq4_nl`]. 136 bytes, 4.25 bits per weight.

use bytemuck::{Pod, Zeroable};

use super::encode::nibbles;
use super::f16::Half;
use super::fit;
use super::iq4_nl;

/// Elements of a block.
pub const ELEMS: usize = 256;

/// 256 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// Scale of the scales.
    pub d: Half,
    /// Upper two bits of the scale of sub-block `s`: bits `2 s` and up of the little-endian `u16`.
    pub scales_h: [u8; 2],
    /// Lower four bits: sub-block `2 p` is the low half of byte `p`, sub-block `2 p + 1` the high half.
    pub scales_l: [u8; 4],
    /// 16 bytes per sub-block: element `i` is the low half of byte `i`, element `i + 16` the high half.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<Block>() == 136 && align_of::<Block>() == 1);

/// The eight scales, offset removed: -32..32.
#[inline]
pub fn unpack_scales(block: &Block) -> [i8; 8] {
    let high = u16::from_le_bytes(block.scales_h);
    std::array::from_fn(|s| {
        let low = (block.scales_l[s / 2] >> (4 * (s % 2))) & 0x0f;
        (low | (((high >> (2 * s)) & 3) as u8) << 4) as i8 - 32
    })
}

/// `out[i] = (d * scale) * VALUES[q[i]]`, each operation rounded.
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = block.d.to_f32();
    let scales = unpack_scales(block);
    let subs = out.as_chunks_mut::<32>().0.iter_mut().zip(block.qs.as_chunks::<16>().0);
    for (sub_idx, (sub, qs)) in subs.enumerate() {
        iq4_nl::decode_codes(d * scales[sub_idx] as f32, qs, sub);
    }
}

/// Scales and codes for the least squared error that the search in `fit.rs` finds.
///
/// `None` if an element is not finite or a scale exceeds the range of f16.
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let fit = fit::table_block::<32, 8>(x, &iq4_nl::VALUES, 32.0)?;
    let mut block = Block { d: fit.d, scales_h: [0; 2], scales_l: [0; 4], qs: [0; 128] };
    let mut high = 0;
    for (s, scale) in fit.scales.iter().enumerate() {
        let bits = (scale + 32) as u8;
        block.scales_l[s / 2] |= (bits & 0x0f) << (4 * (s % 2));
        high |= (bits as u16 >> 4) << (2 * s);
    }
    block.scales_h = high.to_le_bytes();
    let codes = fit.q.map(|code| code as u8);
    for (q, qs) in codes.as_chunks::<32>().0.iter().zip(block.qs.as_chunks_mut::<16>().0) {
        *qs = nibbles(q);
    }
    Some(block)
}
