//! `playhouse plan`: what would go where, without starting anything or touching a GPU.

use super::error::gguf_exit;
use super::{CliError, Exit, RunCommand, print, print_json};
use crate::client::{CardError, Catalog};
use crate::host::planning::{Running, Sizes, plan, read_cards};
use crate::host::{PlanError, inventory_of};
use playhouse_actors::policy::placement::{DevicePlan, Plan};
use playhouse_config::units::Bytes;
use playhouse_config::{Config, Overrides};
use std::fmt::Write;
use std::path::PathBuf;

/// The flags of `plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The configuration; without one, what `serve` does without one
    #[arg(value_name = "CONFIG")]
    config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let config = Config::open(self.config.as_deref(), &Overrides::from_process_env())?;
        let devices = inventory_of(&config).devices().map_err(PlanError::from)?;
        let catalog = read_cards(&config, &Catalog::default(), &Config::default())?;
        let plan = plan(&config, &catalog, &devices, &Running::default(), &mut Sizes::default())?;
        if self.json { print_json(&plan) } else { print(&table(&plan)) }
    }
}

/// The plan as a person reads it.
fn table(plan: &Plan) -> String {
    plan.devices.iter().map(device_table).collect::<Vec<_>>().join("\n")
}

fn device_table(device: &DevicePlan) -> String {
    let mut text = String::new();
    let foreign = match device.foreign_bytes {
        0 => String::new(),
        bytes => format!(", {} in use by others", Bytes(bytes)),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{} ({}): {}{foreign}", device.device, device.name, Bytes(device.total_bytes));
    let _ = writeln!(
        text,
        "  {:24} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "replica", "weights", "KV", "scratch", "context", "in all", "limit"
    );
    for placement in &device.placements {
        let columns = [
            placement.weights_bytes,
            placement.kv_bytes,
            placement.scratch_bytes,
            placement.context_bytes,
            placement.total_bytes(),
        ];
        let mut columns: Vec<String> = columns.iter().map(|bytes| Bytes(*bytes).to_string()).collect();
        columns.push(placement.limit_bytes.map_or_else(|| "-".into(), |bytes| Bytes(bytes).to_string()));
        let columns: Vec<String> = columns.iter().map(|text| format!("{text:>10}")).collect();
        let replica = format!("{}/{}", placement.model, placement.replica);
        let _ = writeln!(text, "  {replica:24} {}", columns.join(" "));
    }
    if device.placements.is_empty() {
        let _ = writeln!(text, "  nothing");
    }
    let _ = writeln!(text, "  {:24} {:>54}", "headroom", Bytes(device.headroom_bytes).to_string());
    text
}

impl From<PlanError> for CliError {
    fn from(error: PlanError) -> Self {
        let exit = match &error {
            PlanError::Model { source, .. } => card_exit(source),
            PlanError::Settings { .. } | PlanError::Placement(_) => Exit::BadConfig,
            PlanError::Inventory(_) => Exit::NoDevice,
        };
        Self::new(exit, error)
    }
}

fn card_exit(error: &CardError) -> Exit {
    match error {
        CardError::File(error) => gguf_exit(error),
        CardError::Model(_) | CardError::Text(_) | CardError::Template(_) | CardError::NotEmbedded(_) => Exit::BadModel,
    }
}
