"""The table from ONNX operators to neutral kinds; a new operator is one row. ONNX Runtime's are in `onnx_contrib`.

A row is called as ``row(lower, node)``, where `lower` is the graph being built (see `normfuse.frontends.onnx`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from normfuse.frontends import onnx_views as views
from normfuse.frontends.onnx_fold import attribute
from normfuse.frontends.onnx_infer import DTYPE_NAMES, DTYPES
from normfuse.graph import FLOATS, Shape, Value

if TYPE_CHECKING:
    from normfuse.frontends.onnx import Lowering

Row = views.Row


def elementwise(kind: str) -> Row:
    """Same kind, broadcast shape, first operand's type."""

    def row(low: Lowering, node: ir.Node) -> None:
        inputs = low.inputs(node)
        out = low.output(node, views.product_shape([v.shape for v in inputs]), inputs[0].dtype)
        low.emit(kind, inputs, out, node)
        a, b = (*inputs, *inputs)[:2]
        if a.number is not None and b.number is not None and kind in _UNIFORM and (kind != "div" or b.number):
            number = _UNIFORM[kind](a.number, b.number)
            out.number = rounded(number if out.dtype in FLOATS else math.trunc(number), out.dtype)

    return row


_UNIFORM: dict[str, Callable[[float, float], float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
}  # fmt: skip


def rounded(number: float, dtype: str | None) -> float:
    """A number in the precision of a type; integers stay as they are."""
    return float(np.array(number).astype(DTYPES[dtype].numpy())) if dtype in FLOATS else number


def _sum(low: Lowering, node: ir.Node) -> None:
    low.chain("add", low.inputs(node), node)


def _max(low: Lowering, node: ir.Node) -> None:
    low.chain("max", low.inputs(node), node)


def _relu(low: Lowering, node: ir.Node) -> None:
    (x,) = low.inputs(node)
    low.emit("max", [x, low.number(0.0, x.dtype)], low.output(node, x.shape, x.dtype), node)


def _clip(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    floor, ceiling = attribute(node, "min"), attribute(node, "max")
    least = low.value(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        high = low.array(node.inputs[2])
        ceiling = float(high.reshape(-1)[0]) if high is not None and high.size == 1 else float("nan")
    if floor is not None:
        least = low.number(float(floor), x.dtype)
    if least is None or (ceiling is not None and not ceiling >= 3e38):
        return low.opaque(node)
    low.emit("max", [x, least], low.output(node, x.shape, x.dtype), node)


def _cast(low: Lowering, node: ir.Node) -> None:
    inputs = low.inputs(node)
    to = attribute(node, "to")
    dtype = inputs[1].dtype if to is None else low.dtype_name(ir.DataType(to))
    out = low.output(node, inputs[0].shape, dtype)
    low.emit("cast", inputs[:1], out, node)
    if inputs[0].number is not None and dtype in FLOATS:
        out.number = rounded(inputs[0].number, dtype)


def _identity(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    low.emit("identity", [x], low.output(node, x.shape, x.dtype), node)


def _dropout(low: Lowering, node: ir.Node) -> None:
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    training = low.array(mode) if mode is not None else False
    if training is None or bool(training):
        return low.opaque(node)
    _identity(low, node)


def _where(low: Lowering, node: ir.Node) -> None:
    """One of two by a condition that is known: jax.numpy.var asks whether there are elements at all."""
    asked = node.inputs[0]
    array = None if asked is None else low.array(asked)
    if array is None or array.any() != array.all():
        return low.opaque(node, "where")
    condition, *both = low.inputs(node)
    x, other = both if array.all() else reversed(both)
    if not all(_covers(x.shape, v.shape) for v in (condition, other)):
        return low.opaque(node, "where")
    low.emit("identity", [x], low.output(node, x.shape, x.dtype), node)


def _covers(wide: Shape | None, shape: Shape | None) -> bool:
    """Whether a shape is broadcast to another, whatever the sizes are."""
    if wide is None or shape is None or len(shape) > len(wide):
        return False
    return all(d == 1 or (d is not None and d == w) for d, w in zip(reversed(shape), reversed(wide), strict=False))


def _reduction_axes(low: Lowering, node: ir.Node, x: Value) -> tuple[int, ...] | None:
    """Axes counted from the front; None where they are known only at run time."""
    axes: Any = attribute(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = low.array(node.inputs[1])
        if array is None:
            return None
        axes = array.reshape(-1).tolist()
    if x.shape is None:
        return None
    if not axes:
        return () if attribute(node, "noop_with_empty_axes", 0) else tuple(range(len(x.shape)))
    rank = len(x.shape)
    if any(not -rank <= a < rank for a in axes):
        return None
    return tuple(sorted({int(a) % rank for a in axes}))


def reduction(kind: str, square: bool = False) -> Row:
    """mean, sum or vecnorm; with `square` of the square."""

    def row(low: Lowering, node: ir.Node) -> None:
        x = low.value(node.inputs[0])
        axes = _reduction_axes(low, node, x)
        keep = bool(attribute(node, "keepdims", 1))
        out = low.output(node, views.reduced_shape(x, axes, keep), x.dtype)
        if square:
            squared = low.virtual(x.shape, x.dtype)
            low.emit("square", [x], squared, node)
            x = squared
        low.emit(kind, [x], out, node, axes=axes, keepdims=keep)

    return row


def _matmul(low: Lowering, node: ir.Node) -> None:
    a, b = low.inputs(node)
    multiply(low, node, a, b, low.output(node, matmul_shape(a, b), a.dtype))


def matmul_shape(a: Value, b: Value) -> Shape | None:
    """The shape of a matrix product, where it is known."""
    if a.shape and b.shape:
        if len(b.shape) == 1:
            return a.shape[:-1]
        if len(a.shape) > 1:
            batch = views.product_shape([a.shape[:-2], b.shape[:-2]])
            return None if batch is None else (*batch, a.shape[-2], b.shape[-1])
    return None


def multiply(low: Lowering, node: ir.Node, a: Value, b: Value, out: Value) -> None:
    """A matrix product, with a constant or with something computed."""
    plain = any((v.fixed or v.overridable) and v.number is None for v in (a, b))
    low.emit("linear" if plain else "matmul", [a, b], out, node)


def shaped(kind: str, shape: Callable[[ir.Node, list[Value | None]], Shape | None], typed: int | None = None,
           reads: Callable[[list[Value | None]], list[Value | None]] = list) -> Row:  # fmt: skip
    """An operator that only matters for where a norm stands, and for the shape of its first output, which has the type
    of the first input, or of the one that is `typed`; `reads` gives what it reads, in the order of other such."""

    def row(low: Lowering, node: ir.Node) -> None:
        slots = [None if v is None else low.value(v) for v in node.inputs]
        inputs = [v for v in reads(slots) if v is not None]
        like = slots[typed] if typed is not None and typed < len(slots) else inputs[0] if inputs else None
        outputs = [low.output(node, shape(node, slots), None if like is None else like.dtype)]
        outputs += [low.bind(v, None, None) for v in node.outputs[1:]]
        low.join(kind, inputs, outputs, node)

    return row


def gemm_shape(node: ir.Node, slots: list[Value | None]) -> Shape | None:
    """Of ``alpha * A' @ B' + beta * C``, in two dimensions."""
    turned = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
    a, b = (v.shape if v is not None and v.rank == 2 else None for v in slots[:2])
    return None if a is None or b is None else (a[turned[0]], b[not turned[1]])


def norm_stages(low: Lowering, node: ir.Node, kind: str, x: Value, scale: Value | None, bias: Value | None,
                axes: tuple[int, ...], eps: float, stash: str, out: Value) -> None:  # fmt: skip
    """An operator that is a norm, in its stages: computed in `stash`, rounded to the type of x, scaled, shifted."""
    stages: list[tuple[str, list[Value], str | None, dict[str, Any]]] = []
    if stash != x.dtype:
        stages.append(("cast", [], stash, {}))
    stages.append((kind, [], stash, {"axes": axes, "eps": eps}))
    if stash != x.dtype:
        stages.append(("cast", [], x.dtype, {}))
    stages += [(k, [v], x.dtype, {}) for k, v in (("mul", scale), ("add", bias)) if v is not None]
    for i, (k, more, dtype, attrs) in enumerate(stages):
        last = i == len(stages) - 1
        value = out if last else low.virtual(x.shape, dtype)
        low.emit(k, [x, *more], value, node, **attrs)
        x = value


def norm(kind: str) -> Row:
    """LayerNormalization, RMSNormalization and SimplifiedLayerNormalization: x, scale, bias."""

    def row(low: Lowering, node: ir.Node) -> None:
        x = low.value(node.inputs[0])
        axis = attribute(node, "axis", -1)
        if x.shape is None or x.dtype is None or not -len(x.shape) <= axis < len(x.shape):
            low.note("NF115", node, f"the shape of {x.name} is not known")
            return low.opaque(node)
        rank = len(x.shape)
        stash = low.dtype_name(ir.DataType(attribute(node, "stash_type", 1)))
        if x.dtype == "float64":
            stash = "float64"
        scale, bias = ([None if v is None else low.value(v) for v in node.inputs[1:3]] + [None, None])[:2]
        eps = float(attribute(node, "epsilon", 1e-5))
        out = low.output(node, x.shape, x.dtype)
        norm_stages(low, node, kind, x, scale, bias, tuple(range(axis % rank, rank)), eps, stash, out)

    return row


def _batch_norm(low: Lowering, node: ir.Node) -> None:
    """``(x - mean) * (var + epsilon)^-1/2 * scale + B`` along axis 1. With statistics of x itself, as Keras's
    LayerNormalization calls it in training mode, it may be a norm; with those of a training it is not."""
    x, *rows = low.inputs(node)
    known = x.shape is not None and all(v.rank == 1 for v in rows)
    if not known or any(v.fixed for v in rows[2:]) or attribute(node, "training_mode", 0):
        return low.emit("opaque", [x, *rows], low.output(node, x.shape, x.dtype), node)
    scale, bias, mean, var = (_column(low, node, v, x) for v in rows)
    eps = low.number(float(attribute(node, "epsilon", 1e-5)), x.dtype)
    total, rstd = low.virtual(var.shape, var.dtype), low.virtual(var.shape, var.dtype)
    low.emit("add", [var, eps], total, node)
    low.emit("rsqrt", [total], rstd, node)
    for kind, operand in (("sub", mean), ("mul", rstd), ("mul", scale)):
        out = low.virtual(x.shape, x.dtype)
        low.emit(kind, [x, operand], out, node)
        x = out
    low.emit("add", [x, bias], low.output(node, x.shape, x.dtype), node)


def _column(low: Lowering, node: ir.Node, value: Value, x: Value) -> Value:
    """A vector along axis 1 of x, which the operator says that it is as long as."""
    behind = tuple(range(1, (x.rank or 0) - 1))
    (length,) = value.shape or (None,)
    length = length if isinstance(length, int) or x.shape is None else x.shape[1]
    out = low.virtual((length, *(1 for _ in behind)), value.dtype)
    low.emit("unsqueeze", [value], out, node, axes=behind)
    out.number = value.number
    return out


GROUP_NORMS = ("InstanceNormalization", "GroupNormalization")


def _group_norm(low: Lowering, node: ir.Node) -> None:
    """InstanceNormalization and GroupNormalization of one group, which are LayerNorms over all axes but the first, with
    weights by channel; torch writes GroupNorm(1, C) as an InstanceNormalization of a view with one channel. tf2onnx
    writes a LayerNorm over the last of three axes as an InstanceNormalization with weights of one, times a weight;
    without that it is no LayerNorm's, nor is one of a view with several groups."""
    x, *rows = low.inputs(node)
    instance = node.op_type == GROUP_NORMS[0]
    groups = x.shape[1] if instance and x.shape and len(x.shape) > 2 else attribute(node, "num_groups", 0)
    if x.shape is None or x.dtype is None or any(v.rank != 1 for v in rows):
        return low.opaque(node)
    out = low.output(node, x.shape, x.dtype)
    by_channel = groups == 1 and all(v.shape in ((1,), x.shape[1:2]) for v in rows)
    scaled = any(use.op_type == "Mul" for use, _ in node.outputs[0].uses())
    if not by_channel and not (instance and len(x.shape) == 3 and [v.number for v in rows] == [1, 0] and scaled):
        return low.emit("opaque", [x, *rows], out, node)
    stash = "float64" if x.dtype == "float64" else low.dtype_name(ir.DataType(attribute(node, "stash_type", 1)))
    scale, bias = (_column(low, node, v, x) for v in rows)
    axes, eps = tuple(range(1 if by_channel else 2, len(x.shape))), float(attribute(node, "epsilon", 1e-5))
    norm_stages(low, node, "layer_norm", x, scale, bias, axes, eps, stash, out)


def role(kind: str) -> Row:
    """Operators that only matter for where a norm stands."""
    return lambda low, node: low.opaque(node, kind)


def same_type(kind: str) -> Row:
    """An opaque operator that keeps shape and type."""

    def row(low: Lowering, node: ir.Node) -> None:
        x = low.value(node.inputs[0])
        low.emit(kind, low.inputs(node), low.output(node, x.shape, x.dtype), node)

    return row


def quantize(low: Lowering, node: ir.Node) -> None:
    """To fewer bits and back: the shape stays; what happens to numbers is no norm's."""
    inputs = low.inputs(node)
    types = [*(v.dtype for v in inputs), "uint8", "uint8"]  # a zero point that is not there is one of uint8
    stated = attribute(node, "output_dtype", 0)
    dtype = DTYPE_NAMES[ir.DataType(stated)] if stated else types[1 if node.op_type == "DequantizeLinear" else 2]
    low.emit("quantize", inputs, low.output(node, inputs[0].shape, dtype), node)


OPS: dict[str, Row] = {
    "Add": elementwise("add"),
    "Sub": elementwise("sub"),
    "Mul": elementwise("mul"),
    "Div": elementwise("div"),
    "Pow": elementwise("pow"),
    "Neg": elementwise("neg"),
    "Abs": elementwise("abs"),
    "Sqrt": elementwise("sqrt"),
    "Reciprocal": elementwise("reciprocal"),
    "Sum": _sum,
    "Max": _max,
    "Relu": _relu,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast,
    "Identity": _identity,
    "Dropout": _dropout,
    "ReduceMean": reduction("mean"),
    "ReduceSum": reduction("sum"),
    "ReduceSumSquare": reduction("sum", square=True),
    "ReduceL2": reduction("vecnorm"),
    "GlobalAveragePool": views.global_pool,
    "AveragePool": views.average_pool,
    "ConstantOfShape": views.fill,
    "MatMul": _matmul,
    "Einsum": views.einsum,
    "Reshape": views.reshape,
    "Flatten": views.flatten,
    "Unsqueeze": views.view_axes("unsqueeze"),
    "Squeeze": views.view_axes("squeeze"),
    "Expand": views.expand,
    "Tile": views.tile,
    "Transpose": views.transpose,
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(GROUP_NORMS, _group_norm),
    "LayerNormalization": norm("layer_norm"),
    "RMSNormalization": norm("rms_norm"),
    "SimplifiedLayerNormalization": norm("rms_norm"),
    "Attention": role("attention"),
    "Gemm": shaped("linear", gemm_shape),
    "Conv": role("linear"),
    "ConvTranspose": role("linear"),
    "MatMulInteger": role("linear"),
    "QLinearMatMul": role("linear"),
    "QLinearConv": role("linear"),
    "ConvInteger": role("linear"),
    "GRU": role("recurrent"),
    "LSTM": role("recurrent"),
    "RNN": role("recurrent"),
    "Gather": role("gather"),
    "GatherElements": role("gather"),
    "GatherND": role("gather"),
    "Slice": views.cut,
    "Split": role("slice"),
    "Concat": role("concat"),
    "Where": _where,
    "Sigmoid": same_type("activation"),
    "Swish": same_type("activation"),
    "Tanh": same_type("activation"),
    "Erf": same_type("activation"),
    "Gelu": same_type("activation"),
    "HardSwish": same_type("activation"),
    "Softplus": same_type("activation"),
    "QuantizeLinear": quantize,
    "DynamicQuantizeLinear": quantize,
    "DequantizeLinear": quantize,
    "Softmax": same_type("opaque"),
}
"""ONNX operator (with its domain where that is not ONNX's own) -> how to lower it."""
