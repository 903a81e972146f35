//! Rotary position embedding from a precomputed table.

use crate::backend::Pairing;

/// Rotates the first `n_rot` elements of a head; `table` holds `n_rot / 2` cosines and as many sines.
pub(super) fn rotate(head: &mut [f32], table: &[f32], pairing: Pairing) {
    let half = table.len() / 2;
    assert!(table.len() <= head.len(), "{} rotated elements in a head of {}", table.len(), head.len());
    let (cos, sin) = table.split_at(half);
    for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
        let (a, b) = match pairing {
            Pairing::Interleaved => (2 * i, 2 * i + 1),
            Pairing::Halves => (i, i + half),
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * cos - y * sin;
        head[b] = x * sin + y * cos;
    }
}
