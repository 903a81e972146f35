//! Which model goes on which card, and with how much memory for KV.
//!
//! 1. Models are placed by priority, those that name their cards before those that do not, large before small.
//! 2. Cards where the model has no room are filtered out. Of the rest it takes the one that is left with the least
//!    (best fit): small models fill small cards and large cards stay free for large models. Cards with room for the
//!    whole KV cache come before those with room for less of it, and a card where the model already runs comes first.
//! 3. When every model has its place, what is left on a card is shared among the KV caches that asked for more.
//!
//! The result depends on the models, the cards and nothing else: neither on the order in which loads happen to run, nor
//! on what they find free then.

mod choose;
mod error;
mod need;
mod slot;
#[cfg(test)]
mod tests;

pub use error::PlacementError;

use crate::inventory::DeviceId;
use choose::choose_cards;
use playhouse_config::checked::MemoryLimit;
use playhouse_config::{Devices, PciBusId, Replicas};
use serde::{Deserialize, Serialize};
use slot::Slot;

/// A card with what is free for us on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Its identity.
    pub id: DeviceId,
    /// What it is called.
    pub name: String,
    /// Where it is plugged in.
    pub pci: Option<PciBusId>,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes that placements may use: what is free, and what our own workers hold.
    pub free_bytes: u64,
}

/// What one replica of a model needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Demand {
    /// Weights.
    pub weights_bytes: u64,
    /// Activations and workspaces of the largest step.
    pub scratch_bytes: u64,
    /// What a process with a context takes before anything is loaded; 0 on the CPU.
    pub context_bytes: u64,
    /// KV of one sequence of the full context: with less the model cannot run.
    pub kv_min_bytes: u64,
    /// KV of all sequences at the full context: more is of no use.
    pub kv_full_bytes: u64,
}

impl Demand {
    /// Bytes of a replica on a GPU, with the KV of its budget or as little as it can run with.
    fn least_bytes(&self, kv_budget_bytes: Option<u64>) -> u64 {
        let kv_bytes = kv_budget_bytes.unwrap_or(self.kv_min_bytes);
        sum([self.weights_bytes, self.scratch_bytes, self.context_bytes, kv_bytes])
    }
}

/// A model that wants a place.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// Where it may run.
    pub devices: Devices,
    /// How often.
    pub replicas: Replicas,
    /// Higher is placed first.
    pub priority: i32,
    /// Bytes for KV, if the configuration says.
    pub kv_budget_bytes: Option<u64>,
    /// Most memory of a device that a replica takes, if the configuration says.
    pub memory_limit: Option<MemoryLimit>,
    /// What a replica needs on a GPU.
    pub demand: Demand,
    /// Where it runs now, with so many bytes for KV: it stays there, with those, if all others find room, too.
    pub current: Vec<(DeviceId, u64)>,
}

/// The plan: every card, with what goes on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// In the order of the cards given, the CPU last if anything runs there.
    pub devices: Vec<DevicePlan>,
}

/// What goes on one card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicePlan {
    /// The card.
    pub device: DeviceId,
    /// What it is called.
    pub name: String,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes that others hold.
    pub foreign_bytes: u64,
    /// The models on it, in the order they were placed.
    pub placements: Vec<Placement>,
    /// Bytes that stay free.
    pub headroom_bytes: u64,
}

/// One replica on one card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The model's name.
    pub model: String,
    /// Which of its replicas, from 0.
    pub replica: u32,
    /// Bytes of weights.
    pub weights_bytes: u64,
    /// Bytes for KV.
    pub kv_bytes: u64,
    /// Bytes of scratch.
    pub scratch_bytes: u64,
    /// Bytes of the process's context.
    pub context_bytes: u64,
    /// KV below this is useless.
    pub kv_min_bytes: u64,
    /// Most bytes in all, if there is a limit: the worker holds itself to it.
    pub limit_bytes: Option<u64>,
}

impl Placement {
    /// Bytes in all.
    pub fn total_bytes(&self) -> u64 {
        sum([self.weights_bytes, self.scratch_bytes, self.context_bytes, self.kv_bytes])
    }
}

impl Plan {
    /// Every placement with its card.
    pub fn placements(&self) -> impl Iterator<Item = (&DeviceId, &Placement)> {
        self.devices
            .iter()
            .flat_map(|device| device.placements.iter().map(move |placement| (&device.device, placement)))
    }
}

/// Makes the plan. `cards` are the GPUs that may be used, in the order of their PCI bus ids; `cpu` is the host.
///
/// # Errors
/// [`PlacementError`] for the first model that has no place.
pub fn place(wanted: &[Wanted], cards: &[Card], cpu: &Card) -> Result<Plan, PlacementError> {
    let kept = place_once(wanted, cards, cpu);
    if kept.is_ok() || wanted.iter().all(|model| model.current.is_empty()) {
        return kept;
    }
    // Room is made: what runs may get less memory for KV than it has, and move.
    let mut movable = wanted.to_vec();
    movable.iter_mut().for_each(|model| model.current.clear());
    place_once(&movable, cards, cpu)
}

fn place_once(wanted: &[Wanted], cards: &[Card], cpu: &Card) -> Result<Plan, PlacementError> {
    let mut slots: Vec<Slot> = cards.iter().chain([cpu]).map(Slot::new).collect();
    let cpu_slot = slots.len() - 1;
    for index in placing_order(wanted) {
        let model = &wanted[index];
        for (replica, slot) in choose_cards(model, cards, &slots, cpu_slot)?.into_iter().enumerate() {
            let replica = u32::try_from(replica).unwrap_or(u32::MAX);
            slots[slot].take(model, replica);
        }
    }
    slots.iter_mut().for_each(Slot::share_what_is_left);
    let empty_cpu = slots[cpu_slot].placements.is_empty();
    let kept = if empty_cpu { cpu_slot } else { cpu_slot + 1 };
    Ok(Plan { devices: slots.into_iter().take(kept).map(Slot::into_plan).collect() })
}

/// Indices of the models in the order in which they choose.
fn placing_order(wanted: &[Wanted]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|index| {
        let model = &wanted[*index];
        let pinned = matches!(model.devices, Devices::These(_));
        let size = model.demand.least_bytes(model.kv_budget_bytes);
        (std::cmp::Reverse(model.priority), !pinned, std::cmp::Reverse(size), *index)
    });
    order
}

/// Weights, scratch, context and KV. What does not fit into a number does not fit on a card either.
fn sum(parts: [u64; 4]) -> u64 {
    parts.into_iter().fold(0, u64::saturating_add)
}
