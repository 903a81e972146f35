//! The documentation works: links lead somewhere, pages are listed, and commands run.
//!
//! In `README.md` and the pages of `docs/src`, a fenced block marked `sh` is run line by line in a scratch folder that holds
//! `model.gguf` (the embedded model) and `text.txt`; a block marked `console` is only held against the command line's grammar,
//! because what it shows needs hours, a GPU or a download. Lines of `sh` blocks that start with neither `playhouse` nor
//! `cargo run --release --` are the reader's own (building, testing) and are not run.

use playhouse_config::Config;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// README and every page of the book.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = fs::read_dir(root().join("docs/src"))
        .expect("docs/src exists")
        .map(|e| e.expect("readable entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    pages.extend(["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"].map(|name| root().join(name)));
    pages.sort();
    pages
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Targets of inline links, those inside fenced blocks left out.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        fenced ^= line.trim_start().starts_with("```");
        if fenced {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let rest = &line[at + 2..];
            found.extend(rest.find(')').map(|end| rest[..end].to_owned()));
        }
    }
    found
}

#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        for link in links(&read(&page)) {
            if link.contains("://") || link.starts_with('#') || link.starts_with("mailto:") {
                continue; // the network is not asked
            }
            let file = link.split('#').next().expect("split gives one piece");
            let target = page.parent().expect("a file has a folder").join(file);
            if !target.exists() {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "links to nothing:\n  {}", broken.join("\n  "));
}

#[test]
fn every_page_is_in_the_summary() {
    let summary = read(&root().join("docs/src/SUMMARY.md"));
    let listed = links(&summary);
    for page in fs::read_dir(root().join("docs/src")).expect("docs/src exists") {
        let name = page.expect("readable entry").file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") && name != "SUMMARY.md" {
            assert!(listed.contains(&name), "docs/src/{name} is not in SUMMARY.md");
        }
    }
}

/// A command of the documentation: where it stands, and its words after the program's name.
struct Line {
    place: String,
    words: Vec<String>,
    run: bool,
}

/// Commands of the fenced blocks marked `sh` and `console`.
fn commands(page: &Path) -> Vec<Line> {
    let mut found = Vec::new();
    let mut mark: Option<String> = None;
    let text = read(page).replace("\\\n", " ");
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if let Some(info) = trimmed.strip_prefix("```") {
            mark = if mark.is_some() { None } else { Some(info.to_owned()) };
            continue;
        }
        let run = match mark.as_deref() {
            Some("sh") => true,
            Some("console") => false,
            _ => continue,
        };
        let trimmed = trimmed.strip_prefix("$ ").unwrap_or(trimmed);
        let rest = trimmed.strip_prefix("playhouse ").or_else(|| trimmed.strip_prefix("cargo run --release -- "));
        let Some(rest) = rest else { continue };
        let place = format!("{}:{}", page.strip_prefix(root()).unwrap_or(page).display(), number + 1);
        let words = split_words(rest).unwrap_or_else(|| panic!("{place}: unbalanced quotes in `{rest}`"));
        found.push(Line { place, words, run });
    }
    found
}

/// Splits a line as a shell does, for the part of a shell's grammar that documentation uses: quotes, and a comment at the end.
fn split_words(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(q), _) if c == q => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(c),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

/// The words up to a pipe or a redirection: what the program itself is given.
fn own_words(words: &[String]) -> &[String] {
    let end = words.iter().position(|w| matches!(w.as_str(), "|" | ">" | "<" | "&&" | "2>")).unwrap_or(words.len());
    &words[..end]
}

