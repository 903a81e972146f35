//! The ops, each as a few launches.

use super::plan::{expert_rows, expert_tile, heads, one_kernel_attends};
use super::weight::{CudaWeight, Joined};
use super::{CudaBackend, CudaTensor};
use crate::backend::{
    Activation, AttentionOp, GatedOp, HeadOp, Linear, MoeOp, MoeWeighting, Norm, Pairing, QkvOp, Route,
};
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::launch::attention::{self, Attention, DecodeItems, Heads, KvLayer, RopeKv};
use playhouse_cuda::launch::embed::embed;
use playhouse_cuda::launch::gate::gate_up;
use playhouse_cuda::launch::matmul::{Experts, Gate, NormInput, Output, Product, Rows};
use playhouse_cuda::launch::matrix::{HalfRows, Matrix};
use playhouse_cuda::launch::mixed::{can_go_together, launch_together};
use playhouse_cuda::launch::moe::{Choices, Groups};
use playhouse_cuda::launch::norm::{self, RmsNorm};
use playhouse_cuda::launch::router::{Router, can_route_together};
use std::sync::Arc;

type Done = Result<(), CudaError>;

impl CudaBackend {
    pub(super) fn run_embed(&mut self, table: &CudaWeight, scale: f32, x: &mut CudaTensor) -> Done {
        let table = table.table.as_ref().unwrap_or_else(|| panic!("`{}` was not loaded as rows", table.name));
        let n = self.n_tokens();
        let x = x.fill_full(table.n_cols)?;
        embed(&self.kernels, table, &self.inputs()?.tokens, scale, &x.data, n)
    }

    pub(super) fn run_qkv(&mut self, op: &QkvOp<'_, Self>, x: &CudaTensor, q: &mut CudaTensor) -> Done {
        let n = self.n_tokens();
        let dims = op.dims;
        let (q_dim, kv_dim) = (dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim);
        let stride = q_dim + 2 * kv_dim;
        let qkv = self.work.qkv.get(&self.work.arena, n * stride)?;
        self.project_qkv(op, &mut Normed::new(&op.norm, x), &qkv, stride, n)?;
        let table = op.rope.table.values.as_ref().expect("a rotation table is loaded as values");
        let norm = op.qk_norm.as_ref().map(|(q, k)| {
            let (q_norm, k_norm) = (q.weight.vector(dims.head_dim), k.weight.vector(dims.head_dim));
            (q_norm.clone(), k_norm.clone(), q.eps)
        });
        let rotation = Rotation {
            qkv,
            stride,
            k_first: q_dim,
            v_first: q_dim + kv_dim,
            table: table.own.clone(),
            n_rot: op.rope.n_rot,
            interleaved: op.rope.pairing == Pairing::Interleaved,
            norm,
            q_out: q.fill_half_packed(q_dim)?.data,
        };
        let inputs = self.inputs()?;
        if inputs.n_prefill_items == 0 && one_kernel_attends(n, inputs.max_splits) {
            self.rotation = Some(rotation); // what attends will rotate
            return Ok(());
        }
        let rope = rotation.op(heads(dims), &inputs.positions, &inputs.slots, self.kv_layer(op.layer)?);
        attention::rope_kv(&self.kernels, &rope, n)
    }

    /// q, k and v side by side: in one product where they are one matrix, in one launch where the rows are few.
    fn project_qkv(
        &mut self,
        op: &QkvOp<'_, Self>,
        normed: &mut Normed<'_>,
        qkv: &Buffer<f32>,
        stride: usize,
        n: usize,
    ) -> Done {
        let projections = projections(&[op.q, op.k, op.v]);
        let output = |p: &Projection<'_>| Output::Store(Rows { data: qkv.slice(p.column..n * stride), stride });
        if projections.len() > 1 && normed.rows.is_none() && normed.done.is_none() {
            let n_cols = normed.weight.len();
            let unused = self.work.normed(n, n_cols)?;
            let together: Vec<Product<'_>> = projections
                .iter()
                .map(|p| Product {
                    matrix: p.matrix,
                    x: &unused,
                    n,
                    bias: p.bias.as_ref(),
                    bias_up: None,
                    experts: Experts::One,
                    output: output(p),
                })
                .collect();
            if can_go_together(&together) {
                let x = normed.x.full(n_cols)?.data;
                let input = NormInput { x: &x, weight: normed.weight, eps: normed.eps };
                return launch_together(&self.kernels, &together, Some(&input));
            }
        }
        projections
            .iter()
            .try_for_each(|p| self.normed_product(p.matrix, normed, n, (p.bias.as_ref(), None), output(p)))
    }

