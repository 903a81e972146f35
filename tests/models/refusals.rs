//! Broken files: each gets an error that names the file and the key or tensor.

use super::edit::Parts;
use super::golden::{self, checkpoint};
use playhouse::gguf::{Array, GgufErrorKind, Value};
use playhouse::models::{ModelError, describe};

const FILE: &str = "broken.gguf";

fn parts(name: &str) -> Parts {
    Parts::of(&checkpoint(name))
}

fn architecture(parts: &Parts) -> String {
    match &parts.keys.iter().find(|(key, _)| key == "general.architecture").unwrap().1 {
        Value::Str(s) => s.clone(),
        other => panic!("{other:?}"),
    }
}

/// The error of a file, which names the file and `what`.
fn refused(parts: &Parts, what: &str) -> ModelError {
    let error = match describe(&parts.file(FILE)) {
        Err(error) => error,
        Ok(_) => panic!("accepted in spite of `{what}`"),
    };
    let message = error.to_string();
    assert!(message.contains(FILE), "does not name the file: {message}");
    assert!(message.contains(&format!("`{what}`")), "does not name `{what}`: {message}");
    error
}

/// Keys of a checkpoint under its architecture's name.
fn arch_keys(parts: &Parts) -> Vec<(String, Value)> {
    let prefix = format!("{}.", architecture(parts));
    parts.keys.iter().filter(|(key, _)| key.starts_with(&prefix)).cloned().collect()
}

/// Keys that a checkpoint may leave out and still mean the same, or a model of the same shapes.
fn may_be_absent(name: &str, key: &str) -> bool {
    let key = key.split_once('.').unwrap().1;
    let optional: &[&str] = match name {
        "qwen2" => &[],
        // As many key/value heads as query heads, all of each head rotated: what GGUF says of absent keys.
        "llama2" => &["vocab_size", "rope.dimension_count", "attention.head_count_kv"],
        "llama31" => &["vocab_size", "rope.dimension_count", "attention.value_length"],
        "phi3" => &[
            "rope.dimension_count",
            "rope.scaling.original_context_length",
            "attention.sliding_window",
            "attention.head_count_kv",
        ],
        "phi3-longrope" => &["attention.sliding_window"],
        _ => &["feed_forward_length", "attention.value_length"],
    };
    optional.contains(&key)
}

#[test]
fn every_other_key_is_missed_by_name() {
    for name in golden::ALL {
        let whole = parts(name);
        for (key, _) in arch_keys(&whole) {
            let cut = whole.clone().without(&key);
            let result = describe(&cut.file(FILE));
            assert_eq!(result.is_ok(), may_be_absent(name, &key), "{name} without {key}");
            let Err(error) = result else { continue };
            let message = error.to_string();
            assert!(message.contains(FILE), "{message}");
            // Head counts and sizes have defaults, with which the tensors have other shapes.
            let by_shape = ["head_count_kv", "key_length", "dimension_count"].iter().any(|k| key.ends_with(k));
            match error {
                ModelError::File(_) => assert!(message.contains("key `"), "{name} without {key}: {message}"),
                ModelError::WrongShape { .. } => assert!(by_shape, "{name} without {key}: {message}"),
                other => panic!("{name} without {key}: {other}"),
            }
        }
    }
}

