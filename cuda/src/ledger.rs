//! What this process holds of a device's memory, by kind: to be compared with what NVML says of the process.

use crate::arena::{Arena, Cap, WeakArena};
use crate::error::CudaError;
use crate::gpu::Gpu;
use std::sync::Mutex;

/// What an arena is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Encoded weights and tables.
    Weights,
    /// Paged keys and values.
    Kv,
    /// Activations, work space, a step's inputs.
    Scratch,
    /// Chunks on their way to the weights; gone once a model is loaded.
    Staging,
}

/// Bytes by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// What the driver took for the context and the kernels.
    pub context: u64,
    /// [`Kind::Weights`].
    pub weights: u64,
    /// [`Kind::Kv`].
    pub kv: u64,
    /// [`Kind::Scratch`].
    pub scratch: u64,
    /// [`Kind::Staging`].
    pub staging: u64,
}

impl Usage {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.context + self.weights + self.kv + self.scratch + self.staging
    }
}

/// The arenas of a process on one device. It keeps none of them alive.
#[derive(Debug)]
pub struct Ledger {
    gpu: Gpu,
    context: u64,
    arenas: Mutex<Vec<(Kind, WeakArena)>>,
}

impl Ledger {
    /// Begins with what the context takes: what is in use now, less `used_before`, which NVML showed before the context was
    /// opened. To be made when the kernels are loaded and before any arena.
    ///
    /// # Errors
    /// A failed driver call.
    pub fn new(gpu: &Gpu, used_before: u64) -> Result<Ledger, CudaError> {
        let context = gpu.used_bytes()?.saturating_sub(used_before);
        Ok(Ledger { gpu: gpu.clone(), context, arenas: Mutex::default() })
    }

    /// Makes an arena that is counted ([`Arena::with_cap`]).
    ///
    /// # Errors
    /// As there.
    pub fn arena(&self, kind: Kind, what: &'static str, reserve: u64, cap: Option<Cap>) -> Result<Arena, CudaError> {
        let arena = Arena::with_cap(&self.gpu, what, reserve, cap)?;
        let mut arenas = self.arenas.lock().expect("no panic while locked");
        arenas.retain(|(_, arena)| !arena.is_gone());
        arenas.push((kind, arena.weak()));
        Ok(arena)
    }

    /// Bytes taken from the device, by kind.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage { context: self.context, ..Usage::default() };
        for (kind, arena) in &*self.arenas.lock().expect("no panic while locked") {
            let place = match kind {
                Kind::Weights => &mut usage.weights,
                Kind::Kv => &mut usage.kv,
                Kind::Scratch => &mut usage.scratch,
                Kind::Staging => &mut usage.staging,
            };
            *place += arena.mapped_bytes();
        }
        usage
    }
}
