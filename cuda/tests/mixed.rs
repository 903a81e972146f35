//! Products of different kinds in one launch: the bits of a launch for each, in any order of the kinds, and nothing written beside them.

mod support;

use half::f16;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matmul::{Experts, NormInput, Output, Product, Rows};
use playhouse_cuda::launch::matrix::{FORMATS, Format, HalfRows, Layout, Matrix, Part};
use playhouse_cuda::launch::mixed::{can_go_together, launch_together};
use support::formats::random_rows;
use support::{Bench, Random, bench, download};

/// A format of each kind, those of blocks of 32 where there is one.
fn one_of_each_kind() -> Vec<Format> {
    ["F16", "Q8_0", "Q4_0", "Q2_K", "MXFP4", "Q5_0", "Q6_K"].map(|name| Format::by_name(name).expect("listed")).to_vec()
}

fn matrix(bench: &Bench, random: &mut Random, format: Format, n_rows: usize, n_cols: usize) -> Matrix {
    let matrix = Matrix::new(&bench.arena, "w", &[Part { format, n_rows }], Layout::Stacked, n_cols, 1).expect("fits");
    let rows = random_rows(random, format, n_rows, n_cols);
    matrix.fill(&bench.kernels, 0, format, &[&bench.upload(&rows)]).expect("launches");
    matrix
}

/// Rows to normalise, their weights, and rows in f16 that are something else.
struct Inputs {
    full: Buffer<f32>,
    weight: Buffer<f32>,
    half: HalfRows,
}

fn inputs(bench: &Bench, random: &mut Random, n: usize, n_cols: usize) -> Inputs {
    let stride = n_cols.next_multiple_of(64);
    let mut half = vec![f16::ZERO; n * stride];
    half.chunks_mut(stride).for_each(|row| row[..n_cols].fill_with(|| f16::from_f32(random.normal())));
    Inputs {
        full: bench.upload(&(0..n * n_cols).map(|_| 3.0 * random.normal()).collect::<Vec<f32>>()),
        weight: bench.upload(&(0..n_cols).map(|_| random.normal()).collect::<Vec<f32>>()),
        half: HalfRows { data: bench.upload(&half), stride },
    }
}

/// The bits of y: the rows of all matrices side by side, seven elements that nobody has after them, by one launch or several.
fn run(
    bench: &Bench,
    inputs: &Inputs,
    parts: &[(Matrix, Option<Buffer<f32>>)],
    (n, norm, one): (usize, bool, bool),
) -> Vec<u32> {
    let stride = parts.iter().map(|(matrix, _)| matrix.n_rows()).sum::<usize>() + 7;
    let y = bench.upload(&vec![-77.25_f32; n * stride]);
    let mut first = 0;
    let products: Vec<Product<'_>> = parts
        .iter()
        .map(|(matrix, bias)| {
            let output = Output::Store(Rows { data: y.slice(first..n * stride), stride });
            first += matrix.n_rows();
            Product { matrix, x: &inputs.half, n, bias: bias.as_ref(), bias_up: None, experts: Experts::One, output }
        })
        .collect();
    let norm = norm.then_some(NormInput { x: &inputs.full, weight: &inputs.weight, eps: 1e-5 });
    if one {
        assert!(can_go_together(&products));
        launch_together(&bench.kernels, &products, norm.as_ref()).expect("launches");
    } else {
        for product in &products {
            match &norm {
                Some(norm) => product.launch_normalised(&bench.kernels, norm).expect("launches"),
                None => product.launch(&bench.kernels, &bench.zeros(1)).expect("launches"),
            }
        }
    }
    let bits: Vec<u32> = download(&y).into_iter().map(f32::to_bits).collect();
    let untouched = (-77.25_f32).to_bits();
    for row in bits.chunks(stride) {
        let (written, beside) = row.split_at(stride - 7);
        assert!(written.iter().all(|v| *v != untouched), "every cell is written");
        assert!(beside.iter().all(|v| *v == untouched), "and no other");
    }
    bits
}

