"""Reads written.gguf with the gguf package, compares it with the input, and writes it again: the bytes must agree.

Usage: python read_back.py written.gguf      (needs: pip install gguf)
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

T = GGUFValueType
Q = GGMLQuantizationType

# The same list as in tests/gguf_golden.rs: key, type, element type of arrays, value.
KEYS = [
    ("general.architecture", T.STRING, None, "llama"),
    ("golden.u8", T.UINT8, None, 255),
    ("golden.i8", T.INT8, None, -128),
    ("golden.u16", T.UINT16, None, 65535),
    ("golden.i16", T.INT16, None, -32768),
    ("golden.u32", T.UINT32, None, 4294967295),
    ("golden.i32", T.INT32, None, -2147483648),
    ("golden.f32", T.FLOAT32, None, 1.5),
    ("golden.bool", T.BOOL, None, True),
    ("golden.str", T.STRING, None, "häuschen 俳句 🎋"),
    ("golden.u64", T.UINT64, None, 18446744073709551615),
    ("golden.i64", T.INT64, None, -9223372036854775808),
    ("golden.f64", T.FLOAT64, None, 0.1),
    ("golden.u8s", T.ARRAY, T.UINT8, [0, 1, 255]),
    ("golden.i8s", T.ARRAY, T.INT8, [-128, 127]),
    ("golden.u16s", T.ARRAY, T.UINT16, [65535]),
    ("golden.i16s", T.ARRAY, T.INT16, [-32768, 0]),
    ("golden.u32s", T.ARRAY, T.UINT32, [1, 2, 3]),
    ("golden.i32s", T.ARRAY, T.INT32, [-1, 0, 1]),
    ("golden.f32s", T.ARRAY, T.FLOAT32, [0.25, -0.5]),
    ("golden.bools", T.ARRAY, T.BOOL, [True, False, True]),
    ("golden.strs", T.ARRAY, T.STRING, ["a", "", "古池や", "\n"]),
    ("golden.u64s", T.ARRAY, T.UINT64, [1 << 63]),
    ("golden.i64s", T.ARRAY, T.INT64, [-1]),
    ("golden.f64s", T.ARRAY, T.FLOAT64, [1e300, -0.0]),
]

# Name, dimensions in ggml's order (row length first), type. The data are the bytes 0, 1, 2, ... 250, 0, ...
TENSORS = [
    ("vector.f32", [5], Q.F32),
    ("matrix.f16", [3, 4], Q.F16),
    ("stack.q8_0", [32, 2, 3], Q.Q8_0),
    ("cube.q4_k", [256, 1, 2, 1], Q.Q4_K),
    ("experts.mxfp4", [64, 2, 2], Q.MXFP4),
]


def check(what, found, expected):
    if found != expected:
        sys.exit(f"{what}: the gguf package reads {found!r}, the input was {expected!r}")


def read(reader):
    """Compares everything the reader found with the lists above."""
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    check("keys", names, [key for key, *_ in KEYS])
    for key, ty, elem, value in KEYS:
        field = reader.fields[key]
        check(f"type of {key}", field.types, [ty] if elem is None else [ty, elem])
        check(key, field.contents(), value)
    check("tensors", [t.name for t in reader.tensors], [name for name, *_ in TENSORS])
    for t, (name, dims, ty) in zip(reader.tensors, TENSORS):
        check(f"dims of {name}", [int(d) for d in t.shape], dims)
        check(f"type of {name}", t.tensor_type, ty)
        data = t.data.tobytes()
        check(f"data of {name}", data, bytes(i % 251 for i in range(len(data))))


def write_again(reader, path):
    """The same file as the gguf package writes it."""
    writer = GGUFWriter(path, "llama")
    for key, ty, elem, value in KEYS[1:]:
        writer.add_key_value(key, value, ty, elem)
    for t, (name, dims, ty) in zip(reader.tensors, TENSORS):
        raw = np.frombuffer(t.data.tobytes(), dtype=np.uint8)
        rows = list(reversed(dims))
        if ty == Q.F32:
            writer.add_tensor(name, raw.view(np.float32).reshape(rows))
        elif ty == Q.F16:
            writer.add_tensor(name, raw.view(np.float16).reshape(rows))
        else:
            writer.add_tensor(name, raw.reshape(*rows[:-1], -1), raw_dtype=ty)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    source = Path(sys.argv[1])
    reader = GGUFReader(source)
    check("version", int(reader.fields["GGUF.version"].contents()), 3)
    read(reader)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again.gguf"
        write_again(reader, again)
        if again.read_bytes() != source.read_bytes():
            sys.exit("the gguf package writes other bytes")
    print(f"{source}: {len(KEYS)} keys and {len(TENSORS)} tensors read back identically, and written again byte for byte")


main()
