//! The house: everything wired together. A program opens it from a configuration, asks it for models, and stops it.
//!
//! ```text
//! Config ─ cards (files' headers) ─ plan (what goes where) ─ tree (actors) ─ workers (processes or threads)
//!                                                              │
//!                                     Client: models by name ──┘        admin socket, signals, notify: beside it
//! ```
//!
//! The host never initialises CUDA: a fault on a GPU poisons the process that uses it, on every GPU. Workers do.

pub mod admin;
mod error;
pub mod front;
pub mod notify;
pub mod nvml;
pub mod planning;
mod reloads;
mod restart_needed;
pub mod service;
pub mod signals;
mod target;
pub mod telemetry;

pub use admin::{Reloaded, Restarted};
pub use error::{NoSuchTarget, NotReady, OpenError, PlanError, ReloadError};

use crate::client::{Catalog, Client, ModelHandle};
use crate::worker::Workers;
use arc_swap::ArcSwap;
use nvml::NvmlInventory;
use planning::{Running, Sizes, plan, read_cards};
use playhouse_actors::inventory::{Device, Inventory, InventoryError};
use playhouse_actors::link::WorkerFactory;
use playhouse_actors::messages::{HouseEvent, HouseStatus, Phase, ReplicaStatus};
use playhouse_actors::policy::placement::Plan;
use playhouse_actors::sim::SimInventory;
use playhouse_actors::{Drained, HouseArgs, HouseHandle, Refusal};
use playhouse_config::{Config, Overrides};
use restart_needed::restart_needed;
use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use target::find_device;
use tokio::sync::broadcast;

/// How often [`Playhouse::ready`] looks when nothing happens.
const LOOK: Duration = Duration::from_secs(1);

/// What a house is opened with besides its configuration.
#[derive(Default)]
pub struct Parts {
    /// The program that `playhouse worker` is started from. Without it, this one: a host application that is not the
    /// `playhouse` binary calls [`crate::worker::run_if_worker`] first in its `main`.
    pub worker_exe: Option<PathBuf>,
    /// Starts workers; without it, processes and threads as the configuration says.
    pub factory: Option<Arc<dyn WorkerFactory>>,
    /// Finds devices; without it, NVML, or the configuration's simulated devices.
    pub inventory: Option<Box<dyn Inventory>>,
    /// What outranks the configuration file when it is read again.
    pub overrides: Overrides,
}

/// A running house. Cheap to clone; it runs until [`Playhouse::stop`], or until its supervisor gives up.
#[derive(Clone)]
pub struct Playhouse {
    client: Client,
    shared: Arc<Shared>,
}

struct Shared {
    catalog: Arc<ArcSwap<Catalog>>,
    now: Mutex<Now>,
    /// What the models need. Changed under `reloading` alone.
    sizes: Mutex<Sizes>,
    overrides: Overrides,
    /// One change at a time.
    reloading: tokio::sync::Mutex<()>,
    ended: tokio::sync::watch::Receiver<bool>,
}

#[derive(Clone)]
struct Now {
    /// As it was read.
    config: Config,
    /// Models that were put out by hand and stay out until they are asked for again.
    unwanted: BTreeSet<String>,
    plan: Plan,
}

impl Now {
    /// The configuration as it is to run.
    fn wanted(&self) -> Config {
        without(&self.config, &self.unwanted)
    }
}

fn without(config: &Config, unwanted: &BTreeSet<String>) -> Config {
    let mut config = config.clone();
    config.models.retain(|model| !unwanted.contains(&model.name));
    config
}

impl std::fmt::Debug for Playhouse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Playhouse").field("models", &self.client.catalog()).finish_non_exhaustive()
    }
}

