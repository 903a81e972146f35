//! The ops in f64. Each result comes with the sum of the magnitudes that went into it, which bounds what rounding to
//! f32 may do to it in any order of summation.

use playhouse::backend::{Activation, Pairing};

/// A value and the magnitude its error is measured by.
pub(crate) type Value = (f64, f64);

pub(crate) fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// `W x + b` for each row of `x`.
pub(crate) fn linear(w: &[f32], bias: Option<&[f32]>, x: &[f64]) -> Vec<Value> {
    w.chunks_exact(x.len())
        .enumerate()
        .map(|(row, w)| {
            let b = bias.map_or(0.0, |b| f64::from(b[row]));
            w.iter().zip(x).fold((b, b.abs()), |(sum, magnitude), (w, x)| {
                let product = f64::from(*w) * x;
                (sum + product, magnitude + product.abs())
            })
        })
        .collect()
}

pub(crate) fn values(x: &[Value]) -> Vec<f64> {
    x.iter().map(|x| x.0).collect()
}

pub(crate) fn rms_norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let r = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * r * f64::from(*w)).collect()
}

pub(crate) fn rotate(head: &mut [f64], angles: &[f64], pairing: Pairing) {
    for (i, angle) in angles.iter().enumerate() {
        let (a, b) = match pairing {
            Pairing::Interleaved => (2 * i, 2 * i + 1),
            Pairing::Halves => (i, i + angles.len()),
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * angle.cos() - y * angle.sin();
        head[b] = x * angle.sin() + y * angle.cos();
    }
}

/// Attention of one query head over the keys and values it may see.
pub(crate) fn attend(
    q: &[f64],
    keys: &[&[f64]],
    values: &[&[f64]],
    scale: f32,
    softcap: Option<f32>,
    sink: Option<f32>,
) -> Vec<Value> {
    let logits: Vec<f64> = keys
        .iter()
        .map(|k| {
            let logit = q.iter().zip(*k).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale);
            softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
        })
        .collect();
    let max = logits.iter().copied().fold(sink.map_or(f64::NEG_INFINITY, f64::from), f64::max);
    let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| (f64::from(s) - max).exp());
    (0..values[0].len())
        .map(|d| {
            let terms = || weights.iter().zip(values).map(|(w, v)| w * v[d] / sum);
            (terms().sum(), values.iter().map(|v| v[d].abs()).fold(0.0, f64::max))
        })
        .collect()
}

pub(crate) fn activate(activation: Activation, g: f64, u: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::SwiGlu => g * sigmoid(g) * u,
        Activation::SwiGluClamped { alpha, limit } => {
            let (g, u) = (g.min(f64::from(limit)), u.clamp(-f64::from(limit), f64::from(limit)));
            g * sigmoid(f64::from(alpha) * g) * (u + 1.0)
        }
    }
}

/// The chosen experts in descending order of score, ties by index, with the softmax of their scores.
pub(crate) fn route(scores: &[f64], n_used: usize) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(n_used);
    let exps: Vec<f64> = order.iter().map(|e| (scores[*e] - scores[order[0]]).exp()).collect();
    let sum: f64 = exps.iter().sum();
    order.into_iter().zip(exps).map(|(e, w)| (e, w / sum)).collect()
}
