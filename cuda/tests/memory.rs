//! Device memory: the ledger against NVML, and what happens when there is none left.
//!
//! The tests of this file look at the whole device, so they take turns and the file has a process of its own.

mod support;

use half::f16;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer, Cap};
use playhouse_cuda::gpu::{Gpu, visible_gpus};
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::matrix::HalfRows;
use playhouse_cuda::launch::norm::to_half;
use playhouse_cuda::ledger::{Kind, Ledger};
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use support::{Bench, bench, download};

const MIB: u64 = 1 << 20;
/// What the ledger may be wrong by.
const SLACK: u64 = 64 * MIB;

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// Bytes in use on a device as NVML has them, if its tool is installed.
fn nvml_used(uuid: &str) -> Option<u64> {
    let query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", uuid];
    let output = Command::new("nvidia-smi").args(query).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse::<u64>().ok().map(|mib| mib * MIB)
}

fn assert_near(found: u64, expected: u64, what: &str) {
    let off = found.abs_diff(expected) as f64 / MIB as f64;
    println!("{what}: {} MiB, expected {} MiB", found / MIB, expected / MIB);
    assert!(found.abs_diff(expected) <= SLACK, "{what}: {found}, expected {expected}, {off:.1} MiB apart");
}

#[test]
fn the_ledger_agrees_with_nvml() {
    let _turn = turn();
    let Ok(all) = visible_gpus() else {
        return println!("the_ledger_agrees_with_nvml needs a GPU and is skipped");
    };
    let uuid = &all[0].uuid;
    let before = nvml_used(uuid);
    let gpu = Gpu::open(uuid).expect("a device");
    let kernels = Kernels::new(&gpu).expect("kernels");
    for (file, function) in [("norm", "rms_norm"), ("matmul_large", "matmul_large_128_q4"), ("sample", "sample")] {
        kernels.get(file, function, 0).expect("a kernel");
    }
    gpu.synchronize().expect("nothing runs");
    // Without NVML the device is taken to have been empty.
    let ledger = Ledger::new(&gpu, before.unwrap_or(0)).expect("a query");
    let check = |what: &str| {
        let expected = ledger.usage().total() + before.unwrap_or(0);
        assert_near(gpu.used_bytes().expect("a query"), expected, &format!("{what}, by the driver"));
        if let Some(used) = nvml_used(uuid) {
            assert_near(used, expected, &format!("{what}, by NVML"));
        }
    };
    check("context alone");
    let weights = ledger.arena(Kind::Weights, "weights", 8 << 30, None).expect("addresses");
    let parts: Vec<Buffer<u8>> = (1..40).map(|i| weights.alloc(i * 1_234_567 + 1, "a weight").expect("room")).collect();
    let kv = ledger.arena(Kind::Kv, "keys and values", 3 << 30, None).expect("addresses");
    kv.commit(3 << 30).expect("room");
    let scratch = ledger.arena(Kind::Scratch, "work space", 1 << 30, None).expect("addresses");
    scratch.alloc::<f32>(77_777_777, "activations").expect("room");
    let staging = ledger.arena(Kind::Staging, "staging", 128 * MIB, None).expect("addresses");
    staging.commit(128 * MIB).expect("room");
    let usage = ledger.usage();
    assert_eq!((usage.kv, usage.staging), (3 << 30, 128 * MIB));
    assert!(usage.weights >= parts.iter().map(Buffer::bytes).sum() && usage.weights - weights.used_bytes() < 64 * MIB);
    check("four arenas");
    drop((staging, kv));
    assert_eq!((ledger.usage().kv, ledger.usage().staging), (0, 0));
    check("two arenas");
    drop((parts, weights, scratch));
    assert_eq!(ledger.usage().total(), usage.context);
    check("none");
}

