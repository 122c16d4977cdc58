"""ONNX graphs of a text, and what has to hold of them: what the tests of hostile ones share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import normfuse
from normfuse.sessions import session

RNG = np.random.default_rng(0)
TARGETS = ("onnx", "standard", "normfuse", "ort-cpu")


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def model(inputs: str, lines: str, outputs: str = "float[A,B] y", opset: int = 18, functions: str = "",
          **held: Any) -> onnx.ModelProto:  # fmt: skip
    """A graph of a text, with constants."""
    head = f'<ir_version: 10, opset_import: ["": {opset}, "normfuse": 1]>'
    made = onnx.parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {lines} }} {functions}")
    held = {"eps": np.array(1e-5, np.float32), "last": np.array([-1])} | held
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in held.items() if n in lines)
    if not functions:
        del made.opset_import[1]
    return made


def check(made: onnx.ModelProto, feeds: list[dict[str, Any]], folder: Path, norms: int,
          target: Any = "onnx") -> onnx.ModelProto:  # fmt: skip
    """So many norms are fused (or, in standard operators, spelled so already), ONNX Runtime loads the result, and its
    outputs are those of the model."""
    onnx.save(made, folder / "in.onnx")
    report = normfuse.rewrite(folder / "in.onnx", folder / "out.onnx", normfuse.Config(target=target), overwrite=True)
    done = ("fused", "kept") if target == "standard" else ("fused",)
    assert sum(n.action in done for n in report.norms) == norms, report.refusals
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)
    before, after = (session(folder / name) for name in ("in.onnx", "out.onnx"))
    for given in feeds:
        for a, b in zip(before.run(None, given), after.run(None, given), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return onnx.load(folder / "out.onnx")


ROOT = "sq = Mul({0}, {0}) ms = ReduceMean(sq, last) a = Add(ms, eps) r = Sqrt(a) "
OLD = "sq = Mul({0}, {0}) ms = ReduceMean<axes=[{1}]>(sq) a = Add(ms, eps) r = Sqrt(a) "
SUM = "sq = Mul({0}, {0}) ms0 = ReduceSum(sq, last) ms = Mul(ms0, inv) a = Add(ms, eps) r = Sqrt(a) "
FIRST = "sq = Mul({0}, {0}) ms = ReduceMean(sq, zero) a = Add(ms, eps) r = Sqrt(a) "
ZERO = np.array([0])
