//! The spans of a request's life, for whoever collects traces. They travel with its ticket, so each opens and closes where
//! it happens.
//!
//! ```text
//! [queue] --a worker has it--> [prefill] --first token--> [decode] --its worker is lost--> [resume] --next token--> [decode]
//! ```

use crate::engine::RequestId;
use std::time::Duration;
use tracing::field::Empty;
use tracing::{Span, info_span};

/// See the module.
#[derive(Debug)]
pub(crate) struct Trace {
    request: Span,
    id: RequestId,
    phase: Phase,
    /// Closed when another takes its place.
    span: Span,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queue,
    Prefill,
    Decode,
    Resume,
}

impl Trace {
    /// A request that waits for a worker; its spans are part of `request`.
    pub(crate) fn begin(request: Span, id: RequestId) -> Self {
        let span = info_span!(parent: &request, "queue", request = id.0);
        Self { request, id, phase: Phase::Queue, span }
    }

    /// A worker has it: its prompt is computed, once it has a place in the batch.
    pub(crate) fn submitted(&mut self) {
        if self.phase == Phase::Queue {
            let span = info_span!(parent: &self.request, "prefill", request = self.id.0, waited_ms = Empty);
            self.go_to(Phase::Prefill, span);
        }
    }

    /// The worker's engine began with it after so long: of prefill, so much was waiting for a place in the batch.
    pub(crate) fn begun(&self, waited: Duration) {
        if self.phase == Phase::Prefill {
            self.span.record("waited_ms", waited.as_secs_f64() * 1000.0);
        }
    }

    /// A token came.
    pub(crate) fn token(&mut self) {
        if self.phase != Phase::Decode {
            let span = info_span!(parent: &self.request, "decode", request = self.id.0);
            self.go_to(Phase::Decode, span);
        }
    }

    /// Its worker is lost, or gave it back: it goes on elsewhere after so many tokens.
    pub(crate) fn returned(&mut self, emitted: usize) {
        if self.phase != Phase::Queue {
            let span = info_span!(parent: &self.request, "resume", request = self.id.0, emitted);
            self.go_to(Phase::Resume, span);
        }
    }

    fn go_to(&mut self, phase: Phase, span: Span) {
        (self.phase, self.span) = (phase, span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_has_its_phases_in_order() {
        let mut trace = Trace::begin(Span::none(), RequestId(1));
        trace.returned(0);
        assert_eq!(trace.phase, Phase::Queue, "no worker had it");
        trace.submitted();
        assert_eq!(trace.phase, Phase::Prefill);
        trace.token();
        trace.submitted();
        assert_eq!(trace.phase, Phase::Decode);
        trace.returned(1);
        trace.submitted();
        assert_eq!(trace.phase, Phase::Resume, "until the next token");
        trace.token();
        assert_eq!(trace.phase, Phase::Decode);
    }
}
