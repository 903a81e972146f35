//! Products against f64, and against themselves: the same bits for any number of columns and from both kernels.

mod support;

use half::f16;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matmul::{self, Experts, Gate, NormInput, Output, Product, Rows};
use playhouse_cuda::launch::matrix::{FORMATS, Format, HalfRows, Layout, Matrix, Part, TILE_ROWS};
use playhouse_cuda::launch::norm::{RmsNorm, rms_norm};
use support::formats::random_rows;
use support::{Bench, Random, bench, download};

struct Case {
    matrix: Matrix,
    weights: Vec<f32>, // as the products see them, rows padded to stripes
}

fn matrix(bench: &Bench, random: &mut Random, format: Format, n_rows: usize, n_cols: usize, n_mats: usize) -> Case {
    let part = Part { format, n_rows };
    let matrix = Matrix::new(&bench.arena, "w", &[part], Layout::Stacked, n_cols, n_mats).expect("fits");
    let rows = random_rows(random, format, n_rows * n_mats, n_cols);
    matrix.fill(&bench.kernels, 0, format, &[&bench.upload(&rows)]).expect("launches");
    let padded = n_rows.next_multiple_of(TILE_ROWS);
    let unpacked = bench.zeros::<f32>(n_mats * padded * n_cols);
    matrix.unpack(&bench.kernels, &unpacked).expect("launches");
    Case { matrix, weights: download(&unpacked) }
}

fn activations(bench: &Bench, random: &mut Random, rows: usize, n_cols: usize) -> (HalfRows, Vec<f16>) {
    let stride = n_cols.next_multiple_of(64);
    let mut data = vec![f16::ZERO; rows * stride];
    for row in data.chunks_mut(stride) {
        row[..n_cols].fill_with(|| f16::from_f32(random.normal()));
    }
    (HalfRows { data: bench.upload(&data), stride }, data)
}

fn product(bench: &Bench, matrix: &Matrix, x: &HalfRows, n: usize) -> Vec<f32> {
    let y = bench.zeros::<f32>(n * matrix.n_rows());
    let n_sms = bench.gpu.info().n_sms as usize;
    let partial: Buffer<f32> = bench.zeros(matmul::partial_len(matrix.kind(), matrix.shape(), n, n_sms, None).max(1));
    let output = Output::Store(Rows { data: y.clone(), stride: matrix.n_rows() });
    let product = Product { matrix, x, n, bias: None, bias_up: None, experts: Experts::One, output };
    product.launch(&bench.kernels, &partial).expect("launches");
    download(&y)
}

#[test]
fn every_format_agrees_with_f64_and_with_itself_at_any_width() {
    let Some(bench) = bench("every_format_agrees_with_f64_and_with_itself_at_any_width") else { return };
    let mut random = Random(1);
    for format in FORMATS {
        for (n_rows, n_cols) in [(17, 256), (48, 768), (127, 2048), (130, 4352)] {
            bench.arena.reset();
            let case = matrix(&bench, &mut random, *format, n_rows, n_cols, 1);
            let widths = [1, 2, 3, 8, 9, 17, 31, 33, 64, 65, 127, 200];
            let (x, host) = activations(&bench, &mut random, 200, n_cols);
            let all = product(&bench, &case.matrix, &x, 200);
            for n in widths {
                let some = product(&bench, &case.matrix, &x, n);
                let same = some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{} {n_rows}x{n_cols}: {n} columns differ from 200", format.name);
            }
            for (column, x) in host.chunks(x.stride).enumerate().step_by(13) {
                for row in (0..n_rows).step_by(5) {
                    let w = &case.weights[row * n_cols..][..n_cols];
                    let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * x.to_f64());
                    let (exact, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + f64::abs(t)));
                    let found = f64::from(all[column * n_rows + row]);
                    // Tensor cores add with about f32's precision, truncating: 2^-18 of the magnitudes is ample.
                    let budget = size * 2f64.powi(-18) + 1e-9;
                    assert!((found - exact).abs() <= budget, "{}: {found} is not {exact} +- {budget}", format.name);
                }
            }
        }
    }
}

