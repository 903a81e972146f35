//! How fast this machine reads memory and multiplies: the limits of decoding and of prefill.

use super::Isa;
use super::pool::{Pool, Shards};
use super::{lanes, matmul};
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

/// Rows, columns and length of the product that measures arithmetic: 16 + 16 KiB, in the L1 cache.
const TILE: (usize, usize, usize) = (16, 16, 256);
/// Products per task.
const PRODUCTS: usize = 1000;

/// Multiply-adds per second that `n_threads` threads do together on f32 in the nearest cache, each product rounded
/// before it is added. Takes some tens of milliseconds.
pub fn measure_multiply_adds(n_threads: usize) -> f64 {
    let (n_rows, n_cols, len) = TILE;
    let (panel, col) = (vec![1.0f32; n_rows * len], vec![1.0f32; len]);
    let cols = vec![col.as_slice(); n_cols];
    let (isa, mut pool) = (Isa::best(), Pool::new(n_threads));
    let n_tasks = 8 * n_threads;
    let mut sums = vec![0.0; n_tasks * n_rows * n_cols];
    let seconds = (0..PASSES).map(|_| {
        let shards = Shards::new(&mut sums);
        let start = Instant::now();
        pool.run(n_tasks, &|i| {
            // SAFETY: these products belong to task `i` alone.
            let out = unsafe { shards.part(i * n_rows * n_cols, n_rows * n_cols) };
            for _ in 0..PRODUCTS {
                matmul::panel_times(isa, std::hint::black_box(&panel), &cols, out);
            }
        });
        start.elapsed().as_secs_f64()
    });
    let best = seconds.fold(f64::INFINITY, f64::min);
    assert!(sums.iter().all(|s| *s == len as f32), "a sum of ones is exact");
    (n_tasks * PRODUCTS * n_rows * n_cols * len) as f64 / best
}
