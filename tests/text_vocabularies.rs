//! The tokenizer against four real vocabularies: listed ids, round trips, linear time, `tokenizer.json`.
//!
//! The vocabularies lie in the shared data beside the project (`../shared/data/vocab`, or under
//! `PLAYHOUSE_SHARED`). Where they are absent these tests say so and check nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use playhouse::gguf::{Array, GgufFile, Value};
use playhouse::text::{EncodeOptions, Tokenizer};
use serde_json::json;

const VOCABULARIES: [&str; 4] = ["qwen2", "phi-3", "llama-bpe", "llama-spm"];
const PARSE: EncodeOptions = EncodeOptions { add_special: false, parse_special: true };

fn shared() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let root = std::env::var_os("PLAYHOUSE_SHARED").map_or(beside, PathBuf::from);
    let vocab = root.join("data/vocab");
    if !vocab.is_dir() {
        println!("skipped: {} is absent", vocab.display());
        return None;
    }
    Some(vocab)
}

/// Runs `check` on each vocabulary that is there.
fn for_each(check: impl Fn(&str, &Path, &GgufFile, &Tokenizer)) {
    let Some(dir) = shared() else { return };
    for name in VOCABULARIES {
        let path = dir.join(format!("ggml-vocab-{name}.gguf"));
        let gguf = GgufFile::open(&path).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        check(name, &path, &gguf, &tokenizer);
    }
}

fn listed_cases(path: &Path) -> Vec<(String, Vec<u32>)> {
    let with = |ext: &str| std::fs::read_to_string(format!("{}.{ext}", path.display())).unwrap();
    let (input, output) = (with("inp"), with("out"));
    let input = input.strip_suffix("\n__ggml_vocab_test__\n").unwrap_or(&input);
    let texts: Vec<&str> = input.split("\n__ggml_vocab_test__\n").collect();
    let ids = |line: &str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
    let lines: Vec<Vec<u32>> = output.lines().map(ids).collect();
    assert_eq!(texts.len(), lines.len());
    texts.into_iter().map(str::to_owned).zip(lines).collect()
}

#[test]
fn all_listed_cases_give_the_listed_ids() {
    for_each(|name, path, _, tokenizer| {
        let cases = listed_cases(path);
        assert!(cases.len() > 40);
        for (text, expected) in cases {
            let ids = tokenizer.encode(&text, EncodeOptions::PLAIN).unwrap();
            assert_eq!(ids, expected, "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, false), text, "{name}");
        }
    });
}

/// Random numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (((self.0 >> 32) * u64::from(n)) >> 32) as u32
    }

    /// A character: of a script, an emoji, a mark, white space, or any at all.
    fn char(&mut self) -> char {
        const RANGES: [(u32, u32); 14] = [
            (0x20, 0x7E),
            (0x61, 0x7A),
            (0x09, 0x0D),
            (0xA0, 0x24F),
            (0x300, 0x36F),
            (0x370, 0x52F),
            (0x590, 0x6FF),
            (0x900, 0xDFF),
            (0x2000, 0x206F),
            (0x3040, 0x30FF),
            (0x4E00, 0x9FFF),
            (0x1F300, 0x1FAFF),
            (0xFE00, 0xFFFD),
            (0x0, 0x10FFFF),
        ];
        let (first, last) = RANGES[self.below(RANGES.len() as u32) as usize];
        match char::from_u32(first + self.below(last - first + 1)) {
            // SentencePiece writes this character and a space alike.
            None | Some('\u{2581}') => ' ',
            Some(c) => c,
        }
    }

    fn text(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..self.below(24) {
            let c = self.char();
            for _ in 0..=self.below(8).saturating_sub(4) {
                text.push(c);
            }
        }
        text
    }
}

#[test]
fn ten_thousand_random_texts_survive() {
    for_each(|name, _, _, tokenizer| {
        let mut random = Random(0x5EED);
        for _ in 0..10_000 {
            let text = random.text();
            let ids = tokenizer.encode(&text, EncodeOptions::PLAIN).unwrap();
            assert_eq!(tokenizer.decode(&ids, false), text, "{name}");
        }
    });
}

fn seconds_to_encode(tokenizer: &Tokenizer, text: &str) -> Duration {
    let start = Instant::now();
    let ids = tokenizer.encode(text, EncodeOptions::PROMPT).unwrap();
    let time = start.elapsed();
    assert!(!ids.is_empty());
    time
}

