//! Normalisation, router and choice in one launch: the bits of the three launches that there are otherwise, and nothing written beside.

mod support;

use half::f16;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matmul::{Experts, NormInput, Output, Product, Rows};
use playhouse_cuda::launch::matrix::{Format, HalfRows, Layout, Matrix, Part};
use playhouse_cuda::launch::moe::Choices;
use playhouse_cuda::launch::norm::{RmsNorm, rms_norm};
use playhouse_cuda::launch::router::{Router, can_route_together};
use support::formats::random_rows;
use support::{Bench, Random, bench, download};

const EPS: f32 = 1e-5;
/// Elements that nobody has after each result.
const BESIDE: usize = 5;

/// A router, the rows that it routes, and the norm's weights.
struct Case {
    matrix: Matrix,
    bias: Option<Buffer<f32>>,
    x: Buffer<f32>,
    norm: Buffer<f32>,
    n_used: usize,
}

fn matrix(bench: &Bench, random: &mut Random, format: &str, n_rows: usize, n_cols: usize) -> Matrix {
    let format = Format::by_name(format).expect("listed");
    let matrix = Matrix::new(&bench.arena, "w", &[Part { format, n_rows }], Layout::Stacked, n_cols, 1).expect("fits");
    let rows = random_rows(random, format, n_rows, n_cols);
    matrix.fill(&bench.kernels, 0, format, &[&bench.upload(&rows)]).expect("launches");
    matrix
}

fn floats(bench: &Bench, random: &mut Random, len: usize) -> Buffer<f32> {
    bench.upload(&(0..len).map(|_| 3.0 * random.normal()).collect::<Vec<f32>>())
}

fn case(bench: &Bench, random: &mut Random, format: &str, (n_experts, n_used): (usize, usize), n_cols: usize) -> Case {
    Case {
        matrix: matrix(bench, random, format, n_experts, n_cols),
        bias: (!random.next().is_multiple_of(4)).then(|| floats(bench, random, n_experts)),
        x: floats(bench, random, 8 * n_cols),
        norm: floats(bench, random, n_cols),
        n_used,
    }
}

/// Where the results of `n` tokens go, full of what nobody writes.
struct Results {
    normed: HalfRows,
    scores: Buffer<f32>,
    choices: Choices,
}

fn results(bench: &Bench, case: &Case, n: usize) -> Results {
    let (n_experts, n_used) = (case.matrix.n_rows(), case.n_used);
    // A row longer than it must be: its padding is written, too.
    let stride = case.matrix.padded_cols() + 64;
    Results {
        normed: HalfRows { data: bench.upload(&vec![f16::from_f32(-77.25); n * stride + BESIDE]), stride },
        scores: bench.upload(&vec![-77.25; n * n_experts + BESIDE]),
        choices: Choices {
            experts: bench.upload(&vec![-77; n * n_used + BESIDE]),
            weights: bench.upload(&vec![-77.25; n * n_used + BESIDE]),
            n_experts,
            n_used,
        },
    }
}

/// One launch, or three.
fn route(bench: &Bench, case: &Case, to: &Results, n: usize, one: bool) {
    let (kernels, matrix, bias) = (&bench.kernels, &case.matrix, case.bias.as_ref());
    if one {
        let norm = NormInput { x: &case.x, weight: &case.norm, eps: EPS };
        let router = Router { norm, matrix, bias, normed: &to.normed, scores: &to.scores, choices: &to.choices };
        return router.launch(kernels, n).expect("launches");
    }
    let norm = RmsNorm { x: &case.x, weight: &case.norm, rows: None, eps: EPS, y: &to.normed };
    rms_norm(kernels, &norm, n).expect("launches");
    let output = Output::Store(Rows { data: to.scores.clone(), stride: matrix.n_rows() });
    let product = Product { matrix, x: &to.normed, n, bias, bias_up: None, experts: Experts::One, output };
    product.launch(kernels, &bench.zeros(1)).expect("launches");
    to.choices.route(kernels, &to.scores, n).expect("launches");
}

