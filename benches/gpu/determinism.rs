//! The same request gives the same tokens and bit-equal log probabilities: ten runs of five prompts.
//!
//! Alone in a fresh worker, again in the same one, all five at once, among 1, 7, 60 and 251 strangers (all that a step holds), with
//! prompts cut in other chunks, and in workers started after one was killed.

use crate::worker::{Bits, Model, Worker, request};
use crate::{Trouble, Verdicts, name_of};
use playhouse_actors::engine::{EngineRequest, RequestId, SamplingParams};
use playhouse_actors::messages::WorkerSpec;
use std::collections::BTreeMap;
use std::path::Path;

/// Lengths at and around the edges of blocks and tiles, and one of several chunks.
const PROMPTS: [u32; 5] = [1, 31, 100, 257, 700];
const N_TOKENS: u32 = 32;
const CONTEXT: u32 = 1024;
/// Ids of strangers begin here.
const STRANGER: u64 = 1000;

type Found = BTreeMap<RequestId, Bits>;

pub(crate) fn check(path: &Path, verdicts: &mut Verdicts) -> Result<(), Trouble> {
    let model = Model::open(path)?;
    let name = name_of(path);
    let n_vocab = u32::try_from(model.spec.n_vocab)?;
    // KV for a fifth of them at full length.
    let spec = model.worker(CONTEXT, 256, 48)?;
    let chunks = |max_batch_tokens| WorkerSpec { max_batch_tokens, ..spec.clone() };
    let mut runs: Vec<(&str, Found)> = Vec::new();

    let mut first = ready(spec.clone())?;
    runs.push(("alone", alone(&mut first, n_vocab)?));
    runs.push(("alone again", alone(&mut first, n_vocab)?));
    runs.push(("all five", among(&mut first, n_vocab, 0)?));
    runs.push(("among 1", among(&mut first, n_vocab, 1)?));
    runs.push(("among 7", among(&mut first, n_vocab, 7)?));
    runs.push(("among 60", among(&mut first, n_vocab, 60)?));
    runs.push(("among 251", among(&mut first, n_vocab, 251)?));
    first.kill()?;
    let mut second = ready(spec.clone())?;
    runs.push(("after a kill, among 30", among(&mut second, n_vocab, 30)?));
    second.kill()?;
    let mut third = ready(chunks(256))?;
    runs.push(("steps of 256, among 130", among(&mut third, n_vocab, 130)?));
    third.kill()?;
    let mut fourth = ready(WorkerSpec { max_sequences: 16, ..chunks(97) })?;
    runs.push(("steps of 97, alone", alone(&mut fourth, n_vocab)?));
    fourth.kill()?;

    let expected = runs[0].1.clone();
    let differs: Vec<String> = runs.iter().flat_map(|(how, found)| differences(how, &expected, found)).collect();
    let n_tokens: usize = expected.values().map(Vec::len).sum();
    let is_text = expected.values().all(|bits| bits.len() == N_TOKENS as usize);
    let summary = if differs.is_empty() { "all identical to the bit".into() } else { differs.join("; ") };
    verdicts.line(
        differs.is_empty() && is_text,
        &format!(
            "determinism {name}: {} runs x {} prompts, {n_tokens} tokens each: {summary}",
            runs.len(),
            PROMPTS.len()
        ),
    );
    Ok(())
}

fn ready(spec: WorkerSpec) -> Result<Worker, Trouble> {
    let mut worker = Worker::start(spec)?;
    worker.await_ready()?;
    Ok(worker)
}

fn prompt(salt: u32, len: u32, n_vocab: u32) -> Vec<u32> {
    (0..len).map(|i| (i.wrapping_mul(i).wrapping_mul(7919) + salt * 104_729 + i * salt) % n_vocab).collect()
}

/// The requests that are compared: two greedy, three that use every part of the sampler.
fn subjects(n_vocab: u32) -> Vec<EngineRequest> {
    let one = |(i, len): (u32, u32)| {
        let sampling = if i % 2 == 0 { sampled(u64::from(i)) } else { SamplingParams::greedy() };
        let request = request(u64::from(i), prompt(i + 1, len, n_vocab), N_TOKENS, sampling);
        EngineRequest { logprobs: Some(4), ..request }
    };
    (0..).zip(PROMPTS).map(one).collect()
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams {
        logit_bias: vec![(3, 1.5), (4, -1.0)],
        repetition_penalty: 1.1,
        presence_penalty: 0.1,
        frequency_penalty: 0.2,
        temperature: 0.9,
        top_k: 60,
        top_p: 0.97,
        min_p: 0.01,
        seed: 40 + seed,
        choice: 1,
    }
}

fn alone(worker: &mut Worker, n_vocab: u32) -> Result<Found, Trouble> {
    let mut found = Found::new();
    for request in subjects(n_vocab) {
        found.extend(worker.run(vec![request])?);
    }
    Ok(found)
}

/// All subjects at once, spread among strangers.
fn among(worker: &mut Worker, n_vocab: u32, n_strangers: u32) -> Result<Found, Trouble> {
    let stranger = |i: u32| {
        let prompt = prompt(100 + i, 1 + i * 37 % 300, n_vocab);
        request(STRANGER + u64::from(i), prompt, 5 + i * 13 % 50, sampled(u64::from(i)))
    };
    let mut requests: Vec<EngineRequest> = (0..n_strangers).map(stranger).collect();
    for (i, subject) in subjects(n_vocab).into_iter().enumerate() {
        requests.insert((1 + i * 47).min(requests.len()), subject);
    }
    let mut found = worker.run(requests)?;
    found.retain(|id, _| id.0 < STRANGER);
    Ok(found)
}

fn differences(how: &str, expected: &Found, found: &Found) -> Vec<String> {
    let differing = expected.iter().filter_map(|(id, bits)| {
        let other = &found[id];
        let at = (0..bits.len().max(other.len())).find(|at| bits.get(*at) != other.get(*at))?;
        Some(format!("{how}: prompt {} differs at token {at}", id.0))
    });
    differing.collect()
}