/// Eight times the text: linear time is 8, quadratic 64. The seconds are for what else the machine does.
fn check_linear(name: &str, tokenizer: &Tokenizer, unit: &str, n_bytes: usize) {
    let of_bytes = |n: usize| unit.repeat(n / unit.len());
    let part = seconds_to_encode(tokenizer, &of_bytes(n_bytes / 8));
    let whole = seconds_to_encode(tokenizer, &of_bytes(n_bytes));
    let limit = part * 20 + Duration::from_secs(2);
    assert!(whole < limit, "{name}: {unit:?}: an eighth took {part:?}, {n_bytes} bytes {whole:?}");
}

#[test]
fn ten_megabytes_of_one_character_take_linear_time() {
    for_each(|name, _, _, tokenizer| check_linear(name, tokenizer, "a", 10_000_000));
}

#[test]
fn no_repetition_takes_more_than_linear_time() {
    for_each(|name, _, _, tokenizer| {
        for unit in [" ", "\n", "9", "!", "é", "汉", "\u{10FFFF}", "ab", " \n", "a ", "<|", "\u{301}"] {
            check_linear(name, tokenizer, unit, 800_000);
        }
    });
}

#[test]
fn special_tokens_are_read_where_asked_and_only_there() {
    let markup = ["<|im_start|>", "<|end|>", "<|eot_id|>", "</s>"];
    let ids = [vec![151_644], vec![32_007], vec![128_009], vec![2]];
    let Some(dir) = shared() else { return };
    for ((name, text), expected) in VOCABULARIES.iter().zip(markup).zip(ids) {
        let gguf = GgufFile::open(&dir.join(format!("ggml-vocab-{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        assert_eq!(tokenizer.encode(text, PARSE).unwrap(), expected);
        let plain = tokenizer.encode(text, EncodeOptions::PLAIN).unwrap();
        assert!(plain.len() > 1 && plain.iter().all(|&id| !tokenizer.is_control(id)), "{name}: {plain:?}");
        assert_eq!(tokenizer.decode(&plain, true), text);
        assert_eq!(tokenizer.decode(&expected, true), "");
        assert_eq!(tokenizer.decode(&expected, false), text);
    }
}

#[test]
fn bos_is_added_as_the_metadata_says() {
    for_each(|name, _, _, tokenizer| {
        let expected = match name {
            "qwen2" => None,
            "llama-bpe" => Some(128_000),
            _ => Some(1),
        };
        let ids = tokenizer.encode("Hello", EncodeOptions::PROMPT).unwrap();
        assert_eq!(ids.first().copied().filter(|&id| tokenizer.is_control(id)), expected, "{name}");
        let only = tokenizer.encode("", EncodeOptions::PROMPT).unwrap();
        assert_eq!(only, expected.into_iter().collect::<Vec<u32>>());
    });
}

#[test]
fn generation_ends_where_the_model_means_it_to() {
    for_each(|name, _, _, tokenizer| {
        let expected: &[u32] = match name {
            "qwen2" => &[151_643, 151_645],
            "phi-3" => &[2, 32_000, 32_007],
            "llama-bpe" => &[128_001, 128_009],
            _ => &[2],
        };
        assert_eq!(tokenizer.stop_ids(), expected, "{name}");
    });
}

#[test]
fn phi_3_swallows_the_space_after_its_markup() {
    for_each(|name, _, _, tokenizer| {
        if name == "phi-3" {
            let ids = tokenizer.encode("<|user|>\nHello<|end|>\n<|assistant|>\n", PARSE).unwrap();
            assert_eq!(ids, [32_010, 15_043, 32_007, 32_001]);
        }
    });
}

fn strings(gguf: &GgufFile, key: &str) -> Vec<String> {
    match gguf.metadata().get(key) {
        Some(Value::Array(Array::Str(items))) => items.iter().map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// The vocabulary as its makers' `tokenizer.json` writes it.
fn tokenizer_json(name: &str, gguf: &GgufFile) -> serde_json::Value {
    let tokens = strings(gguf, "tokenizer.ggml.tokens");
    let kinds = gguf.metadata().i32s("tokenizer.ggml.token_type").unwrap();
    let is_added = |i: usize| matches!(kinds[i], 2..=4);
    let added: Vec<_> = (0..tokens.len())
        .filter(|&i| is_added(i))
        .map(|i| {
            let rstrip = name == "phi-3" && !matches!(tokens[i].as_str(), "<unk>" | "<s>" | "<|endoftext|>");
            json!({"id": i, "content": tokens[i], "special": kinds[i] != 4, "rstrip": rstrip,
                   "lstrip": false, "single_word": false, "normalized": false})
        })
        .collect();
    let vocab: serde_json::Map<_, _> = tokens.iter().cloned().zip((0..).map(|i: u32| json!(i))).collect();
    let regex = |numbers: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let byte_level = |numbers: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex(numbers)}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]})
    };
    let bpe = |merges: Vec<String>, ignore: bool| {
        json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
               "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore,
               "vocab": vocab, "merges": merges})
    };
    let (pre, model, normalizer) = match name {
        "qwen2" => (byte_level(r"\p{N}"), bpe(strings(gguf, "tokenizer.ggml.merges"), false), json!(null)),
        "llama-bpe" => (byte_level(r"\p{N}{1,3}"), bpe(strings(gguf, "tokenizer.ggml.merges"), true), json!(null)),
        _ => {
            let mut model = bpe(spm_merges(gguf, &tokens), false);
            model["byte_fallback"] = json!(true);
            model["fuse_unk"] = json!(true);
            model["unk_token"] = json!("<unk>");
            let spaces = json!({"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]});
            (json!(null), model, spaces)
        }
    };
    let bos = if name == "llama-bpe" { 128_000 } else { 1 };
    let post = if name == "qwen2" {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false})
    } else {
        let text = &tokens[bos];
        json!({"type": "TemplateProcessing",
               "single": [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
               "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
               "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}}})
    };
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
           "pre_tokenizer": pre, "post_processor": post, "decoder": null, "model": model})
}

