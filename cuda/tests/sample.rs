//! The sampler against its definition, written the slow way: the same tokens and the same bits of every log probability.
//!
//! The definition is that of `engine/sampler` in the root package; its arithmetic is repeated here because this crate knows
//! nobody of ours.

mod support;

use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::matmul::Rows;
use playhouse_cuda::launch::sample::{Limits, Outcome, Request, Sampler, max_cluster, pack};
use playhouse_cuda::pinned::Pinned;
use std::collections::BTreeMap;
use support::{Bench, Random, bench, download};

const WEIGHT_ONE: u64 = 1 << 43;

fn exp_nonpositive(x: f64) -> f64 {
    let k = (x * std::f64::consts::LOG2_E + 0.5).floor();
    let r = (x - k * f64::from_bits(0x3fe6_2e42_fee0_0000)) - k * f64::from_bits(0x3dea_39ef_3579_3c76);
    let factorial = |n: u64| (1..=n).product::<u64>() as f64;
    let sum = (0..=12).rev().fold(1.0 / factorial(13), |sum, n| sum * r + 1.0 / factorial(n));
    sum * f64::from_bits(((k as i64 + 1023) as u64) << 52)
}

fn weight(logit: f32, max: f32, temperature: f32) -> u64 {
    let x = (f64::from(logit) - f64::from(max)) / f64::from(temperature);
    if x < -31.0 { 0 } else { (exp_nonpositive(x) * WEIGHT_ONE as f64 + 0.5) as u64 }
}

