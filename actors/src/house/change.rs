//! From a plan to what is to run where, and from what runs to what is to be done about it. Pure: a dry run and the real
//! thing ask the same function.

use crate::device_supervisor::Placed;
use crate::inventory::DeviceId;
use crate::messages::{ReplicaId, WorkerSpec};
use crate::policy::placement::{Placement, Plan};
use playhouse_config::checked::Isolation;
use playhouse_config::{Config, Model};
use serde::{Deserialize, Serialize};

/// What [`super::HouseMsg::Apply`] did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Replicas that were not touched: their actors, KV and streams are the same.
    pub kept: Vec<ReplicaId>,
    /// Replicas that were started.
    pub started: Vec<ReplicaId>,
    /// Replicas that were stopped.
    pub stopped: Vec<ReplicaId>,
}

/// The way from what runs to what is to run.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) applied: Applied,
    /// First these end.
    pub(super) removals: Vec<Removal>,
    /// Then these begin.
    pub(super) placements: Vec<Placed>,
}

/// A replica that does not stay where it is as it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Removal {
    pub(super) device: DeviceId,
    pub(super) replica: ReplicaId,
    /// Another of the same name follows, here or elsewhere.
    pub(super) returning: bool,
}

impl Change {
    /// From `running` to what `plan` says for `config`.
    pub(super) fn between<'a>(running: impl Iterator<Item = &'a Placed>, config: &Config, plan: &Plan) -> Self {
        let wanted = placed_of(config, plan);
        let mut change = Self::default();
        for old in running {
            let replica = old.spec.replica.clone();
            let model = config.model(&replica.model);
            if wanted.iter().any(|new| is_same(old, new, model)) {
                change.applied.kept.push(replica);
                continue;
            }
            let returning = wanted.iter().any(|new| new.spec.replica == replica);
            change.applied.stopped.push(replica.clone());
            change.removals.push(Removal { device: old.spec.device.clone(), replica, returning });
        }
        for new in wanted {
            if !change.applied.kept.contains(&new.spec.replica) {
                change.applied.started.push(new.spec.replica.clone());
                change.placements.push(new);
            }
        }
        change
    }
}

/// Whether a replica that runs may go on as the one that is wanted: it is, device and all, the same. If the planner chose
/// its memory for KV, it may go on with less than it could have now, but not with more: somebody else is to have that.
fn is_same(old: &Placed, new: &Placed, model: Option<&Model>) -> bool {
    let planned = model.is_some_and(|model| model.kv_budget_bytes.is_none());
    let kv_fits = if planned { old.spec.kv_bytes <= new.spec.kv_bytes } else { old.spec.kv_bytes == new.spec.kv_bytes };
    kv_fits && old.spec == WorkerSpec { kv_bytes: old.spec.kv_bytes, ..new.spec.clone() }
}

/// What is to run where, in the order of the plan.
pub(super) fn placed_of(config: &Config, plan: &Plan) -> Vec<Placed> {
    let placed = |(device, placement): (&DeviceId, &Placement)| {
        let model = config.model(&placement.model)?;
        let spec = spec_of(config, model, device, placement);
        Some(Placed { spec, kv_min_bytes: placement.kv_min_bytes })
    };
    plan.placements().filter_map(placed).collect()
}

fn spec_of(config: &Config, model: &Model, device: &DeviceId, placement: &Placement) -> WorkerSpec {
    let isolation = match (model.isolation, device.is_cpu()) {
        (Isolation::Auto, true) => Isolation::Thread,
        (Isolation::Auto, false) => Isolation::Process,
        (chosen, _) => chosen,
    };
    WorkerSpec {
        replica: ReplicaId { model: model.name.clone(), index: placement.replica },
        incarnation: 0,
        device: device.clone(),
        source: model.source.clone(),
        kv_bytes: placement.kv_bytes,
        memory_bytes_max: placement.limit_bytes,
        kv_type: model.kv_type,
        context: model.context,
        max_sequences: model.max_sequences,
        max_batch_tokens: model.max_batch_tokens,
        isolation,
        heartbeat: config.supervision.heartbeat,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::placement::DevicePlan;
    use playhouse_config::ModelSource;

    fn config(models: &[&str]) -> Config {
        let source = ModelSource::Embedded("basho".into());
        let model = |name: &&str| Model { name: (*name).into(), source: source.clone(), ..Model::default() };
        Config { models: models.iter().map(model).collect(), ..Config::default() }
    }

    /// Replicas 0 of models, each on a card with so many bytes for KV.
    fn plan(placed: &[(&str, &str, u64)]) -> Plan {
        let device = |(model, card, kv_bytes): &(&str, &str, u64)| DevicePlan {
            device: DeviceId::gpu(*card),
            name: String::new(),
            total_bytes: 0,
            foreign_bytes: 0,
            placements: vec![Placement {
                model: (*model).into(),
                replica: 0,
                weights_bytes: 0,
                kv_bytes: *kv_bytes,
                scratch_bytes: 0,
                context_bytes: 0,
                kv_min_bytes: 0,
                limit_bytes: None,
            }],
            headroom_bytes: 0,
        };
        Plan { devices: placed.iter().map(device).collect() }
    }

    fn change(config: &Config, old: &[(&str, &str, u64)], new: &[(&str, &str, u64)]) -> Change {
        Change::between(placed_of(config, &plan(old)).iter(), config, &plan(new))
    }

    fn names(list: &[ReplicaId]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_stays_as_it_is_is_not_touched() {
        let config = config(&["a", "b"]);
        let placed = [("a", "GPU-0", 10), ("b", "GPU-1", 10)];
        let same = change(&config, &placed, &placed);
        assert_eq!(names(&same.applied.kept), ["a/0", "b/0"]);
        assert!(same.removals.is_empty() && same.placements.is_empty());
    }

    #[test]
    fn what_moves_ends_here_and_begins_there_and_its_requests_wait() {
        let moved = change(&config(&["a"]), &[("a", "GPU-0", 10)], &[("a", "GPU-1", 10)]);
        let replica = ReplicaId { model: "a".into(), index: 0 };
        assert_eq!(moved.removals, [Removal { device: DeviceId::gpu("GPU-0"), replica, returning: true }]);
        assert_eq!(moved.placements.len(), 1);
        assert_eq!(moved.placements[0].spec.device, DeviceId::gpu("GPU-1"));
    }

    #[test]
    fn what_goes_is_not_waited_for() {
        let gone = change(&config(&["a"]), &[("a", "GPU-0", 10)], &[]);
        assert_eq!((names(&gone.applied.stopped), gone.removals[0].returning), (vec!["a/0".into()], false));
    }

    #[test]
    fn memory_that_was_planned_may_be_less_than_it_could_be_now_and_not_more() {
        let mut config = config(&["a"]);
        let kept = |config: &Config, old, new| {
            !change(config, &[("a", "GPU-0", old)], &[("a", "GPU-0", new)]).applied.kept.is_empty()
        };
        assert!(kept(&config, 10, 10) && kept(&config, 10, 20));
        assert!(!kept(&config, 10, 5), "somebody else is to have it");
        config.models[0].kv_budget_bytes = Some(20);
        assert!(!kept(&config, 10, 20), "a budget is a budget");
    }
}
