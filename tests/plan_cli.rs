//! `plan`: what would go where, on cards that are not there, and what it says when something does not fit.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Two cards of different size and the embedded model on both, with more of the configuration behind it.
fn plan(folder: &Path, vram: &str, more: &str, flags: &[&str]) -> Output {
    let text = format!(
        "[[model]]\nname = \"qwen\"\npath = \"embedded:basho\"\nreplicas = \"all\"\n{more}\n\
         [[simulate.device]]\nname = \"Large\"\nuuid = \"SIM-large\"\nvram = \"8GiB\"\n\
         [[simulate.device]]\nname = \"Small\"\nuuid = \"SIM-small\"\nvram = \"{vram}\"\n"
    );
    let file = folder.join("house.toml");
    std::fs::write(&file, text).expect("writable");
    let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
    command.env_clear().arg("plan").arg(&file).args(flags).stdin(Stdio::null()).output().expect("the binary runs")
}

/// The exit code, and what is said about it; nothing is on the standard output.
fn refusal(output: &Output) -> (i32, String) {
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    (output.status.code().expect("no signal"), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn every_byte_of_every_card_is_accounted_for() {
    let folder = folder();
    let output = plan(folder.path(), "1GiB", "", &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let plan: Value = serde_json::from_slice(&output.stdout).expect("one document");
    let devices = plan["devices"].as_array().expect("a list");
    let names: Vec<&str> = devices.iter().filter_map(|device| device["device"].as_str()).collect();
    assert_eq!(names, ["SIM-large", "SIM-small"]);
    for (index, device) in devices.iter().enumerate() {
        let bytes = |value: &Value, key: &str| value[key].as_u64().unwrap_or_else(|| panic!("{key}: {value}"));
        let [placement] = device["placements"].as_array().expect("a list").as_slice() else { panic!("{device}") };
        assert_eq!((placement["model"].as_str(), bytes(placement, "replica")), (Some("qwen"), index as u64));
        assert!(bytes(placement, "weights_bytes") > 0 && bytes(placement, "kv_bytes") > 0, "{placement}");
        let parts = ["weights_bytes", "kv_bytes", "scratch_bytes", "context_bytes"].map(|key| bytes(placement, key));
        let used = parts.iter().sum::<u64>() + bytes(device, "headroom_bytes") + bytes(device, "foreign_bytes");
        assert_eq!(used, bytes(device, "total_bytes"), "{device}");
    }
}

#[test]
fn a_person_gets_a_table() {
    let folder = folder();
    let output = plan(folder.path(), "1GiB", "", &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = ["SIM-large (Large): 8 GiB", "weights", "KV", "scratch", "context", "qwen/1", "headroom"];
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn what_does_not_fit_is_78_with_the_model_the_card_and_the_bytes() {
    let folder = folder();
    let (code, said) = refusal(&plan(folder.path(), "1MiB", "", &["--json"]));
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("model `qwen` does not fit on SIM-small (Small"), "{said}");
    assert!(said.contains("bytes) are missing"), "{said}");
    let (code, said) = refusal(&plan(folder.path(), "1GiB", "memory_limit = \"1MiB\"", &[]));
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("its `memory_limit` (1 MiB) allows 1 MiB"), "{said}");
}

#[test]
fn a_model_file_that_is_missing_is_66_and_one_that_is_damaged_65() {
    let folder = folder();
    let second = |name: &str| format!("[[model]]\nname = \"phi\"\npath = \"{name}\"");
    let (code, said) = refusal(&plan(folder.path(), "1GiB", &second("nowhere.gguf"), &[]));
    assert_eq!(code, 66, "{said}");
    assert!(said.contains("phi") && said.contains("nowhere.gguf"), "{said}");
    std::fs::write(folder.path().join("noise.gguf"), b"GGUF and then nothing that is").expect("writable");
    let (code, said) = refusal(&plan(folder.path(), "1GiB", &second("noise.gguf"), &[]));
    assert_eq!(code, 65, "{said}");
    assert!(said.contains("noise.gguf"), "{said}");
}
