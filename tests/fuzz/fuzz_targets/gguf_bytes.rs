//! Any bytes as a GGUF file: refused with a good error, or whole and stable under rewriting.

#![no_main]

extern crate self as playhouse;

#[path = "../../../src/dtype/mod.rs"]
pub mod dtype;
#[path = "../../../src/gguf/mod.rs"]
pub mod gguf;
#[path = "../../gguf_support/mod.rs"]
mod gguf_support;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| gguf_support::check_any_bytes(bytes));
