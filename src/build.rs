//! Tells a release build which commit it was made from: `PLAYHOUSE_COMMIT`, or what git says of the sources' repository.
//! A build for tests does not ask, or each commit would compile it again.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=src/build.rs");
    println!("cargo:rerun-if-env-changed=PLAYHOUSE_COMMIT");
    if std::env::var_os("PLAYHOUSE_COMMIT").is_some() || std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    // A commit and a checkout both write there.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        println!("cargo:rerun-if-changed={log}");
    }
    // Without git, or from an archive of the sources, the commit stays unknown.
    if let Some(commit) = git(&["rev-parse", "--verify", "HEAD"]) {
        println!("cargo:rustc-env=PLAYHOUSE_COMMIT={commit}");
    }
}

/// What git says, of the repository whose top is this package; not of one that a copy of it happens to lie in.
fn git(arguments: &[&str]) -> Option<String> {
    let run = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let said = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| said.trim().to_owned())
    };
    let top = run(&["rev-parse", "--show-toplevel"])?;
    let here = std::env::current_dir().ok()?.canonicalize().ok()?;
    (Path::new(&top).canonicalize().ok()? == here).then(|| run(arguments))?
}
