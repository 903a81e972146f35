//! The same request gives the same tokens and bit-equal log probabilities, whatever else the engine does.
//!
//! Each test asks one question of every model at hand: a fake whose text depends on every KV slot it reads, and the tiny
//! checkpoints of every architecture.

mod engine_support;

use engine_support::delayed::Delayed;
use engine_support::{FakeModel, Told, drain, request};
use playhouse::backend::{BackendError, Batch, MemoryUse};
use playhouse::engine::{
    DeviceName, DeviceOptions, EngineOptions, LlmEngine, RunnerLimits, StepCapacity, StepModel, load_model,
};
use playhouse::gguf::GgufFile;
use playhouse::models::describe;
use playhouse_actors::engine::{Engine, EngineRequest, RequestId, SamplingParams, Task};
use std::path::{Path, PathBuf};

/// Bits of one request's output.
type Bits = Vec<(u32, u32, Vec<(u32, u32)>)>;

const MAX_TOKENS: u32 = 28;

/// A model that tests can load as often as they like.
struct Subject {
    name: String,
    n_vocab: u32,
    load: Box<dyn Fn(StepCapacity) -> Box<dyn StepModel>>,
}

fn subjects() -> Vec<Subject> {
    let fake = Subject {
        name: "fake".into(),
        n_vocab: 97,
        load: Box::new(|capacity| Box::new(FakeModel::new(capacity)) as Box<dyn StepModel>),
    };
    let late = Subject {
        name: "fake, a step behind".into(),
        n_vocab: 97,
        load: Box::new(|capacity| Box::new(Delayed::new(FakeModel::new(capacity))) as Box<dyn StepModel>),
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "gguf"));
    files.sort();
    let mut subjects: Vec<Subject> =
        [fake, late].into_iter().chain(files.iter().map(|file| checkpoint(file))).collect();
    match DeviceName::find("gpu") {
        Ok(device) => subjects.extend(files.iter().map(|file| on_device(file, device.clone()))),
        Err(reason) => println!("nothing runs on a GPU: {reason}"),
    }
    for architecture in ["qwen2", "phi3", "gpt-oss", "llama"] {
        assert!(subjects.iter().any(|subject| subject.name.starts_with(architecture)), "no {architecture} checkpoint");
    }
    subjects
}

/// A tiny checkpoint with random weights, on the CPU.
fn checkpoint(path: &Path) -> Subject {
    on_device(path, DeviceName::Cpu)
}

fn on_device(path: &Path, device: DeviceName) -> Subject {
    let file = GgufFile::open(path).unwrap();
    let n_vocab = u32::try_from(describe(&file).unwrap().n_vocab).unwrap();
    let on = if device == DeviceName::Cpu { "" } else { " on a GPU" };
    let name = format!("{}{on}", path.file_stem().unwrap().to_str().unwrap());
    let load = move |capacity: StepCapacity| {
        let limits = RunnerLimits {
            n_ctx: 256,
            max_batch_tokens: capacity.max_batch_tokens,
            max_logit_rows: capacity.max_logit_rows,
            n_kv_blocks: capacity.n_kv_blocks,
            kv_dtype: device.default_kv(),
        };
        let options = DeviceOptions { n_threads: Some(1), ..DeviceOptions::default() };
        load_model(&file, &device, options, limits, &mut |_| {}).unwrap() as Box<dyn StepModel>
    };
    Subject { name, n_vocab, load: Box::new(load) }
}

impl Subject {
    fn engine(&self, n_kv_blocks: usize, options: EngineOptions) -> LlmEngine<Box<dyn StepModel>> {
        let capacity = StepCapacity { n_kv_blocks, max_batch_tokens: 512, max_logit_rows: 48 };
        LlmEngine::new((self.load)(capacity), options)
    }

    /// Lengths at and around block edges, and one that fills several chunks.
    fn prompts(&self) -> Vec<Vec<u32>> {
        let prompt = |salt: u32, len: u32| (0..len).map(|i| (i * i + salt * 31 + i * salt) % self.n_vocab).collect();
        [(1, 1), (2, 31), (3, 32), (4, 65), (5, 110)].map(|(salt, len)| prompt(salt, len)).to_vec()
    }

    /// Prefill chunks to try. Single tokens are for the fake, which is a thousand times as fast.
    fn chunks(&self) -> &'static [usize] {
        if self.name.starts_with("fake") { &[1, 7, 16, 33, 512] } else { &[16, 33, 512] }
    }

    fn alone(&self, request: EngineRequest, options: EngineOptions) -> Bits {
        let mut engine = self.engine(64, options);
        engine.submit(request).unwrap();
        only(drain(&mut engine))
    }

    /// What each request of the table gives by itself.
    fn baseline(&self) -> Vec<(EngineRequest, Bits)> {
        let requests = (0u64..).zip(self.prompts()).map(|(id, prompt)| sampled(id, &prompt));
        requests.map(|request| (request.clone(), self.alone(request, EngineOptions::default()))).collect()
    }
}

