//! The one interpreter of model descriptions: calls a backend's ops in order, once per step, for every architecture.

use super::weights::{Resident, WeightId};
use crate::backend::{
    AttentionOp, Backend, BackendError, Batch, Begun, GatedOp, HeadOp, Linear, MoeOp, Norm, QkvOp, Rope,
};
use crate::models::spec;

/// The activation buffers of a step, reused by every layer.
pub struct Activations<B: Backend> {
    /// Residual stream, `[T, C]`.
    x: B::Tensor,
    /// Rotated queries, `[T, NH * HS]`.
    q: B::Tensor,
    /// What attention gives, `[T, NH * HS]`.
    attended: B::Tensor,
    /// Between the halves of a gated network, `[T, F]`; absent in a model of experts only.
    hidden: Option<B::Tensor>,
    /// `[R, V]`.
    logits: B::Tensor,
}

impl<B: Backend> Activations<B> {
    /// Buffers for steps of up to `max_tokens` tokens and `max_logit_rows` rows of logits.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub fn new<T>(
        backend: &mut B,
        model: &spec::Model<T>,
        max_tokens: usize,
        max_logit_rows: usize,
    ) -> Result<Self, BackendError> {
        let q_dim = model.heads.n_heads * model.heads.head_dim;
        Ok(Self {
            x: backend.tensor(max_tokens, model.hidden_dim)?,
            q: backend.tensor(max_tokens, q_dim)?,
            attended: backend.tensor(max_tokens, q_dim)?,
            hidden: model.has_gated().then(|| backend.tensor(max_tokens, model.ffn_dim)).transpose()?,
            logits: backend.tensor(max_logit_rows, model.n_vocab)?,
        })
    }

    /// The residual stream after the last layer of the last step, `[T, C]`.
    pub fn residual(&self) -> &B::Tensor {
        &self.x
    }

    /// `[R, V]` of the last step.
    pub fn logits(&self) -> &B::Tensor {
        &self.logits
    }

    /// The same, to choose tokens from.
    pub fn logits_mut(&mut self) -> &mut B::Tensor {
        &mut self.logits
    }
}

/// Elements of [`Activations`] per token, and per row of logits.
pub fn activation_elements<T>(model: &spec::Model<T>) -> (usize, usize) {
    let hidden = if model.has_gated() { model.ffn_dim } else { 0 };
    (model.hidden_dim + 2 * model.heads.n_heads * model.heads.head_dim + hidden, model.n_vocab)
}

/// An intermediate result of a step, for comparing two runs layer by layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Intermediate<'a> {
    /// `embedding`, `q` (rotated), `attended`, `attention_residual`, `hidden`, `ffn_residual`, `logits`.
    pub name: &'static str,
    /// The layer; `None` before the first and after the last.
    pub layer: Option<usize>,
    /// Elements of a row.
    pub n_cols: usize,
    /// One row per token of the step, or per row of logits.
    pub values: &'a [f32],
}