/// Merges in the order in which transformers' converter derives them from scores.
fn spm_merges(gguf: &GgufFile, tokens: &[String]) -> Vec<String> {
    let scores = gguf.metadata().f32s("tokenizer.ggml.scores").unwrap();
    let ids: std::collections::HashMap<&str, usize> = tokens.iter().map(String::as_str).zip(0..).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                merges.push((id, *l, *r, format!("{left} {right}")));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then((a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|m| m.3).collect()
}

#[test]
fn a_tokenizer_json_gives_the_same_ids() {
    for_each(|name, path, gguf, tokenizer| {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokenizer.json");
        std::fs::write(&file, serde_json::to_vec(&tokenizer_json(name, gguf)).unwrap()).unwrap();
        let from_json = Tokenizer::from_json_file(&file).unwrap();
        assert_eq!(from_json.n_vocab(), tokenizer.n_vocab());
        for (text, expected) in listed_cases(path) {
            assert_eq!(from_json.encode(&text, EncodeOptions::PLAIN).unwrap(), expected, "{name}: {text:?}");
        }
        let library = tokenizers::Tokenizer::from_file(&file).unwrap();
        let mut random = Random(0xD1CE);
        for _ in 0..2_000 {
            let text = random.text();
            let ids = tokenizer.encode(&text, EncodeOptions::PROMPT).unwrap();
            assert_eq!(from_json.encode(&text, EncodeOptions::PROMPT).unwrap(), ids, "{name}: {text:?}");
            // The Hugging Face library itself as the third opinion.
            let theirs = library.encode(text.as_str(), true).unwrap();
            assert_eq!(theirs.get_ids(), ids, "{name}: {text:?}");
        }
        for id in 0..tokenizer.n_vocab() as u32 {
            assert_eq!(from_json.token_bytes(id), tokenizer.token_bytes(id), "{name}: {id}");
        }
    });
}

#[test]
fn a_tokenizer_json_beside_a_file_without_vocabulary_is_used() {
    let Some(dir) = shared() else { return };
    let gguf = GgufFile::open(&dir.join("ggml-vocab-llama-spm.gguf")).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let json = serde_json::to_vec(&tokenizer_json("llama-spm", &gguf)).unwrap();
    let mut writer = playhouse::gguf::writer::GgufWriter::new();
    writer.set("general.architecture", "llama");
    let model = temp.path().join("model.gguf");
    std::fs::write(&model, writer.to_vec(&[]).unwrap()).unwrap();
    let empty = GgufFile::open(&model).unwrap();
    let error = Tokenizer::from_gguf(&empty).unwrap_err().to_string();
    assert!(error.contains("no tokenizer.json beside"), "{error}");
    std::fs::write(temp.path().join("tokenizer.json"), json).unwrap();
    let tokenizer = Tokenizer::from_gguf(&empty).unwrap();
    assert_eq!(tokenizer.encode("Hello world", EncodeOptions::PROMPT).unwrap(), [1, 15_043, 3_186]);
}
