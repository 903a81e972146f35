//! Plans for boxes of all kinds, and properties of any plan for any box.

use super::*;
use playhouse_config::DeviceSelector;
use playhouse_config::checked::MemoryLimit;
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn card(id: &str, gib: u64) -> Card {
    let (total_bytes, free_bytes) = (gib * GIB, gib * GIB);
    Card { id: DeviceId::gpu(id), name: format!("{gib}G"), pci: None, total_bytes, free_bytes }
}

fn cpu() -> Card {
    Card { id: DeviceId::cpu(), ..card("cpu", 64) }
}

fn model(name: &str, weights_gib: u64, devices: Devices) -> Wanted {
    let demand = Demand {
        weights_bytes: weights_gib * GIB,
        scratch_bytes: GIB / 2,
        context_bytes: GIB / 2,
        kv_min_bytes: GIB,
        kv_full_bytes: 8 * GIB,
    };
    Wanted {
        name: name.into(),
        devices,
        replicas: Replicas::Count(1),
        priority: 0,
        kv_budget_bytes: None,
        memory_limit: None,
        demand,
        current: Vec::new(),
    }
}

fn where_is(plan: &Plan, name: &str) -> Vec<String> {
    let found = plan.placements().filter(|(_, placement)| placement.model == name);
    found.map(|(device, _)| device.to_string()).collect()
}

#[test]
fn small_models_take_small_cards() {
    let cards = [card("a80", 80), card("b24", 24), card("c12", 12)];
    let wanted = [model("large", 60, Devices::Auto), model("small", 2, Devices::Auto), model("mid", 14, Devices::Auto)];
    let plan = place(&wanted, &cards, &cpu()).expect("fits");
    assert_eq!(where_is(&plan, "large"), ["a80"]);
    assert_eq!(where_is(&plan, "mid"), ["b24"]);
    assert_eq!(where_is(&plan, "small"), ["c12"]);
    let small = &plan.devices[2].placements[0];
    assert_eq!((small.kv_bytes, plan.devices[2].headroom_bytes), (8 * GIB, GIB), "all the KV it could use");
}

#[test]
fn what_does_not_fit_names_model_card_and_bytes() {
    let mut cards = [card("a12", 12), card("b24", 24)];
    cards[1].free_bytes = 15 * GIB;
    let error = place(&[model("oss", 14, Devices::Auto)], &cards, &cpu()).expect_err("16 GiB are needed");
    assert_eq!(
        error.to_string(),
        "model `oss` does not fit on b24 (24G, the best of 2 cards): it needs 16 GiB, 15 GiB are free, 1 GiB (1073741824 bytes) are \
         missing"
    );
    let pinned = Devices::These(vec![DeviceSelector::Index(0)]);
    let error = place(&[model("oss", 14, pinned)], &cards, &cpu()).expect_err("not on the small card");
    let PlacementError::DoesNotFit { device, missing_bytes, .. } = error else { panic!("{error}") };
    assert_eq!((device.as_str(), missing_bytes), ("a12", 4 * GIB));
}

#[test]
fn pinned_models_choose_before_those_that_can_go_anywhere() {
    let cards = [card("a", 24), card("b", 24)];
    let pinned = Devices::These(vec![DeviceSelector::Uuid("a".into())]);
    let plan = place(&[model("free", 20, Devices::Auto), model("pinned", 10, pinned)], &cards, &cpu()).expect("fits");
    assert_eq!(where_is(&plan, "pinned"), ["a"]);
    assert_eq!(where_is(&plan, "free"), ["b"]);
}

#[test]
fn priority_chooses_first() {
    let cards = [card("a", 24)];
    let mut first = model("first", 15, Devices::Auto);
    first.priority = 1;
    let error = place(&[model("second", 18, Devices::Auto), first], &cards, &cpu()).expect_err("room for one");
    assert!(matches!(error, PlacementError::DoesNotFit { model, .. } if model == "second"));
}

#[test]
fn replicas_have_a_card_each() {
    let cards = [card("a", 24), card("b", 12), card("c", 24)];
    let mut all = model("all", 4, Devices::Auto);
    all.replicas = Replicas::All;
    assert_eq!(where_is(&place(&[all.clone()], &cards, &cpu()).expect("fits"), "all"), ["a", "b", "c"]);
    all.replicas = Replicas::Count(2);
    assert_eq!(where_is(&place(&[all.clone()], &cards, &cpu()).expect("fits"), "all"), ["a", "c"], "full KV there");
    all.replicas = Replicas::Count(4);
    let error = place(&[all], &cards, &cpu()).expect_err("three cards");
    assert_eq!(error, PlacementError::TooFewCards { model: "all".into(), replicas: 4, cards: 3 });
}

