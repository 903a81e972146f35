#!/usr/bin/env python3
"""Trains basho from scratch: tokenizer, then a llama of four million parameters, on text that haiku_corpus writes.

    cargo build --release --example haiku_corpus
    python3 src/basho/train/train.py --corpus target/release/examples/haiku_corpus --out basho-run
    python3 src/basho/train/export.py basho-run src/basho/basho.gguf

Needs PyTorch, numpy and tokenizers; docs/src/basho.md has the versions, the machine, the time and the loss curve of the
run whose weights are in the repository. Everything random hangs on --seed. The last bits of the weights still differ
between machines, because GPU matrix products do; what the model learns does not.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import time

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 2048
DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 5, 4, 2, 64, 640
CONTEXT = 256
ROPE_BASE, NORM_EPS = 10000.0, 1e-5
# Control tokens, in the order of their ids.
END, USER, ASSISTANT, SYSTEM, PAD = range(5)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
# Rows of one poem, and rows of whole conversations: (tokens a row, prompts a row, rows of the corpus, rows a batch).
SHAPES = [(48, 1, 1_600_000, 2560), (256, 8, 240_000, 512)]


def conversations(corpus, seed, count, turns):
    """Lists of fields, as haiku_corpus prints them: system message, then prompts and poems."""
    out = subprocess.run([corpus, str(seed), str(count), str(turns)], check=True, capture_output=True, text=True).stdout
    for line in out.splitlines():
        yield line.split("\t")


def train_tokenizer(corpus, seed):
    """Byte-level BPE in GPT-2's way, without merges that would glue words together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = (field.strip().replace("|", "\n") for fields in conversations(corpus, seed, 150_000, 1) for field in fields)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_part(task):
    """One worker's share of the corpus as rows of token ids, padded."""
    tokenizer, corpus, seed, count, turns, width = task
    tokenizer = Tokenizer.from_str(tokenizer)
    rows = np.full((count, width), PAD, dtype=np.int16)
    talks = list(conversations(corpus, seed, count, turns))
    # The chat template trims what the user writes.
    texts = [field.strip().replace("|", "\n") for fields in talks for field in fields]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    for number, (row, fields) in enumerate(zip(rows, talks)):
        ids = []
        # One row in forty is a bare poem, so that text without a chat template is continued, too.
        raw = turns == 1 and number % 40 == 0
        for index in range(len(fields)):
            field = next(encoded).ids
            if index == 0 and not field:
                continue
            if raw and index != 2:
                continue
            role = SYSTEM if index == 0 else USER if index % 2 == 1 else ASSISTANT
            ids += [*field, END] if raw else [role, *field, END]
        ids = ids[:width]
        row[: len(ids)] = ids
    return rows


def encode_corpus(tokenizer, corpus, seed, shape, scale):
    width, turns, count, _ = shape
    workers = os.cpu_count()
    share = max(1, int(count * scale) // workers)
    tasks = [(tokenizer.to_str(), corpus, seed * 1000 + turns * 100 + i, share, turns, width) for i in range(workers)]
    with multiprocessing.Pool(workers) as pool:
        return np.concatenate(pool.map(encode_part, tasks, chunksize=1))


def build_model(torch):
    """Llama as GGUF's `llama` architecture has it: RMSNorm, interleaved RoPE, GQA, SwiGLU, output tied to the embedding."""
    nn, F = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm = nn.Parameter(torch.ones(DIM))
            self.ffn_norm = nn.Parameter(torch.ones(DIM))
            self.attn_q = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
            self.attn_k = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
            self.attn_v = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
            self.attn_output = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
            self.ffn_gate = nn.Linear(DIM, FFN, bias=False)
            self.ffn_up = nn.Linear(DIM, FFN, bias=False)
            self.ffn_down = nn.Linear(FFN, DIM, bias=False)

        def forward(self, x, cos, sin):
            b, t, _ = x.shape
            h = rms_norm(x, self.attn_norm)
            q = rope(self.attn_q(h).view(b, t, HEADS, HEAD_DIM), cos, sin).transpose(1, 2)
            k = rope(self.attn_k(h).view(b, t, KV_HEADS, HEAD_DIM), cos, sin).transpose(1, 2)
            v = self.attn_v(h).view(b, t, KV_HEADS, HEAD_DIM).transpose(1, 2)
            group = HEADS // KV_HEADS
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn_output(y.transpose(1, 2).reshape(b, t, HEADS * HEAD_DIM))
            h = rms_norm(x, self.ffn_norm)
            return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embd = nn.Embedding(VOCAB, DIM)
            self.blk = nn.ModuleList(Block() for _ in range(LAYERS))
            self.output_norm = nn.Parameter(torch.ones(DIM))
            freq = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
            angle = torch.arange(CONTEXT).float()[:, None] * freq[None]
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    deep = name.endswith(("attn_output.weight", "ffn_down.weight"))
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)

        def forward(self, ids):
            t = ids.shape[1]
            x = self.token_embd(ids)
            for block in self.blk:
                x = block(x, self.cos[:t], self.sin[:t])
            return F.linear(rms_norm(x, self.output_norm), self.token_embd.weight)

    def rms_norm(x, weight):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight).to(x.dtype)

    def rope(x, cos, sin):
        # Pairs (2i, 2i + 1), as GGUF llama files have them: no permutation at export.
        even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
        cos, sin = cos[None, :, None], sin[None, :, None]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)

    return Llama()


