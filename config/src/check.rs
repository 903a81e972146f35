//! Judges the raw configuration. Goes on after a problem, so that one run reports all of them. `host` judges `[host]`.

mod host;

use crate::checked::{
    Backoff, Config, EMBEDDED, MemoryLimit, Model, ModelSource, Replicas, SimulatedDevice, Supervision,
};
use crate::device::{DeviceSelector, Devices, PciBusId, is_uuid};
use crate::error::{ConfigError, Report, did_you_mean};
use crate::overrides::Overrides;
use crate::raw::{
    RawBackoff, RawBudget, RawConfig, RawDefaults, RawDevice, RawDevices, RawDuration, RawLimit, RawModel, RawReplicas,
    RawSimulatedDevice, RawSupervision,
};
use crate::source::At;
use crate::units::{Bytes, UnitError, parse_duration, parse_size};
use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::path::Path;
use std::time::Duration;

/// Longest name of a model or an alias.
const NAME_CHARS_MAX: usize = 128;

/// Reads and checks a text; relative paths are taken from `folder`.
pub(crate) fn check(label: &str, text: &str, folder: &Path, overrides: &Overrides) -> Result<Config, ConfigError> {
    let (raw, report) = crate::tree::read(label, text, overrides);
    let Some(raw) = raw else { return report.finish(None) };
    let mut checker = Checker { report };
    let config = checker.config(&raw, folder);
    checker.report.finish(Some(config))
}

/// Copies the settings that are set in `$raw` (a model or `[defaults]`, two types with the same keys) into `$model`.
macro_rules! apply_settings {
    ($self:ident, $raw:ident, $model:ident) => {
        if let Some(devices) = &$raw.devices {
            $model.devices = $self.devices(devices).unwrap_or($model.devices);
        }
        if let Some(context) = &$raw.context {
            $model.context = Some($self.number(&$raw.context, *context.value(), 1..=1 << 30));
        }
        $model.max_sequences = $self.number(&$raw.max_sequences, $model.max_sequences, 1..=65_536);
        $model.max_batch_tokens = $self.number(&$raw.max_batch_tokens, $model.max_batch_tokens, 1..=1 << 20);
        if let Some(budget) = &$raw.kv_budget {
            $model.kv_budget_bytes = $self.kv_budget(budget);
        }
        if let Some(limit) = &$raw.memory_limit {
            $model.memory_limit = $self.memory_limit(limit);
        }
        if let Some(word) = &$raw.kv_type {
            $model.kv_type = *word.value();
        }
        if let Some(word) = &$raw.isolation {
            $model.isolation = *word.value();
        }
        if let Some(priority) = &$raw.priority {
            $model.priority = *priority.value();
        }
        if let Some(required) = &$raw.required {
            $model.required = *required.value();
        }
        if $model.max_batch_tokens < $model.max_sequences {
            let either = $raw.max_batch_tokens.as_ref().or($raw.max_sequences.as_ref()).map(At::span);
            if let Some(span) = either {
                let message = format!(
                    "`max_batch_tokens` ({}) is less than `max_sequences` ({}): a step could not decode them all",
                    $model.max_batch_tokens, $model.max_sequences
                );
                $self.report.add(span, message);
            }
        }
    };
}

struct Checker {
    report: Report,
}

impl Checker {
    fn config(&mut self, raw: &RawConfig, folder: &Path) -> Config {
        if let Some(version) = raw.version.as_ref().filter(|version| *version.value() != 1) {
            let found = self.report.add(version.span(), format!("version {} is not known", version.value()));
            found.help = Some("this program reads version 1".into());
        }
        let host = self.host(&raw.host, folder);
        let supervision = self.supervision(&raw.supervision);
        let simulate = self.simulate(&raw.simulate.device);
        let defaults = self.defaults(&raw.defaults);
        let mut models = self.models(raw, &defaults, folder);
        self.simulated_devices_exist(raw, &simulate);
        if raw.model.is_empty() {
            let embedded = Model::embedded_default();
            let devices = raw.defaults.devices.as_ref().map_or(embedded.devices.clone(), |_| defaults.devices.clone());
            let replicas = raw.defaults.replicas.as_ref().map_or(embedded.replicas, |_| defaults.replicas);
            models = vec![Model { name: embedded.name, source: embedded.source, devices, replicas, ..defaults }];
        }
        Config { path: None, host, models, supervision, simulate }
    }

