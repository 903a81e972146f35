//! Made-up vocabularies: every byte, then syllables and words of two and three syllables, so that English-looking
//! prompts are cut into words and generated text can be read aloud. The special tokens stand where the model has them.

use super::shapes::{Shape, VocabKind};
use crate::gguf::StrArray;
use crate::gguf::writer::GgufWriter;

/// llama.cpp's `llama_token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

const CONSONANTS: &str = "bcdfghjklmnpqrstvwxz";
const VOWELS: &str = "aeiou";

/// What a kind of vocabulary is made of.
struct Recipe {
    /// `tokenizer.ggml.model` and `.pre`.
    model: &'static str,
    pre: &'static str,
    /// How many of the last ids are special.
    n_special: usize,
    /// Special tokens by their distance from the first special id.
    special: &'static [(usize, &'static str)],
    /// Ids by key: distance from the first special id.
    ids: &'static [(&'static str, usize)],
    /// Ids by key that do not depend on the vocabulary's size.
    fixed_ids: &'static [(&'static str, u32)],
    add_bos: bool,
    chat_template: &'static str,
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] \
+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

const PHI3_CHAT: &str = "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + \
'<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}";

const HARMONY_CHAT: &str = "{% for message in messages %}{{ '<|start|>' + message['role'] + '<|message|>' + \
message['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}";

const LLAMA3_CHAT: &str = "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

const LLAMA2_CHAT: &str = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}\
{% endfor %}";

fn recipe(kind: VocabKind) -> Recipe {
    match kind {
        VocabKind::Qwen2 => Recipe {
            model: "gpt2",
            pre: "qwen2",
            n_special: 293,
            special: &[(0, "<|endoftext|>"), (1, "<|im_start|>"), (2, "<|im_end|>")],
            ids: &[("bos", 0), ("eos", 2), ("padding", 0)],
            fixed_ids: &[],
            add_bos: false,
            chat_template: CHATML,
        },
        VocabKind::Llama3 => Recipe {
            model: "gpt2",
            pre: "llama-bpe",
            n_special: 256,
            special: &[
                (0, "<|begin_of_text|>"),
                (1, "<|end_of_text|>"),
                (6, "<|start_header_id|>"),
                (7, "<|end_header_id|>"),
                (9, "<|eot_id|>"),
            ],
            ids: &[("bos", 0), ("eos", 9)],
            fixed_ids: &[],
            add_bos: true,
            chat_template: LLAMA3_CHAT,
        },
        VocabKind::Harmony => Recipe {
            model: "gpt2",
            pre: "gpt-4o",
            n_special: 1090,
            special: &[
                (0, "<|startoftext|>"),
                (1, "<|endoftext|>"),
                (4, "<|return|>"),
                (5, "<|constrain|>"),
                (7, "<|channel|>"),
                (8, "<|start|>"),
                (9, "<|end|>"),
                (10, "<|message|>"),
                (14, "<|call|>"),
            ],
            ids: &[("bos", 0), ("eos", 4), ("padding", 1)],
            fixed_ids: &[],
            add_bos: false,
            chat_template: HARMONY_CHAT,
        },
        VocabKind::Phi3 => Recipe {
            model: "llama",
            pre: "default",
            n_special: 64,
            special: &[(0, "<|endoftext|>"), (1, "<|assistant|>"), (6, "<|system|>"), (7, "<|end|>"), (10, "<|user|>")],
            ids: &[("eos", 0), ("padding", 0)],
            fixed_ids: &[("bos", 1), ("unknown", 0)],
            add_bos: true,
            chat_template: PHI3_CHAT,
        },
        VocabKind::Llama2 => Recipe {
            model: "llama",
            pre: "default",
            n_special: 0,
            special: &[],
            ids: &[],
            fixed_ids: &[("bos", 1), ("eos", 2), ("unknown", 0)],
            add_bos: true,
            chat_template: LLAMA2_CHAT,
        },
    }
}

