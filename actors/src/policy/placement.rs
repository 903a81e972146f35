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

use crate::inventory::DeviceId;
use playhouse_config::checked::MemoryLimit;
use playhouse_config::units::Bytes;
use playhouse_config::{DeviceSelector, Devices, PciBusId, Replicas, SelectError};
use serde::{Deserialize, Serialize};
use std::fmt;

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
        let parts = [self.weights_bytes, self.kv_bytes, self.scratch_bytes, self.context_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
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

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum PlacementError {
    /// There is no room.
    #[error("{}", does_not_fit(.model, .device, .device_name, *.needed_bytes, *.free_bytes, *.missing_bytes, *.cards))]
    DoesNotFit {
        /// The model.
        model: String,
        /// The card, of several the one where the least is missing.
        device: DeviceId,
        /// What that card is called.
        device_name: String,
        /// Bytes the model needs at the least.
        needed_bytes: u64,
        /// Bytes left for it on the card.
        free_bytes: u64,
        /// Bytes missing.
        missing_bytes: u64,
        /// Cards that were looked at.
        cards: usize,
    },
    /// A limit leaves too little.
    #[error("{}", over_limit(.model, .device, .limit, *.needed_bytes, *.limit_bytes))]
    OverLimit {
        /// The model.
        model: String,
        /// The card.
        device: DeviceId,
        /// What the configuration says.
        limit: String,
        /// Bytes the model needs at the least.
        needed_bytes: u64,
        /// Bytes that it may have.
        limit_bytes: u64,
    },
    /// A GPU is wanted and there is none.
    #[error("model `{model}` is to run on a GPU and there is none; `devices = \"cpu\"` runs it on the CPU")]
    NoGpu {
        /// The model.
        model: String,
    },
    /// A card that is named is not there, or is not the only one meant.
    #[error("model `{model}` is to run on `{selector}`: {why}")]
    NoSuchDevice {
        /// The model.
        model: String,
        /// What the configuration says.
        selector: String,
        /// What is wrong with it.
        why: String,
    },
    /// More replicas than cards.
    #[error("model `{model}` is to have {replicas} replicas, a card each, and {cards} cards are allowed")]
    TooFewCards {
        /// The model.
        model: String,
        /// Replicas wanted.
        replicas: u32,
        /// Cards allowed.
        cards: usize,
    },
}

fn does_not_fit(
    model: &str,
    device: &DeviceId,
    name: &str,
    needed: u64,
    free: u64,
    missing: u64,
    cards: usize,
) -> impl fmt::Display {
    let best = if cards > 1 { format!(", the best of {cards} cards") } else { String::new() };
    format!(
        "model `{model}` does not fit on {device} ({name}{best}): it needs {}, {} are free, {} ({missing} bytes) are missing",
        Bytes(needed),
        Bytes(free),
        Bytes(missing)
    )
}

fn over_limit(model: &str, device: &DeviceId, limit: &str, needed: u64, allowed: u64) -> impl fmt::Display {
    let missing = needed.saturating_sub(allowed);
    format!(
        "model `{model}` needs {} on {device}, its `memory_limit` ({limit}) allows {}, {} ({missing} bytes) are missing: raise the \
         limit, or set a smaller `context`, `max_batch_tokens` or `kv_budget`",
        Bytes(needed),
        Bytes(allowed),
        Bytes(missing)
    )
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
        for (replica, slot) in choose_cards(model, cards, &mut slots, cpu_slot)?.into_iter().enumerate() {
            let replica = u32::try_from(replica).unwrap_or(u32::MAX);
            slots[slot].take(model, replica, slot == cpu_slot);
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
        let least = least_bytes(model, None);
        (std::cmp::Reverse(model.priority), !pinned, std::cmp::Reverse(least), *index)
    });
    order
}

/// One card while the plan is made.
struct Slot<'a> {
    card: &'a Card,
    left: u64,
    /// How many more bytes of KV each placement could use.
    wishes: Vec<u64>,
    placements: Vec<Placement>,
}

