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
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    match block[at..at + N].as_array() {
        Some(part) => part,
        None => unreachable!(),
    }
}

/// Sixteen bytes of a block from `at` on, as a value.
#[inline(always)]
fn quants<S: Lanes>(s: S, block: &[u8], at: usize) -> S::B {
    s.bytes(part(block, at))
}

/// The lower and the upper nibbles of sixteen bytes.
#[inline(always)]
fn nibbles<S: Lanes>(s: S, q: S::B) -> [S::B; 2] {
    [s.field(q, 0, 15), s.field(q, 4, 15)]
}

/// The f16 at byte `at`.
#[inline(always)]
fn scale<S: Lanes>(s: S, block: &[u8], at: usize) -> f32 {
    s.f16(u16::from_le_bytes(*part(block, at)))
}

/// The little-endian bits at byte `at`.
#[inline(always)]
fn bits(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(*part(block, at))
}

/// `d * (q - zero)`.
#[inline(always)]
fn centred<S: Lanes>(s: S, d: f32, q: S::B, zero: f32) -> S::F {
    s.mul(s.splat(d), s.sub(s.widen_u8(q), s.splat(zero)))
}

/// `d * q + m`.
#[inline(always)]
fn shifted<S: Lanes>(s: S, d: f32, q: S::B, m: f32) -> S::F {
    s.add(s.mul(s.splat(d), s.widen_u8(q)), s.splat(m))
}

/// `d * q - m`.
#[inline(always)]
fn lowered<S: Lanes>(s: S, d: f32, q: S::B, m: f32) -> S::F {
    s.sub(s.mul(s.splat(d), s.widen_u8(q)), s.splat(m))
}

