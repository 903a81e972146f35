//! Encoded blocks to lanes: every format's decoder, spelled for registers.
//!
//! A row is decoded in *units* of 32 elements, two values of sixteen lanes, so that a dot product can consume them
//! without a store. The reference is the scalar decoder of [`crate::dtype`]; a test compares the two bit for bit on
//! random blocks. The formulas round in the same places: products of scale and quant are exact in f32 in all formats
//! but `Q6_K` and `IQ4_XS`, where both sides compute `(d * scale) * quant`.

use super::lanes::Lanes;

/// A block format as bytes and a way to decode 32 of its elements.
pub(crate) trait Format {
    /// One block's bytes.
    type Block: bytemuck::Pod;
    /// Units of 32 elements per block.
    const UNITS: usize;

    /// Elements `32 * u .. 32 * u + 32` of a block.
    fn unit<S: Lanes>(s: S, block: &Self::Block, u: usize) -> [S::F; 2];
}

/// `N` bytes of a block from `at` on.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&block[at..at + N]);
    out
}

#[inline(always)]
fn each16(a: [u8; 16], f: impl Fn(u8) -> u8) -> [u8; 16] {
    let mut out = a;
    for b in &mut out {
        *b = f(*b);
    }
    out
}

#[inline(always)]
fn or16(a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
    let mut out = a;
    for i in 0..16 {
        out[i] |= b[i];
    }
    out
}

/// The f16 at byte `at`.
#[inline(always)]
fn scale<S: Lanes>(s: S, block: &[u8], at: usize) -> f32 {
    s.f16(u16::from_le_bytes(bytes(block, at)))
}

/// 16 where bit `i` of `bits` is set, else 0.
#[inline(always)]
fn fifth_bits(bits: u16) -> [u8; 16] {
    let mut out = [0; 16];
    for (i, o) in out.iter_mut().enumerate() {
        *o = (((bits >> i) & 1) as u8) << 4;
    }
    out
}

