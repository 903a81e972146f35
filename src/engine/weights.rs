//! From a description and a file to resident weights: one upload per tensor or slice, in the order of the file.

use super::vram::kv_layout;
use super::{LoadError, RunnerLimits};
use crate::backend::{Backend, Join, ModelShape, WeightGroup, WeightShape, WeightSource, WeightUse};
use crate::dtype::DType;
use crate::gguf::{GgufFile, TensorBytes, TensorInfo};
use crate::models::spec::{Ffn, Model, ModelSpec, RopeSpec, TensorRule};
use crate::models::{ModelError, rope};
use indexmap::IndexMap;
use std::collections::{HashMap, HashSet};

/// Index of a resident weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightId(usize);

/// A model whose weights are on a device.
pub struct Resident<B: Backend> {
    /// The model, its tensors replaced by resident weights.
    pub model: Model<WeightId>,
    /// The table of each of [`Model::ropes`] for the positions there are, `[n_ctx, n_rot]`.
    pub rope_tables: Vec<WeightId>,
    /// The output norm's weight, on the host, `[C]`: hidden states that are asked for are normalised there.
    pub output_norm: Vec<f32>,
    weights: Vec<B::Weight>,
}

impl<B: Backend> Resident<B> {
    /// A resident weight.
    pub fn weight(&self, id: WeightId) -> &B::Weight {
        &self.weights[id.0]
    }

