//! Prints the text that basho is trained on: `cargo run --release --example haiku_corpus -- SEED COUNT TURNS`.
//!
//! One conversation a line: the system message (often empty), then prompts and poems in turn, separated by tabs; `|`
//! stands for a line feed. The same arguments print the same bytes on every machine.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use playhouse::basho::conversation;

fn main() -> ExitCode {
    let args: Vec<u64> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let [seed, count, turns] = args[..] else {
        println!("usage: haiku_corpus SEED COUNT TURNS (three numbers)");
        return ExitCode::from(2);
    };
    match print(seed, count, turns) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader had enough: `haiku_corpus 1 1000000 1 | head` is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            println!("cannot write the corpus: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(seed: u64, count: u64, turns: u64) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for index in 0..count {
        // Conversations are keyed by (seed, index), so that parts of a corpus can be made side by side.
        let talk = conversation(seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(index), turns as usize);
        write!(out, "{}", talk.system.unwrap_or_default())?;
        for exchange in talk.exchanges {
            write!(out, "\t{}\t{}", exchange.prompt, exchange.poem.replace('\n', "|"))?;
        }
        writeln!(out)?;
    }
    out.flush()
}
