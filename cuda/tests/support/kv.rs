//! The paged cache's formats by definition: what a row becomes, and where its bytes lie.

use half::f16;
use playhouse_cuda::launch::attention::{BLOCK_TOKENS, KvFormat};

/// A row of one head as the cache holds it.
pub(crate) struct Encoded {
    /// 8-bit: quants in groups of 32; f16: empty.
    pub(crate) quants: Vec<i8>,
    /// A scale for each group.
    pub(crate) scales: Vec<f16>,
    /// What it stands for.
    pub(crate) decoded: Vec<f32>,
}

/// Rounds a row as the CPU's cache does: of 32 elements the largest magnitude becomes 127.
pub(crate) fn encode(format: KvFormat, row: &[f32]) -> Encoded {
    if format == KvFormat::F16 {
        let decoded = row.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
        return Encoded { quants: vec![], scales: vec![], decoded };
    }
    let (mut quants, mut scales, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
    for group in row.chunks(32) {
        let scale = group.iter().fold(0.0f32, |max, x| max.max(x.abs())) / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        scales.push(f16::from_f32(scale));
        let q = group.iter().map(|x| (x * inverse).round() as i8);
        decoded.extend(q.clone().map(|q| f32::from(q) * f16::from_f32(scale).to_f32()));
        quants.extend(q);
    }
    Encoded { quants, scales, decoded }
}

/// The bytes of a cache of decoded rows `[head of a block][32 tokens][head_dim]`; rows of NaN get NaN for scales.
pub(crate) fn head_rows(format: KvFormat, rows: &[f32], head_dim: usize) -> Vec<u8> {
    if format == KvFormat::F16 {
        return rows.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    }
    let (groups, mut out) = (head_dim.div_ceil(32), Vec::new());
    for head in rows.chunks(BLOCK_TOKENS * head_dim) {
        let rows: Vec<Encoded> = head.chunks(head_dim).map(|row| encode(format, row)).collect();
        for row in &rows {
            out.extend(row.quants.iter().map(|q| (i16::from(*q) + 128) as u8));
            // What pads a last group is never used: anything will do.
            out.resize(out.len() + 32 * groups - head_dim, 255);
        }
        for group in 0..groups {
            for (row, decoded) in rows.iter().zip(head.chunks(head_dim)) {
                let scale = if decoded[0].is_nan() { f16::NAN } else { row.scales[group] };
                out.extend(scale.to_le_bytes());
            }
        }
    }
    out
}