#[test]
fn a_model_stays_where_it_is_unless_room_is_needed() {
    let cards = [card("a", 24), card("b", 12)];
    let mut stays = model("m", 2, Devices::Auto);
    stays.current = vec![(DeviceId::gpu("a"), 3 * GIB)];
    let plan = place(&[stays.clone()], &cards, &cpu()).expect("fits");
    assert_eq!(where_is(&plan, "m"), ["a"], "b would be the tighter fit");
    assert_eq!(plan.devices[0].placements[0].kv_bytes, 3 * GIB, "what it has");
    let plan = place(&[stays, model("large", 20, Devices::Auto)], &cards, &cpu()).expect("fits when m moves");
    assert_eq!((where_is(&plan, "m"), where_is(&plan, "large")), (vec!["b".into()], vec!["a".into()]));
}

#[test]
fn the_cpu_is_taken_only_when_it_is_allowed() {
    let error = place(&[model("m", 2, Devices::Auto)], &[], &cpu()).expect_err("no GPU");
    assert_eq!(error, PlacementError::NoGpu { model: "m".into() });
    let plan = place(&[model("m", 2, Devices::AutoElseCpu)], &[], &cpu()).expect("fits");
    assert_eq!(where_is(&plan, "m"), ["cpu"]);
    assert_eq!(plan.devices[0].placements[0].context_bytes, 0);
    let plan = place(&[model("m", 2, Devices::AutoElseCpu)], &[card("a", 24)], &cpu()).expect("fits");
    assert_eq!(where_is(&plan, "m"), ["a"]);
    assert_eq!(plan.devices.len(), 1, "a CPU without a model is no part of the plan");
    let error = place(&[model("m", 200, Devices::Cpu)], &[], &cpu()).expect_err("too large for the host");
    assert!(matches!(error, PlacementError::DoesNotFit { device, .. } if device.is_cpu()));
}

#[test]
fn devices_that_are_not_there_are_named() {
    let cards = [card("GPU-aa", 24), card("GPU-ab", 24)];
    let on = |selector: &str| Devices::These(vec![DeviceSelector::Uuid(selector.into())]);
    let message = |devices| place(&[model("m", 2, devices)], &cards, &cpu()).expect_err("no").to_string();
    assert_eq!(message(on("GPU-c")), "model `m` is to run on `GPU-c`: no device is it; the GPUs are GPU-aa, GPU-ab");
    assert!(message(on("GPU-a")).contains("2 devices have this prefix"));
    let twice = Devices::These(vec![DeviceSelector::Uuid("GPU-aa".into()), DeviceSelector::Index(0)]);
    assert!(message(twice).contains("the same device as another of the list"));
}

#[test]
fn a_limit_bounds_what_a_replica_takes() {
    // 4 of weights, 1 of scratch and context: 3 are left for KV, though 8 would be of use and there is room.
    let mut capped = model("m", 4, Devices::Auto);
    capped.memory_limit = Some(MemoryLimit::Bytes(8 * GIB));
    let plan = place(&[capped.clone()], &[card("a", 80)], &cpu()).expect("fits");
    let found = &plan.devices[0].placements[0];
    assert_eq!((found.kv_bytes, found.total_bytes(), found.limit_bytes), (3 * GIB, 8 * GIB, Some(8 * GIB)));
    assert_eq!(plan.devices[0].headroom_bytes, 72 * GIB, "the rest stays free");
    // Two of them share a card although either would take more than half.
    let both = [capped.clone(), Wanted { name: "n".into(), ..capped.clone() }];
    let plan = place(&both, &[card("a", 16)], &cpu()).expect("fit");
    assert!(plan.placements().all(|(_, placement)| placement.total_bytes() == 8 * GIB));
    // A share is of the card, on a host's memory too.
    capped.memory_limit = Some(MemoryLimit::Percent(50));
    let plan = place(&[capped.clone()], &[card("a", 20)], &cpu()).expect("fits");
    assert_eq!(plan.devices[0].placements[0].limit_bytes, Some(10 * GIB));
    capped.devices = Devices::Cpu;
    assert_eq!(place(&[capped], &[], &cpu()).expect("fits").devices[0].placements[0].kv_bytes, 8 * GIB);
}

