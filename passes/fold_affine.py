"""Fold the bias of a norm, or its weight, into the linear layers that read it.

    y = rms_norm(x) * g + b;  z = W y + c      becomes      y = rms_norm(x) * g;  z = W y + (c + W b)
                                               or           y = rms_norm(x);      z = (W diag(g)) y + ...

Only where every reader is a linear layer or an unpadded convolution over the norm's axis whose constants nobody else
reads but those that read a norm with the same weight and bias (a layer that is called again, or in both branches of an
If), and the norm is no output of the graph. A bias that is zero all over needs no reader.

The weight: FlashNorm (Graef et al. 2024, arXiv 2407.09577).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from normfuse.centring import Blocked, Centre, Channels, back, constant_behind
from normfuse.graph import Graph, Node, Value
from normfuse.norm import Expr
from normfuse.passes.remove_dead import live

MAX_WALK = 64
PROBE = ((0, 1),)
"""A block that comes back as it is where an axis stays an axis of its own."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """A linear layer over axis `over` of its weight, giving axis `gives`; `bias` is None where it has none, `out` is
    its result, the bias in it."""

    node: Node
    weight: Value
    over: int
    gives: int
    bias: Value | None
    out: Value

    def product(self, w: Any, b: Any) -> Any:
        """W b, summed over everything but the channels of the result."""
        return np.moveaxis(self.scaled(w, b), self.gives, 0).reshape(w.shape[self.gives], -1).sum(axis=1)

    def scaled(self, w: Any, g: Any) -> Any:
        """W diag(g)."""
        shape = [1] * w.ndim
        shape[self.over] = -1
        return w * g.reshape(shape)


Linear = Callable[[Node, Value, int], Contraction | None]
"""A front end's table: the linear layer that a node is, over an axis of the value that it reads."""


class Readers:
    """Finds the linear layers of a graph that read a value, and tells whether anything else reads their constants."""

    def __init__(self, graph: Graph, linear: Linear, channels: Channels, twins: Callable[[Value], Hashable]) -> None:
        self.linear, self.channels, self.twins = linear, channels, twins
        self.alive = live(graph)
        self.reads: dict[Hashable, int] = {}
        for v in graph.leaves:
            count = v.kept + sum(node in self.alive for node in v.uses)
            self.reads[twins(v)] = self.reads.get(twins(v), 0) + count

    def of(self, value: Value, axis: int) -> list[Contraction] | None:
        """The linear layers that read a value over an axis, views aside; None where anything else does."""
        found: list[Contraction] = []
        todo = [(value, axis)]
        while todo:
            v, at = todo.pop()
            if v.kept or v.tainted or len(found) > MAX_WALK:
                return None
            for node in dict.fromkeys(v.uses):
                if node not in self.alive:
                    continue
                one = self.linear(node, v, at)
                if one is not None:
                    found.append(one)
                    continue
                below = _view(node, v, at, self.channels)
                if below is None:
                    return None
                todo.append(below)
        return found or None

    def keys(self, one: Contraction) -> list[Hashable]:
        """What stands for the constants of a layer."""
        return [self.twins(v) for v in (one.weight, one.bias) if v is not None]

    def alone(self, found: Sequence[Contraction]) -> bool:
        """Whether nothing but these layers reads their constants, and those that share one share all."""
        count = Counter(key for one in found for key in self.keys(one))
        each = {(one.weight, one.bias, one.over, one.gives): one for one in found}.values()
        return sum(len(self.keys(one)) for one in each) == len(count) and all(
            self.reads[key] == n for key, n in count.items())  # fmt: skip


def _view(node: Node, value: Value, axis: int, channels: Channels) -> tuple[Value, int] | None:
    """A view or copy of a value, and where its axis is in it."""
    if node.kind not in ("identity", "reshape", "transpose", "unsqueeze", "squeeze", "expand"):
        return None
    out = node.outputs[0]
    for at in range(out.rank or 0):
        want = Centre(at, PROBE)
        with suppress(Blocked):
            if back(node, out, want, channels, lambda v: False) == [(value, want.moved(axis))]:
                return out, at
    return None


def leaf_of(value: Value, axes: tuple[int, ...], channels: Channels) -> tuple[Value, tuple[int, ...]] | None:
    """The constant that a weight is a view of that nothing else reads, and where its axes are in it."""
    for _ in range(MAX_WALK):
        node = value.producer
        if node is None:
            return (value, axes) if value.fixed and value.native is not None and not value.overridable else None
        if node.kind not in ("identity", "reshape", "transpose", "unsqueeze", "squeeze") or value.shape is None:
            return None
        if len(value.uses) > 1 or value.kept:
            return None
        found = []
        for axis in axes:
            want = Centre(axis, PROBE)
            try:
                ((_, behind),) = back(node, value, want, channels, lambda v: False)
            except Blocked:
                return None
            if behind.blocks != want.blocks:
                return None
            found.append(behind.axis)
        value, axes = node.inputs[0], tuple(found)
    return None


def contraction(node: Node, weight: Value, over: int, gives: int, bias: Value | None, channels: Channels,
                out: Value | None = None) -> Contraction | None:  # fmt: skip
    """The linear layer, if its weight is a constant or a view of one; a bias that is none is taken for no bias."""
    found = leaf_of(weight, (over, gives), channels)
    if found is None:
        return None
    (leaf, (over, gives)), out = found, out or node.outputs[0]
    if bias is not None:
        settled = bias.producer is None and bias.fixed and not bias.overridable and bias.native is not None
        assert leaf.shape is not None
        if not settled or bias.shape is None or bias.shape[-1:] != (leaf.shape[gives],) or any(
                d != 1 for d in bias.shape[:-1]):
            bias = None
    return Contraction(node, leaf, over, gives, bias, out)


def elements(expr: Expr, size: int, give: Callable[[Value], Any]) -> Any:
    """A weight or bias made of constants, in float64."""
    total = np.zeros(size)
    for c, factors in expr:
        term: Any = np.full((), c)
        for value, exponent in factors:
            term = term * give(value).reshape(-1) ** exponent
        total = total + term
    return total


def constants(expr: Expr | None) -> Expr | None:
    """A weight or bias, of the constants that its factors are views of; None where it is made of anything else."""
    if expr is None or not any(factors for _, factors in expr):
        return None
    found = tuple((c, tuple((constant_behind(v), e) for v, e in factors)) for c, factors in expr)
    known = all(v is not None for _, factors in found for v, _ in factors)
    return cast("Expr", found) if known else None
