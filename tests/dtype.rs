//! The block formats against the `gguf` Python package (`golden/dtype`), round trips, and misuse.

use std::path::Path;

use playhouse::dtype::{DType, DTypeError, FILL_ELEMS, RandomBlocks, f16::Half, type_name};
use proptest::prelude::*;

fn golden(dtype: DType, what: &str) -> Option<Vec<u8>> {
    let name = format!("tests/golden/dtype/{}.{what}.bin", dtype.name().to_lowercase());
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).ok()
}

/// Splits a golden into its blocks' bytes and its elements, whichever comes first.
fn split(dtype: DType, bytes: &[u8], blocks_first: bool) -> (Vec<u8>, Vec<f32>) {
    let n_blocks = bytes.len() / (dtype.block_bytes() + 4 * dtype.block_elems());
    assert_eq!(bytes.len(), n_blocks * (dtype.block_bytes() + 4 * dtype.block_elems()), "{dtype}");
    let first = if blocks_first { n_blocks * dtype.block_bytes() } else { 4 * n_blocks * dtype.block_elems() };
    let (first, second) = bytes.split_at(first);
    let (blocks, elems) = if blocks_first { (first, second) } else { (second, first) };
    (blocks.to_vec(), elems.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
}

fn decode(dtype: DType, bytes: &[u8], n_elems: usize) -> Vec<f32> {
    let mut out = vec![0.0; n_elems];
    dtype.decode(bytes, &mut out).unwrap();
    out
}

fn encode(dtype: DType, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(x.len()).unwrap()];
    dtype.encode(x, &mut bytes).unwrap();
    bytes
}

/// Equal bits, or NaN both: an invalid product has another sign on other processors.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn decoders_equal_gguf_py_bit_for_bit() {
    for &dtype in DType::ALL {
        let (blocks, expected) = split(dtype, &golden(dtype, "decode").unwrap(), true);
        let found = decode(dtype, &blocks, expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(same(*found, *expected), "{dtype} element {i}: expected {expected:e}, found {found:e}");
        }
    }
}

#[test]
fn encoders_equal_gguf_py_byte_for_byte() {
    let with_golden: Vec<&DType> = DType::ALL.iter().filter(|dtype| golden(**dtype, "encode").is_some()).collect();
    assert_eq!(with_golden.len(), 8, "{with_golden:?}");
    for &dtype in with_golden {
        let (expected, x) = split(dtype, &golden(dtype, "encode").unwrap(), false);
        let found = encode(dtype, &x);
        let (size, elems) = (dtype.block_bytes(), dtype.block_elems());
        for (i, (found, expected)) in found.chunks(size).zip(expected.chunks(size)).enumerate() {
            let x = &x[i * elems..(i + 1) * elems];
            assert_eq!(found, expected, "{dtype} block {i} of {x:?}");
        }
    }
}

/// `n` weights of standard deviation 0.02, near enough to normal (sums of 12 uniforms), in exact arithmetic.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as i64
    };
    (0..n).map(|_| ((0..12).map(|_| uniform()).sum::<i64>() - (6 << 24)) as f32 * (0.02 / 16_777_216.0)).collect()
}

/// Root of the mean squared error over root of the mean square.
fn relative_error(x: &[f32], y: &[f32]) -> f64 {
    let squared = |x: f64| x * x;
    let error: f64 = x.iter().zip(y).map(|(x, y)| squared(*x as f64 - *y as f64)).sum();
    (error / x.iter().map(|x| squared(*x as f64)).sum::<f64>()).sqrt()
}

/// FNV-1a, 64 bits.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ *byte as u64).wrapping_mul(0x100_0000_01b3))
}

/// What each encoder makes of [`weights`]: a hash of the bytes, and a bound on the relative error. A later version that
/// changes a hash changes files that users have made; it must say so, and may not be less accurate.
#[test]
fn encoders_reproduce_the_captured_baseline() {
    let baseline = [
        (DType::F32, 0x6fff_9385_3085_c588, 0.0),
        (DType::F16, 0x0539_defe_8b65_b1b3, 0.0002074),
        (DType::BF16, 0x168b_66fd_bad8_21d9, 0.001669),
        (DType::Q4_0, 0x80ee_9b24_6590_02b6, 0.08364),
        (DType::Q4_1, 0x5df6_3358_1f23_86e6, 0.0766),
        (DType::Q5_0, 0xf6a9_c6a0_b098_4e99, 0.04135),
        (DType::Q5_1, 0x5062_a447_5a9a_1653, 0.03714),
        (DType::Q8_0, 0x5f43_475d_10e6_f015, 0.005209),
        (DType::Q2_K, 0x4409_33a6_0441_32b3, 0.265),
        (DType::Q3_K, 0xa44d_8afc_5a6b_35ae, 0.141),
        (DType::Q4_K, 0x9694_f9bc_3e06_6767, 0.06938),
        (DType::Q5_K, 0xf504_9116_14a7_f31c, 0.03494),
        (DType::Q6_K, 0x52b2_6867_7159_f3d2, 0.01696),
        (DType::IQ4_NL, 0xe90b_89a5_04ad_27f0, 0.07308),
        (DType::IQ4_XS, 0x8b09_bb45_f3f2_8873, 0.07377),
        (DType::MXFP4, 0x4c66_e320_a768_9382, 0.1126),
    ];
    assert_eq!(baseline.map(|row| row.0), DType::ALL);
    let x = weights(64 * 256);
    for (dtype, expected_hash, max_error) in baseline {
        let bytes = encode(dtype, &x);
        let error = relative_error(&x, &decode(dtype, &bytes, x.len()));
        assert_eq!(hash(&bytes), expected_hash, "{dtype}: {:#018x}, relative error {error:.5}", hash(&bytes));
        assert!(error <= max_error, "{dtype}: relative error {error:.5}, at most {max_error}");
    }
}

