//! Regression suite of MXFP4: its definition, accuracy bounds, extreme exponents, zeros, and a captured baseline.
//!
//! The bytes of the encoder are compared with the `gguf` package's in `dtype.rs`.

use playhouse::dtype::DType;
use playhouse::dtype::mxfp4::{Block, VALUES, decode_block, encode_block, half_scale};

/// Magnitudes of E2M1, OCP Microscaling Formats v1.0, table 5.
const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

fn decode(block: &Block) -> [f32; 32] {
    let mut out = [0.0; 32];
    decode_block(block, &mut out);
    out
}

/// Codes of the 32 elements.
fn codes(block: &Block) -> [u8; 32] {
    std::array::from_fn(|i| if i < 16 { block.qs[i] & 0x0f } else { block.qs[i - 16] >> 4 })
}

fn round_trip(x: &[f32; 32]) -> [f32; 32] {
    decode(&encode_block(x).unwrap())
}

/// 32 numbers in (-1, 1), another 32 for each `seed`.
fn uniform(seed: u64) -> [f32; 32] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((state >> 40) as i32) - (1 << 23)) as f32 / (1 << 23) as f32
    })
}

#[test]
fn every_code_at_every_exponent_is_as_defined() {
    for e in 0..=255_u8 {
        for code in 0..16_u8 {
            let sign = if code < 8 { 1.0 } else { -1.0 };
            let exact = sign * E2M1[(code & 7) as usize] * 2f64.powi(e as i32 - 127);
            let found = decode(&Block { e, qs: [code; 16] })[0];
            // The conversion is exact up to the range of f32; `as` makes the rest infinite.
            assert_eq!(found, exact as f32, "e {e} code {code}");
        }
    }
}

#[test]
fn half_scales_are_powers_of_two() {
    for e in 0..=255_u8 {
        assert_eq!(half_scale(e) as f64, 2f64.powi(e as i32 - 128), "{e}");
    }
    assert!(half_scale(1).is_subnormal() && half_scale(2) == f32::MIN_POSITIVE);
}

#[test]
fn low_halves_come_first() {
    let mut qs = [0; 16];
    (qs[0], qs[1], qs[15]) = (0x21, 0x43, 0x75);
    let out = decode(&Block { e: 127, qs });
    assert_eq!((out[0], out[16], out[1], out[17], out[15], out[31]), (0.5, 1.0, 1.5, 2.0, 3.0, 6.0));
    assert_eq!(encode_block(&out).unwrap(), Block { e: 127, qs });
}

#[test]
fn zeros_of_either_sign_are_code_0() {
    let mut mixed = [0.0; 32];
    mixed[3] = -0.0;
    for x in [[0.0; 32], [-0.0; 32], mixed] {
        assert_eq!(encode_block(&x).unwrap(), Block { e: 0, qs: [0; 16] });
    }
    let mut x = [-0.0; 32];
    x[5] = 1.0;
    assert_eq!(codes(&encode_block(&x).unwrap())[4], 0);
    // The code of minus zero exists in files; it decodes to plus zero.
    assert!(decode(&Block { e: 127, qs: [0x88; 16] }).iter().all(|y| y.to_bits() == 0));
}

#[test]
fn zeros_in_a_block_stay_zeros() {
    let mut x = uniform(1);
    (x[0], x[7], x[31]) = (0.0, -0.0, 0.0);
    let y = round_trip(&x);
    assert_eq!([y[0].to_bits(), y[7].to_bits(), y[31].to_bits()], [0; 3]);
}

#[test]
fn every_representable_block_survives_at_every_exponent() {
    // With 4 as the largest value the encoder finds the same scale again. From 253 on 6 scales are infinite, so the
    // encoder stops at 252; below 2 the values are subnormal and still exact.
    for e in 0..=252_u8 {
        let scale = half_scale(e);
        let x = std::array::from_fn(|i| scale * VALUES[[0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14][i % 13]] as f32);
        let y = round_trip(&x);
        assert_eq!(x, y, "e {e}");
        assert_eq!(encode_block(&x).unwrap().e, e);
    }
}

#[test]
fn the_largest_value_is_put_between_4_and_8() {
    for (largest, e, decoded) in [(4.0, 127, 4.0), (6.0, 127, 6.0), (7.9, 127, 6.0), (8.0, 128, 8.0), (3.9, 126, 3.0)] {
        let mut x = [0.0; 32];
        x[9] = -largest;
        assert_eq!(encode_block(&x).unwrap().e, e, "{largest}");
        assert_eq!(round_trip(&x)[9], -decoded, "{largest}");
    }
}

