//! The 12 bytes of `Q4_K` and `Q5_K` that hold eight 6-bit scales and eight 6-bit minima.
//!
//! Scale `s` for `s < 4`: lower six bits of byte `s`. Minimum `s` for `s < 4`: lower six bits of byte `4 + s`.
//! For `s >= 4` the lower four bits are in byte `4 + s` (scale low half, minimum high half), the upper two in the
//! upper two bits of byte `s - 4` (scale) and `s` (minimum).

/// Scales and minima, 0..64 each.
#[inline]
pub fn unpack(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for s in 0..4 {
        scales[s] = packed[s] & 0x3f;
        mins[s] = packed[4 + s] & 0x3f;
        scales[4 + s] = (packed[8 + s] & 0x0f) | (packed[s] >> 6) << 4;
        mins[4 + s] = (packed[8 + s] >> 4) | (packed[4 + s] >> 6) << 4;
    }
    (scales, mins)
}

/// The inverse of [`unpack`]; bits above the sixth are dropped.
#[inline]
pub fn pack(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for s in 0..4 {
        packed[s] = (scales[s] & 0x3f) | (scales[4 + s] >> 4) << 6;
        packed[4 + s] = (mins[s] & 0x3f) | (mins[4 + s] >> 4) << 6;
        packed[8 + s] = (scales[4 + s] & 0x0f) | (mins[4 + s] & 0x0f) << 4;
    }
    packed
}
