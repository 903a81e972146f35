//! One card while the plan is made: who is on it, and what is left.

use super::need::Need;
use super::{Card, DevicePlan, Placement, Wanted};

/// One card while the plan is made.
pub(super) struct Slot<'a> {
    pub(super) card: &'a Card,
    /// Bytes that nobody has yet.
    pub(super) left: u64,
    /// How many more bytes of KV each placement could use.
    wishes: Vec<u64>,
    pub(super) placements: Vec<Placement>,
}

impl<'a> Slot<'a> {
    pub(super) fn new(card: &'a Card) -> Self {
        Self { card, left: card.free_bytes, wishes: Vec::new(), placements: Vec::new() }
    }

    /// What a model needs here.
    pub(super) fn need(&self, model: &'a Wanted) -> Need<'a> {
        Need { model, card: self.card }
    }

    /// Puts a replica here, with the least KV; [`Slot::share_what_is_left`] gives more.
    pub(super) fn take(&mut self, model: &'a Wanted, replica: u32) {
        let need = self.need(model);
        let kv_bytes = need.kv_least_bytes();
        self.placements.push(Placement {
            model: model.name.clone(),
            replica,
            weights_bytes: model.demand.weights_bytes,
            kv_bytes,
            scratch_bytes: model.demand.scratch_bytes,
            context_bytes: need.context_bytes(),
            kv_min_bytes: model.demand.kv_min_bytes,
            limit_bytes: need.limit_bytes(),
        });
        self.wishes.push(need.kv_wish_bytes());
        self.left = self.left.saturating_sub(need.with_kv(kv_bytes));
    }

    /// Gives every wish the same share of what is left; who wishes for less leaves the rest to the others.
    pub(super) fn share_what_is_left(&mut self) {
        let mut order: Vec<usize> = (0..self.wishes.len()).filter(|index| self.wishes[*index] > 0).collect();
        order.sort_by_key(|index| self.wishes[*index]);
        for (done, index) in order.iter().enumerate() {
            let remaining = u64::try_from(order.len() - done).unwrap_or(u64::MAX);
            let given = self.wishes[*index].min(self.left / remaining);
            self.placements[*index].kv_bytes += given;
            self.left -= given;
        }
    }

    pub(super) fn into_plan(self) -> DevicePlan {
        DevicePlan {
            device: self.card.id.clone(),
            name: self.card.name.clone(),
            total_bytes: self.card.total_bytes,
            foreign_bytes: self.card.total_bytes.saturating_sub(self.card.free_bytes),
            placements: self.placements,
            headroom_bytes: self.left,
        }
    }
}
