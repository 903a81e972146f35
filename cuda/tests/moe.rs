//! Choice, grouping and weighted sum of experts against the definition, in f64 where there is arithmetic.

mod support;

use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::moe::{Choices, Groups, max_tiles};
use support::{Bench, Random, bench, download};

const ROWS: [usize; 7] = [1, 2, 3, 17, 31, 33, 127];
const EXPERTS: [(usize, usize); 6] = [(1, 1), (4, 2), (8, 8), (32, 4), (128, 8), (256, 32)];

fn choices(bench: &Bench, n: usize, n_experts: usize, n_used: usize) -> Choices {
    let experts = bench.upload(&vec![-7; n * n_used]);
    Choices { experts, weights: bench.upload(&vec![f32::NAN; n * n_used]), n_experts, n_used }
}

fn groups(bench: &Bench, n: usize, n_experts: usize, n_used: usize, tile: usize) -> Groups {
    let n_tiles = max_tiles(n, n_used, n_experts, tile);
    let filled = |len: usize| bench.upload(&vec![-7; len]);
    Groups {
        tile_experts: filled(n_tiles),
        pair_of: filled(n_tiles * tile),
        token_of: filled(n_tiles * tile),
        slot_of: filled(n * n_used),
        tile,
    }
}

/// Router logits with many ties.
fn logits(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|_| (4.0 * random.normal()).round() / 2.0).collect()
}

#[test]
fn the_best_experts_are_chosen_in_order_and_weighed_by_a_softmax() {
    let Some(bench) = bench("the_best_experts_are_chosen_in_order_and_weighed_by_a_softmax") else { return };
    let mut random = Random(61);
    for (n_experts, n_used) in EXPERTS {
        for n in ROWS {
            bench.arena.reset();
            let scores = logits(&mut random, n * n_experts);
            let choices = choices(&bench, n, n_experts, n_used);
            choices.route(&bench.kernels, &bench.upload(&scores), n).expect("launches");
            let (experts, weights) = (download(&choices.experts), download(&choices.weights));
            for (t, scores) in scores.chunks(n_experts).enumerate() {
                let mut order: Vec<usize> = (0..n_experts).collect();
                // Stable: ties by index. Both zeros are one score.
                order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).expect("numbers"));
                let found: Vec<usize> = experts[t * n_used..][..n_used].iter().map(|e| *e as usize).collect();
                assert_eq!(found, order[..n_used], "{n_used} of {n_experts}, token {t}: {scores:?}");
                let exp = |e: &usize| f64::from(scores[*e] - scores[order[0]]).exp();
                let total: f64 = found.iter().map(exp).sum();
                for (k, e) in found.iter().enumerate() {
                    let (weight, exact) = (f64::from(weights[t * n_used + k]), exp(e) / total);
                    assert!((weight - exact).abs() <= exact * 2f64.powi(-20), "{weight}, {exact}");
                }
            }
        }
    }
}

#[test]
fn logits_that_are_no_numbers_still_choose_experts_that_exist() {
    let Some(bench) = bench("logits_that_are_no_numbers_still_choose_experts_that_exist") else { return };
    // An index out of range would be an illegal address in the products, which ends the whole process.
    for bad in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
        for (n_experts, n_used) in EXPERTS {
            let mut scores = vec![bad; n_experts];
            scores[n_experts / 2] = 1.0;
            let choices = choices(&bench, 2, n_experts, n_used);
            let both = [scores, vec![bad; n_experts]].concat();
            choices.route(&bench.kernels, &bench.upload(&both), 2).expect("launches");
            for chosen in download(&choices.experts).chunks(n_used) {
                let mut sorted = chosen.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                let exist = sorted.iter().all(|e| (0..n_experts as i32).contains(e));
                assert!(sorted.len() == n_used && exist, "{bad}: {chosen:?} of {n_experts}");
            }
        }
    }
}

#[test]
fn choices_are_grouped_by_expert_in_ascending_order() {
    let Some(bench) = bench("choices_are_grouped_by_expert_in_ascending_order") else { return };
    let mut random = Random(62);
    for (n_experts, n_used) in EXPERTS {
        for n in ROWS {
            for tile in [32, 64, 128] {
                bench.arena.reset();
                let choices = choices(&bench, n, n_experts, n_used);
                choices.route(&bench.kernels, &bench.upload(&logits(&mut random, n * n_experts)), n).expect("launches");
                let groups = groups(&bench, n, n_experts, n_used, tile);
                choices.group(&bench.kernels, &groups, n).expect("launches");
                assert_grouped(&choices, &groups, n);
            }
        }
    }
}

