//! What a router takes on: a client's request becomes a ticket and a stream, or is refused.

use super::service::Service;
use super::{RouterState, Row};
use crate::engine::{EngineRequest, RequestId};
use crate::journal::{Entry, Ticket, tokens_max};
use crate::messages::{Generate, Refusal, ReplicaId};
use crate::stream::{StreamSender, TokenStream};
use ractor::RpcReplyPort;
use tokio::time::Instant;
use tracing::Span;

impl RouterState {
    pub(super) fn generate(
        &mut self,
        request: Generate,
        prefer: Option<ReplicaId>,
        span: Span,
        reply: RpcReplyPort<Result<TokenStream, Refusal>>,
    ) {
        match self.accept(request, span) {
            Ok((ticket, stream)) => {
                self.counters.accepted += 1;
                // A client that is gone drops the stream here, and that cancels the request.
                let _ = reply.send(Ok(stream));
                self.route(ticket, prefer);
            }
            Err(refusal) => {
                self.counters.refused += 1;
                let _ = reply.send(Err(refusal));
            }
        }
    }

    fn accept(&mut self, request: Generate, span: Span) -> Result<(Ticket, TokenStream), Refusal> {
        if self.draining.is_some() {
            return Err(Refusal::Draining);
        }
        let named = |(name, service): &(&String, &mut Service)| {
            **name == request.model || service.aliases.contains(&request.model)
        };
        let found = self.services.iter_mut().find(named);
        let (name, service) = found.ok_or_else(|| Refusal::UnknownModel { model: request.model.clone() })?;
        let model = name.clone();
        service.may_take(&model)?;
        service.fits(&request)?;
        let tokens = tokens_max(request.prompt.len(), request.max_tokens);
        service.admission.admit(tokens).map_err(|full| Refusal::Busy { model: model.clone(), full })?;

        let limits = &self.args.limits;
        let timeout = request.timeout.unwrap_or(limits.request_timeout).min(limits.request_timeout);
        let id = self.args.handle.next_id();
        let deadline = Instant::now() + timeout;
        let capacity = usize::try_from(limits.stream_events).unwrap_or(usize::MAX);
        let (sender, stream) = StreamSender::new(id, capacity, self.args.handle.clone());
        let entry = Entry::new(engine_request(id, request), model.clone(), deadline);
        self.open.insert(id, Row { model, tokens, counted: true, cancelled: false, replica: None });
        Ok((Ticket::new(entry, sender, span, self.args.handle.clone()), stream))
    }
}

fn engine_request(id: RequestId, request: Generate) -> EngineRequest {
    EngineRequest {
        id,
        task: request.task,
        prompt: request.prompt,
        emitted: Vec::new(),
        sampling: request.sampling,
        max_tokens: request.max_tokens,
        min_tokens: request.min_tokens,
        stop_ids: request.stop_ids,
        logprobs: request.logprobs,
        constraint: request.constraint,
        priority: request.priority,
        deadline: None,
    }
}
