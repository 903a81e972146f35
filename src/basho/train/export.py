#!/usr/bin/env python3
"""Writes what train.py made as a GGUF file: Q8_0 matrices, F32 norms, the tokenizer and the chat template.

    python3 src/basho/train/export.py RUN_FOLDER OUT.gguf

Needs numpy and gguf (both on PyPI).
"""

import json
import os
import sys

import gguf
import numpy as np

from train import CONTEXT, DIM, END, FFN, HEAD_DIM, HEADS, KV_HEADS, LAYERS, NORM_EPS, PAD, ROPE_BASE, SPECIAL

TEMPLATE = """{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('basho knows the roles system, user and assistant, not ' ~ message.role) -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>' ~ (message.content | trim) ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def vocabulary(writer, path):
    with open(path) as file:
        model = json.load(file)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    assert [model["vocab"][token] for token in tokens] == list(range(len(tokens)))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    control = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(control)
    writer.add_token_merges(merges)
    # As with other chat models, a text begins with nothing and ends with the end of the turn.
    writer.add_bos_token_id(END)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def main(run, out):
    weights = np.load(os.path.join(run, "basho.npz"))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("basho")
    writer.add_description("A small model that writes haiku, trained from scratch on poems made by a grammar")
    writer.add_license("apache-2.0")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    n_vocab = vocabulary(writer, os.path.join(run, "tokenizer.json"))
    writer.add_vocab_size(n_vocab)
    for name in weights.files:
        value = weights[name].astype(np.float32)
        # `blk.0.attn_norm` is a bare parameter there and `blk.0.attn_norm.weight` in GGUF.
        name = name if name.endswith(".weight") else f"{name}.weight"
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {os.path.getsize(out)} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
