//! The house rules that a compiler does not check: import arrows, file docs, names at the top level.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files that git tracks (or would: untracked and not ignored), relative to the root.
fn tracked() -> Vec<PathBuf> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git is needed to list the project's files");
    assert!(out.status.success(), "git ls-files: {}", String::from_utf8_lossy(&out.stderr));
    let list = String::from_utf8(out.stdout).expect("file names are UTF-8");
    list.lines().map(PathBuf::from).filter(|p| root().join(p).is_file()).collect()
}

fn with_extension(ext: &str) -> Vec<PathBuf> {
    tracked().into_iter().filter(|p| p.extension().is_some_and(|e| e == ext)).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Complains about every offender at once, so that one run shows all there is to mend.
fn check(rule: &str, offenders: Vec<String>) {
    assert!(offenders.is_empty(), "{rule}\n  {}", offenders.join("\n  "));
}

/// What each module of the root package may import. `crate::x` names in a file of module `y` must be listed here.
const ARROWS: &[(&str, &[&str])] = &[
    ("build", &[]),
    ("dtype", &[]),
    ("gguf", &["dtype"]),
    ("backend", &["dtype", "gguf"]),
    ("models", &["dtype", "gguf", "backend"]),
    ("engine", &["dtype", "gguf", "backend", "models"]),
    ("text", &["gguf"]),
    ("basho", &[]),
    ("source", &["gguf", "basho"]),
    ("synth", &["dtype", "gguf"]),
    ("grammar", &["gguf", "engine", "text", "basho"]),
    ("worker", &["dtype", "gguf", "backend", "models", "engine", "source", "text", "grammar"]),
    ("client", &["text", "gguf", "models", "source", "grammar"]),
    ("http", &["client", "text"]),
];

/// Modules that may import everyone: they wire the parts together.
const WIRING: &[&str] = &["cli", "host", "lib", "main"];

/// The module of the root package that a file belongs to: `src/text/stop.rs` is in `text`.
fn module_of(path: &Path) -> Option<String> {
    let rest = path.strip_prefix("src").ok()?;
    let first = rest.components().next()?.as_os_str().to_str()?;
    Some(first.trim_end_matches(".rs").to_owned())
}

/// Names that follow `crate::` in code, and those in a group right behind it (`crate::{a, b::c}`).
fn crate_imports(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in source.lines().filter(|l| !l.trim_start().starts_with("//")) {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            match rest.strip_prefix('{') {
                Some(group) => found.extend(group.split(',').map(first_name)),
                None => drop(found.insert(first_name(rest))),
            }
        }
    }
    found.remove("");
    found
}

fn first_name(path: &str) -> String {
    path.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[test]
fn imports_follow_the_arrows() {
    let mut offenders = Vec::new();
    for file in with_extension("rs") {
        let Some(module) = module_of(&file) else { continue };
        if WIRING.contains(&module.as_str()) {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == module) else {
            offenders.push(format!("{}: module `{module}` has no row in ARROWS", file.display()));
            continue;
        };
        for import in crate_imports(&read(&file)) {
            // Macros and items at the crate's root do not exist; every name is a module.
            if import != module && !allowed.contains(&import.as_str()) {
                offenders.push(format!("{}: `{module}` may not import `{import}`", file.display()));
            }
        }
    }
    check("imports go one way (ARCHITECTURE.md)", offenders);
}

#[test]
fn the_arrows_form_no_cycle() {
    for (i, (module, allowed)) in ARROWS.iter().enumerate() {
        for import in *allowed {
            let position = ARROWS.iter().position(|(name, _)| name == import);
            assert!(position.is_some_and(|p| p < i), "`{module}` imports `{import}`, which must be listed before it");
        }
    }
}

#[test]
fn member_crates_know_only_who_they_may() {
    // crate, crates of ours that it may depend on
    let rules: &[(&str, &[&str])] = &[("config", &[]), ("actors", &["playhouse-config"]), ("cuda", &[])];
    let mut offenders = Vec::new();
    for (krate, allowed) in rules {
        let manifest = PathBuf::from(krate).join("Cargo.toml");
        if !root().join(&manifest).exists() {
            continue; // a member crate is created with its first real content
        }
        for line in read(&manifest).lines() {
            let name = first_dependency_name(line);
            let ours = name == "playhouse" || name.starts_with("playhouse-");
            if ours && !allowed.contains(&name.as_str()) {
                offenders.push(format!("{}: `{name}`", manifest.display()));
            }
        }
    }
    check("config knows nobody, actors knows config, cuda knows nobody", offenders);
}

fn first_dependency_name(line: &str) -> String {
    if !line.contains('=') || line.trim_start().starts_with("name") {
        return String::new();
    }
    line.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '-' || *c == '_').collect()
}

#[test]
fn every_source_file_says_what_it_is() {
    let mut offenders = Vec::new();
    for file in with_extension("rs") {
        if !read(&file).starts_with("//!") {
            offenders.push(format!("{}: first line is not a `//!` doc comment", file.display()));
        }
    }
    for file in [with_extension("cu"), with_extension("cuh")].concat() {
        if !read(&file).starts_with("//") {
            offenders.push(format!("{}: first line is not a header comment", file.display()));
        }
    }
    for file in with_extension("py") {
        let text = read(&file);
        let body = text.strip_prefix("#!/usr/bin/env python3\n").unwrap_or(&text);
        if !body.starts_with("\"\"\"") {
            offenders.push(format!("{}: does not start with a docstring", file.display()));
        }
    }
    check("every source file starts with what it is", offenders);
}

#[test]
fn tests_do_not_sleep_and_nothing_is_ignored() {
    // Spelled apart so that this file does not find itself.
    let needles = [["thread::", "sleep"], ["#[igno", "re"], ["todo", "!("], ["unimplemented", "!("]];
    let mut offenders = Vec::new();
    for file in with_extension("rs") {
        for (n, line) in read(&file).lines().enumerate() {
            for needle in &needles {
                if line.contains(&needle.concat()) && !line.trim_start().starts_with("//") {
                    offenders.push(format!("{}:{}: {}", file.display(), n + 1, line.trim()));
                }
            }
        }
    }
    check("no sleeps, no ignored tests, no stubs", offenders);
}

#[test]
fn the_top_level_keeps_its_names() {
    let allowed = [
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "actors",
        "benches",
        "config",
        "cuda",
        "docs",
        "src",
        "tests",
    ];
    let mut offenders = BTreeSet::new();
    for file in tracked() {
        let top = file.components().next().expect("not empty").as_os_str().to_string_lossy().into_owned();
        if !top.starts_with('.') && !allowed.contains(&top.as_str()) {
            offenders.insert(top);
        }
    }
    check("the top level has eight folders and a few files", offenders.into_iter().collect());
}

#[test]
fn the_rules_find_offenders() {
    assert_eq!(
        crate_imports("use crate::{gguf::X, text};\n// crate::nope\nlet a = crate::dtype::DType::F32;"),
        BTreeSet::from(["gguf".to_owned(), "text".to_owned(), "dtype".to_owned()])
    );
    assert_eq!(module_of(Path::new("src/text/stop.rs")).as_deref(), Some("text"));
    assert_eq!(module_of(Path::new("src/main.rs")).as_deref(), Some("main"));
    assert_eq!(first_dependency_name("playhouse-config = { path = \"../config\" }"), "playhouse-config");
}
