//! What the machine allows: the bytes that a step must read and the products that it must make, against measured speeds.

use super::test::Test;
use crate::backend::cpu::{CpuBackend, measure_multiply_adds, measure_read_bandwidth};
use crate::backend::{BLOCK_TOKENS, KvLayout, cuda};
use crate::cli::CliError;
use crate::cli::load::backend_exit;
use crate::engine::DeviceName;
use crate::gguf::GgufFile;
use crate::models::ModelSpec;
use crate::models::spec::{Ffn, Linear, TensorRule};

/// What a step must at least read and multiply.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Cost {
    /// Bytes and multiply-adds per token of all matrices that every token uses.
    shared: (f64, f64),
    /// The same of the output.
    head: (f64, f64),
    /// The same of all experts together, and the part of them that a token uses.
    experts: (f64, f64, f64),
    /// Bytes of a token's keys and values, and multiply-adds per token seen, of each layer.
    layer_kv: (f64, f64),
    /// The window of each layer.
    windows: Vec<Option<usize>>,
}

impl Cost {
    pub(super) fn of(file: &GgufFile, spec: &ModelSpec, kv: KvLayout) -> Result<Self, CliError> {
        let matrix = |linear: &Linear<TensorRule>| -> Result<(f64, f64), CliError> {
            let (n_mats, n_rows, n_cols) = linear.weight.shape().mats_rows_cols();
            let row_bytes = file.require(linear.weight.name())?.dtype.row_bytes(n_cols).unwrap_or_default();
            Ok(((n_mats * n_rows * row_bytes) as f64, (n_mats * n_rows * n_cols) as f64))
        };
        let mut cost = Self {
            shared: (0.0, 0.0),
            head: matrix(&spec.output)?,
            experts: (0.0, 0.0, spec.moe().map_or(0.0, |(n, used)| used as f64 / n as f64)),
            layer_kv: (kv.block_bytes() as f64 / (BLOCK_TOKENS * kv.n_layers.max(1)) as f64, 0.0),
            windows: spec.layers.iter().map(|l| l.attention.window).collect(),
        };
        cost.layer_kv.1 = 2.0 * (spec.heads.n_heads * spec.heads.head_dim) as f64;
        for layer in &spec.layers {
            let a = &layer.attention;
            let (mut shared, mut experts) = (vec![&a.q, &a.k, &a.v, &a.output], Vec::new());
            match &layer.ffn {
                Ffn::Gated { gate, up, down, .. } => shared.extend([gate, up, down]),
                Ffn::Moe { router, gate, up, down, .. } => {
                    shared.push(router);
                    experts.extend([gate, up, down]);
                }
            }
            for linear in shared {
                let (bytes, macs) = matrix(linear)?;
                cost.shared = (cost.shared.0 + bytes, cost.shared.1 + macs);
            }
            for linear in experts {
                let (bytes, macs) = matrix(linear)?;
                cost.experts = (cost.experts.0 + bytes, cost.experts.1 + macs, cost.experts.2);
            }
        }
        Ok(cost)
    }

    /// The most tokens per second that the machine's memory and its arithmetic allow, each on its own.
    pub(super) fn limit(&self, test: &Test, machine: &Machine) -> Limit {
        let (mut bytes, mut macs) = (0.0, 0.0);
        let n_seqs = test.n_sequences() as f64;
        let n_logit_steps = if matches!(test, Test::Decode { .. }) { test.steps().len() } else { 1 };
        for (at, n) in test.steps() {
            let n_tokens = n as f64 * n_seqs;
            let read = (n_tokens * self.experts.2).min(1.0);
            bytes += self.shared.0 + self.experts.0 * read;
            macs += n_tokens * (self.shared.1 + self.experts.1 * self.experts.2);
            for window in &self.windows {
                let seen = |p: usize| (p + 1).min(window.unwrap_or(usize::MAX)) as f64;
                bytes += n_seqs * seen(at + n - 1) * self.layer_kv.0;
                macs += n_seqs * (at..at + n).map(seen).sum::<f64>() * self.layer_kv.1;
            }
        }
        bytes += n_logit_steps as f64 * self.head.0;
        macs += n_logit_steps as f64 * n_seqs * self.head.1;
        let n_tokens = (test.n_tokens() * test.n_sequences()) as f64;
        Limit {
            memory: n_tokens * machine.memory_read_bytes_per_s / bytes,
            arithmetic: n_tokens * machine.multiply_adds_per_s / macs,
        }
    }
}

