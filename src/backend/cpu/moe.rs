//! Mixture of experts: route, run the chosen experts on their tokens, add up in order of score.

use super::matmul::{self, Done, Group};
use super::pool::Shards;
use super::{CpuBackend, CpuTensor, CpuWeight, Ctx, gated, grow, math, norm};
use crate::backend::routes::Routing;
use crate::backend::{Linear, MoeOp, MoeWeighting};

/// Work space of the op.
#[derive(Default)]
pub(super) struct Scratch {
    /// Router logits, `[T, E]`.
    scores: Vec<f32>,
    /// Gated activations of each choice, `[T * K, F]`.
    hidden: Vec<f32>,
    /// Outputs of each choice, `[T * K, C]`.
    outputs: Vec<f32>,
}

impl Scratch {
    /// Elements allocated.
    pub(super) fn capacity(&self) -> usize {
        self.scores.capacity() + self.hidden.capacity() + self.outputs.capacity()
    }
}

/// One token's use of one expert; choice `t * K + k` is token `t`'s `k`-th best.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

/// See [`crate::backend::Backend::moe`].
pub(super) fn run(
    ctx: &mut Ctx,
    n_tokens: usize,
    (normed, scratch): (&mut Vec<f32>, &mut Scratch),
    routing: &mut Routing,
    op: &MoeOp<'_, CpuBackend>,
    x: &mut CpuTensor,
) {
    let (n_mats, n_ff, n_in) = op.gate.weight.shape();
    assert_eq!(n_mats, op.n_experts, "one matrix per expert");
    assert!((1..=op.n_experts).contains(&op.n_used), "{} of {} experts used", op.n_used, op.n_experts);
    let x = x.rows_mut(n_tokens, n_in);
    let normed = norm::rows(ctx, op.norm, x, n_in, normed);
    let scores = grow(&mut scratch.scores, n_tokens * op.n_experts);
    route(ctx, op.router, normed, scores);
    let experts = routing.choose(scores, op.n_experts, op.n_used);
    let tokens = scores.chunks_exact(op.n_experts).zip(experts.chunks_exact(op.n_used));
    let choices: Vec<Choice> = tokens.flat_map(|(scores, experts)| weigh(scores, experts, op.weighting)).collect();
    let by_expert = group_by_expert(&choices, op.n_experts);

    let hidden = grow(&mut scratch.hidden, choices.len() * n_ff);
    expand(ctx, op, &by_expert, normed, hidden);
    let outputs = grow(&mut scratch.outputs, choices.len() * n_in);
    contract(ctx, op, &by_expert, hidden, outputs);
    for ((x, choices), outputs) in
        x.chunks_exact_mut(n_in).zip(choices.chunks_exact(op.n_used)).zip(outputs.chunks_exact(op.n_used * n_in))
    {
        combine(x, choices, outputs);
    }
}

fn route(ctx: &mut Ctx, router: Linear<'_, CpuBackend>, normed: &[f32], scores: &mut [f32]) {
    let (_, n_experts, n_in) = router.weight.shape();
    let group = Group { mats: vec![router.weight.mat(0)], cols: normed.chunks_exact(n_in).collect() };
    let bias = router.bias.map(|b| b.vector(n_experts));
    let shards = Shards::new(scores);
    matmul::multiply(ctx, &[group], &|done: Done<'_>| {
        for t in 0..done.n_cols {
            // SAFETY: these rows of column `t` belong to this task alone.
            let out = unsafe { shards.part(t * n_experts + done.first_row, done.n_rows) };
            done.column(0, t, bias, out);
        }
    });
}

/// The experts of one token with their weights.
fn weigh(scores: &[f32], experts: &[usize], weighting: MoeWeighting) -> Vec<Choice> {
    match weighting {
        MoeWeighting::SoftmaxOfChosen => {
            // The first is the best, unless somebody else chose.
            let top = experts.iter().map(|e| scores[*e]).fold(f32::NEG_INFINITY, f32::max);
            let exps: Vec<f32> = experts.iter().map(|e| math::exp(scores[*e] - top)).collect();
            let sum = exps.iter().fold(0.0, |sum, e| sum + e);
            experts.iter().zip(exps).map(|(expert, e)| Choice { expert: *expert, weight: e / sum }).collect()
        }
    }
}

