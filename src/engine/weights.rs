//! From a description and a file to resident weights: one upload per tensor or slice, in the order of the file.

use super::LoadError;
use crate::backend::{Backend, WeightSource};
use crate::dtype::DType;
use crate::gguf::{GgufFile, TensorBytes, TensorInfo};
use crate::models::spec::{Model, ModelSpec, RopeSpec, TensorRule};
use crate::models::{ModelError, rope};
use std::collections::HashMap;

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
        let mut rules: Vec<TensorRule> = spec.tensors().iter().map(TensorRule::owner).collect();
        rules.sort_by_cached_key(|rule| self.place(rule));
        rules.dedup();
        let mut ids = HashMap::with_capacity(rules.len());
        for rule in rules {
            let id = self.tensor(&rule)?;
            ids.insert(rule, id);
        }
        Ok(ids)
    }

    /// Where in the file a rule's bytes are: a disk likes to be read in order.
    fn place(&self, rule: &TensorRule) -> (usize, u64, usize) {
        let (shard, offset) = self.file.tensor(rule.name()).map_or((0, 0), |info| (info.shard_idx(), info.offset()));
        (shard, offset, first_row(rule))
    }

    fn tensor(&mut self, rule: &TensorRule) -> Result<WeightId, LoadError> {
        let (info, bytes) = tensor_bytes(self.file, rule)?;
        let (n_mats, n_rows, n_cols) = rule.shape().mats_rows_cols();
        self.upload(WeightSource { name: &info.name, dtype: info.dtype, n_mats, n_rows, n_cols, bytes })
    }

    fn rope_table(&mut self, rope: &RopeSpec, n_ctx: usize) -> Result<WeightId, LoadError> {
        let table = rope::table(rope, n_ctx, |rule| f32s(self.file, rule))?;
        let bytes = TensorBytes::from_vec(bytemuck::cast_slice(&table).to_vec());
        let name = "rope table";
        self.upload(WeightSource { name, dtype: DType::F32, n_mats: 1, n_rows: n_ctx, n_cols: rope.n_rot, bytes })
    }

    fn upload(&mut self, source: WeightSource<'_>) -> Result<WeightId, LoadError> {
        let n_bytes = source.bytes.len() as u64;
        self.weights.push(self.backend.weight(source)?);
        self.n_bytes += n_bytes;
        (self.progress)(self.n_bytes);
        Ok(WeightId(self.weights.len() - 1))
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