    fn supervision(&mut self, raw: &RawSupervision) -> Supervision {
        let default = Supervision::default();
        let supervision = Supervision {
            strategy: raw.strategy.as_ref().map_or(default.strategy, |word| *word.value()),
            max_restarts: self.number(&raw.max_restarts, default.max_restarts, 1..=1_000_000),
            window: self.positive(&raw.window, default.window),
            restart: raw.restart.as_ref().map_or(default.restart, |word| *word.value()),
            shutdown: self.duration(&raw.shutdown, default.shutdown),
            backoff: self.backoff(&raw.backoff),
            reset_after: self.positive(&raw.reset_after, default.reset_after),
            step_timeout: self.positive(&raw.step_timeout, default.step_timeout),
            load_timeout: self.positive(&raw.load_timeout, default.load_timeout),
            heartbeat: self.positive(&raw.heartbeat, default.heartbeat),
            poison_deaths: self.number(&raw.poison_deaths, default.poison_deaths, 1..=1000),
        };
        if supervision.step_timeout < supervision.heartbeat * 2 {
            let either = raw.step_timeout.as_ref().or(raw.heartbeat.as_ref()).map_or(0..0, At::span);
            let message = format!(
                "`step_timeout` ({:?}) is less than two times `heartbeat` ({:?}): a live worker would be killed",
                supervision.step_timeout, supervision.heartbeat
            );
            self.report.add(either, message);
        }
        supervision
    }

    fn backoff(&mut self, raw: &RawBackoff) -> Backoff {
        let default = Backoff::default();
        let min = self.duration(&raw.min, default.min);
        let max = self.duration(&raw.max, default.max);
        if min > max {
            let either = raw.min.as_ref().or(raw.max.as_ref()).map_or(0..0, At::span);
            self.report.add(either, format!("`min` ({min:?}) is more than `max` ({max:?})"));
        }
        let jitter = raw.jitter.as_ref().map_or(default.jitter, |jitter| *jitter.value());
        if let Some(at) = raw.jitter.as_ref().filter(|_| !(0.0..=1.0).contains(&jitter)) {
            self.report.add(at.span(), format!("`jitter` is {jitter}, expected 0 to 1"));
        }
        Backoff { min, max, jitter }
    }

    fn simulate(&mut self, raw: &[At<RawSimulatedDevice>]) -> Vec<SimulatedDevice> {
        let mut seen: HashMap<String, Range<usize>> = HashMap::new();
        let mut devices = Vec::new();
        for table in raw {
            let (span, raw) = (table.span(), table.value());
            let name = self.required(&raw.name, &span, "name", "[[simulate.device]]");
            let uuid = self.required(&raw.uuid, &span, "uuid", "[[simulate.device]]");
            let vram = self.required(&raw.vram, &span, "vram", "[[simulate.device]]");
            let vram_bytes = vram.and_then(|text| self.size(&text.value().0, text.span()));
            let used_bytes = raw.used.as_ref().and_then(|text| self.size(&text.value().0, text.span())).unwrap_or(0);
            if let Some(uuid) = uuid {
                if let Some(message) = not_simulated(uuid.value()) {
                    let help = "`SIM-`, then letters, digits and dashes, such as `SIM-0`";
                    self.report.add(uuid.span(), message).help = Some(help.into());
                }
                if let Some(first) = seen.insert(uuid.value().to_ascii_lowercase(), uuid.span()) {
                    let message = format!("two devices have the UUID `{}`", uuid.value());
                    self.report.add_related(uuid.span(), message, first, "first here");
                }
            }
            if let (Some(at), Some(vram)) = (raw.used.as_ref(), vram_bytes.filter(|vram| used_bytes > *vram)) {
                let message = format!("{} are used of {}", Bytes(used_bytes), Bytes(vram));
                self.report.add(at.span(), message);
            }
            if let (Some(name), Some(uuid), Some(vram_bytes)) = (name, uuid, vram_bytes) {
                let (name, uuid) = (name.value().clone(), uuid.value().clone());
                devices.push(SimulatedDevice { name, uuid, vram_bytes, used_bytes });
            }
        }
        devices
    }

