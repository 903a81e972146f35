//! `exp` and what is made of it, the same bits on every instruction set.
//!
//! The C library's `expf` differs between systems in the last bit, and `libm`'s is scalar. This one is a range
//! reduction (`x = n ln 2 + r`, `|r| <= ln 2 / 2`) and the Taylor polynomial of degree 7 in `r`, whose remainder
//! there is below 6e-9; rounding dominates, and the result is within 2 units in the last place.

use super::lanes::{Lanes, Portable, ROUND_BIAS, dispatch, padded};

/// Below this `exp` is smaller than the smallest normal f32: arguments are raised to it.
const EXP_MIN: f32 = -87.336;
/// Above this `n` would exceed 127: arguments are lowered to it. `exp(88.37)` is 2.4e38.
const EXP_MAX: f32 = 88.37;
/// The upper bits of ln 2, 355 / 512, so that `n * LN2_HI` is exact.
const LN2_HI: f32 = 355.0 / 512.0;
/// The rest of ln 2.
const LN2_LO: f32 = -2.121_944_4e-4;
/// `1 / 7!` down to `1 / 0!`.
const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// `exp` of sixteen lanes; arguments are clamped to `-87.336 ..= 88.37`.
#[inline(always)]
pub(crate) fn exp_lanes<S: Lanes>(s: S, x: S::F) -> S::F {
    // The limit is the first operand, so that a NaN comes through.
    let x = s.min(s.splat(EXP_MAX), s.max(s.splat(EXP_MIN), x));
    let biased = s.add(s.mul(x, s.splat(std::f32::consts::LOG2_E)), s.splat(ROUND_BIAS));
    let n = s.sub(biased, s.splat(ROUND_BIAS));
    let r = s.sub(s.sub(x, s.mul(n, s.splat(LN2_HI))), s.mul(n, s.splat(LN2_LO)));
    let mut p = s.splat(TAYLOR[0]);
    for c in &TAYLOR[1..] {
        p = s.add(s.mul(p, r), s.splat(*c));
    }
    s.mul(p, s.pow2_biased(biased))
}

/// `exp` of one number, bit-equal to a lane of [`exp_lanes`].
pub(crate) fn exp(x: f32) -> f32 {
    exp_lanes(Portable, [x; 16])[0]
}

/// `1 / (1 + exp(-x))`, lane by lane.
#[inline(always)]
pub(crate) fn sigmoid_lanes<S: Lanes>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp_lanes(s, s.sub(s.splat(0.0), x))))
}

#[inline(always)]
fn exp_minus_lanes<S: Lanes>(s: S, x: &mut [f32], max: f32) {
    let max = s.splat(max);
    let (whole, rest) = x.as_chunks_mut::<16>();
    for chunk in whole {
        s.store(exp_lanes(s, s.sub(s.load(chunk), max)), chunk);
    }
    if !rest.is_empty() {
        let mut out = [0.0; 16];
        s.store(exp_lanes(s, s.sub(s.load(&padded(rest)), max)), &mut out);
        rest.copy_from_slice(&out[..rest.len()]);
    }
}

dispatch!(
    /// `x[i] = exp(x[i] - max)`.
    pub(crate) fn exp_minus(x: &mut [f32], max: f32) = exp_minus_lanes
);

/// `cap * tanh(x / cap)` of each element, if there is a cap.
pub(crate) fn softcap(x: &mut [f32], cap: Option<f32>) {
    if let Some(cap) = cap {
        for x in x {
            *x = cap * libm::tanhf(*x / cap);
        }
    }
}