impl<'a> Slot<'a> {
    fn new(card: &'a Card) -> Self {
        Self { card, left: card.free_bytes, wishes: Vec::new(), placements: Vec::new() }
    }

    fn take(&mut self, model: &Wanted, replica: u32, on_cpu: bool) {
        let demand = &model.demand;
        let kv_bytes = kv_least_bytes(model, Some(&self.card.id));
        let limit_bytes = limit_bytes(model, self.card);
        let wish = match kv_fixed_bytes(model, Some(&self.card.id)) {
            Some(_) => 0,
            None => kv_most_bytes(model, self.card, on_cpu).saturating_sub(demand.kv_min_bytes),
        };
        self.placements.push(Placement {
            model: model.name.clone(),
            replica,
            weights_bytes: demand.weights_bytes,
            kv_bytes,
            scratch_bytes: demand.scratch_bytes,
            context_bytes: if on_cpu { 0 } else { demand.context_bytes },
            kv_min_bytes: demand.kv_min_bytes,
            limit_bytes,
        });
        self.wishes.push(wish);
        self.left = self.left.saturating_sub(bytes_with_kv(model, kv_bytes, on_cpu));
    }

    /// Gives every wish the same share of what is left; who wishes for less leaves the rest to the others.
    fn share_what_is_left(&mut self) {
        let mut order: Vec<usize> = (0..self.wishes.len()).filter(|index| self.wishes[*index] > 0).collect();
        order.sort_by_key(|index| self.wishes[*index]);
        for (done, index) in order.iter().enumerate() {
            let remaining = u64::try_from(order.len() - done).unwrap_or(u64::MAX);
            let given = self.wishes[*index].min(self.left / remaining);
            self.placements[*index].kv_bytes += given;
            self.left -= given;
        }
    }

