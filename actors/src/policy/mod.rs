//! What the supervision tree decides, as pure code: no clock (time is an argument), no locks, no channels, no randomness
//! but what a seed gives. The actors ask and act; the simulator asks the same code a hundred thousand times.
//!
//! | file | question |
//! |---|---|
//! | [`placement`] | which model goes on which card, with how much memory for KV? |
//! | [`restart`] | a worker ended: restart it now, later, or give the device up? |
//! | [`admission`] | may this request wait, and if not, when is it worth asking again? |
//! | [`outcome`] | this error code, XID or exit: whose fault, and what follows? |
//! | [`ladder`] | memory ran out: what is given up next? |
//! | [`routing`] | which replica takes the request? |

pub mod admission;
pub mod ladder;
pub mod outcome;
pub mod placement;
pub mod restart;
pub mod routing;

use std::time::Duration;

/// A point in time: how long after the host's start.
pub type Moment = Duration;

/// A random number that is a function of a seed and a count alone (SplitMix64, Steele et al. 2014), in `[0, 1)`.
pub(crate) fn unit_random(seed: u64, count: u64) -> f64 {
    let bits = mix(seed ^ mix(count)) >> 11;
    // 53 bits are exact in an f64.
    bits as f64 / (1u64 << 53) as f64
}

/// The output function of SplitMix64 after one step from `state`.
pub(crate) fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
