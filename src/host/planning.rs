//! From a configuration and the devices of this box to a plan: what `serve` starts and `plan` prints.
//!
//! Sizes come from the models' files, memory from NVML; nothing is allocated and no GPU is touched.

use super::error::PlanError;
use crate::client::{Catalog, ModelCard};
use crate::source;
use crate::worker::sizing;
use playhouse_actors::inventory::{Device, DeviceId};
use playhouse_actors::messages::HouseStatus;
use playhouse_actors::policy::placement::{Card, Demand, Plan, Wanted, place};
use playhouse_config::{Config, Devices, Model, PciBusId};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Reads the files of all models of a configuration; cards of models that are the same in `known` are taken from there.
///
/// # Errors
/// [`PlanError::Model`] for the first that cannot be served.
pub fn read_cards(config: &Config, known: &Catalog, same: &Config) -> Result<Catalog, PlanError> {
    let mut cards = Vec::new();
    for model in &config.models {
        let is_same = |old: &&Model| {
            (&old.name, &old.source, &old.aliases, old.context)
                == (&model.name, &model.source, &model.aliases, model.context)
        };
        let old = same.models.iter().find(is_same).and_then(|old| known.get(&old.name));
        let card = match old {
            Some(card) => card.clone(),
            None => Arc::new(ModelCard::read(model).map_err(|source| PlanError::Model {
                model: model.name.clone(),
                source_of: model.source.to_string(),
                source: Box::new(source),
            })?),
        };
        cards.push(card);
    }
    Ok(Catalog::new(cards))
}

/// What runs now, as a new plan must take it into account.
#[derive(Debug, Clone, Default)]
pub struct Running {
    /// By model: on which device, with how many bytes for KV.
    pub placed: BTreeMap<String, Vec<(DeviceId, u64)>>,
    /// Bytes that our own workers hold on each device.
    pub own_bytes: HashMap<DeviceId, u64>,
}

impl Running {
    /// What a tree's status and plan say. A GPU's driver knows best what a process holds; where it does not tell, the
    /// plan does.
    pub fn of(status: &HouseStatus, plan: &Plan, devices: &[Device]) -> Self {
        let mut running = Self::default();
        for device in &status.devices {
            for replica in device.replicas.iter() {
                let model = replica.replica.model.clone();
                running.placed.entry(model).or_default().push((device.device.clone(), replica.kv_bytes));
            }
            let planned = || {
                let here = plan.devices.iter().filter(|planned| planned.device == device.device);
                here.flat_map(|planned| &planned.placements).map(|placement| placement.total_bytes()).sum()
            };
            let pids: Vec<u32> = device.replicas.iter().filter_map(|replica| replica.pid).collect();
            let card = devices.iter().find(|card| card.uuid == device.device.as_str());
            let told = card.and_then(|card| {
                let ours = card.processes.iter().filter(|process| pids.contains(&process.pid));
                ours.map(|process| process.used_bytes).sum::<Option<u64>>()
            });
            running.own_bytes.insert(device.device.clone(), told.unwrap_or_else(planned));
        }
        running
    }
}

/// What models need, as found out before: sizes on a GPU are read from the file, which need not be opened again while the
/// model's card and settings are the same.
#[derive(Debug, Clone, Default)]
pub struct Sizes(BTreeMap<String, Size>);

#[derive(Debug, Clone)]
struct Size {
    card: Arc<ModelCard>,
    config: Model,
    is_on_gpu: bool,
    demand: Demand,
}

impl Sizes {
    fn known(&self, config: &Model, card: &Arc<ModelCard>, is_on_gpu: bool) -> Option<Demand> {
        let sized = self.0.get(&config.name)?;
        let is_same = Arc::ptr_eq(&sized.card, card) && sized.config == *config && sized.is_on_gpu == is_on_gpu;
        is_same.then_some(sized.demand)
    }

    fn demand(&mut self, config: &Model, card: &Arc<ModelCard>, is_on_gpu: bool) -> Result<Demand, Unsized> {
        if let Some(known) = self.known(config, card, is_on_gpu) {
            return Ok(known);
        }
        let demand = demand(config, card, is_on_gpu)?;
        let sized = Size { card: card.clone(), config: config.clone(), is_on_gpu, demand };
        self.0.insert(config.name.clone(), sized);
        Ok(demand)
    }
}