fn only(told: std::collections::BTreeMap<RequestId, Told>) -> Bits {
    assert_eq!(told.len(), 1);
    told.into_values().next().unwrap().bits()
}

/// A request that uses every part of the sampler.
fn sampled(id: u64, prompt: &[u32]) -> EngineRequest {
    let sampling = SamplingParams {
        logit_bias: vec![(3, 1.5), (4, -1.0)],
        repetition_penalty: 1.1,
        presence_penalty: 0.1,
        frequency_penalty: 0.2,
        temperature: 0.9,
        top_k: 60,
        top_p: 0.97,
        min_p: 0.01,
        seed: 40 + id,
        choice: 1,
    };
    EngineRequest { sampling, logprobs: Some(3), ..request(id, prompt, MAX_TOKENS) }
}

fn strangers(subject: &Subject, n: u64) -> Vec<EngineRequest> {
    let one = |i: u64| {
        let len = 1 + (i * 37 % 90) as u32;
        let prompt: Vec<u32> = (0..len).map(|at| (at * 5 + i as u32 * 11) % subject.n_vocab).collect();
        EngineRequest { max_tokens: 5 + (i * 13 % 50) as u32, ..sampled(1000 + i, &prompt) }
    };
    (0..n).map(one).collect()
}

#[test]
fn ten_runs_are_identical() {
    for subject in subjects() {
        let baseline = subject.baseline();
        let mut engine = subject.engine(64, EngineOptions::default());
        for run in 1..10 {
            for (request, expected) in &baseline {
                // Odd runs in a new engine, even ones in one that has served all the others.
                let found = if run % 2 == 1 {
                    subject.alone(request.clone(), EngineOptions::default())
                } else {
                    engine.submit(request.clone()).unwrap();
                    only(drain(&mut engine))
                };
                assert_eq!(&found, expected, "{} run {run} {:?}", subject.name, request.id);
            }
        }
    }
}

#[test]
fn prefill_chunks_change_nothing() {
    for subject in subjects() {
        for (request, expected) in subject.baseline() {
            for &prefill_chunk in subject.chunks() {
                let options = EngineOptions { prefill_chunk, ..EngineOptions::default() };
                let found = subject.alone(request.clone(), options);
                assert_eq!(found, expected, "{} chunk {prefill_chunk} {:?}", subject.name, request.id);
            }
        }
    }
}

#[test]
fn the_prefix_cache_changes_nothing() {
    for subject in subjects() {
        for (request, expected) in subject.baseline() {
            let off = EngineOptions { prefix_cache: false, ..EngineOptions::default() };
            assert_eq!(subject.alone(request.clone(), off), expected, "{} off {:?}", subject.name, request.id);
            let mut engine = subject.engine(64, EngineOptions::default());
            for temperature in ["cold", "warm", "warmer"] {
                engine.submit(request.clone()).unwrap();
                let found = only(drain(&mut engine));
                assert_eq!(found, expected, "{} {temperature} {:?}", subject.name, request.id);
            }
            let n_full = (request.prompt.len() as u64 - 1) / 32 * 32;
            assert_eq!(engine.stats().prefix_hits, 2 * n_full, "the cache was in use");
        }
    }
}

/// A model that leaves the choice of tokens to the engine.
struct ChosenHere(Box<dyn StepModel>);

impl StepModel for ChosenHere {
    fn n_vocab(&self) -> usize {
        self.0.n_vocab()
    }

    fn n_ctx(&self) -> usize {
        self.0.n_ctx()
    }

    fn capacity(&self) -> StepCapacity {
        self.0.capacity()
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        self.0.run(batch, logits)
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        self.0.hidden(rows, hidden)
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.0.copy_blocks(pairs)
    }

    fn memory(&self) -> MemoryUse {
        self.0.memory()
    }
}

#[test]
fn choosing_on_the_device_or_here_changes_nothing() {
    for subject in subjects() {
        let capacity = StepCapacity { n_kv_blocks: 64, max_batch_tokens: 512, max_logit_rows: 48 };
        let mut here = LlmEngine::new(ChosenHere((subject.load)(capacity)), EngineOptions::default());
        for (request, expected) in subject.baseline() {
            here.submit(request.clone()).unwrap();
            assert_eq!(only(drain(&mut here)), expected, "{} chosen here {:?}", subject.name, request.id);
            let in_step = EngineOptions { step_ahead: false, ..EngineOptions::default() };
            let found = subject.alone(request.clone(), in_step);
            assert_eq!(found, expected, "{} one step at a time {:?}", subject.name, request.id);
        }
    }
}

