//! Launchers: each checks its contract, chooses a configuration in a pure function, and enqueues one kernel.

pub mod attention;
pub mod matmul;
pub mod matrix;
