//! Why there is no plan: the model, the card and the bytes that are missing.

use crate::inventory::DeviceId;
use playhouse_config::units::Bytes;
use serde::Serialize;
use std::fmt;

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum PlacementError {
    /// There is no room.
    #[error("{}", does_not_fit(.model, .device, .device_name, *.needed_bytes, *.free_bytes, *.missing_bytes, *.cards))]
    DoesNotFit {
        /// The model.
        model: String,
        /// The card, of several the one where the least is missing.
        device: DeviceId,
        /// What that card is called.
        device_name: String,
        /// Bytes the model needs at the least.
        needed_bytes: u64,
        /// Bytes left for it on the card.
        free_bytes: u64,
        /// Bytes missing.
        missing_bytes: u64,
        /// Cards that were looked at.
        cards: usize,
    },
    /// A limit leaves too little.
    #[error("{}", over_limit(.model, .device, .limit, *.needed_bytes, *.limit_bytes))]
    OverLimit {
        /// The model.
        model: String,
        /// The card.
        device: DeviceId,
        /// What the configuration says.
        limit: String,
        /// Bytes the model needs at the least.
        needed_bytes: u64,
        /// Bytes that it may have.
        limit_bytes: u64,
    },
    /// A GPU is wanted and there is none.
    #[error("model `{model}` is to run on a GPU and there is none; `devices = \"cpu\"` runs it on the CPU")]
    NoGpu {
        /// The model.
        model: String,
    },
    /// A card that is named is not there, or is not the only one meant.
    #[error("model `{model}` is to run on `{selector}`: {why}")]
    NoSuchDevice {
        /// The model.
        model: String,
        /// What the configuration says.
        selector: String,
        /// What is wrong with it.
        why: String,
    },
    /// More replicas than cards.
    #[error("model `{model}` is to have {replicas} replicas, a card each, and {cards} cards are allowed")]
    TooFewCards {
        /// The model.
        model: String,
        /// Replicas wanted.
        replicas: u32,
        /// Cards allowed.
        cards: usize,
    },
}

fn does_not_fit(
    model: &str,
    device: &DeviceId,
    name: &str,
    needed: u64,
    free: u64,
    missing: u64,
    cards: usize,
) -> impl fmt::Display {
    let best = if cards > 1 { format!(", the best of {cards} cards") } else { String::new() };
    format!(
        "model `{model}` does not fit on {device} ({name}{best}): it needs {}, {} are free, {} ({missing} bytes) are missing",
        Bytes(needed),
        Bytes(free),
        Bytes(missing)
    )
}

fn over_limit(model: &str, device: &DeviceId, limit: &str, needed: u64, allowed: u64) -> impl fmt::Display {
    let missing = needed.saturating_sub(allowed);
    format!(
        "model `{model}` needs {} on {device}, its `memory_limit` ({limit}) allows {}, {} ({missing} bytes) are missing: raise the \
         limit, or set a smaller `context`, `max_batch_tokens` or `kv_budget`",
        Bytes(needed),
        Bytes(allowed),
        Bytes(missing)
    )
}
