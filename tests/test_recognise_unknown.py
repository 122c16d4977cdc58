"""The recogniser condition by condition: what is written in place, and what is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from normfuse.graph import Value
from normfuse.norm import Refusal
from normfuse.recognise import MAX_READERS
from tests.build import Build, Spell, codes, leaf, node, opaque, reads, rms, roots, rstd


@pytest.mark.parametrize(("statistic", "code"), [
    (lambda g: g.mean(g.op("square", g.x)), "NF120"),
    (lambda g: g.mean(g.op("pow", g.x, g.c(2.0))), "NF120"),
    (lambda g: reads(("B", "S", 1), "var")(g, g.x), "NF120"),
    (lambda g: reads(("B", "S", 1), "std")(g, g.x), "NF120"),
    (lambda g: reads(("B", "S", 1), "vecnorm")(g, g.x), "NF120"),
    (lambda g: g.mean(g.x), ""),  # a mean alone says nothing
    (lambda g: g.mean(g.op("neg", g.x)), ""),
])  # fmt: skip
def test_a_tensor_that_is_written_in_place_is_no_root(statistic: Spell, code: str) -> None:
    g = Build()
    g.x.tainted = True
    for step in g.graph.nodes:
        step.outputs[0].tainted = True
    v = statistic(g)
    for step in g.graph.nodes:
        step.outputs[0].tainted = step.outputs[0] is not v
    found = g.found(v)
    assert codes(found) == ([(code, v.name)] if code else []) and roots(found, g.x) == []


def test_a_row_that_is_written_in_place_is_told_whatever_scales_it() -> None:
    g = Build()
    row, factor = leaf(g, "B", "S", 64, fixed=True), leaf(g, 1, 1, 1, fixed=True)
    row.tainted = factor.tainted = True
    v = g.op("mul", row, factor)
    square = g.op("square", v)
    v.tainted = square.tainted = True
    m = g.mean(square)
    assert codes(g.found(m)) == [("NF120", m.name)]


def test_a_copy_taken_before_a_write_is_a_root() -> None:
    g = Build()
    g.x.tainted = True
    copy = g.op("identity", g.x)
    found = g.found(rms(g, copy))
    assert [site.norm.x.name for site in found.sites] == [copy.name] and not found.refusals
    assert roots(found, g.x) == []


def test_a_step_that_is_written_in_place_ends_a_norm() -> None:
    g = Build()
    r = rstd(g, g.x)
    r.tainted = True
    y = g.op("mul", g.x, r)
    found = g.found(y)
    assert not found.sites and codes(found) == [("NF120", y.name)]
    assert found.refusals[0].message.startswith(f"{r.name} or a view of it is written in place")


@pytest.mark.parametrize("copy", ["identity", "cast", "reshape", ""])
def test_a_norm_that_is_written_in_place_later_is_one(copy: str) -> None:
    """Where the operation that ends it makes new memory; and what reads it may see something else."""
    g = Build()
    n = rms(g, g.x)
    y = g.op("mul", n, leaf(g, 64, fixed=True)) if not copy else g.op(copy, n)
    y.tainted = True
    n.tainted = bool(copy)
    z = g.op("mul", y, leaf(g, 64, fixed=True))
    z.kept = True
    found = g.found(z)
    assert [site.value for site in found.sites] == [n if copy else y]


def test_no_row_is_written_in_place_where_there_is_none() -> None:
    g = Build(("B", "S", 1))
    assert not g.found(g.mean(g.op("square", g.x))).refusals
    g.x.tainted = True
    assert not g.found(g.mean(g.op("square", g.x))).refusals
    h = Build()
    full = leaf(h, "B", "S", 64, number=1.0, fixed=True, dtype="int64")
    assert not h.found(h.mean(h.op("square", full), kind="sum")).refusals


def unknown(kind: str) -> tuple[Build, Value]:
    g = Build()
    z = g.graph.leaf("z", None, "float32")
    return g, node(g, kind, z, axes=(-1,), keepdims=True)


@pytest.mark.parametrize(("kind", "code"), [("mean", "NF115"), ("var", "NF115"), ("std", "NF115"), ("sum", ""),
                                            ("vecnorm", "")])  # fmt: skip
def test_a_statistic_of_a_tensor_of_unknown_shape(kind: str, code: str) -> None:
    g, v = unknown(kind)
    found = g.found(g.op("sqrt", v))
    assert codes(found) == ([(code, v.name)] if code else []) and not found.facts


@pytest.mark.parametrize(("kind", "dtype", "code"), [
    ("mean", "int64", "NF113"), ("sum", "int64", ""), ("mean", None, ""), ("mean", "bfloat16", ""),
])  # fmt: skip
def test_the_mean_of_integers(kind: str, dtype: str | None, code: str) -> None:
    g = Build()
    z = g.graph.leaf("z", ("B", 64), dtype)
    v = g.mean(z, (1,), kind=kind)
    assert codes(g.found(g.op("sqrt", v, shape=v.shape))) == ([(code, v.name)] if code else [])


def test_axes_that_are_known_only_at_run_time() -> None:
    g = Build()
    v = g.op("mean", g.x, axes=None, keepdims=True, shape=("B", "S", 1))
    found = g.found(g.op("sqrt", v))
    assert codes(found) == [("NF114", v.name)] and not found.facts


def raised(exponent: float | None) -> Callable[[Build, Value], Value]:
    return lambda g, v: g.op("pow", v, g.w if exponent is None else g.c(exponent))


@pytest.mark.parametrize(("after", "told"), [
    (lambda g, v: v, False),
    (lambda g, v: g.op("sqrt", v), True),
    (lambda g, v: g.op("rsqrt", v), True),
    (lambda g, v: node(g, "std", v, axes=(-1,), keepdims=True), True),
    (lambda g, v: node(g, "vecnorm", v, axes=(-1,), keepdims=True), True),
    (raised(0.5), True), (raised(-0.5), True), (raised(None), True), (raised(2.0), False), (raised(-1.0), False),
    (lambda g, v: g.op("sqrt", node(g, "mean", g.op("square", g.op("sub", g.w, v)), axes=(-1,), keepdims=True)), True),
    (lambda g, v: g.op("sqrt", node(g, "reshape", v)), True),
    (lambda g, v: g.op("sqrt", opaque(g, v)), False),
    (lambda g, v: g.op("matmul", v, g.w), False),
    (lambda g, v: g.op("neg", g.op("add", v, g.op("sqrt", g.w))), False),
])  # fmt: skip
def test_a_mean_of_which_nothing_is_known_is_told_where_a_root_follows(after: Callable[[Build, Value], Value],
                                                                       told: bool) -> None:  # fmt: skip
    """Squeeze and excitation, pooling and the like take means too, which are no norms."""
    g, v = unknown("mean")
    assert (("NF115", v.name) in codes(g.found(after(g, v)))) is told


def test_of_two_readers_one_with_a_root_is_enough() -> None:
    g, v = unknown("mean")
    assert codes(g.found(g.op("neg", v), g.op("sqrt", g.op("neg", v)))) == [("NF115", v.name)]


def test_a_reader_is_looked_at_once() -> None:
    """Eight sums of a value with itself are eight nodes, and 256 ways."""
    g, v = unknown("mean")
    for _ in range(8):
        v = g.op("add", v, v)
    assert not codes(g.found(v))


@pytest.mark.parametrize(("readers", "told"), [(MAX_READERS - 1, False), (MAX_READERS, True)])
def test_so_many_readers_are_looked_at(readers: int, told: bool) -> None:
    """The statistic counts too; of more than those one may take a root."""
    g, v = unknown("mean")
    for _ in range(readers):
        g.op("neg", v)
    assert bool(codes(g.found(v))) is told
    assert MAX_READERS == 64


def test_notes_of_the_front_end_are_refusals() -> None:
    g = Build()
    g.graph.notes.append(("NF106", "node", "text"))
    assert g.found(rms(g, g.x)).refusals == [Refusal("NF106", "node", "text")]
