"""What the tests of placements are built of."""

from __future__ import annotations

from collections.abc import Callable

from normfuse.graph import Node, Value
from normfuse.placement import Placer, place
from normfuse.recognise import recognise
from tests.build import Build, matrix, rms

ROWS = ("B", "S", 64)
Step = Callable[[Build, Value], Value]


def linear(g: Build, v: Value, bias: bool = False) -> Value:
    out = g.op("linear", v, matrix(g, 64, 64), shape=v.shape)
    return g.op("add", out, g.b) if bias else out


def norm(g: Build, v: Value) -> Value:
    return g.op("mul", rms(g, v), g.w)


def op(g: Build, v: Value) -> Value:
    """A norm as one operator."""
    return g.op("rms_norm", v, axes=((v.rank or 1) - 1,), eps=1e-5)


def placer(g: Build) -> Placer:
    return Placer(g.graph, recognise(g.graph).sites)


def producer(v: Value) -> Node:
    assert v.producer is not None
    return v.producer


def places(g: Build, *outputs: Value) -> list[str]:
    for value in outputs:
        value.kept = True
    sites = recognise(g.graph).sites
    place(g.graph, sites)
    return [site.placement for site in sites]
