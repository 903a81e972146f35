"""Makes the golden files of the block formats with the `gguf` Python package as the oracle.

    python3 -m venv /tmp/gguf-venv && /tmp/gguf-venv/bin/pip install gguf==0.19.0 numpy==2.4.6
    /tmp/gguf-venv/bin/python tests/golden/dtype/make.py

Writes, beside itself, `<format>.decode.bin` (encoded blocks, then their elements as f32) and, where the package has
a quantiser, `<format>.encode.bin` (elements as f32, then their encoded blocks). No header: both parts follow from
the file's length and the format's block size.
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

HERE = Path(__file__).parent

# Offsets of the f16 fields in a block.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}
DECODED = list(HALVES) + ["F32", "F16", "BF16", "MXFP4"]
ENCODED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"]

# Zeros, the ends of the subnormal and normal ranges, infinities, a NaN, and values with full mantissas.
ODD_HALVES = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x8400, 0x7BFF, 0xFBFF, 0x3555, 0xB555, 0x7C00, 0xFC00,
     0x7E00], dtype=np.uint16)


def half_blocks(rng, name, n):
    """Random bytes; the f16 fields of the first blocks run through ODD_HALVES, the others have usual sizes."""
    _, size = GGML_QUANT_SIZES[T[name]]
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for field, offset in enumerate(HALVES[name]):
        scales = (10 ** rng.uniform(-4, 0, n) * rng.choice([-1, 1], n)).astype(np.float16)
        odd = np.roll(ODD_HALVES, 4 * field)
        scales[: len(odd)] = odd.view(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(n, 2)
    return blocks


def decode_input(rng, name):
    if name in HALVES:
        return half_blocks(rng, name, 64 if GGML_QUANT_SIZES[T[name]][0] == 32 else 24)
    if name == "MXFP4":
        blocks = rng.integers(0, 256, (256, 17), dtype=np.uint8)
        blocks[:, 0] = np.arange(256)  # every exponent
        blocks[:, 1:9] = np.arange(0x10, 0x90, 0x10)[None, :] + np.arange(8)[None, :]  # every code, some twice
        return blocks
    if name == "F32":
        return rng.integers(0, 256, (64, 4), dtype=np.uint8)
    bits = rng.integers(0, 65536, 1024, dtype=np.uint16)
    odd = {"F16": ODD_HALVES, "BF16": np.array([0, 0x8000, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0], np.uint16)}
    bits[: len(odd[name])] = odd[name]
    return bits.view(np.uint8).reshape(1024, 2)


def encode_input(rng, name):
    """Blocks of 32 of the kinds that trained weights and careless code produce."""
    n = rng.normal(0, 0.02, (24, 32))
    heavy = rng.standard_t(3, (8, 32)) * 0.05
    wide = rng.normal(0, 1, (8, 32)) * 10.0 ** rng.uniform(-5, 4, (8, 1))
    grid = rng.integers(-8, 8, (4, 32)) / 16  # many ties
    steps = np.arange(-16, 16)[None, :] * np.array([[1.0], [-1.0], [0.25], [1 / 3]])
    one = np.zeros((2, 32))
    one[0, 7], one[1, 31] = -3.5, 1e-3
    constant = np.array([[0.0], [0.7], [-0.7], [1000.0]]) * np.ones((1, 32))
    x = np.concatenate([n, heavy, wide, grid, steps, one, constant]).astype(np.float32)
    if name == "MXFP4":
        powers = 2.0 ** np.arange(-120, 127, 3, dtype=np.float64)[:, None]  # amax is below 2^127 after scaling
        x = np.concatenate([x, (rng.uniform(-1, 1, (len(powers), 32)) * powers).astype(np.float32)])
        # The largest element just below, at and above a power of two: the exponent is floor(log2) in f32.
        edges = [np.nextafter(np.float32(2.0**k), np.float32(s)) for k in (-20, -5, 0, 3, 10) for s in (0, 2.0**k, 1e9)]
        x = np.concatenate([x, np.array(edges, np.float32)[:, None] * np.linspace(-1, 1, 32, dtype=np.float32)])
    if name in ("F16", "BF16"):
        odd = [0.0, -0.0, 65504, 65519.99, 65520, -65520, 6.1e-5, 5.97e-8, 2.98e-8, 2.99e-8, 1e-10, np.inf, -np.inf,
               3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1e-40, 3.3895314e38, np.nan, -np.nan]
        x = np.concatenate([x.ravel(), np.array(odd, np.float32)])
    return x.ravel()


def main():
    with np.errstate(all="ignore"):
        for i, name in enumerate(DECODED):
            rng = np.random.Generator(np.random.PCG64(1000 + i))
            blocks = decode_input(rng, name)
            x = np.concatenate([dequantize(block[None, :], T[name]).ravel() for block in blocks])
            assert x.dtype == np.float32
            (HERE / f"{name.lower()}.decode.bin").write_bytes(blocks.tobytes() + x.tobytes())
        for i, name in enumerate(ENCODED):
            rng = np.random.Generator(np.random.PCG64(2000 + i))
            x = encode_input(rng, name)
            encoded = quantize(x.reshape(1, -1), T[name])
            (HERE / f"{name.lower()}.encode.bin").write_bytes(x.tobytes() + encoded.tobytes())


if __name__ == "__main__":
    main()