    fn into_plan(self) -> DevicePlan {
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

/// Bytes for KV that are not for the planner to choose: configured, or in use on this card.
fn kv_fixed_bytes(model: &Wanted, device: Option<&DeviceId>) -> Option<u64> {
    let in_use = || model.current.iter().find(|(at, _)| Some(at) == device).map(|(_, kv_bytes)| *kv_bytes);
    model.kv_budget_bytes.or_else(in_use)
}

fn kv_least_bytes(model: &Wanted, device: Option<&DeviceId>) -> u64 {
    kv_fixed_bytes(model, device).unwrap_or(model.demand.kv_min_bytes)
}

/// Bytes without which a replica cannot run on this card, or on any.
fn least_bytes(model: &Wanted, device: Option<&DeviceId>) -> u64 {
    bytes_with_kv(model, kv_least_bytes(model, device), device.is_some_and(DeviceId::is_cpu))
}

fn bytes_with_kv(model: &Wanted, kv: u64, on_cpu: bool) -> u64 {
    let demand = &model.demand;
    let context = if on_cpu { 0 } else { demand.context_bytes };
    [demand.weights_bytes, demand.scratch_bytes, context, kv].into_iter().fold(0, u64::saturating_add)
}

/// Bytes of a card that a replica may have, if there is a limit.
fn limit_bytes(model: &Wanted, card: &Card) -> Option<u64> {
    model.memory_limit.map(|limit| limit.of(card.total_bytes))
}

/// The most KV that is of use: all sequences at the full context, or what the limit leaves.
fn kv_most_bytes(model: &Wanted, card: &Card, on_cpu: bool) -> u64 {
    let under = |limit: u64| limit.saturating_sub(bytes_with_kv(model, 0, on_cpu)).max(model.demand.kv_min_bytes);
    limit_bytes(model, card).map_or(u64::MAX, under).min(model.demand.kv_full_bytes)
}

/// Refuses a card whose limit is below what the model needs.
fn check_limit(model: &Wanted, card: &Card) -> Result<(), PlacementError> {
    let needed_bytes = least_bytes(model, Some(&card.id));
    match (model.memory_limit, limit_bytes(model, card)) {
        (Some(limit), Some(limit_bytes)) if needed_bytes > limit_bytes => Err(PlacementError::OverLimit {
            model: model.name.clone(),
            device: card.id.clone(),
            limit: limit.to_string(),
            needed_bytes,
            limit_bytes,
        }),
        _ => Ok(()),
    }
}

/// The slots that the replicas of a model take.
fn choose_cards(
    model: &Wanted,
    cards: &[Card],
    slots: &mut [Slot<'_>],
    cpu_slot: usize,
) -> Result<Vec<usize>, PlacementError> {
    let allowed: Vec<usize> = match &model.devices {
        Devices::Cpu => return on_cpu(model, slots, cpu_slot),
        Devices::AutoElseCpu if cards.is_empty() => return on_cpu(model, slots, cpu_slot),
        Devices::Auto | Devices::AutoElseCpu if cards.is_empty() => {
            return Err(PlacementError::NoGpu { model: model.name.clone() });
        }
        Devices::Auto | Devices::AutoElseCpu => (0..cards.len()).collect(),
        Devices::These(selectors) => named_cards(model, selectors, cards)?,
    };
    let replicas = match model.replicas {
        Replicas::All => allowed.len(),
        Replicas::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
    };
    if replicas > allowed.len() {
        let replicas = u32::try_from(replicas).unwrap_or(u32::MAX);
        return Err(PlacementError::TooFewCards { model: model.name.clone(), replicas, cards: allowed.len() });
    }
    best_cards(model, slots, &allowed, replicas)
}

fn on_cpu(model: &Wanted, slots: &[Slot<'_>], cpu_slot: usize) -> Result<Vec<usize>, PlacementError> {
    let replicas = match model.replicas {
        Replicas::All => 1,
        Replicas::Count(count) => count,
    };
    check_limit(model, slots[cpu_slot].card)?;
    let needed = least_bytes(model, Some(&slots[cpu_slot].card.id)).saturating_mul(u64::from(replicas));
    if needed > slots[cpu_slot].left {
        return Err(short(model, &slots[cpu_slot], needed, 1));
    }
    Ok(vec![cpu_slot; usize::try_from(replicas).unwrap_or(usize::MAX)])
}

fn named_cards(model: &Wanted, selectors: &[DeviceSelector], cards: &[Card]) -> Result<Vec<usize>, PlacementError> {
    let known: Vec<(&str, Option<PciBusId>)> = cards.iter().map(|card| (card.id.as_str(), card.pci)).collect();
    let mut found = Vec::new();
    for selector in selectors {
        let no_such = |why: String| {
            let (model, selector) = (model.name.clone(), selector.to_string());
            PlacementError::NoSuchDevice { model, selector, why }
        };
        let index = selector.find(&known).map_err(|error| {
            let list = known.iter().map(|(uuid, _)| *uuid).collect::<Vec<_>>().join(", ");
            no_such(match error {
                SelectError::None if cards.is_empty() => "there is no GPU".to_owned(),
                error => format!("{error}; the GPUs are {list}"),
            })
        })?;
        if found.contains(&index) {
            return Err(no_such("it is the same device as another of the list".to_owned()));
        }
        found.push(index);
    }
    Ok(found)
}

fn best_cards(
    model: &Wanted,
    slots: &[Slot<'_>],
    allowed: &[usize],
    replicas: usize,
) -> Result<Vec<usize>, PlacementError> {
    let least = |slot: usize| least_bytes(model, Some(&slots[slot].card.id));
    let full = |slot: usize| {
        let fixed = kv_fixed_bytes(model, Some(&slots[slot].card.id));
        bytes_with_kv(model, fixed.unwrap_or_else(|| kv_most_bytes(model, slots[slot].card, false)), false)
    };
    let within_limit = |slot: &usize| check_limit(model, slots[*slot].card).is_ok();
    let has_room = |slot: &usize| slots[*slot].left >= least(*slot);
    let mut fitting: Vec<usize> = allowed.iter().copied().filter(|slot| within_limit(slot) && has_room(slot)).collect();
    if fitting.len() < replicas {
        // A limit is the configuration's word, and said first.
        allowed.iter().try_for_each(|slot| check_limit(model, slots[*slot].card))?;
        let short_of = allowed.iter().copied().filter(|slot| slots[*slot].left < least(*slot));
        // Of equal cards the first is named.
        let best = short_of.max_by_key(|slot| (slots[*slot].left, std::cmp::Reverse(*slot)));
        let best = best.unwrap_or_default();
        return Err(short(model, &slots[best], least(best), allowed.len()));
    }
    fitting.sort_by_key(|slot| {
        let left = slots[*slot].left;
        let elsewhere = !model.current.iter().any(|(at, _)| *at == slots[*slot].card.id);
        match left.checked_sub(full(*slot)) {
            // Room for everything: the tightest fit first.
            Some(rest) => (elsewhere, false, rest, *slot),
            // Room for less KV than would be good: the most room first.
            None => (elsewhere, true, u64::MAX - left, *slot),
        }
    });
    fitting.truncate(replicas);
    // Replicas are numbered in the order of the cards.
    fitting.sort_unstable();
    Ok(fitting)
}

fn short(model: &Wanted, slot: &Slot<'_>, needed_bytes: u64, cards: usize) -> PlacementError {
    PlacementError::DoesNotFit {
        model: model.name.clone(),
        device: slot.card.id.clone(),
        device_name: slot.card.name.clone(),
        needed_bytes,
        free_bytes: slot.left,
        missing_bytes: needed_bytes.saturating_sub(slot.left),
        cards,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn card(id: &str, gib: u64) -> Card {
        let (total_bytes, free_bytes) = (gib * GIB, gib * GIB);
        Card { id: DeviceId::gpu(id), name: format!("{gib}G"), pci: None, total_bytes, free_bytes }
    }

    fn cpu() -> Card {
        Card { id: DeviceId::cpu(), ..card("cpu", 64) }
    }

    fn model(name: &str, weights_gib: u64, devices: Devices) -> Wanted {
        let demand = Demand {
            weights_bytes: weights_gib * GIB,
            scratch_bytes: GIB / 2,
            context_bytes: GIB / 2,
            kv_min_bytes: GIB,
            kv_full_bytes: 8 * GIB,
        };
        Wanted {
            name: name.into(),
            devices,
            replicas: Replicas::Count(1),
            priority: 0,
            kv_budget_bytes: None,
            memory_limit: None,
            demand,
            current: Vec::new(),
        }
    }

    fn where_is(plan: &Plan, name: &str) -> Vec<String> {
        let found = plan.placements().filter(|(_, placement)| placement.model == name);
        found.map(|(device, _)| device.to_string()).collect()
    }

    #[test]
    fn small_models_take_small_cards() {
        let cards = [card("a80", 80), card("b24", 24), card("c12", 12)];
        let wanted =
            [model("large", 60, Devices::Auto), model("small", 2, Devices::Auto), model("mid", 14, Devices::Auto)];
        let plan = place(&wanted, &cards, &cpu()).expect("fits");
        assert_eq!(where_is(&plan, "large"), ["a80"]);
        assert_eq!(where_is(&plan, "mid"), ["b24"]);
        assert_eq!(where_is(&plan, "small"), ["c12"]);
        let small = &plan.devices[2].placements[0];
        assert_eq!((small.kv_bytes, plan.devices[2].headroom_bytes), (8 * GIB, GIB), "all the KV it could use");
    }

    #[test]
    fn what_does_not_fit_names_model_card_and_bytes() {
        let mut cards = [card("a12", 12), card("b24", 24)];
        cards[1].free_bytes = 15 * GIB;
        let error = place(&[model("oss", 14, Devices::Auto)], &cards, &cpu()).expect_err("16 GiB are needed");
        assert_eq!(
            error.to_string(),
            "model `oss` does not fit on b24 (24G, the best of 2 cards): it needs 16 GiB, 15 GiB are free, 1 GiB (1073741824 bytes) are \
             missing"
        );
        let pinned = Devices::These(vec![DeviceSelector::Index(0)]);
        let error = place(&[model("oss", 14, pinned)], &cards, &cpu()).expect_err("not on the small card");
        let PlacementError::DoesNotFit { device, missing_bytes, .. } = error else { panic!("{error}") };
        assert_eq!((device.as_str(), missing_bytes), ("a12", 4 * GIB));
    }

    #[test]
    fn pinned_models_choose_before_those_that_can_go_anywhere() {
        let cards = [card("a", 24), card("b", 24)];
        let pinned = Devices::These(vec![DeviceSelector::Uuid("a".into())]);
        let plan =
            place(&[model("free", 20, Devices::Auto), model("pinned", 10, pinned)], &cards, &cpu()).expect("fits");
        assert_eq!(where_is(&plan, "pinned"), ["a"]);
        assert_eq!(where_is(&plan, "free"), ["b"]);
    }

    #[test]
    fn priority_chooses_first() {
        let cards = [card("a", 24)];
        let mut first = model("first", 15, Devices::Auto);
        first.priority = 1;
        let error = place(&[model("second", 18, Devices::Auto), first], &cards, &cpu()).expect_err("room for one");
        assert!(matches!(error, PlacementError::DoesNotFit { model, .. } if model == "second"));
    }

    #[test]
    fn replicas_have_a_card_each() {
        let cards = [card("a", 24), card("b", 12), card("c", 24)];
        let mut all = model("all", 4, Devices::Auto);
        all.replicas = Replicas::All;
        assert_eq!(where_is(&place(&[all.clone()], &cards, &cpu()).expect("fits"), "all"), ["a", "b", "c"]);
        all.replicas = Replicas::Count(2);
        assert_eq!(where_is(&place(&[all.clone()], &cards, &cpu()).expect("fits"), "all"), ["a", "c"], "full KV there");
        all.replicas = Replicas::Count(4);
        let error = place(&[all], &cards, &cpu()).expect_err("three cards");
        assert_eq!(error, PlacementError::TooFewCards { model: "all".into(), replicas: 4, cards: 3 });
    }

    #[test]
    fn a_model_stays_where_it_is_unless_room_is_needed() {
        let cards = [card("a", 24), card("b", 12)];
        let mut stays = model("m", 2, Devices::Auto);
        stays.current = vec![(DeviceId::gpu("a"), 3 * GIB)];
        let plan = place(&[stays.clone()], &cards, &cpu()).expect("fits");
        assert_eq!(where_is(&plan, "m"), ["a"], "b would be the tighter fit");
        assert_eq!(plan.devices[0].placements[0].kv_bytes, 3 * GIB, "what it has");
        let plan = place(&[stays, model("large", 20, Devices::Auto)], &cards, &cpu()).expect("fits when m moves");
        assert_eq!((where_is(&plan, "m"), where_is(&plan, "large")), (vec!["b".into()], vec!["a".into()]));
    }

    #[test]
    fn the_cpu_is_taken_only_when_it_is_allowed() {
        let error = place(&[model("m", 2, Devices::Auto)], &[], &cpu()).expect_err("no GPU");
        assert_eq!(error, PlacementError::NoGpu { model: "m".into() });
        let plan = place(&[model("m", 2, Devices::AutoElseCpu)], &[], &cpu()).expect("fits");
        assert_eq!(where_is(&plan, "m"), ["cpu"]);
        assert_eq!(plan.devices[0].placements[0].context_bytes, 0);
        let plan = place(&[model("m", 2, Devices::AutoElseCpu)], &[card("a", 24)], &cpu()).expect("fits");
        assert_eq!(where_is(&plan, "m"), ["a"]);
        assert_eq!(plan.devices.len(), 1, "a CPU without a model is no part of the plan");
        let error = place(&[model("m", 200, Devices::Cpu)], &[], &cpu()).expect_err("too large for the host");
        assert!(matches!(error, PlacementError::DoesNotFit { device, .. } if device.is_cpu()));
    }

    #[test]
    fn devices_that_are_not_there_are_named() {
        let cards = [card("GPU-aa", 24), card("GPU-ab", 24)];
        let on = |selector: &str| Devices::These(vec![DeviceSelector::Uuid(selector.into())]);
        let message = |devices| place(&[model("m", 2, devices)], &cards, &cpu()).expect_err("no").to_string();
        assert_eq!(
            message(on("GPU-c")),
            "model `m` is to run on `GPU-c`: no device is it; the GPUs are GPU-aa, GPU-ab"
        );
        assert!(message(on("GPU-a")).contains("2 devices have this prefix"));
        let twice = Devices::These(vec![DeviceSelector::Uuid("GPU-aa".into()), DeviceSelector::Index(0)]);
        assert!(message(twice).contains("the same device as another of the list"));
    }

    #[test]
    fn a_limit_bounds_what_a_replica_takes() {
        // 4 of weights, 1 of scratch and context: 3 are left for KV, though 8 would be of use and there is room.
        let mut capped = model("m", 4, Devices::Auto);
        capped.memory_limit = Some(MemoryLimit::Bytes(8 * GIB));
        let plan = place(&[capped.clone()], &[card("a", 80)], &cpu()).expect("fits");
        let found = &plan.devices[0].placements[0];
        assert_eq!((found.kv_bytes, found.total_bytes(), found.limit_bytes), (3 * GIB, 8 * GIB, Some(8 * GIB)));
        assert_eq!(plan.devices[0].headroom_bytes, 72 * GIB, "the rest stays free");
        // Two of them share a card although either would take more than half.
        let both = [capped.clone(), Wanted { name: "n".into(), ..capped.clone() }];
        let plan = place(&both, &[card("a", 16)], &cpu()).expect("fit");
        assert!(plan.placements().all(|(_, placement)| placement.total_bytes() == 8 * GIB));
        // A share is of the card, on a host's memory too.
        capped.memory_limit = Some(MemoryLimit::Percent(50));
        let plan = place(&[capped.clone()], &[card("a", 20)], &cpu()).expect("fits");
        assert_eq!(plan.devices[0].placements[0].limit_bytes, Some(10 * GIB));
        capped.devices = Devices::Cpu;
        assert_eq!(place(&[capped], &[], &cpu()).expect("fits").devices[0].placements[0].kv_bytes, 8 * GIB);
    }

    #[test]
    fn a_limit_that_is_too_low_is_refused_with_what_is_missing() {
        let mut capped = model("m", 12, Devices::Auto);
        capped.memory_limit = Some(MemoryLimit::Bytes(10 * GIB));
        let error = place(&[capped.clone()], &[card("GPU-a", 80)], &cpu()).expect_err("14 are needed");
        assert_eq!(
            error.to_string(),
            "model `m` needs 14 GiB on GPU-a, its `memory_limit` (10 GiB) allows 10 GiB, 4 GiB (4294967296 bytes) are missing: \
             raise the limit, or set a smaller `context`, `max_batch_tokens` or `kv_budget`"
        );
        // A budget for KV counts in full; a share may be enough on one card and not on another.
        capped.memory_limit = Some(MemoryLimit::Percent(50));
        assert_eq!(
            where_is(&place(&[capped.clone()], &[card("a", 24), card("b", 28)], &cpu()).expect("b"), "m"),
            ["b"]
        );
        capped.kv_budget_bytes = Some(2 * GIB);
        let error = place(&[capped], &[card("a", 24), card("b", 28)], &cpu()).expect_err("15 of 14");
        assert!(matches!(error, PlacementError::OverLimit { .. }), "{error}");
    }

    #[test]
    fn a_plan_is_json() {
        let plan = place(&[model("m", 2, Devices::Auto)], &[card("GPU-a", 24)], &cpu()).expect("fits");
        let json = serde_json::to_value(&plan).expect("plain data");
        assert_eq!(json["devices"][0]["device"], "GPU-a");
        assert_eq!(json["devices"][0]["placements"][0]["weights_bytes"], 2 * GIB);
    }

    fn any_model() -> impl Strategy<Value = Wanted> {
        let demand = (0u64..40, 0u64..4, 0u64..2, 0u64..6, 0u64..20);
        let devices = prop_oneof![
            Just(Devices::Auto),
            Just(Devices::AutoElseCpu),
            Just(Devices::Cpu),
            (0u32..4).prop_map(|index| Devices::These(vec![DeviceSelector::Index(index)])),
        ];
        let replicas = prop_oneof![Just(Replicas::All), (1u32..4).prop_map(Replicas::Count)];
        let limit = prop_oneof![
            3 => Just(None),
            1 => (1u64..60).prop_map(|bytes| Some(MemoryLimit::Bytes(bytes))),
            1 => (1u8..=100).prop_map(|percent| Some(MemoryLimit::Percent(percent))),
        ];
        (demand, devices, replicas, -1i32..2, prop::option::of(0u64..10), limit).prop_map(
            |((weights, scratch, context, kv, more), devices, replicas, priority, budget, limit)| Wanted {
                name: String::new(),
                devices,
                replicas,
                priority,
                kv_budget_bytes: budget,
                memory_limit: limit,
                demand: Demand {
                    weights_bytes: weights,
                    scratch_bytes: scratch,
                    context_bytes: context,
                    kv_min_bytes: kv,
                    kv_full_bytes: kv + more,
                },
                current: Vec::new(),
            },
        )
    }

    proptest! {
        /// A plan never promises more than a card has; every replica asked for is there, on a card of its own; KV lies
        /// between what is needed and what is useful; the books balance; and the plan is a function of its input.
        #[test]
        fn a_plan_keeps_its_promises(
            mut wanted in prop::collection::vec(any_model(), 0..6),
            frees in prop::collection::vec(0u64..80, 0..5),
        ) {
            for (index, model) in wanted.iter_mut().enumerate() {
                model.name = format!("m{index}");
            }
            let cards: Vec<Card> = frees
                .iter()
                .enumerate()
                .map(|(index, free)| Card { free_bytes: *free, total_bytes: 80, ..card(&format!("GPU-{index}"), 0) })
                .collect();
            let cpu = Card { free_bytes: 100, total_bytes: 100, ..cpu() };
            let result = place(&wanted, &cards, &cpu);
            prop_assert_eq!(&result, &place(&wanted, &cards, &cpu));
            let plan = match result {
                Ok(plan) => plan,
                Err(PlacementError::DoesNotFit { needed_bytes, free_bytes, missing_bytes, .. }) => {
                    prop_assert!(missing_bytes > 0 && missing_bytes == needed_bytes - free_bytes);
                    return Ok(());
                }
                Err(_) => return Ok(()),
            };
            for device in &plan.devices {
                let used: u64 = device.placements.iter().map(Placement::total_bytes).sum();
                prop_assert_eq!(device.foreign_bytes + used + device.headroom_bytes, device.total_bytes);
                let mut models: Vec<&str> = device.placements.iter().map(|p| p.model.as_str()).collect();
                models.dedup();
                prop_assert!(device.device.is_cpu() || models.len() == device.placements.len());
            }
            for model in &wanted {
                let replicas: Vec<&Placement> =
                    plan.placements().map(|(_, placement)| placement).filter(|p| p.model == model.name).collect();
                if let Replicas::Count(count) = model.replicas {
                    prop_assert_eq!(replicas.len(), count as usize);
                }
                for placement in replicas {
                    match model.kv_budget_bytes {
                        Some(budget) => prop_assert_eq!(placement.kv_bytes, budget),
                        None => {
                            let range = model.demand.kv_min_bytes..=model.demand.kv_full_bytes;
                            prop_assert!(range.contains(&placement.kv_bytes));
                        }
                    }
                }
            }
        }
    }
}
