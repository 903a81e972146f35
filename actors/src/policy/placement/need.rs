//! What a model needs on one card, at the least and at the most.

use super::{Card, PlacementError, Wanted, sum};

#[derive(Clone, Copy)]
pub(super) struct Need<'a> {
    pub(super) model: &'a Wanted,
    pub(super) card: &'a Card,
}

impl Need<'_> {
    /// A process with a context exists on GPUs alone.
    pub(super) fn context_bytes(&self) -> u64 {
        if self.card.id.is_cpu() { 0 } else { self.model.demand.context_bytes }
    }

    /// Bytes of a replica with so many for KV.
    pub(super) fn with_kv(&self, kv_bytes: u64) -> u64 {
        let demand = &self.model.demand;
        sum([demand.weights_bytes, demand.scratch_bytes, self.context_bytes(), kv_bytes])
    }

    /// Bytes without which it cannot run here.
    pub(super) fn least_bytes(&self) -> u64 {
        self.with_kv(self.kv_least_bytes())
    }

    /// Bytes of which it could make use here.
    pub(super) fn most_bytes(&self) -> u64 {
        self.with_kv(self.kv_fixed_bytes().unwrap_or_else(|| self.kv_most_bytes()))
    }

    pub(super) fn kv_least_bytes(&self) -> u64 {
        self.kv_fixed_bytes().unwrap_or(self.model.demand.kv_min_bytes)
    }

    /// Bytes for KV with which it could do more than with the least.
    pub(super) fn kv_wish_bytes(&self) -> u64 {
        match self.kv_fixed_bytes() {
            Some(_) => 0,
            None => self.kv_most_bytes().saturating_sub(self.model.demand.kv_min_bytes),
        }
    }

    /// Bytes for KV that are not for the planner to choose: configured, or in use on this card.
    fn kv_fixed_bytes(&self) -> Option<u64> {
        let in_use = || self.model.current.iter().find(|(at, _)| *at == self.card.id).map(|(_, kv_bytes)| *kv_bytes);
        self.model.kv_budget_bytes.or_else(in_use)
    }

    /// The most KV that is of use: all sequences at the full context, or what the limit leaves.
    fn kv_most_bytes(&self) -> u64 {
        let demand = &self.model.demand;
        let under = |limit: u64| limit.saturating_sub(self.with_kv(0)).max(demand.kv_min_bytes);
        self.limit_bytes().map_or(u64::MAX, under).min(demand.kv_full_bytes)
    }

    /// Bytes of the card that it may have, if there is a limit.
    pub(super) fn limit_bytes(&self) -> Option<u64> {
        self.model.memory_limit.map(|limit| limit.of(self.card.total_bytes))
    }

    /// Refuses a card whose limit is below what the model needs.
    pub(super) fn check_limit(&self) -> Result<(), PlacementError> {
        let needed_bytes = self.least_bytes();
        match (self.model.memory_limit, self.limit_bytes()) {
            (Some(limit), Some(limit_bytes)) if needed_bytes > limit_bytes => Err(PlacementError::OverLimit {
                model: self.model.name.clone(),
                device: self.card.id.clone(),
                limit: limit.to_string(),
                needed_bytes,
                limit_bytes,
            }),
            _ => Ok(()),
        }
    }
}
