"""Neutral graphs computed in float64, and each norm that the recogniser finds in one against its formula.

Opaque results and inputs are random numbers, so that nothing but the algebra can make the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from normfuse.graph import FLOATS, Graph, Node, Value
from normfuse.norm import Expr, Norm
from normfuse.recognise import Recognition
from normfuse.transfer import RULES

Array = np.ndarray[Any, np.dtype[np.float64]]
SIZES = (3, 2, 5, 7, 4, 6)
"""What named axes are long, in the order in which the names are met."""
UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "square": np.square, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "reciprocal": np.reciprocal, "identity": lambda a: a, "cast": lambda a: a,
}  # fmt: skip
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power, "max": np.maximum,
    "matmul": np.matmul,
}  # fmt: skip


class Evaluation:
    """The values of a graph on one draw of its inputs; what has no known shape has none."""

    def __init__(self, graph: Graph, seed: int = 0, dims: dict[str, int] | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.dims = dict(dims or {})
        self.values: dict[Value, Array] = {}
        for value in graph.leaves:
            self._draw(value)
        with np.errstate(all="ignore"):
            for node in graph.nodes:
                self._step(node)

    def shape(self, value: Value) -> tuple[int, ...] | None:
        """The shape of a value, each name the same size wherever it stands."""
        if value.shape is None or None in value.shape:
            return None
        for d in value.shape:
            if isinstance(d, str) and d not in self.dims:
                self.dims[d] = SIZES[len(self.dims) % len(SIZES)]
        return tuple(d if isinstance(d, int) else self.dims[d] for d in value.shape if d is not None)

    def _draw(self, value: Value) -> None:
        shape = self.shape(value)
        if shape is not None and math.prod(shape) < 1 << 20:
            noise = self.rng.standard_normal(shape) + 0.4
            self.values[value] = np.full(shape, float(value.number)) if value.number is not None else noise

    def _step(self, node: Node) -> None:
        found = self._compute(node)
        for value in node.outputs:
            if found is not None:
                self.values[value] = found
            elif node.kind not in RULES or value.dtype not in FLOATS:
                self._draw(value)

    def _compute(self, node: Node) -> Array | None:
        operands = [self.values.get(v) for v in node.inputs]
        a, b = [*operands, None, None][:2]
        kind, attrs = node.kind, node.attrs
        if a is None or any(v.dtype not in FLOATS for v in (*node.inputs[:1], *node.outputs)):
            return None
        if kind in UNARY:
            return UNARY[kind](a)
        if kind in BINARY:
            try:
                return None if b is None else np.asarray(BINARY[kind](a, b))
            except ValueError:  # names that have to be of one size, which the graph does not know
                return None
        if kind in ("reshape", "unsqueeze", "squeeze"):
            return self._reshape(a, node.outputs[0])
        if kind == "expand":
            shape = self.shape(node.outputs[0])
            return None if shape is None else np.array(np.broadcast_to(a, shape))
        if kind == "transpose":
            return a.transpose(attrs["perm"])
        axes, keep = attrs.get("axes"), attrs.get("keepdims", True)
        if axes is None:
            return None
        if kind in ("mean", "sum"):
            return np.asarray(getattr(a, kind)(axis=axes, keepdims=keep))
        if kind in ("var", "std"):
            return np.asarray(getattr(a, kind)(axis=axes, keepdims=keep, ddof=attrs.get("correction", 0)))
        if kind == "vecnorm":
            return np.asarray(np.sqrt(np.square(a).sum(axis=axes, keepdims=keep)))
        if kind in ("layer_norm", "rms_norm"):
            return plain(kind, a, axes, attrs["eps"])
        return None

    def _reshape(self, a: Array, out: Value) -> Array | None:
        if out.shape is None:
            return None
        new = [d for d in dict.fromkeys(out.shape) if isinstance(d, str) and d not in self.dims]
        if len(new) == 1 and out.shape.count(new[0]) == 1:  # a name that this reshape gives its size
            self.dims[new[0]] = 1
            self.dims[new[0]] = a.size // max(math.prod(self.shape(out) or ()), 1)
        shape = self.shape(out)
        return a.reshape(shape) if shape is not None and a.size == math.prod(shape) else None

    def expr(self, expr: Expr) -> Array | None:
        """A weight or a bias."""
        total: Array = np.zeros(())
        for c, factors in expr:
            term: Array = np.full((), c)
            for value, exponent in factors:
                if value not in self.values:
                    return None
                term = term * self.values[value] ** float(exponent)
            total = total + term
        return total

    def norm(self, norm: Norm) -> Array | None:
        """What the record of a norm says that its value is; None where x or a parameter has no value."""
        x = self.values.get(norm.x)
        if x is None:
            return None
        out = plain(norm.kind, x, norm.axes, norm.eps)
        for expr, apply in ((norm.weight, np.multiply), (norm.bias, np.add)):
            if expr is not None:
                value = self.expr(expr)
                if value is None:
                    return None
                out = apply(out, value)
        return out


def plain(kind: str, x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """A norm without weight and bias."""
    if kind == "layer_norm":
        x = x - x.mean(axis=axes, keepdims=True)
    return np.asarray(x / np.sqrt(np.square(x).mean(axis=axes, keepdims=True) + eps))


def compare(found: Recognition, graph: Graph, dims: dict[str, int] | None = None) -> int:
    """Assert that each site has the value that its norm gives; how many could be compared."""
    run = Evaluation(graph, dims=dims)
    compared = 0
    for site in found.sites:
        want, got = run.values.get(site.value), run.norm(site.norm)
        if want is None or got is None:
            continue
        assert want.shape == got.shape, f"{site.label}: {got.shape} in place of {want.shape}"
        top = float(np.abs(want).max(initial=0.0))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * top, err_msg=site.label)
        x = run.values[site.norm.x]
        assert site.norm.size in (None, math.prod(x.shape[a] for a in site.norm.axes))
        compared += 1
    return compared