/// Rounds ascending numbers to f16 in two buffers of an arena: shows that memory and kernels work.
fn works(bench: &Bench, x: &Buffer<f32>, y: &Buffer<f16>) {
    let n = x.len();
    let y = HalfRows { data: y.clone(), stride: n };
    to_half(&bench.kernels, x, n, &y, 1).expect("launches");
    assert!(
        download(&y.data).iter().enumerate().all(|(i, y)| y.to_f32() == (i % 2048) as f32),
        "the numbers are there"
    );
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 2048) as f32).collect()
}

#[test]
fn when_the_device_is_full_everything_else_stays_usable() {
    let _turn = turn();
    let Some(bench) = bench("when_the_device_is_full_everything_else_stays_usable") else { return };
    let (x, y) = (bench.upload(&numbers(1 << 20)), bench.zeros::<f16>(1 << 20));
    works(&bench, &x, &y);
    let free = bench.gpu.free_bytes().expect("a query");
    let ballast = Arena::new(&bench.gpu, "ballast", free).expect("addresses");
    ballast.commit(free - 1024 * MIB).expect("all but a GiB");
    for piece in [64 * MIB, 192 * MIB, 320 * MIB, 2048 * MIB] {
        // The n-th allocation fails, for n from 1 to about 15.
        let arena = Arena::new(&bench.gpu, "pieces", 16 << 30).expect("addresses");
        let mut pieces: Vec<Buffer<f32>> = Vec::new();
        let error = loop {
            match arena.alloc::<f32>((piece / 4) as usize, "a piece") {
                Ok(buffer) => {
                    buffer.slice(0..2048).write(&numbers(2048)).expect("a copy");
                    pieces.push(buffer);
                }
                Err(error) => break error,
            }
        };
        let CudaError::OutOfMemory { what, requested, free, .. } = &error else { panic!("{error}") };
        assert!(what.contains("a piece (pieces)") && *requested == piece && *free < piece + 64 * MIB, "{error}");
        assert!(pieces.len() as u64 <= 1024 * MIB / piece, "{} pieces of {piece}", pieces.len());
        assert!(!error.is_sticky(), "{error}");
        // A second try fails as well, and what was there before is intact.
        let (used, mapped) = (arena.used_bytes(), arena.mapped_bytes());
        assert!(arena.alloc::<f32>((piece / 4) as usize, "a piece").is_err());
        assert_eq!((arena.used_bytes(), arena.mapped_bytes()), (used, mapped));
        assert!(pieces.iter().all(|p| download(&p.slice(0..2048)) == numbers(2048)));
        works(&bench, &x, &y);
    }
    drop(ballast);
    assert_near(bench.gpu.free_bytes().expect("a query"), free, "free again");
    let again = Arena::new(&bench.gpu, "again", 8 << 30).expect("addresses");
    again.commit(8 << 30).expect("what was given back can be taken");
    works(&bench, &x, &y);
}

#[test]
fn a_cap_is_shared_and_given_back() {
    let _turn = turn();
    let Some(bench) = bench("a_cap_is_shared_and_given_back") else { return };
    let cap = Cap::new(256 * MIB);
    let arena = |what| Arena::with_cap(&bench.gpu, what, 1 << 30, Some(cap.clone())).expect("addresses");
    let (first, second) = (arena("first"), arena("second"));
    first.commit(192 * MIB).expect("below the cap");
    let refused = second.alloc::<u8>((128 * MIB) as usize, "too much");
    assert!(refused.is_err_and(|e| e.to_string().contains("out of memory")));
    assert_eq!(cap.left(), 64 * MIB);
    second.alloc::<u8>((64 * MIB) as usize, "the rest").expect("up to the cap");
    assert_eq!(cap.left(), 0);
    drop(first);
    assert_eq!(cap.left(), 192 * MIB);
    second.alloc::<u8>((128 * MIB) as usize, "what was given back").expect("below the cap");
}

