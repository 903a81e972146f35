//! What the HTTP front needs of this host: devices, the configured models, and what happened.

use super::{Playhouse, ReloadError};
use crate::http::control::{BoxFuture, ConfiguredModel, Control, ControlError};
use crate::worker::chain;
use playhouse_actors::EventLog;
use playhouse_actors::inventory::Device;
use serde_json::json;

/// A house as the front sees it.
#[derive(Debug)]
pub struct HouseControl {
    house: Playhouse,
}

impl HouseControl {
    /// For a house that was opened.
    pub fn new(house: Playhouse) -> Self {
        Self { house }
    }

    async fn set_wanted(&self, model: &str, wanted: bool) -> Result<(), ControlError> {
        let config = self.house.config();
        let model = config.model(model).ok_or_else(|| ControlError::UnknownModel(model.to_owned()))?;
        match self.house.set_wanted(&model.name, wanted).await {
            Ok(_) => Ok(()),
            Err(ReloadError::Ended) => Err(ControlError::Stopping),
            Err(error) => Err(ControlError::Refused(chain(&error))),
        }
    }
}

impl Control for HouseControl {
    fn devices(&self) -> BoxFuture<'_, Vec<Device>> {
        Box::pin(self.house.devices())
    }

    fn models(&self) -> Vec<ConfiguredModel> {
        let unwanted = self.house.unwanted();
        let row = |model: playhouse_config::Model| ConfiguredModel {
            wanted: !unwanted.contains(&model.name),
            name: model.name,
            aliases: model.aliases,
        };
        self.house.config().models.into_iter().map(row).collect()
    }

    fn load<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>> {
        Box::pin(self.set_wanted(model, true))
    }

    fn unload<'a>(&'a self, model: &'a str) -> BoxFuture<'a, Result<(), ControlError>> {
        Box::pin(self.set_wanted(model, false))
    }

    fn config(&self) -> serde_json::Value {
        let config = self.house.config();
        let model = |model: &playhouse_config::Model| {
            json!({
                "name": model.name,
                "source": model.source.to_string(),
                "max_sequences": model.max_sequences,
                "context": model.context,
                "kv_type": model.kv_type,
                "required": model.required,
            })
        };
        json!({
            "file": config.path.as_ref().map(|path| path.display().to_string()),
            "address": config.host.address.to_string(),
            "models": config.models.iter().map(model).collect::<Vec<_>>(),
            "simulated": !config.simulate.is_empty(),
        })
    }

    fn events(&self) -> &EventLog {
        self.house.tree().log()
    }
}
