//! Rows of the embedding table in every format, bit for bit against the formats' definitions.

mod support;

use playhouse_cuda::launch::embed::{Table, embed};
use playhouse_cuda::launch::matrix::{FORMATS, Format};
use support::formats::{decode_block, random_rows};
use support::{Bench, Random, bench, download};

/// A row by definition, rounded to f32 once.
fn decoded(format: Format, row: &[u8]) -> Vec<f32> {
    row.chunks(format.block().1).flat_map(|block| decode_block(format.name, block)).map(|v| v as f32).collect()
}

fn embedded(bench: &Bench, table: &Table, tokens: &[u32], scale: f32) -> Vec<f32> {
    let x = bench.upload(&vec![f32::NAN; tokens.len() * table.n_cols]);
    embed(&bench.kernels, table, &bench.upload(tokens), scale, &x, tokens.len()).expect("launches");
    download(&x)
}

#[test]
fn every_format_is_decoded_bit_for_bit() {
    let Some(bench) = bench("every_format_is_decoded_bit_for_bit") else { return };
    let mut random = Random(41);
    for format in FORMATS.iter().copied() {
        let elems = format.block().0;
        for n_cols in [elems, 3 * elems, 2880_usize.next_multiple_of(elems), if elems == 1 { 1037 } else { 4 * elems }]
        {
            for n in [1, 2, 3, 17, 31, 33, 127] {
                bench.arena.reset();
                let n_rows = 29;
                let mut rows = random_rows(&mut random, format, n_rows, n_cols);
                if ["Q4_0", "Q5_0", "Q8_0", "IQ4_NL"].contains(&format.name) {
                    // Scales may be negative, and zeros have signs.
                    rows.chunks_mut(2 * format.block().1).for_each(|blocks| blocks[1] ^= 0x80);
                }
                let tokens: Vec<u32> = (0..n).map(|_| (random.next() % n_rows as u64) as u32).collect();
                let table = Table { format, n_rows, n_cols, data: bench.upload(&rows) };
                let found = embedded(&bench, &table, &tokens, 1.0);
                let scaled = embedded(&bench, &table, &tokens, 59.866_52);
                let row_bytes = rows.len() / n_rows;
                for (t, token) in tokens.iter().enumerate() {
                    let exact = decoded(format, &rows[*token as usize * row_bytes..][..row_bytes]);
                    for (c, exact) in exact.iter().enumerate() {
                        let (found, scaled) = (found[t * n_cols + c], scaled[t * n_cols + c]);
                        assert_eq!(found.to_bits(), exact.to_bits(), "{} column {c}: {found}, {exact}", format.name);
                        assert_eq!(scaled.to_bits(), (exact * 59.866_52).to_bits(), "{} scaled", format.name);
                    }
                }
            }
        }
    }
}

#[test]
fn every_exponent_of_mxfp4_is_decoded() {
    let Some(bench) = bench("every_exponent_of_mxfp4_is_decoded") else { return };
    let format = Format::by_name("MXFP4").expect("listed");
    let codes: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    let rows: Vec<u8> = (0..=255).flat_map(|e| [vec![e], codes.clone()].concat()).collect();
    let table = Table { format, n_rows: 256, n_cols: 32, data: bench.upload(&rows) };
    let tokens: Vec<u32> = (0..256).collect();
    let found = embedded(&bench, &table, &tokens, 1.0);
    for (e, (found, row)) in found.chunks(32).zip(rows.chunks(17)).enumerate() {
        let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(found), bits(&decoded(format, row)), "exponent {e}: {found:?}");
    }
}

#[test]
fn misuse_is_an_error() {
    let Some(bench) = bench("misuse_is_an_error") else { return };
    let format = Format::by_name("Q4_K").expect("listed");
    let table = Table { format, n_rows: 4, n_cols: 512, data: bench.zeros(4 * 288) };
    let (tokens, x) = (bench.zeros(3), bench.zeros(3 * 512));
    let refused =
        |table: &Table, n: usize| embed(&bench.kernels, table, &tokens, 1.0, &x, n).expect_err("misuse").to_string();
    assert!(refused(&table, 0).contains("embed: x"));
    assert!(refused(&table, 4).contains("embed: x"));
    assert!(refused(&Table { n_rows: 5, ..table.clone() }, 1).contains("embed: table"));
    assert!(refused(&Table { n_cols: 500, ..table.clone() }, 1).contains("embed: table"));
}