    fn required<'r, T>(
        &mut self,
        value: &'r Option<At<T>>,
        table: &Range<usize>,
        key: &str,
        path: &str,
    ) -> Option<&'r At<T>> {
        if value.is_none() {
            self.report.add(table.clone(), format!("{path} needs the key `{key}`"));
        }
        value.as_ref()
    }

    fn defaults(&mut self, raw: &RawDefaults) -> Model {
        let mut model = Model::default();
        apply_settings!(self, raw, model);
        model.replicas = self.replicas(raw.replicas.as_ref(), &model.devices);
        model
    }

    fn models(&mut self, raw: &RawConfig, defaults: &Model, folder: &Path) -> Vec<Model> {
        let mut names: HashMap<String, Range<usize>> = HashMap::new();
        let replicas = raw.defaults.replicas.as_ref();
        raw.model.iter().map(|table| self.model(table, defaults, replicas, folder, &mut names)).collect()
    }

    fn model(
        &mut self,
        table: &At<RawModel>,
        defaults: &Model,
        default_replicas: Option<&At<RawReplicas>>,
        folder: &Path,
        names: &mut HashMap<String, Range<usize>>,
    ) -> Model {
        let raw = table.value();
        let mut model = defaults.clone();
        apply_settings!(self, raw, model);
        let replicas = raw.replicas.as_ref().or(default_replicas);
        model.replicas = self.replicas(replicas, &model.devices);
        if let Some(name) = self.required(&raw.name, &table.span(), "name", "[[model]]") {
            self.name(name, names);
            model.name.clone_from(name.value());
        }
        for alias in raw.aliases.iter().flatten() {
            self.name(alias, names);
            model.aliases.push(alias.value().clone());
        }
        if let Some(path) = self.required(&raw.path, &table.span(), "path", "[[model]]") {
            model.source = self.model_source(path, folder);
        }
        model
    }

    fn name(&mut self, name: &At<String>, names: &mut HashMap<String, Range<usize>>) {
        let text = name.value();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.:/@+".contains(c);
        if text.is_empty() || text.chars().count() > NAME_CHARS_MAX || !text.chars().all(allowed) {
            let help = format!("1 to {NAME_CHARS_MAX} letters, digits and characters of `-_.:/@+`");
            self.report.add(name.span(), format!("`{text}` is not a name for a model")).help = Some(help);
        }
        if let Some(first) = names.insert(text.clone(), name.span()) {
            let message = format!("two models are called `{text}`");
            self.report.add_related(name.span(), message, first, "first here");
        }
    }

    fn model_source(&mut self, path: &At<String>, folder: &Path) -> ModelSource {
        let text = path.value();
        if let Some(name) = text.strip_prefix("embedded:") {
            if !EMBEDDED.contains(&name) {
                let list = format!("the embedded models are: {}", EMBEDDED.join(", "));
                let help = did_you_mean(name, EMBEDDED.iter().copied()).unwrap_or(list);
                self.report.add(path.span(), format!("there is no embedded model `{name}`")).help = Some(help);
            }
            return ModelSource::Embedded(name.to_owned());
        }
        if text.is_empty() {
            self.report.add(path.span(), "`path` is empty").help =
                Some("write the path of a GGUF file, or `embedded:basho`".into());
        }
        ModelSource::File(folder.join(text))
    }

    fn devices(&mut self, raw: &At<RawDevices>) -> Option<Devices> {
        let list = match raw.value() {
            RawDevices::One(RawDevice::Text(text)) if text == "auto" => return Some(Devices::Auto),
            RawDevices::One(RawDevice::Text(text)) if text == "cpu" => return Some(Devices::Cpu),
            RawDevices::One(device) => vec![(device, raw.span())],
            RawDevices::List(list) => list.iter().map(|device| (device.value(), device.span())).collect(),
        };
        let words: Vec<&str> = list.iter().map(|(device, _)| device.as_text()).collect();
        match words.as_slice() {
            ["auto"] => return Some(Devices::Auto),
            ["cpu"] => return Some(Devices::Cpu),
            ["auto", "cpu"] => return Some(Devices::AutoElseCpu),
            [] => {
                let found = self.report.add(raw.span(), "`devices` is empty");
                found.help = Some("write `\"auto\"`, `\"cpu\"` or a list of devices".into());
                return None;
            }
            _ => {}
        }
        let mut selectors = Vec::new();
        for (device, span) in list {
            let Some(selector) = self.selector(device, span.clone()) else { continue };
            if selectors.contains(&selector) {
                self.report.add(span, format!("device {selector} is there twice"));
            }
            selectors.push(selector);
        }
        (!selectors.is_empty()).then_some(Devices::These(selectors))
    }

    fn selector(&mut self, device: &RawDevice, span: Range<usize>) -> Option<DeviceSelector> {
        let text = match device {
            RawDevice::Index(index) => {
                let index = u32::try_from(*index).ok();
                if index.is_none() {
                    self.report.add(span, "an index of a device is 0 or more");
                }
                return index.map(DeviceSelector::Index);
            }
            RawDevice::Text(text) => text,
        };
        if let Ok(index) = text.parse() {
            return Some(DeviceSelector::Index(index));
        }
        if is_uuid(text) {
            return Some(DeviceSelector::Uuid(text.clone()));
        }
        if let Some(id) = PciBusId::parse(text) {
            return Some(DeviceSelector::Pci(id));
        }
        let (message, help) = match text.as_str() {
            "auto" | "cpu" => (
                format!("`{text}` cannot be in a list with other devices"),
                Some("alone, or as `[\"auto\", \"cpu\"]`".into()),
            ),
            _ => (format!("`{text}` is not a device"), did_you_mean(text, ["auto", "cpu"])),
        };
        let forms = "a UUID such as `GPU-5d5b...`, a PCI bus id such as `0000:3b:00.0`, an index, `auto` or `cpu`";
        self.report.add(span, message).help = Some(help.unwrap_or(forms.into()));
        None
    }

    fn replicas(&mut self, raw: Option<&At<RawReplicas>>, devices: &Devices) -> Replicas {
        let default = Replicas::Count(1);
        let listed = match devices {
            Devices::These(list) => u32::try_from(list.len()).ok(),
            _ => None,
        };
        let Some(raw) = raw else { return if listed.is_some() { Replicas::All } else { default } };
        match raw.value() {
            RawReplicas::Word(word) if word == "all" => Replicas::All,
            RawReplicas::Word(word) => {
                let help = did_you_mean(word, ["all"]).unwrap_or("write a number of replicas or `\"all\"`".into());
                self.report.add(raw.span(), format!("`{word}` is not a number of replicas")).help = Some(help);
                default
            }
            RawReplicas::Count(count) => match u32::try_from(*count).ok().filter(|count| (1..=1024).contains(count)) {
                Some(count) => {
                    if let Some(listed) = listed.filter(|listed| count > *listed) {
                        let message = format!("{count} replicas need {count} devices, {listed} are listed");
                        self.report.add(raw.span(), message);
                    }
                    Replicas::Count(count)
                }
                None => {
                    self.report.add(raw.span(), format!("`replicas` is {count}, expected 1 to 1024 or `\"all\"`"));
                    default
                }
            },
        }
    }

    fn kv_budget(&mut self, raw: &At<RawBudget>) -> Option<u64> {
        if raw.value().0 == "auto" {
            return None;
        }
        let bytes = self.size(&raw.value().0, raw.span())?;
        if bytes == 0 {
            self.report.add(raw.span(), "a model cannot run without memory for its KV cache");
        }
        Some(bytes)
    }

    fn memory_limit(&mut self, raw: &At<RawLimit>) -> Option<MemoryLimit> {
        let text = raw.value().0.trim();
        if let Some(share) = text.strip_suffix('%') {
            let percent = share.trim().parse().ok().filter(|percent| (1..=100).contains(percent));
            if percent.is_none() {
                self.report.add(raw.span(), format!("`{text}` is no share of a device: expected `1%` to `100%`"));
            }
            return percent.map(MemoryLimit::Percent);
        }
        let bytes = self.size(text, raw.span())?;
        if bytes == 0 {
            self.report.add(raw.span(), "a model cannot run without memory");
        }
        Some(MemoryLimit::Bytes(bytes))
    }

    /// A UUID or an index that no simulated device has.
    fn simulated_devices_exist(&mut self, raw: &RawConfig, simulate: &[SimulatedDevice]) {
        if simulate.is_empty() || simulate.len() != raw.simulate.device.len() {
            return;
        }
        let uuids: Vec<&str> = simulate.iter().map(|device| device.uuid.as_str()).collect();
        let known: Vec<(&str, Option<PciBusId>)> = uuids.iter().map(|uuid| (*uuid, None)).collect();
        let models = raw.model.iter().filter_map(|model| model.value().devices.as_ref());
        let all: Vec<&At<RawDevices>> = raw.defaults.devices.iter().chain(models).collect();
        for devices in all {
            let list = match devices.value() {
                RawDevices::One(device) => vec![(device, devices.span())],
                RawDevices::List(list) => list.iter().map(|device| (device.value(), device.span())).collect(),
            };
            for (device, span) in list {
                let selector = match device {
                    RawDevice::Index(index) => u32::try_from(*index).ok().map(DeviceSelector::Index),
                    RawDevice::Text(text) => text
                        .parse()
                        .map(DeviceSelector::Index)
                        .ok()
                        .or_else(|| PciBusId::parse(text).map(DeviceSelector::Pci))
                        .or_else(|| is_uuid(text).then(|| DeviceSelector::Uuid(text.clone()))),
                };
                let Some(selector) = selector else { continue };
                if let Err(error) = selector.find(&known) {
                    let list = format!("the simulated devices are: {}", uuids.join(", "));
                    let help = did_you_mean(device.as_text(), uuids.iter().copied()).unwrap_or(list);
                    let message = format!("`{selector}` is not one of the simulated devices: {error}");
                    self.report.add(span, message).help = Some(help);
                }
            }
        }
    }

    fn number<T: Copy + PartialOrd + std::fmt::Display>(
        &mut self,
        raw: &Option<At<T>>,
        default: T,
        range: RangeInclusive<T>,
    ) -> T {
        let Some(number) = raw else { return default };
        if !range.contains(number.value()) {
            let message = format!("{} is out of range: {} to {}", number.value(), range.start(), range.end());
            self.report.add(number.span(), message);
        }
        *number.value()
    }

    fn duration(&mut self, raw: &Option<At<RawDuration>>, default: Duration) -> Duration {
        let Some(text) = raw else { return default };
        match parse_duration(&text.value().0) {
            Ok(duration) => duration,
            Err(error) => {
                self.unit_error(text.span(), &error);
                default
            }
        }
    }

    fn positive(&mut self, raw: &Option<At<RawDuration>>, default: Duration) -> Duration {
        let duration = self.duration(raw, default);
        if let Some(text) = raw.as_ref().filter(|_| duration.is_zero()) {
            self.report.add(text.span(), "expected a duration longer than 0");
        }
        duration
    }

    fn size(&mut self, text: &str, span: Range<usize>) -> Option<u64> {
        parse_size(text).map_err(|error| self.unit_error(span, &error)).ok()
    }

    fn unit_error(&mut self, span: Range<usize>, error: &UnitError) {
        let help = error.unit().and_then(|(unit, known)| did_you_mean(unit, known));
        self.report.add(span, error.to_string()).help = help;
    }
}

/// What is wrong with the UUID of a simulated device. One that looks real would be taken for a GPU that is there: by the
/// worker, which opens it, and by whoever reads a log.
fn not_simulated(uuid: &str) -> Option<String> {
    match uuid {
        _ if !is_uuid(uuid) => Some(format!("`{uuid}` is not a device's UUID")),
        _ if !uuid.starts_with("SIM-") => Some(format!("`{uuid}` is a real GPU's UUID, and this device is simulated")),
        _ => None,
    }
}

impl RawDevice {
    fn as_text(&self) -> &str {
        match self {
            Self::Index(_) => "",
            Self::Text(text) => text,
        }
    }
}