#[test]
fn every_pair_of_kinds_gives_the_bits_of_two_launches() {
    let Some(bench) = bench("every_pair_of_kinds_gives_the_bits_of_two_launches") else { return };
    let mut random = Random(21);
    // Three chunks, and eight of which the last has one tile.
    for n_cols in [768, 2304] {
        for first in one_of_each_kind() {
            for second in one_of_each_kind() {
                bench.arena.reset();
                let rows = [33, 1 + (random.next() % 100) as usize];
                let bias = (first.name < second.name).then(|| bench.upload(&vec![0.375_f32; rows[0]]));
                let parts = [
                    (matrix(&bench, &mut random, first, rows[0], n_cols), bias),
                    (matrix(&bench, &mut random, second, rows[1], n_cols), None),
                ];
                for n in [1, 3, 8] {
                    let inputs = inputs(&bench, &mut random, n, n_cols);
                    for norm in [false, true] {
                        let separate = run(&bench, &inputs, &parts, (n, norm, false));
                        let together = run(&bench, &inputs, &parts, (n, norm, true));
                        let what = format!("{} and {}, {n} x {n_cols}, norm {norm}", first.name, second.name);
                        assert!(separate == together, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn three_kinds_side_by_side_give_the_bits_of_three_launches() {
    let Some(bench) = bench("three_kinds_side_by_side_give_the_bits_of_three_launches") else { return };
    let mut random = Random(22);
    let format = |name| Format::by_name(name).expect("listed");
    for (names, rows, n_cols) in
        [(["Q5_0", "Q8_0", "Q4_K"], [17, 2, 31], 256), (["Q6_K", "F16", "IQ4_XS"], [127, 16, 33], 512)]
    {
        bench.arena.reset();
        let parts: Vec<(Matrix, Option<Buffer<f32>>)> = names
            .into_iter()
            .zip(rows)
            .map(|(name, n_rows)| {
                let bias: Vec<f32> = (0..n_rows).map(|_| random.normal()).collect();
                (matrix(&bench, &mut random, format(name), n_rows, n_cols), Some(bench.upload(&bias)))
            })
            .collect();
        for n in [1, 2, 7] {
            let inputs = inputs(&bench, &mut random, n, n_cols);
            let [separate, together] = [false, true].map(|one| run(&bench, &inputs, &parts, (n, true, one)));
            assert_eq!(separate, together, "{names:?}, {n} columns");
        }
    }
}

#[test]
fn more_rows_than_blocks_are_walked_in_the_same_order() {
    let Some(bench) = bench("more_rows_than_blocks_are_walked_in_the_same_order") else { return };
    let mut random = Random(23);
    // Of Llama-3-8B, q with k, and v: two stripes a block on a device of 132 multiprocessors.
    let format = |name| Format::by_name(name).expect("listed");
    let parts = [("Q4_K", 5120), ("Q6_K", 1024)]
        .map(|(name, n_rows)| (matrix(&bench, &mut random, format(name), n_rows, 4096), None));
    for n in [1, 5] {
        let inputs = inputs(&bench, &mut random, n, 4096);
        let [separate, together] = [false, true].map(|one| run(&bench, &inputs, &parts, (n, true, one)));
        assert!(separate == together, "{n} columns");
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let Some(bench) = bench("a_row_is_the_same_alone_and_among_others") else { return };
    let mut random = Random(24);
    let format = |name| Format::by_name(name).expect("listed");
    let parts = [("Q5_0", 130), ("Q8_0", 65)]
        .map(|(name, n_rows)| (matrix(&bench, &mut random, format(name), n_rows, 896), None));
    let inputs = inputs(&bench, &mut random, 8, 896);
    let all = run(&bench, &inputs, &parts, (8, true, true));
    for n in 1..8 {
        let some = run(&bench, &inputs, &parts, (n, true, true));
        assert_eq!(some[..], all[..some.len()], "{n} columns");
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let mut random = Random(25);
    let q8 = *FORMATS.iter().find(|format| format.name == "Q8_0").expect("listed");
    let (wide, narrow) = (matrix(&bench, &mut random, q8, 16, 256), matrix(&bench, &mut random, q8, 16, 128));
    let (nine, other) = (inputs(&bench, &mut random, 9, 256), inputs(&bench, &mut random, 9, 256));
    let y = bench.zeros::<f32>(9 * 16);
    let product = |matrix, x, n| {
        let output = Output::Store(Rows { data: y.clone(), stride: 16 });
        Product { matrix, x, n, bias: None, bias_up: None, experts: Experts::One, output }
    };
    let refused = |products: &[Product<'_>], norm: Option<&NormInput<'_>>, what: &str| {
        let error = launch_together(&bench.kernels, products, norm).expect_err(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    let x = &nine.half;
    refused(&[product(&wide, x, 1)], None, "2 to 3 products");
    refused(&[], None, "2 to 3 products");
    refused(&[product(&wide, x, 9), product(&wide, x, 9)], None, "up to 8 rows");
    refused(&[product(&wide, x, 1), product(&wide, x, 2)], None, "of the same x");
    refused(&[product(&wide, x, 1), product(&narrow, x, 1)], None, "of the same x");
    refused(&[product(&wide, x, 1), product(&wide, &other.half, 1)], None, "of the same x");
    let four = [0; 4].map(|_| product(&wide, x, 1));
    refused(&four, None, "2 to 3 products");
    let short = NormInput { x: &nine.full.slice(0..255), weight: &nine.weight, eps: 1e-5 };
    refused(&four[..2], Some(&short), "rows of 256");
}