/// The most that one element can be off, as a part of the largest magnitude of its block: half a step of the grid, and
/// for the grids that end earlier on one side what is cut off there, with room for the rounding of f16 scales.
#[test]
fn round_trips_stay_within_their_bounds() {
    let bounds = [
        (DType::F32, 0.0),
        (DType::F16, 1.0 / 2048.0),
        (DType::BF16, 1.0 / 256.0),
        (DType::Q4_0, 1.0 / 8.0 + 1e-3),
        (DType::Q4_1, 1.0 / 15.0 + 2e-3),
        (DType::Q5_0, 1.0 / 16.0 + 1e-3),
        (DType::Q5_1, 1.0 / 31.0 + 2e-3),
        (DType::Q8_0, 0.5 / 127.0 + 5e-4),
        (DType::MXFP4, 0.25 + 1e-6),
        // For these the bound is on the largest magnitude of the 256: a least squared error lets single elements go.
        (DType::Q2_K, 0.45),
        (DType::Q3_K, 0.25),
        (DType::Q4_K, 0.10),
        (DType::Q5_K, 0.06),
        (DType::Q6_K, 0.04),
        (DType::IQ4_NL, 0.20),
        (DType::IQ4_XS, 0.20),
    ];
    for sigma in [1e-2, 1.0, 300.0_f32] {
        let x: Vec<f32> = weights(256 * 64).iter().map(|x| x * 50.0 * sigma).collect();
        for (dtype, bound) in bounds {
            let y = decode(dtype, &encode(dtype, &x), x.len());
            let block = dtype.block_elems();
            for (x, y) in x.chunks(block).zip(y.chunks(block)) {
                let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                for (x, y) in x.iter().zip(y) {
                    // 3e-8 is half the step of subnormal f16.
                    assert!((x - y).abs() <= bound * largest + 3e-8, "{dtype}: {x} became {y}, largest {largest}");
                }
            }
        }
    }
}

#[test]
fn zeros_stay_zeros() {
    for &dtype in DType::ALL {
        let y = decode(dtype, &encode(dtype, &[0.0; 512]), 512);
        assert!(y.iter().all(|y| *y == 0.0), "{dtype}");
    }
}

#[test]
fn constant_rows_keep_their_value() {
    for &dtype in DType::ALL {
        for value in [1.0_f32, -1.0, 0.037, -2000.0] {
            let y = decode(dtype, &encode(dtype, &[value; 256]), 256);
            let worst = y.iter().fold(0.0_f32, |worst, y| worst.max((y - value).abs() / value.abs()));
            // E2M1 ends at 6 scales of the 8 that the largest element may have; the other grids reach the only magnitude.
            let bound = if dtype == DType::MXFP4 { 0.25 } else { 4e-3 };
            assert!(worst <= bound, "{dtype}: {value} is off by {worst}");
        }
    }
}

#[test]
fn table_agrees_with_ggml() {
    let ggml = [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("MXFP4", 39, 32, 17),
    ];
    let found = DType::ALL.iter().map(|dtype| (dtype.name(), dtype.id(), dtype.block_elems(), dtype.block_bytes()));
    assert_eq!(found.collect::<Vec<_>>(), ggml);
    for &dtype in DType::ALL {
        assert_eq!(DType::from_id(dtype.id()), Some(dtype));
        assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        assert_eq!(DType::from_name(&dtype.name().to_lowercase()), Some(dtype));
        assert_eq!(type_name(dtype.id()), Some(dtype.name()));
        assert_eq!(format!("{dtype:>8}"), format!("{:>8}", dtype.name()));
        assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
        assert_eq!(format!("{dtype:?}"), dtype.name());
    }
}

