//! `playhouse check CONFIG`: reads and judges a configuration file; nothing is opened or started.

use std::path::PathBuf;

use playhouse_config::{Config, ConfigError, Diagnostic, Overrides, Place};
use serde_json::{Value, json};

use super::{CliError, Exit, RunCommand};

/// The arguments of `check`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The configuration file
    config: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        match Config::open(Some(&self.config), &Overrides::from_process_env()) {
            Ok(config) if self.json => super::print_json(&json!({ "ok": true, "models": names(&config) })),
            Ok(config) => {
                let models = names(&config);
                super::print(&format!("{}: right, with {}\n", self.config.display(), models.join(", ")))
            }
            Err(ConfigError::Invalid { diagnostics }) if self.json => {
                let problems: Vec<Value> = diagnostics.iter().map(problem).collect();
                super::print_json(&json!({ "ok": false, "problems": problems }))?;
                let problems = match diagnostics.len() {
                    1 => "1 problem".to_owned(),
                    n => format!("{n} problems"),
                };
                Err(CliError::new(Exit::BadConfig, format!("{}: {problems}", self.config.display())))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn names(config: &Config) -> Vec<&str> {
    config.models.iter().map(|model| model.name.as_str()).collect()
}

fn problem(diagnostic: &Diagnostic) -> Value {
    let related = diagnostic.related.as_ref().map(|(why, place)| json!({ "message": why, "place": place_json(place) }));
    json!({
        "message": diagnostic.message, "place": place_json(&diagnostic.place), "help": diagnostic.help,
        "related": related, "rendered": diagnostic.to_string(),
    })
}

fn place_json(place: &Place) -> Value {
    json!({ "source": place.source, "line": place.line, "column": place.column, "width": place.width })
}
