//! The `playhouse` binary: be a worker if started as one; else parse, run, print the error chain, exit code.

fn main() -> std::process::ExitCode {
    // Before anything else: a worker closes whatever it inherited, and nothing of this process may be among it.
    playhouse::worker::run_if_worker();
    playhouse::cli::main()
}