/// `d * table[q]`.
#[inline(always)]
fn looked_up<S: Lanes>(s: S, d: f32, q: S::B, table: &[f32; 16]) -> S::F {
    s.mul(s.splat(d), s.lookup(table, q))
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
    F32: 128 bytes, 1 units, |s, b, _u| { [s.load(&f32s(part(b, 0))), s.load(&f32s(part(b, 64)))] }
    /// 32 binary16 numbers.
    F16: 64 bytes, 1 units, |s, b, _u| { [s.widen_f16(part(b, 0)), s.widen_f16(part(b, 32))] }
    /// 32 bfloat16 numbers.
    BF16: 64 bytes, 1 units, |s, b, _u| { [s.widen_bf16(part(b, 0)), s.widen_bf16(part(b, 32))] }
    /// `d (q - 8)`; f16 d, 16 bytes of nibbles.
    Q4_0: 18 bytes, 1 units, |s, b, _u| {
        let d = scale(s, b, 0);
        let [low, high] = nibbles(s, quants(s, b, 2));
        [centred(s, d, low, 8.0), centred(s, d, high, 8.0)]
    }
    /// `d q + m`; f16 d, f16 m, 16 bytes of nibbles.
    Q4_1: 20 bytes, 1 units, |s, b, _u| {
        let (d, m) = (scale(s, b, 0), scale(s, b, 2));
        let [low, high] = nibbles(s, quants(s, b, 4));
        [shifted(s, d, low, m), shifted(s, d, high, m)]
    }
    /// `d (q - 16)`; f16 d, 32 fifth bits, 16 bytes of nibbles.
    Q5_0: 22 bytes, 1 units, |s, b, _u| {
        let d = scale(s, b, 0);
        let [low, high] = nibbles(s, quants(s, b, 6));
        let (low, high) = (s.or(low, s.fifth_bits(bits(b, 2))), s.or(high, s.fifth_bits(bits(b, 4))));
        [centred(s, d, low, 16.0), centred(s, d, high, 16.0)]
    }
    /// `d q + m`; f16 d, f16 m, 32 fifth bits, 16 bytes of nibbles.
    Q5_1: 24 bytes, 1 units, |s, b, _u| {
        let (d, m) = (scale(s, b, 0), scale(s, b, 2));
        let [low, high] = nibbles(s, quants(s, b, 8));
        let (low, high) = (s.or(low, s.fifth_bits(bits(b, 4))), s.or(high, s.fifth_bits(bits(b, 6))));
        [shifted(s, d, low, m), shifted(s, d, high, m)]
    }
    /// `d q`; f16 d, 32 signed bytes.
    Q8_0: 34 bytes, 1 units, |s, b, _u| {
        let d = s.splat(scale(s, b, 0));
        [s.mul(d, s.widen_i8(quants(s, b, 2))), s.mul(d, s.widen_i8(quants(s, b, 18)))]
    }
    /// `(d sc) q - (dmin m)`; 16 bytes of scale and minimum nibbles, 64 bytes of 2 bits, f16 d, f16 dmin.
    Q2_K: 84 bytes, 8 units, |s, b, u| {
        let (d, d_min, at) = (scale(s, b, 80), scale(s, b, 82), 16 + 32 * (u / 4));
        let (sc0, sc1) = (b[2 * u], b[2 * u + 1]);
        let q0 = s.field(quants(s, b, at), 2 * (u % 4) as u32, 3);
        let q1 = s.field(quants(s, b, at + 16), 2 * (u % 4) as u32, 3);
        [
            lowered(s, d * f32::from(sc0 & 15), q0, d_min * f32::from(sc0 >> 4)),
            lowered(s, d * f32::from(sc1 & 15), q1, d_min * f32::from(sc1 >> 4)),
        ]
    }
    /// `(d (sc - 32)) (q - 4 unless the mask bit is set)`; 32 bytes of mask, 64 of 2 bits, 12 of scales, f16 d.
    Q3_K: 110 bytes, 8 units, |s, b, u| {
        let (d, at, shift) = (scale(s, b, 108), 32 + 32 * (u / 4), 2 * (u % 4) as u32);
        let (q0, q1) = (s.field(quants(s, b, at), shift, 3), s.field(quants(s, b, at + 16), shift, 3));
        let (h0, h1) = (s.field(quants(s, b, 0), u as u32, 1), s.field(quants(s, b, 16), u as u32, 1));
        let (q0, q1) = (s.or(q0, s.raise(h0, 2)), s.or(q1, s.raise(h1, 2)));
        [centred(s, d * q3_scale(b, 2 * u), q0, 4.0), centred(s, d * q3_scale(b, 2 * u + 1), q1, 4.0)]
    }
    /// `(d sc) q - (dmin m)`; f16 d, f16 dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
    Q4_K: 144 bytes, 8 units, |s, b, u| {
        let (sc, m) = scale_and_min(part(b, 4), u);
        let (d, m, at, shift) = (scale(s, b, 0) * sc, scale(s, b, 2) * m, 16 + 32 * (u / 2), 4 * (u % 2) as u32);
        let (q0, q1) = (s.field(quants(s, b, at), shift, 15), s.field(quants(s, b, at + 16), shift, 15));
        [lowered(s, d, q0, m), lowered(s, d, q1, m)]
    }
    /// As `Q4_K` with a fifth bit: 32 bytes whose bit `u` belongs to unit `u`, before the nibbles.
    Q5_K: 176 bytes, 8 units, |s, b, u| {
        let (sc, m) = scale_and_min(part(b, 4), u);
        let (d, m, at, shift) = (scale(s, b, 0) * sc, scale(s, b, 2) * m, 48 + 32 * (u / 2), 4 * (u % 2) as u32);
        let (q0, q1) = (s.field(quants(s, b, at), shift, 15), s.field(quants(s, b, at + 16), shift, 15));
        let (h0, h1) = (s.field(quants(s, b, 16), u as u32, 1), s.field(quants(s, b, 32), u as u32, 1));
        [lowered(s, d, s.or(q0, s.raise(h0, 4)), m), lowered(s, d, s.or(q1, s.raise(h1, 4)), m)]
    }
    /// `(d sc) (q - 32)`; 128 bytes of nibbles, 64 of upper 2 bits, 16 signed scales, f16 d.
    Q6_K: 210 bytes, 8 units, |s, b, u| {
        let (d, half, j) = (scale(s, b, 208), u / 4, u % 4);
        let (low, high, shift) = (64 * half + 32 * (j % 2), 128 + 32 * half, 2 * j as u32);
        let nibble = 4 * (j / 2) as u32;
        let (q0, q1) = (s.field(quants(s, b, low), nibble, 15), s.field(quants(s, b, low + 16), nibble, 15));
        let (h0, h1) = (s.field(quants(s, b, high), shift, 3), s.field(quants(s, b, high + 16), shift, 3));
        let (q0, q1) = (s.or(q0, s.raise(h0, 4)), s.or(q1, s.raise(h1, 4)));
        let (sc0, sc1) = (f32::from(b[192 + 2 * u] as i8), f32::from(b[193 + 2 * u] as i8));
        [centred(s, d * sc0, q0, 32.0), centred(s, d * sc1, q1, 32.0)]
    }
    /// `d table[q]`; f16 d, 16 bytes of nibbles.
    IQ4_NL: 18 bytes, 1 units, |s, b, _u| {
        let d = scale(s, b, 0);
        let [low, high] = nibbles(s, quants(s, b, 2));
        [looked_up(s, d, low, &IQ4_VALUES), looked_up(s, d, high, &IQ4_VALUES)]
    }
    /// `(d (sc - 32)) table[q]`; f16 d, 16 bits of upper scale bits, 4 bytes of lower, 128 bytes of nibbles.
    IQ4_XS: 136 bytes, 8 units, |s, b, u| {
        let low = (b[4 + u / 2] >> (4 * (u % 2))) & 15;
        let high = ((bits(b, 2) >> (2 * u)) & 3) as u8;
        let d = scale(s, b, 0) * (f32::from(low | (high << 4)) - 32.0);
        let [low, high] = nibbles(s, quants(s, b, 8 + 16 * u));
        [looked_up(s, d, low, &IQ4_VALUES), looked_up(s, d, high, &IQ4_VALUES)]
    }
    /// `2^(e - 128) table[q]`, the table holding twice the E2M1 values; E8M0 exponent e, 16 bytes of nibbles.
    MXFP4: 17 bytes, 1 units, |s, b, _u| {
        let d = half_e8m0(b[0]);
        let [low, high] = nibbles(s, quants(s, b, 1));
        [looked_up(s, d, low, &E2M1_DOUBLED), looked_up(s, d, high, &E2M1_DOUBLED)]
    }
}

/// Sixteen numbers from their bytes.
#[inline(always)]
fn f32s(bytes: &[u8; 64]) -> [f32; 16] {
    bytemuck::pod_read_unaligned(bytes)
}

/// The 6-bit scale of sub-block `k`, less 32, in the packed bytes of `Q3_K`.
#[inline(always)]
fn q3_scale(block: &[u8; 110], k: usize) -> f32 {
    let low = if k < 8 { block[96 + k] & 15 } else { block[88 + k] >> 4 };
    let high = (block[104 + k % 4] >> (2 * (k / 4))) & 3;
    f32::from(low | (high << 4)) - 32.0
}

/// The 6-bit scale and minimum of unit `u` in the twelve packed bytes of `Q4_K` and `Q5_K`.
#[inline(always)]
fn scale_and_min(packed: &[u8; 12], u: usize) -> (f32, f32) {
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
