//! Quantised variants of the checkpoints against F32 runs over their decoded weights.

use super::driver::{Sequence, all_logits, runner};
use super::edit::{Parts, Tensor};
use super::golden::{checkpoint, golden};
use playhouse::dtype::DType;

/// Encodes every matrix whose rows allow it; returns the file and its decoded F32 twin.
pub(crate) fn twins(name: &str, dtype: DType) -> (Parts, Parts) {
    let mut quantised = Parts::of(&checkpoint(name));
    let mut n_encoded = 0;
    for tensor in &mut quantised.tensors {
        if is_matrix(tensor) && dtype.row_bytes(tensor.dims[0] as usize).is_some() {
            *tensor = tensor.encoded(dtype);
            n_encoded += 1;
        }
    }
    assert!(n_encoded >= 8, "{name}: only {n_encoded} matrices can be {}", dtype.name());
    let mut decoded = quantised.clone();
    for tensor in &mut decoded.tensors {
        *tensor = tensor.encoded(DType::F32);
    }
    (quantised, decoded)
}

fn is_matrix(tensor: &Tensor) -> bool {
    tensor.dims.len() >= 2 && tensor.name.ends_with(".weight")
}

fn check(name: &str, dtypes: &[DType]) {
    let golden = golden(name);
    let prompt = golden.prompts.iter().find(|p| p.tokens.len() >= 40).unwrap();
    for &dtype in dtypes {
        let (quantised, decoded) = twins(name, dtype);
        let logits = |parts: &Parts| {
            let mut runner = runner(&parts.file(dtype.name()), prompt.n_ctx);
            let mut sequence = Sequence::new(&runner, 0);
            all_logits(&mut runner, &mut sequence, &prompt.tokens, 512)
        };
        // The CPU multiplies f32 activations with decoded weights in one order: equal to the bit.
        assert!(logits(&quantised) == logits(&decoded), "{name} as {} is not its decoded self", dtype.name());
    }
}

pub(crate) const BY_32: [DType; 6] = [DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q5_0, DType::MXFP4];

#[test]
fn quantised_qwen2_is_its_decoded_self() {
    check("qwen2", &BY_32);
}

#[test]
fn quantised_phi3_is_its_decoded_self() {
    check("phi3", &BY_32);
    check("phi3-longrope", &BY_32);
}

#[test]
fn quantised_gpt_oss_is_its_decoded_self() {
    check("gpt-oss", &BY_32);
}

#[test]
fn quantised_llama_is_its_decoded_self() {
    check("llama2", &BY_32);
    check("llama31", &BY_32);
    check("llama31", &[DType::Q4_K, DType::Q5_K, DType::Q6_K]);
}
