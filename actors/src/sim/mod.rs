//! The second implementation of everything the actors drive: devices, engines, workers that fail on command.
//!
//! Part of the library, not of its tests: `[[simulate.device]]` uses the inventory, and host applications may test their
//! own supervision with the rest.

mod engine;
mod inventory;
mod worker;

pub use engine::{SimEngine, sim_embedding, sim_token};
pub use inventory::{SimBox, SimInventory};
pub use worker::{
    Faults, NoFaults, SIM_BLOCK_BYTES, SIM_CONTEXT_BYTES, SimProcess, SimWorkers, Verdict, sim_held_bytes,
};
