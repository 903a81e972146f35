//! Every op of every backend, held against an f64 reference and against itself.
//!
//! One body per op, generic over [`Backend`]; `on_every_backend!` runs it on each device of this machine. Inputs reach
//! a device as rows of an embedding table, because that is the one way in that every backend has. The invariance tests
//! run a small model in many ways and compare logits bit for bit.
//!
//! | file | what it is |
//! |---|---|
//! | `device.rs` | the devices, and how a test makes weights and tensors on one |
//! | `reference.rs` | the ops in f64, written for reading |
//! | `ops.rs` | each op against the reference, odd sizes, every format |
//! | `invariance.rs` | a row alone, in company, in chunks, in other blocks: the same bits |

mod device;
mod reference;
mod ops;
mod invariance;