/// Sets the `tokenizer.*` keys for a shape.
pub(super) fn set_keys(header: &mut GgufWriter, shape: &Shape) {
    let recipe = recipe(shape.vocab);
    let n_plain = (shape.n_vocab as usize).saturating_sub(recipe.n_special);
    header.set("tokenizer.ggml.model", recipe.model).set("tokenizer.ggml.pre", recipe.pre);
    let mut table = if recipe.model == "gpt2" { byte_level(n_plain) } else { sentence_pieces(n_plain) };
    for i in 0..recipe.n_special {
        match recipe.special.iter().find(|(at, _)| *at == i) {
            Some((_, text)) => table.push(text, CONTROL, SPECIAL_SCORE),
            None => table.push(&format!("<|unused_{i}|>"), UNUSED, SPECIAL_SCORE),
        }
    }
    header.set("tokenizer.ggml.tokens", table.tokens);
    if recipe.model == "llama" {
        header.set("tokenizer.ggml.scores", table.scores);
    }
    header.set("tokenizer.ggml.token_type", table.types);
    if recipe.model == "gpt2" {
        header.set("tokenizer.ggml.merges", table.merges);
    }
    for (key, at) in recipe.ids {
        header.set(format!("tokenizer.ggml.{key}_token_id"), (n_plain + at) as u32);
    }
    for (key, id) in recipe.fixed_ids {
        header.set(format!("tokenizer.ggml.{key}_token_id"), *id);
    }
    header.set("tokenizer.ggml.add_bos_token", recipe.add_bos);
    header.set("tokenizer.chat_template", recipe.chat_template);
}

/// What SentencePiece vocabularies give special tokens.
const SPECIAL_SCORE: f32 = -1000.0;

/// Columns of the tokenizer's tables.
#[derive(Default)]
struct Table {
    tokens: StrArray,
    types: Vec<i32>,
    scores: Vec<f32>,
    merges: StrArray,
}

impl Table {
    fn push(&mut self, text: &str, kind: i32, score: f32) {
        self.tokens.push(text);
        self.types.push(kind);
        self.scores.push(score);
    }
}

/// Words in the order of their length, as (first part, second part): each part is a character or an earlier word.
/// `space` is the character that begins a word.
fn words(space: char) -> impl Iterator<Item = (String, String)> {
    let syllables = || CONSONANTS.chars().flat_map(|c| VOWELS.chars().map(move |v| format!("{c}{v}")));
    let one = || CONSONANTS.chars().flat_map(|c| VOWELS.chars().map(move |v| (c.to_string(), v.to_string())));
    let spaced = move || syllables().map(move |s| (space.to_string(), s));
    let join = |(a, b): (String, String)| a + &b;
    let starts = move || spaced().chain(one()).map(join);
    let two = move || starts().flat_map(move |s| syllables().map(move |t| (s.clone(), t)));
    let three = move || two().map(join).flat_map(move |s| syllables().map(move |t| (s.clone(), t)));
    one().chain(spaced()).chain(two()).chain(three())
}

/// GPT-2's printable stand-in for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + nth).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// A byte-level BPE vocabulary: 256 bytes, then what the merges make.
fn byte_level(n: usize) -> Table {
    let mut table = Table::default();
    for byte in 0..=u8::MAX {
        table.push(&byte_char(byte).to_string(), NORMAL, 0.0);
    }
    for (a, b) in words(byte_char(b' ')).take(n.saturating_sub(256)) {
        table.merges.push(&format!("{a} {b}"));
        table.push(&(a + &b), NORMAL, 0.0);
    }
    table
}

/// A SentencePiece vocabulary: control tokens, bytes, words by falling score, single characters.
fn sentence_pieces(n: usize) -> Table {
    let mut table = Table::default();
    table.push("<unk>", UNKNOWN, SPECIAL_SCORE);
    table.push("<s>", CONTROL, SPECIAL_SCORE);
    table.push("</s>", CONTROL, SPECIAL_SCORE);
    for byte in 0..=u8::MAX {
        table.push(&format!("<0x{byte:02X}>"), BYTE, 0.0);
    }
    let singles: Vec<char> = std::iter::once('▁').chain('!'..='~').collect();
    let n_words = n.saturating_sub(table.types.len() + singles.len());
    for (i, (a, b)) in words('▁').take(n_words).enumerate() {
        table.push(&(a + &b), NORMAL, -(i as f32));
    }
    for (i, c) in singles.iter().enumerate() {
        table.push(&c.to_string(), NORMAL, -((n_words + i) as f32));
    }
    table
}
