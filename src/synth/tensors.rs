//! The tensors of a shape, in the order of real files, each with its type and how to fill it.

use super::mix::{FileType, Role};
use super::shapes::{Arch, Shape};
use super::{TensorPlan, logit_std};
use crate::dtype::DType;

/// How a tensor is filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Init {
    /// Normal around 0 with this standard deviation, from a pool of encoded blocks.
    Weights(f32),
    /// F32, normal around the first with the second as standard deviation.
    Vector(f32, f32),
}

/// Biases are small beside the products they are added to.
const BIAS: Init = Init::Vector(0.0, 0.05);
const NORM: Init = Init::Vector(1.0, 0.1);
/// Standard deviation of embeddings that are the output matrix as well.
const TIED: f32 = 0.02;
/// A sink takes about as much attention as a few tokens.
const SINK: Init = Init::Vector(0.0, 1.0);

/// Builds the list.
struct List<'a> {
    shape: &'a Shape,
    file_type: FileType,
    out: Vec<TensorPlan>,
}

/// All tensors of a shape with a vocabulary of this size.
pub(super) fn plan(shape: &Shape, file_type: FileType, n_vocab: u64) -> Vec<TensorPlan> {
    let mut list = List { shape, file_type, out: Vec::new() };
    let hidden = u64::from(shape.hidden);
    let per_column = |std: f32| std / (hidden as f32).sqrt();
    let logits = per_column(logit_std(n_vocab));
    // Embeddings are smaller than what the first layer adds, as in trained models. Tied ones are the output matrix too: so
    // small that a token does not predict itself, and the last norm makes up for it.
    let (role, std) = if shape.tied { (Role::Output, TIED) } else { (Role::Embedding, 0.05) };
    list.matrix("token_embd", &[hidden, n_vocab], role, 0, std);
    for layer in 0..shape.n_layers {
        list.attention(layer);
        if shape.arch == Arch::GptOss { list.experts(layer) } else { list.ffn(layer) }
    }
    let gain = if shape.tied { logits / TIED } else { 1.0 };
    list.vector("output_norm.weight", hidden, Init::Vector(gain, 0.1 * gain));
    if !shape.tied {
        list.matrix("output", &[hidden, n_vocab], Role::Output, 0, logits);
    }
    list.out
}

impl List<'_> {
    fn vector(&mut self, name: impl Into<String>, len: u64, init: Init) {
        self.out.push(TensorPlan { name: name.into(), dims: vec![len], dtype: DType::F32, init });
    }

    /// `{name}.weight` of these dimensions, `dims[0]` the columns.
    fn matrix(&mut self, name: &str, dims: &[u64], role: Role, layer: u32, std: f32) {
        let dtype = self.file_type.dtype(self.shape, role, layer, dims[0]);
        self.out.push(TensorPlan {
            name: format!("{name}.weight"),
            dims: dims.to_vec(),
            dtype,
            init: Init::Weights(std),
        });
    }

    /// A matrix of a layer that keeps the variance of its input.
    fn linear(&mut self, layer: u32, name: &str, cols: u64, rows: u64, role: Role) {
        let std = 1.0 / (cols as f32).sqrt();
        self.matrix(&format!("blk.{layer}.{name}"), &[cols, rows], role, layer, std);
    }

    fn attention(&mut self, layer: u32) {
        let shape = self.shape;
        let hidden = u64::from(shape.hidden);
        let q = u64::from(shape.n_heads * shape.head_dim);
        let kv = u64::from(shape.n_kv_heads * shape.head_dim);
        self.vector(format!("blk.{layer}.attn_norm.weight"), hidden, NORM);
        let has_bias = matches!(shape.arch, Arch::Qwen2 | Arch::GptOss);
        if shape.arch == Arch::Phi3 {
            self.linear(layer, "attn_qkv", hidden, q + 2 * kv, Role::Qkv);
        } else {
            for (name, rows, role) in
                [("attn_q", q, Role::Other), ("attn_k", kv, Role::Other), ("attn_v", kv, Role::Value)]
            {
                self.linear(layer, name, hidden, rows, role);
                if has_bias {
                    self.vector(format!("blk.{layer}.{name}.bias"), rows, BIAS);
                }
            }
        }
        self.linear(layer, "attn_output", q, hidden, Role::AttnOutput);
        if shape.arch == Arch::GptOss {
            self.vector(format!("blk.{layer}.attn_output.bias"), hidden, BIAS);
            self.vector(format!("blk.{layer}.attn_sinks.weight"), shape.n_heads.into(), SINK);
        }
    }

    fn ffn(&mut self, layer: u32) {
        let (hidden, ffn) = (u64::from(self.shape.hidden), u64::from(self.shape.ffn));
        self.vector(format!("blk.{layer}.ffn_norm.weight"), hidden, NORM);
        if self.shape.arch == Arch::Phi3 {
            self.linear(layer, "ffn_up", hidden, 2 * ffn, Role::Up);
        } else {
            self.linear(layer, "ffn_gate", hidden, ffn, Role::Gate);
            self.linear(layer, "ffn_up", hidden, ffn, Role::Up);
        }
        self.linear(layer, "ffn_down", ffn, hidden, Role::Down);
    }

    fn experts(&mut self, layer: u32) {
        let (hidden, ffn) = (u64::from(self.shape.hidden), u64::from(self.shape.ffn));
        let n_experts = u64::from(self.shape.experts.map_or(1, |(n, _)| n));
        self.vector(format!("blk.{layer}.post_attention_norm.weight"), hidden, NORM);
        // The router stays F32. Twice the deviation: some experts are clearly preferred, as in trained models.
        let router = Init::Vector(0.0, 2.0 / (hidden as f32).sqrt());
        let name = format!("blk.{layer}.ffn_gate_inp.weight");
        self.out.push(TensorPlan { name, dims: vec![hidden, n_experts], dtype: DType::F32, init: router });
        self.vector(format!("blk.{layer}.ffn_gate_inp.bias"), n_experts, BIAS);
        for (name, cols, rows) in
            [("ffn_gate_exps", hidden, ffn), ("ffn_up_exps", hidden, ffn), ("ffn_down_exps", ffn, hidden)]
        {
            let std = 1.0 / (cols as f32).sqrt();
            self.matrix(&format!("blk.{layer}.{name}"), &[cols, rows, n_experts], Role::Experts, layer, std);
            let name = format!("blk.{layer}.{name}.bias");
            self.out.push(TensorPlan { name, dims: vec![rows, n_experts], dtype: DType::F32, init: BIAS });
        }
    }
}