/// Everything that was written, as bits; one NaN is as good as another.
fn bits(results: &Results) -> [Vec<u32>; 4] {
    let floats = |buffer| download(buffer).into_iter().map(|v: f32| if v.is_nan() { u32::MAX } else { v.to_bits() });
    [
        download(&results.normed.data).into_iter().map(|v| u32::from(v.to_bits())).collect(),
        floats(&results.scores).collect(),
        download(&results.choices.experts).into_iter().map(|v| v as u32).collect(),
        floats(&results.choices.weights).collect(),
    ]
}

fn assert_same(bench: &Bench, case: &Case, n: usize, what: &str) {
    let [together, apart] = [true, false].map(|one| {
        let results = results(bench, case, n);
        route(bench, case, &results, n, one);
        bits(&results)
    });
    for (i, name) in ["normalised rows", "scores", "experts", "weights"].into_iter().enumerate() {
        assert!(together[i] == apart[i], "{name} of {what}, {n} tokens: {:?}, {:?}", together[i], apart[i]);
    }
    let untouched = together[1].iter().filter(|v| **v == (-77.25_f32).to_bits()).count();
    assert_eq!(untouched, BESIDE, "every score is written, and nothing else");
    assert!(together[2][..n * case.n_used].iter().all(|e| (*e as usize) < case.matrix.n_rows()), "experts exist");
}

/// Whether the device can; one that cannot refuses.
fn can(bench: &Bench, case: &Case) -> bool {
    if bench.kernels.has_clusters() {
        assert!(can_route_together(case.matrix.kind(), case.matrix.shape(), 8, true), "{:?}", case.matrix.shape());
        return true;
    }
    let to = results(bench, case, 1);
    let norm = NormInput { x: &case.x, weight: &case.norm, eps: EPS };
    let (matrix, bias) = (&case.matrix, case.bias.as_ref());
    let router = Router { norm, matrix, bias, normed: &to.normed, scores: &to.scores, choices: &to.choices };
    assert!(router.launch(&bench.kernels, 1).is_err(), "a device without clusters");
    false
}

#[test]
fn small_routers_give_the_bits_of_three_launches() {
    let Some(bench) = bench("small_routers_give_the_bits_of_three_launches") else { return };
    let mut random = Random(71);
    for (format, widths) in [("F32", &[1, 33, 65, 320, 577][..]), ("BF16", &[200]), ("Q8_0", &[32, 288, 608])] {
        for n_cols in widths {
            for experts in [(1, 1), (4, 2), (8, 8), (17, 3), (32, 4), (33, 5), (128, 8)] {
                bench.arena.reset();
                let case = case(&bench, &mut random, format, experts, *n_cols);
                if !can(&bench, &case) {
                    return;
                }
                for n in [1, 2, 3, 8] {
                    assert_same(&bench, &case, n, &format!("{experts:?} of {format} with {n_cols} columns"));
                }
            }
        }
    }
}

#[test]
fn routers_of_models_give_the_bits_of_three_launches() {
    let Some(bench) = bench("routers_of_models_give_the_bits_of_three_launches") else { return };
    let mut random = Random(72);
    // The last of 2,880's eight chunks has three tiles of six.
    for (format, experts, n_cols) in [
        ("F32", (32, 4), 2880),
        ("F32", (128, 4), 2880),
        ("F32", (8, 2), 4096),
        ("F16", (128, 8), 2048),
        ("Q8_0", (32, 4), 2880),
        ("Q8_0", (256, 32), 2304),
    ] {
        bench.arena.reset();
        let case = case(&bench, &mut random, format, experts, n_cols);
        if !can(&bench, &case) {
            return;
        }
        for n in [1, 2, 3, 7, 8] {
            assert_same(&bench, &case, n, &format!("{experts:?} of {format} with {n_cols} columns"));
        }
    }
}

#[test]
fn scores_that_are_no_numbers_choose_the_experts_of_three_launches() {
    let Some(bench) = bench("scores_that_are_no_numbers_choose_the_experts_of_three_launches") else { return };
    let mut random = Random(73);
    for (experts, n_cols) in [((4, 2), 64), ((32, 4), 320), ((40, 8), 320)] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            bench.arena.reset();
            let mut case = case(&bench, &mut random, "F32", experts, n_cols);
            if !can(&bench, &case) {
                return;
            }
            // Of the first row every score is bad, of the others some are, and some tie.
            let mut x = download(&case.x);
            x[n_cols / 2] = bad;
            case.x = bench.upload(&x);
            let bias = |e: usize| if e % 3 == 1 { bad } else { (e % 2) as f32 };
            case.bias = Some(bench.upload(&(0..experts.0).map(bias).collect::<Vec<f32>>()));
            for n in [1, 3] {
                assert_same(&bench, &case, n, &format!("{experts:?}, {bad}"));
            }
        }
    }
}

