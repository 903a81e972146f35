//! Rotations at the sizes of real models against transformers.

use super::golden;
use playhouse::backend::Pairing;
use playhouse::models::rope::{frequencies, table};
use playhouse::models::spec::{RopeScaling, RopeSpec, Shape, TensorRule};
use serde::Deserialize;
use std::collections::HashMap;
use std::convert::Infallible;

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Entry {
    Case(Case),
    Factors { short: Vec<f32>, long: Vec<f32> },
}

#[derive(Debug, Deserialize)]
struct Case {
    frequencies: Vec<f32>,
    scale: f32,
    positions: Vec<usize>,
    /// Cosines, then sines, at each position.
    rows: Vec<Vec<f32>>,
}

fn goldens() -> HashMap<String, Entry> {
    serde_json::from_slice(&std::fs::read(golden::path("rope.json")).unwrap()).unwrap()
}

fn check(name: &str, n_rot: usize, base: f32, n_ctx: usize, scaling: RopeScaling) {
    let goldens = goldens();
    let Some(Entry::Case(case)) = goldens.get(name) else { panic!("no golden {name}") };
    let Some(Entry::Factors { short, long }) = goldens.get("factors") else { panic!("no factors") };
    let factors = |rule: &TensorRule| Ok::<_, Infallible>(if rule.name() == "short" { short } else { long }.clone());
    let rope = RopeSpec { n_rot, base, pairing: Pairing::Halves, scaling };

    let Ok((found, scale)) = frequencies(&rope, n_ctx, factors);
    assert!((scale / case.scale - 1.0).abs() < 1e-6, "{name}: scale {scale}, golden {}", case.scale);
    assert_eq!(found.len(), case.frequencies.len());
    for (i, (found, golden)) in found.iter().zip(&case.frequencies).enumerate() {
        // Powers may be rounded differently by one unit, and YaRN's mixture by another.
        assert!((found / golden - 1.0).abs() < 4e-7, "{name}: frequency {i}: {found}, golden {golden}");
    }
    let Ok(table) = table(&rope, n_ctx, factors);
    for (&pos, row) in case.positions.iter().zip(&case.rows) {
        let found = &table[pos * n_rot..][..n_rot];
        for (i, (found, golden)) in found.iter().zip(row).enumerate() {
            // A unit in the last place of a frequency turns the far positions that much further.
            let off = 1e-6 + 2e-7 * pos as f32 * case.frequencies[i % (n_rot / 2)];
            assert!((found - golden).abs() <= off * scale, "{name}, position {pos}, {i}: {found}, golden {golden}");
        }
    }
}

fn yarn(factor: f32, n_ctx_original: usize, truncate: bool) -> RopeScaling {
    RopeScaling::Yarn { factor, n_ctx_original, beta_fast: 32.0, beta_slow: 1.0, truncate }
}

#[test]
fn plain_rotations_are_those_of_transformers() {
    check("llama-2", 128, 1e4, 4096, RopeScaling::None);
    check("qwen2.5", 64, 1e6, 32768, RopeScaling::None);
}

#[test]
fn stretched_rotations_are_those_of_transformers() {
    check("linear", 128, 1e4, 16384, RopeScaling::Linear { factor: 4.0 });
    check("qwen2.5-yarn", 128, 1e6, 131_072, yarn(4.0, 32768, true));
    check("gpt-oss", 64, 1.5e5, 131_072, yarn(32.0, 4096, false));
}

#[test]
fn long_rope_is_that_of_transformers() {
    let rule = |name: &str| TensorRule::One { name: name.into(), shape: Shape::Vector(48) };
    let scaling = RopeScaling::LongRope {
        short: rule("short"),
        long: rule("long"),
        n_ctx_original: 4096,
        attn_factor: (1.0 + 32f32.ln() / 4096f32.ln()).sqrt(),
    };
    check("phi-3-short", 96, 1e4, 4096, scaling.clone());
    check("phi-3-long", 96, 1e4, 131_072, scaling);
}
