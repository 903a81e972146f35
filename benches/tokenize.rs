//! Tokenizing and detokenizing: megabytes of text per second, on one thread. `cargo bench --bench tokenize`.
//!
//! Uses the four vocabularies of the shared data beside the project; says so where they are absent.

use std::path::{Path, PathBuf};

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use playhouse::gguf::GgufFile;
use playhouse::text::{ChatTemplate, Detokenizer, EncodeOptions, Message, RenderOptions, StopMatcher, Tokenizer};

const VOCABULARIES: [&str; 4] = ["qwen2", "phi-3", "llama-bpe", "llama-spm"];

fn main() {
    divan::main();
}

fn vocab_dir() -> PathBuf {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    std::env::var_os("PLAYHOUSE_SHARED").map_or(beside, PathBuf::from).join("data/vocab")
}

fn open(name: &str) -> Option<(GgufFile, Tokenizer)> {
    let path = vocab_dir().join(format!("ggml-vocab-{name}.gguf"));
    let Ok(gguf) = GgufFile::open(&path) else {
        println!("skipped: {} is absent", path.display());
        return None;
    };
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("the shared vocabularies are valid");
    Some((gguf, tokenizer))
}

/// Prose, code, numbers and several scripts: 128 KiB.
fn mixed() -> String {
    let text = "The river was low that summer, and 1,024 herons stood in it. \
                fn main() { println!(\"{}\", x + 1); }\n\tнещо на Български, 我想在apple工作, \
                l'été à Besançon 🦙🦙 --- 3.14159 !!! \n\n";
    text.chars().cycle().take(100_000).collect()
}

#[divan::bench(args = VOCABULARIES)]
fn encode_mixed(bencher: Bencher<'_, '_>, name: &str) {
    encode(bencher, name, mixed());
}

#[divan::bench(args = VOCABULARIES)]
fn encode_one_megabyte_of_one_character(bencher: Bencher<'_, '_>, name: &str) {
    encode(bencher, name, "a".repeat(1 << 20));
}

fn encode(bencher: Bencher<'_, '_>, name: &str, text: String) {
    let Some((_, tokenizer)) = open(name) else { return };
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| tokenizer.encode(black_box(&text), EncodeOptions::PROMPT).expect("all bytes have tokens"));
}

#[divan::bench(args = VOCABULARIES)]
fn detokenize_with_stop_strings(bencher: Bencher<'_, '_>, name: &str) {
    let Some((_, tokenizer)) = open(name) else { return };
    let text = mixed();
    let ids = tokenizer.encode(&text, EncodeOptions::PLAIN).expect("all bytes have tokens");
    bencher.counter(BytesCount::new(text.len())).bench_local(|| {
        let mut detokenizer = Detokenizer::new(&tokenizer, true);
        let mut matcher = StopMatcher::new(vec!["\n\nUser:".into(), "</never>".into()]);
        ids.iter().map(|&id| matcher.push(&detokenizer.push(id)).emit.len()).sum::<usize>()
    });
}

#[divan::bench]
fn load_vocabulary(bencher: Bencher<'_, '_>) {
    let Some((gguf, _)) = open("qwen2") else { return };
    bencher.bench_local(|| Tokenizer::from_gguf(&gguf).expect("the shared vocabularies are valid"));
}

#[divan::bench]
fn render_a_chat_of_100_messages(bencher: Bencher<'_, '_>) {
    let Some((gguf, tokenizer)) = open("qwen2") else { return };
    let template = ChatTemplate::from_gguf(&gguf, &tokenizer).expect("it compiles").expect("it is there");
    let messages: Vec<Message> = (0..100)
        .map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, "A line of a hundred letters. ".repeat(4)))
        .collect();
    let options = RenderOptions::default();
    bencher.bench_local(|| template.prompt(&tokenizer, &messages, &options).expect("it renders"));
}
