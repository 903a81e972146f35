//! `playhouse run`, from the command line to text: streams, documents, exit codes, conversations.
//!
//! On a tiny checkpoint with random weights and a byte vocabulary, to which a chat template is added here.

use playhouse::gguf::GgufFile;
use playhouse::gguf::writer::GgufWriter;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}";

/// The checkpoint as it is: a base model.
fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama2.gguf")
}

/// The same with a chat template.
fn chat_model(folder: &Path) -> PathBuf {
    let file = GgufFile::open(&base()).unwrap();
    let mut writer = GgufWriter::new();
    for (key, value) in file.metadata().iter() {
        writer.set(key, value.clone());
    }
    writer.set("tokenizer.chat_template", TEMPLATE);
    for tensor in file.tensors() {
        writer.tensor(&tensor.name, &tensor.dims, tensor.dtype);
    }
    let bytes: Vec<_> = file.tensors().map(|tensor| file.bytes(tensor).unwrap()).collect();
    let slices: Vec<&[u8]> = bytes.iter().map(|bytes| &**bytes).collect();
    let path = folder.join("chat.gguf");
    std::fs::write(&path, writer.to_vec(&slices).unwrap()).unwrap();
    path
}

fn run_with(model: &Path, args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_playhouse"))
        .arg("run")
        .arg("--model")
        .arg(model)
        .args(args)
        // Histories of people are none of the tests' business.
        .env("XDG_STATE_HOME", model.parent().unwrap().join("no-such-state").as_os_str())
        .env_remove("HOME")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that reads no prompt from stdin may have closed it already.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn run(args: &[&str]) -> Output {
    run_with(&base(), args, "")
}

fn json(args: &[&str]) -> Value {
    let output = run(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn text_goes_to_stdout_and_one_line_to_stderr() {
    let output = run(&["--seed", "4", "--max-tokens", "12", "a", "prompt"]);
    assert!(output.status.success());
    assert!(output.stdout.ends_with(b"\n") && output.stdout.len() > 1);
    let summary = stderr(&output);
    assert_eq!(summary.lines().count(), 1, "{summary}");
    for part in ["12 tokens", "tokens/s", "seed 4", "length"] {
        assert!(summary.contains(part), "{summary}");
    }
    assert_eq!(run(&["--seed", "4", "--max-tokens", "12", "a prompt"]).stdout, output.stdout, "the same again");
    assert_ne!(run(&["--seed", "5", "--max-tokens", "12", "a prompt"]).stdout, output.stdout, "another seed");
}

#[test]
fn one_json_document_has_the_promised_fields() {
    let document = json(&["--seed", "4", "--max-tokens", "6", "--json", "--logprobs", "2", "hello"]);
    assert_eq!(document["tokens"].as_array().unwrap().len(), 6);
    assert_eq!(document["finish_reason"], "length");
    // BOS, the space that SentencePiece puts before a text, and a byte a letter.
    assert_eq!(document["usage"]["completion_tokens"], 6);
    assert!(document["usage"]["prompt_tokens"].as_u64().unwrap() > 1);
    assert!(document["timings"]["prefill_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(document["seed"], 4);
    let logprobs = document["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 6);
    assert_eq!(logprobs[0]["token"], document["tokens"][0]);
    assert_eq!(logprobs[0]["top"].as_array().unwrap().len(), 2);
    let without = json(&["--seed", "4", "--max-tokens", "6", "--json", "hello"]);
    assert!(without.get("logprobs").is_none());
    assert_eq!(without["text"], document["text"]);
}

#[test]
fn a_dash_reads_the_prompt_from_stdin() {
    let args = ["--seed", "4", "--max-tokens", "6", "--json"];
    let piped = run_with(&base(), &[&args[..], &["-"]].concat(), "hello");
    let piped: Value = serde_json::from_slice(&piped.stdout).unwrap();
    assert_eq!(piped["text"], json(&[&args[..], &["hello"]].concat())["text"]);
}

#[test]
fn choices_are_printed_in_order_and_the_first_is_that_of_one() {
    let one = run(&["--seed", "4", "--max-tokens", "8", "--ignore-eos", "hello"]).stdout;
    let three = run(&["--seed", "4", "--max-tokens", "8", "--ignore-eos", "--n", "3", "hello"]).stdout;
    assert!(three.starts_with(&one));
    assert_eq!(three.windows(5).filter(|window| window == b"\n---\n").count(), 2);
    let document = json(&["--seed", "4", "--max-tokens", "8", "--ignore-eos", "--n", "3", "--json", "hello"]);
    assert_eq!(document["choices"].as_array().unwrap().len(), 3);
    assert_eq!(document["choices"][0]["text"], document["text"]);
    assert_ne!(document["choices"][1]["tokens"], document["choices"][2]["tokens"]);
    assert_eq!(document["usage"]["completion_tokens"], 24);
}

#[test]
fn stop_strings_end_the_text_and_are_not_shown() {
    let free = json(&["--seed", "9", "--max-tokens", "60", "--ignore-eos", "--json", "hello"]);
    let text = free["text"].as_str().unwrap();
    let stop: String = text.chars().skip(20).take(2).collect();
    let document = json(&["--seed", "9", "--max-tokens", "60", "--ignore-eos", "--json", "--stop", &stop, "hello"]);
    assert_eq!(document["finish_reason"], "stop");
    assert_eq!(document["text"], text[..text.find(&stop).unwrap()]);
    assert!(document["tokens"].as_array().unwrap().len() < 60);
}

#[test]
fn sampling_flags_reach_the_sampler() {
    let greedy = |args: &[&str]| json(&[&["--temperature", "0", "--max-tokens", "3", "--json", "x"], args].concat());
    let first = greedy(&[])["tokens"][0].as_u64().unwrap();
    assert_ne!(greedy(&["--logit-bias", &format!("{first}-inf")])["tokens"][0], first);
    assert_eq!(greedy(&["--logit-bias", "70+1000"])["tokens"][0], 70);
    let one = json(&["--top-k", "1", "--max-tokens", "3", "--json", "--seed", "1", "x"]);
    assert_eq!(one["tokens"], greedy(&[])["tokens"], "one candidate is the greedy one");
}

#[test]
fn exit_codes_say_what_kind_of_failure_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad.gguf");
    std::fs::write(&bad, b"not a model").unwrap();
    let missing = folder.path().join("missing.gguf");
    let base = base();
    let cases: &[(&Path, &[&str], i32, &str)] = &[
        (&base, &[], 2, "no prompt"),
        (&base, &["--no-such-flag"], 2, "--no-such-flag"),
        (&base, &["--top-p", "7", "x"], 2, "top_p is 7"),
        (&base, &["--ctx", "100000", "x"], 2, "--ctx is 100000"),
        (&base, &["--ctx", "4", "a prompt"], 2, "do not fit the context of 4"),
        (&base, &["--logit-bias", "99999+1", "x"], 2, "token 99999"),
        (&base, &["--chat"], 2, "chat template"),
        (&base, &["--system", "s", "x"], 2, "chat template"),
        (&base, &["--chat", "--json"], 2, "cannot be used with"),
        (&bad, &["x"], 65, "bad.gguf"),
        (&missing, &["x"], 66, "missing.gguf"),
        (&base, &["--device", "cuda:0", "x"], 69, "no usable GPU"),
        (&base, &["--tokenizer", "/no/such/tokenizer.json", "x"], 66, "tokenizer.json"),
    ];
    for (model, args, code, words) in cases {
        let output = run_with(model, args, "");
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(words), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn the_chat_template_is_used_unless_raw() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path());
    let n_prompt = |args: &[&str]| {
        let output = run_with(&model, &[&["--max-tokens", "1", "--json", "hello"], args].concat(), "");
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        document["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(n_prompt(&[]), n_prompt(&["--raw"]) + 3, "u:hello;");
    assert_eq!(n_prompt(&["--system", "be"]), n_prompt(&[]) + 5, "s:be;u:hello;");
}

#[test]
fn a_conversation_goes_on_until_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path());
    let args = ["--chat", "--seed", "3", "--max-tokens", "5"];
    let output = run_with(&model, &args, "one\n\n/help\n/clear\none\ntwo\n/exit\nnever\n");
    assert!(output.status.success(), "{}", stderr(&output));
    let notes = stderr(&output);
    let summaries: Vec<&str> = notes.lines().filter(|line| line.contains("tokens/s")).collect();
    assert_eq!(summaries.len(), 3, "{notes}");
    let prompt = |summary: &str| summary.split("prompt ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(prompt(summaries[0]), prompt(summaries[1]), "/clear forgets");
    assert_ne!(prompt(summaries[1]), prompt(summaries[2]), "the second turn has the first before it");
    assert!(notes.contains("/clear"));
    let again = run_with(&model, &args, "one\n");
    assert!(output.stdout.starts_with(&again.stdout), "the same seed, the same answer");
}

#[test]
fn a_turn_that_does_not_fit_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path());
    let long = "x".repeat(80);
    let output = run_with(&model, &["--chat", "--ctx", "64"], &format!("{long}\nhi\n"));
    assert!(output.status.success(), "{}", stderr(&output));
    let notes = stderr(&output);
    assert!(notes.contains("do not fit the context of 64"), "{notes}");
    assert_eq!(notes.lines().filter(|line| line.contains("tokens/s")).count(), 1, "{notes}");
}
