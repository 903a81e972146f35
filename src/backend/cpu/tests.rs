//! Bits and bounds of the CPU's kernels: decoders against the reference, the instruction sets against each other.

use super::lanes::{self, Isa, Portable};
use super::matmul::{self, Mat};
use super::{CpuBackend, math};
use crate::backend::{Backend, BackendError, WeightSource, WeightUse};
use crate::dtype::DType;
use crate::gguf::TensorBytes;

const ODD_SIZES: [usize; 12] = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 127, 896];

/// A small generator of numbers (splitmix64): the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1 .. 1.
    fn f32(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn f32s(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.f32()).collect()
    }

    /// Random blocks with finite scales of moderate size.
    fn blocks(&mut self, dtype: DType, n_elems: usize) -> Vec<u8> {
        let n_bytes = dtype.row_bytes(n_elems).unwrap();
        let mut bytes: Vec<u8> = (0..n_bytes).map(|_| self.next() as u8).collect();
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            for at in scale_offsets(dtype) {
                let scale = half::f16::from_f32(self.f32() * 0.1);
                block[*at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
            match dtype {
                DType::F32 => block.copy_from_slice(&self.f32().to_le_bytes()),
                DType::F16 => block.copy_from_slice(&half::f16::from_f32(self.f32()).to_le_bytes()),
                DType::BF16 => block.copy_from_slice(&half::bf16::from_f32(self.f32()).to_le_bytes()),
                DType::MXFP4 => block[0] = 118 + block[0] % 8,
                _ => {}
            }
        }
        bytes
    }
}

/// Where the f16 scales of a block are.
fn scale_offsets(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::MXFP4 => &[],
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
    }
}

fn bits(a: &[f32]) -> Vec<u32> {
    a.iter().map(|x| x.to_bits()).collect()
}

fn mat(dtype: DType, bytes: &[u8], n_rows: usize, n_cols: usize) -> Mat<'_> {
    Mat { dtype, bytes, row_bytes: bytes.len() / n_rows, n_rows, n_cols }
}

#[test]
fn every_decoder_equals_the_reference_bit_for_bit_on_every_instruction_set() {
    let mut random = Random(1);
    for &dtype in DType::ALL {
        let n = 8 * dtype.block_elems().max(32);
        for round in 0..20 {
            let mut bytes = random.blocks(dtype, n);
            if round >= 10 && !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
                // Any byte at all, the infinite and subnormal scales included.
                bytes.iter_mut().for_each(|b| *b = random.next() as u8);
            }
            let mut expected = vec![0.0; n];
            dtype.decode(&bytes, &mut expected).unwrap();
            for isa in Isa::available() {
                let mut found = vec![0.0; n];
                matmul::decode_row(isa, dtype, &bytes, &mut found);
                for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
                    let same = e.to_bits() == f.to_bits() || (e.is_nan() && f.is_nan());
                    assert!(same, "{} {} element {i}: {e} expected, {f} found", dtype.name(), isa.name());
                }
            }
        }
    }
}

#[test]
fn rows_of_odd_length_decode_to_the_end() {
    let mut random = Random(2);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for n in ODD_SIZES {
            let bytes = random.blocks(dtype, n);
            let mut expected = vec![0.0; n];
            dtype.decode(&bytes, &mut expected).unwrap();
            for isa in Isa::available() {
                let mut found = vec![0.0; n];
                matmul::decode_row(isa, dtype, &bytes, &mut found);
                assert_eq!(bits(&expected), bits(&found), "{} {} {n}", dtype.name(), isa.name());
            }
        }
    }
}

