//! RMS normalisation, rounding to f16 and the soft cap against f64.

mod support;

use half::f16;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matrix::HalfRows;
use playhouse_cuda::launch::norm::{RmsNorm, rms_norm, softcap, to_half};
use support::{Bench, Random, bench, download};

const EPS: f32 = 1e-5;
const ROWS: [usize; 7] = [1, 2, 3, 17, 31, 33, 127];
const WIDTHS: [usize; 8] = [1, 3, 31, 64, 257, 896, 2880, 4097];

fn rows_of_nan(bench: &Bench, n: usize, n_cols: usize) -> HalfRows {
    let stride = n_cols.next_multiple_of(64);
    HalfRows { data: bench.upload(&vec![f16::NAN; n * stride]), stride }
}

fn normal(random: &mut Random, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| size * random.normal()).collect()
}

fn normalised(bench: &Bench, x: &Buffer<f32>, weight: &Buffer<f32>, rows: Option<&[u32]>, n: usize) -> Vec<f16> {
    let y = rows_of_nan(bench, n, weight.len());
    let rows = rows.map(|rows| bench.upload(rows));
    let op = RmsNorm { x, weight, rows: rows.as_ref(), eps: EPS, y: &y };
    rms_norm(&bench.kernels, &op, n).expect("launches");
    let (all, n_cols) = (download(&y.data), weight.len());
    all.chunks(y.stride).flat_map(|row| row[..n_cols].to_vec()).collect()
}

#[test]
fn the_norm_agrees_with_f64() {
    let Some(bench) = bench("the_norm_agrees_with_f64") else { return };
    let mut random = Random(31);
    for n_cols in WIDTHS {
        for (i, n) in ROWS.into_iter().enumerate() {
            bench.arena.reset();
            // From tiny to large: activations of real models reach thousands.
            let x = normal(&mut random, n * n_cols, [1e-3, 1.0, 3000.0][i % 3]);
            let weight = normal(&mut random, n_cols, 1.0);
            let found = normalised(&bench, &bench.upload(&x), &bench.upload(&weight), None, n);
            for (row, x) in x.chunks(n_cols).enumerate() {
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n_cols as f64;
                let inverse = 1.0 / (mean + f64::from(EPS)).sqrt();
                for (c, (x, w)) in x.iter().zip(&weight).enumerate() {
                    let exact = f64::from(*x) * inverse * f64::from(*w);
                    let found = found[row * n_cols + c].to_f64();
                    let budget = exact.abs() * 2f64.powi(-10) + 2f64.powi(-24);
                    assert!((found - exact).abs() <= budget, "{n} x {n_cols}, row {row}, column {c}: {found}, {exact}");
                }
            }
        }
    }
}

#[test]
fn a_row_s_bits_depend_on_the_row_alone() {
    let Some(bench) = bench("a_row_s_bits_depend_on_the_row_alone") else { return };
    let mut random = Random(32);
    let (n, n_cols) = (127, 897);
    let (x, weight) =
        (bench.upload(&normal(&mut random, n * n_cols, 1.0)), bench.upload(&normal(&mut random, n_cols, 1.0)));
    let bits = |rows: &[f16]| rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let all = normalised(&bench, &x, &weight, None, n);
    assert_eq!(bits(&normalised(&bench, &x, &weight, None, 3)), bits(&all[..3 * n_cols]));
    let chosen = [126, 0, 64, 64];
    let some = normalised(&bench, &x, &weight, Some(&chosen), 4);
    for (some, row) in some.chunks(n_cols).zip(chosen) {
        assert_eq!(bits(some), bits(&all[row as usize * n_cols..][..n_cols]), "row {row}");
    }
}

#[test]
fn rounding_to_f16_is_to_nearest_saturates_and_clears_the_padding() {
    let Some(bench) = bench("rounding_to_f16_is_to_nearest_saturates_and_clears_the_padding") else { return };
    let mut random = Random(33);
    for n_cols in WIDTHS {
        for n in ROWS {
            bench.arena.reset();
            let mut x = normal(&mut random, n * n_cols, 100.0);
            x[0] = 1e6;
            let y = rows_of_nan(&bench, n, n_cols);
            to_half(&bench.kernels, &bench.upload(&x), n_cols, &y, n).expect("launches");
            for (found, x) in download(&y.data).chunks(y.stride).zip(x.chunks(n_cols)) {
                let rounded = |x: &f32| f16::from_f32(x.clamp(-65504.0, 65504.0));
                let padding = vec![f16::ZERO; y.stride - n_cols];
                assert_eq!(found, [x.iter().map(rounded).collect(), padding].concat());
            }
        }
    }
}

#[test]
fn the_soft_cap_agrees_with_f64() {
    let Some(bench) = bench("the_soft_cap_agrees_with_f64") else { return };
    let mut random = Random(34);
    for n in [1, 2, 255, 256, 257, 32_003] {
        let x = normal(&mut random, n, 40.0);
        let buffer = bench.upload(&x);
        softcap(&bench.kernels, &buffer, n, 30.0).expect("launches");
        for (found, x) in download(&buffer).iter().zip(x) {
            let exact = 30.0 * (f64::from(x) / 30.0).tanh();
            assert!((f64::from(*found) - exact).abs() <= exact.abs() * 2f64.powi(-21), "{found}, {exact}");
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let (x, weight) = (bench.zeros::<f32>(300), bench.zeros::<f32>(100));
    let y = rows_of_nan(&bench, 3, 100);
    let norm = |weight: &Buffer<f32>, rows: Option<&Buffer<u32>>, y: &HalfRows, n: usize| {
        let op = RmsNorm { x: &x, weight, rows, eps: EPS, y };
        rms_norm(&bench.kernels, &op, n).expect_err("misuse").to_string()
    };
    let narrow = HalfRows { data: y.data.clone(), stride: 64 };
    let short = rows_of_nan(&bench, 2, 100);
    assert!(norm(&weight, None, &y, 0).contains("rms_norm: x"));
    assert!(norm(&weight, None, &y, 4).contains("rms_norm: x"));
    assert!(norm(&weight.slice(0..0), None, &y, 1).contains("rms_norm: x"));
    assert!(norm(&weight, None, &narrow, 3).contains("stride 64"));
    assert!(norm(&weight, None, &short, 3).contains("rms_norm: y"));
    assert!(norm(&weight, Some(&bench.zeros(2)), &y, 3).contains("3 indices"));
    assert!(to_half(&bench.kernels, &x, 101, &y, 3).is_err_and(|e| e.to_string().contains("to_half: x")));
    assert!(to_half(&bench.kernels, &x, 100, &short, 3).is_err_and(|e| e.to_string().contains("to_half: y")));
    assert!(softcap(&bench.kernels, &x, 301, 1.0).is_err_and(|e| e.to_string().contains("softcap")));
    assert!(softcap(&bench.kernels, &x, 300, 0.0).is_err_and(|e| e.to_string().contains("positive cap")));
}
