"""Each refusal of the algebra stops something that nothing else stops.

The guards of a code are switched off, and a near miss that they refused has to be taken for a norm; float64 then shows
that it is none, where it is not the roundings, the shapes or the future that make it none. A code whose guards can be
switched off without that must say so here.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType

import pytest

from normfuse.codes import CODES
from normfuse.graph import Value
from normfuse.recognise import Recognition, recognise
from tests.mutation.battery import FILES
from tests.mutation.mutants import Source
from tests.mutation.runner import codes
from tests.neutral import compare
from tests.test_recognise import Build


class _Off(ast.NodeTransformer):
    """Takes the guards of one code out of a tree: the conditions that refuse with it are never true.

    A `raise` without a condition, where no rule is left, is no guard: there is nothing to go on with."""

    def __init__(self, code: str) -> None:
        self.code, self.count = code, 0

    def _refuses(self, node: ast.AST) -> bool:
        """Whether a node refuses with the code, not under a condition of its own."""
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused":
            return ast.unparse(node.args[0]) == repr(self.code)
        return not isinstance(node, ast.If) and any(map(self._refuses, ast.iter_child_nodes(node)))

    def visit_If(self, node: ast.If) -> ast.AST:
        if any(map(self._refuses, node.body)):
            self.count += 1
            node.test = ast.copy_location(ast.Constant(False), node.test)
            node.body = [ast.copy_location(ast.Pass(), node.body[0])]
        return self.generic_visit(node)


@contextmanager
def without(code: str) -> Iterator[int]:
    """The core with the guards of a code switched off; gives how many there are."""
    changed: list[tuple[FunctionType, object]] = []
    count = 0
    functions = [f for f in gc.get_objects() if type(f) is FunctionType]
    for source in map(Source, FILES):
        off = _Off(code)
        tree = off.visit(source.tree)
        count += off.count
        if not off.count:
            continue
        new = {(c.co_qualname, c.co_firstlineno): c for c in codes(compile(tree, str(source.path), "exec"))}
        for function in functions:
            key = (function.__code__.co_qualname, function.__code__.co_firstlineno)
            if function.__module__ == source.module and key in new and "<" not in key[0]:
                changed.append((function, function.__code__))
                function.__code__ = new[key]
    try:
        yield count
    finally:
        for function, old in changed:
            function.__code__ = old  # type: ignore[assignment]


# -- near misses that one code alone stops ----------------------------------------------------------------------------

NearMiss = Callable[[], tuple[Build, Value]]


def half_kept(g: Build) -> Value:
    """x * (1 + rstd): one term of two is scaled by the root."""
    return g.op("add", g.x, g.op("mul", g.x, g.rstd(g.x)))


def no_centre(g: Build) -> Value:
    c = g.op("sub", g.x, g.mean(g.x))
    return g.op("mul", g.x, g.rstd(c))


def no_eps(g: Build) -> Value:
    return g.op("mul", g.x, g.rstd(g.x, eps=-1e-5))


def no_root(g: Build) -> Value:
    return g.op("div", g.x, g.op("add", g.mean(g.op("square", g.x)), g.c(1e-5)))


def half_centred(g: Build) -> Value:
    """(x - mean(x)) * rsqrt(mean(x^2) - mean(x)^2 / 2 + eps)"""
    mean = g.mean(g.x)
    half = g.op("mul", g.op("square", mean), g.c(0.5))
    under = g.op("add", g.op("sub", g.mean(g.op("square", g.x)), half), g.c(1e-5))
    return g.op("mul", g.op("sub", g.x, mean), g.op("rsqrt", under))


def no_kept_axis(g: Build) -> Value:
    m = g.mean(g.op("square", g.x), (1,), keepdims=False)
    return g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))


def magnitude(g: Build) -> Value:
    return g.op("mul", g.op("abs", g.x), g.rstd(g.x))


def clamped(g: Build) -> Value:
    m = g.op("max", g.mean(g.op("square", g.x)), g.c(4.0))
    return g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))


def truncated(g: Build) -> Value:
    return g.op("cast", g.op("mul", g.x, g.rstd(g.x)), dtype="int32")


def wider_bias(g: Build) -> Value:
    wide = g.graph.leaf("wide", (8, 1, 64), "float32", fixed=True)
    return g.op("add", g.op("mul", g.x, g.rstd(g.x)), wide, shape=(8, 5, 64))


def weight_per_row(g: Build) -> Value:
    rows = g.graph.leaf("rows", (5, 1), "float32", fixed=True)
    return g.op("mul", g.op("mul", g.x, g.rstd(g.x)), rows)


def rounded_statistic(g: Build) -> Value:
    m = g.op("cast", g.mean(g.op("square", g.x)), dtype="float32")
    r = g.op("cast", g.op("rsqrt", g.op("add", m, g.c(1e-3))), dtype="float16")
    return g.op("mul", g.x, r)


def written(g: Build) -> Value:
    y = g.op("mul", g.x, g.rstd(g.x))
    y.tainted = True
    return y


ALONE: dict[str, list[tuple[Callable[[Build], Value], Build, bool]]] = {}
"""Code -> near misses (how to spell it, in which graph, whether float64 tells that it is no norm)."""


def alone(code: str, spell: Callable[[Build], Value], *shape: int, dtype: str = "float32", told: bool = True) -> None:
    ALONE.setdefault(code, []).append((spell, Build(shape or (4, 5, 64), dtype), told))


alone("NF101", half_kept)
alone("NF102", no_centre)
alone("NF103", no_eps, told=False)  # another row than these gives a division by zero
alone("NF105", no_root)
alone("NF106", half_centred)
alone("NF107", no_kept_axis, 64, 64)
alone("NF108", wider_bias, 1, 5, 64, told=False)  # a norm keeps the shape of x
alone("NF109", weight_per_row, 4, 5, 64, told=False)  # a norm has one weight for all rows
alone("NF112", magnitude)
alone("NF113", truncated)
alone("NF117", rounded_statistic, 4, 5, 64, dtype="float16", told=False)  # roundings
alone("NF119", clamped)
alone("NF120", written, told=False)  # what is written is not in the neutral graph

NOT_ALONE = {
    "NF100": "bounds the time; a formula with more terms is no norm either",
    "NF104": "says why; a parameter under the root is another statistic to NF106, two roots to NF101",
    "NF110": "without a size there is no number to go on with",
    "NF114": "without axes there is nothing to go on with",
    "NF115": "without a shape there is nothing to go on with",
    "NF116": "saves time: a reduction would be computed twice",
    "NF121": "says why; the statistics of one element are no root",
    "NF122": "says why; what callers may replace is no number, and no eps to NF104",
}
"""Codes of the recogniser that stop nothing that would be wrong, and what they are for."""


def sites(found: Recognition) -> list[tuple[str, bool]]:
    return [(site.value.name, site.norm.cast != "mixed") for site in found.sites]


def test_every_code_of_the_recogniser_is_accounted_for() -> None:
    assert not ALONE.keys() & NOT_ALONE.keys()
    assert ALONE.keys() | NOT_ALONE.keys() == {code for code in CODES if code.startswith("NF1")}


@pytest.mark.parametrize("code", ALONE)
def test_a_guard_that_is_switched_off_is_missed(code: str) -> None:
    for spell, g, told in ALONE[code]:
        y = spell(g)
        y.kept = True
        before = recognise(g.graph)
        assert (y.name, True) not in sites(before)
        assert compare(before, g.graph) == len(before.sites)
        with without(code) as count:
            assert count
            after = recognise(g.graph)
        assert (y.name, True) in sites(after), f"{spell.__name__}: something else stops it too"
        if told:
            with pytest.raises(AssertionError):
                compare(after, g.graph)
        assert sites(recognise(g.graph)) == sites(before)
