//! The adapter: the same five calls for every architecture.

use super::golden::{self, argmax, checkpoint, golden};
use playhouse::backend::KvDtype;
use playhouse::backend::cpu::CpuBackend;
use playhouse::engine::{Adapter, AdapterError, Generation, RunnerLimits};
use playhouse_actors::engine::SamplingParams;

fn adapter(name: &str, n_ctx: usize, n_sequences: usize) -> Adapter<CpuBackend> {
    let limits = RunnerLimits { max_batch_tokens: 50, ..RunnerLimits::new(n_ctx, n_sequences, KvDtype::F32) };
    Adapter::load(&checkpoint(name), CpuBackend::with_threads(2), limits, &mut |_| ()).unwrap()
}

#[test]
fn generate_gives_the_answers_of_transformers() {
    for name in golden::ALL {
        for prompt in &golden(name).prompts {
            let mut adapter = adapter(name, prompt.n_ctx, 1);
            let answer = adapter.generate(&prompt.tokens, &Generation::greedy(64)).unwrap();
            assert_eq!(answer, prompt.greedy, "{name}, {} tokens", prompt.tokens.len());
        }
    }
}

#[test]
fn prefill_and_decode_interleave_between_sequences() {
    let golden = golden("gpt-oss");
    let (a, b) = (&golden.prompts[2], &golden.prompts[3]);
    let mut adapter = adapter("gpt-oss", a.n_ctx, 2);
    let (id_a, id_b) = (adapter.open(), adapter.open());
    let mut next_a = argmax(adapter.prefill(id_a, &a.tokens).unwrap());
    let mut next_b = argmax(adapter.prefill(id_b, &b.tokens).unwrap());
    for (&golden_a, &golden_b) in a.greedy.iter().zip(&b.greedy) {
        assert_eq!((next_a, next_b), (golden_a, golden_b));
        next_a = argmax(adapter.decode(id_a, next_a).unwrap());
        next_b = argmax(adapter.decode(id_b, next_b).unwrap());
    }
}

#[test]
fn sizes_are_those_of_the_file() {
    let adapter = adapter("qwen2", 512, 1);
    assert_eq!((adapter.vocab_size(), adapter.hidden_dim(), adapter.num_layers()), (288, 64, 3));
    let (one, two) = (adapter.vram_usage(64, 1), adapter.vram_usage(64, 2));
    assert_eq!(one.weights, two.weights);
    // 64 tokens, 3 layers, 2 heads of 16, keys and values, 4 bytes.
    assert_eq!((one.kv, two.kv), (64 * 3 * 2 * 16 * 2 * 4, 2 * 64 * 3 * 2 * 16 * 2 * 4));
}

#[test]
fn generation_stops_where_it_is_told() {
    let prompt = &golden("llama2").prompts[1];
    let mut adapter = adapter("llama2", 64, 1);
    let stop_at = prompt.greedy.iter().position(|&t| t == prompt.greedy[5]).unwrap();
    let how = Generation { stop_ids: vec![prompt.greedy[5]], ..Generation::greedy(64) };
    assert_eq!(adapter.generate(&prompt.tokens, &how).unwrap(), prompt.greedy[..=stop_at]);
    // 32 tokens of prompt leave room for 32.
    assert_eq!(adapter.generate(&prompt.tokens, &Generation::greedy(100)).unwrap(), prompt.greedy[..32]);
    assert!(adapter.generate(&prompt.tokens, &Generation::greedy(0)).unwrap().is_empty());
}

#[test]
fn seeds_repeat_and_differ() {
    let prompt = &golden("phi3").prompts[1];
    let mut adapter = adapter("phi3", 512, 1);
    let mut answer = |seed| {
        let sampling = SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() };
        adapter.generate(&prompt.tokens, &Generation { sampling, ..Generation::greedy(32) }).unwrap()
    };
    let first = answer(1);
    assert_eq!(first, answer(1));
    assert_ne!(first, answer(2));
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    let prompt = &golden("qwen2").prompts[1];
    let mut adapter = adapter("qwen2", 64, 2);
    let id = adapter.open();
    let logits = adapter.prefill(id, &prompt.tokens).unwrap().to_vec();
    assert!(matches!(adapter.prefill(id, &[]), Err(AdapterError::NoTokens)));
    assert!(matches!(adapter.decode(id, 288), Err(AdapterError::UnknownToken { token: 288, n_vocab: 288 })));
    assert!(matches!(adapter.prefill(id, &[1; 34]), Err(AdapterError::ContextExceeded { needed: 65, limit: 64 })));

    let hoarder = adapter.open();
    adapter.prefill(hoarder, &[1; 64]).unwrap();
    let late = adapter.open();
    adapter.prefill(late, &[1; 32]).unwrap();
    assert!(matches!(adapter.decode(late, 1), Err(AdapterError::OutOfBlocks { needed: 1, free: 0 })));
    adapter.close(hoarder);
    assert!(matches!(adapter.decode(hoarder, 1), Err(AdapterError::UnknownSequence(_))));
    adapter.decode(late, 1).unwrap();
    adapter.close(late);
    adapter.close(id);

    let again = adapter.open();
    assert_eq!(adapter.prefill(again, &prompt.tokens).unwrap(), logits);
}
