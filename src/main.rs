//! The `playhouse` binary: parse, run, print the error chain, exit code.

fn main() -> std::process::ExitCode {
    playhouse::cli::main()
}
