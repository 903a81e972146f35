//! What programs hold of a running house: models by name, requests in text or tokens, streams of text.
//!
//! ```text
//! GenerateRequest, ChatRequest --limits--> tokens --> house (n requests) --> tokens --> text --> Event
//! ```
//!
//! Everything a client may ask for is bounded here, in [`limits`], below every front end: the library and the HTTP API
//! refuse the same things in the same words. The house underneath knows tokens only.

mod card;
mod error;
mod handle;
pub mod limits;
mod request;
mod stream;

pub use card::{CardError, ModelCard};
pub use error::{Invalid, RequestError};
pub use handle::{Embedding, ModelHandle};
pub use request::{ChatRequest, GenerateRequest, Prompt};
pub use stream::{Collected, End, Ender, Event, Outcome, Token, TokenStream};

use arc_swap::ArcSwap;
use playhouse_actors::{HouseHandle, Refusal};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The models that clients can name.
#[derive(Debug, Default)]
pub struct Catalog {
    cards: BTreeMap<String, Arc<ModelCard>>,
    aliases: BTreeMap<String, String>,
}

impl Catalog {
    /// A catalog of these models. Names and aliases are unique: the configuration was checked.
    pub fn new(cards: impl IntoIterator<Item = Arc<ModelCard>>) -> Self {
        let cards: BTreeMap<String, Arc<ModelCard>> = cards.into_iter().map(|card| (card.name.clone(), card)).collect();
        let names = |card: &Arc<ModelCard>| {
            card.aliases.iter().map(|alias| (alias.clone(), card.name.clone())).collect::<Vec<_>>()
        };
        let aliases = cards.values().flat_map(names).collect();
        Self { cards, aliases }
    }

    /// By name or alias.
    pub fn get(&self, name: &str) -> Option<&Arc<ModelCard>> {
        self.cards.get(name).or_else(|| self.cards.get(self.aliases.get(name)?))
    }

    /// All models by their own names, in order.
    pub fn cards(&self) -> impl Iterator<Item = &Arc<ModelCard>> {
        self.cards.values()
    }
}

/// A way to a running house. Cheap to clone; what it shows changes with a reload.
#[derive(Debug, Clone)]
pub struct Client {
    tree: HouseHandle,
    catalog: Arc<ArcSwap<Catalog>>,
}

impl Client {
    /// A way to `tree`, whose models are in `catalog`.
    pub fn new(tree: HouseHandle, catalog: Arc<ArcSwap<Catalog>>) -> Self {
        Self { tree, catalog }
    }

    /// A model by name or alias.
    ///
    /// # Errors
    /// [`Refusal::UnknownModel`].
    pub fn model(&self, name: &str) -> Result<ModelHandle, Refusal> {
        let catalog = self.catalog.load();
        let card = catalog.get(name).ok_or_else(|| Refusal::UnknownModel { model: name.to_owned() })?;
        Ok(ModelHandle::new(card.clone(), self.tree.clone()))
    }

    /// The models now.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.catalog.load_full()
    }

    /// The supervision tree: status, events, raw messages.
    pub fn tree(&self) -> &HouseHandle {
        &self.tree
    }
}
