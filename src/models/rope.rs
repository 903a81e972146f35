//! Tables of cosines and sines for rotary positions, computed once per load on the host.
//!
//! All arithmetic is f32 in the order that Hugging Face transformers uses, with `powf`, `cos` and `sin` from the `libm`
//! crate, so that the same file gives the same table on every machine.

use super::spec::{RopeScaling, RopeSpec, TensorRule};
use rayon::prelude::*;
use std::f64::consts::PI;

/// The table of a rotation for positions `0 .. n_ctx`: `[n_ctx, n_rot]`, each row `n_rot / 2` cosines, then as many
/// sines, scaled. `factors` gives the values of the tensors in [`RopeSpec::tensors`].
///
/// # Errors
/// What `factors` returns.
pub fn table<E>(
    rope: &RopeSpec,
    n_ctx: usize,
    factors: impl FnMut(&TensorRule) -> Result<Vec<f32>, E>,
) -> Result<Vec<f32>, E> {
    let (frequencies, scale) = frequencies(rope, n_ctx, factors)?;
    let mut table = vec![0.0; n_ctx * rope.n_rot];
    // A context of 131,072 has eight million of them: a third of a second on one core.
    table.par_chunks_exact_mut(rope.n_rot).enumerate().for_each(|(position, row)| {
        let (cosines, sines) = row.split_at_mut(rope.n_rot / 2);
        for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&frequencies) {
            let (s, c) = libm::sincosf(position as f32 * frequency);
            *cosine = c * scale;
            *sine = s * scale;
        }
    });
    Ok(table)
}

/// Radians per position of each pair, and what cosines and sines are multiplied by.
///
/// # Errors
/// What `factors` returns.
pub fn frequencies<E>(
    rope: &RopeSpec,
    n_ctx: usize,
    mut factors: impl FnMut(&TensorRule) -> Result<Vec<f32>, E>,
) -> Result<(Vec<f32>, f32), E> {
    let periods = periods(rope);
    let divided = |factors: Vec<f32>| periods.iter().zip(factors).map(|(p, f)| 1.0 / (f * p)).collect::<Vec<f32>>();
    let plain = periods.iter().map(|p| 1.0 / p);
    Ok(match &rope.scaling {
        RopeScaling::None => (plain.collect(), 1.0),
        RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
        RopeScaling::Yarn { factor, .. } => {
            let ramp = yarn_ramp(rope);
            let mix = |(p, keep): (&f32, f32)| 1.0 / (factor * p) * (1.0 - keep) + 1.0 / p * keep;
            let scale = 0.1 * libm::log(f64::from(*factor)) + 1.0;
            (periods.iter().zip(ramp).map(mix).collect(), scale as f32)
        }
        RopeScaling::Factors(rule) => (divided(factors(rule)?), 1.0),
        RopeScaling::LongRope { short, long, n_ctx_original, attn_factor } => {
            let rule = if n_ctx > *n_ctx_original { long } else { short };
            (divided(factors(rule)?), *attn_factor)
        }
    })
}

/// `base^(2i / n_rot)` of each pair `i`, correctly rounded from f64.
fn periods(rope: &RopeSpec) -> Vec<f32> {
    let exponent = |i: usize| f64::from(2.0 * i as f32 / rope.n_rot as f32);
    (0..rope.n_rot / 2).map(|i| libm::pow(f64::from(rope.base), exponent(i)) as f32).collect()
}

/// How much of each pair's own frequency YaRN keeps: 1 for the fast ones, 0 for the slow ones.
fn yarn_ramp(rope: &RopeSpec) -> Vec<f32> {
    let RopeScaling::Yarn { n_ctx_original, beta_fast, beta_slow, truncate, .. } = rope.scaling else {
        return vec![1.0; rope.n_rot / 2];
    };
    let n_rot = rope.n_rot as f64;
    // The pair that turns `turns` times over the original context.
    let pair = |turns: f32| {
        let wave = n_ctx_original as f64 / (f64::from(turns) * 2.0 * PI);
        n_rot * libm::log(wave) / (2.0 * libm::log(f64::from(rope.base)))
    };
    let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(n_rot - 1.0));
    if low == high {
        high += 0.001;
    }
    let (low, width) = (low as f32, (high - low) as f32);
    (0..rope.n_rot / 2).map(|i| 1.0 - ((i as f32 - low) / width).clamp(0.0, 1.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Pairing;
    use crate::models::spec::Shape;
    use std::convert::Infallible;

    fn rope(scaling: RopeScaling) -> RopeSpec {
        RopeSpec { n_rot: 8, base: 10_000.0, pairing: Pairing::Halves, scaling }
    }

    fn frequencies_of(scaling: RopeScaling, n_ctx: usize) -> (Vec<f32>, f32) {
        let factors = |rule: &TensorRule| Ok::<_, Infallible>(vec![rule.name().len() as f32; 4]);
        let Ok(found) = frequencies(&rope(scaling), n_ctx, factors);
        found
    }

    #[test]
    fn frequencies_fall_by_powers_of_the_base() {
        assert_eq!(frequencies_of(RopeScaling::None, 1), (vec![1.0, 0.1, 0.01, 0.001], 1.0));
        assert_eq!(frequencies_of(RopeScaling::Linear { factor: 4.0 }, 1), (vec![0.25, 0.025, 0.0025, 0.00025], 1.0));
    }

    #[test]
    fn long_rope_chooses_its_factors_by_context() {
        let rule = |name: &str| TensorRule::One { name: name.into(), shape: Shape::Vector(4) };
        let scaling =
            RopeScaling::LongRope { short: rule("2!"), long: rule("four"), n_ctx_original: 64, attn_factor: 1.5 };
        assert_eq!(frequencies_of(scaling.clone(), 64).0[0], 1.0 / 2.0);
        assert_eq!(frequencies_of(scaling.clone(), 65).0[0], 1.0 / 4.0);
        assert_eq!(frequencies_of(scaling, 1).1, 1.5);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let yarn = |truncate| RopeScaling::Yarn {
            factor: 32.0,
            n_ctx_original: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate,
        };
        let (found, scale) = frequencies_of(yarn(false), 1);
        assert_eq!(found[0], 1.0, "turns 652 times over the original context");
        assert!((found[3] - 0.001 / 32.0).abs() < 1e-9, "turns less than once: {}", found[3]);
        assert!(found[2] < 0.01 && found[2] > 0.01 / 32.0, "between: {}", found[2]);
        assert!((scale - 1.346_573_6).abs() < 1e-6);
        assert_ne!(found, frequencies_of(yarn(true), 1).0);
    }

    #[test]
    fn rows_are_cosines_then_sines() {
        let Ok(table) = table(&rope(RopeScaling::None), 3, |_| Ok::<_, Infallible>(Vec::new()));
        assert_eq!(table.len(), 3 * 8);
        assert_eq!(table[..8], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((table[16] - 2f32.cos()).abs() < 1e-6 && (table[20] - 2f32.sin()).abs() < 1e-6);
    }
}
