//! The shapes: one row per model, with the metadata keys its real files have.
//!
//! Sources: the models' `config.json` on Hugging Face, and the keys that llama.cpp's `convert_hf_to_gguf.py` writes.

use super::mix::FileType;
use crate::gguf::writer::GgufWriter;

/// Which tensors and keys a shape has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arch {
    Llama,
    Qwen2,
    Phi3,
    GptOss,
}

/// Which tokenizer a shape's files have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VocabKind {
    Llama2,
    Llama3,
    Qwen2,
    Phi3,
    Harmony,
}

/// A model's sizes and constants.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The name on the command line.
    pub name: &'static str,
    /// `general.name` of the file.
    pub title: &'static str,
    pub(super) arch: Arch,
    pub(super) vocab: VocabKind,
    /// Layers.
    pub n_layers: u32,
    /// Elements of the residual stream.
    pub hidden: u32,
    /// Elements inside a feed-forward network or an expert.
    pub ffn: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads.
    pub n_kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Tokens.
    pub n_vocab: u64,
    /// Context the model was trained for.
    pub n_ctx: u32,
    pub(super) rope_base: f32,
    pub(super) eps: f32,
    /// Whether the embedding is the output matrix too.
    pub(super) tied: bool,
    pub(super) window: Option<u32>,
    /// Experts and how many of them a token uses.
    pub(super) experts: Option<(u32, u32)>,
}

const QWEN2: Shape = Shape {
    name: "qwen2.5-0.5b",
    title: "Qwen2.5 0.5B Instruct (random weights)",
    arch: Arch::Qwen2,
    vocab: VocabKind::Qwen2,
    n_layers: 24,
    hidden: 896,
    ffn: 4864,
    n_heads: 14,
    n_kv_heads: 2,
    head_dim: 64,
    n_vocab: 151_936,
    n_ctx: 32_768,
    rope_base: 1e6,
    eps: 1e-6,
    tied: true,
    window: None,
    experts: None,
};

const PHI3: Shape = Shape {
    name: "phi-3-mini",
    title: "Phi 3 Mini 4k Instruct (random weights)",
    arch: Arch::Phi3,
    vocab: VocabKind::Phi3,
    n_layers: 32,
    hidden: 3072,
    ffn: 8192,
    n_heads: 32,
    n_kv_heads: 32,
    head_dim: 96,
    n_vocab: 32_064,
    n_ctx: 4096,
    rope_base: 1e4,
    eps: 1e-5,
    tied: false,
    window: Some(2047),
    experts: None,
};

const GPT_OSS: Shape = Shape {
    name: "gpt-oss-20b",
    title: "GPT OSS 20B (random weights)",
    arch: Arch::GptOss,
    vocab: VocabKind::Harmony,
    n_layers: 24,
    hidden: 2880,
    ffn: 2880,
    n_heads: 64,
    n_kv_heads: 8,
    head_dim: 64,
    n_vocab: 201_088,
    n_ctx: 131_072,
    rope_base: 150_000.0,
    eps: 1e-5,
    tied: false,
    window: Some(128),
    experts: Some((32, 4)),
};

const LLAMA_3: Shape = Shape {
    name: "llama-3-8b",
    title: "Meta Llama 3 8B Instruct (random weights)",
    arch: Arch::Llama,
    vocab: VocabKind::Llama3,
    n_layers: 32,
    hidden: 4096,
    ffn: 14_336,
    n_heads: 32,
    n_kv_heads: 8,
    head_dim: 128,
    n_vocab: 128_256,
    n_ctx: 8192,
    rope_base: 500_000.0,
    eps: 1e-5,
    tied: false,
    window: None,
    experts: None,
};

const LLAMA_2: Shape = Shape {
    name: "llama-2-7b",
    title: "LLaMA v2 7B Chat (random weights)",
    vocab: VocabKind::Llama2,
    ffn: 11_008,
    n_kv_heads: 32,
    n_vocab: 32_000,
    n_ctx: 4096,
    rope_base: 1e4,
    ..LLAMA_3
};

/// A small relative of a shape: a few MB, every tensor and key of the big one, rows of whole K-quant blocks.
const fn tiny(name: &'static str, of: Shape) -> Shape {
    Shape { name, n_layers: 4, hidden: 256, ffn: 512, n_heads: 4, n_kv_heads: 2, head_dim: 64, n_vocab: 2048, ..of }
}

/// Every shape: the models that the README speaks of, and a small one of each architecture for tests.
pub const SHAPES: &[Shape] = &[
    QWEN2,
    PHI3,
    GPT_OSS,
    LLAMA_3,
    LLAMA_2,
    tiny("tiny-qwen2", QWEN2),
    tiny("tiny-phi3", Shape { window: Some(31), ..PHI3 }),
    tiny("tiny-gpt-oss", Shape { window: Some(32), experts: Some((8, 2)), ..GPT_OSS }),
    tiny("tiny-llama-3", LLAMA_3),
    tiny("tiny-llama-2", LLAMA_2),
];

impl Arch {
    /// The value of `general.architecture`.
    fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Phi3 => "phi3",
            Self::GptOss => "gpt-oss",
        }
    }
}

impl Shape {
    /// The shape with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SHAPES.iter().find(|s| s.name == name)
    }

    /// The keys before the tokenizer's.
    pub(super) fn metadata(&self, file_type: FileType) -> GgufWriter {
        let mut w = GgufWriter::new();
        let arch = self.arch.name();
        let key = |name: &str| format!("{arch}.{name}");
        w.set("general.architecture", arch)
            .set("general.type", "model")
            .set("general.name", self.title)
            .set(key("block_count"), self.n_layers)
            .set(key("context_length"), self.n_ctx)
            .set(key("embedding_length"), self.hidden)
            .set(key("feed_forward_length"), self.ffn)
            .set(key("attention.head_count"), self.n_heads)
            .set(key("attention.head_count_kv"), self.n_kv_heads)
            .set(key("rope.freq_base"), self.rope_base)
            .set(key("attention.layer_norm_rms_epsilon"), self.eps);
        match self.arch {
            Arch::Qwen2 => {}
            Arch::Llama => {
                w.set(key("rope.dimension_count"), self.head_dim);
            }
            Arch::Phi3 => {
                w.set(key("rope.dimension_count"), self.head_dim)
                    .set(key("rope.scaling.original_context_length"), self.n_ctx);
            }
            Arch::GptOss => {
                w.set(key("attention.key_length"), self.head_dim)
                    .set(key("attention.value_length"), self.head_dim)
                    .set(key("expert_feed_forward_length"), self.ffn)
                    .set(key("rope.scaling.type"), "yarn")
                    .set(key("rope.scaling.factor"), 32.0f32)
                    .set(key("rope.scaling.original_context_length"), self.n_ctx / 32);
            }
        }
        // Models whose heads do not fill the hidden size must say how wide they are.
        if self.arch != Arch::GptOss && self.n_heads * self.head_dim != self.hidden {
            w.set(key("attention.key_length"), self.head_dim).set(key("attention.value_length"), self.head_dim);
        }
        if let Some(window) = self.window {
            w.set(key("attention.sliding_window"), window);
        }
        if let Some((n_experts, n_used)) = self.experts {
            w.set(key("expert_count"), n_experts).set(key("expert_used_count"), n_used);
        }
        w.set("general.file_type", file_type.id());
        w
    }

    /// States the size of the vocabulary where real files do.
    pub(super) fn set_n_vocab(&self, header: &mut GgufWriter, n_vocab: u64) {
        if self.arch == Arch::Llama {
            header.set("llama.vocab_size", n_vocab as u32);
        }
    }
}