impl Playhouse {
    /// Opens a house. Returns when the plan is made and the supervision tree runs; models load in the background,
    /// [`Playhouse::ready`] waits for them. Needs a tokio runtime, which must live as long as the house.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left running.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        Self::open_with(config, Parts::default()).await
    }

    /// Opens a house made of these parts.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is left running.
    pub async fn open_with(config: Config, parts: Parts) -> Result<Self, OpenError> {
        let inventory = parts.inventory.unwrap_or_else(|| inventory_of(&config));
        let Prepared { catalog, plan, sizes, inventory } = prepare(config.clone(), inventory).await?;
        let catalog = Arc::new(ArcSwap::from_pointee(catalog));
        let args = HouseArgs {
            config: config.clone(),
            plan: plan.clone(),
            factory: parts.factory.unwrap_or_else(|| Arc::new(Workers::new(parts.worker_exe))),
            inventory,
            // The jitter of restarts: boxes that fail together should not restart together.
            seed: std::hash::RandomState::new().build_hasher().finish(),
        };
        let (tree, join) = HouseHandle::start(args).await?;
        let (over, ended) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            // However the root actor ended: nothing runs any more.
            let _ = join.await;
            let _ = over.send(true);
        });
        let shared = Shared {
            catalog: catalog.clone(),
            now: Mutex::new(Now { config, unwanted: BTreeSet::new(), plan }),
            sizes: Mutex::new(sizes),
            overrides: parts.overrides,
            reloading: tokio::sync::Mutex::default(),
            ended,
        };
        Ok(Self { client: Client::new(tree, catalog), shared: Arc::new(shared) })
    }

    /// What front ends hold: the models and the tree.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A model by name or alias.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`].
    pub fn model(&self, name: &str) -> Result<ModelHandle, Refusal> {
        self.client.model(name)
    }

    /// The supervision tree, for raw messages.
    pub fn tree(&self) -> &HouseHandle {
        self.client.tree()
    }

    /// The configuration in force.
    pub fn config(&self) -> Config {
        self.now().config
    }

    /// What goes where.
    pub fn plan(&self) -> Plan {
        self.now().plan
    }

    fn now(&self) -> Now {
        // Whoever panicked while holding it had not begun to write: assignments of whole values cannot be half done.
        self.shared.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until every required model has a ready replica.
    ///
    /// # Errors
    /// [`NotReady`] when that will not happen by itself.
    pub async fn ready(&self) -> Result<(), NotReady> {
        let mut events = self.events();
        loop {
            let status = self.status().await.ok_or(NotReady::Ended)?;
            if status.is_ready() {
                return Ok(());
            }
            if let Some((model, why)) = self.hopeless(&status) {
                return Err(NotReady::Model { model, why });
            }
            // News, or a while without any: look again.
            let _ = tokio::time::timeout(LOOK, events.recv()).await;
        }
    }

    /// A required model of which no replica can become ready, with the reason of one.
    fn hopeless(&self, status: &HouseStatus) -> Option<(String, String)> {
        let is_lost =
            |replica: &&ReplicaStatus| matches!(replica.phase, Phase::Quarantined | Phase::Failed | Phase::Stopped);
        self.now().wanted().models.iter().filter(|model| model.required).find_map(|model| {
            let all: Vec<&ReplicaStatus> = status.replicas().filter(|it| it.replica.model == model.name).collect();
            let lost = all.iter().copied().filter(is_lost).count();
            let why = |replica: &ReplicaStatus| match &replica.last_end {
                Some(end) => format!("{}: {end}", replica.replica),
                None => format!("{} is {}", replica.replica, replica.phase),
            };
            (!all.is_empty() && lost == all.len()).then(|| (model.name.clone(), why(all[0])))
        })
    }

    /// How everything is; `None` once the house has ended.
    pub async fn status(&self) -> Option<HouseStatus> {
        self.tree().status().await
    }

    /// The devices now.
    pub async fn devices(&self) -> Vec<Device> {
        self.tree().devices().await
    }

    /// News from now on. A listener that is too slow loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<HouseEvent> {
        self.tree().listen()
    }

    /// Goes over to another configuration, stopping and starting as little as possible: models that stay as they are keep
    /// their workers, KV and streams.
    ///
    /// # Errors
    /// [`ReloadError`]; everything goes on as it was.
    pub async fn reload(&self, config: Config, dry_run: bool) -> Result<Reloaded, ReloadError> {
        let _one_at_a_time = self.shared.reloading.lock().await;
        let unwanted = self.now().unwanted;
        self.go_over(config, unwanted, dry_run).await
    }

    /// Models that were put out by hand.
    pub fn unwanted(&self) -> BTreeSet<String> {
        self.now().unwanted
    }

    /// Puts a configured model out, or takes it in again. It stays so until this is called again, whatever is reloaded.
    ///
    /// # Errors
    /// [`ReloadError`]; everything goes on as it was.
    pub async fn set_wanted(&self, model: &str, wanted: bool) -> Result<Reloaded, ReloadError> {
        let _one_at_a_time = self.shared.reloading.lock().await;
        let Now { config, mut unwanted, .. } = self.now();
        if wanted {
            unwanted.remove(model)
        } else {
            unwanted.insert(model.to_owned())
        };
        self.go_over(config, unwanted, false).await
    }

    async fn go_over(&self, full: Config, unwanted: BTreeSet<String>, dry_run: bool) -> Result<Reloaded, ReloadError> {
        let now = self.now();
        let (old, old_plan, config) = (now.wanted(), now.plan, without(&full, &unwanted));
        let status = self.status().await.ok_or(ReloadError::Ended)?;
        let devices = self.devices().await;
        let running = Running::of(&status, &old_plan, &devices);
        let known = self.shared.catalog.load_full();
        let (wanted, same) = (config.clone(), old.clone());
        let shared = self.shared.clone();
        let prepared = tokio::task::spawn_blocking(move || {
            let catalog = read_cards(&wanted, &known, &same)?;
            // Whoever panicked in here left sizes that are right, if fewer.
            let mut sizes = shared.sizes.lock().unwrap_or_else(PoisonError::into_inner);
            let plan = plan(&wanted, &catalog, &devices, &running, &mut sizes)?;
            Ok::<_, PlanError>((catalog, plan))
        });
        let (catalog, plan) = prepared.await.map_err(|_| ReloadError::Ended)??;
        let restart_needed = restart_needed(&old, &config);
        if dry_run {
            let applied = self.tree().preview(config, plan.clone()).await.ok_or(ReloadError::Ended)?;
            return Ok(Reloaded { applied, plan, restart_needed });
        }
        let applied = self.tree().apply(config.clone(), plan.clone()).await.ok_or(ReloadError::Ended)?;
        self.shared.catalog.store(Arc::new(catalog));
        *self.shared.now.lock().unwrap_or_else(PoisonError::into_inner) =
            Now { config: full, unwanted, plan: plan.clone() };
        Ok(Reloaded { applied, plan, restart_needed })
    }

    /// Reads the configuration file again and goes over to it.
    ///
    /// # Errors
    /// [`ReloadError`]; everything goes on as it was.
    pub async fn reload_file(&self, dry_run: bool) -> Result<Reloaded, ReloadError> {
        let path = self.config().path.ok_or(ReloadError::NoFile)?;
        let shared = self.shared.clone();
        // A file can take its time: on a network, or if it is none.
        let reading = tokio::task::spawn_blocking(move || Config::open(Some(&path), &shared.overrides));
        let config = reading.await.map_err(|_| ReloadError::Ended)??;
        self.reload(config, dry_run).await
    }

    /// Ends the workers of a model (by name or alias) or of a device (by UUID, PCI bus id or index) and starts others; takes
    /// a quarantined device back.
    ///
    /// # Errors
    /// [`NoSuchTarget`].
    pub async fn restart(&self, target: &str) -> Result<Restarted, NoSuchTarget> {
        if let Ok(model) = self.model(target) {
            let model = model.card().name.clone();
            let replicas = self.tree().restart_model(&model).await;
            return Ok(Restarted::Model { model, replicas });
        }
        let devices = self.devices().await;
        if let Some(device) = find_device(target, &devices)
            && self.tree().restart_device(&device).await
        {
            return Ok(Restarted::Device { device });
        }
        let models = self.client.catalog().cards().map(|card| card.name.clone()).collect::<Vec<_>>();
        let devices = self.plan().devices.into_iter().map(|device| device.device.to_string());
        let targets = models.into_iter().chain(devices).collect::<Vec<_>>().join(", ");
        Err(NoSuchTarget { target: target.to_owned(), targets })
    }

    /// Takes no more requests and waits until the open ones have ended, or ends them when the time is up. The house goes on,
    /// and takes no requests, until it is stopped or [`Playhouse::undrain`] is called.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.tree().drain(deadline).await
    }

    /// Takes requests again after a drain, or in the middle of one, whose streams then go on. Whether there was one.
    pub async fn undrain(&self) -> bool {
        self.tree().undrain().await
    }

    /// Ends the house: every worker is gone when this returns.
    pub async fn stop(&self) {
        self.tree().stop().await;
        self.ended().await;
    }

    /// Waits until the house has ended: it was stopped, or its supervisor gave up.
    pub async fn ended(&self) {
        let mut ended = self.shared.ended.clone();
        // A sender that is gone has ended, too.
        let _ = ended.wait_for(|over| *over).await;
    }
}

/// The devices that a configuration means: simulated ones if it has any, else the real ones.
pub fn inventory_of(config: &Config) -> Box<dyn Inventory> {
    if config.simulate.is_empty() {
        return Box::new(NvmlInventory::new());
    }
    Box::new(SimInventory::new(config.simulate.clone()).0)
}

/// What a house is opened with when nothing is wrong.
struct Prepared {
    catalog: Catalog,
    plan: Plan,
    sizes: Sizes,
    inventory: Box<dyn Inventory>,
}

/// Everything that can be wrong is found here, before anything is started.
async fn prepare(config: Config, mut inventory: Box<dyn Inventory>) -> Result<Prepared, PlanError> {
    let prepared = tokio::task::spawn_blocking(move || {
        let devices = inventory.devices()?;
        let catalog = read_cards(&config, &Catalog::default(), &Config::default())?;
        let mut sizes = Sizes::default();
        let plan = plan(&config, &catalog, &devices, &Running::default(), &mut sizes)?;
        Ok(Prepared { catalog, plan, sizes, inventory })
    });
    let lost = |error: tokio::task::JoinError| InventoryError::Call {
        call: "reading the models".into(),
        detail: error.to_string(),
    };
    prepared.await.map_err(lost)?
}