/// Makes the plan. On simulated devices nothing is ever taken, so what is free there is free for us.
///
/// # Errors
/// [`PlanError`].
pub fn plan(
    config: &Config,
    catalog: &Catalog,
    devices: &[Device],
    running: &Running,
    sizes: &mut Sizes,
) -> Result<Plan, PlanError> {
    let simulated = !config.simulate.is_empty();
    let cards: Vec<Card> = devices
        .iter()
        .map(|device| {
            let id = DeviceId::gpu(device.uuid.clone());
            let own = if simulated { 0 } else { running.own_bytes.get(&id).copied().unwrap_or(0) };
            Card {
                id,
                name: device.name.clone(),
                pci: device.pci_bus_id.as_deref().and_then(PciBusId::parse),
                total_bytes: device.total_bytes,
                free_bytes: device.free_bytes.saturating_add(own).min(device.total_bytes),
            }
        })
        .collect();
    let mut wanted = Vec::new();
    for model in &config.models {
        let card = catalog.get(&model.name).expect("the catalog was made from this configuration");
        let is_on_gpu = !simulated && !devices.is_empty() && model.devices != Devices::Cpu;
        let demand = sizes.demand(model, card, is_on_gpu).map_err(|error| error.of(model))?;
        wanted.push(Wanted {
            name: model.name.clone(),
            devices: model.devices.clone(),
            replicas: model.replicas,
            priority: model.priority,
            kv_budget_bytes: model.kv_budget_bytes,
            memory_limit: model.memory_limit,
            demand,
            current: running.placed.get(&model.name).cloned().unwrap_or_default(),
        });
    }
    Ok(place(&wanted, &cards, &cpu_card())?)
}

/// Why it is not known what a model needs.
#[derive(Debug, thiserror::Error)]
enum Unsized {
    #[error(transparent)]
    Settings(#[from] sizing::SizingError),
    #[error(transparent)]
    File(#[from] source::SourceError),
}

impl Unsized {
    fn of(self, model: &Model) -> PlanError {
        let name = model.name.clone();
        match self {
            Self::Settings(error) => PlanError::Settings { model: name, why: error.to_string() },
            Self::File(error) => {
                PlanError::Model { model: name, source_of: model.source.to_string(), source: Box::new(error.into()) }
            }
        }
    }
}

/// On the CPU, and on devices that are not there, the CPU's engine takes what the file takes.
fn demand(model: &Model, card: &ModelCard, is_on_gpu: bool) -> Result<Demand, Unsized> {
    if !is_on_gpu {
        return Ok(sizing::demand(model, &card.spec)?);
    }
    Ok(sizing::demand_on_gpu(model, &card.spec, &source::open(&model.source)?)?)
}

/// The host's memory as a card. What is available there can be lent to workers.
fn cpu_card() -> Card {
    let (total, available) = host_memory();
    Card { id: DeviceId::cpu(), name: "CPU".into(), pci: None, total_bytes: total, free_bytes: available }
}

/// Bytes of memory in all and available, from `/proc/meminfo`. Where there is no such file, or it does not tell, the
/// host is not a limit: the operating system will say so when memory runs out.
fn host_memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    match (field("MemTotal"), field("MemAvailable")) {
        (Some(total), Some(available)) => (total, available),
        _ => (u64::MAX, u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_out_again_only_for_what_changed() {
        let config = Config::default();
        let catalog = read_cards(&config, &Catalog::default(), &Config::default()).expect("the embedded model");
        let (model, mut sizes) = (&config.models[0], Sizes::default());
        let card = catalog.get(&model.name).expect("there");
        let demand = sizes.demand(model, card, true).expect("it can be sized");
        assert_eq!(sizes.known(model, card, true), Some(demand));
        assert_eq!(sizes.known(model, card, false), None, "another backend has other sizes");
        assert_eq!(sizes.known(&Model { context: Some(64), ..model.clone() }, card, true), None);
        let read_again = read_cards(&config, &Catalog::default(), &Config::default()).expect("the embedded model");
        assert_eq!(sizes.known(model, read_again.get(&model.name).expect("there"), true), None, "another file");
    }

    #[test]
    fn the_host_has_memory() {
        let (total, available) = host_memory();
        assert!(0 < available && available <= total);
    }
}
