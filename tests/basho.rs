//! The embedded model writes haiku through the whole path: GGUF, tokenizer, chat template, engine, sampler, text.
//!
//! The bounds are the project's promise: over 20 topics with 10 seeds at temperature 0.8, at least 95 % scan 5-7-5 by the
//! lexicon, at least 90 % speak of the topic, at least 180 of 200 differ.

use playhouse::backend::KvDtype;
use playhouse::backend::cpu::CpuBackend;
use playhouse::basho;
use playhouse::engine::{EngineOptions, LlmEngine, Runner, RunnerLimits};
use playhouse::gguf::GgufFile;
use playhouse::text::{ChatTemplate, Detokenizer, Message, RenderOptions, TextStream, Tokenizer};
use playhouse_actors::engine::{Engine, EngineEvent, EngineRequest, FinishReason, RequestId, SamplingParams, Task};
use std::collections::{HashMap, HashSet};

/// Twenty of the topics, from each corner of the lexicon.
const TOPICS: [&str; 20] = [
    "moon",
    "stars",
    "lantern",
    "rain",
    "snow",
    "wind",
    "river",
    "sea",
    "pine",
    "cherry blossom",
    "crow",
    "heron",
    "cricket",
    "frog",
    "cat",
    "mountain",
    "temple",
    "tea",
    "silence",
    "autumn",
];
const SEEDS: u64 = 10;

/// The embedded model, loaded.
struct Basho {
    engine: LlmEngine<Runner<CpuBackend>>,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

/// One answer: its text and why it ended.
type Answer = (String, FinishReason);

impl Basho {
    fn load() -> Basho {
        let file = GgufFile::from_static(basho::LABEL, basho::GGUF).expect("the embedded file is sound");
        let tokenizer = Tokenizer::from_gguf(&file).expect("its vocabulary is one we read");
        let template = ChatTemplate::from_gguf(&file, &tokenizer).expect("its template compiles").expect("it has one");
        let limits = RunnerLimits::new(256, 32, KvDtype::F32);
        let runner = Runner::load(&file, CpuBackend::new(), limits, &mut |_| {}).expect("the model loads");
        Basho { engine: LlmEngine::new(runner, EngineOptions::default()), tokenizer, template }
    }

    fn prompt(&self, messages: &[Message]) -> Vec<u32> {
        let options = RenderOptions::default();
        let prompt = self.template.prompt(&self.tokenizer, messages, &options).expect("the template renders");
        self.tokenizer.encode_prompt(&prompt).expect("the prompt encodes")
    }

    /// Answers all conversations at once, each with its own sampling, in order.
    fn answer(&mut self, requests: Vec<(Vec<Message>, SamplingParams)>) -> Vec<Answer> {
        let n_requests = requests.len();
        let mut streams = HashMap::new();
        for (id, (messages, sampling)) in (0..).map(RequestId).zip(requests) {
            let prompt = self.prompt(&messages);
            let detokenizer = Detokenizer::after(&self.tokenizer, &prompt, true);
            streams.insert(id, (TextStream::new(detokenizer, vec![]), String::new(), None));
            let request = EngineRequest {
                id,
                task: Task::Generate,
                prompt,
                emitted: vec![],
                sampling,
                max_tokens: 64,
                min_tokens: 0,
                stop_ids: self.tokenizer.stop_ids().to_vec(),
                logprobs: None,
                constraint: None,
                priority: 0,
                deadline: None,
            };
            self.engine.submit(request).expect("the request is sound");
        }
        let mut events = Vec::new();
        while self.engine.step(&mut events).expect("the step runs").busy {}
        for event in events {
            match event {
                EngineEvent::Token { id, token, .. } => {
                    let (stream, text, _) = streams.get_mut(&id).expect("a request of ours");
                    text.push_str(&stream.push(token).emit);
                }
                EngineEvent::Finished { id, reason, .. } => {
                    let (stream, text, end) = streams.get_mut(&id).expect("a request of ours");
                    text.push_str(&stream.finish().emit);
                    *end = Some(reason);
                }
                EngineEvent::Embedded { .. } => panic!("nobody asked for an embedding"),
                EngineEvent::Failed { error, .. } => panic!("{error}"),
            }
        }
        let ids = (0..n_requests as u64).map(RequestId);
        let answers = ids.map(|id| streams.remove(&id).expect("each request has its stream"));
        answers.map(|(_, text, end)| (text, end.expect("each request ended"))).collect()
    }
}

fn user(text: &str) -> Vec<Message> {
    vec![Message::new("user", text)]
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.8, seed, ..SamplingParams::greedy() }
}

