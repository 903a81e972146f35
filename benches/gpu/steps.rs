//! `cargo run --release --example steps -- FILE...`: what the host does between the steps of a GPU, through the whole engine.
//!
//! Decodes greedily, and with penalties, 1, 16, 64 and 256 sequences side by side, each from 128 tokens of prompt, with the engine in step with
//! the device and a step ahead of it. Prints the tokens per second while all decode, the time of a step, and what the host did in it:
//! outside the model (settle tokens, plan, make events), giving the device a step, and waiting for one. In step, the device has nothing to do
//! during the first two; a step ahead, it has a next step for as long as the host finds time to wait.

use playhouse::backend::{BackendError, Batch, MemoryUse, SampleRow, Sampled};
use playhouse::engine::{
    DeviceName, DeviceOptions, EngineOptions, LlmEngine, RunnerLimits, StepCapacity, StepModel, load_model,
};
use playhouse::gguf::GgufFile;
use playhouse_actors::engine::{Engine, EngineRequest, RequestId, SamplingParams, Task};
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const PROMPT: usize = 128;
const DECODE: u32 = 256;
const SEQUENCES: [usize; 4] = [1, 16, 64, 256];

fn main() -> ExitCode {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        for step_ahead in [false, true] {
            if let Err(error) = measure(Path::new(&path), step_ahead) {
                println!("{path}: {error}");
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}

fn measure(path: &Path, step_ahead: bool) -> Result<(), Box<dyn Error>> {
    let file = GgufFile::open(path)?;
    let gpu = DeviceName::find("gpu")?;
    let most = *SEQUENCES.iter().max().expect("there are some");
    let limits = RunnerLimits::new(PROMPT + DECODE as usize, most, gpu.default_kv());
    let model = load_model(&file, &gpu, DeviceOptions::default(), limits, &mut |_| {})?;
    let options = EngineOptions { prefix_cache: false, step_ahead, ..EngineOptions::default() };
    let mut engine = LlmEngine::new(Timed { model, given: Duration::ZERO, waited: Duration::ZERO }, options);
    for penalised in [false, true] {
        for n in SEQUENCES {
            // The first run records the graphs.
            decode(&mut engine, n, penalised)?;
            let run = decode(&mut engine, n, penalised)?;
            let per_step = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(run.n_steps);
            println!(
                "{}, {}, {n} {}: {:.0} tokens/s, {:.1} us a step: {:.1} outside the model, {:.1} giving, {:.1} waiting",
                path.display(),
                if step_ahead { "ahead" } else { "in step" },
                if penalised { "penalised" } else { "greedy" },
                n as f64 * f64::from(run.n_steps) / run.wall.as_secs_f64(),
                per_step(run.wall),
                per_step(run.wall.saturating_sub(run.given + run.waited)),
                per_step(run.given),
                per_step(run.waited)
            );
        }
    }
    Ok(())
}

/// What the steps took in which all sequences decoded.
#[derive(Default)]
struct Run {
    n_steps: u32,
    wall: Duration,
    given: Duration,
    waited: Duration,
}

fn decode(engine: &mut LlmEngine<Timed>, n: usize, penalised: bool) -> Result<Run, Box<dyn Error>> {
    let n_vocab = engine.model().n_vocab();
    for i in 0..n {
        let mut sampling = SamplingParams::greedy();
        if penalised {
            (sampling.repetition_penalty, sampling.frequency_penalty) = (1.1, 0.2);
        }
        engine.submit(EngineRequest {
            id: RequestId(i as u64),
            task: Task::Generate,
            prompt: (0..PROMPT).map(|at| ((at * 7919 + i * 104_729) % n_vocab) as u32).collect(),
            emitted: vec![],
            sampling,
            max_tokens: DECODE,
            min_tokens: 0,
            stop_ids: vec![],
            logprobs: None,
            constraint: None,
            priority: 0,
            deadline: None,
        })?;
    }
    let (mut run, mut events) = (Run::default(), Vec::new());
    loop {
        events.clear();
        let (start, given, waited) = (Instant::now(), engine.model().given, engine.model().waited);
        let report = engine.step(&mut events)?;
        if report.n_decode_tokens as usize == n && report.n_prefill_tokens == 0 {
            run.n_steps += 1;
            run.wall += start.elapsed();
            run.given += engine.model().given - given;
            run.waited += engine.model().waited - waited;
        }
        if !report.busy {
            return Ok(run);
        }
    }
}

/// A model that notes how long its calls take.
struct Timed {
    model: Box<dyn StepModel + Send>,
    /// Until they were enqueued.
    given: Duration,
    /// Until they were done.
    waited: Duration,
}

impl StepModel for Timed {
    fn n_vocab(&self) -> usize {
        self.model.n_vocab()
    }

    fn n_ctx(&self) -> usize {
        self.model.n_ctx()
    }

    fn capacity(&self) -> StepCapacity {
        self.model.capacity()
    }

    fn run(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), BackendError> {
        let start = Instant::now();
        let result = self.model.run(batch, logits);
        self.waited += start.elapsed();
        result
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        self.model.hidden(rows, hidden)
    }

    fn runs_ahead(&self) -> bool {
        self.model.runs_ahead()
    }

    fn enqueue(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) -> Result<bool, BackendError> {
        let start = Instant::now();
        let result = self.model.enqueue(batch, rows);
        self.given += start.elapsed();
        result
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, BackendError> {
        let start = Instant::now();
        let result = self.model.collect();
        self.waited += start.elapsed();
        result
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.model.copy_blocks(pairs)
    }

    fn memory(&self) -> MemoryUse {
        self.model.memory()
    }
}