macro_rules! formats {
    ($($(#[$meta:meta])* $name:ident: $bytes:literal bytes, $units:literal units, |$s:ident, $b:ident, $u:ident| $body:block)*) => {$(
        $(#[$meta])*
        #[allow(non_camel_case_types, reason = "the field writes Q4_K, not Q4K")]
        pub(crate) struct $name;

        impl Format for $name {
            type Block = [u8; $bytes];
            const UNITS: usize = $units;

            #[inline(always)]
            fn unit<S: Lanes>($s: S, $b: &[u8; $bytes], $u: usize) -> [S::F; 2] $body
        }
    )*};
}

formats! {
    /// 32 binary32 numbers.
    F32: 128 bytes, 1 units, |s, b, _u| {
        let half = |at| {
            let mut out = [0.0; 16];
            for (i, o) in out.iter_mut().enumerate() {
                *o = f32::from_le_bytes(bytes(b, at + 4 * i));
            }
            s.load(&out)
        };
        [half(0), half(64)]
    }
    /// 32 binary16 numbers.
    F16: 64 bytes, 1 units, |s, b, _u| { [s.widen_f16(&bytes(b, 0)), s.widen_f16(&bytes(b, 32))] }
    /// 32 bfloat16 numbers.
    BF16: 64 bytes, 1 units, |s, b, _u| { [s.widen_bf16(&bytes(b, 0)), s.widen_bf16(&bytes(b, 32))] }
    /// `d (q - 8)`; f16 d, 16 bytes of nibbles.
    Q4_0: 18 bytes, 1 units, |s, b, _u| {
        let (d, q) = (s.splat(scale(s, b, 0)), bytes(b, 2));
        let value = |q| s.mul(d, s.sub(s.widen_u8(q), s.splat(8.0)));
        [value(each16(q, |q| q & 15)), value(each16(q, |q| q >> 4))]
    }
    /// `d q + m`; f16 d, f16 m, 16 bytes of nibbles.
    Q4_1: 20 bytes, 1 units, |s, b, _u| {
        let (d, m, q) = (s.splat(scale(s, b, 0)), s.splat(scale(s, b, 2)), bytes(b, 4));
        let value = |q| s.add(s.mul(d, s.widen_u8(q)), m);
        [value(each16(q, |q| q & 15)), value(each16(q, |q| q >> 4))]
    }
    /// `d (q - 16)`; f16 d, 32 fifth bits, 16 bytes of nibbles.
    Q5_0: 22 bytes, 1 units, |s, b, _u| {
        let (d, q) = (s.splat(scale(s, b, 0)), bytes(b, 6));
        let (low, high) = (u16::from_le_bytes(bytes(b, 2)), u16::from_le_bytes(bytes(b, 4)));
        let value = |q| s.mul(d, s.sub(s.widen_u8(q), s.splat(16.0)));
        [
            value(or16(each16(q, |q| q & 15), fifth_bits(low))),
            value(or16(each16(q, |q| q >> 4), fifth_bits(high))),
        ]
    }
    /// `d q + m`; f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles.
    Q5_1: 24 bytes, 1 units, |s, b, _u| {
        let (d, m, q) = (s.splat(scale(s, b, 0)), s.splat(scale(s, b, 2)), bytes(b, 8));
        let (low, high) = (u16::from_le_bytes(bytes(b, 4)), u16::from_le_bytes(bytes(b, 6)));
        let value = |q| s.add(s.mul(d, s.widen_u8(q)), m);
        [
            value(or16(each16(q, |q| q & 15), fifth_bits(low))),
            value(or16(each16(q, |q| q >> 4), fifth_bits(high))),
        ]
    }
    /// `d q`; f16 d, 32 signed bytes.
    Q8_0: 34 bytes, 1 units, |s, b, _u| {
        let d = s.splat(scale(s, b, 0));
        [s.mul(d, s.widen_i8(bytes(b, 2))), s.mul(d, s.widen_i8(bytes(b, 18)))]
    }
    /// `(d sc) q - (dmin m)`; 16 bytes of scale and minimum nibbles, 64 bytes of 2 bits, f16 d, f16 dmin.
    Q2_K: 84 bytes, 8 units, |s, b, u| {
        let (d, d_min) = (scale(s, b, 80), scale(s, b, 82));
        let (half, shift) = (u / 4, 2 * (u % 4));
        let value = |i: usize| {
            let sc = b[2 * u + i];
            let q = each16(bytes(b, 16 + 32 * half + 16 * i), |q| (q >> shift) & 3);
            let (dl, ml) = (d * f32::from(sc & 15), d_min * f32::from(sc >> 4));
            s.sub(s.mul(s.splat(dl), s.widen_u8(q)), s.splat(ml))
        };
        [value(0), value(1)]
    }
    /// `(d (sc - 32)) (q - 4 unless the mask bit is set)`; 32 bytes of mask, 64 of 2 bits, 12 of scales, f16 d.
    Q3_K: 110 bytes, 8 units, |s, b, u| {
        let d = scale(s, b, 108);
        let (half, shift) = (u / 4, 2 * (u % 4));
        let value = |i: usize| {
            let k = 2 * u + i;
            let low = if k < 8 { b[96 + k] & 15 } else { b[96 + k - 8] >> 4 };
            let high = (b[104 + k % 4] >> (2 * (k / 4))) & 3;
            let dl = d * (f32::from(low | (high << 4)) - 32.0);
            let q = each16(bytes(b, 32 + 32 * half + 16 * i), |q| (q >> shift) & 3);
            let mask = each16(bytes(b, 16 * i), |h| ((h >> u) & 1) << 2);
            s.mul(s.splat(dl), s.sub(s.widen_u8(or16(q, mask)), s.splat(4.0)))
        };
        [value(0), value(1)]
    }
    /// `(d sc) q - (dmin m)`; f16 d, f16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
    Q4_K: 144 bytes, 8 units, |s, b, u| {
        let (sc, m) = scale_and_min(&b[4..16], u);
        let dl = s.splat(scale(s, b, 0) * sc);
        let ml = s.splat(scale(s, b, 2) * m);
        let shift = 4 * (u % 2);
        let value = |i: usize| {
            let q = each16(bytes(b, 16 + 32 * (u / 2) + 16 * i), |q| (q >> shift) & 15);
            s.sub(s.mul(dl, s.widen_u8(q)), ml)
        };
        [value(0), value(1)]
    }
    /// As `Q4_K` with a fifth bit: 32 bytes whose bit `u` belongs to unit `u`, before the nibbles.
    Q5_K: 176 bytes, 8 units, |s, b, u| {
        let (sc, m) = scale_and_min(&b[4..16], u);
        let dl = s.splat(scale(s, b, 0) * sc);
        let ml = s.splat(scale(s, b, 2) * m);
        let shift = 4 * (u % 2);
        let value = |i: usize| {
            let q = each16(bytes(b, 48 + 32 * (u / 2) + 16 * i), |q| (q >> shift) & 15);
            let high = each16(bytes(b, 16 + 16 * i), |h| ((h >> u) & 1) << 4);
            s.sub(s.mul(dl, s.widen_u8(or16(q, high))), ml)
        };
        [value(0), value(1)]
    }
    /// `(d sc) (q - 32)`; 128 bytes of nibbles, 64 of upper 2 bits, 16 signed scales, f16 d.
    Q6_K: 210 bytes, 8 units, |s, b, u| {
        let d = scale(s, b, 208);
        let (half, j) = (u / 4, u % 4);
        let value = |i: usize| {
            let sc = f32::from(b[192 + 2 * u + i] as i8);
            let low = each16(bytes(b, 64 * half + 32 * (j % 2) + 16 * i), |q| (q >> (4 * (j / 2))) & 15);
            let high = each16(bytes(b, 128 + 32 * half + 16 * i), |h| ((h >> (2 * j)) & 3) << 4);
            s.mul(s.splat(d * sc), s.sub(s.widen_u8(or16(low, high)), s.splat(32.0)))
        };
        [value(0), value(1)]
    }
    /// `d table[q]`; f16 d, 16 bytes of nibbles.
    IQ4_NL: 18 bytes, 1 units, |s, b, _u| {
        let (d, q) = (s.splat(scale(s, b, 0)), bytes(b, 2));
        let value = |q| s.mul(d, s.lookup(&IQ4_VALUES, q));
        [value(q), value(each16(q, |q| q >> 4))]
    }
    /// `(d (sc - 32)) table[q]`; f16 d, 16 bits of upper scale bits, 4 bytes of lower, 128 bytes of nibbles.
    IQ4_XS: 136 bytes, 8 units, |s, b, u| {
        let low = (b[4 + u / 2] >> (4 * (u % 2))) & 15;
        let high = ((u16::from_le_bytes(bytes(b, 2)) >> (2 * u)) & 3) as u8;
        let dl = s.splat(scale(s, b, 0) * (f32::from(low | (high << 4)) - 32.0));
        let q = bytes(b, 8 + 16 * u);
        let value = |q| s.mul(dl, s.lookup(&IQ4_VALUES, q));
        [value(q), value(each16(q, |q| q >> 4))]
    }
    /// `2^(e - 128) table[q]`, the table holding twice the E2M1 values; E8M0 exponent e, 16 bytes of nibbles.
    MXFP4: 17 bytes, 1 units, |s, b, _u| {
        let (d, q) = (s.splat(half_e8m0(b[0])), bytes(b, 1));
        let value = |q| s.mul(d, s.lookup(&E2M1_DOUBLED, q));
        [value(q), value(each16(q, |q| q >> 4))]
    }
}

/// The 6-bit scale and minimum of unit `u` in the twelve packed bytes of `Q4_K` and `Q5_K`.
#[inline(always)]
fn scale_and_min(packed: &[u8], u: usize) -> (f32, f32) {
    let (sc, m) = if u < 4 {
        (packed[u] & 63, packed[u + 4] & 63)
    } else {
        ((packed[u + 4] & 15) | ((packed[u - 4] >> 6) << 4), (packed[u + 4] >> 4) | ((packed[u] >> 6) << 4))
    };
    (f32::from(sc), f32::from(m))
}

/// `2^(e - 128)`; subnormal below 2.
#[inline(always)]
fn half_e8m0(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// The sixteen values of `IQ4_NL` and `IQ4_XS`.
const IQ4_VALUES: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// Twice the sixteen values of E2M1; minus zero counts as zero, as in the reference decoder.
const E2M1_DOUBLED: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// Calls `$then::<$format>($args)` with the [`Format`] of a [`crate::dtype::DType`].
macro_rules! with_format {
    ($dtype:expr, $format:ident => $then:expr) => {{
        use $crate::backend::cpu::unpack;
        use $crate::dtype::DType;
        macro_rules! arm {
            ($name:ident) => {{
                type $format = unpack::$name;
                $then
            }};
        }
        match $dtype {
            DType::F32 => arm!(F32),
            DType::F16 => arm!(F16),
            DType::BF16 => arm!(BF16),
            DType::Q4_0 => arm!(Q4_0),
            DType::Q4_1 => arm!(Q4_1),
            DType::Q5_0 => arm!(Q5_0),
            DType::Q5_1 => arm!(Q5_1),
            DType::Q8_0 => arm!(Q8_0),
            DType::Q2_K => arm!(Q2_K),
            DType::Q3_K => arm!(Q3_K),
            DType::Q4_K => arm!(Q4_K),
            DType::Q5_K => arm!(Q5_K),
            DType::Q6_K => arm!(Q6_K),
            DType::IQ4_NL => arm!(IQ4_NL),
            DType::IQ4_XS => arm!(IQ4_XS),
            DType::MXFP4 => arm!(MXFP4),
        }
    }};
}
pub(crate) use with_format;
