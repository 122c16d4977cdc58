"""Models in ONNX's own language, of lines that spell out norms and what stands around them."""

from __future__ import annotations

import re

import numpy as np
import onnx

N = 16
AXES = {"last": [-1], "lead": [0, 1], "flat": [-1, 16], "less": [-1], "two": [2], "three": [3]}


def rms(x: str, y: str, opset: int = 18, weight: str = "w", eps: str = "eps") -> str:
    """Lines that spell out an RMSNorm."""
    mean = f"ReduceMean({y}_q, last)" if opset >= 18 else f"ReduceMean<axes=[-1]>({y}_q)"
    return (f"{y}_q = Mul({x}, {x}) {y}_m = {mean} {y}_e = Add({y}_m, {eps}) {y}_r = Sqrt({y}_e) "
            f"{y}_n = Div({x}, {y}_r) {y} = Mul({y}_n, {weight}) ")  # fmt: skip


def layer(x: str, y: str, opset: int = 18) -> str:
    """Lines that spell out a LayerNorm."""
    means = [f"ReduceMean({v}, last)" if opset >= 18 else f"ReduceMean<axes=[-1]>({v})" for v in (x, f"{y}_q")]
    return (f"{y}_c = {means[0]} {y}_d = Sub({x}, {y}_c) {y}_q = Mul({y}_d, {y}_d) {y}_m = {means[1]} "
            f"{y}_e = Add({y}_m, eps) {y}_r = Sqrt({y}_e) {y}_n = Div({y}_d, {y}_r) {y}_s = Mul({y}_n, w) "
            f"{y} = Add({y}_s, v) ")  # fmt: skip


def words(lines: str) -> set[str]:
    """The names in lines, among others."""
    return set(re.findall(r"\w+", lines))


def model(lines: str, outputs: str, opset: int = 18, inputs: str = "x r", shape: str = "2,3,16",
          types: dict[str, str] | None = None) -> onnx.ModelProto:  # fmt: skip
    """A model of lines in ONNX's own language; `types` those of values of another shape."""
    row = np.linspace(0.5, 1.5, N)
    matrix = np.random.default_rng(0).standard_normal((N, N)) / 4
    constants = {"w": row, "v": row[::-1] - 1, "W": matrix, "U": matrix.T, "eps": np.array(1e-6),
                 "small": np.array(1e-5)}  # fmt: skip

    def typed(names: str) -> str:
        return ", ".join(f"{(types or {}).get(n, f'float[{shape}]')} {n}" for n in names.split())

    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g ({typed(inputs)}) => '
                                   f"({typed(outputs)}) {{ {lines} }}")  # fmt: skip
    arrays = {k: a.astype("f4") for k, a in constants.items()} | {k: np.array(axes) for k, axes in AXES.items()}
    read = words(lines)
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, k) for k, a in arrays.items() if k in read)
    onnx.checker.check_model(made, full_check=True)
    return made


SANDWICH = (rms("x", "a") + "f = MatMul(a, W) " + rms("f", "n") + "s = Add(x, n) " + rms("s", "b", eps="EPS")
            + "g = MatMul(b, U) " + rms("g", "m") + "t = Add(s, m) " + rms("t", "y"))  # fmt: skip
QK = "q = MatMul(x, W) k = MatMul(x, U) " + rms("q", "a") + rms("k", "b", eps="EPS", weight="v")
MEET = "T = Transpose<perm=[0, 2, 1]>(b) y = MatMul(a, T)"
SCORES = {"y": "float[2,3,3]"}
