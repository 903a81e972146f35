//! `check` and `devices`: the commands that need no running host.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn config(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(path)
}

/// In the environment that the files of the config crate's tests are read in.
fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_playhouse"));
    command
        .env_clear()
        .env("PLAYHOUSE_KEY", "k-123")
        .env("MODELS", "/srv/models")
        .env("PATH", "/bin")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

#[test]
fn a_good_file_is_0() {
    for example in ["one-gpu", "four-mixed", "eight-equal", "cpu-only"] {
        let path = config(&format!("examples/{example}.toml"));
        let path = path.to_str().expect("text");
        let output = run(&["check", path]);
        assert_eq!(code(&output), 0, "{example}: {}", text(&output.stderr));
        assert!(text(&output.stdout).starts_with(&format!("{path}: right, with ")), "{}", text(&output.stdout));
    }
}

#[test]
fn every_bad_file_is_78_with_the_diagnostic_of_the_config_crate() {
    let folder = config("tests/bad");
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).expect("it is there") {
        let path = entry.expect("readable").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        seen += 1;
        let output = run(&["check", path.to_str().expect("text")]);
        assert_eq!(code(&output), 78, "{}: {}", path.display(), text(&output.stderr));
        assert_eq!(text(&output.stdout), "");
        let name = path.file_name().expect("a file").to_str().expect("text");
        let expected = std::fs::read_to_string(path.with_extension("expected")).expect("beside it");
        // The expected files name the file alone, the command its path.
        let found = text(&output.stderr).replace(path.to_str().expect("text"), name);
        assert_eq!(found.trim(), expected.trim(), "{name}");
    }
    assert!(seen >= 50, "only {seen} bad files were found");
}

#[test]
fn problems_are_one_document_with_places() {
    let path = config("tests/bad/many.toml");
    let output = run(&["check", "--json", path.to_str().expect("text")]);
    assert_eq!(code(&output), 78);
    let document: Value = serde_json::from_slice(&output.stdout).expect("one document");
    let problems = document["problems"].as_array().expect("a list");
    assert!(document["ok"] == false && problems.len() > 1);
    for problem in problems {
        assert!(problem["place"]["line"].as_u64().is_some_and(|line| line > 0), "{problem}");
        assert!(problem["rendered"].as_str().is_some_and(|text| text.starts_with("error: ")), "{problem}");
    }
    let good = run(&["check", "--json", config("examples/cpu-only.toml").to_str().expect("text")]);
    let document: Value = serde_json::from_slice(&good.stdout).expect("one document");
    assert!(document["ok"] == true && document["models"].as_array().is_some_and(|models| !models.is_empty()));
}

#[test]
fn a_missing_file_is_66() {
    let output = run(&["check", "/nowhere/house.toml"]);
    assert_eq!(code(&output), 66);
    assert!(text(&output.stderr).starts_with("error: /nowhere/house.toml: "), "{}", text(&output.stderr));
}

#[test]
fn simulated_devices_are_listed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("house.toml");
    let devices = "\
[[simulate.device]]
name = \"Simulated A\"
uuid = \"SIM-a\"
vram = \"24GiB\"
used = \"4GiB\"

[[simulate.device]]
name = \"Simulated B\"
uuid = \"SIM-b\"
vram = \"80GiB\"
";
    std::fs::write(&path, devices).expect("writable");
    let path = path.to_str().expect("text");
    let output = run(&["devices", "--config", path]);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    let expected = "\
INDEX  UUID   PCI  NAME         MEMORY   USED  UTIL  TEMP  POWER
    0  SIM-a  -    Simulated A   24.0G   4.0G     -     -      -
    1  SIM-b  -    Simulated B   80.0G   0.0G     -     -      -
";
    let squeeze =
        |text: &str| text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>();
    assert_eq!(squeeze(&text(&output.stdout)), squeeze(expected));
    let output = run(&["devices", "--json", "--config", path]);
    let document: Value = serde_json::from_slice(&output.stdout).expect("one document");
    assert_eq!(document["devices"][1]["uuid"], "SIM-b");
    assert_eq!(document["devices"][0]["free_bytes"], 20_u64 << 30);
    assert_eq!(code(&run(&["devices", "--config", "/nowhere/house.toml"])), 66);
}

/// With GPUs they are listed; without, that is no failure, and the reason is said.
#[test]
fn a_box_without_gpus_says_so_and_is_0() {
    let output = run(&["devices"]);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(said.starts_with("no GPUs: ") || said.starts_with("INDEX"), "{said}");
    let document: Value = serde_json::from_slice(&run(&["devices", "--json"]).stdout).expect("one document");
    let devices = document["devices"].as_array().expect("a list");
    assert_eq!(devices.is_empty(), document["why_none"].is_string(), "{document}");
}
