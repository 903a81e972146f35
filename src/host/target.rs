//! What an operator's word for a device means.

use playhouse_actors::inventory::{Device, DeviceId};
use playhouse_config::{DeviceSelector, PciBusId};

/// What a device's name on a command line means: `cpu`, an index, a PCI bus id, a UUID or the beginning of one.
pub(super) fn find_device(text: &str, devices: &[Device]) -> Option<DeviceId> {
    if text == "cpu" {
        return Some(DeviceId::cpu());
    }
    let pci = |device: &Device| device.pci_bus_id.as_deref().and_then(PciBusId::parse);
    let known: Vec<_> = devices.iter().map(|device| (device.uuid.as_str(), pci(device))).collect();
    let selector = match (text.parse(), PciBusId::parse(text)) {
        (Ok(index), _) => DeviceSelector::Index(index),
        (_, Some(id)) => DeviceSelector::Pci(id),
        // More than what all UUIDs begin with: a mistyped model is no device.
        _ if text.len() > "GPU-".len() => DeviceSelector::Uuid(text.to_owned()),
        _ => return None,
    };
    // A beginning that several have is none.
    selector.find(&known).ok().map(|index| DeviceId::gpu(devices[index].uuid.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_by_whatever_names_them() {
        let device = |uuid: &str, bus: &str| Device {
            uuid: uuid.into(),
            pci_bus_id: Some(format!("00000000:{bus}:00.0")),
            ..Device::default()
        };
        let devices = [device("GPU-5d5b01", "3B"), device("GPU-5d5c02", "AF")];
        let found = |text: &str| find_device(text, &devices).map(|device| device.to_string());
        for name in ["GPU-5d5c02", "GPU-5d5c", "af:00.0", "1"] {
            assert_eq!(found(name).as_deref(), Some("GPU-5d5c02"), "{name}");
        }
        assert_eq!(found("cpu").as_deref(), Some("cpu"));
        for nothing in ["GPU-5d5", "GPU-6", "GPU-", "2", "01:00.0", "", "qwen"] {
            assert_eq!(found(nothing), None, "{nothing}");
        }
    }
}