#[test]
fn a_product_is_the_dot_of_the_decoded_row_whatever_the_company() {
    let mut random = Random(3);
    for &dtype in DType::ALL {
        for n_cols in ODD_SIZES.map(|n| if dtype.block_elems() > 1 { n.min(4) * dtype.block_elems() } else { n }) {
            for n_rows in [1, 2, 3, 4, 5, 17, 33] {
                let bytes = random.blocks(dtype, n_rows * n_cols);
                let mat = mat(dtype, &bytes, n_rows, n_cols);
                let cols: Vec<Vec<f32>> = (0..9).map(|_| random.f32s(n_cols)).collect();
                let mut decoded = vec![0.0; n_rows * n_cols];
                dtype.decode(&bytes, &mut decoded).unwrap();
                let expected = |row: usize, col: usize| {
                    lanes::dot(Isa::Portable(Portable), &decoded[row * n_cols..][..n_cols], &cols[col])
                };
                for isa in Isa::available() {
                    for n in [1, 2, 3, 4, 5, 9] {
                        let cols: Vec<&[f32]> = cols[..n].iter().map(Vec::as_slice).collect();
                        let mut out = vec![f32::NAN; n_rows * n];
                        matmul::rows(isa, &mat, 0, n_rows, &cols, &mut Vec::new(), &mut out);
                        for (i, found) in out.iter().enumerate() {
                            let expected = expected(i / n, i % n);
                            assert_eq!(
                                expected.to_bits(),
                                found.to_bits(),
                                "{} {}: row {} of {n_rows}, column {} of {n}, {n_cols} long",
                                dtype.name(),
                                isa.name(),
                                i / n,
                                i % n
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn dot_and_sum_stay_within_the_bound_of_f32_sums() {
    let mut random = Random(4);
    for n in ODD_SIZES {
        let (a, b) = (random.f32s(n), random.f32s(n));
        let products = || a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        // n/16 additions per lane, four folds, one rounding per product.
        let bound = f64::from(f32::EPSILON) * (n as f64 / 16.0 + 6.0) * products().map(f64::abs).sum::<f64>();
        let first = lanes::dot(Isa::Portable(Portable), &a, &b);
        assert!((f64::from(first) - products().sum::<f64>()).abs() <= bound, "{n}");
        for isa in Isa::available() {
            assert_eq!(lanes::dot(isa, &a, &b).to_bits(), first.to_bits(), "{} {n}", isa.name());
            let sum = lanes::sum(Isa::Portable(Portable), &a);
            assert_eq!(lanes::sum(isa, &a).to_bits(), sum.to_bits(), "{} {n}", isa.name());
        }
    }
}

#[test]
fn exp_is_within_two_ulp_and_the_same_everywhere() {
    let xs: Vec<f32> = (-87_000..88_000).map(|i| i as f32 / 1000.0 + 1e-4).collect();
    for isa in Isa::available() {
        let mut found = xs.clone();
        math::exp_minus(isa, &mut found, 0.0);
        for (x, found) in xs.iter().zip(&found) {
            let expected = f64::from(*x).exp();
            let ulp = f64::from(f32::EPSILON) * expected;
            assert!((f64::from(*found) - expected).abs() <= 2.0 * ulp, "exp({x}) is {expected}, found {found}");
            assert_eq!(math::exp(*x).to_bits(), found.to_bits(), "{} exp({x})", isa.name());
        }
    }
    assert_eq!(math::exp(0.0), 1.0);
    assert!(math::exp(f32::NAN).is_nan());
    assert!(math::exp(f32::NEG_INFINITY) < 1.2e-38);
}

fn source(name: &str, dtype: DType, shape: (usize, usize, usize), bytes: Vec<u8>) -> WeightSource<'_> {
    let (n_mats, n_rows, n_cols) = shape;
    WeightSource { name, dtype, n_mats, n_rows, n_cols, bytes: TensorBytes::from_vec(bytes), uses: WeightUse::ANY }
}

#[test]
fn a_weight_of_the_wrong_size_is_refused_by_name() {
    let mut cpu = CpuBackend::with_threads(1);
    let cases = [
        (DType::Q4_K, (1, 4, 100), 57, "rows of 100 elements"),
        (DType::Q8_0, (1, 4, 64), 17, "expected 1 x 4 rows of 68 bytes (Q8_0), found 17 bytes"),
        (DType::F32, (2, 3, 5), 60, "expected 2 x 3 rows of 20 bytes (F32), found 60 bytes"),
        (DType::F32, (0, 3, 5), 0, "found 0 bytes"),
        (DType::F32, (usize::MAX, 3, 5), 60, "found 60 bytes"),
    ];
    for (dtype, shape, n_bytes, expected) in cases {
        let error = cpu.weight(source("blk.0.ffn_up.weight", dtype, shape, vec![0; n_bytes])).unwrap_err();
        let BackendError::Unsupported { device, tensor, reason } = &error else { panic!("{error}") };
        assert_eq!((device.as_str(), tensor.as_str()), ("cpu", "blk.0.ffn_up.weight"));
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn more_memory_than_there_is_is_refused_and_changes_nothing() {
    let mut cpu = CpuBackend::with_threads(1);
    let before = cpu.memory();
    let Err(BackendError::OutOfMemory { device, requested, .. }) = cpu.tensor(1 << 30, 1 << 20) else {
        panic!("4 EiB were granted")
    };
    assert_eq!((device.as_str(), requested), ("cpu", 1 << 52));
    assert_eq!(cpu.memory(), before);
    assert!(cpu.tensor(4, 4).is_ok());
}

#[test]
fn tied_weights_count_once() {
    let mut cpu = CpuBackend::with_threads(1);
    let bytes = TensorBytes::from_vec(vec![0; 3 * 34]);
    for name in ["token_embd.weight", "output.weight"] {
        let source = WeightSource {
            name,
            dtype: DType::Q8_0,
            n_mats: 1,
            n_rows: 3,
            n_cols: 32,
            bytes: bytes.clone(),
            uses: WeightUse::ANY,
        };
        cpu.weight(source).unwrap();
    }
    assert_eq!(cpu.memory().weights, 3 * 34);
}
