//! The sampler against its definition, written the slow way, and against what each parameter promises.

use super::*;
use proptest::prelude::*;

fn params(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, ..SamplingParams::greedy() }
}

fn choose(params: &SamplingParams, logits: &[f32], index: u32) -> u32 {
    Sampler::new(params, &[], &[]).choose(&mut logits.to_vec(), index, RowOptions::default()).unwrap().token
}

/// The definition in the module's doc, with a full sort and no shortcut.
fn by_definition(params: &SamplingParams, logits: &[f32], index: u32) -> u32 {
    let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
    ranked.sort_by(|&a, &b| rank::order(logits, a, b));
    let max = logits[ranked[0] as usize];
    if params.temperature == 0.0 {
        return ranked[0];
    }
    let w = |token: u32| u128::from(weight(logits[token as usize], max, params.temperature));
    if params.top_k > 0 {
        ranked.truncate(params.top_k as usize);
    }
    let total: u128 = ranked.iter().map(|&token| w(token)).sum();
    let p = (f64::from(params.top_p) * 2f64.powi(62)) as u128;
    if params.top_p < 1.0 {
        let mut sum = 0;
        let last = ranked.iter().position(|&token| {
            sum += w(token);
            sum << 62 >= p * total
        });
        ranked.truncate(last.unwrap() + 1);
    }
    let p = (f64::from(params.min_p) * 2f64.powi(62)) as u128;
    ranked.retain(|&token| w(token) > 0 && w(token) << 62 >= p << 43);
    ranked.sort();
    let total: u128 = ranked.iter().map(|&token| w(token)).sum();
    let target = (u128::from(random_u64(params.seed, params.choice, index)) * total) >> 64;
    let mut sum = 0;
    *ranked
        .iter()
        .find(|&&token| {
            sum += w(token);
            sum > target
        })
        .unwrap()
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    let temperature = prop_oneof![Just(0.0f32), Just(1.0), 0.01f32..3.0, Just(1.0e-20), Just(1.0e20)];
    let top_k = prop_oneof![Just(0u32), 1u32..80];
    let top_p = prop_oneof![Just(1.0f32), Just(0.0), 0.0f32..1.0];
    let min_p = prop_oneof![Just(0.0f32), Just(1.0), 0.0f32..1.0];
    (temperature, top_k, top_p, min_p, any::<u64>(), 0u32..4).prop_map(
        |(temperature, top_k, top_p, min_p, seed, choice)| SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            choice,
            ..SamplingParams::greedy()
        },
    )
}

fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values, so that there are many ties, beside many values.
    let tied = prop::collection::vec((-3i8..3).prop_map(f32::from), 1..70);
    let wide = prop::collection::vec(-40.0f32..40.0, 1..70);
    let huge = prop::collection::vec(prop_oneof![Just(f32::MAX), Just(f32::MIN), -1.0f32..1.0], 1..70);
    prop_oneof![tied, wide, huge]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_its_definition(params in any_params(), logits in any_logits(), index in 0u32..1000) {
        prop_assert_eq!(choose(&params, &logits, index), by_definition(&params, &logits, index));
    }

    #[test]
    fn a_restarted_sampler_is_the_same(
        logits in prop::collection::vec(-5.0f32..5.0, 20),
        tokens in prop::collection::vec(0u32..20, 0..12),
        seed in any::<u64>(),
    ) {
        let params = SamplingParams {
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            seed,
            ..params(0.9)
        };
        let mut live = Sampler::new(&params, &[1, 2], &[]);
        tokens.iter().for_each(|&token| live.push(token));
        let restarted = Sampler::new(&params, &[1, 2], &tokens);
        let options = RowOptions { n_logprobs: Some(5), ..RowOptions::default() };
        let index = tokens.len() as u32;
        let (a, b) = (live.choose(&mut logits.clone(), index, options), restarted.choose(&mut logits.clone(), index, options));
        prop_assert_eq!(a, b);
    }
}

#[test]
fn greedy_takes_the_highest_and_the_lowest_id_of_equals() {
    assert_eq!(choose(&params(0.0), &[1.0, 3.0, 3.0, -1.0], 0), 1);
    assert_eq!(choose(&params(0.0), &[-0.0, 0.0], 0), 0);
    assert_eq!(choose(&params(0.0), &[f32::MIN, f32::MIN], 0), 0);
}

#[test]
fn draws_follow_the_distribution() {
    // ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8. 40,000 draws, each by its index; five sigma are 0.0121.
    let logits = [0.0f32, std::f32::consts::LN_2, 5f32.ln()];
    let mut counts = [0u32; 3];
    for index in 0..40_000 {
        counts[choose(&SamplingParams { seed: 7, ..params(1.0) }, &logits, index) as usize] += 1;
    }
    for (count, expected) in counts.iter().zip([0.125, 0.25, 0.625]) {
        assert!((f64::from(*count) / 40_000.0 - expected).abs() < 0.0121, "{counts:?}");
    }
}