#[test]
fn every_format_agrees_at_hundreds_of_columns() {
    let Some(bench) = bench("every_format_agrees_at_hundreds_of_columns") else { return };
    let mut random = Random(5);
    // Chunks of five tiles; rows and columns that fill no block. The widths take blocks of 192, 128 and 64 columns where the
    // device has 132 multiprocessors, and the kernels for fewer columns.
    let (n_rows, n_cols, n) = (2101, 2304, 1153);
    for format in FORMATS {
        bench.arena.reset();
        let case = matrix(&bench, &mut random, *format, n_rows, n_cols, 1);
        let (x, host) = activations(&bench, &mut random, n, n_cols);
        let all = product(&bench, &case.matrix, &x, n);
        for width in [5, 64, 129, 150, 517, 1100] {
            let some = product(&bench, &case.matrix, &x, width);
            let same = some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{}: {width} columns differ from {n}", format.name);
        }
        for (column, row) in (0..n).step_by(61).flat_map(|c| (0..n_rows).step_by(83).map(move |r| (c, r))) {
            let terms = case.weights[row * n_cols..][..n_cols].iter().zip(&host[column * x.stride..]);
            let terms = terms.map(|(w, x)| f64::from(*w) * x.to_f64());
            let (exact, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + f64::abs(t)));
            let (found, budget) = (f64::from(all[column * n_rows + row]), size * 2f64.powi(-18) + 1e-9);
            assert!((found - exact).abs() <= budget, "{}: {found} is not {exact} +- {budget}", format.name);
        }
    }
}

#[test]
fn tall_matrices_of_f16_are_walked_to_the_same_bits() {
    let Some(bench) = bench("tall_matrices_of_f16_are_walked_to_the_same_bits") else { return };
    let mut random = Random(7);
    // Two thirds as many blocks as the device has multiprocessors, the last of which has few rows; eight chunks, the last of one tile.
    let n_sms = bench.gpu.info().n_sms as usize;
    let (n_rows, n_cols) = (n_sms * 2 / 3 * 128 + 19, 2304);
    let case = matrix(&bench, &mut random, Format::by_name("F16").expect("listed"), n_rows, n_cols, 1);
    let (x, _) = activations(&bench, &mut random, 200, n_cols);
    let all = product(&bench, &case.matrix, &x, 200);
    for n in [3, 9, 32, 33, 64, 65, 127] {
        let some = product(&bench, &case.matrix, &x, n);
        let same = some.iter().zip(&all).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{n_rows} x {n_cols}: {n} columns differ from 200");
    }
}

#[test]
fn every_output_of_hundreds_of_columns_is_that_of_few() {
    let Some(bench) = bench("every_output_of_hundreds_of_columns_is_that_of_few") else { return };
    let mut random = Random(6);
    let (n_rows, n_cols, n) = (1333, 768, 301);
    let format = Format::by_name("Q5_K").expect("listed");
    let case = matrix(&bench, &mut random, format, n_rows, n_cols, 1);
    let (x, _) = activations(&bench, &mut random, n, n_cols);
    let bias = bench.upload(&(0..n_rows).map(|_| random.normal()).collect::<Vec<f32>>());
    let before: Vec<f32> = (0..n * n_rows).map(|_| random.normal()).collect();
    let partial = bench.zeros::<f32>(8 * n * n_rows.next_multiple_of(16));
    let launch = |n: usize, output: Output| {
        let op =
            Product { matrix: &case.matrix, x: &x, n, bias: Some(&bias), bias_up: None, experts: Experts::One, output };
        op.launch(&bench.kernels, &partial).expect("launches");
    };
    for add in [false, true] {
        let run = |n: usize| {
            let data = bench.upload(&before);
            let rows = Rows { data: data.clone(), stride: n_rows };
            launch(n, if add { Output::Add(rows) } else { Output::Store(rows) });
            download(&data).into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        };
        let (few, many) = (run(7), run(n));
        assert_eq!(few[..7 * n_rows], many[..7 * n_rows], "adding: {add}");
        assert!(many.iter().zip(&before).all(|(now, before)| *now != before.to_bits()), "every cell was written");
        assert!(few[7 * n_rows..].iter().zip(&before[7 * n_rows..]).all(|(now, before)| *now == before.to_bits()));
    }
    let run = |n: usize| {
        let data = bench.zeros::<f16>(n * n_rows);
        launch(n, Output::StoreHalf(HalfRows { data: data.clone(), stride: n_rows }));
        download(&data)
    };
    assert_eq!(run(7), run(n)[..7 * n_rows]);
}