#[test]
fn keys_without_which_nothing_can_be_computed_are_required() {
    let required = [
        "block_count",
        "context_length",
        "embedding_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ];
    let own: [(&str, &[&str]); 4] = [
        ("qwen2", &["feed_forward_length", "rope.freq_base"]),
        ("llama31", &["feed_forward_length", "rope.freq_base"]),
        (
            "phi3-longrope",
            &[
                "feed_forward_length",
                "rope.freq_base",
                "rope.scaling.attn_factor",
                "rope.scaling.original_context_length",
            ],
        ),
        (
            "gpt-oss",
            &[
                "expert_feed_forward_length",
                "expert_count",
                "expert_used_count",
                "rope.freq_base",
                "attention.sliding_window",
                "rope.scaling.factor",
                "rope.scaling.original_context_length",
            ],
        ),
    ];
    for (name, own) in own {
        let whole = parts(name);
        for key in required.iter().chain(own) {
            let key = format!("{}.{key}", architecture(&whole));
            match refused(&whole.clone().without(&key), &key) {
                ModelError::File(e) => assert_eq!(e.kind(), GgufErrorKind::MissingKey, "{name} without {key}"),
                other => panic!("{name} without {key}: {other}"),
            }
        }
    }
}

#[test]
fn keys_of_the_wrong_type_are_refused_by_name() {
    for name in golden::ALL {
        let whole = parts(name);
        for (key, value) in arch_keys(&whole) {
            let wrong = match value {
                Value::Str(_) => Value::U32(1),
                _ => Value::Str("many".into()),
            };
            match refused(&whole.clone().with(&key, wrong), &key) {
                ModelError::File(e) => assert!(
                    matches!(e.kind(), GgufErrorKind::WrongType | GgufErrorKind::BadValue),
                    "{name}, {key}: {e}"
                ),
                other => panic!("{name}, {key}: {other}"),
            }
        }
    }
}

#[test]
fn absurd_values_are_refused_by_name() {
    let cases: [(&str, &str, Value); 22] = [
        ("qwen2", "qwen2.block_count", Value::U32(0)),
        ("qwen2", "qwen2.block_count", Value::U32(u32::MAX)),
        ("qwen2", "qwen2.block_count", Value::U32(10_000)),
        ("qwen2", "qwen2.embedding_length", Value::U32(u32::MAX)),
        ("qwen2", "qwen2.attention.head_count", Value::U32(0)),
        ("qwen2", "qwen2.attention.head_count", Value::U32(7)),
        ("qwen2", "qwen2.attention.head_count_kv", Value::U32(3)),
        ("qwen2", "qwen2.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN)),
        ("qwen2", "qwen2.rope.freq_base", Value::F32(-1.0)),
        ("qwen2", "qwen2.rope.freq_base", Value::F32(f32::INFINITY)),
        ("qwen2", "qwen2.context_length", Value::U32(0)),
        ("qwen2", "qwen2.expert_count", Value::U32(8)),
        ("qwen2", "qwen2.attention.causal", Value::Bool(false)),
        ("qwen2", "qwen2.rope.scaling.type", Value::Str("dynamic".into())),
        ("llama31", "llama.rope.scaling.type", Value::Str("yarn".into())),
        ("llama31", "llama.vocab_size", Value::U32(17)),
        ("llama31", "llama.rope.dimension_count", Value::U32(15)),
        ("llama31", "llama.rope.dimension_count", Value::U32(18)),
        ("gpt-oss", "gpt-oss.expert_used_count", Value::U32(7)),
        ("gpt-oss", "gpt-oss.attention.value_length", Value::U32(8)),
        ("gpt-oss", "gpt-oss.rope.scaling.factor", Value::F32(0.5)),
        ("gpt-oss", "gpt-oss.attention.sliding_window_pattern", Value::Array(Array::Bool(vec![true]))),
    ];
    for (name, key, value) in cases {
        let broken = parts(name).with(key, value.clone());
        let Err(error) = describe(&broken.file(FILE)) else { panic!("{name}: accepted {key} = {value:?}") };
        let message = error.to_string();
        // `yarn` without its other keys names the first of those.
        let named = message.contains(key) || (message.contains("rope.scaling") && key.contains("rope.scaling"));
        assert!(message.contains(FILE) && named, "{name}, {key} = {value:?}: {message}");
    }
}

#[test]
fn keys_we_do_not_honour_are_refused() {
    for name in golden::ALL {
        let whole = parts(name);
        for unknown in ["logit_scale", "attention.max_alibi_bias", "attn_logit_softcapping", "something.new"] {
            let key = format!("{}.{unknown}", architecture(&whole));
            let error = refused(&whole.clone().with(&key, 0.5f32), &key);
            assert!(matches!(error, ModelError::UnsupportedKey { .. }), "{error}");
        }
    }
}

#[test]
fn every_missing_tensor_is_missed_by_name() {
    for name in golden::ALL {
        let whole = parts(name);
        for tensor in &whole.tensors {
            let cut = whole.clone().without_tensor(&tensor.name);
            let may_be_absent = match tensor.name.as_str() {
                "output.weight" => !name.starts_with("gpt-oss"),
                "rope_freqs.weight" => true,
                _ => false,
            };
            if may_be_absent {
                describe(&cut.file(FILE)).unwrap_or_else(|e| panic!("{name} without {}: {e}", tensor.name));
                continue;
            }
            let error = refused(&cut, &tensor.name);
            assert!(matches!(error, ModelError::MissingTensor { .. }), "{error}");
        }
    }
}

#[test]
fn every_tensor_of_another_shape_is_refused_by_name() {
    for name in golden::ALL {
        let whole = parts(name);
        for tensor in &whole.tensors {
            for i in 0..tensor.dims.len() {
                if tensor.name == "token_embd.weight" && i == 1 {
                    continue; // Its rows are the vocabulary: see below.
                }
                let mut dims = tensor.dims.clone();
                dims[i] += 32;
                let error = refused(&whole.clone().reshaped(&tensor.name, &dims), &tensor.name);
                let ModelError::WrongShape { expected, found, .. } = error else { panic!("{name}: {error}") };
                assert_eq!((expected, found), (tensor.dims.clone(), dims));
            }
        }
    }
}

#[test]
fn a_vocabulary_of_another_size_is_noticed() {
    let dims = |name: &str| parts(name).tensors.iter().find(|t| t.name == "token_embd.weight").unwrap().dims.clone();
    let [c, v] = dims("gpt-oss")[..] else { panic!() };
    refused(&parts("gpt-oss").reshaped("token_embd.weight", &[c, v + 1]), "output.weight");
    let [c, v] = dims("llama31")[..] else { panic!() };
    refused(&parts("llama31").reshaped("token_embd.weight", &[c, v + 1]), "llama.vocab_size");
    let huge = parts("qwen2").with("qwen2.embedding_length", 32u32).reshaped("token_embd.weight", &[32, (1 << 20) + 1]);
    refused(&huge, "token_embd.weight");
}

#[test]
fn surplus_tensors_are_refused_by_name() {
    for name in golden::ALL {
        for surplus in ["blk.0.attn_gate.weight", "blk.9.attn_q.weight", "v.patch_embd.weight"] {
            let error = refused(&parts(name).with_tensor(surplus, &[32, 2]), surplus);
            assert!(matches!(error, ModelError::SurplusTensor { .. }), "{error}");
        }
    }
    let error = refused(&parts("gpt-oss").with_tensor("rope_freqs.weight", &[8]), "rope_freqs.weight");
    assert!(matches!(error, ModelError::SurplusTensor { .. }), "{error}");
}

#[test]
fn other_architectures_and_other_kinds_of_file_are_refused() {
    let error = refused(&parts("qwen2").with("general.architecture", "mamba"), "general.architecture");
    let message = error.to_string();
    assert!(message.contains("qwen2, llama, phi3, gpt-oss") && message.contains("mamba"), "{message}");
    refused(&parts("qwen2").with("general.type", "adapter"), "general.type");
    refused(&parts("qwen2").without("general.architecture"), "general.architecture");
    let vocabulary_only = Parts { tensors: Vec::new(), ..parts("qwen2") };
    refused(&vocabulary_only, "token_embd.weight");
}

/// Llama 2 files may leave out the base of the rotation, later ones may not: a default would compute nonsense.
#[test]
fn a_llama_3_file_without_a_rope_base_is_refused() {
    describe(&checkpoint("llama2")).unwrap();
    refused(&parts("llama31").without("llama.rope.freq_base"), "llama.rope.freq_base");
}
