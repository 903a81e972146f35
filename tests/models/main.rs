//! Architectures held against Hugging Face transformers, and against broken files.
//!
//! The checkpoints and goldens in `tests/golden/models` were made by `make.py` there.

mod golden;
mod driver;
mod edit;
mod logits;
mod greedy;
mod quantised;
mod refusals;
mod accepted;
mod memory;
mod adapter;
mod rope;
mod gpu;
