//! Constrained requests through the real engine and the embedded model: the text keeps its form, in company and after a
//! resume, and nothing else changes for others.

use playhouse::backend::KvDtype;
use playhouse::backend::cpu::CpuBackend;
use playhouse::basho;
use playhouse::engine::{EngineOptions, LlmEngine, Runner, RunnerLimits};
use playhouse::gguf::GgufFile;
use playhouse::grammar::Grammars;
use playhouse::text::{EncodeOptions, Tokenizer};
use playhouse_actors::engine::{
    Constraint, Engine, EngineEvent, EngineRequest, FinishReason, RequestError, RequestId, SamplingParams, Task,
};
use std::collections::BTreeMap;

const SCHEMA: &str = r#"{"type":"object","properties":{"season":{"enum":["spring","summer","autumn","winter"]},
    "lines":{"type":"array","items":{"type":"string","maxLength":12},"minItems":1,"maxItems":3}},
    "required":["season","lines"],"additionalProperties":false}"#;

struct House {
    engine: LlmEngine<Runner<CpuBackend>>,
    tokenizer: Tokenizer,
}

fn house() -> House {
    let file = GgufFile::from_static(basho::LABEL, basho::GGUF).expect("the embedded model is sound");
    let tokenizer = Tokenizer::from_gguf(&file).expect("its vocabulary is sound");
    let limits = RunnerLimits::new(256, 8, KvDtype::F32);
    let runner = Runner::load(&file, CpuBackend::new(), limits, &mut |_| {}).expect("it loads");
    let grammars = Grammars::new(&tokenizer).expect("it has an end-of-text token");
    let engine = LlmEngine::new(runner, EngineOptions::default()).with_constrainer(Box::new(grammars));
    House { engine, tokenizer }
}

impl House {
    fn request(&self, id: u64, constraint: Option<Constraint>) -> EngineRequest {
        let sampling = SamplingParams { temperature: 0.9, seed: id % 100, ..SamplingParams::greedy() };
        EngineRequest {
            id: RequestId(id),
            task: Task::Generate,
            prompt: self.tokenizer.encode("winter river\n", EncodeOptions::PROMPT).expect("it is text"),
            emitted: Vec::new(),
            sampling,
            max_tokens: 200,
            min_tokens: 0,
            stop_ids: self.tokenizer.stop_ids().to_vec(),
            logprobs: None,
            constraint,
            priority: 0,
            deadline: None,
        }
    }

    /// Runs what was submitted to its end.
    fn drain(&mut self) -> BTreeMap<u64, (Vec<u32>, FinishReason)> {
        let (mut events, mut tokens, mut ended) = (Vec::new(), BTreeMap::<u64, Vec<u32>>::new(), BTreeMap::new());
        while self.engine.step(&mut events).expect("the engine is well").busy {}
        for event in events {
            match event {
                EngineEvent::Token { id, token, .. } => tokens.entry(id.0).or_default().push(token),
                EngineEvent::Finished { id, reason, .. } => drop(ended.insert(id.0, reason)),
                EngineEvent::Embedded { .. } | EngineEvent::Failed { .. } => panic!("{event:?}"),
            }
        }
        ended.into_iter().map(|(id, reason)| (id, (tokens.remove(&id).unwrap_or_default(), reason))).collect()
    }
}

fn schema() -> Option<Constraint> {
    Some(Constraint::JsonSchema(SCHEMA.into()))
}

#[test]
fn a_text_keeps_its_schema() {
    let mut house = house();
    for seed in 0..6 {
        let request = house.request(seed, schema());
        house.engine.submit(request).expect("accepted");
    }
    for (seed, (tokens, reason)) in house.drain() {
        assert_eq!(reason, FinishReason::Stop, "request {seed}");
        let text = house.tokenizer.decode(&tokens, true);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["spring", "summer", "autumn", "winter"].contains(&value["season"].as_str().expect("text")), "{text}");
        assert!((1..=3).contains(&value["lines"].as_array().expect("a list").len()), "{text}");
    }
}

#[test]
fn company_and_resuming_change_nothing() {
    let mut alone = house();
    let (free, held) = (alone.request(1, None), alone.request(2, schema()));
    alone.engine.submit(free.clone()).expect("accepted");
    let free_alone = alone.drain().remove(&1).expect("it ended");
    alone.engine.submit(held.clone()).expect("accepted");
    let held_alone = alone.drain().remove(&2).expect("it ended");

    let mut together = house();
    together.engine.submit(free).expect("accepted");
    together.engine.submit(held.clone()).expect("accepted");
    let found = together.drain();
    assert_eq!((&found[&1], &found[&2]), (&free_alone, &held_alone));

    for cut in [1, 5, held_alone.0.len() - 1] {
        let emitted = held_alone.0[..cut].to_vec();
        together.engine.submit(EngineRequest { emitted, ..held.clone() }).expect("accepted");
        let (rest, reason) = together.drain().remove(&2).expect("it ended");
        assert_eq!((rest.as_slice(), reason), (&held_alone.0[cut..], held_alone.1), "cut at {cut}");
    }
}

#[test]
fn what_cannot_be_held_to_is_refused_and_leaves_nothing() {
    let mut house = house();
    let bad = house.request(1, Some(Constraint::Regex("(".into())));
    assert!(matches!(house.engine.submit(bad), Err(RequestError::InvalidParam { param, .. }) if param == "constraint"));
    let again = house.request(1, None);
    house.engine.submit(again).expect("the id is free");
    assert_eq!(house.drain().len(), 1);
}
