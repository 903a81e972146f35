//! The weight of a logit: an integer, so that sums over the vocabulary come out the same in any order, on any device.

/// The weight of the most likely id: 2^43. Sums over up to 2^20 ids fit 64 bits; an id 2^-44 times as likely has weight 0.
pub const WEIGHT_ONE: u64 = 1 << 43;

/// `round(2^43 * exp((logit - max) / temperature))`, ties up; `logit <= max`, `temperature > 0`.
///
/// The difference and the quotient are f64 (the difference of two f32 is exact or as good as), the exponential is
/// [`exp_nonpositive`].
pub fn weight(logit: f32, max: f32, temperature: f32) -> u64 {
    let x = (f64::from(logit) - f64::from(max)) / f64::from(temperature);
    // exp(-31) * 2^43 < 1/2: the quick way out for most of a vocabulary.
    if x < -31.0 { 0 } else { (exp_nonpositive(x) * WEIGHT_ONE as f64 + 0.5) as u64 }
}

/// `exp(x)` for `-700 <= x <= 0`, within 1e-15 relative.
///
/// Written out in additions and multiplications, each rounded to f64 and none contracted, so that every device can give
/// the same bits: range reduction by `k ln 2` in two parts (Cody and Waite 1980), then the Taylor polynomial of degree 13.
pub fn exp_nonpositive(x: f64) -> f64 {
    const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN2_LOW: f64 = f64::from_bits(0x3dea_39ef_3579_3c76);
    let k = (x * std::f64::consts::LOG2_E + 0.5).floor();
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    let mut sum = 1.0 / 6_227_020_800.0; // 1 / 13!
    for inverse_factorial in INVERSE_FACTORIALS {
        sum = sum * r + inverse_factorial;
    }
    sum * f64::from_bits(((k as i64 + 1023) as u64) << 52)
}

/// `1 / n!` for n = 12 down to 0.
const INVERSE_FACTORIALS: [f64; 13] = [
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    1.0 / 2.0,
    1.0,
    1.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_library_s() {
        for i in 0..200_000 {
            let x = -f64::from(i) * 0.000_157;
            let (found, expected) = (exp_nonpositive(x), libm::exp(x));
            assert!((found - expected).abs() <= 1e-15 * expected, "exp({x}) = {found}, expected {expected}");
        }
    }

    #[test]
    fn weights_at_the_ends() {
        assert_eq!(weight(3.5, 3.5, 0.7), WEIGHT_ONE);
        assert_eq!(weight(f32::NEG_INFINITY, 3.5, 0.7), 0);
        assert_eq!(weight(-1.0e38, 1.0e38, 1.0e-30), 0);
        assert_eq!(weight(0.0, 30.0, 1.0), (libm::exp(-30.0) * WEIGHT_ONE as f64).round() as u64);
        assert_eq!(weight(0.0, 31.0, 1.0), 0);
    }

    #[test]
    fn exp_bits_are_fixed() {
        // From the same operations in Python: another compiler, target or device must give the same.
        for (x, bits) in RECORDED_EXP {
            assert_eq!(exp_nonpositive(x).to_bits(), bits, "exp({x}) = {:#x}", exp_nonpositive(x).to_bits());
        }
    }

    const RECORDED_EXP: [(f64, u64); 5] = [
        (0.0, 0x3ff0_0000_0000_0000),
        (-0.1, 0x3fec_f46d_99d5_2b3a),
        (-1.0, 0x3fd7_8b56_362c_ef38),
        (-7.25, 0x3f47_455f_e323_fafe),
        (-30.5, 0x3d2f_f386_4232_b407),
    ];
}