#[test]
fn a_company_of_two_hundred_and_fifty_five_changes_nothing() {
    for subject in subjects() {
        let baseline = subject.baseline();
        // The most that a step holds are 256: each request of the table, its four neighbours there and 251 more.
        for (n_strangers, prefill_chunk) in [(1, 512), (7, 64), (32, 16), (32, 512), (60, 100), (130, 33), (251, 512)] {
            let capacity = StepCapacity { n_kv_blocks: 2048, max_batch_tokens: 512, max_logit_rows: 256 };
            let options = EngineOptions { prefill_chunk, ..EngineOptions::default() };
            let mut engine = LlmEngine::new((subject.load)(capacity), options);
            let mut requests = strangers(&subject, n_strangers);
            for (i, (request, _)) in baseline.iter().enumerate() {
                requests.insert((i * 47).min(requests.len()), request.clone());
            }
            requests.into_iter().for_each(|request| engine.submit(request).unwrap());
            let told = drain(&mut engine);
            assert_eq!(told.len(), n_strangers as usize + baseline.len());
            for (request, expected) in &baseline {
                let place = format!("{} {:?} among {n_strangers}", subject.name, request.id);
                assert_eq!(&told[&request.id].bits(), expected, "{place}");
            }
        }
    }
}

#[test]
fn preemption_changes_nothing() {
    for subject in subjects() {
        for prefix_cache in [false, true] {
            let baseline = subject.baseline();
            // Eight blocks are enough for any of them alone, and for few of them together.
            let mut engine = subject.engine(8, EngineOptions { prefix_cache, ..EngineOptions::default() });
            let requests =
                strangers(&subject, 12).into_iter().chain(baseline.iter().map(|(request, _)| request.clone()));
            requests.for_each(|request| engine.submit(request).unwrap());
            let told = drain(&mut engine);
            assert!(engine.stats().preemptions > 0, "{}: nothing was preempted", subject.name);
            for (request, expected) in &baseline {
                assert_eq!(&told[&request.id].bits(), expected, "{} {:?}", subject.name, request.id);
            }
        }
    }
}

#[test]
fn resuming_anywhere_changes_nothing() {
    for subject in subjects() {
        for (request, expected) in subject.baseline() {
            let mut engine = subject.engine(256, EngineOptions { prefill_chunk: 16, ..EngineOptions::default() });
            // The id of each says where it goes on: all at once, in one batch.
            for n_emitted in 0..expected.len() {
                let emitted = expected[..n_emitted].iter().map(|token| token.0).collect();
                let id = RequestId(n_emitted as u64);
                engine.submit(EngineRequest { id, emitted, ..request.clone() }).unwrap();
            }
            for (id, told) in drain(&mut engine) {
                let place = format!("{} {:?} resumed at {id:?}", subject.name, request.id);
                assert_eq!(told.first_index.map(u64::from), Some(id.0), "{place}");
                assert_eq!(told.bits(), expected[id.0 as usize..], "{place}");
            }
        }
    }
}

#[test]
fn other_seeds_choices_and_temperatures_change_the_text() {
    for subject in subjects() {
        for (request, expected) in subject.baseline() {
            let text = |bits: &Bits| bits.iter().map(|token| token.0).collect::<Vec<_>>();
            let with = |change: fn(&mut SamplingParams)| {
                let mut request = request.clone();
                change(&mut request.sampling);
                text(&subject.alone(request, EngineOptions::default()))
            };
            let expected = text(&expected);
            assert_ne!(with(|params| params.seed += 1), expected, "{} seed", subject.name);
            assert_ne!(with(|params| params.choice += 1), expected, "{} choice", subject.name);
            assert_ne!(with(|params| params.temperature = 0.5), expected, "{} temperature", subject.name);
            assert_ne!(with(|params| params.temperature = 0.0), expected, "{} greedy", subject.name);
        }
    }
}

/// Bits of the embedding of each prompt.
fn embeddings(subject: &Subject, options: EngineOptions, n_strangers: u64) -> Vec<Vec<u32>> {
    let mut engine = subject.engine(400, options);
    for stranger in strangers(subject, n_strangers) {
        engine.submit(stranger).unwrap();
    }
    for (id, prompt) in (0u64..).zip(subject.prompts()) {
        engine.submit(EngineRequest { task: Task::Embed, ..request(id, &prompt, 1) }).unwrap();
    }
    let told = drain(&mut engine);
    let bits = |told: &Told| {
        assert!(told.tokens.is_empty(), "an embedding emits no token");
        told.embedding.as_ref().expect("it was asked for").iter().map(|value| value.to_bits()).collect()
    };
    told.iter().filter(|(id, _)| id.0 < 1000).map(|(_, told)| bits(told)).collect()
}

#[test]
fn embeddings_do_not_depend_on_chunks_or_company() {
    for subject in subjects() {
        let expected = embeddings(&subject, EngineOptions::default(), 0);
        assert_eq!(expected.len(), subject.prompts().len());
        assert!(expected.iter().any(|bits| *bits != expected[0]), "{}: they differ from each other", subject.name);
        for &prefill_chunk in subject.chunks() {
            let options = EngineOptions { prefill_chunk, ..EngineOptions::default() };
            assert_eq!(embeddings(&subject, options, 6), expected, "{}: chunk {prefill_chunk}", subject.name);
        }
    }
}