#[test]
fn ties_go_towards_zero() {
    let mut x = [0.0; 32];
    x[..9].copy_from_slice(&[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0]);
    assert_eq!(round_trip(&x)[..9], [6.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -4.0]);
    for (i, y) in [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0].into_iter().enumerate() {
        x[1 + i] = f32::from_bits(x[1 + i].to_bits() + 1);
        assert_eq!(round_trip(&x)[1 + i], y);
    }
}

/// An element is off by at most half a step of E2M1 around it; above 6 scales by what is cut off, at most 2 scales.
#[test]
fn errors_stay_within_half_a_step() {
    for seed in 0..2000 {
        let scale = 2f32.powi((seed % 61) as i32 - 30);
        let x = uniform(seed).map(|x| x * scale);
        let block = encode_block(&x).unwrap();
        let (unit, y) = (2.0 * half_scale(block.e), decode(&block));
        for (x, y) in x.iter().zip(y) {
            let magnitude = x.abs() / unit;
            assert!(magnitude < 8.0, "{x} in units of {unit}");
            let half_step =
                [(2.0, 0.25), (4.0, 0.5), (6.0, 1.0), (8.0, 2.0)].iter().find(|s| magnitude <= s.0).unwrap().1;
            assert!((x - y).abs() <= half_step * unit, "seed {seed}: {x} became {y}, unit {unit}");
        }
    }
}

#[test]
fn codes_are_the_nearest() {
    for seed in 0..2000 {
        let x = uniform(seed).map(|x| x * x * x);
        let block = encode_block(&x).unwrap();
        let unit = half_scale(block.e) as f64;
        for (x, code) in x.iter().zip(codes(&block)) {
            let distance = |code: usize| (*x as f64 - unit * VALUES[code] as f64).abs();
            let nearest = (0..16).map(distance).fold(f64::INFINITY, f64::min);
            assert_eq!(distance(code as usize), nearest, "seed {seed}: {x} has code {code}");
        }
    }
}

#[test]
fn extreme_magnitudes_neither_wrap_nor_overflow() {
    for (largest, e) in [(f32::MAX, 252), (2f32.powi(127), 252), (1.5 * 2f32.powi(126), 251)] {
        let y = round_trip(&[largest; 32]);
        assert_eq!(encode_block(&[largest; 32]).unwrap().e, e, "{largest:e}");
        assert!(y.iter().all(|y| y.is_finite() && *y > 0.5 * largest), "{largest:e} became {:e}", y[0]);
    }
    // Below 2^-125 the exponent would be negative: such blocks share the smallest scale instead of wrapping to huge ones.
    for largest in [2f32.powi(-125), 2f32.powi(-126), 2f32.powi(-128), 2f32.powi(-140), f32::from_bits(1)] {
        let block = encode_block(&[largest; 32]).unwrap();
        assert_eq!(block.e, 0, "{largest:e}");
        assert!((decode(&block)[0] - largest).abs() <= 2f32.powi(-129), "{largest:e}");
    }
    // E8M0 255 is NaN in the OCP text; GGUF has it as one more exponent.
    assert_eq!(decode(&Block { e: 255, qs: [0x01; 16] })[0], 2f32.powi(127));
    assert_eq!(decode(&Block { e: 255, qs: [0x0f; 16] })[0], f32::NEG_INFINITY);
}

#[test]
fn misfits_are_refused() {
    for misfit in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = uniform(1);
        x[31] = misfit;
        assert_eq!(encode_block(&x), None);
        assert!(DType::MXFP4.encode(&x, &mut [0; 17]).is_err());
    }
}

/// One block written out by hand, and the accuracy on uniform and on peaked data as it was when this was written.
#[test]
fn captured_baseline() {
    let x: [f32; 32] = std::array::from_fn(|i| (i as f32 - 15.5) / 4.0);
    let expected = Block { e: 126, qs: [15, 31, 47, 63, 79, 95, 94, 110, 110, 109, 125, 124, 123, 122, 121, 112] };
    assert_eq!(encode_block(&x).unwrap(), expected);

    let error = |shape: fn(f32) -> f32| {
        let (mut error, mut total) = (0.0_f64, 0.0_f64);
        for seed in 0..1000 {
            let x = uniform(seed).map(shape);
            for (x, y) in x.iter().zip(round_trip(&x)) {
                error += (*x as f64 - y as f64).powi(2);
                total += (*x as f64).powi(2);
            }
        }
        (error / total).sqrt()
    };
    let (uniform, peaked) = (error(|x| x), error(|x| x * x * x));
    assert!((uniform - 0.144295580206).abs() < 1e-9, "uniform: {uniform:.12}");
    assert!((peaked - 0.139592547859).abs() < 1e-9, "peaked: {peaked:.12}");
}
