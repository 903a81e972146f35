//! Random encoded rows of every format, and what they decode to by definition.

use super::Random;
use half::f16;
use playhouse_cuda::launch::matrix::Format;

/// Encoded rows with random bits and scales of usable size.
pub(crate) fn random_rows(random: &mut Random, format: Format, n_rows: usize, n_cols: usize) -> Vec<u8> {
    let (elems, bytes) = format.block();
    let mut out = Vec::with_capacity(n_rows * n_cols / elems * bytes);
    for _ in 0..n_rows * n_cols / elems {
        let mut block: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
        let scale = f16::from_f32(0.002 + 0.004 * random.unit()).to_le_bytes();
        let minimum = f16::from_f32(0.01 * random.unit()).to_le_bytes();
        let at = match format.name {
            "F32" => {
                block = (0.05 * random.normal()).to_le_bytes().to_vec();
                vec![]
            }
            "F16" => {
                block = f16::from_f32(0.05 * random.normal()).to_le_bytes().to_vec();
                vec![]
            }
            "BF16" => {
                block = half::bf16::from_f32(0.05 * random.normal()).to_le_bytes().to_vec();
                vec![]
            }
            "MXFP4" => {
                block[0] = 118 + (random.next() % 5) as u8;
                vec![]
            }
            "Q4_1" | "Q5_1" | "Q4_K" | "Q5_K" => vec![(0, scale), (2, minimum)],
            "Q2_K" => vec![(80, scale), (82, minimum)],
            "Q3_K" => vec![(108, scale)],
            "Q6_K" => vec![(208, f16::from_f32(1e-4).to_le_bytes())],
            _ => vec![(0, scale)],
        };
        for (at, value) in at {
            block[at..at + 2].copy_from_slice(&value);
        }
        out.extend(block);
    }
    out
}

/// One encoded block in f64, from the formats' definitions: what it stands for, exactly. Every value times its scale fits f64, so
/// that one rounding to f32 gives the bits that f32 arithmetic in the documented order gives.
pub(crate) fn decode_block(name: &str, b: &[u8]) -> Vec<f64> {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f64();
    let nibble = |from: usize, i: usize| f64::from(low_or_high(b, from, i));
    match name {
        "F32" => vec![f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))],
        "F16" => vec![half(0)],
        "BF16" => vec![f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))],
        "Q4_0" => (0..32).map(|i| half(0) * (nibble(2, i) - 8.0)).collect(),
        "Q4_1" => (0..32).map(|i| half(0) * nibble(4, i) + half(2)).collect(),
        "Q5_0" => (0..32).map(|i| half(0) * (nibble(6, i) + 16.0 * bit(b, 2, i) - 16.0)).collect(),
        "Q5_1" => (0..32).map(|i| half(0) * (nibble(8, i) + 16.0 * bit(b, 4, i)) + half(2)).collect(),
        "Q8_0" => (0..32).map(|i| half(0) * f64::from(b[2 + i] as i8)).collect(),
        "IQ4_NL" => (0..32).map(|i| half(0) * IQ4_VALUES[low_or_high(b, 2, i) as usize]).collect(),
        "MXFP4" => {
            let scale = 2f64.powi(i32::from(b[0]) - 128);
            let twice = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
            let value = |code: u8| if code < 8 { twice[code as usize] } else { 0.0 - twice[code as usize - 8] };
            (0..32).map(|i| scale * value(low_or_high(b, 1, i))).collect()
        }
        "Q2_K" => (0..256)
            .map(|i| {
                let packed = b[i / 16];
                let q = b[16 + 32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3;
                half(80) * f64::from(packed & 15) * f64::from(q) - half(82) * f64::from(packed >> 4)
            })
            .collect(),
        "Q3_K" => (0..256)
            .map(|i| {
                let s = i / 16;
                let scale = b[96 + s % 8] >> (4 * (s / 8)) & 15 | (b[104 + s % 4] >> (2 * (s / 4)) & 3) << 4;
                let low = b[32 + 32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3;
                let high = b[i % 32] >> (i / 32) & 1;
                half(108) * (f64::from(scale) - 32.0) * (f64::from(low) - 4.0 * f64::from(1 - high))
            })
            .collect(),
        "Q4_K" | "Q5_K" => (0..256)
            .map(|i| {
                let (scale, min) = scale_and_min(&b[4..16], i / 32);
                let quants = if name == "Q4_K" { 16 } else { 48 };
                let low = b[quants + 32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 15;
                let high = if name == "Q5_K" { b[16 + i % 32] >> (i / 32) & 1 } else { 0 };
                half(0) * f64::from(scale) * f64::from(low | high << 4) - half(2) * f64::from(min)
            })
            .collect(),
        "Q6_K" => (0..256)
            .map(|i| {
                let low = b[64 * (i / 128) + i % 64] >> (4 * (i % 128 / 64)) & 15;
                let high = b[128 + 32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3;
                half(208) * f64::from(b[192 + i / 16] as i8) * (f64::from(low | high << 4) - 32.0)
            })
            .collect(),
        "IQ4_XS" => (0..256)
            .map(|i| {
                let s = i / 32;
                let high = u16::from_le_bytes([b[2], b[3]]) >> (2 * s) & 3;
                let scale = f64::from(b[4 + s / 2] >> (4 * (s % 2)) & 15) + 16.0 * f64::from(high) - 32.0;
                half(0) * scale * IQ4_VALUES[low_or_high(b, 8 + 16 * s, i % 32) as usize]
            })
            .collect(),
        other => panic!("no decoder for {other}"),
    }
}

const IQ4_VALUES: [f64; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// Code `i` of 32: low halves of 16 bytes, then high halves.
fn low_or_high(b: &[u8], from: usize, i: usize) -> u8 {
    b[from + i % 16] >> (4 * (i / 16)) & 15
}

/// Bit `i` of a little-endian word.
fn bit(b: &[u8], from: usize, i: usize) -> f64 {
    f64::from(b[from + i / 8] >> (i % 8) & 1)
}

/// Six-bit scale and minimum `s` of 8 in 12 bytes.
fn scale_and_min(b: &[u8], s: usize) -> (u8, u8) {
    if s < 4 {
        return (b[s] & 63, b[s + 4] & 63);
    }
    (b[s + 4] & 15 | (b[s - 4] >> 6) << 4, b[s + 4] >> 4 | (b[s] >> 6) << 4)
}