    pub(super) fn run_attention(&mut self, op: &AttentionOp<'_, Self>, q: &CudaTensor, out: &mut CudaTensor) -> Done {
        let heads = heads(op.dims);
        self.arrange_for(heads)?;
        let q = q.half().ok_or_else(|| contract("attention", "rotated queries in f16", "f32"))?;
        let q_dim = heads.n_heads * heads.head_dim;
        let out = out.fill_half(q_dim)?;
        let inputs = self.inputs()?.clone();
        let rows = attention::rows_of_one_token(heads);
        let len = attention::decode_partial_len(heads, inputs.n_decode_items, rows, inputs.max_splits);
        let partial = self.work.attention.get(&self.work.arena, len.max(1))?;
        let kv = self.kv_layer(op.layer)?.clone();
        let attention = Attention {
            heads,
            q: &q.data.slice(0..q.data.len() / q_dim * q_dim),
            kv: &kv,
            out: &out,
            sinks: op.sinks.map(|s| s.vector(heads.n_heads)),
            tables: &inputs.tables,
            positions: &inputs.positions,
            scale: op.scale,
            softcap: op.softcap,
            window: op.window,
        };
        let (items, n_items) = (&inputs.decode_items, inputs.n_decode_items);
        let decode = DecodeItems { items, n_items, rows, max_splits: inputs.max_splits };
        if let Some(rotation) = self.rotation.take() {
            let rope = rotation.op(heads, &inputs.positions, &inputs.slots, &kv);
            let tickets = self.work.tickets.get(&self.work.arena, n_items * heads.n_kv_heads)?;
            return attention.decode_step(&self.kernels, (&rope, inputs.n_tokens), &decode, &partial, &tickets);
        }
        if inputs.n_prefill_items > 0 {
            attention.prefill(&self.kernels, &inputs.prefill_items, inputs.n_prefill_items)?;
        }
        if inputs.n_decode_items > 0 {
            attention.decode(&self.kernels, &decode, &partial)?;
        }
        Ok(())
    }

    pub(super) fn run_linear_residual(&mut self, linear: Linear<'_, Self>, a: &CudaTensor, x: &mut CudaTensor) -> Done {
        let n = self.n_tokens();
        let matrix = linear.weight.matrix();
        let input = match a.half() {
            Some(rows) => rows,
            None => {
                let input = self.work.normed(n, matrix.n_cols())?;
                norm::to_half(&self.kernels, &a.full(matrix.n_cols())?.data, matrix.n_cols(), &input, n)?;
                input
            }
        };
        let x = x.full(matrix.n_rows())?;
        let bias = linear.bias.map(|b| b.vector(matrix.n_rows()));
        self.product(matrix, &input, n, bias, Experts::One, Output::Add(x))
    }

    pub(super) fn run_gated(&mut self, op: &GatedOp<'_, Self>, x: &CudaTensor, h: &mut CudaTensor) -> Done {
        let n = self.n_tokens();
        let n_ff = inner_rows(op.gate.weight);
        let h = h.fill_half(n_ff)?;
        let mut normed = Normed::new(&op.norm, x);
        if let Some(matrix) = gated_matrix(op.gate, op.up) {
            let biases = (op.gate.bias.map(|b| b.vector(n_ff)), op.up.bias.map(|b| b.vector(n_ff)));
            return self.normed_product(matrix, &mut normed, n, biases, Output::Gated(h, gate_of(op.activation)));
        }
        let rows = self.normed_rows(&mut normed, n)?;
        self.gate_and_up((op.gate, op.up), op.activation, (&rows, n), &Experts::One, &h)
    }

