"""Each refusal of the algebra stops something that nothing else stops.

The guards of a code are switched off, and a near miss that they refused has to be taken for a norm; float64 then shows
that it is none, where it is not the roundings, the shapes or the future that make it none. A code whose guards can be
switched off without that must say so here.

Some guards refuse because something is not known: there the near miss is given what the core would have to assume, is a
norm then, and turns out to be none where it is something else. Guards that stand further on, in a pass, a conversion or
a check, are shown by what comes out without them.
"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest

import normfuse
from normfuse.centring import Centre
from normfuse.codes import CODES
from normfuse.config import Config
from normfuse.conversion import Candidates
from normfuse.frontends import onnx_convert
from normfuse.graph import Value
from normfuse.norm import region
from normfuse.passes import fuse_norm
from normfuse.passes.layernorm_to_rmsnorm import _Planner, convert
from normfuse.passes.remove_dead import live
from normfuse.passmanager import plan as planned
from normfuse.plan import Abilities
from normfuse.recognise import Recognition, recognise
from tests.mutation.battery import FILES
from tests.mutation.mutants import Source
from tests.mutation.runner import codes
from tests.near_misses import NEAR_MISSES
from tests.neutral import Evaluation, compare
from tests.test_centring import onnx_net
from tests.build import Build
from tests.conversion_tools import Net, counts, planned as conversion, reasons
from tests.spelling_files import session


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
    rstd = g.rstd(g.x)
    rstd.tainted = True
    return g.op("mul", g.x, rstd)


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
    "NF121": "says why; the mean of one element is that element, which is right",
    "NF202": "keeps the roundings: the operator of the target computes the same norm, with other low bits",
    "NF203": "says that the target's runtime would refuse the model, or take the operator apart",
    "NF303": "leaves a conversion that gains nothing, and would be right",
    "NF305": "stands ahead of a certificate that could tell nothing: of random numbers, or of weights without scales",
    "NF306": "leaves a conversion that gains nothing on the target, and would be right",
}
"""Codes that stop nothing that would be wrong, and what they are for."""

FURTHER_ON = ("NF116", "NF201", "NF301", "NF302", "NF304")
"""Codes of the passes, the conversions and the checks, each with a test of its own below."""


def sites(found: Recognition) -> list[tuple[str, bool]]:
    return [(site.value.name, site.norm.cast != "mixed") for site in found.sites]


def test_every_code_is_accounted_for() -> None:
    listed = [*ALONE, *NOT_KNOWN, *FURTHER_ON, *NOT_ALONE]
    assert sorted(listed) == sorted(CODES) and len(listed) == len(set(listed))


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


# -- what is not known ------------------------------------------------------------------------------------------------


def at_run_time(g: Build, known: bool, other: bool) -> Value:
    """rsqrt(m + eps), where eps is given by the caller."""
    eps = g.graph.leaf("eps", (), "float32", fixed=known, number=1e-5 if known else 0.5 if other else None)
    return g.op("mul", g.x, g.op("rsqrt", g.op("add", g.mean(g.op("square", g.x)), eps)))


def replaceable(g: Build, known: bool, other: bool) -> Value:
    """The same, where it is a constant that the caller may replace."""
    y = at_run_time(g, known, other)
    eps = next(v for v in g.graph.leaves if v.name == "eps")
    eps.fixed, eps.overridable = True, not known
    return y


def some_axes(g: Build, known: bool, other: bool) -> Value:
    """The axes of the mean are known at run time only: the last, or the one before."""
    axes = (2,) if known else (1,) if other else None
    m = g.op("mean", g.op("square", g.x), axes=axes, keepdims=True, shape=(5, 1, 5) if other else (5, 5, 1))
    return g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))), shape=(5, 5, 5))


def sized(g: Build, known: bool, other: bool) -> None:
    """The size of the last axis, for the caller to choose."""
    g.x.shape = (5, 5, 64 if known else 5 if other else "D")


def sum_of_some(g: Build, known: bool, other: bool) -> Value:
    """sum(x^2)/64 + eps, which is mean(x^2) + eps for 64 elements."""
    sized(g, known, other)
    total = g.op("mul", g.mean(g.op("square", g.x), kind="sum"), g.c(1 / 64))
    return g.op("mul", g.x, g.op("rsqrt", g.op("add", total, g.c(1e-5))))


def unbiased(g: Build, known: bool, other: bool) -> Value:
    """var(x) with a correction: another factor and eps for each size."""
    sized(g, known, other)
    var = g.op("var", g.x, axes=(2,), keepdims=True, correction=1, shape=(5, 5, 1))
    return g.op("div", g.op("sub", g.x, g.mean(g.x)), g.op("sqrt", g.op("add", var, g.c(1e-1))))


NOT_KNOWN: dict[str, tuple[Callable[[Build, bool, bool], Value], tuple[int, ...]]] = {
    "NF104": (at_run_time, (5, 5, 64)), "NF122": (replaceable, (5, 5, 64)), "NF114": (some_axes, (5, 5, 5)),
    "NF115": (sum_of_some, (5, 5, 64)), "NF110": (unbiased, (5, 5, 64)),
}  # fmt: skip
"""Code -> a near miss as the recogniser sees it, with what it would have to assume, and with something else."""


@pytest.mark.parametrize("code", NOT_KNOWN)
def test_what_is_not_known_may_not_be_assumed(code: str) -> None:
    spell, shape = NOT_KNOWN[code]
    g = Build(shape)
    y = spell(g, False, False)
    found = g.found(y)
    assert not found.sites and {r.code for r in found.refusals} == {code}
    assumed = Build(shape)
    (site,) = assumed.found(spell(assumed, True, False)).sites
    assert compare(recognise(assumed.graph), assumed.graph) == 1
    real = Build(shape)
    y = spell(real, False, True)
    run = Evaluation(real.graph)
    want, got = run.values[y], run.norm(replace(site.norm, x=real.x))
    assert got is not None and want.shape == got.shape
    assert abs(want - got).max() > 1e-3 * abs(want).max()


# -- guards that stop nothing wrong -----------------------------------------------------------------------------------


def too_many_terms(g: Build) -> Value:
    """A norm times a sum of 14 parameters."""
    total = g.w
    for i in range(13):
        total = g.op("add", total, g.graph.leaf(f"w{i}", (64,), "float32", fixed=True))
    return g.op("mul", g.op("mul", g.x, g.rstd(g.x)), g.op("add", g.mean(g.op("mul", g.x, g.c(0.0))), total))


def one_element(g: Build) -> Value:
    """The norm of a mean over an axis of size 1."""
    m = g.mean(g.x, (1,))
    return g.op("mul", m, g.rstd(m))


@pytest.mark.parametrize(("code", "spell", "shape"), [
    ("NF100", too_many_terms, (4, 5, 64)), ("NF121", one_element, (4, 1, 64)),
])  # fmt: skip
def test_without_a_guard_that_stops_nothing_wrong_all_stays_right(code: str, spell: Callable[[Build], Value],
                                                                  shape: tuple[int, ...]) -> None:  # fmt: skip
    g = Build(shape)
    y = spell(g)
    y.kept = True
    before = recognise(g.graph)
    assert compare(before, g.graph) == len(before.sites)
    with without(code) as count:
        assert count
        after = recognise(g.graph)
    assert y.name in [name for name, _ in sites(after)]
    assert compare(after, g.graph) == len(after.sites) > 0


# -- passes, conversions and checks -----------------------------------------------------------------------------------


def test_without_nf116_a_reduction_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Build()
    m = g.mean(g.op("square", g.x))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))
    for value in (y, g.op("opaque", m)):
        value.kept = True

    def twice() -> tuple[list[str], int]:
        plan = planned(g.graph, Config(), Abilities(lambda norm, value: None))
        alive = live(g.graph, plan.edits())
        (site,) = plan.found.sites
        nodes = [n for n in region(site.value, site.norm) if n.kind == "mean" and n in alive]
        return [r.code for r in plan.refused.values()], len(nodes) * len(plan.edits())

    assert twice() == (["NF116"], 0)  # the model's own mean, and no operator
    monkeypatch.setattr(fuse_norm, "computed_twice", lambda graph, edits, alive: {})
    assert twice() == ([], 1)  # the operator takes it once more


def test_without_nf301_a_norm_over_two_axes_is_taken_for_one_over_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Net()
    y = g.lin(g.norm(g.op("add", g.lin(g.x), g.held(1, 6, 8)), affine=False, axes=(1, 2)))
    assert [code for code, _ in reasons(conversion(g, y))] == ["NF301"]
    monkeypatch.setattr(Candidates, "_unfit", lambda self, site: None)
    monkeypatch.setattr(_Planner, "_drop", lambda self: False)
    monkeypatch.setattr(_Planner, "_wish", lambda self, site: (site.norm.x, Centre(2, ((0, 8),))))
    with pytest.raises(AssertionError, match="Not equal"):
        conversion(g, y)


def test_without_nf302_a_norm_loses_a_mean_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Net()
    y = g.lin(g.norm(g.act(g.lin(g.x))))
    assert [code for code, _ in reasons(conversion(g, y, place=lambda v: False))] == ["NF302"]
    monkeypatch.setattr(_Planner, "_refuse", lambda self, by, why: None)
    with pytest.raises(AssertionError, match="Not equal"):
        conversion(g, y, place=lambda v: False)


def test_without_nf303_there_are_more_operators_and_equal_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Net()
    y = g.lin(g.norm(g.act(g.lin(g.x))))
    assert [code for code, _ in reasons(conversion(g, y))] == ["NF303"]
    monkeypatch.setattr(_Planner, "_drop", lambda self: False)
    assert counts(conversion(g, y)) == (1, 1, 0)  # carried out in numbers there


def outputs(path: Path, feeds: dict[str, Any]) -> Any:
    return session(path).run(None, feeds)[0]


def test_without_nf201_a_fault_of_the_core_comes_out(tmp_path: Path) -> None:
    case = NEAR_MISSES["not_centred_above"]
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(case.build(), source)
    feeds = case.inputs(np.random.default_rng(0))
    want = outputs(source, feeds)
    with without("NF102"):
        report = normfuse.rewrite(source, target)
        assert [r.code for r in report.refusals] == ["NF201"] and not report.fused
        assert np.array_equal(outputs(target, feeds), want)
        report = normfuse.rewrite(source, target, Config(verify="off"), overwrite=True)
    assert report.fused == 1 and abs(outputs(target, feeds) - want).max() > 0.1


def test_without_nf304_a_fault_of_a_conversion_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = onnx_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"

    def faulty(*args: Any) -> Any:
        found = convert(*args)
        found.edits.pop(next(iter(found.edits)))
        return found

    monkeypatch.setattr(onnx_convert, "convert", faulty)
    exact = Config(layernorm_to_rmsnorm="exact")
    report = normfuse.rewrite(source, target, exact)
    assert report.converted == 0 and "NF304" in {r.code for r in report.refusals}
    monkeypatch.setattr(onnx_convert, "certify", lambda *args: None)
    assert normfuse.rewrite(source, target, exact, overwrite=True).converted == 1
    models: list[Any] = [onnx.reference.ReferenceEvaluator(onnx.load(p)) for p in (source, target)]
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    want, got = (model.run(None, {"x": x})[0] for model in models)
    assert abs(want - got).max() > 1e-2
