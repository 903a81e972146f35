//! Scales for the K formats and the IQ4 formats, by least squares.
//!
//! A sub-block's codes and its scale depend on each other, so several scales are tried: each gives codes, the codes
//! give the best scale for them in closed form, and the pair with the smallest squared error wins. Then the sub-blocks'
//! scales are quantised themselves, the codes are chosen again with what a decoder will see, and the block's own scale
//! is fitted once more to the result for as long as that helps.
//!
//! Plain f32 in a fixed order: sums over elements run in [`LANES`] lanes. The same bytes on every machine.

use super::encode::{finite_half, largest_magnitude, peak, range};
use super::f16::Half;

const LANES: usize = 8;

/// A block of signed codes: element = `(d * scales[sub]) * q`.
pub(super) struct Symmetric<const SUBS: usize> {
    pub(super) d: Half,
    pub(super) scales: [i8; SUBS],
    /// Codes in `-n ..= n - 1` for the asked `n`.
    pub(super) q: [i8; 256],
}

/// A block of unsigned codes: element = `(d * scales[sub]) * q - dmin * mins[sub]`.
pub(super) struct Affine<const SUBS: usize> {
    pub(super) d: Half,
    pub(super) dmin: Half,
    pub(super) scales: [u8; SUBS],
    pub(super) mins: [u8; SUBS],
    pub(super) q: [u8; 256],
}

/// Codes and scales of a block with codes in `-n_q ..= n_q - 1` and scales in `-n_scale ..= n_scale - 1`.
/// `SUB * SUBS == 256`. `None` if the block does not fit.
pub(super) fn symmetric_block<const SUB: usize, const SUBS: usize>(
    x: &[f32; 256],
    n_q: f32,
    n_scale: f32,
) -> Option<Symmetric<SUBS>> {
    fits(x)?;
    let subs = x.as_chunks::<SUB>().0;
    let wanted: [f32; SUBS] = std::array::from_fn(|s| symmetric_scale(&subs[s], n_q));
    let mut d = finite_half(peak(&wanted)? / -n_scale)?;
    let inverse = inverse(d.to_f32());
    let scales = wanted.map(|scale| round(scale * inverse).max(-n_scale).min(n_scale - 1.0));

    let codes = |d: Half| {
        let mut q = [0.0; 256];
        for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<SUB>().0).enumerate() {
            *q = scaled(x, self::inverse(d.to_f32() * scales[s]), 0.0, -n_q, n_q - 1.0);
        }
        let products = std::array::from_fn(|i| q[i] * scales[i / SUB]);
        (q, products)
    };
    let error = |d: Half, products: &[f32; 256]| squared_distance(x, &products.map(|product| d.to_f32() * product));
    let (mut q, mut products) = codes(d);
    for _ in 0..3 {
        let Some(next) = finite_half(dot(x, &products) / dot(&products, &products)) else { break };
        let (next_q, next_products) = codes(next);
        if error(next, &next_products) >= error(d, &products) {
            break;
        }
        (d, q, products) = (next, next_q, next_products);
    }
    Some(Symmetric { d, scales: scales.map(|scale| scale as i8), q: q.map(|q| q as i8) })
}

/// Codes, scales and minima of a block with codes in `0 ..= max_q`, scales and minima in `0 ..= max_scale`.
/// `SUB * SUBS == 256`. `None` if the block does not fit.
pub(super) fn affine_block<const SUB: usize, const SUBS: usize>(
    x: &[f32; 256],
    max_q: f32,
    max_scale: f32,
) -> Option<Affine<SUBS>> {
    fits(x)?;
    let subs = x.as_chunks::<SUB>().0;
    let wanted: [(f32, f32); SUBS] = std::array::from_fn(|s| affine_scale(&subs[s], max_q));
    let (wanted_scales, wanted_mins) = (wanted.map(|w| w.0), wanted.map(|w| w.1));
    let mut d = finite_half(largest_magnitude(&wanted_scales) / max_scale)?;
    let mut dmin = finite_half(largest_magnitude(&wanted_mins) / max_scale)?;
    let quantised = |wanted: [f32; SUBS], d: Half| wanted.map(|w| round(w * inverse(d.to_f32())).min(max_scale));
    let (scales, mins) = (quantised(wanted_scales, d), quantised(wanted_mins, dmin));
    let spread_mins: [f32; 256] = std::array::from_fn(|i| mins[i / SUB]);

    let codes = |d: Half, dmin: Half| {
        let mut q = [0.0; 256];
        for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<SUB>().0).enumerate() {
            let (inverse, min) = (inverse(d.to_f32() * scales[s]), dmin.to_f32() * mins[s]);
            *q = scaled(x, inverse, -min, 0.0, max_q);
        }
        let products: [f32; 256] = std::array::from_fn(|i| q[i] * scales[i / SUB]);
        (q, products)
    };
    let error = |d: Half, dmin: Half, products: &[f32; 256]| {
        let (d, dmin) = (d.to_f32(), dmin.to_f32());
        squared_distance(x, &std::array::from_fn(|i| d * products[i] - dmin * spread_mins[i]))
    };
    let (mut q, mut products) = codes(d, dmin);
    for _ in 0..3 {
        let Some((next, next_min)) = affine_refit(x, &products, &spread_mins) else { break };
        let (next_q, next_products) = codes(next, next_min);
        if error(next, next_min, &next_products) >= error(d, dmin, &products) {
            break;
        }
        (d, dmin, q, products) = (next, next_min, next_q, next_products);
    }
    let bytes = |values: [f32; SUBS]| values.map(|value| value as u8);
    Some(Affine { d, dmin, scales: bytes(scales), mins: bytes(mins), q: q.map(|q| q as u8) })
}

