//! Compiles every `kernels/*.cu` into a fatbin of its own and lists them for `src/kernels.rs` to embed.
//!
//! nvcc is looked for in `CUDA_HOME`, in `PATH`, and in `.cuda/` at the workspace root, which `cuda/toolchain.sh`
//! fills. Without it the build succeeds with an empty list, and the crate says at run time what was missing.
//! `PLAYHOUSE_CUDA_ARCHS` narrows the targets for a quick build: `PLAYHOUSE_CUDA_ARCHS=90a`.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;

/// SASS for these, and PTX of the last plain one for newer chips.
const DEFAULT_ARCHS: &str = "80,86,89,90a,120";
/// PTX that the driver compiles for chips not listed.
const PTX_ARCH: &str = "80";

fn main() -> ExitCode {
    for name in ["PLAYHOUSE_CUDA_ARCHS", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let crate_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed={}", crate_dir.join("../.cuda/bin/nvcc").display());

    let Some(nvcc) = find_nvcc(&crate_dir) else {
        println!(
            "cargo:warning=nvcc not found: this build has no GPU kernels (run cuda/toolchain.sh, or set CUDA_HOME)"
        );
        write_index(
            &out_dir,
            &[],
            "",
            "none: nvcc was in neither CUDA_HOME, PATH nor .cuda/ when this binary was built",
        );
        return ExitCode::SUCCESS;
    };
    let sources = kernel_sources(&crate_dir.join("kernels"));
    let archs = env::var("PLAYHOUSE_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    match compile_all(&nvcc, &sources, &out_dir, &archs) {
        Ok(()) => {
            write_index(&out_dir, &sources, &archs, &format!("{} for sm_{{{archs}}}", nvcc.display()));
            ExitCode::SUCCESS
        }
        Err(messages) => {
            println!("cargo:error={}", messages.replace("\n", "\ncargo:error="));
            ExitCode::FAILURE
        }
    }
}

fn find_nvcc(crate_dir: &Path) -> Option<PathBuf> {
    let from_home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let in_path = env::var_os("PATH")
        .map(|paths| env::split_paths(&paths).map(|dir| dir.join("nvcc")).collect::<Vec<_>>())
        .unwrap_or_default();
    let fetched = crate_dir.join("../.cuda/bin/nvcc");
    from_home.into_iter().chain(in_path).chain([fetched]).find(|path| path.is_file())
}

fn kernel_sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut sources: Vec<PathBuf> = entries
        .map(|e| e.expect("readable entry").path())
        .filter(|p| p.extension() == Some(OsStr::new("cu")))
        .collect();
    sources.sort();
    sources
}

/// Compiles with as many nvcc processes as cargo grants jobs; gives back all error texts.
fn compile_all(nvcc: &Path, sources: &[PathBuf], out_dir: &Path, archs: &str) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let queue = Mutex::new(sources.iter());
    let errors = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("no thread panics holding it").next();
                    let Some(source) = next else { break };
                    if let Err(text) = compile(nvcc, source, out_dir, archs) {
                        errors.lock().expect("no thread panics holding it").push(text);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("no thread panics holding it");
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

fn compile(nvcc: &Path, source: &Path, out_dir: &Path, archs: &str) -> Result<(), String> {
    let target = out_dir.join(format!("{}.fatbin", stem(source)));
    let stamp = out_dir.join(format!("{}.stamp", stem(source)));
    let inputs = fingerprint(source, archs);
    // Cargo reruns this script when any kernel changes; only those whose text changed are compiled again.
    if target.exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == inputs) {
        return Ok(());
    }
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--fmad=true", "-lineinfo", "-Werror", "all-warnings", "-o"]);
    command.arg(&target).arg(source).args(["-ccbin", &env::var("CXX").unwrap_or_else(|_| "g++".to_owned())]);
    for arch in archs.split(',').map(str::trim) {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if archs.contains(',') {
        command.arg(format!("-gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}"));
    }
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if !output.status.success() {
        return Err(format!(
            "{command:?}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    fs::write(&stamp, inputs).map_err(|e| format!("{}: {e}", stamp.display()))
}

/// The text of a kernel file, of the headers beside it that it includes, and of the targets.
fn fingerprint(source: &Path, archs: &str) -> String {
    let dir = source.parent().expect("a file has a folder");
    let mut files = vec![source.to_owned()];
    let mut texts = vec![archs.to_owned()];
    let mut next = 0;
    while let Some(path) = files.get(next) {
        let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let included =
            text.lines().filter_map(|l| l.strip_prefix("#include \"")?.strip_suffix('"')).map(|name| dir.join(name));
        let new: Vec<PathBuf> = included.filter(|path| !files.contains(path)).collect();
        files.extend(new);
        texts.push(text);
        next += 1;
    }
    texts.join("\n")
}

fn write_index(out_dir: &Path, sources: &[PathBuf], archs: &str, toolchain: &str) {
    let rows: String = sources
        .iter()
        .map(|s| stem(s))
        .map(|name| format!("    ({name:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),\n"))
        .collect();
    let text = format!(
        "/// What compiled the kernels.\npub const TOOLCHAIN: &str = {toolchain:?};\n\
         /// What they were compiled for, comma-separated.\npub const ARCHS: &str = {archs:?};\n\
         /// Kernel files by name, and their fatbins.\npub static FATBINS: &[(&str, &[u8])] = &[\n{rows}];\n"
    );
    fs::write(out_dir.join("fatbins.rs"), text).expect("OUT_DIR is writable");
}

fn stem(source: &Path) -> String {
    source.file_stem().expect("a source has a name").to_string_lossy().into_owned()
}