#[test]
fn commands_fit_the_command_line() {
    let mut wrong = Vec::new();
    let mut n_seen = 0;
    for page in pages() {
        for line in commands(&page) {
            n_seen += 1;
            let words = ["playhouse".to_owned()].into_iter().chain(own_words(&line.words).iter().cloned());
            if let Err(error) = playhouse::cli::command().try_get_matches_from(words) {
                let shown = matches!(
                    error.kind(),
                    clap::error::ErrorKind::DisplayHelp | clap::error::ErrorKind::DisplayVersion
                );
                if !shown {
                    wrong.push(format!("{}: {error}", line.place));
                }
            }
        }
    }
    assert!(n_seen >= 10, "the documentation shows only {n_seen} commands");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn commands_run() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    fs::write(scratch.path().join("model.gguf"), playhouse::basho::GGUF).expect("writable");
    fs::write(scratch.path().join("text.txt"), "autumn moon\nthe river carries its light\n").expect("writable");
    let mut failed = Vec::new();
    for page in pages() {
        for line in commands(&page).iter().filter(|line| line.run) {
            let output = Command::new(env!("CARGO_BIN_EXE_playhouse"))
                .args(own_words(&line.words))
                .current_dir(scratch.path())
                .stdin(Stdio::null())
                .output()
                .expect("the binary runs");
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                failed.push(format!("{}: {:?}: {}: {text}", line.place, line.words, output.status));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

// --- the failure table -------------------------------------------------------------------------------------------------

/// Cells of the table's rows, its heading and rule left out.
fn table_rows(text: &str, heading: &str) -> Vec<Vec<String>> {
    let rows = text.lines().skip_while(|line| !line.starts_with(heading)).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// Names in backticks that look like `file::test`.
fn test_names(cell: &str) -> Vec<(String, String)> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter_map(|name| name.split_once("::")).map(|(file, test)| (file.to_owned(), test.to_owned())).collect()
}

/// Whether one of the files that `file` may mean has a test of this name.
fn has_test(file: &str, test: &str) -> bool {
    let places = ["tests", "actors/tests", "actors/src", "src"];
    let texts =
        places.iter().filter_map(|place| fs::read_to_string(root().join(place).join(format!("{file}.rs"))).ok());
    texts.into_iter().any(|text| {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let named =
            |line: &&str| line.starts_with(&format!("fn {test}(")) || line.starts_with(&format!("async fn {test}("));
        let Some(at) = lines.iter().position(named) else { return false };
        lines[at.saturating_sub(3)..at]
            .iter()
            .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
    })
}

#[test]
fn every_row_of_the_failure_table_names_tests_that_exist() {
    let rows = table_rows(&read(&root().join("docs/src/supervision.md")), "| what happens |");
    assert!(rows.len() >= 25, "only {} rows were found", rows.len());
    let mut wrong = Vec::new();
    for row in &rows {
        let names = row.last().map(|cell| test_names(cell)).unwrap_or_default();
        if row.len() != 4 || names.is_empty() {
            wrong.push(format!("`{}` is shown by nothing", row[0]));
        }
        let missing = names.iter().filter(|(file, test)| !has_test(file, test));
        wrong.extend(missing.map(|(file, test)| format!("`{}`: there is no test {file}::{test}", row[0])));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!has_test("docs", "no_such_test") && !has_test("docs", "table_rows"), "helpers are no tests");
}

// --- the unit ----------------------------------------------------------------------------------------------------------

/// `Key=Value` lines of a section.
fn unit_keys(text: &str, section: &str) -> Vec<(String, String)> {
    let lines = text.lines().skip_while(|line| *line != format!("[{section}]")).skip(1);
    let lines = lines.take_while(|line| !line.starts_with('['));
    lines.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn the_unit_asks_for_what_the_program_does() {
    let text = read(&root().join("docs/systemd/playhouse.service"));
    let service = unit_keys(&text, "Service");
    let value = |key: &str| {
        let mut found = service.iter().filter(|(known, _)| known == key).map(|(_, value)| value.as_str());
        found.next().unwrap_or_else(|| panic!("{key}= is missing"))
    };
    assert_eq!(value("Type"), "notify-reload");
    assert_eq!(value("Restart"), "on-failure");
    assert_eq!(value("RestartPreventExitStatus"), "2 65 66 78");
    assert_eq!(value("KillMode"), "mixed", "the first SIGTERM is for the host alone");
    assert_eq!(value("OOMPolicy"), "continue", "a worker's end is no end of the service");
    let seconds = |key: &str| match value(key).split_once(|unit: char| unit.is_alphabetic()) {
        Some((number, "")) => number.parse().expect("a number"),
        Some((number, "in")) => number.parse::<u64>().expect("a number") * 60,
        other => panic!("{key} is {other:?}"),
    };
    let Config { host, supervision, .. } = Config::default();
    let needed = host.drain + supervision.shutdown;
    assert!(Duration::from_secs(seconds("TimeoutStopSec")) > needed, "a drain and the workers' end take {needed:?}");
    assert!(Duration::from_secs(seconds("WatchdogSec")) > supervision.heartbeat * 10, "the watchdog is patient");
    let command = value("ExecStart").strip_prefix("/usr/local/bin/").expect("an absolute path");
    playhouse::cli::command().try_get_matches_from(command.split(' ')).expect("the command line is right");
    // What would keep CUDA from working.
    for (key, bad) in [("PrivateDevices", "yes"), ("ProcSubset", "pid"), ("MemoryDenyWriteExecute", "yes")] {
        assert!(!service.iter().any(|(known, value)| known == key && value == bad), "{key}={bad} hides the GPUs");
    }
}

/// Where systemd is installed, it reads the unit and has nothing to say about it.
#[test]
fn systemd_understands_the_unit() {
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else {
        println!("systemd-analyze is not here: not tested");
        return;
    };
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let version: u32 = version.split_whitespace().nth(1).and_then(|text| text.parse().ok()).expect("systemd NNN (...)");
    let folder = tempfile::tempdir().expect("a scratch folder");
    let unit = folder.path().join("playhouse.service");
    // It looks for the programs; they need not be installed here.
    let here = env!("CARGO_BIN_EXE_playhouse");
    let text = read(&root().join("docs/systemd/playhouse.service"));
    let text = text
        .replace("/usr/local/bin/playhouse", here)
        .replace("/usr/bin/nvidia-modprobe", here)
        .replace("/usr/bin/nvidia-smi", here);
    // `notify-reload` is newer than some systemds that are about.
    let text = if version < 253 { text.replace("Type=notify-reload", "Type=notify") } else { text };
    fs::write(&unit, text).expect("writable");
    let verify = Command::new("systemd-analyze").args(["--man=no", "verify"]).arg(&unit).output().expect("it runs");
    let said = String::from_utf8_lossy(&verify.stderr).into_owned();
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("playhouse.service")).collect();
    assert!(verify.status.success() && ours.is_empty(), "{}", ours.join("\n"));
}

#[test]
fn words_are_split_as_a_shell_splits_them() {
    let words = |line| split_words(line).expect("balanced");
    assert_eq!(words("run \"autumn moon\" --seed 7 # why"), ["run", "autumn moon", "--seed", "7"]);
    assert_eq!(own_words(&words("tokenize --model m 'a b' | wc -l")), ["tokenize", "--model", "m", "a b"]);
    assert_eq!(split_words("run 'a"), None);
}