#[test]
fn an_arena_grows_and_nothing_in_it_moves() {
    let _turn = turn();
    let Some(bench) = bench("an_arena_grows_and_nothing_in_it_moves") else { return };
    let free = bench.gpu.free_bytes().expect("a query");
    let arena = Arena::new(&bench.gpu, "growing", 6 << 30).expect("addresses");
    assert_eq!((arena.used_bytes(), arena.mapped_bytes()), (0, 0), "addresses alone take no memory");
    let mut buffers: Vec<Buffer<f32>> = Vec::new();
    for i in 0..60usize {
        // From a few bytes to 90 MB, of odd lengths.
        let buffer = arena.alloc::<f32>(3 + i * i * 6_500, "a buffer").expect("room");
        buffer.slice(0..3).write(&[i as f32, 0.5, -1.0]).expect("a copy");
        buffers.push(buffer);
        let (used, mapped) = (arena.used_bytes(), arena.mapped_bytes());
        assert!(mapped >= used && mapped - used < 128 * MIB, "{mapped} mapped for {used}");
    }
    for (i, buffer) in buffers.iter().enumerate() {
        assert_eq!(download(&buffer.slice(0..3)), [i as f32, 0.5, -1.0], "buffer {i}");
    }
    let ends: Vec<u64> = buffers.iter().map(|b| b.ptr() + b.bytes()).collect();
    assert!(buffers.iter().skip(1).zip(ends).all(|(next, end)| next.ptr() >= end), "they do not overlap");
    drop((buffers, arena));
    assert_near(bench.gpu.free_bytes().expect("a query"), free, "free again");
}

#[test]
fn memory_in_pieces_is_taken_as_one() {
    let _turn = turn();
    let Some(bench) = bench("memory_in_pieces_is_taken_as_one") else { return };
    let (x, y) = (bench.upload(&numbers(1 << 16)), bench.zeros::<f16>(1 << 16));
    let free = bench.gpu.free_bytes().expect("a query");
    // Nearly all of the device in arenas of 1 GiB, and then every other of them given back: the largest gap is 1 GiB.
    let piece = 1 << 30;
    let mut pieces: Vec<Option<Arena>> = Vec::new();
    while bench.gpu.free_bytes().expect("a query") > 2 * piece {
        let arena = Arena::new(&bench.gpu, "a piece", piece).expect("addresses");
        arena.commit(piece).expect("there is room");
        pieces.push(Some(arena));
    }
    let kept: Vec<Arena> = pieces.iter_mut().step_by(2).filter_map(Option::take).collect();
    let n_freed = pieces.iter().flatten().count() as u64;
    drop(pieces);
    if n_freed == 0 {
        return println!("memory_in_pieces_is_taken_as_one needs more than 4 GiB and is skipped");
    }
    let whole = Arena::new(&bench.gpu, "a whole", n_freed * piece).expect("addresses");
    whole.commit(n_freed * piece).expect("pages need not lie side by side");
    let end = whole.alloc::<f32>((n_freed * piece / 4) as usize, "all of it").expect("it is there");
    end.slice(end.len() - 2048..end.len()).write(&numbers(2048)).expect("a copy to its end");
    assert_eq!(download(&end.slice(end.len() - 2048..end.len())), numbers(2048));
    works(&bench, &x, &y);
    println!("{} GiB in one piece out of gaps of 1 GiB", n_freed);
    drop((end, whole, kept));
    assert_near(bench.gpu.free_bytes().expect("a query"), free, "free again");
}

#[test]
fn exported_memory_outlives_its_arena() {
    let _turn = turn();
    let Some(bench) = bench("exported_memory_outlives_its_arena") else { return };
    let free = bench.gpu.free_bytes().expect("a query");
    let arena = Arena::new(&bench.gpu, "weights", 512 * MIB).expect("addresses");
    arena.commit(512 * MIB).expect("room");
    let exported = arena.export().expect("a descriptor for each piece");
    assert_eq!(exported.iter().map(|(_, bytes)| bytes).sum::<u64>(), arena.mapped_bytes());
    drop(arena);
    let held = free - bench.gpu.free_bytes().expect("a query");
    assert!(held >= 512 * MIB, "the descriptors hold it: {held}");
    drop(exported);
    assert_near(bench.gpu.free_bytes().expect("a query"), free, "free once they are closed");
}
