"""Graphs as exporters write them, in ONNX's own language: the constants they read, rows for their norms, and the norm.

For tests/test_exporters.py, tests/test_exporters_keras.py and tests/test_float64.py.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx

Array = np.ndarray[Any, Any]
N = 8
NUMBERS: dict[str, Any] = {
    "w": np.linspace(0.5, 1.5, N), "v": np.linspace(-1, 1, N), "W": np.eye(N)[::-1] + 0.1, "eps": 1e-3, "c0": 0.0,
    "c1": 1.0, "share": 1 / N, "small": 1e-3, "tenth": 0.1, "ten": 10.0, "large": 1e3,
    "log_eps": np.log(0.25), "two": 2.0, "minus_half": -0.5, "scale": 0.02, "fixed": np.linspace(0, 1, 4),
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "zero": [0], "one": [1], "pair": [2], "last": [-1], "behind": [0, 2, 3], "four": [1, -1, N, 1],
    "size": [N], "grouped": [-1, 4, 1, N],
}  # fmt: skip
ARRAYS: dict[str, Array] = {
    "point": np.array(3, "i1"), "W8": np.arange(N * N, dtype="i1").reshape(N, N), "U8": np.eye(N, dtype="i1") * 50,
    "M": np.random.default_rng(2).standard_normal((16, 8)).astype("f4"),
    "deep_w": np.linspace(0.5, 1.5, N, dtype="f4").reshape(1, 1, 1, N),
    "deep_v": np.linspace(-1, 1, N, dtype="f4").reshape(1, 1, 1, N),
    "wide_w": np.linspace(0.5, 1.5, N, dtype="f4").reshape(N, 1, 1),
    "wide_v": np.linspace(2.5, 3.5, N, dtype="f4").reshape(N, 1, 1),
    "F": np.random.default_rng(5).standard_normal((N, N, 1, 1)).astype("f4"),
    "cube": np.random.default_rng(4).uniform(0.5, 1.5, (N, N, N)).astype("f4"),
    "M16": np.eye(16, dtype="f4"), "nan": np.array(np.nan, "f4"), "nan11": np.full((1, 1), np.nan, "f4"),
    "eight": np.array(8, "i4"), "ones16": np.ones(16, "f4"), "zeros16": np.zeros(16, "f4"),
    "ones6": np.ones(6, "f4"), "zeros6": np.zeros(6, "f4"), "open": np.array([4, -1]),
    "ones4": np.ones(4, "f4"), "zeros4": np.zeros(4, "f4"), "w4": np.linspace(1, 2, 4, dtype="f4"),
    "three": np.array([-1, 4, N]), "once": np.array([1, N]), "half": np.array([1, N // 2]),
    "pairs": np.array([0, 2, N // 2]), "nan41": np.full((4, 1), np.nan, "f4"),
    "nan111": np.full((1, 1, 1), np.nan, "f4"),
    "G": np.random.default_rng(0).standard_normal((1, 3 * N, N)).astype("f4") / 4,
    "R": np.random.default_rng(1).standard_normal((1, 3 * N, N)).astype("f4") / 4,
}  # fmt: skip


def model(lines: str, inputs: str, output: str, opset: int) -> onnx.ModelProto:
    """A model of lines in ONNX's own language, with those constants of the three tables that they read."""
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => ({output}) '
                                   f"{{ {lines} }}")  # fmt: skip
    tables = {k: np.array(v, "f4") for k, v in NUMBERS.items()} | {k: np.array(v) for k, v in WHOLE.items()} | ARRAYS
    read = set(re.findall(r"\w+", lines))
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, k) for k, a in tables.items() if k in read)
    onnx.checker.check_model(made, full_check=True)
    return made


def rows(count: int = 4) -> dict[str, Array]:
    """Rows to be normalised that are random, offset, of a large mean, tiny, large, and zero."""
    normal = np.random.default_rng(3).standard_normal((count, N))
    kinds = {"random": normal, "offset": normal + 3, "large mean": normal + 100, "tiny": normal * 1e-3,
             "large": normal * 1e4, "zero": normal * 0}  # fmt: skip
    return {name: array.astype("f4") for name, array in kinds.items()}


def layer_norm(x: Array, eps: float, w: Array | float = 1.0, v: Array | float = 0.0) -> Array:
    wide = x.astype("f8")
    centred = wide - wide.mean(-1, keepdims=True)
    out: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + v
    return out


FLAX = """shape = Shape(u) lead = Slice(shape, zero, one, zero) column = Concat<axis=0>(lead, one)
sum = ReduceSum<keepdims=0>({x}, last) mean = Mul(sum, share) q = Mul({x}, {x})
sum2 = ReduceSum<keepdims=0>(q, last) mean2 = Mul(sum2, share) m2 = Mul(mean, mean) diff = Sub(mean2, m2)
var = Max({floor}, diff) vr = Reshape(var, column) ve = Expand(vr, {spread}) a = Add(ve, eps) s = Sqrt(a)
inv = Reciprocal(s) g = Mul(inv, w) mr = Reshape(mean, column) me = Expand(mr, column) d = Sub({x}, me) h = Mul(d, g)
y = Add(h, v)"""


def flax(ahead: str = "", x: str = "x", floor: str = "c0", spread: str = "column") -> onnx.ModelProto:
    """Nothing says that x and u, of which a size is read, have as many rows."""
    lines = ahead + FLAX.format(x=x, floor=floor, spread=spread)
    return model(lines, f"float[A, {N}] x, float[B, {N}] u", f"float[A, {N}] y", 15)
