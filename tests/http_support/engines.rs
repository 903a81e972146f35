//! Engines that are made for tests and benches: one that says what it is told to, at a pace that the test sets.

use playhouse_actors::engine::{
    Engine, EngineError, EngineEvent, EngineRequest, EngineStats, FinishReason, Logprob, RequestError, RequestId,
    StepReport, TokenLogprobs, Usage,
};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// How fast a [`Speaker`] goes.
#[derive(Clone)]
pub(crate) enum Pace {
    /// As fast as it can.
    Free,
    /// One step for each permit that the test gives.
    Permits(Arc<Gate>),
    /// One step in so long.
    Every(Duration),
}

/// Steps that an engine may take.
#[derive(Default)]
pub(crate) struct Gate {
    permits: Mutex<u64>,
    given: Condvar,
}

impl Gate {
    pub(crate) fn give(&self, n: u64) {
        *self.permits.lock().expect("not poisoned") += n;
        self.given.notify_all();
    }

    /// Waits for a permit, or gives up after a moment so that the worker can look at its commands.
    fn take(&self) -> bool {
        let permits = self.permits.lock().expect("not poisoned");
        let (mut permits, _) = self
            .given
            .wait_timeout_while(permits, Duration::from_millis(5), |permits| *permits == 0)
            .expect("not poisoned");
        let is_given = *permits > 0;
        *permits -= u64::from(is_given);
        is_given
    }
}

/// What a [`Speaker`] did, for the test to look at.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    pub(crate) steps: Arc<AtomicU64>,
    pub(crate) submitted: Arc<AtomicU64>,
    pub(crate) cancelled: Arc<AtomicU64>,
    pub(crate) running: Arc<AtomicU32>,
    pub(crate) tokens: Arc<AtomicU64>,
}

/// When each token of a request left its engine; requests are known by the first token of their prompt.
#[derive(Clone, Default)]
pub(crate) struct Emitted(Arc<Mutex<std::collections::HashMap<u32, Vec<std::time::Instant>>>>);

impl Emitted {
    pub(crate) fn of(&self, prompt: u32) -> Vec<std::time::Instant> {
        self.0.lock().expect("not poisoned").get(&prompt).cloned().unwrap_or_default()
    }
}

/// Says a fixed list of tokens to every request, one token a step, again from the start when it is through.
pub(crate) struct Speaker {
    script: Vec<u32>,
    /// Whether the end of the script is the end of the text.
    ends: bool,
    pace: Pace,
    counts: Counts,
    running: Vec<EngineRequest>,
    ended: Vec<RequestId>,
    stats: EngineStats,
    emitted: Option<Emitted>,
}

impl Speaker {
    pub(crate) fn new(script: Vec<u32>, ends: bool, pace: Pace, counts: Counts) -> Self {
        assert!(!script.is_empty());
        Self {
            script,
            ends,
            pace,
            counts,
            running: vec![],
            ended: vec![],
            stats: EngineStats::default(),
            emitted: None,
        }
    }

    /// Notes when each token leaves.
    pub(crate) fn telling(self, emitted: Emitted) -> Self {
        Self { emitted: Some(emitted), ..self }
    }

    fn may_step(&self) -> bool {
        match &self.pace {
            Pace::Free => true,
            Pace::Permits(gate) => gate.take(),
            Pace::Every(time) => {
                spin(*time);
                true
            }
        }
    }
}

/// Waits without the kernel's help: its timers are coarser than a step.
fn spin(time: Duration) {
    let end = std::time::Instant::now() + time;
    while let Some(left) = end.checked_duration_since(std::time::Instant::now()).filter(|left| !left.is_zero()) {
        if left > Duration::from_micros(100) {
            std::thread::park_timeout(left - Duration::from_micros(60));
        } else {
            std::hint::spin_loop();
        }
    }
}

impl Engine for Speaker {
    fn submit(&mut self, request: EngineRequest) -> Result<(), RequestError> {
        self.counts.submitted.fetch_add(1, Ordering::SeqCst);
        self.stats.prefill_tokens += request.prompt.len() as u64;
        self.running.push(request);
        Ok(())
    }

    fn cancel(&mut self, id: RequestId) {
        if self.running.iter().any(|request| request.id == id) {
            self.counts.cancelled.fetch_add(1, Ordering::SeqCst);
            self.ended.push(id);
        }
    }

    fn step(&mut self, events: &mut Vec<EngineEvent>) -> Result<StepReport, EngineError> {
        let usage = |request: &EngineRequest| Usage {
            prompt_tokens: request.prompt.len() as u32,
            cached_tokens: 0,
            completion_tokens: request.emitted.len() as u32,
        };
        for id in std::mem::take(&mut self.ended) {
            if let Some(at) = self.running.iter().position(|request| request.id == id) {
                let request = self.running.swap_remove(at);
                events.push(EngineEvent::Finished { id, reason: FinishReason::Cancelled, usage: usage(&request) });
            }
        }
        if self.running.is_empty() || !self.may_step() {
            self.counts.running.store(self.running.len() as u32, Ordering::SeqCst);
            return Ok(StepReport { busy: !self.running.is_empty(), ..StepReport::default() });
        }
        self.counts.steps.fetch_add(1, Ordering::SeqCst);
        self.stats.steps += 1;
        let (script, ends) = (&self.script, self.ends);
        let mut n_tokens = 0;
        let now = std::time::Instant::now();
        let mut emitted = self.emitted.as_ref().map(|emitted| emitted.0.lock().expect("not poisoned"));
        self.running.retain_mut(|request| {
            let index = request.emitted.len();
            let token = script[index % script.len()];
            let top =
                |n: &u32| TokenLogprobs { chosen: -0.5, top: vec![Logprob { token, logprob: -0.5 }; *n as usize] };
            let logprobs = request.logprobs.as_ref().map(top);
            events.push(EngineEvent::Token { id: request.id, index: index as u32, token, logprobs });
            if let Some(emitted) = &mut emitted {
                emitted.entry(request.prompt[0]).or_default().push(now);
            }
            request.emitted.push(token);
            n_tokens += 1;
            let reason = if (ends && request.emitted.len() == script.len()) || request.stop_ids.contains(&token) {
                FinishReason::Stop
            } else if request.emitted.len() as u32 >= request.max_tokens {
                FinishReason::Length
            } else {
                return true;
            };
            events.push(EngineEvent::Finished { id: request.id, reason, usage: usage(request) });
            false
        });
        self.stats.decode_tokens += n_tokens;
        self.counts.tokens.fetch_add(n_tokens, Ordering::SeqCst);
        self.counts.running.store(self.running.len() as u32, Ordering::SeqCst);
        Ok(StepReport { busy: !self.running.is_empty(), ..StepReport::default() })
    }

    fn stats(&self) -> EngineStats {
        EngineStats { running: self.running.len() as u32, ..self.stats }
    }

    fn teardown(self: Box<Self>) {}
}