def targets(torch, rows):
    """The next token where it is the assistant's (its end included), -100 elsewhere."""
    position = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    is_role = (rows == USER) | (rows == ASSISTANT) | (rows == SYSTEM)
    last_role = torch.cummax(torch.where(is_role, position, 0), 1).values
    speaker = torch.gather(rows, 1, last_role)
    speaks = (speaker != USER) & (speaker != SYSTEM)
    keep = speaks & ~is_role & (rows != PAD)
    return torch.where(keep, rows, -100)[:, 1:]


def sample(torch, model, tokenizer, prompts, temperature, seed):
    """Poems for prompts, each token drawn from the whole distribution."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    heads = [[USER, *tokenizer.encode(prompt, add_special_tokens=False).ids, END, ASSISTANT] for prompt in prompts]
    rows = torch.full((len(heads), 96), PAD, dtype=torch.long, device="cuda")
    for row, head in zip(rows, heads):
        row[: len(head)] = torch.tensor(head, device="cuda")
    at = torch.tensor([len(head) for head in heads], device="cuda")
    done = torch.zeros(len(heads), dtype=torch.bool, device="cuda")
    index = torch.arange(len(heads), device="cuda")
    for _ in range(48):
        with torch.no_grad():
            logits = model(rows)[index, at - 1].float()
        token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        rows[index, at] = torch.where(done, torch.full_like(token, PAD), token)
        done |= token == END
        at = torch.clamp(at + 1, max=95)
        if done.all():
            break
    poems = []
    for row, head in zip(rows.tolist(), heads):
        ids = row[len(head) :]
        ids = ids[: ids.index(END)] if END in ids else ids
        poems.append(tokenizer.decode([i for i in ids if i >= len(SPECIAL)]))
    return poems


def train(args):
    import torch

    started = time.time()
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(args.corpus, args.seed)
    tokenizer.save(os.path.join(args.out, "tokenizer.json"))
    data = [encode_corpus(tokenizer, args.corpus, args.seed, shape, args.scale) for shape in SHAPES]
    for rows in data:
        print(f"{rows.shape[0]} rows of {rows.shape[1]}, {(rows != PAD).mean():.3f} filled", flush=True)
    data = [torch.from_numpy(rows).cuda() for rows in data]
    print(f"text ready after {time.time() - started:.0f} s", flush=True)

    model = build_model(torch).cuda()
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params} parameters on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)

    def loss_of(rows):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(rows)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets(torch, rows).flatten(), ignore_index=-100)

    step_loss = torch.compile(loss_of, dynamic=False)
    generator = torch.Generator().manual_seed(args.seed)
    curve, began, seen = [], time.time(), 0
    for step in range(args.steps):
        # Two batches of single poems, then one of conversations.
        which = 1 if step % 3 == 2 else 0
        rows = data[which]
        pick = torch.randint(rows.shape[0], (SHAPES[which][3],), generator=generator).cuda()
        progress = max(step / args.steps, (time.time() - began) / args.max_seconds)
        if progress >= 1:
            break
        rate = args.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(rows[pick].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += SHAPES[which][0] * SHAPES[which][3]
        if step % max(1, args.steps // 40) in (0, 2) or step == args.steps - 1:
            curve.append({"step": step, "kind": ["poems", "talks"][which], "loss": round(loss.item(), 4), "seconds": round(time.time() - began, 1)})
            print(curve[-1], flush=True)
    seconds = time.time() - began
    print(f"{step + 1} steps, {seen} tokens with padding, {seconds:.0f} s", flush=True)

    weights = {name: p.detach().float().cpu().numpy() for name, p in model.named_parameters()}
    np.savez(os.path.join(args.out, "basho.npz"), **{k: v.astype(np.float16) if v.ndim == 2 else v for k, v in weights.items()})
    log = {"args": vars(args), "parameters": n_params, "device": torch.cuda.get_device_name(), "torch": torch.__version__, "seconds": round(seconds, 1), "curve": curve}
    with open(os.path.join(args.out, "log.json"), "w") as out:
        json.dump(log, out, indent=1)

    prompts = ["moon", "autumn moon", "rain", "cat", "sea", "write a haiku about winter", "bitcoin", "old pond"] * 25
    with open(os.path.join(args.out, "samples.txt"), "w") as out:
        for prompt, poem in zip(prompts, sample(torch, model, tokenizer, prompts, 0.8, args.seed)):
            out.write(f"[{prompt}]\n{poem}\n\n")
    print(open(os.path.join(args.out, "samples.txt")).read()[:1500])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="the haiku_corpus program")
    parser.add_argument("--out", required=True, help="folder for tokenizer.json, basho.npz, log.json and samples.txt")
    parser.add_argument("--seed", type=int, default=1689)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="anneal and stop by then")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the corpus to make, for trying things out")
    train(parser.parse_args())
