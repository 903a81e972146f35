//! `cargo run --release --example steps -- FILE...`: what the host does between the steps of a GPU, through the whole engine.
//!
//! Decodes greedily, and with penalties, 1, 16, 64 and 256 sequences side by side, each from 128 tokens of prompt, and prints the
//! tokens per second of the steps in which all decode, the time of a step, and how long of it the host was outside the model: while it
//! settles tokens, plans and makes events. Where the engine is a step ahead, the device works meanwhile.

use playhouse::backend::{BackendError, Batch, MemoryUse, SampleRow, Sampled};
use playhouse::engine::{
    DeviceName, DeviceOptions, EngineOptions, LlmEngine, RunnerLimits, StepCapacity, StepModel, load_model,
};
use playhouse::gguf::GgufFile;
use playhouse_actors::engine::{Engine, EngineRequest, RequestId, SamplingParams, Task};
use std::cell::Cell;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

const PROMPT: usize = 128;
const DECODE: u32 = 256;
const SEQUENCES: [usize; 4] = [1, 16, 64, 256];

fn main() -> ExitCode {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        if let Err(error) = measure(Path::new(&path)) {
            println!("{path}: {error}");
            failed = true;
        }
    }
    ExitCode::from(u8::from(failed))
}

fn measure(path: &Path) -> Result<(), Box<dyn Error>> {
    let file = GgufFile::open(path)?;
    let gpu = DeviceName::find("gpu")?;
    let most = *SEQUENCES.iter().max().expect("there are some");
    let limits = RunnerLimits::new(PROMPT + DECODE as usize, most, gpu.default_kv());
    let model = load_model(&file, &gpu, DeviceOptions::default(), limits, &mut |_| {})?;
    let inside = Rc::new(Cell::new(Duration::ZERO));
    let timed = Timed { model, inside: Rc::clone(&inside) };
    let mut engine = LlmEngine::new(timed, EngineOptions { prefix_cache: false, ..EngineOptions::default() });
    for penalised in [false, true] {
        for n in SEQUENCES {
            let what = if penalised { "penalised" } else { "greedy" };
            // The first run records the graphs.
            decode(&mut engine, &inside, n, penalised)?;
            let (steps, wall, outside) = decode(&mut engine, &inside, n, penalised)?;
            let per_step = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(steps);
            println!(
                "{}: {n} {what}: {:.0} tokens/s, {:.1} us a step, {:.1} us of it outside the model",
                path.display(),
                n as f64 * f64::from(steps) / wall.as_secs_f64(),
                per_step(wall),
                per_step(outside)
            );
        }
    }
    Ok(())
}

/// Steps in which all sequences decode, the time they took, and how much of it was outside the model.
fn decode(
    engine: &mut LlmEngine<Timed>,
    inside: &Cell<Duration>,
    n: usize,
    penalised: bool,
) -> Result<(u32, Duration, Duration), Box<dyn Error>> {
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
    let mut events = Vec::new();
    let (mut steps, mut wall, mut outside) = (0, Duration::ZERO, Duration::ZERO);
    loop {
        let (start, before) = (Instant::now(), inside.get());
        let report = engine.step(&mut events)?;
        if report.n_decode_tokens as usize == n && report.n_prefill_tokens == 0 {
            steps += 1;
            wall += start.elapsed();
            outside += start.elapsed().saturating_sub(inside.get() - before);
        }
        if !report.busy {
            return Ok((steps, wall, outside));
        }
        events.clear();
    }
}

/// A model that notes how long its calls take.
struct Timed {
    model: Box<dyn StepModel + Send>,
    inside: Rc<Cell<Duration>>,
}

impl Timed {
    fn time<T>(&mut self, call: impl FnOnce(&mut dyn StepModel) -> T) -> T {
        let start = Instant::now();
        let result = call(&mut *self.model);
        self.inside.set(self.inside.get() + start.elapsed());
        result
    }
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
        self.time(|model| model.run(batch, logits))
    }

    fn hidden(&mut self, rows: &[u32], hidden: &mut Vec<f32>) -> Result<(), BackendError> {
        self.time(|model| model.hidden(rows, hidden))
    }

    fn run_and_choose(
        &mut self,
        batch: &Batch,
        rows: &[SampleRow<'_>],
        logits: &mut Vec<f32>,
    ) -> Result<Option<Vec<Sampled>>, BackendError> {
        self.time(|model| model.run_and_choose(batch, rows, logits))
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), BackendError> {
        self.time(|model| model.copy_blocks(pairs))
    }

    fn memory(&self) -> MemoryUse {
        self.model.memory()
    }
}
