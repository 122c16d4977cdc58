"""Models whose LayerNorms stand in the branches of an If: what the tests of their conversion share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import normfuse
from tests.converted import D, model, numbers

EXACT = normfuse.Config(layernorm_to_rmsnorm="exact")
ROWS = numbers(2, 3, 4)
NORM = "h = MatMul(x, w) n = LayerNormalization<axis=-1>(h, g, b) {0} = MatMul(n, k)"
SPELLED = """h = MatMul(x, w) mu = ReduceMean<axes=[-1]>(h) d = Sub(h, mu) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)
e = Add(v, eps) s = Sqrt(e) z = Div(d, s) m = Mul(z, g) n = Add(m, b) {0} = MatMul(n, k)"""
ALONE = "hm = MatMul(x, wm) nm = LayerNormalization<axis=-1>(hm, g, b) r = MatMul(nm, k)"
HELD: dict[str, Any] = {"w": numbers(4, D), "k": numbers(D, 5)}


def branches(then: str, other: str, name: str = "y") -> str:
    """An If, whose branches give `o`."""
    return f"""{name} = If (flag) <then_branch = t () => (float[] o) {{ {then} }},
                                   else_branch = e () => (float[] o) {{ {other} }}>"""


def made(then: str, other: str, ahead: str = "", behind: str = "", outputs: str = "float[] y",
         **more: Any) -> onnx.ModelProto:  # fmt: skip
    """A model of an If of two branches."""
    lines = f"{ahead} {branches(then, other)} {behind}"
    return model("float[B,T,4] x, bool flag", lines, outputs, opset=17, **HELD | more)


def hide(model: onnx.ModelProto, branch: int, **arrays: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """The model with constants in a branch of its own."""
    inner = next(n for n in model.graph.node if n.op_type == "If").attribute[branch].g
    inner.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    return model
