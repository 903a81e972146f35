//! The block formats against the `gguf` Python package (`golden/dtype`), round trips, and misuse.

use std::path::Path;

use playhouse::dtype::DType;

fn golden(dtype: DType, what: &str) -> Option<Vec<u8>> {
    let name = format!("tests/golden/dtype/{}.{what}.bin", dtype.name().to_lowercase());
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).ok()
}

/// Splits a golden into its blocks' bytes and its elements, whichever comes first.
fn split(dtype: DType, bytes: &[u8], blocks_first: bool) -> (Vec<u8>, Vec<f32>) {
    let n_blocks = bytes.len() / (dtype.block_bytes() + 4 * dtype.block_elems());
    assert_eq!(bytes.len(), n_blocks * (dtype.block_bytes() + 4 * dtype.block_elems()), "{dtype}");
    let first = if blocks_first { n_blocks * dtype.block_bytes() } else { 4 * n_blocks * dtype.block_elems() };
    let (first, second) = bytes.split_at(first);
    let (blocks, elems) = if blocks_first { (first, second) } else { (second, first) };
    (blocks.to_vec(), elems.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
}

fn decode(dtype: DType, bytes: &[u8], n_elems: usize) -> Vec<f32> {
    let mut out = vec![0.0; n_elems];
    dtype.decode(bytes, &mut out).unwrap();
    out
}

fn encode(dtype: DType, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(x.len()).unwrap()];
    dtype.encode(x, &mut bytes).unwrap();
    bytes
}

/// Equal bits, or NaN both: an invalid product has another sign on other processors.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn decoders_equal_gguf_py_bit_for_bit() {
    for &dtype in DType::ALL {
        let (blocks, expected) = split(dtype, &golden(dtype, "decode").unwrap(), true);
        let found = decode(dtype, &blocks, expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(same(*found, *expected), "{dtype} element {i}: expected {expected:e}, found {found:e}");
        }
    }
}

#[test]
fn encoders_equal_gguf_py_byte_for_byte() {
    let with_golden: Vec<&DType> = DType::ALL.iter().filter(|dtype| golden(**dtype, "encode").is_some()).collect();
    assert_eq!(with_golden.len(), 8, "{with_golden:?}");
    for &dtype in with_golden {
        let (expected, x) = split(dtype, &golden(dtype, "encode").unwrap(), false);
        let found = encode(dtype, &x);
        let (size, elems) = (dtype.block_bytes(), dtype.block_elems());
        for (i, (found, expected)) in found.chunks(size).zip(expected.chunks(size)).enumerate() {
            let x = &x[i * elems..(i + 1) * elems];
            assert_eq!(found, expected, "{dtype} block {i} of {x:?}");
        }
    }
}
