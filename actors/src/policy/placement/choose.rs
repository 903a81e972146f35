//! Which cards the replicas of one model take.

use super::need::Need;
use super::slot::Slot;
use super::{Card, PlacementError, Wanted};
use playhouse_config::{DeviceSelector, Devices, PciBusId, Replicas, SelectError};

/// The slots that the replicas of a model take.
pub(super) fn choose_cards(
    model: &Wanted,
    cards: &[Card],
    slots: &[Slot<'_>],
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
    let need = Need { model, card: slots[cpu_slot].card };
    need.check_limit()?;
    let needed = need.least_bytes().saturating_mul(u64::from(replicas));
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
    let need = |slot: usize| Need { model, card: slots[slot].card };
    let within_limit = |slot: &usize| need(*slot).check_limit().is_ok();
    let has_room = |slot: &usize| slots[*slot].left >= need(*slot).least_bytes();
    let mut fitting: Vec<usize> = allowed.iter().copied().filter(|slot| within_limit(slot) && has_room(slot)).collect();
    if fitting.len() < replicas {
        // A limit is the configuration's word, and said first.
        allowed.iter().try_for_each(|slot| need(*slot).check_limit())?;
        let short_of = allowed.iter().copied().filter(|slot| !has_room(slot));
        // Of equal cards the first is named.
        let best = short_of.max_by_key(|slot| (slots[*slot].left, std::cmp::Reverse(*slot)));
        let best = best.unwrap_or_default();
        return Err(short(model, &slots[best], need(best).least_bytes(), allowed.len()));
    }
    fitting.sort_by_key(|slot| {
        let left = slots[*slot].left;
        let elsewhere = !model.current.iter().any(|(at, _)| *at == slots[*slot].card.id);
        match left.checked_sub(need(*slot).most_bytes()) {
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