    pub(super) fn run_moe(&mut self, op: &MoeOp<'_, Self>, x: &mut CudaTensor) -> Done {
        let MoeWeighting::SoftmaxOfChosen = op.weighting;
        let n = self.n_tokens();
        let sizes = (op.n_experts, op.n_used);
        let (normed, choices) = self.choose_experts(op, x, n)?;
        let (n_rows, n_tiles) = expert_rows(n, sizes);
        let groups = match expert_tile(n, sizes) {
            None => None,
            Some(tile) => {
                let groups = self.work.groups(n * op.n_used, n_tiles, tile)?;
                choices.group(&self.kernels, &groups, n)?;
                Some(groups)
            }
        };
        let (first, second) = match &groups {
            None => {
                let jobs = |per_row| Experts::Jobs { mats: choices.experts.clone(), per_row };
                (jobs(op.n_used), jobs(1))
            }
            Some(groups) => (tiles(groups, Some(groups.token_of.clone())), tiles(groups, None)),
        };
        let hidden = self.work.hidden(n_rows, inner_rows(op.gate.weight))?;
        self.gate_and_up((op.gate, op.up), op.activation, (&normed, n_rows), &first, &hidden)?;
        let down = op.down.weight.matrix();
        let outputs = self.work.outputs.get(&self.work.arena, n_rows * down.n_rows())?;
        let stored = Rows { data: outputs.clone(), stride: down.n_rows() };
        let bias = op.down.bias.map(|b| b.vector(op.n_experts * down.n_rows()));
        self.product(down, &hidden, n_rows, bias, second, Output::Store(stored))?;
        let x = x.full(down.n_rows())?;
        choices.combine(&self.kernels, (&x.data, &outputs), down.n_rows(), groups.as_ref(), n)
    }

    /// The rows in f16 that experts read, and which of them: in one kernel where the tokens are few.
    fn choose_experts(
        &mut self,
        op: &MoeOp<'_, Self>,
        x: &CudaTensor,
        n: usize,
    ) -> Result<(HalfRows, Choices), CudaError> {
        let mut normed = Normed::new(&op.norm, x);
        let scores = self.work.scores.get(&self.work.arena, n * op.n_experts)?;
        let choices = self.work.choices(n, op.n_experts, op.n_used)?;
        let matrix = op.router.weight.matrix();
        let bias = op.router.bias.map(|b| b.vector(op.n_experts));
        let rows = if can_route_together(matrix.kind(), matrix.shape(), n, self.kernels.has_clusters()) {
            let n_cols = normed.weight.len();
            let rows = self.work.normed(n, n_cols)?;
            let x = normed.x.full(n_cols)?.data;
            let norm = NormInput { x: &x, weight: normed.weight, eps: normed.eps };
            let (scores, choices) = (&scores, &choices);
            Router { norm, matrix, bias, normed: &rows, scores, choices }.launch(&self.kernels, n)?;
            rows
        } else {
            let rows = self.normed_rows(&mut normed, n)?;
            let stored = Rows { data: scores.clone(), stride: op.n_experts };
            self.product(matrix, &rows, n, bias, Experts::One, Output::Store(stored))?;
            choices.route(&self.kernels, &scores, n)?;
            rows
        };
        self.tell_route(&scores, &choices, n)?;
        Ok((rows, choices))
    }

    /// Reads what was chosen, if somebody wants to know; not while a graph is recorded.
    fn tell_route(&self, scores: &Buffer<f32>, choices: &Choices, n: usize) -> Done {
        let Some(routes) = self.routes.as_ref().filter(|_| self.capture.is_none()) else { return Ok(()) };
        let Choices { experts, n_experts, n_used, .. } = choices;
        let (mut told, mut chosen) = (vec![0.0; n * n_experts], vec![0; n * n_used]);
        scores.slice(0..told.len()).read(&mut told)?;
        experts.slice(0..chosen.len()).read(&mut chosen)?;
        let experts = chosen.into_iter().map(|expert| expert as usize).collect();
        routes.push(Route { n_experts: *n_experts, n_used: *n_used, scores: told, experts });
        Ok(())
    }

    pub(super) fn run_head(&mut self, op: &HeadOp<'_, Self>, x: &CudaTensor, logits: &mut CudaTensor) -> Done {
        let inputs = self.inputs()?;
        let (n, rows) = (inputs.n_rows, inputs.rows.clone());
        let rows = (!inputs.all_rows).then_some(&rows);
        let matrix = op.output.weight.matrix();
        let bias = op.output.bias.map(|b| b.vector(matrix.n_rows()));
        let logits = logits.fill_full(matrix.n_rows())?;
        let mut normed = Normed { rows, ..Normed::new(&op.norm, x) };
        self.normed_product(matrix, &mut normed, n, (bias, None), Output::Store(logits.clone()))?;
        match op.softcap {
            None => Ok(()),
            Some(cap) => norm::softcap(&self.kernels, &logits.data, n * matrix.n_rows(), cap),
        }
    }

