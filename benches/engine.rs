//! Whole steps of the embedded model on the CPU, embedding to logits: tokens per second of prefill and of decode.
//! `cargo bench --bench engine`. For a model of your own, and beside the machine's limits, use `playhouse bench`.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use playhouse::backend::cpu::CpuBackend;
use playhouse::backend::{BLOCK_TOKENS, Batch, KvDtype, SeqSpan};
use playhouse::basho;
use playhouse::engine::{Runner, RunnerLimits, StepModel};
use playhouse::gguf::GgufFile;

/// Tokens that are in the cache before a decode step.
const PAST: usize = 63;

fn main() {
    divan::main();
}

fn runner(n_sequences: usize) -> Runner<CpuBackend> {
    let file = GgufFile::from_static(basho::LABEL, basho::GGUF).expect("the embedded file is sound");
    let limits = RunnerLimits::new(256, n_sequences, KvDtype::F32);
    Runner::load(&file, CpuBackend::new(), limits, &mut |_| ()).expect("the embedded model loads")
}

/// `n_tokens` tokens of each of `n_sequences` sequences, from position `past` on; sequences take blocks in turn.
fn batch(n_sequences: usize, n_tokens: usize, past: usize) -> Batch {
    let blocks_each = (past + n_tokens).div_ceil(BLOCK_TOKENS);
    let mut batch = Batch::default();
    for sequence in 0..n_sequences {
        let first_block = sequence * blocks_each;
        let first = batch.tokens.len();
        for position in past..past + n_tokens {
            batch.tokens.push((300 + 7 * position + 31 * sequence) as u32 % 2000);
            batch.positions.push(position as u32);
            batch.slots.push((first_block * BLOCK_TOKENS + position) as u32);
        }
        let blocks = (first_block as u32..).take(blocks_each).collect();
        batch.spans.push(SeqSpan { first, n_tokens, kv_len: past + n_tokens, blocks });
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
    }
    batch
}

#[divan::bench(args = [16, 64, 192])]
fn prefill(bencher: Bencher<'_, '_>, n_tokens: usize) {
    let (mut runner, batch, mut logits) = (runner(1), batch(1, n_tokens, 0), Vec::new());
    bencher
        .counter(ItemsCount::new(n_tokens))
        .bench_local(|| runner.run(black_box(&batch), &mut logits).expect("the step runs"));
}

#[divan::bench(args = [1, 4, 32])]
fn decode(bencher: Bencher<'_, '_>, n_sequences: usize) {
    let mut runner = runner(n_sequences);
    let mut logits = Vec::new();
    runner.run(&batch(n_sequences, PAST, 0), &mut logits).expect("the prompts run");
    let step = batch(n_sequences, 1, PAST);
    bencher
        .counter(ItemsCount::new(n_sequences))
        .bench_local(|| runner.run(black_box(&step), &mut logits).expect("the step runs"));
}
