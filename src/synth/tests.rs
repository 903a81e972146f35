//! Sizes, mixes and reproducibility of synthetic files.

use super::*;
use crate::gguf::GgufFile;

fn plan(shape: &str, file_type: FileType) -> Plan {
    Plan::new(Shape::named(shape).unwrap(), file_type, 1, None).unwrap()
}

fn written(plan: Plan) -> Vec<u8> {
    plan.write(Vec::new(), &mut |_| ()).unwrap()
}

#[test]
fn tiny_shapes_of_every_type_are_files() {
    let tiny: Vec<_> = SHAPES.iter().filter(|s| s.name.starts_with("tiny")).collect();
    let every_type = FileType::all().map(|t| (tiny[0], t));
    for (shape, file_type) in every_type.chain(tiny.iter().map(|s| (*s, FileType::Q8_0))) {
        let plan = plan(shape.name, file_type);
        let (data_bytes, mut told) = (plan.data_bytes(), 0);
        let bytes = plan.write(Vec::new(), &mut |n| told = n).unwrap();
        assert_eq!(told, data_bytes, "{} {}", shape.name, file_type.name());
        let file = GgufFile::from_vec(shape.name, bytes).unwrap();
        let n_tokens = file.metadata().strs("tokenizer.ggml.tokens").unwrap().len();
        assert_eq!(n_tokens as u64, shape.n_vocab);
    }
}

/// Sizes that the model pages of published files state, in 10^9 bytes.
#[test]
fn sizes_are_those_of_published_files() {
    let sizes = [
        ("qwen2.5-0.5b", FileType::Q8_0, 0.531),
        ("qwen2.5-0.5b", FileType::Q4_K_M, 0.398),
        ("qwen2.5-0.5b", FileType::F16, 0.994),
        ("phi-3-mini", FileType::Q4_K_M, 2.393),
        ("gpt-oss-20b", FileType::MXFP4, 12.11),
        ("llama-3-8b", FileType::Q4_K_M, 4.92),
        ("llama-2-7b", FileType::Q4_K_M, 4.08),
        ("llama-3-8b", FileType::Q2_K, 3.18),
        ("llama-3-8b", FileType::Q3_K_S, 3.66),
        ("llama-3-8b", FileType::Q3_K_M, 4.02),
        ("llama-3-8b", FileType::Q3_K_L, 4.32),
        ("llama-3-8b", FileType::Q4_K_S, 4.69),
        ("llama-3-8b", FileType::Q5_K_S, 5.60),
        ("llama-3-8b", FileType::Q5_K_M, 5.73),
        ("llama-3-8b", FileType::Q6_K, 6.60),
        ("llama-3-8b", FileType::Q8_0, 8.54),
        ("llama-3-8b", FileType::IQ4_XS, 4.45),
    ];
    for (shape, file_type, gigabytes) in sizes {
        let found = plan(shape, file_type).data_bytes() as f64 / 1e9;
        let error = (found / gigabytes - 1.0).abs();
        assert!(error < 0.02, "{shape} {}: {found:.3} GB, published {gigabytes}", file_type.name());
    }
}

#[test]
fn the_mix_is_that_of_real_files() {
    let dtype = |shape, file_type, name: &str| {
        let plan = plan(shape, file_type);
        let found = plan.tensors().find(|t| t.0 == name).map(|t| t.2);
        found.unwrap_or_else(|| panic!("{shape} has no {name}"))
    };
    let llama = |name| dtype("llama-3-8b", FileType::Q4_K_M, name);
    assert_eq!(llama("token_embd.weight"), DType::Q4_K);
    assert_eq!(llama("output.weight"), DType::Q6_K);
    assert_eq!(llama("blk.0.attn_v.weight"), DType::Q6_K);
    assert_eq!(llama("blk.4.attn_v.weight"), DType::Q4_K);
    assert_eq!(llama("blk.6.ffn_down.weight"), DType::Q6_K);
    assert_eq!(llama("blk.31.ffn_down.weight"), DType::Q6_K);
    assert_eq!(llama("blk.0.attn_norm.weight"), DType::F32);
    // 896 is no multiple of 256, 4864 is.
    let qwen = |name| dtype("qwen2.5-0.5b", FileType::Q4_K_M, name);
    assert_eq!(qwen("token_embd.weight"), DType::Q8_0);
    assert_eq!(qwen("blk.4.attn_q.weight"), DType::Q5_0);
    assert_eq!(qwen("blk.0.attn_v.weight"), DType::Q8_0);
    assert_eq!(qwen("blk.3.ffn_down.weight"), DType::Q4_K);
    assert_eq!(dtype("phi-3-mini", FileType::Q4_K_M, "blk.4.attn_qkv.weight"), DType::Q5_K);
    let gpt_oss = |name| dtype("gpt-oss-20b", FileType::MXFP4, name);
    assert_eq!(gpt_oss("blk.0.ffn_up_exps.weight"), DType::MXFP4);
    assert_eq!(gpt_oss("blk.0.attn_q.weight"), DType::Q8_0);
    assert_eq!(gpt_oss("blk.0.ffn_gate_inp.weight"), DType::F32);
    assert_eq!(dtype("gpt-oss-20b", FileType::Q4_K_M, "blk.0.ffn_up_exps.weight"), DType::MXFP4);
}

#[test]
fn half_of_the_layers_get_more_bits() {
    let more = plan("llama-3-8b", FileType::Q4_K_M);
    let n = more.tensors().filter(|t| t.0.ends_with("ffn_down.weight") && t.2 == DType::Q6_K).count();
    assert_eq!(n, 16);
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let make = |seed| written(Plan::new(Shape::named("tiny-llama-3").unwrap(), FileType::Q8_0, seed, None).unwrap());
    let once = make(7);
    assert!(once == make(7));
    assert!(once != make(8));
}

#[test]
fn weights_have_the_planned_deviation() {
    let plan = plan("tiny-qwen2", FileType::Q8_0);
    let file = GgufFile::from_vec("tiny", written(plan)).unwrap();
    let std = |name: &str| {
        let t = file.require(name).unwrap();
        let mut x = vec![0.0; t.n_elems() as usize];
        t.dtype.decode(&file.bytes(t).unwrap(), &mut x).unwrap();
        (x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
    };
    for (name, expected) in [
        ("blk.1.ffn_up.weight", 1.0 / 16.0),
        ("blk.1.ffn_down.weight", 1.0 / 512f64.sqrt()),
        ("token_embd.weight", 0.02),
    ] {
        let found = std(name);
        assert!((found / expected - 1.0).abs() < 0.03, "{name}: {found}, planned {expected}");
    }
}

#[test]
fn a_vocabulary_can_be_copied() {
    let mut source = Metadata::new("vocab.gguf");
    source.set("tokenizer.ggml.tokens", vec!["a", "b", "c"]);
    source.set("tokenizer.ggml.model", "gpt2");
    source.set("general.name", "not copied");
    let shape = Shape::named("tiny-llama-3").unwrap();
    let plan = Plan::new(shape, FileType::F16, 1, Some(&source)).unwrap();
    let file = GgufFile::from_vec("copied", written(plan)).unwrap();
    assert_eq!(file.metadata().strs("tokenizer.ggml.tokens").unwrap().len(), 3);
    assert_eq!(file.metadata().u32("llama.vocab_size").unwrap(), 3);
    assert_eq!(file.metadata().str("general.name").unwrap(), shape.title);
    assert_eq!(file.require("output.weight").unwrap().dims, [256, 3]);
}
