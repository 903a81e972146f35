//! `MXFP4`: blocks of 32 E2M1 values with one E8M0 scale (OCP Microscaling Formats v1.0, sections 5.2 and 5.3.3).
//! 17 bytes, 4.25 bits per weight.
//!
//! Three conventions of GGUF, which differ from other places where MXFP4 is found:
//!
//! - The codes of elements 0..16 are the low halves of the 16 bytes, those of 16..32 the high halves.
//!   (Safetensors of GPT-OSS hold elements `2 i` and `2 i + 1` in byte `i`.)
//! - [`VALUES`] are the E2M1 values *doubled*, so that they are integers; [`half_scale`] is the E8M0 scale *halved*.
//! - A scale of 255, NaN in the OCP text, is 2^127 here after halving, like any other exponent; and the code of minus
//!   zero decodes to plus zero, since the doubled values are integers.

use bytemuck::{Pod, Zeroable};

use super::encode::{largest_magnitude, nibbles};

/// Elements of a block.
pub const ELEMS: usize = 32;

/// Twice the E2M1 value of each code: sign, two bits of exponent, one of mantissa.
pub const VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// 32 elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Block {
    /// E8M0 scale: `2^(e - 127)`.
    pub e: u8,
    /// Element `i` is the low half of byte `i`, element `i + 16` the high half.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Block>() == 17 && align_of::<Block>() == 1);

/// `2^(e - 128)`, half the scale that `e` stands for. Exact for every `e`: the two smallest are subnormal.
#[inline]
pub const fn half_scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e as u32 - 1) << 23 })
}

/// `out[i] = half_scale(e) * VALUES[q[i]]`; infinite where that exceeds the range of f32 (`e >= 254`).
#[inline]
pub fn decode_block(block: &Block, out: &mut [f32; ELEMS]) {
    let d = half_scale(block.e);
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in block.qs.iter().enumerate() {
        low[i] = d * VALUES[(byte & 0x0f) as usize] as f32;
        high[i] = d * VALUES[(byte >> 4) as usize] as f32;
    }
}

/// Scale: the power of two that puts the largest magnitude into `[4, 8)`, of which E2M1 holds up to 6 (OCP section 6.3).
/// Codes: the nearest, ties towards zero; zeros of either sign become code 0. The same bytes as ggml, which takes the
/// exponent from a logarithm in f32: within about 2^-20 below a power of two it is that of the power.
///
/// Magnitudes below 2^-125 share the smallest scale. `None` if an element is not finite.
#[inline]
pub fn encode_block(x: &[f32; ELEMS]) -> Option<Block> {
    let largest = largest_magnitude(x);
    if !largest.is_finite() {
        return None;
    }
    let e = exponent(largest);
    let d = half_scale(e);
    // Halfway between neighbouring magnitudes. The products are exact, so that ties are ties, subnormal or not.
    let thresholds = [0.5 * d, 1.5 * d, 2.5 * d, 3.5 * d, 5.0 * d, 7.0 * d, 10.0 * d];
    let mut magnitudes = [0_u32; ELEMS];
    for threshold in thresholds {
        for (magnitude, x) in magnitudes.iter_mut().zip(x) {
            *magnitude += (x.abs() > threshold) as u32;
        }
    }
    let q = std::array::from_fn(|i| magnitudes[i] as u8 | if x[i] < 0.0 && magnitudes[i] > 0 { 8 } else { 0 });
    Some(Block { e, qs: nibbles(&q) })
}

/// `floor(log2(largest)) - 2 + 127`, not below 0 and not above 252, the last scale at which every code is finite.
#[inline]
fn exponent(largest: f32) -> u8 {
    if largest == 0.0 {
        return 0;
    }
    // Computed in f64 and rounded once, so that it does not hang on the platform's `log2f`.
    let log2 = libm::log2(largest as f64) as f32;
    (log2.floor() - 2.0 + 127.0).clamp(0.0, 252.0) as u8
}