fn random_u64(seed: u64, choice: u32, index: u32) -> u64 {
    let (mut c, mut k) = ([index, 0, choice, 0], [seed as u32, (seed >> 32) as u32]);
    for _ in 0..10 {
        let (a, b) = (0xd251_1f53_u64 * u64::from(c[0]), 0xcd9e_8d57_u64 * u64::from(c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
    }
    u64::from(c[1]) << 32 | u64::from(c[0])
}

/// A request that owns its lists, and its sequence's tokens.
#[derive(Debug, Clone)]
struct Row {
    request: Request<'static>,
    bias: Vec<(u32, f32)>,
    forbidden: Vec<u32>,
    allowed: Option<Vec<bool>>,
    prompt: Vec<u32>,
    emitted: Vec<u32>,
}

impl Row {
    fn plain(request: Request<'static>) -> Row {
        Row { request, bias: vec![], forbidden: vec![], allowed: None, prompt: vec![], emitted: vec![] }
    }

    /// Anything that a request may ask for.
    fn random(random: &mut Random, n_vocab: usize) -> Row {
        let mut one_of = |n: u64| random.next() % n;
        let temperature = [0.0, 1.0, 0.7, 0.05, 1.8, 1.0e-20, 1.0e20][one_of(7) as usize];
        let top_k = [0, 1, 2, 7, 40, 300, 5000][one_of(7) as usize];
        let top_p = [1.0, 1.0, 0.0, 0.5, 0.9, 0.99, 0.999_999][one_of(7) as usize];
        let min_p = [0.0, 0.0, 0.0, 0.05, 1.0][one_of(5) as usize];
        let n_logprobs = [None, Some(0), Some(1), Some(5), Some(20)][one_of(5) as usize];
        let (seed, choice, index) = (one_of(u64::MAX), one_of(3) as u32, one_of(1000) as u32);
        let mut row = Row::plain(Request {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            choice,
            index,
            n_logprobs,
            ..Request::greedy()
        });
        let mut ids = |n: u64| (0..n).map(|_| (random.next() % n_vocab as u64) as u32).collect::<Vec<u32>>();
        match ids(1)[0] % 3 {
            0 if n_vocab > 2 => {
                row.bias = ids(9).into_iter().enumerate().map(|(i, id)| (id, [1.5, -2.0, 0.25][i % 3])).collect();
                row.bias[3] = (row.bias[0].0, 1.0e-3);
                row.bias[4].1 = f32::NEG_INFINITY;
                row.forbidden = ids(1);
            }
            1 => {
                (row.prompt, row.emitted) = (ids(7), ids(12));
                row.request.repetition_penalty = 1.3;
                row.request.presence_penalty = 0.4;
                row.request.frequency_penalty = 0.2;
                row.request.history = Some(0);
            }
            _ => (),
        }
        if n_vocab > 40 && random.next().is_multiple_of(4) {
            let share = 2 + random.next() % 3;
            row.allowed = Some((0..n_vocab).map(|_| random.next().is_multiple_of(share)).collect());
        }
        row
    }

    fn adjust(&self, logits: &mut [f32]) {
        let r = &self.request;
        for &(token, bias) in &self.bias {
            let logit = &mut logits[token as usize];
            let is_forbidden = *logit == f32::NEG_INFINITY || bias == f32::NEG_INFINITY;
            *logit = if is_forbidden { f32::NEG_INFINITY } else { (*logit + bias).clamp(f32::MIN, f32::MAX) };
        }
        let mut seen = vec![None; if r.history.is_some() { logits.len() } else { 0 }];
        if !seen.is_empty() {
            self.prompt.iter().for_each(|t| seen[*t as usize] = Some(0_u32));
            self.emitted.iter().for_each(|t| seen[*t as usize] = Some(seen[*t as usize].unwrap_or(0) + 1));
        }
        for (logit, count) in logits.iter_mut().zip(seen) {
            let Some(count) = count.filter(|_| *logit != f32::NEG_INFINITY) else { continue };
            let repeated = if *logit > 0.0 { *logit / r.repetition_penalty } else { *logit * r.repetition_penalty };
            let frequency = r.frequency_penalty * count as f32;
            let all = if count == 0 { repeated } else { repeated - r.presence_penalty - frequency };
            *logit = all.clamp(f32::MIN, f32::MAX);
        }
        for (id, logit) in logits.iter_mut().enumerate() {
            let is_allowed = self.allowed.as_ref().is_none_or(|allowed| allowed[id]);
            if !is_allowed || self.forbidden.contains(&(id as u32)) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// The outcome and the most likely ids with their log probabilities.
    fn by_definition(&self, logits: &[f32]) -> (Outcome, Vec<(u32, f32)>) {
        if let Some(bad) = logits.iter().position(|l| !l.is_finite()) {
            return (Outcome::NotFinite { token: bad as u32, found: logits[bad] }, vec![]);
        }
        let (r, mut logits) = (&self.request, logits.to_vec());
        self.adjust(&mut logits);
        let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |token: &u32| logits[*token as usize];
        ranked.sort_by(|a, b| logit(b).partial_cmp(&logit(a)).expect("numbers").then(a.cmp(b)));
        let max = logit(&ranked[0]);
        if max == f32::NEG_INFINITY {
            return (Outcome::NothingToChoose, vec![]);
        }
        let token = if r.temperature == 0.0 { ranked[0] } else { self.draw(&logits, &ranked, max) };
        let Some(n_top) = r.n_logprobs else { return (Outcome::Chosen { token, logprob: 0.0, n_top: 0 }, vec![]) };
        let total: u64 = logits.iter().map(|l| weight(*l, max, 1.0)).sum();
        let log_total = libm::log(total as f64 / WEIGHT_ONE as f64);
        let logprob = |token: &u32| (f64::from(logit(token)) - f64::from(max) - log_total) as f32;
        let listed = ranked.iter().take(n_top as usize).filter(|t| logit(t) != f32::NEG_INFINITY);
        let top: Vec<(u32, f32)> = listed.map(|t| (*t, logprob(t))).collect();
        (Outcome::Chosen { token, logprob: logprob(&token), n_top: top.len() }, top)
    }

    fn draw(&self, logits: &[f32], ranked: &[u32], max: f32) -> u32 {
        let r = &self.request;
        let w = |token: &u32| u128::from(weight(logits[*token as usize], max, r.temperature));
        let mut kept = ranked.to_vec();
        if r.top_k > 0 {
            kept.truncate(r.top_k as usize);
        }
        if r.top_p < 1.0 {
            let p = (f64::from(r.top_p) * 2f64.powi(62)) as u128;
            let (total, mut sum) = (kept.iter().map(w).sum::<u128>(), 0);
            let last = kept.iter().position(|token| {
                sum += w(token);
                sum << 62 >= p * total
            });
            kept.truncate(last.expect("the whole reaches any share") + 1);
        }
        let p = (f64::from(r.min_p) * 2f64.powi(62)) as u128;
        kept.retain(|token| w(token) > 0 && w(token) << 62 >= p << 43);
        kept.sort_unstable();
        let total: u128 = kept.iter().map(w).sum();
        let target = (u128::from(random_u64(r.seed, r.choice, r.index)) * total) >> 64;
        let mut sum = 0;
        *kept
            .iter()
            .find(|token| {
                sum += w(token);
                sum > target
            })
            .expect("the target is below the total")
    }
}

/// Rows of logits of several kinds, many ties among them.
fn logits(random: &mut Random, n_vocab: usize) -> Vec<f32> {
    let kind = random.next() % 6;
    let of = |random: &mut Random| match kind {
        0 => (random.normal() * 2.0).round(),
        1 => 3.0 * random.normal(),
        2 => 1e-3 * random.normal(),
        3 => 12.0 * random.normal() - 5.0,
        4 => [f32::MAX, f32::MIN, -0.0, 0.0, random.normal()][(random.next() % 5) as usize],
        _ => 1.0,
    };
    (0..n_vocab).map(|_| of(random)).collect()
}

/// Masks and histories of the rows that have them, with the requests that point there.
fn requests<'a>(rows: &'a [Row]) -> (Vec<Option<Request<'a>>>, Vec<Vec<u64>>, Vec<&'a Row>) {
    let (mut masks, mut histories) = (Vec::new(), Vec::new());
    let mut to_request = |row: &'a Row| {
        let mut request = Request { bias: &row.bias, forbidden: &row.forbidden, ..row.request };
        if let Some(allowed) = &row.allowed {
            request.mask = Some(masks.len() as u32);
            let word = |bits: &[bool]| bits.iter().enumerate().fold(0, |word, (i, bit)| word | u64::from(*bit) << i);
            masks.push(allowed.chunks(64).map(word).collect());
        }
        if request.history.is_some() {
            request.history = Some(histories.len() as u32);
            histories.push(row);
        }
        Some(request)
    };
    let requests = rows.iter().map(&mut to_request).collect();
    (requests, masks, histories)
}

fn limits(n_vocab: usize, rows: usize) -> Limits {
    Limits { n_vocab, rows, bias: 16 * rows, forbidden: 4 * rows, masks: rows, histories: rows, top: 20 }
}

fn write<T: playhouse_cuda::arena::Element>(buffer: &Buffer<T>, data: &[T]) {
    if !data.is_empty() {
        buffer.slice(0..data.len()).write(data).expect("a copy to the device");
    }
}

fn count(bench: &Bench, sampler: &Sampler, slot: u32, row: &Row) {
    let history = sampler.history(slot);
    history.clear().expect("a memset");
    let mut counts: BTreeMap<u32, u32> = row.prompt.iter().map(|token| (*token, 0)).collect();
    row.emitted.iter().for_each(|token| *counts.entry(*token).or_insert(0) += 1);
    if counts.is_empty() {
        return;
    }
    // Behind something else, as where several sequences begin in one step.
    let mut seen = Pinned::<u32>::new(&bench.gpu, 2 + 2 * counts.len()).expect("host memory");
    let pairs: Vec<u32> = counts.iter().flat_map(|(id, count)| [*id, *count]).collect();
    seen[2..].copy_from_slice(&pairs);
    history.write(&bench.kernels, &seen, 2, counts.len()).expect("launches");
    bench.gpu.synchronize().expect("the device is well");
}

/// What the GPU makes of some rows.
fn sample(
    bench: &Bench,
    rows: &[Row],
    logits: &[f32],
    stride: usize,
    n_vocab: usize,
    cluster: Option<u32>,
) -> Vec<(Outcome, Vec<(u32, f32)>)> {
    let sampler = Sampler::new(&bench.arena, limits(n_vocab, rows.len())).expect("fits");
    let (requests, masks, histories) = requests(rows);
    let packed = pack(&requests, &sampler.limits).expect("within the limits");
    write(&sampler.inputs.rows, &packed.rows);
    write(&sampler.inputs.bias_ids, &packed.bias_ids);
    write(&sampler.inputs.biases, &packed.biases);
    write(&sampler.inputs.forbidden, &packed.forbidden);
    write(&sampler.inputs.masks, &masks.concat());
    histories.iter().enumerate().for_each(|(slot, row)| count(bench, &sampler, slot as u32, row));
    // Places that the kernel leaves alone are read back with the rest.
    sampler.outputs.top_tokens.zero().expect("a memset");
    sampler.outputs.top_logprobs.zero().expect("a memset");
    let logits = Rows { data: bench.upload(logits), stride };
    match cluster {
        Some(cluster) => sampler.launch_with(&bench.kernels, &logits, rows.len(), cluster).expect("launches"),
        None => sampler.launch(&bench.kernels, &logits, rows.len()).expect("launches"),
    }
    let (results, tokens) = (download(&sampler.outputs.results), download(&sampler.outputs.tokens));
    let (top_tokens, top_logprobs) = (download(&sampler.outputs.top_tokens), download(&sampler.outputs.top_logprobs));
    let of_row = |(i, result): (usize, &playhouse_cuda::launch::sample::RowResult)| {
        let outcome = result.outcome();
        let n_top = if let Outcome::Chosen { token, n_top, .. } = outcome {
            assert_eq!(tokens[i], token, "both places hold the token");
            n_top
        } else {
            0
        };
        let first = i * sampler.limits.top;
        let top = (first..first + n_top).map(|at| (top_tokens[at], top_logprobs[at])).collect();
        (outcome, top)
    };
    results.iter().enumerate().map(of_row).collect()
}

/// The largest cluster, where the device grants more than every device does.
fn most(bench: &Bench) -> Option<Option<u32>> {
    let most = max_cluster(bench.gpu.info().capability, bench.kernels.has_clusters());
    (most > 8).then_some(Some(most))
}

/// Equal to the bit, NaN included.
fn assert_same(found: &(Outcome, Vec<(u32, f32)>), expected: &(Outcome, Vec<(u32, f32)>), what: &str) {
    let bits = |(outcome, top): &(Outcome, Vec<(u32, f32)>)| {
        let words = match *outcome {
            Outcome::Chosen { token, logprob, n_top } => (0, token, logprob.to_bits(), n_top),
            Outcome::NotFinite { token, found } => (1, token, found.to_bits(), 0),
            Outcome::NothingToChoose => (2, 0, 0, 0),
            Outcome::Unused => (3, 0, 0, 0),
        };
        (words, top.iter().map(|(token, logprob)| (*token, logprob.to_bits())).collect::<Vec<_>>())
    };
    assert_eq!(bits(found), bits(expected), "{what}");
}

#[test]
fn every_row_equals_its_definition_for_any_number_of_blocks() {
    let Some(bench) = bench("every_row_equals_its_definition_for_any_number_of_blocks") else { return };
    let mut random = Random(71);
    for n_vocab in [1, 2, 3, 17, 31, 33, 127, 2049, 4096, 9001, 32_064, 50_257] {
        for n in [1, 2, 3, 17, 31, 33, 127] {
            if n * n_vocab > 400_000 {
                continue;
            }
            let stride = n_vocab + [0, 3, 64][(random.next() % 3) as usize];
            let rows: Vec<Row> = (0..n).map(|_| Row::random(&mut random, n_vocab)).collect();
            let mut all = vec![f32::NAN; n * stride];
            all.chunks_mut(stride).for_each(|row| row[..n_vocab].copy_from_slice(&logits(&mut random, n_vocab)));
            let expected: Vec<_> = rows
                .iter()
                .zip(all.chunks(stride))
                .map(|(row, logits)| row.by_definition(&logits[..n_vocab]))
                .collect();
            for cluster in [None, Some(1), Some(4), Some(8)].into_iter().chain(most(&bench)) {
                bench.arena.reset();
                let found = sample(&bench, &rows, &all, stride, n_vocab, cluster);
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    assert_same(
                        found,
                        expected,
                        &format!("{n_vocab} ids, {cluster:?} blocks, row {i}: {:?}", rows[i].request),
                    );
                }
            }
        }
    }
}

#[test]
fn nuclei_of_any_size_are_drawn_from() {
    let Some(bench) = bench("nuclei_of_any_size_are_drawn_from") else { return };
    let mut random = Random(76);
    let n_vocab = 32_064;
    // A nucleus of a few ids, of some hundreds, of more than a block lists at once, and of half the vocabulary; and one whose edge is among
    // thousands of equal logits.
    let deviations = [6.0, 2.5, 1.2, 0.2];
    let mut rows = Vec::new();
    for top_p in [0.1, 0.9, 0.99, 1.0] {
        for top_k in [0, 3, 50, 1000, 3000] {
            for min_p in [0.0, 0.01] {
                let seed = rows.len() as u64;
                rows.push(Row::plain(Request { temperature: 0.8, top_p, top_k, min_p, seed, ..Request::greedy() }));
            }
        }
    }
    for deviation in deviations.into_iter().map(Some).chain([None]) {
        let one = |random: &mut Random| match deviation {
            Some(deviation) => deviation * random.normal(),
            None => {
                if random.next().is_multiple_of(3) {
                    0.5
                } else {
                    random.normal()
                }
            }
        };
        let all: Vec<f32> = (0..rows.len() * n_vocab).map(|_| one(&mut random)).collect();
        let expected: Vec<_> =
            rows.iter().zip(all.chunks(n_vocab)).map(|(row, logits)| row.by_definition(logits)).collect();
        for cluster in [Some(1), Some(2), Some(8)].into_iter().chain(most(&bench)) {
            bench.arena.reset();
            let found = sample(&bench, &rows, &all, n_vocab, n_vocab, cluster);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_same(found, expected, &format!("{deviation:?}, {cluster:?} blocks: {:?}", rows[i].request));
            }
        }
    }
}

