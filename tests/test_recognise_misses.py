"""The recogniser condition by condition: the nearest miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Value
from normfuse.recognise import Recognition
from tests.build import Build, centred, codes, leaf, names, rms, rstd


def spoiled(*steps: Callable[[Build, Value, Value], Value]) -> tuple[Build, list[Value], Recognition]:
    g = Build()
    made = [step(g, g.x, g.mean(g.op("square", g.x))) for step in steps]
    return g, made, g.found(*made)


def test_a_statistic_that_goes_into_an_unknown_operator() -> None:
    _g, (v,), found = spoiled(lambda g, x, m: g.op("activation", g.op("sqrt", m)))
    assert codes(found) == [("NF106", v.name)] and found.refusals[0].message.endswith("not part of a norm")


@pytest.mark.parametrize("step", [
    lambda g, x, m: g.op("opaque", x),  # before any statistic
    lambda g, x, m: g.op("opaque", g.mean(x)),  # a mean is none of a norm yet
])  # fmt: skip
def test_a_miss_before_the_second_moment_is_not_told(step: Callable[[Build, Value, Value], Value]) -> None:
    g = Build()
    found = g.found(step(g, g.x, g.x))
    assert not found.refusals


def test_a_mean_that_lost_its_axis_is_told() -> None:
    g = Build((64, 64))
    found = g.found(g.op("sub", g.x, g.mean(g.x, (1,), keepdims=False), shape=(64, 64)))
    assert [r.code for r in found.refusals] == ["NF107"]


def test_the_miss_that_came_furthest_is_told_and_of_two_the_first() -> None:
    far = lambda g, x, m: g.op("add", g.op("rsqrt", g.op("add", m, g.c(1e-5))), leaf(g))  # noqa: E731
    near = lambda g, x, m: g.op("max", m, g.c(1.0))  # noqa: E731
    _g, (a, b), found = spoiled(near, far)
    assert codes(found) == [("NF104", b.name)], a
    _g, (a, b), found = spoiled(near, near)
    assert codes(found) == [("NF119", a.name)]
    _g, (a, b), found = spoiled(lambda g, x, m: g.op("opaque", g.op("rsqrt", m)), near)
    assert codes(found) == [("NF119", b.name)]  # NF106 says the least


def test_the_miss_of_a_norm_is_nearer_than_one_of_its_root() -> None:
    g = Build()
    r = rstd(g, centred(g, g.x))
    at_run_time = g.op("add", r, leaf(g))
    y = g.op("mul", g.x, r)
    assert codes(g.found(at_run_time, y)) == [("NF102", y.name)]


@pytest.mark.parametrize("step", [
    lambda g, x: g.op("mul", g.w, rstd(g, x), shape=("B", "S", 64)),  # a statistic, and a weight
    lambda g, x: g.op("mul", x, g.mean(g.op("square", x))),  # no root
    lambda g, x: g.op("squeeze", g.op("add", x, g.op("mul", g.mean(x), g.c(0.0))), axes=(2,), shape=("B", "S")),
])  # fmt: skip
def test_what_is_not_even_nearly_a_norm(step: Callable[[Build, Value], Value]) -> None:
    g = Build()
    found = g.found(step(g, g.x))
    assert not found.sites and not found.refusals


@pytest.mark.parametrize("step", [
    lambda g, x: g.op("mul", g.op("add", x, g.op("square", x)), rstd(g, x)),
    lambda g, x: g.op("abs", rms(g, x)),
    lambda g, x: g.op("mul", g.op("abs", x), rstd(g, x)),
])  # fmt: skip
def test_what_holds_a_square_or_a_magnitude_is_no_norm(step: Callable[[Build, Value], Value]) -> None:
    g = Build()
    y = step(g, g.x)
    assert y.name not in names(g.found(y))


def test_a_square_over_its_root_does_not_lack_an_eps() -> None:
    g = Build()
    found = g.found(g.op("mul", g.op("square", g.x), rstd(g, g.x)))
    assert not found.sites and [code for code, _ in codes(found)] == ["NF106"]


def test_a_miss_of_x_itself_is_none() -> None:
    g = Build()
    g.mean(g.x)
    found = g.found(g.op("squeeze", g.x, axes=(2,), shape=("B", "S")))
    assert not found.refusals


def test_a_mean_that_meets_another_tensor_is_not_told() -> None:
    g = Build()
    found = g.found(g.op("add", g.mean(g.x), leaf(g, "B", "S", 64)))
    assert not found.refusals and all(found.facts.values())


@pytest.mark.parametrize(("spell", "axes", "told"), [
    (lambda g, v: v, (0, 1, 2), False), (lambda g, v: g.op("mul", v, g.c(2.0)), (0, 1, 2), False),
    (lambda g, v: v, (1, 2), True),
    (lambda g, v: g.op("rsqrt", v), (0, 1, 2), True), (lambda g, v: g.op("opaque", v), (0, 1, 2), True),
    (lambda g, v: g.op("pow", v, g.c(0.5)), (0, 1, 2), True),
])  # fmt: skip
def test_a_loss_of_two_mean_squared_errors_is_nearly_no_norm(spell: Callable[[Build, Value], Value], axes: Any,
                                                                  told: bool) -> None:  # fmt: skip
    """Of a vector quantizer: mean(a^2) + b mean(c^2), over all there is, and no root taken of it."""
    g = Build((2, 3, 64))
    z = leaf(g, 2, 3, 64)
    a, c = (g.mean(g.op("square", v), axes, keepdims=len(axes) < 3) for v in (g.x, z))
    found = g.found(spell(g, g.op("add", a, g.op("mul", c, g.c(0.25)))))
    assert bool(found.refusals) is told and not found.sites


def test_a_loss_does_not_hide_what_is_told_after_it() -> None:
    g = Build((2, 3, 64))
    loss = g.op("add", *(g.mean(g.op("square", v), (0, 1, 2), keepdims=False) for v in (g.x, leaf(g, 2, 3, 64))))
    v = g.op("max", g.mean(g.op("square", leaf(g, 2, 3, 64, name="u"))), g.c(1.0))
    assert codes(g.found(loss, v)) == [("NF119", v.name)]


def test_an_axis_of_one_is_in_every_whole() -> None:
    g = Build((1, 1, 64))
    z = leaf(g, 1, 1, 64)
    found = g.found(g.op("add", *(g.mean(g.op("square", v)) for v in (g.x, z))))
    assert not found.refusals and not found.sites


def test_the_first_seed_without_a_miss_does_not_hide_the_next() -> None:
    g = Build()
    z = leaf(g, "B", "S", 64)
    g.mean(z)
    v = g.op("max", g.mean(g.op("square", g.x)), g.c(1.0))
    norm = rms(g, leaf(g, "B", "S", 64, name="u"))
    later = g.op("max", g.mean(g.op("square", leaf(g, "B", "S", 64, name="t"))), g.c(1.0))
    assert codes(g.found(v, norm, later)) == [("NF119", v.name), ("NF119", later.name)]


def test_a_cube_is_told_for_the_statistic_that_comes_of_it_only() -> None:
    g = Build()
    m = g.mean(g.op("square", g.x))
    cube = g.op("pow", g.x, g.c(3.0))
    v = g.op("max", m, g.c(1.0))
    assert codes(g.found(cube, v)) == [("NF119", v.name)]  # NF106 alone is explained by another miss
    h = Build()
    h.mean(h.x)
    assert not h.found(h.op("pow", h.x, h.c(3.0))).refusals  # and there was no statistic


def test_an_operator_without_results_ends_nothing() -> None:
    g = Build()
    n = rms(g, g.x)
    g.graph.node("opaque", [n], [], native=object(), name="print")
    y = g.op("mul", n, g.w)
    found = g.found(y)
    assert names(found) == [n.name]


def test_a_value_is_described_by_its_fact() -> None:
    g = Build()
    m = g.mean(g.op("opaque", g.x))
    found = g.found(m)
    assert found.describe(m) == "mean(v0)" and found.describe(g.x) == "x"


def test_a_lost_axis_is_told_where_nothing_came_further() -> None:
    g = Build((64, 64))
    g.op("neg", g.op("neg", g.op("opaque", g.x)))
    lost = g.op("sub", g.x, g.mean(g.x, (1,), keepdims=False), shape=(64, 64))
    further = g.op("add", g.mean(g.op("square", g.x), (1,)), leaf(g, 64, 1))
    assert codes(g.found(lost, further)) == [("NF106", further.name)]


def test_a_power_before_any_statistic_says_why_nothing_came_of_it() -> None:
    g = Build()
    fourth = g.op("pow", g.x, g.c(4.0))
    second = g.op("opaque", g.op("sqrt", g.mean(g.op("square", g.x))))
    found = g.found(g.mean(fourth), second)
    assert codes(found) == [("NF112", fourth.name)]


def test_each_norm_that_was_missed_is_told_once() -> None:
    g = Build()
    z = leaf(g, "B", "S", 64)
    out = [g.op("max", g.mean(g.op("square", v)), g.c(1.0)) for v in (g.x, z)]
    found = g.found(*out)
    assert codes(found) == [("NF119", v.name) for v in out]
    h = Build()
    m = h.mean(h.op("square", h.x))
    v = h.op("max", h.op("add", m, h.mean(h.op("square", h.x))), h.c(1.0))
    assert codes(h.found(v)) == [("NF119", v.name)]  # two seeds of one root


@pytest.mark.parametrize("fixed", [True, False])
def test_what_is_nearly_a_norm_of_constants_is_not_told(fixed: bool) -> None:
    """A weight norm: its statistic is taken once, whatever it is."""
    g = Build()
    v = leaf(g, 4, 5, 64, fixed=fixed, name="v")
    square = g.op("square", v)
    square.fixed = fixed  # as a front end says
    y = g.op("div", v, g.op("sqrt", g.mean(square)))
    assert codes(g.found(y)) == ([] if fixed else [("NF103", y.name)])


def test_a_root_with_a_norm_is_not_missed() -> None:
    g = Build()
    m = g.mean(g.op("square", g.x))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))
    found = g.found(y, g.op("max", m, g.c(1.0)))
    assert len(found.sites) == 1 and not found.refusals


def test_a_norm_with_a_flaw_is_missed_at_the_node_that_gives_it() -> None:
    g = Build()
    y = g.op("mul", g.x, rstd(g, centred(g, g.x)))
    assert codes(g.found(y)) == [("NF102", y.name)]