#[test]
fn refused_types_have_names() {
    assert_eq!(type_name(16), Some("IQ2_XXS"));
    assert_eq!(type_name(9), Some("Q8_1"));
    assert_eq!(type_name(40), Some("NVFP4"));
    for id in 0..42 {
        assert!(type_name(id).is_some(), "{id}");
    }
    for id in [42, 255, u32::MAX] {
        assert_eq!((type_name(id), DType::from_id(id)), (None, None));
    }
    assert_eq!((DType::from_id(16), DType::from_name("IQ2_XXS"), DType::from_name("")), (None, None, None));
}

#[test]
fn row_bytes_refuses_parts_of_blocks_and_overflow() {
    assert_eq!(DType::Q4_K.row_bytes(896), None);
    assert_eq!(DType::Q8_0.row_bytes(896), Some(28 * 34));
    assert_eq!(DType::Q4_K.row_bytes(0), Some(0));
    assert_eq!(DType::F32.row_bytes(usize::MAX), None);
    assert_eq!(DType::F16.row_bytes(usize::MAX / 2 + 1), None);
    assert_eq!(DType::Q8_0.row_bytes(usize::MAX - 31), None);
    assert_eq!(DType::Q4_K.row_bytes(usize::MAX - 255), Some((usize::MAX / 256) * 144));
}

#[test]
fn wrong_lengths_are_errors() {
    for &dtype in DType::ALL {
        let (elems, size) = (dtype.block_elems(), dtype.block_bytes());
        for n_elems in [1, 17, 31, 33, 255, 257] {
            let (found, expected) = (size - 1, dtype.row_bytes(n_elems));
            let decoded = dtype.decode(&vec![0; found], &mut vec![0.0; n_elems]);
            let encoded = dtype.encode(&vec![0.0; n_elems], &mut vec![0; found]);
            let error = match expected {
                None => DTypeError::PartialBlock { dtype, n_elems },
                Some(expected) => DTypeError::ByteLength { dtype, n_elems, expected, found },
            };
            assert_eq!((decoded, encoded), (Err(error), Err(error)));
        }
        let error = DTypeError::ByteLength { dtype, n_elems: 2 * elems, expected: 2 * size, found: 2 * size + 1 };
        assert_eq!(dtype.decode(&vec![0; 2 * size + 1], &mut vec![0.0; 2 * elems]), Err(error));
        assert_eq!(dtype.decode(&[], &mut []), Ok(()));
        assert_eq!(dtype.encode(&[], &mut []), Ok(()));
    }
    let message = DType::Q4_K.decode(&[], &mut [0.0; 100]).unwrap_err().to_string();
    assert_eq!(
        message,
        "Q4_K holds whole blocks of 256 elements, found 100 elements; choose another type for this row length"
    );
    let message = DType::Q8_0.decode(&[0; 33], &mut [0.0; 32]).unwrap_err().to_string();
    assert_eq!(message, "32 elements of Q8_0 take 34 bytes, found 33");
}

#[test]
fn quantised_types_refuse_what_they_cannot_hold() {
    let quantised = DType::ALL.iter().filter(|dtype| dtype.block_elems() > 1);
    for &dtype in quantised {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let mut x = [0.5; 512];
            x[300] = value;
            let error = dtype.encode(&x, &mut vec![0; dtype.row_bytes(512).unwrap()]).unwrap_err();
            assert!(
                matches!(error, DTypeError::NotFinite { index: 300, value: found, .. } if same(found, value)),
                "{dtype}: {error}"
            );
        }
        let mut x = [0.5; 512];
        x[300] = -3e38;
        let result = dtype.encode(&x, &mut vec![0; dtype.row_bytes(512).unwrap()]);
        if dtype == DType::MXFP4 {
            assert_eq!(result, Ok(()), "its scale has the range of f32");
        } else {
            assert_eq!(result, Err(DTypeError::TooLarge { dtype, index: 300, value: -3e38 }));
        }
    }
    let error = DType::Q8_0.encode(&[1e9; 32], &mut [0; 34]).unwrap_err().to_string();
    assert!(error.starts_with("Q8_0 cannot hold 1000000000 at element 0: the scale"), "{error}");
}

#[test]
fn subnormal_and_tiny_blocks_become_zeros() {
    for &dtype in DType::ALL.iter().filter(|dtype| dtype.block_elems() > 1 && **dtype != DType::MXFP4) {
        for tiny in [f32::from_bits(1), 1e-42, 1e-39, 1e-37, 1e-30, 1e-12] {
            let x: Vec<f32> = weights(256).iter().map(|x| x * 10.0 * tiny).collect();
            let y = decode(dtype, &encode(dtype, &x), 256);
            assert!(y.iter().all(|y| y.abs() <= 6e-8), "{dtype} at {tiny:e}: {y:?}");
        }
    }
}

