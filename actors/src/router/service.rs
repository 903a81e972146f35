//! One model as the router sees it: its replicas, its bounds, and the requests that wait for a replica.

use crate::engine::RequestError;
use crate::journal::Ticket;
use crate::messages::{Failure, Generate, Refusal, ReplicaId, ServiceStatus, Terminal};
use crate::model::ModelMsg;
use crate::policy::admission::{Admission, AdmissionLimits};
use crate::policy::routing::{Candidate, choose};
use playhouse_config::Model;
use ractor::ActorRef;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What a client is told while a model loads for the first time.
const LOADING_RETRY_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Service {
    pub(super) aliases: Vec<String>,
    required: bool,
    pub(super) admission: Admission,
    pub(super) replicas: BTreeMap<ReplicaId, Replica>,
    pub(super) waiting: VecDeque<Ticket>,
}

#[derive(Debug)]
pub(super) struct Replica {
    pub(super) actor: ActorRef<ModelMsg>,
    pub(super) state: ReplicaState,
    /// It was ready once: who waits for it waits for a restart, not for a first load.
    was_ready: bool,
    n_ctx: u32,
    /// What the requests that it has may need.
    pub(super) open_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplicaState {
    /// It takes requests.
    Ready,
    /// It takes none, and will.
    Down,
    /// Nobody knows when it will.
    Gone,
}

impl Service {
    pub(super) fn new(limits: AdmissionLimits) -> Self {
        Self {
            aliases: Vec::new(),
            required: false,
            admission: Admission::new(limits),
            replicas: BTreeMap::new(),
            waiting: VecDeque::new(),
        }
    }

    pub(super) fn configure(&mut self, model: &Model, limits: AdmissionLimits) {
        self.aliases.clone_from(&model.aliases);
        self.required = model.required;
        self.admission.set_limits(limits);
    }

    /// Whether somebody serves this model, or soon will again.
    pub(super) fn may_take(&self, model: &str) -> Result<(), Refusal> {
        let model = || model.to_owned();
        let takes = |replica: &Replica| match replica.state {
            ReplicaState::Ready => true,
            ReplicaState::Down => replica.was_ready,
            ReplicaState::Gone => false,
        };
        if self.replicas.values().any(takes) {
            return Ok(());
        }
        if self.is_lost() && !self.replicas.is_empty() {
            return Err(Refusal::Unavailable { model: model() });
        }
        Err(Refusal::Loading { model: model(), retry_after: LOADING_RETRY_AFTER })
    }

    /// Whether nobody is left that could serve it.
    pub(super) fn is_lost(&self) -> bool {
        self.replicas.values().all(|replica| replica.state == ReplicaState::Gone)
    }

    /// What an engine would refuse anyway is refused before it is accepted.
    pub(super) fn fits(&self, request: &Generate) -> Result<(), Refusal> {
        if request.prompt.is_empty() {
            let (param, found, expected) = ("prompt".into(), "empty".into(), "at least one token".into());
            return Err(Refusal::Invalid(RequestError::InvalidParam { param, found, expected }));
        }
        let limit = self.replicas.values().map(|replica| replica.n_ctx).max().unwrap_or(u32::MAX);
        let needed = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX).saturating_add(1);
        if needed > limit {
            return Err(Refusal::Invalid(RequestError::ContextExceeded { needed, limit }));
        }
        Ok(())
    }

    /// The ready replica with the least to do; `prefer` before all others.
    pub(super) fn choose(&self, prefer: Option<&ReplicaId>) -> Option<ReplicaId> {
        let is_ready = |id: &&ReplicaId| self.replicas.get(id).is_some_and(|it| it.state == ReplicaState::Ready);
        let candidates = self.replicas.iter().map(|(id, replica)| {
            (id, Candidate { ready: replica.state == ReplicaState::Ready, open_tokens: replica.open_tokens })
        });
        prefer.filter(is_ready).or_else(|| choose(candidates)).cloned()
    }

    /// A replica exists, with requests that may need so many tokens. Of one that is known, what it was is remembered.
    pub(super) fn up(&mut self, id: ReplicaId, actor: ActorRef<ModelMsg>, open_tokens: u64) {
        let was_ready = self.replicas.get(&id).is_some_and(|replica| replica.was_ready);
        let replica = Replica { actor, state: ReplicaState::Down, was_ready, n_ctx: u32::MAX, open_tokens };
        self.replicas.insert(id, replica);
    }

    /// Ends those that wait for a replica.
    pub(super) fn fail_waiting(&mut self, failure: &Failure) {
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().for_each(|ticket| ticket.conclude(Terminal::Failed(failure.clone())));
    }

    pub(super) fn status(&self, name: &str) -> ServiceStatus {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        ServiceStatus {
            model: name.to_owned(),
            ready: count(self.replicas.values().filter(|replica| replica.state == ReplicaState::Ready).count()),
            replicas: count(self.replicas.len()),
            open_requests: self.admission.open_requests(),
            open_tokens: self.admission.open_tokens(),
            waiting: count(self.waiting.len()),
            tokens_per_second: self.admission.tokens_per_second(),
            required: self.required,
        }
    }
}

impl Replica {
    pub(super) fn ready(&mut self, n_ctx: u32) {
        (self.state, self.was_ready, self.n_ctx) = (ReplicaState::Ready, true, n_ctx);
    }
}