/// A block whose codes index a table of 16 values that ascend from `-127`: element = `(d * scales[sub]) * value`,
/// scales in `-n_scale ..= n_scale - 1`. Returns codes in `q`.
pub(super) fn table_block<const SUB: usize, const SUBS: usize>(
    x: &[f32; 256],
    values: &[i8; 16],
    n_scale: f32,
) -> Option<Symmetric<SUBS>> {
    fits(x)?;
    let subs = x.as_chunks::<SUB>().0;
    let wanted: [f32; SUBS] = std::array::from_fn(|s| table_scale(&subs[s], values));
    let d = finite_half(peak(&wanted)? / -n_scale)?;
    let inverse = inverse(d.to_f32());
    let scales = wanted.map(|scale| round(scale * inverse).max(-n_scale).min(n_scale - 1.0));
    let mut q = [0; 256];
    for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<SUB>().0).enumerate() {
        *q = table_codes(x, d.to_f32() * scales[s], values).map(|code| code as i8);
    }
    Some(Symmetric { d, scales: scales.map(|scale| scale as i8), q })
}

/// The scale for codes that index `values`: of those that put the peak near the table's end, the best.
pub(super) fn table_scale<const N: usize>(x: &[f32; N], values: &[i8; 16]) -> f32 {
    let Some(peak) = peak(x) else { return 0.0 };
    let (mut best_gain, mut best_scale) = (0.0, 0.0);
    for step in -4..=4 {
        let inverse = (values[0] as f32 + 4.0 * step as f32) / peak;
        if !inverse.is_finite() {
            return 0.0;
        }
        let v = nearest(x, inverse, values);
        let (xv, vv) = (dot(x, &v), dot(&v, &v));
        if xv * xv > best_gain * vv {
            (best_gain, best_scale) = (xv * xv / vv, xv / vv);
        }
    }
    best_scale
}

/// The codes of the values nearest to `x / scale`.
pub(super) fn table_codes<const N: usize>(x: &[f32; N], scale: f32, values: &[i8; 16]) -> [u8; N] {
    let nearest = nearest(x, inverse(scale), values);
    nearest.map(|value| values.iter().position(|other| *other as f32 == value).unwrap_or(0) as u8)
}

/// The value of the ascending table that is nearest to each `x * inverse`, ties downwards.
///
/// Climbs the table for all elements at once: compilers make vector code of that, and of a look-up they do not.
fn nearest<const N: usize>(x: &[f32; N], inverse: f32, values: &[i8; 16]) -> [f32; N] {
    let mut nearest = [values[0] as f32; N];
    for pair in values.windows(2) {
        let (low, high) = (pair[0] as f32, pair[1] as f32);
        let middle = 0.5 * (low + high);
        for (x, nearest) in x.iter().zip(&mut nearest) {
            *nearest = if x * inverse > middle { high } else { *nearest };
        }
    }
    nearest
}

/// Rejects what is not finite and what no scale could hold, so that no sum here overflows.
pub(super) fn fits<const N: usize>(x: &[f32; N]) -> Option<()> {
    // The largest f16, times the largest scale (128), times the largest code (64); NaN compares false.
    (largest_magnitude(x) <= 65504.0 * 128.0 * 64.0).then_some(())
}

