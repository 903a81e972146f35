//! How a device is named: UUID, PCI bus id or index. NVML order is not CUDA order, so an index is resolved once, by PCI
//! bus id, and a device is its UUID from then on.

use std::fmt;

/// Where a model may run.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Devices {
    /// On GPUs, the planner chooses which.
    Auto,
    /// On GPUs if there are any, else on the CPU.
    AutoElseCpu,
    /// On the CPU.
    Cpu,
    /// On these GPUs; at least one, none twice.
    These(Vec<DeviceSelector>),
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceSelector {
    /// By UUID (`GPU-...`, `MIG-...`, `SIM-...`) or a prefix of it.
    Uuid(String),
    /// By PCI bus id.
    Pci(PciBusId),
    /// By its place in the order of PCI bus ids.
    Index(u32),
}

/// Why a selector does not say which device is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// No device is it.
    #[error("no device is it")]
    None,
    /// A prefix that several UUIDs have.
    #[error("{0} devices have this prefix")]
    Ambiguous(usize),
}

impl DeviceSelector {
    /// The place in `devices` (UUID and PCI bus id, in the order of PCI bus ids) of the device that is meant. A whole
    /// UUID is meant before a prefix; case does not matter.
    ///
    /// # Errors
    /// [`SelectError`] if it is none of them, or could be several.
    pub fn find(&self, devices: &[(&str, Option<PciBusId>)]) -> Result<usize, SelectError> {
        let wanted = match self {
            Self::Index(index) => {
                return usize::try_from(*index).ok().filter(|index| *index < devices.len()).ok_or(SelectError::None);
            }
            Self::Pci(id) => {
                return devices.iter().position(|(_, found)| *found == Some(*id)).ok_or(SelectError::None);
            }
            Self::Uuid(uuid) => uuid.to_ascii_lowercase(),
        };
        if let Some(index) = devices.iter().position(|(uuid, _)| uuid.eq_ignore_ascii_case(&wanted)) {
            return Ok(index);
        }
        let prefixed: Vec<usize> =
            (0..devices.len()).filter(|index| devices[*index].0.to_ascii_lowercase().starts_with(&wanted)).collect();
        match prefixed.as_slice() {
            [only] => Ok(*only),
            [] => Err(SelectError::None),
            several => Err(SelectError::Ambiguous(several.len())),
        }
    }
}

impl fmt::Display for DeviceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => f.write_str(uuid),
            Self::Pci(id) => id.fmt(f),
            Self::Index(index) => index.fmt(f),
        }
    }
}

/// A PCI bus id. NVML writes `00000000:3B:00.0`, lspci `3b:00.0`; they are equal here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciBusId {
    /// Domain.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device.
    pub device: u8,
    /// Function.
    pub function: u8,
}

impl PciBusId {
    /// Reads `[domain:]bus:device.function`, hexadecimal. `None` if it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, function) = text.rsplit_once('.')?;
        let (rest, device) = rest.rsplit_once(':')?;
        let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
        let hex = |digits: &str, len: usize| {
            let plain = !digits.is_empty() && digits.len() <= len && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
        };
        let id = Self {
            domain: hex(domain, 8)?,
            bus: u8::try_from(hex(bus, 2)?).ok()?,
            device: u8::try_from(hex(device, 2)?).ok()?,
            function: u8::try_from(hex(function, 1)?).ok()?,
        };
        (id.device < 32 && id.function < 8).then_some(id)
    }
}

impl fmt::Display for PciBusId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}:{:02X}:{:02X}.{:X}", self.domain, self.bus, self.device, self.function)
    }
}

/// Whether `text` has the form of a device's UUID or of a prefix of one.
pub(crate) fn is_uuid(text: &str) -> bool {
    let prefix = ["GPU-", "MIG-", "SIM-"].iter().any(|prefix| text.starts_with(prefix));
    prefix
        && text.len() > 4
        && text.len() <= 96
        && text[4..].bytes().all(|b| b.is_ascii_alphanumeric() || b"-/".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_uuid_is_meant_before_a_prefix() {
        let pci = PciBusId::parse("3b:00.0");
        let devices = [("SIM-1", None), ("SIM-10", pci), ("SIM-2", None)];
        let find = |selector: DeviceSelector| selector.find(&devices);
        assert_eq!(find(DeviceSelector::Uuid("sim-1".into())), Ok(0));
        assert_eq!(find(DeviceSelector::Uuid("SIM-10".into())), Ok(1));
        assert_eq!(find(DeviceSelector::Uuid("SIM-".into())), Err(SelectError::Ambiguous(3)));
        assert_eq!(find(DeviceSelector::Uuid("GPU-1".into())), Err(SelectError::None));
        assert_eq!(find(DeviceSelector::Index(2)), Ok(2));
        assert_eq!(find(DeviceSelector::Index(3)), Err(SelectError::None));
        assert_eq!(find(DeviceSelector::Pci(pci.expect("good"))), Ok(1));
    }

    #[test]
    fn pci_bus_ids_are_equal_however_written() {
        let id = PciBusId::parse("00000000:3B:00.0").expect("as NVML writes it");
        assert_eq!(PciBusId::parse("3b:00.0"), Some(id));
        assert_eq!(PciBusId::parse("0000:3b:00.0"), Some(id));
        assert_eq!(id.to_string(), "00000000:3B:00.0");
        for bad in ["", "3b", "3b:00", "3b:00.8", "3b:20.0", "xx:00.0", ":3b:00.0", "+3:00.0", "1:2:3:4.5", "3b:00.0 "]
        {
            assert_eq!(PciBusId::parse(bad), None, "{bad}");
        }
    }
}
