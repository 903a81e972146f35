//! `playhouse devices`: the GPUs of this box, or those that a configuration simulates; with or without a host.

use std::fmt::Write as _;
use std::path::PathBuf;

use playhouse_actors::inventory::{Device, Inventory, InventoryError};
use playhouse_actors::sim::SimInventory;
use playhouse_config::{Config, Overrides};
use serde_json::json;

use super::{CliError, Exit, RunCommand, show};
use crate::host::nvml::NvmlInventory;

/// The arguments of `devices`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// List the devices that this configuration means: with `[[simulate.device]]`, those
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let config = match &self.config {
            Some(path) => Config::open(Some(path), &Overrides::from_process_env())?,
            None => Config::default(),
        };
        let listed = list(&config).map_err(|error| CliError::new(Exit::NoDevice, error))?;
        match () {
            () if self.json => super::print_json(&json!({ "devices": listed.devices, "why_none": listed.why_none })),
            () => super::print(&listed.report()),
        }
    }
}

/// The devices, or why there are none.
struct Listed {
    devices: Vec<Device>,
    why_none: Option<String>,
}

fn list(config: &Config) -> Result<Listed, InventoryError> {
    if !config.simulate.is_empty() {
        let devices = SimInventory::new(config.simulate.clone()).0.devices()?;
        return Ok(Listed { devices, why_none: None });
    }
    let mut nvml = NvmlInventory::new();
    let devices = nvml.devices()?;
    let why_none = devices.is_empty().then(|| match (nvml.absent(), std::env::var_os("CUDA_VISIBLE_DEVICES")) {
        (Some(why), _) => format!("NVML is not here ({why})"),
        (None, Some(list)) => format!("the driver shows none, with CUDA_VISIBLE_DEVICES={}", list.to_string_lossy()),
        (None, None) => "the driver is here and shows none".to_owned(),
    });
    Ok(Listed { devices, why_none })
}

impl Listed {
    fn report(&self) -> String {
        const HEADINGS: &[&str] = &[" INDEX", "UUID", "PCI", "NAME", " MEMORY", " USED", " UTIL", " TEMP", " POWER"];
        if let Some(why) = &self.why_none {
            return format!("no GPUs: {why}\n");
        }
        let rows: Vec<Vec<String>> =
            self.devices.iter().enumerate().map(|(index, device)| row(index, device)).collect();
        let mut text = show::table(HEADINGS, &rows);
        for device in &self.devices {
            for remark in remarks(device) {
                // Writing to a String does not fail.
                let _ = writeln!(text, "{}: {remark}", device.uuid);
            }
        }
        text
    }
}

fn row(index: usize, device: &Device) -> Vec<String> {
    let number = |value: Option<u32>, unit: &str| value.map_or("-".to_owned(), |value| format!("{value}{unit}"));
    vec![
        index.to_string(),
        device.uuid.clone(),
        device.pci_bus_id.clone().unwrap_or_else(|| "-".to_owned()),
        device.name.clone(),
        show::gib(device.total_bytes),
        show::gib(device.used_bytes),
        number(device.utilization_percent, "%"),
        number(device.temperature_c, "C"),
        number(device.power_mw.map(|milliwatts| milliwatts / 1000), "W"),
    ]
}

/// What an operator should know of a card beside its numbers.
fn remarks(device: &Device) -> Vec<String> {
    let mut remarks = Vec::new();
    if !device.throttle_reasons.is_empty() {
        remarks.push(format!("clocks are lowered: {}", device.throttle_reasons.join(", ")));
    }
    if let Some(ecc) = device.ecc.filter(|ecc| ecc.uncorrected > 0) {
        remarks.push(format!("{} memory errors that were not mended", ecc.uncorrected));
    }
    if let Some(remap) = device.row_remap {
        if remap.failed {
            remarks.push("replacing a row of memory failed: the card needs service".to_owned());
        } else if remap.pending {
            remarks.push("a replaced row of memory waits for a reset".to_owned());
        }
    }
    if device.mig_enabled == Some(true) {
        remarks.push("split into MIG instances, which are not used".to_owned());
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::inventory::{Ecc, RowRemap};

    #[test]
    fn what_is_wrong_with_a_card_is_said_below_the_table() {
        let well = Device { uuid: "GPU-1".into(), ecc: Some(Ecc::default()), ..Device::default() };
        assert_eq!(remarks(&well), [""; 0]);
        let ill = Device {
            throttle_reasons: vec!["sw_thermal_slowdown".into()],
            ecc: Some(Ecc { corrected: 9, uncorrected: 2 }),
            row_remap: Some(RowRemap { pending: true, ..RowRemap::default() }),
            mig_enabled: Some(true),
            ..well
        };
        let listed = Listed { devices: vec![ill], why_none: None };
        let report = listed.report();
        assert_eq!(report.lines().skip(2).count(), 4, "{report}");
        assert!(report.contains("GPU-1: clocks are lowered: sw_thermal_slowdown\n"), "{report}");
    }
}