/// The scale for codes `-n ..= n - 1`: of those that put the peak near `-n`, the best.
fn symmetric_scale<const N: usize>(x: &[f32; N], n: f32) -> f32 {
    let Some(peak) = peak(x) else { return 0.0 };
    let (mut best_gain, mut best_scale) = (0.0, 0.0);
    for step in -9..=9 {
        let inverse = (0.1 * step as f32 - n) / peak;
        if !inverse.is_finite() {
            return 0.0;
        }
        let q = scaled(x, inverse, 0.0, -n, n - 1.0);
        // The best multiple of q leaves |x|^2 - (x.q)^2 / |q|^2.
        let (xq, qq) = (dot(x, &q), dot(&q, &q));
        if xq * xq > best_gain * qq {
            (best_gain, best_scale) = (xq * xq / qq, xq / qq);
        }
    }
    best_scale
}

/// Scale and minimum (`x ~ scale * q - min`, neither negative) for codes `0 ..= max_q`.
fn affine_scale<const N: usize>(x: &[f32; N], max_q: f32) -> (f32, f32) {
    let Some((low, high)) = range(x) else { return (0.0, 0.0) };
    let low = low.min(0.0);
    let (n, sum_x) = (N as f32, sum(x));
    let (mut best_error, mut best) = (f32::INFINITY, (0.0, -low));
    for step in -10..=10 {
        let inverse = (max_q + 0.1 * step as f32) / (high - low);
        if !inverse.is_finite() {
            break;
        }
        let q = scaled(x, inverse, low, 0.0, max_q);
        let (sum_q, qq, xq) = (sum(&q), dot(&q, &q), dot(x, &q));
        let determinant = n * qq - sum_q * sum_q;
        let (mut scale, mut offset) = ((n * xq - sum_x * sum_q) / determinant, (qq * sum_x - sum_q * xq) / determinant);
        // The format can only subtract. All codes equal (determinant 0) is a multiple of q as well.
        if offset > 0.0 || determinant == 0.0 {
            (scale, offset) = (xq / qq, 0.0);
        }
        let error = squared_distance(x, &q.map(|q| scale * q + offset));
        if error < best_error {
            (best_error, best) = (error, (scale, -offset));
        }
    }
    best
}

/// The `d` and `dmin` for which `d * products - dmin * mins` is nearest to `x`; `None` if the system is singular or
/// the solution is not for this format.
fn affine_refit(x: &[f32; 256], products: &[f32; 256], mins: &[f32; 256]) -> Option<(Half, Half)> {
    let (pp, pm, mm) = (dot(products, products), dot(products, mins), dot(mins, mins));
    let (xp, xm) = (dot(x, products), dot(x, mins));
    let determinant = pp * mm - pm * pm;
    // Sums in f32: a determinant this small against its terms is all rounding.
    if determinant <= 1e-5 * pp * mm {
        return None;
    }
    let (d, dmin) = ((xp * mm - xm * pm) / determinant, (xp * pm - xm * pp) / determinant);
    if d < 0.0 || dmin < 0.0 { None } else { Some((finite_half(d)?, finite_half(dmin)?)) }
}

/// `(x - offset) * inverse`, rounded and clamped.
#[inline(always)]
fn scaled<const N: usize>(x: &[f32; N], inverse: f32, offset: f32, min: f32, max: f32) -> [f32; N] {
    let mut q = [0.0; N];
    for (q, x) in q.iter_mut().zip(x) {
        let rounded = round((x - offset) * inverse);
        let raised = if rounded > min { rounded } else { min };
        *q = if raised < max { raised } else { max };
    }
    q
}

/// `1 / scale`; 0 for a scale of 0, which decodes to 0 whatever the code.
#[inline]
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// To the nearest integer, ties to even, for magnitudes below 2^22: two additions where the baseline of x86-64 has no
/// rounding instruction.
#[inline(always)]
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: the unit in the last place is 1
    (x + SHIFT) - SHIFT
}

#[inline(always)]
fn sum<const N: usize>(a: &[f32; N]) -> f32 {
    lanes::<N>(|i| a[i])
}

#[inline(always)]
fn dot<const N: usize>(a: &[f32; N], b: &[f32; N]) -> f32 {
    lanes::<N>(|i| a[i] * b[i])
}

#[inline(always)]
fn squared_distance<const N: usize>(a: &[f32; N], b: &[f32; N]) -> f32 {
    lanes::<N>(|i| (a[i] - b[i]) * (a[i] - b[i]))
}

/// The sum of `term(0) .. term(N - 1)`, in [`LANES`] lanes that are added pairwise at the end. `N % LANES == 0`.
#[inline(always)]
fn lanes<const N: usize>(term: impl Fn(usize) -> f32) -> f32 {
    const { assert!(N.is_multiple_of(LANES)) };
    let mut lanes = [0.0; LANES];
    for first in (0..N).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(first + lane);
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