#[test]
fn a_limit_that_is_too_low_is_refused_with_what_is_missing() {
    let mut capped = model("m", 12, Devices::Auto);
    capped.memory_limit = Some(MemoryLimit::Bytes(10 * GIB));
    let error = place(&[capped.clone()], &[card("GPU-a", 80)], &cpu()).expect_err("14 are needed");
    assert_eq!(
        error.to_string(),
        "model `m` needs 14 GiB on GPU-a, its `memory_limit` (10 GiB) allows 10 GiB, 4 GiB (4294967296 bytes) are missing: \
         raise the limit, or set a smaller `context`, `max_batch_tokens` or `kv_budget`"
    );
    // A budget for KV counts in full; a share may be enough on one card and not on another.
    capped.memory_limit = Some(MemoryLimit::Percent(50));
    assert_eq!(where_is(&place(&[capped.clone()], &[card("a", 24), card("b", 28)], &cpu()).expect("b"), "m"), ["b"]);
    capped.kv_budget_bytes = Some(2 * GIB);
    let error = place(&[capped], &[card("a", 24), card("b", 28)], &cpu()).expect_err("15 of 14");
    assert!(matches!(error, PlacementError::OverLimit { .. }), "{error}");
}

#[test]
fn a_plan_is_json() {
    let plan = place(&[model("m", 2, Devices::Auto)], &[card("GPU-a", 24)], &cpu()).expect("fits");
    let json = serde_json::to_value(&plan).expect("plain data");
    assert_eq!(json["devices"][0]["device"], "GPU-a");
    assert_eq!(json["devices"][0]["placements"][0]["weights_bytes"], 2 * GIB);
}

fn any_model() -> impl Strategy<Value = Wanted> {
    let demand = (0u64..40, 0u64..4, 0u64..2, 0u64..6, 0u64..20);
    let devices = prop_oneof![
        Just(Devices::Auto),
        Just(Devices::AutoElseCpu),
        Just(Devices::Cpu),
        (0u32..4).prop_map(|index| Devices::These(vec![DeviceSelector::Index(index)])),
    ];
    let replicas = prop_oneof![Just(Replicas::All), (1u32..4).prop_map(Replicas::Count)];
    let limit = prop_oneof![
        3 => Just(None),
        1 => (1u64..60).prop_map(|bytes| Some(MemoryLimit::Bytes(bytes))),
        1 => (1u8..=100).prop_map(|percent| Some(MemoryLimit::Percent(percent))),
    ];
    (demand, devices, replicas, -1i32..2, prop::option::of(0u64..10), limit).prop_map(
        |((weights, scratch, context, kv, more), devices, replicas, priority, budget, limit)| Wanted {
            name: String::new(),
            devices,
            replicas,
            priority,
            kv_budget_bytes: budget,
            memory_limit: limit,
            demand: Demand {
                weights_bytes: weights,
                scratch_bytes: scratch,
                context_bytes: context,
                kv_min_bytes: kv,
                kv_full_bytes: kv + more,
            },
            current: Vec::new(),
        },
    )
}

proptest! {
    /// A plan never promises more than a card has; every replica asked for is there, on a card of its own; KV lies
    /// between what is needed and what is useful; the books balance; and the plan is a function of its input.
    #[test]
    fn a_plan_keeps_its_promises(
        mut wanted in prop::collection::vec(any_model(), 0..6),
        frees in prop::collection::vec(0u64..80, 0..5),
    ) {
        for (index, model) in wanted.iter_mut().enumerate() {
            model.name = format!("m{index}");
        }
        let cards: Vec<Card> = frees
            .iter()
            .enumerate()
            .map(|(index, free)| Card { free_bytes: *free, total_bytes: 80, ..card(&format!("GPU-{index}"), 0) })
            .collect();
        let cpu = Card { free_bytes: 100, total_bytes: 100, ..cpu() };
        let result = place(&wanted, &cards, &cpu);
        prop_assert_eq!(&result, &place(&wanted, &cards, &cpu));
        let plan = match result {
            Ok(plan) => plan,
            Err(PlacementError::DoesNotFit { needed_bytes, free_bytes, missing_bytes, .. }) => {
                prop_assert!(missing_bytes > 0 && missing_bytes == needed_bytes - free_bytes);
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        for device in &plan.devices {
            let used: u64 = device.placements.iter().map(Placement::total_bytes).sum();
            prop_assert_eq!(device.foreign_bytes + used + device.headroom_bytes, device.total_bytes);
            let mut models: Vec<&str> = device.placements.iter().map(|p| p.model.as_str()).collect();
            models.dedup();
            prop_assert!(device.device.is_cpu() || models.len() == device.placements.len());
        }
        for model in &wanted {
            let replicas: Vec<&Placement> =
                plan.placements().map(|(_, placement)| placement).filter(|p| p.model == model.name).collect();
            if let Replicas::Count(count) = model.replicas {
                prop_assert_eq!(replicas.len(), count as usize);
            }
            for placement in replicas {
                match model.kv_budget_bytes {
                    Some(budget) => prop_assert_eq!(placement.kv_bytes, budget),
                    None => {
                        let range = model.demand.kv_min_bytes..=model.demand.kv_full_bytes;
                        prop_assert!(range.contains(&placement.kv_bytes));
                    }
                }
            }
        }
    }
}