#[test]
fn top_k_top_p_and_min_p_keep_what_they_say() {
    let logits = [0.0f32, std::f32::consts::LN_2, 5f32.ln()];
    let kept = |params: SamplingParams| {
        let mut kept: Vec<u32> = (0..2_000).map(|index| choose(&params, &logits, index)).collect();
        kept.sort_unstable();
        kept.dedup();
        kept
    };
    assert_eq!(kept(SamplingParams { top_k: 2, ..params(1.0) }), [1, 2]);
    assert_eq!(kept(SamplingParams { top_k: 1, ..params(1.0) }), [2]);
    assert_eq!(kept(SamplingParams { top_p: 0.62, ..params(1.0) }), [2]);
    assert_eq!(kept(SamplingParams { top_p: 0.63, ..params(1.0) }), [1, 2]);
    assert_eq!(kept(SamplingParams { top_p: 0.88, ..params(1.0) }), [0, 1, 2]);
    assert_eq!(kept(SamplingParams { top_p: 0.0, ..params(1.0) }), [2]);
    assert_eq!(kept(SamplingParams { min_p: 0.3, ..params(1.0) }), [1, 2]);
    assert_eq!(kept(SamplingParams { min_p: 0.5, ..params(1.0) }), [2]);
    // After top_k the mass is that of the kept: 5/7 reach 0.7.
    assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.7, ..params(1.0) }), [2]);
}

#[test]
fn penalties_come_in_the_documented_order() {
    let mut params = params(0.0);
    params.logit_bias = vec![(0, 1.0), (0, 0.5)];
    params.repetition_penalty = 2.0;
    params.presence_penalty = 0.25;
    params.frequency_penalty = 0.125;
    let mut logits = vec![2.5, -1.0, 4.0, 1.0];
    // 0 is in prompt and twice in the output, 1 once in the output, 2 in the prompt, 3 nowhere.
    let sampler = Sampler::new(&params, &[0, 2], &[0, 1, 0]);
    sampler.choose(&mut logits, 3, RowOptions::default()).unwrap();
    assert_eq!(logits, [(2.5 + 1.5) / 2.0 - 0.25 - 2.0 * 0.125, -2.0 - 0.25 - 0.125, 2.0, 1.0]);
}

#[test]
fn forbidden_ids_are_never_chosen_nor_listed() {
    let mut mask = TokenMask::none(4);
    [0, 1, 3].into_iter().for_each(|token| mask.allow(token));
    let options = RowOptions { forbidden: &[3], mask: Some(&mask), n_logprobs: Some(4) };
    let biased = SamplingParams { logit_bias: vec![(1, f32::NEG_INFINITY)], ..params(0.0) };
    let chosen = Sampler::new(&biased, &[], &[]).choose(&mut [0.0, 9.0, 8.0, 7.0], 0, options).unwrap();
    assert_eq!(chosen.token, 0);
    let logprobs = chosen.logprobs.unwrap();
    assert_eq!((logprobs.chosen, logprobs.top.len(), logprobs.top[0].token), (0.0, 1, 0));
    assert_eq!(
        Sampler::new(&biased, &[], &[]).choose(
            &mut [0.0, 9.0, 8.0, 7.0],
            0,
            RowOptions { forbidden: &[0, 3], ..options }
        ),
        Err(SampleError::NothingToChoose)
    );
}

#[test]
fn logprobs_are_of_the_adjusted_logits_before_the_temperature() {
    let params = SamplingParams { logit_bias: vec![(0, 1.0)], ..params(0.1) };
    let options = RowOptions { n_logprobs: Some(2), ..RowOptions::default() };
    let chosen = Sampler::new(&params, &[], &[]).choose(&mut [0.0, 0.0, 5.0], 0, options).unwrap();
    let log_total = (1f64.exp() + 1.0 + 5f64.exp()).ln();
    let logprobs = chosen.logprobs.unwrap();
    assert_eq!(chosen.token, 2);
    assert_eq!(logprobs.chosen, (5.0 - log_total) as f32);
    assert_eq!(logprobs.top.iter().map(|top| top.token).collect::<Vec<_>>(), [2, 0]);
    assert!((f64::from(logprobs.top[1].logprob) - (1.0 - log_total)).abs() < 1e-6);
}

#[test]
fn bad_logits_are_typed() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let found = Sampler::new(&params(1.0), &[], &[]).choose(&mut [0.0, bad, bad], 0, RowOptions::default());
        assert!(matches!(found, Err(SampleError::NotFinite { token: 1, .. })), "{found:?}");
    }
}

#[test]
fn extreme_parameters_stay_finite() {
    let params = SamplingParams {
        logit_bias: vec![(0, f32::MAX), (1, f32::MIN)],
        repetition_penalty: 1.0e-30,
        presence_penalty: f32::MIN,
        frequency_penalty: f32::MIN,
        ..params(1.0)
    };
    let mut logits = vec![f32::MAX, f32::MIN, 1.0];
    Sampler::new(&params, &[2], &[0, 1, 2]).choose(&mut logits, 3, RowOptions::default()).unwrap();
    assert!(logits.iter().all(|logit| logit.is_finite()), "{logits:?}");
}
