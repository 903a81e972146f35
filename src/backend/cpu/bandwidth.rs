//! How fast this machine reads memory: the limit of decoding.

use super::Isa;
use super::lanes;
use super::pool::{Pool, Shards};
use std::time::Instant;

/// Bytes read per pass: more than the last-level cache of most machines.
const BYTES: usize = 256 << 20;
/// Elements per task.
const TASK: usize = 64 << 10;
/// Passes, of which the best counts: others on the machine can only slow one down.
const PASSES: usize = 5;

/// Bytes per second that `n_threads` threads read together, summing f32 from memory. Takes about a second.
pub fn measure_read_bandwidth(n_threads: usize) -> f64 {
    let all = vec![1.0f32; BYTES / 4];
    let (isa, mut pool) = (Isa::best(), Pool::new(n_threads));
    let n_tasks = all.len() / TASK;
    let mut sums = vec![0.0; n_tasks];
    let seconds = (0..PASSES).map(|_| {
        let shards = Shards::new(&mut sums);
        let start = Instant::now();
        pool.run(n_tasks, &|i| {
            // SAFETY: sum `i` belongs to task `i` alone.
            let sum = unsafe { shards.part(i, 1) };
            sum[0] = lanes::sum(isa, &all[i * TASK..][..TASK]);
        });
        start.elapsed().as_secs_f64()
    });
    let best = seconds.fold(f64::INFINITY, f64::min);
    assert!(sums.iter().all(|s| *s == TASK as f32), "a sum of ones is exact");
    BYTES as f64 / best
}
