//! What the host knows of its GPUs, and the trait that finds out.
//!
//! A device is its UUID: the order of NVML is not that of CUDA, and neither need be the same after a reboot. A box
//! without a driver or without GPUs is a normal case: [`Inventory::devices`] is an empty list there.

use playhouse_config::PciBusId;
use serde::{Deserialize, Serialize};
use std::fmt;
use tokio::sync::mpsc;

/// Which device: a GPU by its UUID, or the CPU.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(String);

impl DeviceId {
    /// A GPU, by its full UUID.
    pub fn gpu(uuid: impl Into<String>) -> Self {
        Self(uuid.into())
    }

    /// The CPU.
    pub fn cpu() -> Self {
        Self("cpu".to_owned())
    }

    /// Whether this is the CPU.
    pub fn is_cpu(&self) -> bool {
        self.0 == "cpu"
    }

    /// The UUID, or `cpu`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One GPU now. What a card or a driver does not tell is `None`, never a made-up zero.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Its identity.
    pub uuid: String,
    /// Where it is plugged in, as NVML writes it.
    pub pci_bus_id: Option<String>,
    /// What the card is called.
    pub name: String,
    /// Bytes of memory.
    pub total_bytes: u64,
    /// Bytes in use, by anybody.
    pub used_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Share of the last sample period in which a kernel ran, percent.
    pub utilization_percent: Option<u32>,
    /// Degrees Celsius.
    pub temperature_c: Option<u32>,
    /// Milliwatts drawn.
    pub power_mw: Option<u32>,
    /// Milliwatts allowed.
    pub power_limit_mw: Option<u32>,
    /// Clock of the multiprocessors, MHz.
    pub sm_clock_mhz: Option<u32>,
    /// Clock of the memory, MHz.
    pub memory_clock_mhz: Option<u32>,
    /// Why the clocks are lower than they could be, in NVML's words.
    pub throttle_reasons: Vec<String>,
    /// Error-correcting memory.
    pub ecc: Option<Ecc>,
    /// Rows of memory that were replaced.
    pub row_remap: Option<RowRemap>,
    /// Whether the card is split into MIG instances.
    pub mig_enabled: Option<bool>,
    /// Processes with a context on it.
    pub processes: Vec<DeviceProcess>,
}

/// Error counters since the last driver load.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ecc {
    /// Mended.
    pub corrected: u64,
    /// Not mended.
    pub uncorrected: u64,
}

/// State of row remapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowRemap {
    /// Rows replaced because of mended errors.
    pub corrected: u32,
    /// Rows replaced because of errors that were not mended.
    pub uncorrected: u32,
    /// A replacement waits for a reset. Work may go on meanwhile.
    pub pending: bool,
    /// A replacement failed: the card needs service.
    pub failed: bool,
}

/// A process on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProcess {
    /// Its id.
    pub pid: u32,
    /// Bytes it has, if the driver tells.
    pub used_bytes: Option<u64>,
}

/// Something happened to a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthEvent {
    /// The device; `None` when even that could not be read, which concerns every device.
    pub uuid: Option<String>,
    /// What happened.
    pub kind: HealthKind,
}

/// What can happen to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthKind {
    /// The driver reported this XID.
    Xid(u64),
    /// NVML says that the device is lost.
    GpuLost,
    /// NVML says that the device must be reset.
    ResetRequired,
    /// The driver asks for this recovery (`NVML_FI_DEV_GET_GPU_RECOVERY_ACTION`).
    Recovery(RecoveryAction),
    /// Remapping a row failed.
    RowRemapFailed,
    /// Waiting for events failed, or an event could not be read.
    Unreadable,
}

/// What the driver asks for, in NVML's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryAction {
    /// Nothing.
    None,
    /// Reset the GPU.
    GpuReset,
    /// Reboot the node.
    NodeReboot,
    /// Take work that talks to other GPUs away.
    DrainP2p,
    /// Take all work away, then reset.
    DrainAndReset,
}

/// Why the devices could not be listed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InventoryError {
    /// The management library failed in a call; that it is absent is no error.
    #[error("{call} failed: {detail}")]
    Call {
        /// The call.
        call: String,
        /// Its words.
        detail: String,
    },
}