#[test]
fn every_half_widens_as_the_half_crate_says_and_narrows_back() {
    for bits in 0..=u16::MAX {
        let (ours, theirs) = (Half::from_bits(bits).to_f32(), half::f16::from_bits(bits).to_f32_const());
        assert_eq!(ours.to_bits(), theirs.to_bits(), "{bits:#06x}");
        if !ours.is_nan() {
            assert_eq!(Half::from_f32(ours).to_bits(), bits, "{bits:#06x}");
        }
    }
}

#[test]
fn random_blocks_have_the_asked_deviation() {
    for &dtype in DType::ALL {
        let n = 1 << 18;
        let blocks = RandomBlocks::new(dtype, 0.02, 7).unwrap();
        let mut bytes = vec![0; dtype.row_bytes(n).unwrap()];
        blocks.fill(3, 0, &mut bytes).unwrap();
        let y = decode(dtype, &bytes, n);
        let mean = y.iter().map(|y| *y as f64).sum::<f64>() / n as f64;
        let sigma = (y.iter().map(|y| (*y as f64).powi(2)).sum::<f64>() / n as f64).sqrt();
        assert!(mean.abs() < 2e-4, "{dtype}: mean {mean}");
        // Two bits lose some of the variance; the others keep it.
        let tolerance = if dtype == DType::Q2_K { 0.06 } else { 0.02 };
        assert!((sigma / 0.02 - 1.0).abs() < tolerance, "{dtype}: standard deviation {sigma}");
    }
}

#[test]
fn random_blocks_are_the_same_in_one_piece_or_many() {
    for dtype in [DType::F32, DType::BF16, DType::Q8_0, DType::MXFP4, DType::Q4_K] {
        let blocks = RandomBlocks::new(dtype, 0.02, 7).unwrap();
        let bytes_of = |n_elems: usize| dtype.row_bytes(n_elems).unwrap();
        let n = 300 * FILL_ELEMS;
        let mut whole = vec![0; bytes_of(n)];
        blocks.fill(3, 0, &mut whole).unwrap();
        for n_piece in [FILL_ELEMS, 7 * FILL_ELEMS, 256 * FILL_ELEMS] {
            let mut pieces = vec![0; bytes_of(n)];
            for (i, piece) in pieces.chunks_mut(bytes_of(n_piece)).enumerate() {
                blocks.fill(3, (i * n_piece) as u64, piece).unwrap();
            }
            assert!(whole == pieces, "{dtype} in pieces of {n_piece}");
        }
        let (mut other_tensor, mut other_seed) = (whole.clone(), whole.clone());
        blocks.fill(4, 0, &mut other_tensor).unwrap();
        RandomBlocks::new(dtype, 0.02, 8).unwrap().fill(3, 0, &mut other_seed).unwrap();
        assert!(whole != other_tensor && whole != other_seed, "{dtype}");
        assert!(matches!(blocks.fill(3, 1, &mut whole), Err(DTypeError::PartialBlock { .. })));
        assert!(matches!(blocks.fill(3, 0, &mut whole[1..]), Err(DTypeError::PartialBlock { .. })));
    }
    assert!(matches!(RandomBlocks::new(DType::Q8_0, f32::NAN, 1), Err(DTypeError::NotFinite { .. })));
    assert!(matches!(RandomBlocks::new(DType::Q8_0, 1e30, 1), Err(DTypeError::TooLarge { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any bits: no panic; what is encoded decodes to finite numbers; what is refused names a guilty element.
    #[test]
    fn encoders_survive_any_floats(bits in proptest::collection::vec(any::<u32>(), 256), narrow in any::<bool>()) {
        let x: Vec<f32> = bits.iter().map(|bits| {
            // Half of the cases with exponents near 1, where nothing is refused.
            f32::from_bits(if narrow { bits & 0x87ff_ffff | 0x3800_0000 } else { *bits })
        }).collect();
        for &dtype in DType::ALL {
            let mut bytes = vec![0; dtype.row_bytes(256).unwrap()];
            match dtype.encode(&x, &mut bytes) {
                Ok(()) if dtype.block_elems() > 1 => {
                    prop_assert!(decode(dtype, &bytes, 256).iter().all(|y| y.is_finite()), "{}", dtype);
                }
                Ok(()) => {}
                Err(DTypeError::NotFinite { index, .. }) => prop_assert!(!x[index].is_finite()),
                Err(DTypeError::TooLarge { index, value, .. }) => {
                    prop_assert!(!narrow && x[index] == value && value.abs() >= 65504.0, "{} {}", dtype, value);
                }
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }

    /// Any bytes are blocks.
    #[test]
    fn decoders_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 1024)) {
        for &dtype in DType::ALL {
            let n_blocks = 1024 / dtype.block_bytes();
            decode(dtype, &bytes[..n_blocks * dtype.block_bytes()], n_blocks * dtype.block_elems());
        }
    }
}