/// Tokens per second that the machine allows.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub(super) struct Limit {
    /// Every weight read once per step, at the measured bandwidth.
    pub(super) memory: f64,
    /// Every product, at the measured rate.
    pub(super) arithmetic: f64,
}

/// What was measured of the machine.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct Machine {
    pub(super) device: String,
    pub(super) instruction_set: String,
    pub(super) threads: usize,
    pub(super) memory_read_bytes_per_s: f64,
    pub(super) multiply_adds_per_s: f64,
}

impl Machine {
    pub(super) fn measure(device: &DeviceName, threads: Option<usize>) -> Result<Self, CliError> {
        match device {
            DeviceName::Cpu => {
                let cpu = threads.map_or_else(CpuBackend::new, CpuBackend::with_threads);
                Ok(Self {
                    device: "cpu".into(),
                    instruction_set: cpu.instruction_set().into(),
                    threads: cpu.n_threads(),
                    memory_read_bytes_per_s: measure_read_bandwidth(cpu.n_threads()),
                    multiply_adds_per_s: measure_multiply_adds(cpu.n_threads()),
                })
            }
            DeviceName::Gpu(uuid) => {
                let speed = cuda::measure(uuid).map_err(|e| CliError::new(backend_exit(&e), e))?;
                Ok(Self {
                    device: format!("{} ({uuid})", speed.name),
                    instruction_set: format!("sm_{}{}", speed.capability.0, speed.capability.1),
                    threads: speed.n_sms as usize,
                    memory_read_bytes_per_s: speed.copy_bytes_per_s,
                    multiply_adds_per_s: speed.multiply_adds_per_s,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine {
        device: String::new(),
        instruction_set: String::new(),
        threads: 1,
        memory_read_bytes_per_s: 1000.0,
        multiply_adds_per_s: 4000.0,
    };

    fn cost() -> Cost {
        Cost {
            shared: (100.0, 200.0),
            head: (50.0, 100.0),
            experts: (80.0, 160.0, 0.25),
            layer_kv: (2.0, 4.0),
            windows: vec![None, Some(2)],
        }
    }

    #[test]
    fn a_decode_step_reads_each_weight_once_and_a_quarter_of_the_experts() {
        let limit = cost().limit(&Test::Decode { n_sequences: 1, n_tokens: 1, depth: 9 }, &MACHINE);
        // 100 + 80 / 4 + 50, keys and values of 10 tokens in one layer and 2 in the other.
        assert_eq!(limit.memory, 1000.0 / (170.0 + 2.0 * 12.0));
        assert_eq!(limit.arithmetic, 4000.0 / (200.0 + 40.0 + 100.0 + 4.0 * 12.0));
    }

    #[test]
    fn a_batch_shares_the_weights_and_reads_all_experts_in_the_end() {
        let one = cost().limit(&Test::Decode { n_sequences: 1, n_tokens: 1, depth: 0 }, &MACHINE);
        let eight = cost().limit(&Test::Decode { n_sequences: 8, n_tokens: 1, depth: 0 }, &MACHINE);
        assert_eq!(eight.memory, 8.0 * 1000.0 / (230.0 + 8.0 * 4.0));
        assert!((eight.arithmetic - one.arithmetic).abs() < 1e-9);
    }

    #[test]
    fn prefill_runs_in_chunks_and_wants_one_row_of_logits() {
        let test = Test::Prefill { n_tokens: 1100, chunk: 512 };
        assert_eq!(test.steps(), [(0, 512), (512, 512), (1024, 76)]);
        let limit = cost().limit(&Test::Prefill { n_tokens: 4, chunk: 512 }, &MACHINE);
        assert_eq!(limit.memory, 4.0 * 1000.0 / (100.0 + 80.0 + 50.0 + 2.0 * 6.0));
        // Tokens see 1 + 2 + 3 + 4 in one layer and 1 + 2 + 2 + 2 in the other.
        assert_eq!(limit.arithmetic, 4.0 * 4000.0 / (4.0 * 240.0 + 100.0 + 4.0 * 17.0));
    }
}