#[test]
fn large_vocabularies_are_sampled() {
    let Some(bench) = bench("large_vocabularies_are_sampled") else { return };
    let mut random = Random(72);
    for n_vocab in [151_936, 201_088, 1 << 20] {
        bench.arena.reset();
        let base = Request { temperature: 1.0, n_logprobs: Some(20), seed: 5, ..Request::greedy() };
        let rows = [
            Request { temperature: 0.0, ..base },
            base,
            Request { top_p: 0.95, temperature: 0.8, ..base },
            Request { top_k: 50, top_p: 0.9, ..base },
            Request { min_p: 0.02, ..base },
        ]
        .map(Row::plain);
        let all: Vec<f32> = (0..rows.len() * n_vocab).map(|_| 2.0 * random.normal()).collect();
        let found = sample(&bench, &rows, &all, n_vocab, n_vocab, None);
        for ((found, row), logits) in found.iter().zip(&rows).zip(all.chunks(n_vocab)) {
            assert_same(found, &row.by_definition(logits), &format!("{n_vocab} ids: {:?}", row.request));
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let Some(bench) = bench("a_row_does_not_depend_on_its_company") else { return };
    let mut random = Random(73);
    let n_vocab = 5001;
    let rows: Vec<Row> = (0..200).map(|_| Row::random(&mut random, n_vocab)).collect();
    let all: Vec<f32> = (0..rows.len()).flat_map(|_| logits(&mut random, n_vocab)).collect();
    let together = sample(&bench, &rows, &all, n_vocab, n_vocab, None);
    for i in (0..rows.len()).step_by(7) {
        bench.arena.reset();
        let alone = sample(&bench, &rows[i..=i], &all[i * n_vocab..][..n_vocab], n_vocab, n_vocab, None);
        assert_same(&alone[0], &together[i], &format!("row {i}"));
    }
}

#[test]
fn bad_rows_are_reported_and_do_not_touch_the_others() {
    let Some(bench) = bench("bad_rows_are_reported_and_do_not_touch_the_others") else { return };
    let mut random = Random(74);
    let n_vocab = 33_000;
    let greedy = Request { n_logprobs: Some(3), ..Request::greedy() };
    let mut rows = vec![Row::plain(greedy); 6];
    rows[4].allowed = Some(vec![false; n_vocab]);
    rows[5].bias = vec![(7, 3.0)];
    let mut all: Vec<f32> = (0..rows.len() * n_vocab).map(|_| random.normal()).collect();
    for (row, at, bad) in [
        (0, 32_999, f32::NAN),
        (1, 0, f32::INFINITY),
        (1, 20_000, f32::NAN),
        (3, 8192, f32::NEG_INFINITY),
        (5, 7, f32::NAN),
    ] {
        all[row * n_vocab + at] = bad;
    }
    for cluster in [1, 4, 8] {
        bench.arena.reset();
        let found = sample(&bench, &rows, &all, n_vocab, n_vocab, Some(cluster));
        for (i, (found, row)) in found.iter().zip(&rows).enumerate() {
            assert_same(found, &row.by_definition(&all[i * n_vocab..][..n_vocab]), &format!("row {i}"));
        }
        assert!(matches!(found[4].0, Outcome::NothingToChoose));
        assert!(matches!(found[1].0, Outcome::NotFinite { token: 0, .. }));
    }
}

#[test]
fn a_few_rows_with_everything_switched_on() {
    let Some(bench) = bench("a_few_rows_with_everything_switched_on") else { return };
    // Small enough for a race checker: every path of the kernel in two launches.
    let mut random = Random(76);
    let n_vocab = 5000;
    let base = Request { temperature: 0.9, n_logprobs: Some(4), seed: 9, ..Request::greedy() };
    let requests = [
        Request { top_p: 0.9, ..base },
        Request { top_k: 30, top_p: 0.8, min_p: 0.01, ..base },
        Request { history: Some(0), presence_penalty: 0.5, ..base },
    ];
    let mut rows = requests.map(Row::plain);
    rows[1].bias = vec![(3, 1.0), (3, 2.0)];
    rows[1].forbidden = vec![4999];
    rows[2].emitted = vec![1, 2, 2];
    rows[2].allowed = Some((0..n_vocab).map(|i| i % 3 != 0).collect());
    let all: Vec<f32> =
        (0..3 * n_vocab).map(|i| if i < n_vocab { (4.0 * random.normal()).round() } else { random.normal() }).collect();
    for cluster in [1, 2] {
        let found = sample(&bench, &rows, &all, n_vocab, n_vocab, Some(cluster));
        for ((found, row), logits) in found.iter().zip(&rows).zip(all.chunks(n_vocab)) {
            assert_same(found, &row.by_definition(logits), &format!("{:?}", row.request));
        }
    }
}

#[test]
fn a_place_without_a_sequence_is_left_alone() {
    let Some(bench) = bench("a_place_without_a_sequence_is_left_alone") else { return };
    let sampler = Sampler::new(&bench.arena, limits(10, 2)).expect("fits");
    let packed = pack(&[None, Some(Request::greedy())], &sampler.limits).expect("within the limits");
    write(&sampler.inputs.rows, &packed.rows);
    let logits =
        Rows { data: bench.upload(&[f32::NAN; 10].into_iter().chain([0.5; 10]).collect::<Vec<_>>()), stride: 10 };
    sampler.launch(&bench.kernels, &logits, 2).expect("launches");
    let outcomes: Vec<Outcome> = download(&sampler.outputs.results).iter().map(|r| r.outcome()).collect();
    assert_eq!(outcomes, [Outcome::Unused, Outcome::Chosen { token: 0, logprob: 0.0, n_top: 0 }]);
}

#[test]
fn penalties_follow_what_the_kernel_itself_chose() {
    let Some(bench) = bench("penalties_follow_what_the_kernel_itself_chose") else { return };
    let mut random = Random(75);
    let n_vocab = 600;
    let request = Request {
        temperature: 0.9,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.1,
        seed: 11,
        history: Some(0),
        ..Request::greedy()
    };
    let mut row = Row { prompt: vec![3, 3, 9], ..Row::plain(request) };
    let sampler = Sampler::new(&bench.arena, limits(n_vocab, 1)).expect("fits");
    count(&bench, &sampler, 0, &row);
    for index in 0..40 {
        row.request.index = index;
        let logits: Vec<f32> = (0..n_vocab).map(|i| 2.0 * random.normal() + if i < 5 { 9.0 } else { 0.0 }).collect();
        let (requests, ..) = requests(std::slice::from_ref(&row));
        write(&sampler.inputs.rows, &pack(&requests, &sampler.limits).expect("within the limits").rows);
        let device = Rows { data: bench.upload(&logits), stride: n_vocab };
        sampler.launch(&bench.kernels, &device, 1).expect("launches");
        let found = (download(&sampler.outputs.results)[0].outcome(), vec![]);
        assert_same(&found, &row.by_definition(&logits), &format!("token {index}"));
        let Outcome::Chosen { token, .. } = found.0 else { panic!("{found:?}") };
        row.emitted.push(token);
    }
    assert!(
        row.emitted.iter().any(|t| row.emitted.iter().filter(|other| *other == t).count() > 2),
        "counts above 2 occur"
    );
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let refused = |limits: Limits| Sampler::new(&bench.arena, limits).expect_err("misuse").to_string();
    assert!(refused(Limits { n_vocab: 0, ..limits(1, 1) }).contains("limits"));
    assert!(refused(limits((1 << 20) + 1, 1)).contains("limits"));
    assert!(refused(Limits { top: 257, ..limits(100, 1) }).contains("limits"));
    let sampler = Sampler::new(&bench.arena, limits(100, 3)).expect("fits");
    let rows = |len: usize, stride: usize| Rows { data: bench.zeros(len), stride };
    let launch = |logits: &Rows<f32>, n: usize, cluster: u32| {
        sampler.launch_with(&bench.kernels, logits, n, cluster).expect_err("misuse").to_string()
    };
    assert!(launch(&rows(300, 100), 0, 1).contains("rows"));
    assert!(launch(&rows(400, 100), 4, 1).contains("rows"));
    assert!(launch(&rows(299, 100), 3, 1).contains("299 elements"));
    assert!(launch(&rows(400, 99), 3, 1).contains("stride 99"));
    assert!(launch(&rows(300, 100), 3, 3).contains("cluster"));
    assert!(launch(&rows(300, 100), 3, 32).contains("cluster"));
    let history = sampler.history(0);
    let mut seen = Pinned::<u32>::new(&bench.gpu, 6).expect("host memory");
    let mut refused = |pairs: [u32; 6], first, n| {
        seen.copy_from_slice(&pairs);
        history.write(&bench.kernels, &seen, first, n).expect_err("misuse").to_string()
    };
    for (first, n) in [(0, 0), (0, 4), (2, 3), (1, 2)] {
        assert!(refused([0; 6], first, n).contains("history: expected pairs"), "{n} from {first}");
    }
    assert!(refused([1, 0, 100, 0, 2, 0], 0, 3).contains("ids below 100"));
}
