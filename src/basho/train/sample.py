#!/usr/bin/env python3
"""Reads a basho GGUF with numpy alone and writes poems: a second implementation, to hold the engine's text against.

    python3 src/basho/train/sample.py FILE.gguf SEEDS TEMPERATURE PROMPT...

Prints one poem a line: the prompt, a tab, the lines with `|` between them. Needs numpy, gguf and tokenizers.
"""

import sys

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def load(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return fields, tensors, tokenizer


class Llama:
    """One sequence with its keys and values."""

    def __init__(self, fields, tensors):
        self.get = lambda key: fields[f"llama.{key}"]
        self.tensors = tensors
        self.heads, self.kv_heads = self.get("attention.head_count"), self.get("attention.head_count_kv")
        self.head_dim = self.get("embedding_length") // self.heads
        self.cache = [([], []) for _ in range(self.get("block_count"))]

    def norm(self, x, name):
        scale = 1 / np.sqrt(np.mean(x * x) + self.get("attention.layer_norm_rms_epsilon"))
        return x * scale * self.tensors[name]

    def rope(self, x, position):
        half = np.arange(self.head_dim // 2)
        angle = position * self.get("rope.freq_base") ** (-2 * half / self.head_dim)
        even, odd = x[:, 0::2], x[:, 1::2]
        return np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)], -1).reshape(x.shape)

    def step(self, token):
        """Logits after one more token."""
        w = self.tensors
        x = w["token_embd.weight"][token]
        for i, (keys, values) in enumerate(self.cache):
            h = self.norm(x, f"blk.{i}.attn_norm.weight")
            project = lambda name, n: (w[f"blk.{i}.{name}.weight"] @ h).reshape(n, self.head_dim)
            q = self.rope(project("attn_q", self.heads), len(keys))
            keys.append(self.rope(project("attn_k", self.kv_heads), len(keys)))
            values.append(project("attn_v", self.kv_heads))
            k, v = np.repeat(keys, self.heads // self.kv_heads, 1), np.repeat(values, self.heads // self.kv_heads, 1)
            score = np.einsum("hd,thd->ht", q, k) / np.sqrt(self.head_dim)
            weight = np.exp(score - score.max(1, keepdims=True))
            mixed = np.einsum("ht,thd->hd", weight / weight.sum(1, keepdims=True), v)
            x = x + w[f"blk.{i}.attn_output.weight"] @ mixed.reshape(-1)
            h = self.norm(x, f"blk.{i}.ffn_norm.weight")
            gate = w[f"blk.{i}.ffn_gate.weight"] @ h
            x = x + w[f"blk.{i}.ffn_down.weight"] @ (gate / (1 + np.exp(-gate)) * (w[f"blk.{i}.ffn_up.weight"] @ h))
        return w["token_embd.weight"] @ self.norm(x, "output_norm.weight")


def poem(model, tokenizer, prompt, temperature, rng, limit=64):
    ids = tokenizer.encode(f"<|user|>{prompt.strip()}<|end|><|assistant|>").ids
    end = tokenizer.token_to_id("<|end|>")
    for token in ids:
        logits = model.step(token)
    out = []
    while len(out) < limit:
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / temperature)
            token = int(rng.choice(len(p), p=p / p.sum()))
        if token == end:
            break
        out.append(token)
        logits = model.step(token)
    return tokenizer.decode(out)


def main(path, seeds, temperature, prompts):
    fields, tensors, tokenizer = load(path)
    for prompt in prompts:
        for seed in range(int(seeds)):
            text = poem(Llama(fields, tensors), tokenizer, prompt, float(temperature), np.random.default_rng(seed))
            print(prompt, text.replace("\n", "|"), sep="\t", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
