//! The second implementation of everything the actors drive: devices, engines, workers that fail on command.
//!
//! Part of the library, not of its tests: `[[simulate.device]]` uses the inventory, and host applications may test their
//! own supervision with the rest.

mod inventory;

pub use inventory::{SimBox, SimInventory};
