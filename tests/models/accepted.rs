//! What real files carry besides, and what descriptions say of them.

use super::edit::Parts;
use super::golden::checkpoint;
use playhouse::backend::{Activation, Pairing};
use playhouse::gguf::{Array, Value};
use playhouse::models::spec::{Ffn, ModelSpec, RopeScaling, TensorRule};
use playhouse::models::{ARCHITECTURES, describe};

fn spec(parts: &Parts) -> ModelSpec {
    describe(&parts.file("changed.gguf")).unwrap()
}

fn parts(name: &str) -> Parts {
    Parts::of(&checkpoint(name))
}

#[test]
fn harmless_keys_of_real_files_change_nothing() {
    let plain = parts("llama31");
    let decorated = plain
        .clone()
        .with("general.quantized_by", "somebody")
        .with("general.license", "apache-2.0")
        .with("quantize.imatrix.file", "imatrix.dat")
        .with("quantize.imatrix.entries_count", 224u32)
        .with("tokenizer.ggml.padding_token_id", 0u32)
        .with("tokenizer.chat_template", "{{ messages }}")
        .with("llama.rope.scaling.finetuned", true)
        .with("llama.attention.causal", true)
        .with("llama.expert_count", 0u32)
        .with("llama.use_parallel_residual", false)
        .with("llama.tensor_data_layout", "Meta AI original pth");
    assert_eq!(spec(&decorated), spec(&plain));
}

#[test]
fn the_table_names_each_architecture_once() {
    let names: Vec<&str> = ARCHITECTURES.iter().map(|a| a.name).collect();
    assert_eq!(names, ["qwen2", "llama", "phi3", "gpt-oss"]);
}

#[test]
fn an_absent_output_is_tied_to_the_embedding() {
    let tied = describe(&checkpoint("qwen2")).unwrap();
    assert!(matches!(&tied.output.weight, TensorRule::TiedTo { name, .. } if name == "token_embd.weight"));
    let own = describe(&checkpoint("llama2")).unwrap();
    assert!(matches!(&own.output.weight, TensorRule::One { name, .. } if name == "output.weight"));
}

#[test]
fn constants_come_from_the_file() {
    let qwen2 = describe(&checkpoint("qwen2")).unwrap();
    assert_eq!((qwen2.ropes[0].base, qwen2.ropes[0].pairing), (1e6, Pairing::Halves));
    assert_eq!(qwen2.output_norm.eps, 1e-6);
    let other = spec(&parts("qwen2").with("qwen2.rope.freq_base", 12_345.0f32));
    assert_eq!(other.ropes[0].base, 12_345.0);
    let llama2 = describe(&checkpoint("llama2")).unwrap();
    assert_eq!((llama2.ropes[0].base, llama2.ropes[0].pairing), (1e4, Pairing::Interleaved));
}

#[test]
fn phi3_slices_its_fused_tensors_and_honours_its_window() {
    let spec = describe(&checkpoint("phi3")).unwrap();
    let attention = &spec.layers[2].attention;
    let TensorRule::FusedSlice { name, rows, n_rows, .. } = &attention.k.weight else { panic!("{attention:?}") };
    assert_eq!((name.as_str(), rows.clone(), *n_rows), ("blk.2.attn_qkv.weight", 64..128, 192));
    assert!(spec.layers.iter().all(|l| l.attention.window == Some(47)));
    let long = describe(&checkpoint("phi3-longrope")).unwrap();
    assert!(long.layers.iter().all(|l| l.attention.window.is_none()));
    assert_eq!(long.ropes[0].n_rot, 12);
    assert!(matches!(long.ropes[0].scaling, RopeScaling::LongRope { n_ctx_original: 128, .. }));
}

#[test]
fn gpt_oss_alternates_its_window() {
    let windows = |spec: &ModelSpec| spec.layers.iter().map(|l| l.attention.window.is_some()).collect::<Vec<_>>();
    let plain = describe(&checkpoint("gpt-oss")).unwrap();
    assert_eq!(windows(&plain), [true, false, true, false]);
    let key = "gpt-oss.attention.sliding_window_pattern";
    assert_eq!(windows(&spec(&parts("gpt-oss").with(key, 4u32))), [true, true, true, false]);
    let listed = Value::Array(Array::Bool(vec![false, true, true, false]));
    assert_eq!(windows(&spec(&parts("gpt-oss").with(key, listed))), [false, true, true, false]);
}

#[test]
fn gpt_oss_has_sinks_clamped_experts_and_one_rotation_unless_the_file_has_two() {
    let plain = describe(&checkpoint("gpt-oss")).unwrap();
    assert!(plain.layers.iter().all(|l| l.attention.sinks.is_some() && l.attention.output.bias.is_some()));
    let Ffn::Moe { n_experts: 6, n_used: 4, activation, .. } = &plain.layers[0].ffn else { panic!() };
    assert_eq!(*activation, Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 });
    assert_eq!(plain.ropes.len(), 1);
    assert!(matches!(plain.ropes[0].scaling, RopeScaling::Yarn { truncate: false, n_ctx_original: 32, .. }));
    let two = spec(&parts("gpt-oss").with("gpt-oss.rope.freq_base_swa", 10_000.0f32));
    let bases: Vec<f32> = two.layers.iter().map(|l| two.ropes[l.attention.rope].base).collect();
    assert_eq!(bases, [1e4, 1.5e5, 1e4, 1.5e5]);
}

#[test]
fn llama_and_qwen2_may_be_stretched() {
    let yarn = parts("qwen2")
        .with("qwen2.rope.scaling.type", "yarn")
        .with("qwen2.rope.scaling.factor", 4.0f32)
        .with("qwen2.rope.scaling.original_context_length", 128u32);
    assert!(matches!(spec(&yarn).ropes[0].scaling, RopeScaling::Yarn { truncate: true, beta_fast: 32.0, .. }));
    let linear = parts("llama2").with("llama.rope.scale_linear", 2.0f32);
    assert_eq!(spec(&linear).ropes[0].scaling, RopeScaling::Linear { factor: 2.0 });
    let linear = parts("llama2").with("llama.rope.scaling.type", "linear").with("llama.rope.scaling.factor", 2.0f32);
    assert_eq!(spec(&linear).ropes[0].scaling, RopeScaling::Linear { factor: 2.0 });
    assert!(matches!(describe(&checkpoint("llama31")).unwrap().ropes[0].scaling, RopeScaling::Factors(_)));
}
