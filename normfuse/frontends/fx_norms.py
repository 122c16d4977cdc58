"""Rows of the operator table for operators that are norms themselves."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.frontends.fx_call import Call, Row, Unfit, guarded
from normfuse.graph import Value

HALF = ("float16", "bfloat16")


def norm_stages(call: Call, kind: str, x: Value, weight: Value | None, bias: Value | None, count: int,
                eps: float | None, out: Value) -> bool:  # fmt: skip
    """An operator that is a norm over the last `count` axes, in its stages.

    torch computes half types in float32, weight and bias included, and rounds once at the end. Without eps it takes
    the epsilon of the type it computes in (tried on CPU, torch 2.13).
    """
    if x.shape is None or not 0 < count <= len(x.shape) or x.dtype not in (*HALF, "float32", "float64"):
        return False
    compute = "float32" if x.dtype in HALF else x.dtype
    if eps is None:
        eps = torch.finfo(getattr(torch, compute)).eps
    axes = tuple(range(len(x.shape) - count, len(x.shape)))
    stages: list[tuple[str, list[Value], str | None, dict[str, Any]]] = []
    if compute != x.dtype:
        stages.append(("cast", [], compute, {}))
    stages.append((kind, [], compute, {"axes": axes, "eps": float(eps)}))
    stages += [(k, [v], compute, {}) for k, v in (("mul", weight), ("add", bias)) if v is not None]
    if out.dtype != compute:
        stages.append(("cast", [], out.dtype, {}))
    for i, (k, more, dtype, attrs) in enumerate(stages):
        value = out if i == len(stages) - 1 else call.low.virtual(x.shape, dtype)
        call.emit(k, [x, *more], value, **attrs)
        x = value
    return True


def norm(kind: str, many: bool = False) -> Row:
    """layer_norm and rms_norm; with `many` the forms that give statistics too."""

    def row(call: Call) -> bool:
        x, shape = call.tensor(), call.get(1, "normalized_shape")
        layer = kind == "layer_norm"
        weight, bias = call.value(2, "weight"), call.value(3, "bias") if layer else None
        try:
            eps = call.number(4 if layer else 3, "eps", default=1e-5 if layer else None)
        except Unfit:
            call.low.note("NF104", call.node, "eps is known only at run time")
            return False
        count = len(shape) if isinstance(shape, (tuple, list)) else 1
        if x.shape is None or x.dtype not in (*HALF, "float32", "float64") or not 0 < count <= len(x.shape):
            return False
        if not many:
            return norm_stages(call, kind, x, weight, bias, count, eps, call.low.out(call.node))
        outs = call.low.outs(call.node)
        if outs[0] is None:
            return False
        norm_stages(call, kind, x, weight, bias, count, eps, outs[0])
        rest = [v for v in outs[1:] if v is not None]
        call.low.graph.node("opaque", [x], rest, native=call.node, op=kind, name=call.node.name)
        return True

    return guarded(row)


def norm_module(kind: str) -> Row:
    """nn.LayerNorm and nn.RMSNorm as a module of the graph."""

    def row(call: Call) -> bool:
        x, target = call.tensor(), str(call.node.target)
        module: Any = call.low.module.get_submodule(target)
        weight, bias = (call.low.parameter(f"{target}.{n}", getattr(module, n, None)) for n in ("weight", "bias"))
        return norm_stages(call, kind, x, weight, bias, len(module.normalized_shape), module.eps,
                           call.low.out(call.node))  # fmt: skip

    return guarded(row)

