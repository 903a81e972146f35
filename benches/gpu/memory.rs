//! What `playhouse plan` says that a model takes, against what NVML sees of it: within two percent, when it is loaded and after
//! it has served; and under a limit, no more than that.

use crate::{Trouble, Verdicts, name_of};
use playhouse::client::GenerateRequest;
use playhouse::host::nvml::NvmlInventory;
use playhouse::host::{Parts, Playhouse};
use playhouse::worker::Workers;
use playhouse_actors::inventory::{Device, Inventory};
use playhouse_actors::policy::placement::Placement;
use playhouse_config::units::{Bytes, parse_size};
use playhouse_config::{Config, Overrides};
use std::path::Path;
use std::sync::Arc;

/// How a model is configured.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    limit: Option<String>,
    context: Option<u32>,
}

impl Settings {
    /// Flags, then files.
    pub(crate) fn parse(args: &[String]) -> Result<(Self, Vec<String>), Trouble> {
        let (mut settings, mut files) = (Self::default(), Vec::new());
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--limit" => settings.limit = Some(value()?.clone()),
                "--context" => settings.context = Some(value()?.parse()?),
                file => files.push(file.to_owned()),
            }
        }
        Ok((settings, files))
    }

    fn config(&self, path: &Path, uuid: &str) -> String {
        let limit = self.limit.as_ref().map_or(String::new(), |limit| format!("memory_limit = \"{limit}\"\n"));
        let context = self.context.map_or(String::new(), |context| format!("context = {context}\n"));
        format!("[[model]]\nname = \"m\"\npath = \"{}\"\ndevices = \"{uuid}\"\n{limit}{context}", path.display())
    }
}

pub(crate) fn check(path: &Path, settings: &Settings, verdicts: &mut Verdicts) -> Result<(), Trouble> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(look(path, settings, verdicts))
}

fn first_gpu() -> Result<Device, Trouble> {
    NvmlInventory::new().devices()?.into_iter().next().ok_or_else(|| "NVML shows no GPU".into())
}

async fn look(path: &Path, settings: &Settings, verdicts: &mut Verdicts) -> Result<(), Trouble> {
    let name = name_of(path);
    let before = first_gpu()?;
    let config = Config::from_text("gpu", &settings.config(path, &before.uuid), &Overrides::none())?;
    let parts = Parts { factory: Some(Arc::new(Workers::new(None))), ..Parts::default() };
    let house = Playhouse::open_with(config, parts).await?;
    house.ready().await?;
    let plan = house.plan();
    let (_, planned) = plan.placements().next().ok_or("nothing was placed")?;
    let loaded = used(&before)?;
    serve(&house).await?;
    let after = used(&before)?;
    hold(&format!("memory {name}, loaded"), planned, loaded, verdicts);
    hold(&format!("memory {name}, after steps"), planned, after, verdicts);
    let status = house.status().await.ok_or("the house does not answer")?;
    let stats = status.replicas().next().and_then(|replica| replica.stats).ok_or("no worker has told its memory")?;
    let (told, expected) = (
        [stats.weight_bytes, stats.kv_bytes, stats.scratch_bytes],
        [planned.weights_bytes, planned.kv_bytes, planned.scratch_bytes],
    );
    // Of KV only whole blocks are taken, and pages of 2 MiB in each arena. Scratch is planned for the largest GPU there is.
    let near = told[..2].iter().zip(expected).all(|(told, expected)| told.abs_diff(expected) <= 8 << 20);
    let scratch_fits = told[2] <= expected[2] && expected[2] - told[2] <= 64 << 20;
    verdicts
        .line(near && scratch_fits, &format!("ledger {name}: weights, KV, scratch are {told:?}, planned {expected:?}"));
    if let Some(limit) = &settings.limit {
        let most = parse_size(limit)?;
        let holds = planned.total_bytes() <= most && loaded.max(after) <= most;
        let used = loaded.max(after);
        verdicts.line(holds, &format!("limit {name}: {} of {limit} used, by NVML", Bytes(used)));
    }
    house.stop().await;
    Ok(())
}

/// What was taken since, by anybody: nobody else uses the card while this runs.
fn used(before: &Device) -> Result<u64, Trouble> {
    Ok(first_gpu()?.used_bytes.saturating_sub(before.used_bytes))
}

fn hold(what: &str, planned: &Placement, used: u64, verdicts: &mut Verdicts) {
    let planned = planned.total_bytes();
    let off = (used as f64 / planned as f64 - 1.0) * 100.0;
    let text = format!("{what}: {} by NVML, {} planned, {off:+.2} %", Bytes(used), Bytes(planned));
    verdicts.line(off.abs() < 2.0, &text);
}

/// Long prompts, many at once, sampled and greedy: every kernel of the model and some graphs.
async fn serve(house: &Playhouse) -> Result<(), Trouble> {
    let model = house.model("m")?;
    let mut streams = Vec::new();
    for i in 0..16u64 {
        let words = "the moon over the river ".repeat(1 + 20 * (i as usize % 4));
        let request = GenerateRequest::text(words).seed(i).max_tokens(24).logprobs(2);
        let request = if i % 2 == 0 { request.temperature(0.0) } else { request };
        streams.push(model.generate(request).await?);
    }
    for stream in streams {
        stream.collect().await?;
    }
    Ok(())
}
