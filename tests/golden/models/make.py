#!/usr/bin/env python3
"""Makes the tiny checkpoints and their goldens for tests/parity.rs.

For each architecture a model of Hugging Face `transformers` with random weights, written as GGUF under the names,
layouts and keys that llama.cpp's converter gives (llama: permuted q and k; phi3: fused tensors; gpt-oss: gate and up
de-interleaved, experts optionally MXFP4), and what `transformers` computes with it in float32 on the CPU: logits at a
few places, arg max and log-sum-exp at every position, and 64 greedy tokens per prompt.

Usage: make.py OUT_DIR [NAME...]     needs torch, transformers, gguf, numpy
"""
import json
import math
import sys

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q

torch.set_grad_enabled(False)
torch.set_num_threads(4)
N_GREEDY = 64
# A prompt is used only if the best logit leads by this much everywhere, so that rounding cannot change an arg max.
MIN_GAP = 4e-3
# Gains that give logits a spread of about 2.5. With a tied output the layers must outweigh the embedding, or the model
# would say its last token for ever.
UNTIED = {"embed": 8.0, "lm_head": 2.5}
TIED = {"embed": 2.5, "o_proj": 6.0, "down_proj": 6.0}


def randomise(model, gains, seed):
    """Fills every parameter: matrices N(0, gain^2 / fan_in), vectors by kind. `gains` maps a name's part to a gain."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        gain = next((v for k, v in gains.items() if k in name), 1.0)
        if "norm" in name:
            p.copy_(1.0 + 0.15 * noise)
        elif "sinks" in name:
            p.copy_(1.0 + noise)
        elif name.endswith("bias"):
            p.copy_(0.2 * gain * noise)
        elif "experts" in name:  # [E, in, out]
            p.copy_(gain * noise / math.sqrt(p.shape[1]))
        else:
            p.copy_(gain * noise / math.sqrt(p.shape[-1]))


def permute(w, n_head):
    """Rows of q and k as GGUF's `llama` stores them: pairs side by side instead of half a head apart."""
    return w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


class Writer:
    """A GGUF file under `arch`, F32 unless `types` (name part -> type) says otherwise. Remembers what was written."""

    def __init__(self, path, arch, types=None):
        self.w = gguf.GGUFWriter(path, arch)
        self.arch, self.types = arch, types or {}
        self.w.add_type("model")
        self.w.add_name(f"tiny {arch} with random weights")
        self.w.add_file_type(0)
        self.w.add_quantization_version(2)

    def u32(self, key, v):
        self.w.add_uint32(f"{self.arch}.{key}", v)

    def f32(self, key, v):
        self.w.add_float32(f"{self.arch}.{key}", v)

    def string(self, key, v):
        self.w.add_string(f"{self.arch}.{key}", v)

    def tensor(self, name, t):
        a = np.ascontiguousarray(t.detach().numpy().astype(np.float32))
        qtype = next((q for k, q in self.types.items() if k in name), Q.F32)
        if a.ndim < 2 or name.endswith("bias") or qtype == Q.F32:
            self.w.add_tensor(name, a)
        else:
            self.w.add_tensor(name, gguf.quants.quantize(a, qtype), raw_dtype=qtype)

    def byte_vocab(self, n_vocab, spm, pre=None):
        """One token per byte, then specials, so that the commands can use the file too."""
        w = self.w
        if spm:
            tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
            types = [2, 3, 3] + [6] * 256
        else:
            keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
            rest = [b for b in range(256) if b not in keep]
            chars = {**{b: chr(b) for b in keep}, **{b: chr(256 + i) for i, b in enumerate(rest)}}
            tokens = [chars[b] for b in range(256)] + ["<|bos|>", "<|eos|>"]
            types = [1] * 256 + [3, 3]
        while len(tokens) < n_vocab:
            tokens.append(f"<|unused_{len(tokens)}|>")
            types.append(5)
        bos = tokens.index("<s>" if spm else "<|bos|>")
        w.add_tokenizer_model("llama" if spm else "gpt2")
        w.add_tokenizer_pre("default" if spm else pre)
        w.add_token_list(tokens)
        if spm:
            w.add_token_scores([0.0] * len(tokens))
        else:
            w.add_token_merges([])
        w.add_token_types(types)
        w.add_bos_token_id(bos)
        w.add_eos_token_id(bos + 1)

    def close(self):
        self.w.write_header_to_file()
        self.w.write_kv_data_to_file()
        self.w.write_tensors_to_file()
        self.w.close()