#[test]
fn experts_and_gates_give_the_same_bits_one_by_one_and_in_tiles() {
    let Some(bench) = bench("experts_and_gates_give_the_same_bits_one_by_one_and_in_tiles") else { return };
    let mut random = Random(2);
    let format = Format::by_name("MXFP4").expect("listed");
    let (n_rows, n_cols, n_mats, n) = (96, 576, 5, 40);
    let case = matrix(&bench, &mut random, format, n_rows, n_cols, n_mats);
    let (x, _) = activations(&bench, &mut random, n, n_cols);
    // Column c of the tiled product is token c with expert c / 32.
    let tiles = 2;
    let gather: Vec<i32> = (0..tiles * 32).map(|c| if c < n as i32 { c } else { -1 }).collect();
    let y = bench.zeros::<f32>(64 * n_rows);
    let partial = bench.zeros::<f32>(8 * 64 * n_rows);
    let experts = Experts::Tiles { mats: bench.upload(&[3, 1]), gather: Some(bench.upload(&gather)), column_tile: 32 };
    let output = Output::Store(Rows { data: y.clone(), stride: n_rows });
    let op = Product { matrix: &case.matrix, x: &x, n: 64, bias: None, bias_up: None, experts, output };
    op.launch(&bench.kernels, &partial).expect("launches");
    let tiled = download(&y);
    let jobs: Vec<i32> = (0..n).map(|c| if c < 32 { 3 } else { 1 }).collect();
    let y = bench.zeros::<f32>(n * n_rows);
    let output = Output::Store(Rows { data: y.clone(), stride: n_rows });
    let experts = Experts::Jobs { mats: bench.upload(&jobs), per_row: 1 };
    let op = Product { matrix: &case.matrix, x: &x, n, bias: None, bias_up: None, experts, output };
    op.launch(&bench.kernels, &partial).expect("launches");
    assert_eq!(
        download(&y).iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        tiled[..n * n_rows].iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    );
}

#[test]
fn a_gated_product_is_the_gate_of_its_two_products() {
    let Some(bench) = bench("a_gated_product_is_the_gate_of_its_two_products") else { return };
    let mut random = Random(3);
    let format = Format::by_name("Q4_K").expect("listed");
    let (n_rows, n_cols, n) = (700, 512, 40);
    let most = 400;
    let part = Part { format, n_rows };
    let rows = [0, 1].map(|_| bench.upload(&random_rows(&mut random, format, n_rows, n_cols)));
    let both = Matrix::new(&bench.arena, "gate and up", &[part, part], Layout::Gated, n_cols, 1).expect("fits");
    let single = |rows: &Buffer<u8>| {
        let one = Matrix::new(&bench.arena, "one", &[part], Layout::Stacked, n_cols, 1).expect("fits");
        one.fill(&bench.kernels, 0, format, &[rows]).expect("launches");
        one
    };
    both.fill(&bench.kernels, 0, format, &[&rows[0], &rows[1]]).expect("launches");
    let (x, _) = activations(&bench, &mut random, most, n_cols);
    let gated = |n: usize| {
        let h = bench.zeros::<f16>(n * n_rows);
        let output = Output::Gated(HalfRows { data: h.clone(), stride: n_rows }, Gate::SwiGlu);
        let op = Product { matrix: &both, x: &x, n, bias: None, bias_up: None, experts: Experts::One, output };
        op.launch(&bench.kernels, &bench.zeros(8 * n * 2 * n_rows.next_multiple_of(8))).expect("launches");
        download(&h)
    };
    let h = gated(5);
    for n in [n, 131, 400] {
        assert_eq!(h, gated(n)[..h.len()], "the kernels for {n} columns give the small one's bits");
    }
    let gate = product(&bench, &single(&rows[0]), &x, n);
    let up = product(&bench, &single(&rows[1]), &x, n);
    for (i, h) in h.iter().enumerate() {
        let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
        let exact = g / (1.0 + (-g).exp()) * u;
        assert!((h.to_f64() - exact).abs() <= exact.abs() * 1e-3 + 1e-6, "{i}: {h} is not {exact}");
    }
}

