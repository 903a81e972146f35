//! Measures one request from its acceptance to the end of its last choice.

use super::{EndLabels, ModelFamilies, ModelLabels};
use crate::client::{Event, Outcome};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use std::time::Instant;

/// See the module. One that is dropped before its choices ended counts them as aborted.
pub(in crate::http) struct RequestMeter {
    families: ModelFamilies,
    labels: ModelLabels,
    ttft: Histogram,
    gap: Histogram,
    generated: Counter,
    open: Gauge,
    start: Instant,
    /// When an engine began with it, as far as is known, and when its first token came.
    begun: Option<Instant>,
    first: Option<Instant>,
    /// By choice: when its last token came, and whether it has ended.
    choices: Vec<(Option<Instant>, bool)>,
    longest: u32,
    pending_tokens: u64,
}

/// Tokens are added to the shared counter in bunches.
const BUNCH: u64 = 32;

impl RequestMeter {
    pub(super) fn new(families: &ModelFamilies, model: &str, n: u32, max_tokens: Option<u32>) -> Self {
        let labels = ModelLabels::of(model);
        families.n.get_or_create(&labels).observe(f64::from(n));
        if let Some(max_tokens) = max_tokens {
            families.max_tokens.get_or_create(&labels).observe(f64::from(max_tokens));
        }
        let open = families.open.get_or_create_owned(&labels);
        open.inc();
        Self {
            ttft: families.ttft.get_or_create_owned(&labels),
            gap: families.gap.get_or_create_owned(&labels),
            generated: families.generation_tokens.get_or_create_owned(&labels),
            families: families.clone(),
            labels,
            open,
            start: Instant::now(),
            begun: None,
            first: None,
            choices: vec![(None, false); n as usize],
            longest: 0,
            pending_tokens: 0,
        }
    }

    /// The request was accepted with so many prompt tokens, all its prompts together.
    pub(in crate::http) fn accepted(&mut self, prompt_tokens: u64) {
        self.families.prompt_tokens.get_or_create(&self.labels).inc_by(prompt_tokens);
        self.families.prompt_tokens_each.get_or_create(&self.labels).observe(prompt_tokens as f64);
    }

    /// It was refused: nothing of it is counted as ended.
    pub(in crate::http) fn refused(mut self) {
        self.choices.clear();
    }

    /// Something came of it.
    pub(in crate::http) fn event(&mut self, event: &Event) {
        match event {
            Event::Token(token) => self.token(token.choice as usize, token.begun),
            Event::End(end) => {
                let reason = match end.outcome {
                    Outcome::Stop { .. } => "stop",
                    Outcome::Length => "length",
                    Outcome::Cancelled => "abort",
                    Outcome::Failed(_) => "error",
                };
                self.end(end.choice as usize, end.completion_tokens, reason);
            }
        }
    }

    fn token(&mut self, choice: usize, begun: Option<Instant>) {
        let now = Instant::now();
        if self.first.is_none() {
            self.first = Some(now);
            self.ttft.observe((now - self.start).as_secs_f64());
            self.begun(begun, now);
        }
        if let Some((last, _)) = self.choices.get_mut(choice)
            && let Some(last) = last.replace(now)
        {
            self.gap.observe((now - last).as_secs_f64());
        }
        self.pending_tokens += 1;
        if self.pending_tokens >= BUNCH {
            self.generated.inc_by(std::mem::take(&mut self.pending_tokens));
        }
    }

    /// Of several texts the one whose token came first counts.
    fn begun(&mut self, begun: Option<Instant>, first: Instant) {
        // Clocks of two processes met in this instant: it may lie a moment outside of what is possible.
        let Some(begun) = begun.map(|begun| begun.clamp(self.start, first)) else { return };
        self.begun = Some(begun);
        self.families.queue.get_or_create(&self.labels).observe((begun - self.start).as_secs_f64());
        self.families.prefill.get_or_create(&self.labels).observe((first - begun).as_secs_f64());
    }

    fn end(&mut self, choice: usize, n_tokens: u32, reason: &'static str) {
        self.generated.inc_by(std::mem::take(&mut self.pending_tokens));
        if let Some((_, ended)) = self.choices.get_mut(choice) {
            *ended = true;
        }
        self.count_end(reason);
        self.longest = self.longest.max(n_tokens);
        self.families.generation_tokens_each.get_or_create(&self.labels).observe(f64::from(n_tokens));
        if self.choices.iter().all(|(_, ended)| *ended) {
            let now = Instant::now();
            self.families.e2e.get_or_create(&self.labels).observe((now - self.start).as_secs_f64());
            self.families.generation_tokens_longest.get_or_create(&self.labels).observe(f64::from(self.longest));
            if let Some(begun) = self.begun {
                self.families.inference.get_or_create(&self.labels).observe((now - begun).as_secs_f64());
            }
            if let Some(first) = self.first {
                self.families.decode.get_or_create(&self.labels).observe((now - first).as_secs_f64());
            }
        }
    }

    fn count_end(&self, finished_reason: &'static str) {
        let ModelLabels { model, model_name, engine } = self.labels.clone();
        self.families.ended.get_or_create(&EndLabels { model, model_name, engine, finished_reason }).inc();
    }
}

impl Drop for RequestMeter {
    fn drop(&mut self) {
        self.open.dec();
        self.generated.inc_by(self.pending_tokens);
        for _ in self.choices.iter().filter(|(_, ended)| !ended) {
            self.count_end("abort");
        }
    }
}
