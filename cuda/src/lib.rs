//! CUDA for Playhouse: kernels, their launchers, and device memory, through the driver API alone.
//!
//! The crate knows nothing of models or files. It starts without a driver (everything is loaded at run time) and
//! builds without nvcc; in both cases [`CudaError::Unavailable`] says what is missing. Reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`gpu`] | a device by UUID, with a context and a stream |
//! | [`arena`] | memory that survives a fault, and typed buffers cut from it |
//! | [`ledger`] | what this process holds of a device, by kind |
//! | [`pinned`] | page-locked host memory |
//! | [`stream`] | a second stream, and events |
//! | [`loader`] | bytes from files to the device, in chunks |
//! | [`kernels`] | the embedded kernels, loading and launching |
//! | [`launch`] | one launcher per op |
//! | [`graph`] | capture and replay |

pub mod arena;
pub mod error;
pub mod gpu;
pub mod graph;
pub mod kernels;
pub mod launch;
pub mod ledger;
pub mod loader;
pub mod pinned;
pub mod stream;

#[cfg(any(debug_assertions, feature = "fault-injection"))]
pub mod trap;

pub use error::CudaError;
