"""Constants of an ONNX graph, folded for analysis only: the model itself keeps its nodes.

Only small tensors are evaluated; they are the axes, shapes, exponents and epsilons that exporters compute through
chains of Cast, Reshape, Concat and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.ort_values import Array

MAX_ELEMENTS = 1024


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or the default where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant_of(node: ir.Node) -> Array | None:
    """The tensor of a Constant node in any of its spellings, if it is small and numeric."""
    for name, attr in node.attributes.items():
        if name == "value":
            tensor = attr.value
            if tensor.size > MAX_ELEMENTS or tensor.dtype == ir.DataType.STRING:
                return None
            return np.asarray(tensor.numpy())
        if name in ("value_float", "value_floats"):
            return np.array(attr.value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.array(attr.value, np.int64)
    return None


def _axes(node: ir.Node, args: Sequence[Array]) -> tuple[int, ...] | None:
    axes = [int(a) for a in args[1].reshape(-1)] if len(args) > 1 else attribute(node, "axes")
    if axes is not None and not axes:
        raise ValueError("no axes: all or none of them, which runtimes do not agree on")
    return None if axes is None else tuple(axes)


def _unsqueeze(node: ir.Node, args: Sequence[Array]) -> Array:
    return np.expand_dims(args[0], _axes(node, args) or ())


def _reshape(node: ir.Node, args: Sequence[Array]) -> Array:
    shape = [int(d) for d in args[1]]
    if not attribute(node, "allowzero", 0):
        shape = [args[0].shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return args[0].reshape(shape)


def _slice(node: ir.Node, args: Sequence[Array]) -> Array:
    if len(args) == 1:
        starts, ends = attribute(node, "starts"), attribute(node, "ends")
        axes, steps = attribute(node, "axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = args[1].tolist(), args[2].tolist()
        axes = args[3].tolist() if len(args) > 3 else range(len(starts))
        steps = args[4].tolist() if len(args) > 4 else [1] * len(starts)
    index: list[slice] = [slice(None)] * args[0].ndim
    for a, s, e, t in zip(axes, starts, ends, steps, strict=True):
        if t < 0 and s < -args[0].shape[a]:
            raise ValueError("numpy has no element there, ONNX the first")
        if t < 0 and e >= 2**31 - 1:
            raise ValueError("the last element, or all of them, which runtimes do not agree on")
        low = None if t < 0 and e < -(2**31) else e
        index[a] = slice(s, low, t)
    return args[0][tuple(index)]


def _cast(node: ir.Node, args: Sequence[Array]) -> Array:
    to = ir.DataType(attribute(node, "to"))
    if to == ir.DataType.STRING:
        raise ValueError("no number")
    return args[0].astype(to.numpy())


def _fill(node: ir.Node, args: Sequence[Array]) -> Array:
    value = attribute(node, "value")
    fill = np.zeros(1, np.float32) if value is None else value.numpy().reshape(-1)
    return np.broadcast_to(fill[:1].reshape(()), [int(d) for d in args[0]])  # takes no memory, whatever the size


def _range(start: float, stop: float, step: float) -> Array:
    if not (stop - start) / step <= MAX_ELEMENTS:
        raise ValueError("too long to be of use")
    return np.arange(start, stop, step)


def _div(node: ir.Node, args: Sequence[Array]) -> Array:
    a, b = args
    if a.dtype.kind in "iu":  # towards zero, and exact
        return np.asarray(np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype)
    return np.asarray(a / b)


def _prod(node: ir.Node, args: Sequence[Array]) -> Array:
    axes = _axes(node, args)
    if axes is None and attribute(node, "noop_with_empty_axes", 0):
        return args[0]
    return np.asarray(np.prod(args[0], axes, keepdims=bool(attribute(node, "keepdims", 1)))).astype(args[0].dtype)


def _binary(f: Callable[[Array, Array], Array]) -> Callable[[ir.Node, Sequence[Array]], Array]:
    return lambda node, args: f(args[0], args[1])


FOLDS: dict[str, Callable[[ir.Node, Sequence[Array]], Array]] = {
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _div,
    "Pow": lambda node, args: np.power(args[0], args[1]).astype(args[0].dtype),
    "Max": lambda node, args: reduce(np.maximum, args),
    "Min": lambda node, args: reduce(np.minimum, args),
    "Equal": _binary(np.equal),
    "Greater": _binary(np.greater),
    "Less": _binary(np.less),
    "Neg": lambda node, args: -args[0],
    "Abs": lambda node, args: np.abs(args[0]),
    "Not": lambda node, args: ~args[0],
    "Sqrt": lambda node, args: np.sqrt(args[0]),
    "Exp": lambda node, args: np.exp(args[0]),
    "Reciprocal": lambda node, args: (1 / args[0]).astype(args[0].dtype),
    "Identity": lambda node, args: args[0],
    "Cast": _cast,
    "CastLike": lambda node, args: args[0].astype(args[1].dtype),
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": lambda node, args: np.squeeze(args[0], _axes(node, args)),
    "Concat": lambda node, args: np.concatenate(args, attribute(node, "axis")),
    "Gather": lambda node, args: np.take(args[0], args[1], attribute(node, "axis", 0)),
    "Slice": _slice,
    "Transpose": lambda node, args: np.transpose(args[0], attribute(node, "perm")),
    "Flatten": lambda node, args: args[0].reshape(
        int(np.prod(args[0].shape[: attribute(node, "axis", 1)], dtype=np.int64)), -1
    ),
    "Expand": lambda node, args: np.broadcast_to(
        args[0], np.broadcast_shapes(args[0].shape, tuple(int(d) for d in args[1]))
    ),
    "ConstantOfShape": _fill,
    "Range": lambda node, args: _range(*(a.item() for a in args)).astype(args[0].dtype),
    "Where": lambda node, args: np.where(args[0], args[1], args[2]),
    "ReduceProd": _prod,
    "Shape": lambda node, args: np.array(args[0].shape[attribute(node, "start", 0) : attribute(node, "end")], np.int64),
    "Size": lambda node, args: np.array(args[0].size, np.int64),
}
"""Operators that are evaluated when all their inputs are small constants."""


def fold(node: ir.Node, args: Sequence[Array | None]) -> Array | None:
    """The value of a node with constant inputs, or None where it is unknown, large or would fail at run time."""
    rule = FOLDS.get(node.op_type)
    if rule is None or not args or any(a is None for a in args):
        return None
    try:
        with np.errstate(all="ignore"):
            out = np.asarray(rule(node, [a for a in args if a is not None]))
    except (ValueError, IndexError, TypeError, ArithmeticError, MemoryError):
        return None  # a run-time error of the model is the runtime's to report
    return out if out.size <= MAX_ELEMENTS else None
