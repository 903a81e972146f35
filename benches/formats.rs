//! Throughput of the block formats on one thread: decoding, encoding, and random blocks on all threads.
//! Bytes per second count the encoded side. `cargo bench --bench formats`.

use divan::Bencher;
use divan::counter::BytesCount;
use playhouse::dtype::{DType, RandomBlocks};

/// Elements per iteration: in L2 on both sides.
const N_ELEMS: usize = 64 * 1024;

fn main() {
    divan::main();
}

fn sample(dtype: DType, n_elems: usize) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(n_elems).expect("whole blocks")];
    RandomBlocks::new(dtype, 0.02, 1).expect("0.02 fits every format").fill(0, 0, &mut bytes).expect("whole blocks");
    bytes
}

#[divan::bench(args = DType::ALL)]
fn decode(bencher: Bencher<'_, '_>, dtype: &DType) {
    let bytes = sample(*dtype, N_ELEMS);
    let mut out = vec![0.0; N_ELEMS];
    bencher.counter(BytesCount::new(bytes.len())).bench_local(|| dtype.decode(&bytes, &mut out).expect("lengths fit"));
}

#[divan::bench(args = DType::ALL)]
fn encode(bencher: Bencher<'_, '_>, dtype: &DType) {
    let mut x = vec![0.0; N_ELEMS];
    DType::F32.decode(&sample(DType::F32, N_ELEMS), &mut x).expect("lengths fit");
    let mut bytes = vec![0; dtype.row_bytes(N_ELEMS).expect("whole blocks")];
    bencher.counter(BytesCount::new(bytes.len())).bench_local(|| dtype.encode(&x, &mut bytes).expect("all fit"));
}

#[divan::bench(args = DType::ALL)]
fn random_fill(bencher: Bencher<'_, '_>, dtype: &DType) {
    let blocks = RandomBlocks::new(*dtype, 0.02, 1).expect("0.02 fits every format");
    let mut bytes = vec![0; dtype.row_bytes(64 * N_ELEMS).expect("whole blocks")];
    bencher.counter(BytesCount::new(bytes.len())).bench_local(|| blocks.fill(0, 0, &mut bytes).expect("whole blocks"));
}

#[divan::bench(args = DType::ALL, sample_count = 5)]
fn random_pool(dtype: &DType) -> RandomBlocks {
    RandomBlocks::new(*dtype, 0.02, 1).expect("0.02 fits every format")
}
