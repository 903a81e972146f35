//! `playhouse tokenize` as a program: ids as JSON, stdin, special tokens, exit codes.
//!
//! Reads the vocabularies of the shared data beside the project (`../shared/data/vocab`, or under
//! `PLAYHOUSE_SHARED`). Where they are absent these tests say so and check nothing.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn vocab(name: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let root = std::env::var_os("PLAYHOUSE_SHARED").map_or(beside, PathBuf::from);
    let path = root.join(format!("data/vocab/ggml-vocab-{name}.gguf"));
    if !path.is_file() {
        println!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

fn tokenize(model: &Path, args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_playhouse"))
        .args(["tokenize", "--model"])
        .arg(model)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that fails before it reads closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn ids(model: &Path, args: &[&str], stdin: &str) -> Vec<u32> {
    let output = tokenize(model, args, stdin);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn json_gives_an_array_of_ids() {
    let Some(spm) = vocab("llama-spm") else { return };
    assert_eq!(ids(&spm, &["--json", "Hello world"], ""), [1, 15_043, 3_186]);
    assert_eq!(ids(&spm, &["--json", "--no-special", "Hello world"], ""), [15_043, 3_186]);
    assert_eq!(ids(&spm, &["--json", "--no-special", "-"], "Hello world\n"), [15_043, 3_186, 13]);
    assert_eq!(ids(&spm, &["--json"], ""), [1]);
}

#[test]
fn no_special_reads_markup_as_text() {
    let Some(qwen) = vocab("qwen2") else { return };
    assert_eq!(ids(&qwen, &["--json", "<|im_end|>"], ""), [151_645]);
    let plain = ids(&qwen, &["--json", "--no-special", "<|im_end|>"], "");
    assert!(plain.len() > 1 && plain.iter().all(|&id| id < 151_643), "{plain:?}");
}

#[test]
fn the_table_shows_bytes() {
    let Some(qwen) = vocab("qwen2") else { return };
    let output = tokenize(&qwen, &["a\n\u{10FFFF}"], "");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0].trim_start(), "64  a");
    assert_eq!(lines[1].trim_start(), "198  \\n");
    assert!(lines[2].contains("\\xf4"), "{text}");
}

#[test]
fn failures_have_their_exit_codes() {
    let code = |path: &Path| tokenize(path, &["x"], "").status.code();
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(code(&dir.path().join("absent.gguf")), Some(66));
    assert_eq!(code(&dir.path().join("absent.json")), Some(66));
    let bad = dir.path().join("tokenizer.json");
    std::fs::write(&bad, "{}").unwrap();
    assert_eq!(code(&bad), Some(65));
}