#[test]
fn what_the_launch_before_wrote_is_what_is_routed() {
    let Some(bench) = bench("what_the_launch_before_wrote_is_what_is_routed") else { return };
    let mut random = Random(74);
    let (n_cols, rounds) = (576, 12);
    let case = case(&bench, &mut random, "F32", (32, 4), n_cols);
    if !can(&bench, &case) {
        return;
    }
    // Each round adds a product of the normalised rows to x and routes again: the launches follow each other without a pause.
    let square = matrix(&bench, &mut random, "Q8_0", n_cols, n_cols);
    let before = download(&case.x);
    for n in [1, 4] {
        let run = |one: bool| {
            case.x.write(&before).expect("a copy to the device");
            let all: Vec<Results> = (0..rounds).map(|_| results(&bench, &case, n)).collect();
            let nothing = bench.zeros(1);
            for to in &all {
                route(&bench, &case, to, n, one);
                let output = Output::Add(Rows { data: case.x.clone(), stride: n_cols });
                let (matrix, x) = (&square, &to.normed);
                let product = Product { matrix, x, n, bias: None, bias_up: None, experts: Experts::One, output };
                product.launch(&bench.kernels, &nothing).expect("launches");
            }
            all.iter().map(bits).collect::<Vec<_>>()
        };
        let (together, apart) = (run(true), run(false));
        for round in 0..rounds {
            assert!(together[round] == apart[round], "{n} tokens, round {round}");
        }
        assert!(together[0][1] != together[1][1], "the rows changed");
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let mut random = Random(75);
    let good = case(&bench, &mut random, "F32", (8, 2), 96);
    let to = results(&bench, &good, 3);
    if !can(&bench, &good) {
        return;
    }
    let norm = NormInput { x: &good.x, weight: &good.norm, eps: EPS };
    let (normed, scores, choices) = (&to.normed, &to.scores, &to.choices);
    let router = Router { norm: norm.clone(), matrix: &good.matrix, bias: None, normed, scores, choices };
    let refused = |router: Router<'_>, n: usize, what: &str| {
        let error = router.launch(&bench.kernels, n).expect_err(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(router.clone(), 0, "choices");
    refused(router.clone(), 9, "choices");
    let many = results(&bench, &good, 9);
    refused(Router { choices: &many.choices, ..router.clone() }, 9, "up to 8 tokens");
    let of = |n_experts, n_used| Choices { n_experts, n_used, ..choices.clone() };
    refused(Router { choices: &of(8, 9), ..router.clone() }, 1, "experts");
    refused(Router { choices: &of(7, 2), ..router.clone() }, 1, "a row for each of 7");
    let six = matrix(&bench, &mut random, "Q6_K", 8, 256);
    refused(Router { matrix: &six, ..router.clone() }, 1, "a router that");
    let wide = matrix(&bench, &mut random, "F32", 8, 4100);
    refused(Router { matrix: &wide, ..router.clone() }, 1, "a router that");
    let short = good.x.slice(0..3 * 96 - 1);
    refused(Router { norm: NormInput { x: &short, ..norm.clone() }, ..router.clone() }, 3, "3 rows of 96");
    let other = good.norm.slice(0..95);
    refused(Router { norm: NormInput { weight: &other, ..norm.clone() }, ..router.clone() }, 1, "1 rows of 96");
    let narrow = HalfRows { stride: 96, ..normed.clone() };
    refused(Router { normed: &narrow, ..router.clone() }, 1, "rows of 128");
    let few = HalfRows { data: normed.data.slice(0..3 * 192 - 1), stride: 192 };
    refused(Router { normed: &few, ..router.clone() }, 3, "normalised rows");
    refused(Router { scores: &scores.slice(0..23), ..router.clone() }, 3, "scores");
    refused(Router { bias: Some(&scores.slice(0..7)), ..router.clone() }, 1, "bias");
    router.launch(&bench.kernels, 3).expect("what is right launches");
}