/// For each expert in use, the indices of the choices that use it.
fn group_by_expert(choices: &[Choice], n_experts: usize) -> Vec<(usize, Vec<usize>)> {
    let mut groups = vec![Vec::new(); n_experts];
    for (i, choice) in choices.iter().enumerate() {
        groups[choice.expert].push(i);
    }
    groups.into_iter().enumerate().filter(|(_, choices)| !choices.is_empty()).collect()
}

/// `hidden[choice] = act(W_gate n + b, W_up n + b)` of the choice's expert and token.
fn expand(
    ctx: &mut Ctx,
    op: &MoeOp<'_, CpuBackend>,
    by_expert: &[(usize, Vec<usize>)],
    normed: &[f32],
    hidden: &mut [f32],
) {
    let (_, n_ff, n_in) = op.gate.weight.shape();
    let group = |(expert, choices): &(usize, Vec<usize>)| Group {
        mats: vec![op.gate.weight.mat(*expert), op.up.weight.mat(*expert)],
        cols: choices.iter().map(|c| &normed[c / op.n_used * n_in..][..n_in]).collect(),
    };
    let groups: Vec<_> = by_expert.iter().map(group).collect();
    let (shards, isa) = (Shards::new(hidden), ctx.isa);
    matmul::multiply(ctx, &groups, &|done: Done<'_>| {
        let (expert, choices) = &by_expert[done.group];
        let (gate_bias, up_bias) = (bias(op.gate.bias, *expert, n_ff), bias(op.up.bias, *expert, n_ff));
        let mut up = [0.0; matmul::TASK_ROWS];
        let up = &mut up[..done.n_rows];
        for (c, choice) in choices.iter().enumerate() {
            // SAFETY: these rows of this choice belong to this task alone.
            let out = unsafe { shards.part(choice * n_ff + done.first_row, done.n_rows) };
            done.column(0, c, gate_bias, out);
            done.column(1, c, up_bias, up);
            gated::activate(isa, op.activation, out, up);
        }
    });
}

/// `outputs[choice] = W_down hidden[choice] + b` of the choice's expert.
fn contract(
    ctx: &mut Ctx,
    op: &MoeOp<'_, CpuBackend>,
    by_expert: &[(usize, Vec<usize>)],
    hidden: &[f32],
    outputs: &mut [f32],
) {
    let (_, n_out, n_ff) = op.down.weight.shape();
    let group = |(expert, choices): &(usize, Vec<usize>)| Group {
        mats: vec![op.down.weight.mat(*expert)],
        cols: choices.iter().map(|c| &hidden[c * n_ff..][..n_ff]).collect(),
    };
    let groups: Vec<_> = by_expert.iter().map(group).collect();
    let shards = Shards::new(outputs);
    matmul::multiply(ctx, &groups, &|done: Done<'_>| {
        let (expert, choices) = &by_expert[done.group];
        let bias = bias(op.down.bias, *expert, n_out);
        for (c, choice) in choices.iter().enumerate() {
            // SAFETY: these rows of this choice belong to this task alone.
            let out = unsafe { shards.part(choice * n_out + done.first_row, done.n_rows) };
            done.column(0, c, bias, out);
        }
    });
}

/// Row `expert` of a bias `[E, n]`.
fn bias(bias: Option<&CpuWeight>, expert: usize, n: usize) -> Option<&[f32]> {
    bias.map(|b| &b.f32s().expect("expert biases are f32")[expert * n..][..n])
}

/// `x += sum of weight * output`, the sum taken in the order of the choices.
fn combine(x: &mut [f32], choices: &[Choice], outputs: &[f32]) {
    let n = x.len();
    for (i, x) in x.iter_mut().enumerate() {
        let sum = choices.iter().enumerate().fold(0.0, |sum, (k, c)| sum + c.weight * outputs[k * n + i]);
        *x += sum;
    }
}