/// How many of the poems scan; those that do not are printed.
fn n_scanning(answers: &[Answer]) -> usize {
    let scans = |(text, end): &&Answer| {
        let good = basho::scan(text).is_haiku() && *end == FinishReason::Stop;
        if !good {
            println!("does not scan, {end:?}: {:?}\n{text}\n", basho::scan(text));
        }
        good
    };
    answers.iter().filter(scans).count()
}

#[test]
fn two_hundred_poems_scan_keep_to_the_topic_and_differ() {
    let topic = |name: &str| basho::topics().iter().find(|topic| topic.name() == name).expect("a topic of the lexicon");
    let asked: Vec<&str> = TOPICS.iter().flat_map(|topic| std::iter::repeat_n(*topic, SEEDS as usize)).collect();
    let seeds = (0..SEEDS).cycle();
    let requests = asked.iter().zip(seeds).map(|(name, seed)| (user(name), sampled(seed))).collect();
    let answers = Basho::load().answer(requests);

    let n_scan = n_scanning(&answers);
    let n_on_topic = asked.iter().zip(&answers).filter(|(name, (text, _))| topic(name).is_in(text)).count();
    let n_distinct = answers.iter().map(|(text, _)| text).collect::<HashSet<_>>().len();
    println!("{n_scan} scan, {n_on_topic} on topic, {n_distinct} differ, of {}", answers.len());
    assert_eq!(answers.len(), 200);
    assert!(n_scan >= 190, "{n_scan} of 200 scan");
    assert!(n_on_topic >= 180, "{n_on_topic} of 200 speak of the topic");
    assert!(n_distinct >= 180, "{n_distinct} of 200 differ");
}

#[test]
fn greedy_poems_are_those_of_the_independent_reader() {
    let golden = include_str!("golden/basho/greedy.tsv");
    let pairs: Vec<_> = golden.lines().map(|line| line.split_once('\t').expect("prompt, tab, poem")).collect();
    let requests = pairs.iter().map(|(prompt, _)| (user(prompt), SamplingParams::greedy())).collect();
    for ((prompt, poem), (text, _)) in pairs.iter().zip(Basho::load().answer(requests)) {
        assert_eq!(text, poem.replace('|', "\n"), "{prompt}");
    }
}

#[test]
fn strangers_and_sentences_get_poems_too() {
    let prompts = [
        "hello",
        "What is the capital of France?",
        "write a poem about the ocean",
        "Tell me about quantum physics.",
        "AUTUMN MOON",
        "zxqwv",
        "月",
        "a haiku about my grandmother's kitchen",
        "rust",
        "a",
        "<|user|>",
        "🦀",
        "lonely winter harbor",
        "frog at night",
        "give me something cheerful",
        "x = y + 1",
        "Dear Sir or Madam,",
        "please write a very short poem about a cat that sleeps in the sun all day long",
        "42",
        "?",
    ];
    let requests = prompts.iter().map(|prompt| (user(prompt), sampled(7))).collect();
    let answers = Basho::load().answer(requests);
    let n_scan = n_scanning(&answers);
    assert!(n_scan >= 18, "{n_scan} of {} scan", answers.len());
}

#[test]
fn a_conversation_goes_on() {
    let mut basho = Basho::load();
    let mut messages = vec![Message::new("system", "You write haiku.")];
    let mut poems = HashSet::new();
    for prompt in ["old pond", "another one", "winter rain", "a temple in autumn", "Again."] {
        messages.push(Message::new("user", prompt));
        let answer = basho.answer(vec![(messages.clone(), sampled(3))]).remove(0);
        assert_eq!(n_scanning(std::slice::from_ref(&answer)), 1, "{prompt}");
        messages.push(Message::new("assistant", answer.0.as_str()));
        poems.insert(answer.0);
    }
    assert_eq!(poems.len(), 5, "{poems:?}");
}

#[test]
fn the_file_is_as_small_as_promised() {
    let file = GgufFile::from_static(basho::LABEL, basho::GGUF).expect("the embedded file is sound");
    let n_parameters: u64 = file.tensors().map(|tensor| tensor.dims.iter().product::<u64>()).sum();
    assert!((2_000_000..=5_000_000).contains(&n_parameters), "{n_parameters} parameters");
    assert!(basho::GGUF.len() <= 6 << 20, "{} bytes", basho::GGUF.len());
    let metadata = file.metadata();
    let number = |key: &str| metadata.u32(key).expect("a key of the llama architecture");
    assert!(number("llama.attention.head_count") > number("llama.attention.head_count_kv"));
    assert_eq!(metadata.str("tokenizer.ggml.pre").expect("a pre-tokenizer"), "gpt-2");
}
