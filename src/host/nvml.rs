//! The GPUs as NVML tells of them: [`Inventory`] over `nvml-wrapper`, with a thread of its own for health events.
//!
//! NVML needs no CUDA context, so the host asks it and never initialises CUDA. A box without the library, without a
//! driver or without GPUs has no devices; that is no error. What one card does not support is `None` for that card.

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::{NvmlError, NvmlErrorWithSource};
use nvml_wrapper::event::EventSet;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id;
use nvml_wrapper::{Device as Card, Nvml};
use playhouse_actors::inventory::{
    Device, DeviceProcess, Ecc, HealthEvent, HealthKind, Inventory, InventoryError, RecoveryAction, RowRemap,
    sort_by_bus, visible,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use tokio::sync::mpsc;

/// Health events that wait to be read; more are dropped and said so, as the devices' own counters remain.
const EVENTS_MAX: usize = 256;
/// How long the event thread waits at a time: it ends within this after the inventory is gone.
const WAIT_MS: u32 = 500;
/// Looks in between, for what NVML has no event for.
const RECOVERY_LOOK_EVERY: u32 = 20;

/// The GPUs of this box.
pub struct NvmlInventory {
    /// `None` without the library or a driver, and why.
    nvml: Result<Arc<Nvml>, String>,
    visible: Option<String>,
    events: Option<mpsc::Receiver<HealthEvent>>,
    stop: Arc<AtomicBool>,
}

impl NvmlInventory {
    /// Looks for the library and a driver. `CUDA_VISIBLE_DEVICES` of this process limits what is seen.
    pub fn new() -> Self {
        let nvml = Nvml::init().map(Arc::new).map_err(|error| error.to_string());
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let stop = Arc::new(AtomicBool::new(false));
        let events = nvml.as_ref().ok().and_then(|nvml| watch(nvml.clone(), stop.clone()));
        Self { nvml, visible, events, stop }
    }

    /// Why there are no devices, if NVML itself is not there.
    pub fn absent(&self) -> Option<&str> {
        self.nvml.as_ref().err().map(String::as_str)
    }
}

impl Default for NvmlInventory {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for NvmlInventory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Inventory for NvmlInventory {
    fn devices(&mut self) -> Result<Vec<Device>, InventoryError> {
        let Ok(nvml) = &self.nvml else { return Ok(Vec::new()) };
        let count = nvml.device_count().map_err(|error| failed("nvmlDeviceGetCount", &error))?;
        let mut devices = Vec::new();
        for index in 0..count {
            let card = nvml.device_by_index(index).map_err(|error| failed("nvmlDeviceGetHandleByIndex", &error))?;
            devices.push(read(&card)?);
        }
        sort_by_bus(&mut devices);
        Ok(visible(devices, self.visible.as_deref()))
    }

    fn take_events(&mut self) -> Option<mpsc::Receiver<HealthEvent>> {
        self.events.take()
    }
}

fn failed(call: &str, error: &NvmlError) -> InventoryError {
    InventoryError::Call { call: call.to_owned(), detail: error.to_string() }
}

/// One card now. Identity and memory are required; the rest is as the card has it.
fn read(card: &Card<'_>) -> Result<Device, InventoryError> {
    let memory = card.memory_info().map_err(|error| failed("nvmlDeviceGetMemoryInfo", &error))?;
    Ok(Device {
        uuid: card.uuid().map_err(|error| failed("nvmlDeviceGetUUID", &error))?,
        pci_bus_id: card.pci_info().ok().map(|pci| pci.bus_id),
        name: card.name().map_err(|error| failed("nvmlDeviceGetName", &error))?,
        total_bytes: memory.total,
        // What the driver keeps for itself is as little ours as what others use.
        used_bytes: memory.total - memory.free,
        free_bytes: memory.free,
        utilization_percent: card.utilization_rates().ok().map(|rates| rates.gpu),
        temperature_c: card.temperature(TemperatureSensor::Gpu).ok(),
        power_mw: card.power_usage().ok(),
        power_limit_mw: card.enforced_power_limit().ok(),
        sm_clock_mhz: card.clock_info(Clock::SM).ok(),
        memory_clock_mhz: card.clock_info(Clock::Memory).ok(),
        throttle_reasons: throttle_reasons(card),
        ecc: ecc(card),
        row_remap: row_remap(card),
        mig_enabled: card.mig_mode().ok().map(|mode| mode.current != 0),
        processes: processes(card),
    })
}

fn throttle_reasons(card: &Card<'_>) -> Vec<String> {
    let reasons = card.current_throttle_reasons();
    let idle_is_none = |name: &&str| *name != "GPU_IDLE";
    let names = reasons.map(|reasons| reasons.iter_names().map(|(name, _)| name).collect::<Vec<_>>());
    names.unwrap_or_default().into_iter().filter(idle_is_none).map(|name| name.to_lowercase()).collect()
}

fn ecc(card: &Card<'_>) -> Option<Ecc> {
    let count = |kind| card.total_ecc_errors(kind, EccCounter::Volatile).ok();
    Some(Ecc { corrected: count(MemoryError::Corrected)?, uncorrected: count(MemoryError::Uncorrected)? })
}

fn row_remap(card: &Card<'_>) -> Option<RowRemap> {
    let fields = [
        field_id::NVML_FI_DEV_REMAPPED_COR,
        field_id::NVML_FI_DEV_REMAPPED_UNC,
        field_id::NVML_FI_DEV_REMAPPED_PENDING,
        field_id::NVML_FI_DEV_REMAPPED_FAILURE,
    ];
    let values = fields.map(|field| field_value(card, field).and_then(|value| u32::try_from(value).ok()));
    let [corrected, uncorrected, pending, failed] = values;
    Some(RowRemap { corrected: corrected?, uncorrected: uncorrected?, pending: pending? != 0, failed: failed? != 0 })
}

fn field_value(card: &Card<'_>, field: u32) -> Option<u64> {
    let mut values = card.field_values_for(&[FieldId(field)]).ok()?;
    match values.pop()?.ok()?.value.ok()? {
        SampleValue::U32(value) => Some(value.into()),
        SampleValue::U64(value) => Some(value),
        SampleValue::I64(value) => u64::try_from(value).ok(),
        SampleValue::F64(_) => None,
    }
}

fn processes(card: &Card<'_>) -> Vec<DeviceProcess> {
    let process = |info: nvml_wrapper::struct_wrappers::device::ProcessInfo| DeviceProcess {
        pid: info.pid,
        used_bytes: match info.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
    };
    card.running_compute_processes().unwrap_or_default().into_iter().map(process).collect()
}

/// A card with the name it had when it still answered: one that is lost tells nobody which it is.
struct Watched<C> {
    card: C,
    uuid: String,
    /// What the driver last asked for; told when it changes.
    action: Option<RecoveryAction>,
    /// Told once: an operator who takes the card back has been told.
    remap_failed: bool,
}

impl<C> Watched<C> {
    fn new(card: C, uuid: String) -> Self {
        Self { card, uuid, action: None, remap_failed: false }
    }
}

/// Starts the thread that waits for events. `None` if there is none to start; lists of the devices still say what they say.
fn watch(nvml: Arc<Nvml>, stop: Arc<AtomicBool>) -> Option<mpsc::Receiver<HealthEvent>> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    let run = move || match wait_for_events(&nvml, &stop, &events) {
        Ok(()) => {}
        Err(NvmlError::NotSupported) => {
            tracing::warn!("this driver has no health events: XIDs are seen only through workers that fail");
        }
        Err(error) => {
            tracing::error!(%error, "health events end: what the GPUs suffer is not known any more");
            tell(&events, None, HealthKind::Unreadable);
        }
    };
    // Without a thread there are no events; the caller is told by the missing channel.
    thread::Builder::new().name("nvml-events".into()).spawn(run).ok()?;
    Some(receiver)
}

fn wait_for_events<'nvml>(
    nvml: &'nvml Nvml,
    stop: &AtomicBool,
    events: &mpsc::Sender<HealthEvent>,
) -> Result<(), NvmlError> {
    let cards = (0..nvml.device_count()?).filter_map(|index| nvml.device_by_index(index).ok());
    let named = |card: Card<'nvml>| card.uuid().ok().map(|uuid| Watched::new(card, uuid));
    let mut cards: Vec<Watched<Card<'nvml>>> = cards.filter_map(named).collect();
    let mut set = register(nvml, &cards)?;
    for look in 0u32.. {
        if stop.load(Ordering::Relaxed) || events.is_closed() {
            break;
        }
        if look % RECOVERY_LOOK_EVERY == 0 {
            cards.iter_mut().for_each(|watched| tell_recovery(watched, events));
        }
        match set.wait(WAIT_MS) {
            Ok(event) => {
                let xid = event.event_data.map(|xid| match xid {
                    XidError::Value(code) => code,
                    XidError::Unknown => 999,
                });
                if let Some(code) = xid {
                    tell(events, uuid_of(&event.device, &cards), HealthKind::Xid(code));
                }
            }
            Err(NvmlError::Timeout) => {}
            Err(NvmlError::GpuLost) => {
                let is_lost = |card: &Card<'_>| matches!(card.uuid(), Err(NvmlError::GpuLost));
                let lost = take_lost(&mut cards, is_lost);
                if lost.is_empty() {
                    // One that does not say so itself: nobody knows which.
                    return Err(NvmlError::GpuLost);
                }
                lost.into_iter().for_each(|uuid| tell(events, Some(uuid), HealthKind::GpuLost));
                // A set with a lost device reports nothing but that: go on with the others.
                set = register(nvml, &cards)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The card of an event. After XID 79 it does not say its UUID any more, and an event of nobody concerns every GPU.
fn uuid_of(card: &Card<'_>, known: &[Watched<Card<'_>>]) -> Option<String> {
    // SAFETY: the handles are compared and used for nothing else; NVML gives a GPU one handle for as long as it is loaded.
    let is_it = |known: &&Watched<Card<'_>>| unsafe { known.card.handle() == card.handle() };
    let found = known.iter().find(is_it).map(|known| known.uuid.clone());
    found.or_else(|| card.uuid().ok())
}

/// Takes out the cards that are lost, and says which they were.
fn take_lost<C>(cards: &mut Vec<Watched<C>>, is_lost: impl Fn(&C) -> bool) -> Vec<String> {
    cards.extract_if(.., |watched| is_lost(&watched.card)).map(|watched| watched.uuid).collect()
}

/// An event set of all cards that can report XIDs.
fn register<'nvml>(nvml: &'nvml Nvml, cards: &[Watched<Card<'nvml>>]) -> Result<EventSet<'nvml>, NvmlError> {
    let mut set = nvml.create_event_set()?;
    for Watched { card, .. } in cards {
        let supported = card.supported_event_types().unwrap_or(EventTypes::empty());
        if supported.contains(EventTypes::CRITICAL_XID_ERROR) {
            let registered = card.register_events(EventTypes::CRITICAL_XID_ERROR, set);
            set = registered.map_err(|NvmlErrorWithSource { error, .. }| error)?;
        }
    }
    Ok(set)
}

/// Tells what NVML has no event for.
fn tell_recovery(watched: &mut Watched<Card<'_>>, events: &mpsc::Sender<HealthEvent>) {
    let Watched { card, uuid, action: known, remap_failed } = watched;
    let action = field_value(card, field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION).and_then(recovery_action);
    let changed = action.is_some() && action != *known;
    let is_news = known.is_some() || action != Some(RecoveryAction::None);
    if let Some(action) = action.filter(|_| changed && is_news) {
        tell(events, Some(uuid.clone()), HealthKind::Recovery(action));
    }
    *known = action.or(*known);
    if !*remap_failed && row_remap(card).is_some_and(|remap| remap.failed) {
        *remap_failed = true;
        tell(events, Some(uuid.clone()), HealthKind::RowRemapFailed);
    }
}

/// In the order of `nvmlDeviceGpuRecoveryAction_t`.
fn recovery_action(value: u64) -> Option<RecoveryAction> {
    let actions = [
        RecoveryAction::None,
        RecoveryAction::GpuReset,
        RecoveryAction::NodeReboot,
        RecoveryAction::DrainP2p,
        RecoveryAction::DrainAndReset,
    ];
    actions.get(usize::try_from(value).ok()?).copied()
}

fn tell(events: &mpsc::Sender<HealthEvent>, uuid: Option<String>, kind: HealthKind) {
    if events.try_send(HealthEvent { uuid: uuid.clone(), kind }).is_err() {
        tracing::warn!(?uuid, ?kind, "nobody reads health events");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_without_nvml_has_no_devices_and_says_why() {
        let mut inventory = NvmlInventory {
            nvml: Err("libnvidia-ml.so was not found".into()),
            visible: None,
            events: None,
            stop: Arc::default(),
        };
        assert_eq!(inventory.devices(), Ok(Vec::new()));
        assert!(inventory.take_events().is_none());
        assert_eq!(inventory.absent(), Some("libnvidia-ml.so was not found"));
    }

    #[test]
    fn this_box_can_be_asked_whatever_it_has() {
        let mut inventory = NvmlInventory::new();
        let devices = inventory.devices().expect("NVML answers, or is not there");
        assert!(inventory.absent().is_none() || devices.is_empty());
        for device in devices {
            assert!(device.total_bytes >= device.free_bytes && !device.uuid.is_empty(), "{device:?}");
        }
    }

    /// A host knows its devices by UUID: a bus id, or nothing, would quarantine none of them, or all.
    #[test]
    fn a_lost_card_is_named_once_by_the_uuid_it_had() {
        let mut cards = Vec::from(["GPU-a", "GPU-b"].map(|uuid| Watched::new(uuid == "GPU-b", uuid.to_owned())));
        assert_eq!(take_lost(&mut cards, |is_lost| *is_lost), ["GPU-b"]);
        assert!(take_lost(&mut cards, |is_lost| *is_lost).is_empty());
        assert_eq!(cards.len(), 1, "the other is watched on");
    }

    #[test]
    fn recovery_actions_are_in_the_order_of_the_header() {
        assert_eq!(recovery_action(0), Some(RecoveryAction::None));
        assert_eq!(recovery_action(4), Some(RecoveryAction::DrainAndReset));
        assert_eq!(recovery_action(5), None);
    }
}
