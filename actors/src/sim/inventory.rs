//! Devices that are not there: from `[[simulate.device]]`, with memory that is accounted for and health that can be
//! made to fail.

use crate::inventory::{Device, HealthEvent, HealthKind, Inventory, InventoryError};
use playhouse_config::SimulatedDevice;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc;

/// Health events that wait to be read; more are dropped, as a driver does.
const EVENTS_MAX: usize = 256;

/// The box with the simulated cards: what tests turn, and where workers account for their memory.
#[derive(Debug, Clone)]
pub struct SimBox {
    shared: Arc<Mutex<Cards>>,
    events: mpsc::Sender<HealthEvent>,
}

#[derive(Debug)]
struct Cards {
    cards: Vec<SimulatedDevice>,
    /// Bytes by card and holder.
    held: BTreeMap<(String, u64), u64>,
    broken: Option<String>,
}

/// [`Inventory`] over a [`SimBox`].
#[derive(Debug)]
pub struct SimInventory {
    sim: SimBox,
    events: Option<mpsc::Receiver<HealthEvent>>,
}

impl SimInventory {
    /// An inventory of `cards` and the handle that turns them.
    pub fn new(cards: Vec<SimulatedDevice>) -> (Self, SimBox) {
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let shared = Arc::new(Mutex::new(Cards { cards, held: BTreeMap::new(), broken: None }));
        let sim = SimBox { shared, events };
        (Self { sim: sim.clone(), events: Some(receiver) }, sim)
    }
}

impl SimBox {
    fn cards(&self) -> MutexGuard<'_, Cards> {
        // A panic between two assignments of plain numbers cannot happen: the state is whole even if a holder panicked.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes memory on a card for `holder`. A card that is not there has no memory; the CPU has all it wants.
    ///
    /// # Errors
    /// The bytes that are free, if they are too few; nothing is taken.
    pub fn allocate(&self, uuid: &str, holder: u64, bytes: u64) -> Result<(), u64> {
        let mut cards = self.cards();
        let free = cards.free(uuid);
        if free < bytes {
            return Err(free);
        }
        *cards.held.entry((uuid.to_owned(), holder)).or_default() += bytes;
        Ok(())
    }

    /// Gives back everything `holder` has anywhere: what the end of a process does.
    pub fn release(&self, holder: u64) {
        self.cards().held.retain(|(_, found), _| *found != holder);
    }

    /// Bytes by card and holder: the ledger.
    pub fn ledger(&self) -> BTreeMap<(String, u64), u64> {
        self.cards().held.clone()
    }

    /// Bytes free on a card.
    pub fn free_bytes(&self, uuid: &str) -> u64 {
        self.cards().free(uuid)
    }

    /// Reports a health event, as the driver would.
    pub fn report(&self, uuid: Option<&str>, kind: HealthKind) {
        // A full channel drops the event: nobody reads it.
        let _ = self.events.try_send(HealthEvent { uuid: uuid.map(str::to_owned), kind });
    }

    /// Makes listing devices fail with these words, or work again.
    pub fn set_broken(&self, detail: Option<&str>) {
        self.cards().broken = detail.map(str::to_owned);
    }
}

impl Cards {
    fn free(&self, uuid: &str) -> u64 {
        let Some(card) = self.cards.iter().find(|card| card.uuid == uuid) else {
            return if uuid == "cpu" { u64::MAX } else { 0 };
        };
        card.vram_bytes.saturating_sub(card.used_bytes).saturating_sub(self.held_on(uuid))
    }

    fn held_on(&self, uuid: &str) -> u64 {
        self.held.iter().filter(|((found, _), _)| found == uuid).map(|(_, bytes)| bytes).sum()
    }
}

impl Inventory for SimInventory {
    fn devices(&mut self) -> Result<Vec<Device>, InventoryError> {
        let cards = self.sim.cards();
        if let Some(detail) = &cards.broken {
            return Err(InventoryError::Call { call: "devices".into(), detail: detail.clone() });
        }
        let device = |card: &SimulatedDevice| {
            let used_bytes = card.used_bytes + cards.held_on(&card.uuid);
            Device {
                uuid: card.uuid.clone(),
                name: card.name.clone(),
                total_bytes: card.vram_bytes,
                used_bytes,
                free_bytes: card.vram_bytes.saturating_sub(used_bytes),
                ..Device::default()
            }
        };
        Ok(cards.cards.iter().map(device).collect())
    }

    fn take_events(&mut self) -> Option<mpsc::Receiver<HealthEvent>> {
        self.events.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_accounted_for() {
        let card = SimulatedDevice { name: "S".into(), uuid: "SIM-0".into(), vram_bytes: 100, used_bytes: 10 };
        let (mut inventory, sim) = SimInventory::new(vec![card]);
        sim.allocate("SIM-0", 1, 60).expect("90 are free");
        assert_eq!(sim.allocate("SIM-0", 2, 31), Err(30));
        assert_eq!(sim.allocate("SIM-1", 2, 1), Err(0), "no such card");
        let device = inventory.devices().expect("works").remove(0);
        assert_eq!((device.total_bytes, device.used_bytes, device.free_bytes), (100, 70, 30));
        sim.release(1);
        assert_eq!(sim.free_bytes("SIM-0"), 90);
        assert!(sim.ledger().is_empty());
        sim.set_broken(Some("driver gone"));
        assert_eq!(inventory.devices().expect_err("broken").to_string(), "devices failed: driver gone");
    }

    #[test]
    fn events_are_read_once() {
        let (mut inventory, sim) = SimInventory::new(Vec::new());
        sim.report(Some("SIM-0"), HealthKind::Xid(79));
        let mut events = inventory.take_events().expect("not taken yet");
        assert_eq!(events.try_recv(), Ok(HealthEvent { uuid: Some("SIM-0".into()), kind: HealthKind::Xid(79) }));
        assert!(inventory.take_events().is_none());
    }
}
