//! The documentation works: links lead somewhere, pages are listed, and commands run.
//!
//! In `README.md` and the pages of `docs/src`, a fenced block marked `sh` is run line by line in a scratch folder that holds
//! `model.gguf` (the embedded model) and `text.txt`; a block marked `console` is only held against the command line's grammar,
//! because what it shows needs hours, a GPU or a download. Lines of `sh` blocks that start with neither `playhouse` nor
//! `cargo run --release --` are the reader's own (building, testing) and are not run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

#[test]
fn words_are_split_as_a_shell_splits_them() {
    let words = |line| split_words(line).expect("balanced");
    assert_eq!(words("run \"autumn moon\" --seed 7 # why"), ["run", "autumn moon", "--seed", "7"]);
    assert_eq!(own_words(&words("tokenize --model m 'a b' | wc -l")), ["tokenize", "--model", "m", "a b"]);
    assert_eq!(split_words("run 'a"), None);
}