/// Looks at intermediate results. Each look waits for the device.
pub type Probe<'a> = &'a mut dyn FnMut(Intermediate<'_>);

/// Runs one step; the logits are then in [`Activations::logits`].
///
/// # Errors
/// What [`Backend::begin`] says, or with a probe [`Backend::read`].
pub fn forward<B: Backend>(
    backend: &mut B,
    resident: &Resident<B>,
    act: &mut Activations<B>,
    batch: &Batch,
    probe: Option<Probe<'_>>,
) -> Result<(), BackendError> {
    if probe.is_some() {
        // Who looks at a step waits in the middle of it: it cannot be recorded.
        backend.begin(batch)?;
        return call_ops(backend, resident, act, batch, probe);
    }
    match backend.begin_recorded(batch)? {
        Begun::Replayed => Ok(()),
        Begun::Call => {
            call_ops(backend, resident, act, batch, None)?;
            backend.end()
        }
    }
}

fn call_ops<B: Backend>(
    backend: &mut B,
    resident: &Resident<B>,
    act: &mut Activations<B>,
    batch: &Batch,
    probe: Option<Probe<'_>>,
) -> Result<(), BackendError> {
    let model = &resident.model;
    let mut step = Step { backend, resident, look: Look { probe, n_tokens: batch.tokens.len(), values: Vec::new() } };
    step.backend.embed(resident.weight(model.embedding), model.embedding_scale, &mut act.x);
    step.look.at(step.backend, "embedding", None, model.hidden_dim, &act.x)?;
    for (i, layer) in model.layers.iter().enumerate() {
        step.attention(i, &layer.attention, act)?;
        step.ffn(i, &layer.ffn, act)?;
    }
    if batch.logit_rows.is_empty() {
        return Ok(());
    }
    let output = step.linear(&model.output);
    let op = HeadOp { norm: step.norm(&model.output_norm), output, softcap: model.final_softcap };
    step.backend.head(&op, &act.x, &mut act.logits);
    step.look.n_tokens = batch.logit_rows.len();
    step.look.at(step.backend, "logits", None, model.n_vocab, &act.logits)
}

struct Step<'a, 'p, B: Backend> {
    backend: &'a mut B,
    resident: &'a Resident<B>,
    look: Look<'p>,
}

impl<'a, B: Backend> Step<'a, '_, B> {
    fn attention(
        &mut self,
        layer: usize,
        attention: &'a spec::Attention<WeightId>,
        act: &mut Activations<B>,
    ) -> Result<(), BackendError> {
        let model = &self.resident.model;
        let (dims, q_dim) = (model.heads, model.heads.n_heads * model.heads.head_dim);
        let rope = &model.ropes[attention.rope];
        let qkv = QkvOp {
            layer,
            norm: self.norm(&attention.norm),
            q: self.linear(&attention.q),
            k: self.linear(&attention.k),
            v: self.linear(&attention.v),
            qk_norm: attention.qk_norm.as_ref().map(|(q, k)| (self.norm(q), self.norm(k))),
            rope: Rope {
                table: self.resident.weight(self.resident.rope_tables[attention.rope]),
                n_rot: rope.n_rot,
                pairing: rope.pairing,
            },
            dims,
        };
        self.backend.qkv(&qkv, &act.x, &mut act.q);
        self.look.at(self.backend, "q", Some(layer), q_dim, &act.q)?;
        let attend = AttentionOp {
            layer,
            dims,
            scale: attention.scale,
            window: attention.window,
            sinks: attention.sinks.map(|id| self.resident.weight(id)),
            softcap: attention.softcap,
        };
        self.backend.attention(&attend, &act.q, &mut act.attended);
        self.look.at(self.backend, "attended", Some(layer), q_dim, &act.attended)?;
        self.backend.linear_residual(self.linear(&attention.output), &act.attended, &mut act.x);
        self.look.at(self.backend, "attention_residual", Some(layer), model.hidden_dim, &act.x)
    }

    fn ffn(
        &mut self,
        layer: usize,
        ffn: &'a spec::Ffn<WeightId>,
        act: &mut Activations<B>,
    ) -> Result<(), BackendError> {
        match ffn {
            spec::Ffn::Gated { norm, gate, up, down, activation } => {
                let op = GatedOp {
                    norm: self.norm(norm),
                    gate: self.linear(gate),
                    up: self.linear(up),
                    activation: *activation,
                };
                let hidden = act.hidden.as_mut().expect("a model with a gated layer has a buffer for it");
                self.backend.gated(&op, &act.x, hidden);
                self.look.at(self.backend, "hidden", Some(layer), self.resident.model.ffn_dim, hidden)?;
                self.backend.linear_residual(self.linear(down), hidden, &mut act.x);
            }
            spec::Ffn::Moe { norm, router, gate, up, down, n_experts, n_used, weighting, activation } => {
                let op = MoeOp {
                    norm: self.norm(norm),
                    router: self.linear(router),
                    gate: self.linear(gate),
                    up: self.linear(up),
                    down: self.linear(down),
                    n_experts: *n_experts,
                    n_used: *n_used,
                    weighting: *weighting,
                    activation: *activation,
                };
                self.backend.moe(&op, &mut act.x);
            }
        }
        self.look.at(self.backend, "ffn_residual", Some(layer), self.resident.model.hidden_dim, &act.x)
    }

    fn norm(&self, norm: &spec::Norm<WeightId>) -> Norm<'a, B> {
        Norm { weight: self.resident.weight(norm.weight), eps: norm.eps }
    }

    fn linear(&self, linear: &spec::Linear<WeightId>) -> Linear<'a, B> {
        Linear { weight: self.resident.weight(linear.weight), bias: linear.bias.map(|id| self.resident.weight(id)) }
    }
}

/// The probe with its buffer; does nothing without a probe.
struct Look<'a> {
    probe: Option<Probe<'a>>,
    n_tokens: usize,
    values: Vec<f32>,
}

impl Look<'_> {
    fn at<B: Backend>(
        &mut self,
        backend: &mut B,
        name: &'static str,
        layer: Option<usize>,
        n_cols: usize,
        tensor: &B::Tensor,
    ) -> Result<(), BackendError> {
        let Some(probe) = &mut self.probe else { return Ok(()) };
        self.values.resize(self.n_tokens * n_cols, 0.0);
        backend.read(tensor, &mut self.values)?;
        probe(Intermediate { name, layer, n_cols, values: &self.values });
        Ok(())
    }
}