#[test]
fn a_product_that_normalises_gives_the_bits_of_norm_and_product() {
    let Some(bench) = bench("a_product_that_normalises_gives_the_bits_of_norm_and_product") else { return };
    let mut random = Random(4);
    for (name, n_rows, n_cols) in [("F16", 33, 96), ("Q8_0", 100, 896), ("Q4_K", 4000, 3072), ("Q6_K", 65, 4096)] {
        bench.arena.reset();
        let case = matrix(&bench, &mut random, Format::by_name(name).expect("listed"), n_rows, n_cols, 1);
        let x: Vec<f32> = (0..8 * n_cols).map(|_| 3.0 * random.normal()).collect();
        let weight: Vec<f32> = (0..n_cols).map(|_| random.normal()).collect();
        let (x, weight) = (bench.upload(&x), bench.upload(&weight));
        let y = HalfRows { data: bench.zeros(8 * n_cols.next_multiple_of(64)), stride: n_cols.next_multiple_of(64) };
        let op = RmsNorm { x: &x, weight: &weight, rows: None, eps: 1e-5, y: &y };
        rms_norm(&bench.kernels, &op, 8).expect("launches");
        for n in [1, 2, 3, 7, 8] {
            let expected = product(&bench, &case.matrix, &y, n);
            let out = bench.zeros::<f32>(n * n_rows);
            let output = Output::Store(Rows { data: out.clone(), stride: n_rows });
            let op =
                Product { matrix: &case.matrix, x: &y, n, bias: None, bias_up: None, experts: Experts::One, output };
            let norm = NormInput { x: &x, weight: &weight, eps: 1e-5 };
            op.launch_normalised(&bench.kernels, &norm).expect("launches");
            let same = download(&out).iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name} {n_rows}x{n_cols}, {n} columns");
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let format = Format::by_name("Q4_K").expect("listed");
    let odd = Matrix::new(&bench.arena, "w", &[Part { format, n_rows: 16 }], Layout::Stacked, 896, 1);
    assert!(odd.is_err_and(|e| e.to_string().contains("whole blocks")));
    let good = Matrix::new(&bench.arena, "w", &[Part { format, n_rows: 16 }], Layout::Stacked, 256, 1).expect("fits");
    let short = good.fill(&bench.kernels, 0, format, &[&bench.zeros(10)]);
    assert!(short.is_err_and(|e| e.to_string().contains("10 bytes")));
    let x = HalfRows { data: bench.zeros::<f16>(200 * 256 + 1).slice(1..200 * 256 + 1), stride: 256 };
    let output = Output::Store(Rows { data: bench.zeros(200 * 16), stride: 16 });
    let op = Product { matrix: &good, x: &x, n: 200, bias: None, bias_up: None, experts: Experts::One, output };
    let odd_address = op.launch(&bench.kernels, &bench.zeros(1));
    assert!(odd_address.is_err_and(|e| e.to_string().contains("a multiple of 16")));
    let too_large = bench.arena.alloc::<u8>(1 << 50, "all of it");
    assert!(too_large.is_err_and(|e| e.to_string().contains("out of memory")));
}
