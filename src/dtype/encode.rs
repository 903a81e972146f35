//! What the encoders share: walking blocks, refusing what does not fit, packing codes.
//!
//! Everything here and in [`fit`](super::fit) is plain f32 arithmetic in a fixed order, so an encoder gives the same
//! bytes on every machine.

use bytemuck::Pod;

use super::f16::Half;
use super::{DType, DTypeError};

/// Runs `encode` over the blocks of `x`. Lengths are the caller's to check; `None` is turned into an error that says
/// which element is to blame.
#[inline(always)]
pub(super) fn each_block<B: Pod, const N: usize>(
    dtype: DType,
    x: &[f32],
    bytes: &mut [u8],
    encode: impl Fn(&[f32; N]) -> Option<B>,
) -> Result<(), DTypeError> {
    let blocks = bytemuck::cast_slice_mut::<u8, B>(bytes);
    for (block_idx, (x, block)) in x.as_chunks::<N>().0.iter().zip(blocks).enumerate() {
        *block = encode(x).ok_or_else(|| refusal(dtype, block_idx * N, x))?;
    }
    Ok(())
}

#[cold]
fn refusal(dtype: DType, first: usize, x: &[f32]) -> DTypeError {
    if let Some(i) = x.iter().position(|x| !x.is_finite()) {
        return DTypeError::NotFinite { dtype, index: first + i, value: x[i] };
    }
    let largest = (1..x.len()).fold(0, |best, i| if x[i].abs() > x[best].abs() { i } else { best });
    DTypeError::TooLarge { dtype, index: first + largest, value: x[largest] }
}

/// The largest magnitude; NaN if there is one, infinite if there is one.
#[inline]
pub(super) fn largest_magnitude<const N: usize>(x: &[f32; N]) -> f32 {
    // Without their signs, floats order like their bits, NaNs above infinity: one pass finds every misfit.
    f32::from_bits(x.iter().fold(0, |max, x| max.max(x.to_bits() as i32 & i32::MAX)) as u32)
}

/// The first element of largest magnitude, with its sign; `None` if an element is not finite.
#[inline]
pub(super) fn peak<const N: usize>(x: &[f32; N]) -> Option<f32> {
    let largest = largest_magnitude(x);
    if largest.is_finite() { x.iter().copied().find(|x| x.abs() == largest) } else { None }
}

/// Smallest and largest element; `None` if an element is not finite.
#[inline]
pub(super) fn range<const N: usize>(x: &[f32; N]) -> Option<(f32, f32)> {
    let min_max =
        x.iter().fold((x[0], x[0]), |(min, max), &x| (if x < min { x } else { min }, if x > max { x } else { max }));
    largest_magnitude(x).is_finite().then_some(min_max)
}

/// `None` if the nearest f16 is not finite.
#[inline]
pub(super) fn finite_half(x: f32) -> Option<Half> {
    // 65520 is halfway between the largest f16 and the next power of two.
    (x.abs() < 65520.0).then(|| Half::from_f32(x))
}

/// `1 / scale`, or 0 where that is not finite: such scales are far below the smallest f16, so the block decodes to its
/// offset whatever the codes are.
#[inline]
pub(super) fn inverse_or_zero(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// Codes 0..16 of 32 elements: element `i` in the low half of byte `i`, element `i + 16` in the high half. Bits above
/// the fourth are dropped.
#[inline]
pub(super) fn nibbles(q: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| (q[i] & 0x0f) | q[i + 16] << 4)
}

/// Bit 4 of each of 32 codes, little-endian.
#[inline]
pub(super) fn fifth_bits(q: &[u8; 32]) -> [u8; 4] {
    q.iter().enumerate().fold(0, |bits, (i, q)| bits | ((*q as u32 >> 4) & 1) << i).to_le_bytes()
}
