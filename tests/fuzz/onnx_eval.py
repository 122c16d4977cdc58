"""A small evaluator of ONNX models in float64: a dict from operator to numpy, and the control flow.

`onnx.reference` does the same and takes milliseconds a model; this takes microseconds a node. It knows what the
generator writes and what NormFuse puts in its place; anything else is a KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from tests.fuzz.program import Array

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
Attrs = dict[str, Any]


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _reduce(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(a: Attrs, x: Array, axes: Array | None = None) -> Any:
        over = a.get("axes") if axes is None else [int(i) for i in axes]
        if not over and a.get("noop_with_empty_axes"):
            return x
        return fn(x, tuple(over) if over else None, bool(a.get("keepdims", 1)))

    return run


def _norm(centre: bool) -> Callable[..., Any]:
    def run(a: Attrs, x: Array, scale: Array | None = None, bias: Array | None = None) -> Any:
        axes = tuple(range(a.get("axis", -1) % x.ndim, x.ndim))
        mean = x.mean(axes, keepdims=True)
        h = x - mean if centre else x
        rstd = 1 / np.sqrt(np.square(h).mean(axes, keepdims=True) + a.get("epsilon", 1e-5))
        y = h * rstd
        y = y if scale is None else y * scale
        return (y if bias is None else y + bias), mean, rstd

    return run


def _skip(centre: bool) -> Callable[..., Any]:
    def run(a: Attrs, x: Array, skip: Array, gamma: Array | None = None, *more: Array | None) -> Any:
        given = [*more, None, None]
        beta, bias = (given[0], given[1]) if centre else (None, given[0])
        total = x + skip if bias is None else x + bias + skip
        y = _norm(centre)({"epsilon": a.get("epsilon", 1e-12)}, total, gamma, beta)[0]
        return y, None, None, total

    return run


def _cast(a: Attrs, x: Array) -> Array:
    kind: Any = np.float64 if a["to"] in FLOATS else onnx.helper.tensor_dtype_to_np_dtype(a["to"])
    return x.astype(kind)


def _constant(a: Attrs) -> Array:
    (value,) = a.values()
    if isinstance(value, TensorProto):
        return _wide(numpy_helper.to_array(value))
    return np.asarray(value, np.float64 if isinstance(value, float) else None)


def _view(a: Attrs, x: Array, axes: Array | None = None) -> tuple[int, ...]:
    return tuple(int(i) for i in (a["axes"] if axes is None else axes))


def _reshape(a: Attrs, x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[i] if d == 0 and not a.get("allowzero") else int(d) for i, d in enumerate(shape)])


def _slice(a: Attrs, x: Array, *bounds: Array) -> Array:
    index = [slice(None)] * x.ndim
    starts, ends, axes = bounds or (a["starts"], a["ends"], a["axes"])
    for axis, s, e in zip(axes, starts, ends, strict=True):
        index[int(axis)] = slice(int(s), int(e))
    return x[tuple(index)]


OPS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y, "Sub": lambda a, x, y: x - y, "Mul": lambda a, x, y: x * y,
    "Sum": lambda a, x, y: x + y,
    "Div": lambda a, x, y: x / y, "Pow": lambda a, x, y: x ** y, "Neg": lambda a, x: -x,
    "Abs": lambda a, x: np.abs(x), "Sqrt": lambda a, x: np.sqrt(x), "Reciprocal": lambda a, x: 1 / x,
    "Max": lambda a, *xs: np.maximum.reduce(xs) if len({x.shape for x in xs}) == 1 else np.maximum(*xs),
    "Min": lambda a, *xs: np.minimum(*xs), "Identity": lambda a, x: x, "Relu": lambda a, x: np.maximum(x, 0.0),
    "Tanh": lambda a, x: np.tanh(x), "Sigmoid": lambda a, x: 1 / (1 + np.exp(-x)), "Cast": _cast,
    "MatMul": lambda a, x, y: x @ y, "Constant": _constant,
    "Einsum": lambda a, *xs: np.einsum(a["equation"].decode(), *xs),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keepdims=keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keepdims=keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: (x * x).sum(axes, keepdims=keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: np.sqrt((x * x).sum(axes, keepdims=keep))),
    "ReduceMax": _reduce(lambda x, axes, keep: x.max(axes, keepdims=keep)),
    "Unsqueeze": lambda a, x, axes=None: np.expand_dims(x, _view(a, x, axes)),
    "Squeeze": lambda a, x, axes=None: np.squeeze(x, _view(a, x, axes)),
    "Reshape": _reshape, "Expand": lambda a, x, s: x * np.ones([int(d) for d in s]),
    "Transpose": lambda a, x: x.transpose(a.get("perm")), "Slice": _slice,
    "Shape": lambda a, x: np.array(x.shape, np.int64), "Concat": lambda a, *xs: np.concatenate(xs, a["axis"]),
    "LayerNormalization": _norm(True), "RMSNormalization": _norm(False), "SimplifiedLayerNormalization": _norm(False),
    "SkipLayerNormalization": _skip(True), "SkipSimplifiedLayerNormalization": _skip(False),
}  # fmt: skip

_FIELDS = {AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s", AttributeProto.TENSOR: "t",
           AttributeProto.GRAPH: "g"}  # fmt: skip


def _value(attr: AttributeProto) -> Any:
    if attr.type in _FIELDS:
        return getattr(attr, _FIELDS[attr.type])
    return list(attr.ints if attr.type == AttributeProto.INTS else attr.floats)


class Model:
    """A model that is to be run several times."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.fixed = {t.name: _wide(numpy_helper.to_array(t)) for t in model.graph.initializer}
        self.attrs: dict[int, Attrs] = {}

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in order, all floats in float64."""
        env: dict[str, Any] = {**self.fixed, **feeds}
        with np.errstate(all="ignore"):
            self._nodes(self.graph.node, env, {})
        return [env[o.name] for o in self.graph.output]

    def _nodes(self, nodes: Any, env: dict[str, Any], given: Attrs) -> None:
        for node in nodes:
            attrs = {}
            for attr in node.attribute:
                if not attr.ref_attr_name:
                    attrs[attr.name] = _value(attr)
                elif attr.ref_attr_name in given:
                    attrs[attr.name] = given[attr.ref_attr_name]
            args = [env[name] if name else None for name in node.input]
            found = self._node(node, attrs, args, env)
            outputs = found if isinstance(found, tuple) else (found,)
            env.update(zip(node.output, outputs, strict=False))

    def _node(self, node: NodeProto, attrs: Attrs, args: list[Any], env: dict[str, Any]) -> Any:
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            inner = dict(zip(function.input, args, strict=False))
            self._nodes(function.node, inner, attrs)
            return tuple(inner[name] for name in function.output)
        if node.op_type == "If":
            return self._branch(attrs["then_branch" if bool(args[0]) else "else_branch"], env, {})
        if node.op_type == "Loop":
            carried: tuple[Any, ...] = tuple(args[2:])
            body = attrs["body"]
            for i in range(int(args[0])):
                named = dict(zip([v.name for v in body.input], (np.array(i), np.array(True), *carried), strict=True))
                carried = self._branch(body, env, named)[1:]
            return carried
        return OPS[node.op_type](attrs, *args)

    def _branch(self, graph: GraphProto, env: dict[str, Any], more: dict[str, Any]) -> tuple[Any, ...]:
        local = {**env, **{t.name: _wide(numpy_helper.to_array(t)) for t in graph.initializer}, **more}
        self._nodes(graph.node, local, {})
        return tuple(local[o.name] for o in graph.output)