fn assert_grouped(choices: &Choices, groups: &Groups, n: usize) {
    let experts = download(&choices.experts);
    let (tile, n_used) = (groups.tile, choices.n_used);
    let (mut tile_experts, mut pair_of, mut slot_of) = (Vec::new(), Vec::new(), vec![0; n * n_used]);
    for e in 0..choices.n_experts as i32 {
        let pairs: Vec<usize> = (0..n * n_used).filter(|p| experts[*p] == e).collect();
        for pairs in pairs.chunks(tile) {
            tile_experts.push(e);
            for pair in pairs {
                slot_of[*pair] = pair_of.len() as i32;
                pair_of.push(*pair as i32);
            }
            pair_of.resize(pair_of.len().next_multiple_of(tile), -1);
        }
    }
    tile_experts.resize(groups.tile_experts.len(), -1);
    pair_of.resize(groups.pair_of.len(), -1);
    let token_of: Vec<i32> = pair_of.iter().map(|p| if *p < 0 { -1 } else { p / n_used as i32 }).collect();
    assert_eq!(download(&groups.tile_experts), tile_experts);
    assert_eq!(download(&groups.pair_of), pair_of);
    assert_eq!(download(&groups.token_of), token_of);
    assert_eq!(download(&groups.slot_of), slot_of);
}

#[test]
fn outputs_are_added_up_in_the_order_of_the_choices() {
    let Some(bench) = bench("outputs_are_added_up_in_the_order_of_the_choices") else { return };
    let mut random = Random(63);
    let (n_experts, n_used, tile) = (32, 4, 32);
    for n_cols in [1, 33, 257, 2880] {
        for n in ROWS {
            bench.arena.reset();
            let choices = choices(&bench, n, n_experts, n_used);
            choices.route(&bench.kernels, &bench.upload(&logits(&mut random, n * n_experts)), n).expect("launches");
            let groups = groups(&bench, n, n_experts, n_used, tile);
            choices.group(&bench.kernels, &groups, n).expect("launches");
            let (slots, weights) = (download(&groups.slot_of), download(&choices.weights));
            let x: Vec<f32> = (0..n * n_cols).map(|_| random.normal()).collect();
            let outputs: Vec<f32> = (0..n * n_used * n_cols).map(|_| random.normal()).collect();
            let mut in_tiles = vec![f32::NAN; groups.pair_of.len() * n_cols];
            for (pair, output) in outputs.chunks(n_cols).enumerate() {
                in_tiles[slots[pair] as usize * n_cols..][..n_cols].copy_from_slice(output);
            }
            let run = |y: &Buffer<f32>, groups: Option<&Groups>| {
                let x = bench.upload(&x);
                choices.combine(&bench.kernels, (&x, y), n_cols, groups, n).expect("launches");
                download(&x)
            };
            let direct = run(&bench.upload(&outputs), None);
            let grouped = run(&bench.upload(&in_tiles), Some(&groups));
            for i in 0..n * n_cols {
                let (t, c) = (i / n_cols, i % n_cols);
                let term =
                    |k: usize| f64::from(weights[t * n_used + k]) * f64::from(outputs[(t * n_used + k) * n_cols + c]);
                let exact = (0..n_used).fold(f64::from(x[i]), |sum, k| sum + term(k));
                let size = (0..n_used).fold(f64::from(x[i]).abs(), |sum, k| sum + term(k).abs());
                assert!((f64::from(direct[i]) - exact).abs() <= size * 2f64.powi(-22), "{}, {exact}", direct[i]);
                assert_eq!(direct[i].to_bits(), grouped[i].to_bits(), "one by one and in tiles");
            }
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let good = choices(&bench, 3, 8, 2);
    let logits = bench.zeros::<f32>(24);
    let refused =
        |choices: &Choices, n: usize| choices.route(&bench.kernels, &logits, n).expect_err("misuse").to_string();
    assert!(refused(&good, 0).contains("choices"));
    assert!(refused(&good, 4).contains("choices"));
    assert!(refused(&Choices { n_used: 0, ..good.clone() }, 1).contains("experts"));
    assert!(refused(&Choices { n_used: 9, ..good.clone() }, 1).contains("experts"));
    assert!(refused(&Choices { n_experts: 257, ..good.clone() }, 1).contains("experts"));
    assert!(refused(&Choices { n_experts: 9, ..good.clone() }, 3).contains("logits"));
    let few = groups(&bench, 1, 8, 2, 32);
    assert!(good.group(&bench.kernels, &few, 3).is_err_and(|e| e.to_string().contains("tiles of 32")));
    let (x, y) = (bench.zeros(300), bench.zeros(599));
    assert!(good.combine(&bench.kernels, (&x, &y), 100, None, 3).is_err_and(|e| e.to_string().contains("599")));
}
