//! What refusing a hostile file costs: memory below the file's size + 64 MiB, counted by the allocator, and work
//! linear in the file's size, counted in allocations.
//!
//! One test function: the counters are the process's.

mod gguf_support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use gguf_support::*;
use playhouse::gguf::GgufFile;

/// The system's allocator with a count of live bytes, their peak, and of allocations.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

fn add(n_bytes: usize) {
    CALLS.fetch_add(1, Relaxed);
    let live = LIVE.fetch_add(n_bytes, Relaxed) + n_bytes;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call is passed to the system's allocator unchanged; the counters are atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: our caller keeps the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: our caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: our caller keeps the contract.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Old and new exist at once where the block has to move: count both.
        add(new_size);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: our caller keeps the contract.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What opening a file cost.
struct Cost {
    peak_bytes: usize,
    n_allocs: usize,
}

/// Opens a file that must be refused.
fn refuse(path: &Path) -> Cost {
    let (live, calls) = (LIVE.load(Relaxed), CALLS.load(Relaxed));
    PEAK.store(live, Relaxed);
    assert!(GgufFile::open(path).is_err(), "a hostile file was accepted");
    Cost { peak_bytes: PEAK.load(Relaxed) - live, n_allocs: CALLS.load(Relaxed) - calls }
}

fn one_key(value: RawValue) -> RawFile {
    RawFile::default().key("a", value)
}

/// A file that is refused at its very end: its last key has an unknown type.
fn bad_end(file: RawFile) -> RawFile {
    file.key("z", RawValue::Scalar(99, vec![]))
}

/// Hostile files of about `scale` KiB of metadata each, and whether the size follows the scale.
fn hostile(name: &str, scale: usize) -> Vec<u8> {
    let kib = scale * 1024;
    match name {
        "tiny keys" => {
            let n = (kib / 19).min(65_000);
            bad_end((0..n).fold(RawFile::default(), |f, i| f.key(&format!("{i:06}"), RawValue::Scalar(U8, vec![0]))))
                .bytes()
        }
        "long keys" => {
            let key = "k".repeat(65_000);
            let n = kib / 65_000;
            bad_end(
                (0..n).fold(RawFile::default(), |f, i| f.key(&format!("{i:04}{key}"), RawValue::Scalar(U8, vec![0]))),
            )
            .bytes()
        }
        "tiny arrays of strings" => {
            let value = || RawValue::Strs(vec![vec![]]);
            let n = (kib / 42).min(65_000);
            bad_end((0..n).fold(RawFile::default(), |f, i| f.key(&format!("{i:06}"), value()))).bytes()
        }
        "empty strings" => bad_end(one_key(RawValue::Array(STR, (kib / 8) as u64, vec![0; kib / 8 * 8]))).bytes(),
        "one-byte strings" => {
            let one = [1, 0, 0, 0, 0, 0, 0, 0, b'x'];
            bad_end(one_key(RawValue::Array(STR, (kib / 9) as u64, one.repeat(kib / 9)))).bytes()
        }
        "strings, the last not UTF-8" => {
            let mut all = [1, 0, 0, 0, 0, 0, 0, 0, b'x'].repeat(kib / 9);
            *all.last_mut().unwrap() = 0xff;
            one_key(RawValue::Array(STR, (kib / 9) as u64, all)).bytes()
        }
        "one long string" => bad_end(one_key(RawValue::Str(vec![b'x'; kib]))).bytes(),
        "one long string, not UTF-8" => {
            let mut text = vec![b'x'; kib];
            text[kib - 1] = 0xff;
            one_key(RawValue::Str(text)).bytes()
        }
        "bytes" => bad_end(one_key(RawValue::Array(U8, kib as u64, vec![0; kib]))).bytes(),
        "doubles" => bad_end(one_key(RawValue::Array(F64, (kib / 8) as u64, vec![0; kib / 8 * 8]))).bytes(),
        "booleans, the last bad" => {
            let mut all = vec![1; kib];
            all[kib - 1] = 2;
            one_key(RawValue::Array(BOOL, kib as u64, all)).bytes()
        }
        "tiny tensors" => {
            let n = (kib / 39).min(65_000);
            let file = (0..n).fold(RawFile::default(), |f, i| f.tensor(&format!("{i:06}"), &[1], 0, 0));
            file.data(64).bytes()
        }
        "tensors with long names" => {
            let n = (kib / 120).min(65_000);
            let name = "n".repeat(58);
            let file = (0..n).fold(RawFile::default(), |f, i| f.tensor(&format!("{i:06}{name}"), &[1, 1, 1, 1], 0, 0));
            file.data(64).bytes()
        }
        "array claims more than there is" => one_key(RawValue::Array(U64, (1 << 26) - 1, vec![0; kib])).bytes(),
        "counts claim more than there is" => {
            let file = RawFile { n_keys: Some(65_536), n_tensors: Some(65_536), ..RawFile::default() };
            let mut bytes = file.bytes();
            bytes.resize(kib.max(64), 0);
            bytes
        }
        other => unreachable!("no hostile file `{other}`"),
    }
}

const NAMES: [&str; 15] = [
    "tiny keys",
    "long keys",
    "tiny arrays of strings",
    "empty strings",
    "one-byte strings",
    "strings, the last not UTF-8",
    "one long string",
    "one long string, not UTF-8",
    "bytes",
    "doubles",
    "booleans, the last bad",
    "tiny tensors",
    "tensors with long names",
    "array claims more than there is",
    "counts claim more than there is",
];

#[test]
fn refusing_costs_little_memory_and_linear_work() {
    const SPARE_BYTES: usize = 64 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.gguf");
    for name in NAMES {
        let mut allocs = Vec::new();
        for scale in [256, 1024, 16 * 1024] {
            let bytes = hostile(name, scale);
            let len = bytes.len();
            std::fs::write(&path, bytes).unwrap();
            let cost = refuse(&path);
            println!("{name:<34} {len:>9} bytes: peak {:>9} bytes, {:>7} allocations", cost.peak_bytes, cost.n_allocs);
            assert!(cost.peak_bytes < len + SPARE_BYTES, "{name}: {} bytes for a file of {len}", cost.peak_bytes);
            allocs.push((len, cost.n_allocs));
        }
        // Four times the file, at most four times the allocations, and a constant.
        for pair in allocs.windows(2) {
            let ((len_a, n_a), (len_b, n_b)) = (pair[0], pair[1]);
            assert!(n_b <= n_a * (len_b / len_a + 1) + 64, "{name}: {n_a} allocations, then {n_b}");
        }
    }
    sparse(&path);
}

/// A file of a terabyte that has no blocks on disk: what it claims fits its size, yet the caps hold.
fn sparse(path: &Path) {
    let built = one_key(RawValue::Array(U64, 1 << 26, vec![0; 8])).build();
    for (what, value) in [(What::ArrayLen, (1u64 << 26) + 1), (What::KeyCount, 65_537), (What::TensorCount, 1 << 35)] {
        let field = built.of(what).next().unwrap();
        std::fs::write(path, built.with(field.start, &value.to_le_bytes())).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().set_len(1 << 40).unwrap();
        let cost = refuse(path);
        assert!(cost.peak_bytes < 1 << 20, "{what:?}: {} bytes", cost.peak_bytes);
    }
}
