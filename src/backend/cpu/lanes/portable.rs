//! The lanes as an array: what every CPU can do, and what the others are held to.

use super::Lanes;

/// Plain arrays: the reference spelling, and the one for CPUs without a faster one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Portable;

#[inline(always)]
fn map2(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    let mut out = [0.0; 16];
    for i in 0..16 {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Lanes for Portable {
    type F = [f32; 16];
    type B = [u8; 16];
    const TILE_COLS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> [f32; 16] {
        [v; 16]
    }
    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> [f32; 16] {
        *a
    }
    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }
    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn pow2_biased(self, a: [f32; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from_bits((a[i].to_bits() << 23).wrapping_add(0x3f80_0000));
        }
        out
    }
    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32()
    }
    #[inline(always)]
    fn widen_f16(self, a: &[u8; 32]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = half::f16::from_le_bytes([a[2 * i], a[2 * i + 1]]).to_f32();
        }
        out
    }
    #[inline(always)]
    fn widen_bf16(self, a: &[u8; 32]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from_bits(u32::from(u16::from_le_bytes([a[2 * i], a[2 * i + 1]])) << 16);
        }
        out
    }
    #[inline(always)]
    fn bytes(self, a: &[u8; 16]) -> [u8; 16] {
        *a
    }
    #[inline(always)]
    fn field(self, mut a: [u8; 16], shift: u32, mask: u8) -> [u8; 16] {
        for a in &mut a {
            *a = (*a >> shift) & mask;
        }
        a
    }
    #[inline(always)]
    fn raise(self, mut a: [u8; 16], shift: u32) -> [u8; 16] {
        for a in &mut a {
            *a <<= shift;
        }
        a
    }
    #[inline(always)]
    fn or(self, mut a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
        for i in 0..16 {
            a[i] |= b[i];
        }
        a
    }
    #[inline(always)]
    fn fifth_bits(self, bits: u16) -> [u8; 16] {
        let mut out = [0; 16];
        for (i, out) in out.iter_mut().enumerate() {
            *out = (((bits >> i) & 1) as u8) << 4;
        }
        out
    }
    #[inline(always)]
    fn widen_i8(self, a: [u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from(a[i] as i8);
        }
        out
    }
    #[inline(always)]
    fn widen_u8(self, a: [u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from(a[i]);
        }
        out
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], indices: [u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = table[usize::from(indices[i] & 15)];
        }
        out
    }
    #[inline(always)]
    fn reduce(self, v: [f32; 16]) -> f32 {
        let mut v = v;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
}