def common_keys(w, c, theta=True):
    w.u32("block_count", c.num_hidden_layers)
    w.u32("context_length", c.max_position_embeddings)
    w.u32("embedding_length", c.hidden_size)
    w.u32("feed_forward_length", c.intermediate_size)
    w.u32("attention.head_count", c.num_attention_heads)
    w.u32("attention.head_count_kv", c.num_key_value_heads)
    w.f32("attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    if theta:
        w.f32("rope.freq_base", c.rope_parameters["rope_theta"])


def common_tensors(w, m, tied):
    w.tensor("token_embd.weight", m.model.embed_tokens.weight)
    w.tensor("output_norm.weight", m.model.norm.weight)
    if not tied:
        w.tensor("output.weight", m.lm_head.weight)


def gated(w, i, mlp):
    w.tensor(f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight)
    w.tensor(f"blk.{i}.ffn_up.weight", mlp.up_proj.weight)
    w.tensor(f"blk.{i}.ffn_down.weight", mlp.down_proj.weight)


def qwen2(out):
    c = transformers.Qwen2Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    m = build(transformers.Qwen2ForCausalLM, c, {**TIED, "q_proj": 1.6, "k_proj": 1.6}, 1)
    w = Writer(f"{out}/qwen2.gguf", "qwen2")
    common_keys(w, c)
    w.byte_vocab(c.vocab_size, spm=False, pre="qwen2")
    common_tensors(w, m, tied=True)
    for i, l in enumerate(m.model.layers):
        a = l.self_attn
        w.tensor(f"blk.{i}.attn_norm.weight", l.input_layernorm.weight)
        for n, p in (("q", a.q_proj), ("k", a.k_proj), ("v", a.v_proj)):
            w.tensor(f"blk.{i}.attn_{n}.weight", p.weight)
            w.tensor(f"blk.{i}.attn_{n}.bias", p.bias)
        w.tensor(f"blk.{i}.attn_output.weight", a.o_proj.weight)
        w.tensor(f"blk.{i}.ffn_norm.weight", l.post_attention_layernorm.weight)
        gated(w, i, l.mlp)
    w.close()
    goldens(out, "qwen2", m, [(1, 512), (31, 512), (33, 512), (70, 512), (200, 512)])


def llama(out, name, c, seed, tied, theta, spm, lengths, factors=None):
    m = build(transformers.LlamaForCausalLM, c, {**(TIED if tied else UNTIED), "q_proj": 1.6, "k_proj": 1.6}, seed)
    w = Writer(f"{out}/{name}.gguf", "llama")
    common_keys(w, c, theta)
    w.u32("vocab_size", c.vocab_size)
    w.u32("rope.dimension_count", c.head_dim)
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        w.u32("attention.key_length", c.head_dim)
        w.u32("attention.value_length", c.head_dim)
    w.byte_vocab(c.vocab_size, spm, pre=None if spm else "llama-bpe")
    if factors is not None:
        w.tensor("rope_freqs.weight", torch.tensor(factors, dtype=torch.float32))
    common_tensors(w, m, tied)
    for i, l in enumerate(m.model.layers):
        a = l.self_attn
        w.tensor(f"blk.{i}.attn_norm.weight", l.input_layernorm.weight)
        w.tensor(f"blk.{i}.attn_q.weight", permute(a.q_proj.weight, c.num_attention_heads))
        w.tensor(f"blk.{i}.attn_k.weight", permute(a.k_proj.weight, c.num_key_value_heads))
        w.tensor(f"blk.{i}.attn_v.weight", a.v_proj.weight)
        w.tensor(f"blk.{i}.attn_output.weight", a.o_proj.weight)
        w.tensor(f"blk.{i}.ffn_norm.weight", l.post_attention_layernorm.weight)
        gated(w, i, l.mlp)
    w.close()
    goldens(out, name, m, [(n, c.max_position_embeddings) for n in lengths])


def llama2(out):
    # Like files of Llama 2: MHA, untied, SPM, and no rope.freq_base key (its code fixes 10,000).
    c = transformers.LlamaConfig(
        vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    llama(out, "llama2", c, 2, tied=False, theta=False, spm=True, lengths=[1, 32, 64, 65, 180])


def llama31(out):
    # Like files of Llama 3.1 and 3.2: GQA, tied, BPE, rope factors. 256 wide, so that K-quants can encode its rows.
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    c = transformers.LlamaConfig(
        vocab_size=260, hidden_size=256, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=rope)
    factors = []
    for i in range(0, c.head_dim, 2):
        wavelen = 2 * math.pi * rope["rope_theta"] ** (i / c.head_dim)
        old = rope["original_max_position_embeddings"]
        smooth = (old / wavelen - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        if wavelen < old / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wavelen > old / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            factors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    llama(out, "llama31", c, 3, tied=True, theta=True, spm=False, lengths=[2, 40, 100, 230], factors=factors)


def phi3(out, name, c, seed, lengths):
    m = build(transformers.Phi3ForCausalLM, c, {**UNTIED, "qkv_proj": 1.5}, seed)
    w = Writer(f"{out}/{name}.gguf", "phi3")
    common_keys(w, c)
    rope = c.rope_parameters
    head_dim = c.hidden_size // c.num_attention_heads
    orig = c.original_max_position_embeddings
    w.u32("rope.scaling.original_context_length", orig)
    w.u32("rope.dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    w.u32("attention.sliding_window", c.sliding_window or 0)
    w.byte_vocab(c.vocab_size, spm=True)
    if rope["rope_type"] == "longrope":
        scale = c.max_position_embeddings / orig
        w.f32("rope.scaling.attn_factor", math.sqrt(1 + math.log(scale) / math.log(orig)))
        w.tensor("rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32))
        w.tensor("rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32))
    common_tensors(w, m, tied=False)
    for i, l in enumerate(m.model.layers):
        w.tensor(f"blk.{i}.attn_norm.weight", l.input_layernorm.weight)
        w.tensor(f"blk.{i}.attn_qkv.weight", l.self_attn.qkv_proj.weight)
        w.tensor(f"blk.{i}.attn_output.weight", l.self_attn.o_proj.weight)
        w.tensor(f"blk.{i}.ffn_norm.weight", l.post_attention_layernorm.weight)
        w.tensor(f"blk.{i}.ffn_up.weight", l.mlp.gate_up_proj.weight)
        w.tensor(f"blk.{i}.ffn_down.weight", l.mlp.down_proj.weight)
    w.close()
    goldens(out, name, m, lengths)


def phi3_window(out):
    # Like Phi-3-mini-4k: MHA, fused tensors, a sliding window on every layer.
    c = transformers.Phi3Config(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, original_max_position_embeddings=512, sliding_window=47,
        rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0})
    phi3(out, "phi3", c, 4, [(1, 512), (46, 512), (48, 512), (96, 512), (200, 512)])


def phi3_longrope(out):
    # Like Phi-3.5 and Phi-4-mini: GQA, LongRoPE with two sets of factors, three quarters of each head rotated.
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5], "long_factor": [1.1, 1.6, 2.3, 3.1, 3.7, 4.2]}
    c = transformers.Phi3Config(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=128, sliding_window=None,
        rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2, rope_parameters=rope)
    # The short factors serve contexts of up to 128 tokens, the long ones longer contexts; never both in one sequence.
    phi3(out, "phi3-longrope", c, 5, [(3, 128), (60, 128), (140, 512), (210, 512)])


def gpt_oss(out, name, seed, types=None):
    c = transformers.GptOssConfig(
        vocab_size=272, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=4, sliding_window=24,
        max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
                         "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 32})
    gains = {"embed": 6.0, "lm_head": 2.5, "q_proj": 1.4, "k_proj": 1.4, "router": 2.0, "gate_up": 3.0, "experts.down": 0.5}
    m = build(transformers.GptOssForCausalLM, c, gains, seed)
    if types:  # run transformers on exactly the values that the file holds
        for pname, p in m.named_parameters():
            round_trip(pname, p)
    w = Writer(f"{out}/{name}.gguf", "gpt-oss", types)
    common_keys(w, c)
    w.u32("attention.key_length", c.head_dim)
    w.u32("attention.value_length", c.head_dim)
    w.u32("attention.sliding_window", c.sliding_window)
    w.u32("expert_count", c.num_local_experts)
    w.u32("expert_used_count", c.num_experts_per_tok)
    w.u32("expert_feed_forward_length", c.intermediate_size)
    w.string("rope.scaling.type", "yarn")
    w.f32("rope.scaling.factor", c.rope_parameters["factor"])
    w.u32("rope.scaling.original_context_length", c.rope_parameters["original_max_position_embeddings"])
    w.byte_vocab(c.vocab_size, spm=False, pre="gpt-4o")
    common_tensors(w, m, tied=False)
    for i, l in enumerate(m.model.layers):
        a, r, e = l.self_attn, l.mlp.router, l.mlp.experts
        w.tensor(f"blk.{i}.attn_norm.weight", l.input_layernorm.weight)
        w.tensor(f"blk.{i}.post_attention_norm.weight", l.post_attention_layernorm.weight)
        for n, p in (("q", a.q_proj), ("k", a.k_proj), ("v", a.v_proj), ("output", a.o_proj)):
            w.tensor(f"blk.{i}.attn_{n}.weight", p.weight)
            w.tensor(f"blk.{i}.attn_{n}.bias", p.bias)
        w.tensor(f"blk.{i}.attn_sinks.weight", a.sinks)
        w.tensor(f"blk.{i}.ffn_gate_inp.weight", r.weight)
        w.tensor(f"blk.{i}.ffn_gate_inp.bias", r.bias)
        gate_up = e.gate_up_proj.transpose(-1, -2)  # [E, 2F, C], gate and up rows in turn
        w.tensor(f"blk.{i}.ffn_gate_exps.weight", gate_up[:, ::2])
        w.tensor(f"blk.{i}.ffn_up_exps.weight", gate_up[:, 1::2])
        w.tensor(f"blk.{i}.ffn_down_exps.weight", e.down_proj.transpose(-1, -2))
        w.tensor(f"blk.{i}.ffn_gate_exps.bias", e.gate_up_proj_bias[:, ::2])
        w.tensor(f"blk.{i}.ffn_up_exps.bias", e.gate_up_proj_bias[:, 1::2])
        w.tensor(f"blk.{i}.ffn_down_exps.bias", e.down_proj_bias)
    w.close()
    goldens(out, name, m, [(1, 1024), (24, 1024), (33, 1024), (90, 1024), (220, 1024)])


def round_trip(pname, p):
    """Rounds a parameter to the values its type can hold, along the axis that is a row in the file."""
    experts = "experts" in pname and not pname.endswith("bias")
    matrix = p.dim() == 2 and not pname.endswith("bias") and "router" not in pname
    if not experts and not matrix:
        return
    rows = p.transpose(-1, -2) if experts else p
    q = Q.MXFP4 if experts else Q.Q8_0
    a = np.ascontiguousarray(rows.numpy())
    back = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(a, q), q).reshape(a.shape).copy())
    p.copy_(back.transpose(-1, -2) if experts else back)


def gpt_oss_f32(out):
    gpt_oss(out, "gpt-oss", 6)


def gpt_oss_mxfp4(out):
    # The mix of the common file: MXFP4 experts, F32 router, Q8_0 for the rest.
    types = {"exps": Q.MXFP4, "ffn_gate_inp": Q.F32, "attn_": Q.Q8_0, "token_embd": Q.Q8_0, "output.weight": Q.Q8_0}
    gpt_oss(out, "gpt-oss-mxfp4", 7, types)


def build(cls, config, gains, seed):
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    m = cls(config).eval().float()
    randomise(m, gains, seed)
    m.tie_weights()
    return m


def logits_of(m, tokens):
    return m(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def lead(row):
    top = torch.topk(row, 2).values
    return (top[0] - top[1]).item()


def golden(m, n, n_ctx, seed):
    """What transformers says of one random prompt, or None if it is no good: two logits too close for
    rounding to tell apart, or an answer that only repeats itself."""
    g = torch.Generator().manual_seed(seed)
    vocab = m.config.vocab_size
    prompt = torch.randint(3, 256, (n,), generator=g).tolist()
    logits = logits_of(m, prompt)
    gaps = [lead(row) for row in logits]
    tokens, greedy = list(prompt), []
    for _ in range(N_GREEDY):
        row = logits_of(m, tokens)[-1]
        gaps.append(lead(row))
        if min(gaps) < MIN_GAP:
            return None
        greedy.append(int(row.argmax()))
        tokens.append(greedy[-1])
    if len(set(greedy)) < 16:
        return None
    columns = sorted({0, 1, 2, vocab // 3, vocab // 2, vocab - 2, vocab - 1})
    rows = []
    for pos in sorted({0, n // 2, n - 1}):
        rows.append({"pos": pos, "columns": columns, "logits": [float(logits[pos][c]) for c in columns]})
    return {
        "n_ctx": n_ctx, "tokens": prompt, "argmax": logits.argmax(-1).tolist(),
        "logsumexp": [float(x) for x in torch.logsumexp(logits, -1)], "rows": rows, "greedy": greedy,
        "scale": float(logits.abs().max()), "min_gap": min(gaps),
    }


def goldens(out, name, m, lengths):
    prompts = []
    for i, (n, n_ctx) in enumerate(lengths):
        tries = (golden(m, n, n_ctx, 1000 * i + t) for t in range(200))
        found = next((x for x in tries if x), None)
        assert found, f"{name}: no prompt of {n} tokens has clear arg maxes"
        prompts.append(found)
        print(name, n, "scale", round(found["scale"], 2), "gap", found["min_gap"], "distinct", len(set(found["greedy"])))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    doc = {"file": f"{name}.gguf", "made_with": versions, "prompts": prompts}
    with open(f"{out}/{name}.json", "w") as f:
        json.dump(doc, f, separators=(",", ":"))
        f.write("\n")


def ropes(out):
    """Rotations at the sizes of real models: frequencies, attention factor, cosines and sines at a few positions."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    def llama(theta, dim, n_ctx, **rope):
        rope = {"rope_type": "default", "rope_theta": theta, **rope}
        return LlamaRotaryEmbedding(transformers.LlamaConfig(
            hidden_size=8 * dim, num_attention_heads=8, max_position_embeddings=n_ctx, rope_parameters=rope))

    yarn = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}
    short = [1.0 + 0.01 * i for i in range(48)]
    long = [1.0 + 0.02 * i * i for i in range(48)]
    phi = Phi3RotaryEmbedding(transformers.Phi3Config(
        hidden_size=3072, num_attention_heads=32, max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
                         "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}))
    gpt = GptOssRotaryEmbedding(transformers.GptOssConfig(rope_parameters={
        **yarn, "rope_theta": 150000.0, "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}))
    cases = {
        "llama-2": (llama(1e4, 128, 4096), [1, 100, 4095]),
        "qwen2.5": (llama(1e6, 64, 32768), [1, 100, 32767]),
        "linear": (llama(1e4, 128, 16384, rope_type="linear", factor=4.0), [1, 100, 16383]),
        "qwen2.5-yarn": (llama(1e6, 128, 131072, **yarn, factor=4.0, original_max_position_embeddings=32768),
                         [1, 100, 131071]),
        "gpt-oss": (gpt, [1, 100, 131071]),
        "phi-3-short": (phi, [1, 100, 4095]),
        "phi-3-long": (phi, [1, 100, 131071]),
    }
    doc = {}
    for name, (rope, positions) in cases.items():
        cos, sin = rope(torch.zeros(1), torch.tensor([positions]))
        n = rope.inv_freq.shape[0]
        rows = [cos[0, i, :n].tolist() + sin[0, i, :n].tolist() for i in range(len(positions))]
        doc[name] = {"frequencies": rope.inv_freq.tolist(), "scale": float(rope.attention_scaling),
                     "positions": positions, "rows": rows}
    doc["factors"] = {"short": short, "long": long}
    with open(f"{out}/rope.json", "w") as f:
        json.dump(doc, f, separators=(",", ":"))
        f.write("\n")


MODELS = {"rope": ropes, "qwen2": qwen2, "llama2": llama2, "llama31": llama31, "phi3": phi3_window, "phi3-longrope": phi3_longrope,
          "gpt-oss": gpt_oss_f32, "gpt-oss-mxfp4": gpt_oss_mxfp4}

if __name__ == "__main__":
    for key in sys.argv[2:] or MODELS:
        MODELS[key](sys.argv[1])
