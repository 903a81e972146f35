//! The figures, as a table and as a document.

use super::limit::{Limit, Machine};
use super::test::Test;
use std::fmt::Write as _;

/// A test's result, in tokens per second.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Outcome {
    #[serde(flatten)]
    test: Test,
    runs: usize,
    median: f64,
    slowest: f64,
    fastest: f64,
    limit: Limit,
}

impl Outcome {
    pub(super) fn new(test: &Test, mut seconds: Vec<f64>, limit: Limit) -> Self {
        seconds.sort_by(f64::total_cmp);
        let n_tokens = (test.n_tokens() * test.n_sequences()) as f64;
        let (middle, last) = (seconds.len() / 2, seconds.len() - 1);
        let median = if seconds.len().is_multiple_of(2) {
            (seconds[middle - 1] + seconds[middle]) / 2.0
        } else {
            seconds[middle]
        };
        Self {
            test: *test,
            runs: seconds.len(),
            median: n_tokens / median,
            slowest: n_tokens / seconds[last],
            fastest: n_tokens / seconds[0],
            limit,
        }
    }
}

/// The whole result.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) architecture: &'static str,
    pub(super) weight_bytes: u64,
    pub(super) machine: Machine,
    pub(super) results: Vec<Outcome>,
}

impl Report {
    pub(super) fn table(&self) -> String {
        let Machine { device, instruction_set, threads, .. } = &self.machine;
        let mut out = format!(
            "{} ({}, {:.1} MB of weights) on {device}: {threads} threads, {instruction_set}, {:.1} GB/s from memory, \
             {:.1} G multiply-adds/s\n\n{:<24}{:>10}  {:<19}{:>10}  {}\n",
            self.model,
            self.architecture,
            self.weight_bytes as f64 / 1e6,
            self.machine.memory_read_bytes_per_s / 1e9,
            self.machine.multiply_adds_per_s / 1e9,
            "test",
            "tokens/s",
            "slowest .. fastest",
            "limit",
            "by"
        );
        for r in &self.results {
            let (limit, by) = if r.limit.memory < r.limit.arithmetic {
                (r.limit.memory, "memory")
            } else {
                (r.limit.arithmetic, "arithmetic")
            };
            let spread = format!("{:.1} .. {:.1}", r.slowest, r.fastest);
            // Writing to a string does not fail.
            let _ = writeln!(
                out,
                "{:<24}{:>10.1}  {spread:<19}{limit:>10.1}  {by}, {:.0} %",
                r.test.to_string(),
                r.median,
                100.0 * r.median / limit
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_runs_is_between_the_middle_two() {
        let limit = Limit { memory: 1.0, arithmetic: 1.0 };
        let test = Test::Prefill { n_tokens: 10, chunk: 512 };
        let outcome = Outcome::new(&test, vec![4.0, 1.0, 3.0, 1.0], limit);
        assert_eq!((outcome.median, outcome.slowest, outcome.fastest), (5.0, 2.5, 10.0));
        assert_eq!(Outcome::new(&test, vec![5.0, 1.0, 2.0], limit).median, 5.0);
    }
}
