"""Graphs written by hand, node by node, and what the recogniser says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normfuse.facts import formula
from normfuse.graph import Graph, Shape, Value
from normfuse.recognise import Recognition, recognise


class Build:
    """A graph under construction: each call appends a node and gives back its value."""

    def __init__(self, shape: Shape = ("B", "S", 64), dtype: str = "float32") -> None:
        self.graph = Graph()
        self.x = self.graph.leaf("x", shape, dtype)
        self.w = self.graph.leaf("w", shape[-1:], dtype, fixed=True)
        self.b = self.graph.leaf("b", shape[-1:], dtype, fixed=True)

    def c(self, number: float, dtype: str = "float32") -> Value:
        return self.graph.leaf(str(number), (), dtype, number=number, fixed=True)

    def op(self, kind: str, *inputs: Value, shape: Shape | None = None, dtype: str | None = None,
           **attrs: Any) -> Value:  # fmt: skip
        rank = max((v.rank or 0) for v in inputs)
        wide = next(v for v in inputs if (v.rank or 0) == rank)
        if shape is None and all(v.shape is not None for v in inputs):
            shape = tuple(max((v.shape[i - rank] for v in inputs if (v.rank or 0) >= rank - i and v.shape),
                              key=lambda d: d != 1) for i in range(rank))  # fmt: skip
        out = self.graph.value(f"v{len(self.graph.nodes)}", shape, dtype or wide.dtype)
        self.graph.node(kind, list(inputs), [out], native=object(), name=out.name, **attrs)
        return out

    def mean(self, v: Value, axes: tuple[int, ...] = (2,), keepdims: bool = True, kind: str = "mean") -> Value:
        assert v.shape is not None
        shape = tuple(1 if i in axes else d for i, d in enumerate(v.shape) if keepdims or i not in axes)
        return self.op(kind, v, shape=shape, axes=axes, keepdims=keepdims)

    def rstd(self, v: Value, eps: float = 1e-5) -> Value:
        return self.op("rsqrt", self.op("add", self.mean(self.op("square", v)), self.c(eps)))

    def found(self, *outputs: Value) -> Recognition:
        for value in outputs:
            value.kept = True
        return recognise(self.graph)


Spell = Callable[[Build], Value]


def rstd(g: Build, v: Value, axes: tuple[int, ...] = (2,), eps: float = 1e-5) -> Value:
    return g.op("rsqrt", g.op("add", g.mean(g.op("square", v), axes), g.c(eps)))


def rms(g: Build, v: Value, axes: tuple[int, ...] = (2,)) -> Value:
    return g.op("mul", v, rstd(g, v, axes))


def centred(g: Build, v: Value, axes: tuple[int, ...] = (2,)) -> Value:
    return g.op("sub", v, g.mean(v, axes))


def ln(g: Build, v: Value) -> Value:
    c = centred(g, v)
    return g.op("mul", c, rstd(g, c))


def leaf(g: Build, *shape: Any, name: str = "z", **more: Any) -> Value:
    return g.graph.leaf(name, shape, more.pop("dtype", "float32"), **more)


def opaque(g: Build, *inputs: Value, shape: Any = None, **more: Any) -> Value:
    """What an operator gives of which nothing is known."""
    out = g.op("opaque", *inputs, shape=shape)
    for key, value in more.items():
        setattr(out, key, value)
    return out


def roots(found: Recognition, value: Value) -> list[tuple[int, ...]]:
    """The axes over which a tensor is the root of facts."""
    return sorted(axes for index, axes in found.facts.get(value.index, {}) if index == value.index)


def facts(found: Recognition) -> list[str]:
    return [formula(site.fact, site.norm.x.name) for site in found.sites]


def names(found: Recognition) -> list[str]:
    return [site.value.name for site in found.sites]


def codes(found: Recognition) -> list[tuple[str, str]]:
    return [(r.code, r.node) for r in found.refusals]


def matrix(g: Build, *shape: Any, number: float | None = None) -> Value:
    return leaf(g, *shape, number=number, fixed=True)


def reads(shape: Shape, kind: str, axes: Any = (2,), **more: Any) -> Callable[[Build, Value], Value]:
    def make(g: Build, v: Value) -> Value:
        return g.op(kind, v, shape=shape, axes=axes, keepdims=True, **more)

    return make


def shapeless(v: Value) -> Value:
    v.shape = None
    return v


def node(g: Build, kind: str, *inputs: Value, shape: Any = None, **attrs: Any) -> Value:
    """A node whose shape is not worked out."""
    out = g.graph.value(f"v{len(g.graph.nodes)}", shape, "float32")
    g.graph.node(kind, list(inputs), [out], native=object(), name=out.name, **attrs)
    return out