    /// Makes the weights of `spec` and rotation tables for `n_ctx` positions resident. `progress` gets the bytes made
    /// resident so far, after each weight; they end at [`resident_bytes`].
    ///
    /// # Errors
    /// Bytes that cannot be read, or what the backend refuses.
    pub fn load(
        file: &GgufFile,
        spec: &ModelSpec,
        n_ctx: usize,
        backend: &mut B,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, LoadError> {
        let mut loader = Loader { file, backend, progress, n_bytes: 0, weights: Vec::new() };
        let ids = loader.tensors(spec)?;
        let model = spec.map(&mut |rule| Ok::<_, LoadError>(ids[&rule.owner()]))?;
        let rope_tables =
            spec.ropes.iter().map(|rope| loader.rope_table(rope, n_ctx)).collect::<Result<_, LoadError>>()?;
        let output_norm = f32s(file, &spec.output_norm.weight)?;
        Ok(Self { model, rope_tables, output_norm, weights: loader.weights })
    }
}

/// Bytes of all resident weights of a model: its tensors as encoded in the file, and its rotation tables.
pub fn resident_bytes(spec: &ModelSpec, n_ctx: usize) -> u64 {
    let table_bytes = |rope: &RopeSpec| 4 * (n_ctx as u64).saturating_mul(rope.n_rot as u64);
    spec.ropes.iter().map(table_bytes).fold(spec.weight_bytes, u64::saturating_add)
}

/// Weights that become resident by one call.
struct Group {
    rules: Vec<TensorRule>,
    uses: WeightUse,
    join: Join,
}

/// Every weight of a model once, those that one op uses together in one group, in the order of the file.
fn groups(file: &GgufFile, spec: &ModelSpec) -> Vec<Group> {
    let mut uses: IndexMap<TensorRule, WeightUse> = IndexMap::new();
    uses.extend(spec.tensors().iter().map(|rule| (rule.owner(), WeightUse::default())));
    let mut want = |rule: &TensorRule, what: WeightUse| {
        let known = uses.get_mut(&rule.owner()).expect("the rule is one of the model's");
        *known = known.and(what);
    };
    want(&spec.embedding, WeightUse::ROWS);
    products(spec).into_iter().for_each(|rule| want(rule, WeightUse::PRODUCT));
    // All others are read element by element.
    uses.values_mut().filter(|u| **u == WeightUse::default()).for_each(|u| *u = WeightUse::VALUES);

    let mut groups = Vec::new();
    for (rules, join) in joins(spec) {
        let rules: Vec<TensorRule> = rules.into_iter().map(TensorRule::owner).collect();
        let Some(first) = uses.get(&rules[0]).copied() else { continue };
        let distinct = rules.iter().collect::<HashSet<_>>().len() == rules.len();
        if distinct && rules.iter().all(|rule| uses.get(rule) == Some(&first)) {
            uses.retain(|rule, _| !rules.contains(rule));
            groups.push(Group { rules, uses: first, join });
        }
    }
    groups.extend(uses.into_iter().map(|(rule, uses)| Group { rules: vec![rule], uses, join: Join::Stacked }));
    // A disk likes to be read in order.
    groups.sort_by_cached_key(|group| place(file, &group.rules[0]));
    groups
}

/// The weights that are multiplied by activations.
fn products(spec: &ModelSpec) -> Vec<&TensorRule> {
    let mut all = vec![&spec.output.weight];
    for layer in &spec.layers {
        let a = &layer.attention;
        all.extend([&a.q, &a.k, &a.v, &a.output].map(|linear| &linear.weight));
        match &layer.ffn {
            Ffn::Gated { gate, up, down, .. } => all.extend([gate, up, down].map(|linear| &linear.weight)),
            Ffn::Moe { router, gate, up, down, .. } => {
                all.extend([router, gate, up, down].map(|linear| &linear.weight));
            }
        }
    }
    all
}

/// The weights that one op uses together.
fn joins(spec: &ModelSpec) -> Vec<(Vec<&TensorRule>, Join)> {
    let mut all = Vec::new();
    for layer in &spec.layers {
        let a = &layer.attention;
        all.push((vec![&a.q.weight, &a.k.weight, &a.v.weight], Join::Stacked));
        let biases: Option<Vec<&TensorRule>> = [&a.q, &a.k, &a.v].into_iter().map(|l| l.bias.as_ref()).collect();
        all.extend(biases.map(|biases| (biases, Join::Stacked)));
        let (Ffn::Gated { gate, up, .. } | Ffn::Moe { gate, up, .. }) = &layer.ffn;
        all.push((vec![&gate.weight, &up.weight], Join::Gated));
    }
    all
}

fn place(file: &GgufFile, rule: &TensorRule) -> (usize, u64, usize) {
    let (shard, offset) = file.tensor(rule.name()).map_or((0, 0), |info| (info.shard_idx(), info.offset()));
    (shard, offset, first_row(rule))
}

/// What a backend is told before the weights of a model come.
///
/// # Errors
/// A tensor is not in the file.
pub fn model_shape(file: &GgufFile, spec: &ModelSpec, limits: &RunnerLimits) -> Result<ModelShape, LoadError> {
    let shape_of = |rule: &TensorRule, uses| -> Result<WeightShape, LoadError> {
        let (n_mats, n_rows, n_cols) = rule.shape().mats_rows_cols();
        let dtype = file.require(rule.name()).map_err(ModelError::from)?.dtype;
        Ok(WeightShape { dtype, n_mats, n_rows, n_cols, uses })
    };
    let mut shapes = Vec::new();
    for Group { rules, uses, join } in groups(file, spec) {
        let weights = rules.iter().map(|rule| shape_of(rule, uses)).collect::<Result<_, _>>()?;
        shapes.push(WeightGroup { weights, join });
    }
    for rope in &spec.ropes {
        let uses = WeightUse::VALUES;
        let table = WeightShape { dtype: DType::F32, n_mats: 1, n_rows: limits.n_ctx, n_cols: rope.n_rot, uses };
        shapes.push(WeightGroup { weights: vec![table], join: Join::Stacked });
    }
    Ok(ModelShape {
        groups: shapes,
        hidden_dim: spec.hidden_dim,
        ffn_dim: spec.ffn_dim,
        has_gated: spec.has_gated(),
        moe: spec.moe(),
        heads: spec.heads,
        n_vocab: spec.n_vocab,
        n_ctx: limits.n_ctx,
        max_tokens: limits.max_batch_tokens,
        max_logit_rows: limits.max_logit_rows,
        kv: kv_layout(spec, limits),
    })
}

struct Loader<'a, B: Backend> {
    file: &'a GgufFile,
    backend: &'a mut B,
    progress: &'a mut dyn FnMut(u64),
    n_bytes: u64,
    weights: Vec<B::Weight>,
}