/// Finds out which GPUs there are and how they do. Implemented over NVML in the root package, and by
/// [`crate::sim::SimInventory`].
///
/// Calls may block for milliseconds; the inventory actor makes them on a blocking thread. Events come from a thread of
/// the implementation's own.
pub trait Inventory: Send + 'static {
    /// The GPUs now, in the order of PCI bus ids. Empty where there is no driver or no GPU.
    ///
    /// # Errors
    /// [`InventoryError`] if there is a driver and it fails.
    fn devices(&mut self) -> Result<Vec<Device>, InventoryError>;

    /// The channel of health events. `None` if there are none to come, or if it was taken before.
    fn take_events(&mut self) -> Option<mpsc::Receiver<HealthEvent>>;
}

/// The devices that `CUDA_VISIBLE_DEVICES` leaves, in its order. As CUDA reads it: indices (here in the order of PCI
/// bus ids), UUIDs or prefixes of one; the list ends at the first entry that is no device or is there twice; without
/// the variable all are visible, and an empty one hides all.
/// (CUDA C++ Programming Guide, "CUDA Environment Variables".)
pub fn visible(devices: Vec<Device>, cuda_visible_devices: Option<&str>) -> Vec<Device> {
    let Some(list) = cuda_visible_devices else { return devices };
    let mut taken: Vec<usize> = Vec::new();
    for entry in list.split(',').map(str::trim) {
        let found = match entry.parse::<usize>() {
            Ok(index) => (index < devices.len()).then_some(index),
            Err(_) => unique_prefix(&devices, entry),
        };
        match found {
            Some(index) if !taken.contains(&index) => taken.push(index),
            // CUDA shows nothing at all when a device is named twice.
            Some(_) => return Vec::new(),
            None => break,
        }
    }
    taken.into_iter().map(|index| devices[index].clone()).collect()
}

fn unique_prefix(devices: &[Device], prefix: &str) -> Option<usize> {
    if !prefix.starts_with("GPU-") && !prefix.starts_with("MIG-") && !prefix.starts_with("SIM-") {
        return None;
    }
    let mut found = (0..devices.len()).filter(|index| devices[*index].uuid.starts_with(prefix));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

/// Sorts by PCI bus id, devices without one by UUID after them: the order that an index in the configuration means.
pub fn sort_by_bus(devices: &mut [Device]) {
    let key = |device: &Device| {
        let pci = device.pci_bus_id.as_deref().and_then(PciBusId::parse);
        (pci.is_none(), pci, device.uuid.clone())
    };
    devices.sort_by_key(key);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards() -> Vec<Device> {
        let card = |uuid: &str| Device { uuid: uuid.into(), ..Device::default() };
        vec![card("GPU-aa1"), card("GPU-ab2"), card("GPU-c3")]
    }

    #[test]
    fn cuda_visible_devices_is_read_as_cuda_reads_it() {
        let see = |list: Option<&str>| -> Vec<String> {
            visible(cards(), list).into_iter().map(|device| device.uuid).collect()
        };
        assert_eq!(see(None).len(), 3);
        assert_eq!(see(Some("")), [""; 0]);
        assert_eq!(see(Some("2,0")), ["GPU-c3", "GPU-aa1"]);
        assert_eq!(see(Some("GPU-c, 1")), ["GPU-c3", "GPU-ab2"]);
        assert_eq!(see(Some("0,7,1")), ["GPU-aa1"], "the list ends at the first entry that is no device");
        assert_eq!(see(Some("-1,0")), [""; 0]);
        assert_eq!(see(Some("GPU-a")), [""; 0], "two devices have this prefix");
        assert_eq!(see(Some("0,0")), [""; 0], "a device named twice hides all");
    }

    #[test]
    fn the_order_is_that_of_the_bus() {
        let card = |uuid: &str, pci: Option<&str>| Device {
            uuid: uuid.into(),
            pci_bus_id: pci.map(str::to_owned),
            ..Device::default()
        };
        let mut devices = [
            card("c", None),
            card("b", Some("00000000:86:00.0")),
            card("a", None),
            card("d", Some("00000000:3B:00.0")),
        ];
        sort_by_bus(&mut devices);
        let uuids: Vec<&str> = devices.iter().map(|device| device.uuid.as_str()).collect();
        assert_eq!(uuids, ["d", "b", "a", "c"]);
    }
}
