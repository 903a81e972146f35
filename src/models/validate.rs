//! Holds a description against the file: every tensor there, of the right shape, used exactly once, and none left over.

use super::ModelError;
use super::spec::{ModelSpec, TensorRule};
use crate::gguf::{GgufFile, TensorInfo};
use std::collections::HashMap;
use std::ops::Range;

/// Checks all tensors and fills in [`ModelSpec::weight_bytes`].
///
/// # Errors
/// [`ModelError::MissingTensor`], [`ModelError::WrongShape`] in the order of the layers, then
/// [`ModelError::SurplusTensor`] in the order of the file.
///
/// # Panics
/// Where the description itself is wrong: it uses rows of a tensor twice or not at all. That is a mistake of the
/// architecture's file in `models/`, whatever the model file says.
pub(super) fn tensors(file: &GgufFile, mut model: ModelSpec) -> Result<ModelSpec, ModelError> {
    let resident = model.tensors();
    let host: Vec<&TensorRule> = model.ropes.iter().flat_map(|rope| rope.tensors()).collect();
    let mut used: HashMap<&str, Vec<Range<usize>>> = HashMap::new();
    let mut weight_bytes = 0;
    for rule in &resident {
        let info = check(file, rule)?;
        let Some(rows) = owned_rows(rule) else { continue };
        let parts = used.entry(&info.name).or_default();
        if parts.is_empty() {
            weight_bytes += info.n_bytes();
        }
        parts.push(rows);
    }
    for rule in unique(&host) {
        used.entry(&check(file, rule)?.name).or_default().extend(owned_rows(rule));
    }
    for (name, parts) in &mut used {
        let n_rows = file.tensor(name).map_or(0, |info| info.n_rows() as usize);
        assert!(
            cover_once(parts, n_rows),
            "the description of {} uses `{name}` wrongly: {parts:?}",
            model.architecture
        );
    }
    if let Some(info) = file.tensors().find(|info| !used.contains_key(info.name.as_str())) {
        return Err(ModelError::SurplusTensor {
            file: file.label().to_owned(),
            architecture: model.architecture,
            tensor: info.name.clone(),
            found: info.dims.clone(),
        });
    }
    model.weight_bytes = weight_bytes;
    Ok(model)
}

/// The rows of its tensor that a rule owns; none if tied.
fn owned_rows(rule: &TensorRule) -> Option<Range<usize>> {
    let (mats, n_rows, _) = rule.file_shape().mats_rows_cols();
    match rule {
        TensorRule::One { .. } => Some(0..mats * n_rows),
        TensorRule::FusedSlice { rows, .. } => Some(rows.clone()),
        TensorRule::TiedTo { .. } => None,
    }
}

/// The tensor of a rule, of the right shape.
fn check<'a>(file: &'a GgufFile, rule: &TensorRule) -> Result<&'a TensorInfo, ModelError> {
    let expected = rule.file_shape().file_dims();
    let label = || file.label().to_owned();
    let Some(info) = file.tensor(rule.name()) else {
        return Err(ModelError::MissingTensor { file: label(), tensor: rule.name().to_owned(), expected });
    };
    if !same_dims(&info.dims, &expected) {
        let (tensor, found) = (info.name.clone(), info.dims.clone());
        return Err(ModelError::WrongShape { file: label(), tensor, expected, found });
    }
    Ok(info)
}

/// Equal up to trailing ones, which some writers add.
fn same_dims(found: &[u64], expected: &[u64]) -> bool {
    let n = found.len().max(expected.len());
    let at = |dims: &[u64], i: usize| dims.get(i).copied().unwrap_or(1);
    (0..n).all(|i| at(found, i) == at(expected, i))
}

/// Rotations of different layers may share factors; each tensor once.
fn unique<'a>(rules: &[&'a TensorRule]) -> Vec<&'a TensorRule> {
    let mut once: Vec<&TensorRule> = Vec::new();
    for rule in rules {
        if !once.contains(rule) {
            once.push(rule);
        }
    }
    once
}

/// Whether the parts, put in order, cover `0..n_rows` without gap or overlap.
fn cover_once(parts: &mut [Range<usize>], n_rows: usize) -> bool {
    parts.sort_by_key(|part| part.start);
    let end = parts.iter().try_fold(0, |end, part| (part.start == end).then_some(part.end));
    end == Some(n_rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_must_cover_every_row_once() {
        let check = |parts: &[Range<usize>], n| cover_once(&mut parts.to_vec(), n);
        let short = 0..4;
        assert!(check(&[4..6, 0..4, 6..8], 8));
        assert!(!check(&[0..4, 5..8], 8), "a gap");
        assert!(!check(&[0..5, 4..8], 8), "an overlap");
        assert!(!check(std::slice::from_ref(&short), 8), "an end left over");
        assert!(!check(&[0..8, 0..8], 8), "twice");
    }

    #[test]
    fn trailing_ones_are_no_difference() {
        assert!(same_dims(&[4, 1, 1], &[4]));
        assert!(same_dims(&[4], &[4, 1]));
        assert!(!same_dims(&[4, 2], &[4]));
        assert!(!same_dims(&[1, 4], &[4, 1]));
    }
}