    /// `h = act(gate, up)` of `n` columns, in one product where gate and up are one matrix.
    fn gate_and_up(
        &mut self,
        (gate, up): (Linear<'_, Self>, Linear<'_, Self>),
        activation: Activation,
        (x, n): (&HalfRows, usize),
        experts: &Experts,
        h: &HalfRows,
    ) -> Done {
        let act = gate_of(activation);
        let n_ff = inner_rows(gate.weight);
        let bias_len = |matrix: &Matrix| matrix.shape().n_mats * n_ff;
        if let Some(matrix) = gated_matrix(gate, up) {
            let biases = [gate.bias, up.bias].map(|b| b.map(|b| b.vector(bias_len(matrix))));
            let output = Output::Gated(h.clone(), act);
            return self.launch(&Product {
                matrix,
                x,
                n,
                bias: biases[0],
                bias_up: biases[1],
                experts: experts.clone(),
                output,
            });
        }
        let (g, u) = self.work.gates(n * n_ff)?;
        for (linear, y) in [(gate, &g), (up, &u)] {
            let matrix = linear.weight.matrix();
            let bias = linear.bias.map(|b| b.vector(bias_len(matrix)));
            let y = Rows { data: y.clone(), stride: n_ff };
            self.product(matrix, x, n, bias, experts.clone(), Output::Store(y))?;
        }
        gate_up(&self.kernels, act, (&g, &u), n_ff, h, n)
    }

    /// The normalised rows in f16, computed when they are first asked for.
    fn normed_rows(&mut self, normed: &mut Normed<'_>, n: usize) -> Result<HalfRows, CudaError> {
        if let Some(done) = &normed.done {
            return Ok(done.clone());
        }
        let n_cols = normed.weight.len();
        let y = self.work.normed(n, n_cols)?;
        let x = normed.x.full(n_cols)?.data;
        let op = RmsNorm { x: &x, weight: normed.weight, rows: normed.rows, eps: normed.eps, y: &y };
        norm::rms_norm(&self.kernels, &op, n)?;
        Ok(normed.done.insert(y).clone())
    }

    /// A product of normalised rows: in one kernel where that can be, else after the kernel that normalises.
    fn normed_product(
        &mut self,
        matrix: &Matrix,
        normed: &mut Normed<'_>,
        n: usize,
        (bias, bias_up): (Option<&Buffer<f32>>, Option<&Buffer<f32>>),
        output: Output,
    ) -> Done {
        let n_cols = normed.weight.len();
        let unused = self.work.normed(n, n_cols)?;
        let fused = Product { matrix, x: &unused, n, bias, bias_up, experts: Experts::One, output: output.clone() };
        if normed.rows.is_none() && normed.done.is_none() && fused.can_normalise() {
            let x = normed.x.full(n_cols)?.data;
            let input = NormInput { x: &x, weight: normed.weight, eps: normed.eps };
            return fused.launch_normalised(&self.kernels, &input);
        }
        let x = self.normed_rows(normed, n)?;
        self.launch(&Product { matrix, x: &x, n, bias, bias_up, experts: Experts::One, output })
    }

    fn product(
        &mut self,
        matrix: &Matrix,
        x: &HalfRows,
        n: usize,
        bias: Option<&Buffer<f32>>,
        experts: Experts,
        output: Output,
    ) -> Done {
        self.launch(&Product { matrix, x, n, bias, bias_up: None, experts, output })
    }

    fn launch(&mut self, product: &Product<'_>) -> Done {
        let len = product.partial_len(&self.kernels);
        let partial = self.work.partial.get(&self.work.arena, len.max(1))?;
        product.launch(&self.kernels, &partial)
    }
}

/// What [`RopeKv`] needs of a layer's projections, kept until its attention runs.
pub(super) struct Rotation {
    qkv: Buffer<f32>,
    stride: usize,
    k_first: usize,
    v_first: usize,
    table: Buffer<f32>,
    n_rot: usize,
    interleaved: bool,
    norm: Option<(Buffer<f32>, Buffer<f32>, f32)>,
    q_out: Buffer<half::f16>,
}

impl Rotation {
    fn op<'a>(
        &'a self,
        heads: Heads,
        positions: &'a Buffer<u32>,
        slots: &'a Buffer<u32>,
        kv: &'a KvLayer,
    ) -> RopeKv<'a> {
        RopeKv {
            heads,
            qkv: &self.qkv,
            stride: self.stride,
            k_first: self.k_first,
            v_first: self.v_first,
            table: &self.table,
            n_rot: self.n_rot,
            interleaved: self.interleaved,
            norm: self.norm.as_ref().map(|(q, k, eps)| (q, k, *eps)),
            positions,
            slots,
            q_out: &self.q_out,
            kv,
        }
    }
}

