"""Rows of the operator table for operators that are norms themselves."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.frontends.fx_call import Call, Row, Unfit, guarded
from normfuse.graph import PRECISION, Value

HALF = ("float16", "bfloat16")
FUSED = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "norm_add", "norm_add_norm", "qk_norm")
"""The operators of `normfuse.ops`."""


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
            out = call.low.out(call.node)
            return out.rank == x.rank and norm_stages(call, kind, x, weight, bias, count, eps, out)
        outs = call.outs(3 if layer else 2)
        if outs[0] is None or outs[0].rank != x.rank:
            return False
        norm_stages(call, kind, x, weight, bias, count, eps, outs[0])
        rest = [v for v in outs[1:] if v is not None]
        call.low.graph.node("opaque", [x], rest, native=call.node, op=kind, name=call.node.name)
        return True

    return guarded(row)


def _group_norm(call: Call, x: Value, groups: Any, rows: tuple[Value | None, Value | None], eps: float | None,
                out: Value | None = None) -> bool:  # fmt: skip
    """A group normalization of one group: a LayerNorm over all axes but the first, with weights by channel."""
    if groups != 1 or x.shape is None or any(v is not None and v.rank != 1 for v in rows):
        return False
    behind = tuple(range(1, len(x.shape) - 1))

    def column(v: Value | None) -> Value | None:
        if v is None or not behind:
            return v
        out = call.low.virtual((*(v.shape or ()), *(1 for _ in behind)), v.dtype)
        return call.emit_to("unsqueeze", [v], out, axes=behind)

    weight, bias = map(column, rows)
    return norm_stages(call, "layer_norm", x, weight, bias, len(x.shape) - 1, eps, out or call.low.out(call.node))


@guarded
def group_norm(call: Call) -> bool:
    """group_norm, of one group."""
    rows = (call.value(2, "weight"), call.value(3, "bias"))
    return _group_norm(call, call.tensor(), call.get(1, "num_groups"), rows, call.number(4, "eps", default=1e-5))


@guarded
def native_group_norm(call: Call) -> bool:
    """native_group_norm, of one group, which gives statistics too."""
    x, outs, rows = call.tensor(), call.outs(3), (call.value(1, "weight"), call.value(2, "bias"))
    if outs[0] is None or outs[0].rank != x.rank:
        return False
    if not _group_norm(call, x, call.get(6, "group"), rows, call.number(7, "eps"), outs[0]):
        return False
    rest = [v for v in outs[1:] if v is not None]
    call.low.graph.node("opaque", [x], rest, native=call.node, op="group_norm", name=call.node.name)
    return True


@guarded
def group_norm_module(call: Call) -> bool:
    """nn.GroupNorm as a module of the graph, of one group."""
    target = str(call.node.target)
    module: Any = call.low.module.get_submodule(target)
    weight, bias = (call.low.parameter(f"{target}.{n}", getattr(module, n, None)) for n in ("weight", "bias"))
    return _group_norm(call, call.tensor(), module.num_groups, (weight, bias), module.eps)


def norm_module(kind: str) -> Row:
    """nn.LayerNorm and nn.RMSNorm as a module of the graph."""

    def row(call: Call) -> bool:
        x, target = call.tensor(), str(call.node.target)
        module: Any = call.low.module.get_submodule(target)
        weight, bias = (call.low.parameter(f"{target}.{n}", getattr(module, n, None)) for n in ("weight", "bias"))
        return norm_stages(call, kind, x, weight, bias, len(module.normalized_shape), module.eps,
                           call.low.out(call.node))  # fmt: skip

    return guarded(row)



def fused(name: str) -> Row:
    """An operator of `normfuse.ops`, in its stages: a graph that was rewritten reads as it did before."""

    def row(call: Call) -> bool:
        schema = [a.name for a in call.node.target._schema.arguments]  # type: ignore[union-attr]
        at: dict[str, Any] = {n: call.get(i, n) for i, n in enumerate(schema)}
        kind = at.get("kind") or ("rms_norm" if "kind" in schema else name.removeprefix("add_"))
        values = {n: call.value(i, n) for i, n in enumerate(schema) if n not in ("eps", "offset", "round_sum")}
        numbers = {n: call.number(i, n, default=0.0) for i, n in enumerate(schema) if n in ("eps", "offset")}
        if None in numbers.values():
            raise Unfit
        at |= numbers
        x, residual = values[schema[0]], None if name in ("rms_norm", "layer_norm") else values[schema[1]]
        outs = (call.low.out(call.node),) if name in ("rms_norm", "layer_norm", "norm_add") else call.outs(2)
        sources = (x, residual) if name == "qk_norm" else (x,) * len(outs)
        if any(v is None or v.rank is None or (o is not None and o.rank != v.rank)
               for v, o in zip(sources, outs, strict=True)):  # fmt: skip
            raise Unfit
        if any(v is None for v in outs):
            read, given = ([v for v in vs if v is not None] for vs in (values.values(), outs))
            call.low.graph.node("opaque", read, given, native=call.node, op=name, name=call.node.name)
            return True

        def normed(x: Value, weight: str, bias: str, out: Value | None, narrow: str | None = None) -> Value:
            return _fused_stages(call, kind, x, values[weight], values[bias], at, out, narrow or x.dtype)

        assert x is not None
        if name in ("rms_norm", "layer_norm"):
            normed(x, "weight", "bias", outs[0])
        elif residual is None:
            raise Unfit
        elif name == "qk_norm":
            normed(x, "q_weight", "q_bias", outs[0])
            normed(residual, "k_weight", "k_bias", outs[1])
        else:
            s = outs[-1]
            if at.get("round_sum") is False:  # the norm reads the sum in float32, s is rounded from it
                assert s is not None
                compute = "float64" if s.dtype == "float64" else "float32"
                wide = [call.emit_to("cast", [v], call.low.virtual(v.shape, compute)) for v in (x, residual)]
                total = call.emit_to("add", wide, call.low.virtual(s.shape, compute))
                call.emit("cast", [total], s)
                normed(total, "weight", "bias", outs[0], s.dtype)
                return True
            if name.startswith("add_"):
                call.emit("add", [x, residual], s)
            else:
                two = "1" if name == "norm_add_norm" else ""
                call.emit("add", [residual, normed(x, f"weight{two}", f"bias{two}", None)], s)
            if name != "norm_add":
                assert s is not None
                two = "2" if name == "norm_add_norm" else ""
                normed(s, f"weight{two}", f"bias{two}", outs[0])
        return True

    return guarded(row)


def _fused_stages(call: Call, kind: str, x: Value, weight: Value | None, bias: Value | None, at: dict[str, Any],
                  out: Value | None, narrow: str | None) -> Value:  # fmt: skip
    """One norm of an operator of `normfuse.ops`, with the casts that its attributes ask for, those back to `narrow`."""
    compute = "float64" if x.dtype == "float64" else "float32"
    affine, last = compute, at["dtype"] and str(at["dtype"]).removeprefix("torch.")
    stages: list[tuple[str, list[Value], str, dict[str, Any]]] = []
    if x.dtype != compute:
        stages.append(("cast", [], compute, {}))
    axes = (len(x.shape or ()) - 1,)
    stages.append((kind, [], compute, {"axes": axes, "eps": float(at["eps"])}))
    if at["cast"] == "first":
        affine = narrow or compute
        if affine != compute:
            stages.append(("cast", [], affine, {}))
        for v in (weight, bias):
            affine = max(affine, v.dtype or affine if v is not None else affine, key=lambda t: PRECISION[t])
    if weight is not None and at["offset"]:
        wide = weight
        if weight.dtype != affine:
            wide = call.emit_to("cast", [weight], call.low.virtual(weight.shape, affine))
        shift = call.low.number(float(at["offset"]), affine)
        weight = call.emit_to("add", [wide, shift], call.low.virtual(weight.shape, affine))
    stages += [(k, [v], affine, {}) for k, v in (("mul", weight), ("add", bias)) if v is not None]
    result = last or (affine if at["cast"] == "first" else narrow or affine)
    if result != stages[-1][2]:
        stages.append(("cast", [], result, {}))
    for i, (k, more, dtype, attrs) in enumerate(stages):
        end = out if i == len(stages) - 1 else None
        x = call.emit_to(k, [x, *more], end or call.low.virtual(x.shape, dtype), **attrs)
    return x