impl<B: Backend> Loader<'_, B> {
    /// Uploads every tensor and slice once.
    fn tensors(&mut self, spec: &ModelSpec) -> Result<HashMap<TensorRule, WeightId>, LoadError> {
        let mut ids = HashMap::new();
        for group in groups(self.file, spec) {
            let first = self.weights.len();
            self.group(&group)?;
            ids.extend(group.rules.into_iter().zip((first..).map(WeightId)));
        }
        Ok(ids)
    }

    fn group(&mut self, group: &Group) -> Result<(), LoadError> {
        let mut sources = Vec::with_capacity(group.rules.len());
        for rule in &group.rules {
            let (info, bytes) = tensor_bytes(self.file, rule)?;
            let (n_mats, n_rows, n_cols) = rule.shape().mats_rows_cols();
            let (name, dtype, uses) = (info.name.as_str(), info.dtype, group.uses);
            sources.push(WeightSource { name, dtype, n_mats, n_rows, n_cols, bytes, uses });
        }
        self.upload(sources, group.join)
    }

    fn rope_table(&mut self, rope: &RopeSpec, n_ctx: usize) -> Result<WeightId, LoadError> {
        let table = rope::table(rope, n_ctx, |rule| f32s(self.file, rule))?;
        let bytes = TensorBytes::from_vec(bytemuck::cast_slice(&table).to_vec());
        let (name, uses) = ("rope table", WeightUse::VALUES);
        let n_cols = rope.n_rot;
        let source = WeightSource { name, dtype: DType::F32, n_mats: 1, n_rows: n_ctx, n_cols, bytes, uses };
        self.upload(vec![source], Join::Stacked)?;
        Ok(WeightId(self.weights.len() - 1))
    }

    fn upload(&mut self, mut sources: Vec<WeightSource<'_>>, join: Join) -> Result<(), LoadError> {
        let n_bytes: u64 = sources.iter().map(|source| source.bytes.len() as u64).sum();
        match sources.pop() {
            Some(only) if sources.is_empty() => self.weights.push(self.backend.weight(only)?),
            Some(last) => {
                sources.push(last);
                self.weights.extend(self.backend.joined(sources, join)?);
            }
            None => {}
        }
        self.n_bytes += n_bytes;
        (self.progress)(self.n_bytes);
        Ok(())
    }
}

fn first_row(rule: &TensorRule) -> usize {
    match rule {
        TensorRule::FusedSlice { rows, .. } => rows.start,
        TensorRule::One { .. } | TensorRule::TiedTo { .. } => 0,
    }
}

/// The bytes of a rule: the tensor's, or those of its rows.
fn tensor_bytes<'a>(file: &'a GgufFile, rule: &TensorRule) -> Result<(&'a TensorInfo, TensorBytes), LoadError> {
    let info = file.require(rule.name()).map_err(ModelError::from)?;
    let bytes = file.bytes(info).map_err(ModelError::from)?;
    let row_bytes = bytes.len() / (info.n_rows() as usize).max(1);
    let (n_mats, n_rows, _) = rule.shape().mats_rows_cols();
    let start = first_row(rule) * row_bytes;
    Ok((info, bytes.slice(start..start + n_mats * n_rows * row_bytes)))
}

/// A small tensor's values on the host.
fn f32s(file: &GgufFile, rule: &TensorRule) -> Result<Vec<f32>, LoadError> {
    let (info, bytes) = tensor_bytes(file, rule)?;
    let mut values = vec![0.0; info.n_elems() as usize];
    let refuse = |e| ModelError::File(file.invalid_tensor(info, "decodable bytes", e));
    info.dtype.decode(&bytes, &mut values).map_err(refuse)?;
    Ok(values)
}