/// Rows that an op normalises first.
struct Normed<'a> {
    x: &'a CudaTensor,
    weight: &'a Buffer<f32>,
    eps: f32,
    /// Which rows of x; all in order if `None`.
    rows: Option<&'a Buffer<u32>>,
    /// The rows, once a kernel of its own has computed them.
    done: Option<HalfRows>,
}

impl<'a> Normed<'a> {
    fn new(norm: &Norm<'a, CudaBackend>, x: &'a CudaTensor) -> Self {
        let n_cols = norm.weight.values.as_ref().map_or(0, |v| v.own.len());
        Self { x, weight: norm.weight.vector(n_cols), eps: norm.eps, rows: None, done: None }
    }
}

/// Gate and up as one matrix, if they are.
fn gated_matrix<'a>(gate: Linear<'a, CudaBackend>, up: Linear<'a, CudaBackend>) -> Option<&'a Matrix> {
    Joined::all(&[gate.weight.joined_matrix(), up.weight.joined_matrix()])
}

fn gate_of(activation: Activation) -> Gate {
    match activation {
        Activation::SwiGlu => Gate::SwiGlu,
        Activation::SwiGluClamped { alpha, limit } => Gate::Clamped { alpha, limit },
    }
}

/// A product of q, k and v, or of some of them: its matrix, its bias, and its first column in their row.
struct Projection<'a> {
    matrix: &'a Matrix,
    bias: Option<Buffer<f32>>,
    column: usize,
}

/// The products that projections side by side are: neighbours of one kind are one matrix.
fn projections<'a>(linears: &[Linear<'a, CudaBackend>]) -> Vec<Projection<'a>> {
    let (mut all, mut first, mut column) = (Vec::new(), 0, 0);
    while first < linears.len() {
        let n_parts = linears[first].weight.joined_matrix().map_or(1, |joined| joined.n_parts);
        let run = &linears[first..(first + n_parts).min(linears.len())];
        let (n_linears, matrix, bias) = match fused(run) {
            Some((matrix, bias)) => (run.len(), matrix, bias),
            None => {
                let matrix = run[0].weight.matrix();
                (1, matrix, run[0].bias.map(|bias| bias.vector(matrix.n_rows()).clone()))
            }
        };
        all.push(Projection { matrix, bias, column });
        first += n_linears;
        column += matrix.n_rows();
    }
    all
}

/// The matrix and bias that some projections are together, if they are.
fn fused<'a>(run: &[Linear<'a, CudaBackend>]) -> Option<(&'a Matrix, Option<Buffer<f32>>)> {
    let matrices: Vec<_> = run.iter().map(|l| l.weight.joined_matrix()).collect();
    let matrix = Joined::all(&matrices)?;
    if run.iter().all(|l| l.bias.is_none()) {
        return Some((matrix, None));
    }
    // Biases of all projections are one vector, of which these have a part.
    let place = |l: &Linear<'a, CudaBackend>| l.bias?.values.as_ref()?.joined.as_ref();
    let first = place(&run[0])?;
    let in_place = |(i, l): (usize, &Linear<'a, CudaBackend>)| {
        place(l).is_some_and(|p| Arc::ptr_eq(&p.whole, &first.whole) && p.at == first.at + matrix.first_row(i))
    };
    let range = first.at..first.at + matrix.n_rows();
    (run.iter().enumerate().all(in_place) && range.end <= first.whole.len())
        .then(|| (matrix, Some(first.whole.slice(range))))
}

/// Rows of the gate: elements between the halves of a feed-forward network.
fn inner_rows(gate: &CudaWeight) -> usize {
    gate.joined_matrix().map_or_else(|| gate.matrix().n_rows(), |joined| joined.whole.n_rows())
}

fn tiles(groups: &Groups, gather: Option<Buffer<i32>>) -> Experts {
    Experts::Tiles { mats: groups.tile_experts.clone(), gather, column_tile: groups.tile }
}

fn contract(op: &str, expected: &str, found: &str) -> CudaError {
    CudaError::Contract { op: op.to_owned(), expected: expected.to_owned(), found: found.to_owned() }
}
