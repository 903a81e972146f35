//! Launchers: each checks its contract, chooses a configuration in a pure function, and enqueues one kernel.

pub mod attention;
pub mod embed;
pub mod feed;
pub mod gate;
pub mod matmul;
pub mod matrix;
pub mod mixed;
pub mod moe;
pub mod norm;
pub mod peak;
pub mod router;
pub mod sample;
mod wide;
