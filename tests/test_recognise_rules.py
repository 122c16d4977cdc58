"""The recogniser condition by condition: products with matrices, and what is a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.facts import formula
from normfuse.graph import Shape, Value
from tests.build import Build, Spell, codes, facts, leaf, matrix, opaque, rms, roots, shapeless
from tests.neutral import compare

ROW = (("B", "S", 64), (2,))


# -- products with matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "product", "over"), [
    ((8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64, 1, number=1 / 64), shape=(8, 1)), (1,)),
    ((8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64, 64, number=1 / 64), shape=(8, 64)), (1,)),
    ((8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64, number=1 / 64), shape=(8,)), (1,)),
    ((8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64), shape=(8,)), (1,)),
    ((8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64, 1), shape=(8, 1)), (1,)),
    ((8, 64), lambda g, x: g.op("matmul", x, g.op("opaque", x, shape=(64, None)), shape=(8, None)), (1,)),
    ((3, 8, 64), lambda g, x: g.op("matmul", x, g.op("opaque", x, shape=(3, 64, 1)), shape=(3, 8, 1)), (2,)),
    ((3, 1, 64), lambda g, x: g.op("matmul", x, g.op("opaque", x, shape=(3, 64, 8)), shape=(3, 1, 8)), None),
    ((8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64, 64), shape=(8, 64)), None),
    ((8, 64), lambda g, x: g.op("matmul", matrix(g, 1, 8, number=1 / 8), x, shape=(1, 64)), (0,)),
    ((3, 8, 64), lambda g, x: g.op("matmul", matrix(g, 8, 8, number=1 / 8), x, shape=(3, 8, 64)), (1,)),
    ((3, 8, 64), lambda g, x: g.op("matmul", x, matrix(g, 64, 1, number=1 / 64), shape=(3, 8, 1)), (2,)),
    ((64,), lambda g, x: g.op("matmul", matrix(g, 8, 64, number=1.0), x, shape=(8,)), None),
    ((64,), lambda g, x: g.op("matmul", x, matrix(g, 64, 1), shape=(1,)), None),
    ((64,), lambda g, x: g.op("matmul", x, x, shape=()), None),
    ((8, 64), lambda g, x: shapeless(g.op("matmul", x, matrix(g, 64, 64))), None),
])  # fmt: skip
def test_the_rows_of_a_product(shape: Shape, product: Callable[[Build, Value], Value], over: Any) -> None:
    g = Build(shape)
    x = g.op("opaque", g.x)
    assert roots(g.found(product(g, x)), x) == ([over] if over else [])


def test_a_product_of_parameters_is_no_statistic() -> None:
    g = Build((64,))
    table = matrix(g, 64, 64)
    found = g.found(g.op("matmul", table, matrix(g, 64, 1, number=1 / 64), shape=(64, 1)))
    assert not found.facts
    assert roots(g.found(g.mean(table, (1,))), table) == [(1,)]


@pytest.mark.parametrize(("shape", "mean", "axes"), [
    ((8, 64), lambda g, q: g.op("matmul", q, matrix(g, 64, 1, number=1 / 64), shape=(8, 1)), (1,)),
    ((8, 64), lambda g, q: g.op("matmul", q, matrix(g, 64, 64, number=1 / 64), shape=(8, 64)), (1,)),
    ((3, 8, 64), lambda g, q: g.op("matmul", q, matrix(g, 1, 64, 1, number=1 / 64), shape=(3, 8, 1)), (2,)),
    ((3, 8, 64), lambda g, q: g.op("unsqueeze", g.op("matmul", q, matrix(g, 64, number=1 / 64), shape=(3, 8)),
                                   axes=(2,), shape=(3, 8, 1)), (2,)),
    ((8, 64), lambda g, q: g.op("matmul", matrix(g, 1, 8, number=1 / 8), q, shape=(1, 64)), (0,)),
    ((8, 64), lambda g, q: g.op("matmul", matrix(g, 8, 8, number=1 / 8), q, shape=(8, 64)), None),  # mixes rows
    ((8, 64), lambda g, q: g.op("unsqueeze", g.op("matmul", matrix(g, 8, number=1 / 8), q, shape=(64,)), axes=(0,),
                                shape=(1, 64)), None),
    ((3, 8, 64), lambda g, q: g.op("matmul", matrix(g, 1, 8, number=1 / 8), q, shape=(3, 1, 64)), (1,)),
    ((3, 8, 64), lambda g, q: g.op("unsqueeze", g.op("reshape", g.op(
        "matmul", q, matrix(g, 64, 1, number=1 / 64), shape=(3, 8, 1)), shape=(24,)), axes=(1,), shape=(24, 1)), None),
    ((64,), lambda g, q: (g.mean(g.x, (0,)), g.op("matmul", matrix(g, 1, 64, number=1 / 64), q, shape=(1,)))[1], (0,)),
    ((8, 64), lambda g, q: g.op("matmul", g.mean(q, (0, 1), keepdims=False), matrix(g, 1, 1, number=1.0), shape=(1,)),
     None),
    ((3, 8, 64), lambda g, q: g.op("matmul", q, matrix(g, 3, 64, 1, number=1 / 64), shape=(3, 8, 1)), None),
    ((8, 64), lambda g, q: g.op("matmul", q, matrix(g, 64, 1), shape=(8, 1)), None),
])  # fmt: skip
def test_a_mean_by_a_product_with_a_uniform_matrix(shape: Shape, mean: Callable[[Build, Value], Value],
                                                   axes: tuple[int, ...] | None) -> None:  # fmt: skip
    g = Build(shape)
    m = mean(g, g.op("square", g.x))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))), shape=shape)
    found = g.found(y)
    assert [(site.norm.axes, site.norm.kind) for site in found.sites] == ([(axes, "rms_norm")] if axes else [])
    assert compare(found, g.graph) == len(found.sites)


def test_a_product_has_the_axes_of_its_result() -> None:
    for wide in ((64, 1), (1, 64, 1), (1, 1, 64, 1), (64,), (64, 64)):
        g = Build((8, 64))
        shape = (8,) if len(wide) == 1 else (*wide[:-2], 8, wide[-1])
        m = g.op("matmul", g.x, matrix(g, *wide, number=1 / 64), shape=shape)
        found = g.found(m)
        (fact,) = found.facts[m.index].values()
        assert len(fact.layout) == len(shape)
        assert [entry == () for entry in fact.layout] == [d == 1 for d in shape]
        h = Build((8, 64))
        m = h.op("matmul", matrix(h, 1, 8, number=1 / 8), h.x, shape=(1, 64))
        assert [f.layout for f in h.found(m).facts[m.index].values()] == [((), (1,))]


def test_a_two_pass_variance_by_products() -> None:
    g = Build()
    ones = matrix(g, 64, 1, number=1 / 64)
    c = g.op("sub", g.x, g.op("matmul", g.x, ones, shape=("B", "S", 1)))
    v = g.op("matmul", g.op("square", c), ones, shape=("B", "S", 1))
    found = g.found(g.op("mul", c, g.op("rsqrt", g.op("add", v, g.c(1e-5)))))
    assert facts(found) == ["(x - mean(x))*(var(x) + 1e-05)^-1/2"] and compare(found, g.graph) == 1


def test_a_row_times_itself_is_its_sum_of_squares() -> None:
    g = Build((8, 64))
    row = g.op("unsqueeze", g.x, axes=(1,), shape=(8, 1, 64))
    column = g.op("unsqueeze", g.x, axes=(2,), shape=(8, 64, 1))
    dot = g.op("squeeze", g.op("matmul", row, column, shape=(8, 1, 1)), axes=(2,), shape=(8, 1))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", g.op("mul", dot, g.c(1 / 64)), g.c(1e-5))))
    found = g.found(y)
    assert facts(found) == ["x*(mean(x^2) + 1e-05)^-1/2"] and compare(found, g.graph) == 1


# -- parameters -------------------------------------------------------------------------------------------------------


def scaled_by(weight: Spell, shape: Shape = ("B", "S", 64), axes: tuple[int, ...] = (2,)) -> list[str]:
    """What norms there are where one is scaled by something."""
    g = Build(shape)
    found = g.found(g.op("mul", rms(g, g.x, axes), weight(g), shape=shape))
    return facts(found)


NORM = "x*(mean(x^2) + 1e-05)^-1/2"


@pytest.mark.parametrize(("weight", "text"), [
    (lambda g: g.w, f"w*{NORM}"),
    (lambda g: leaf(g, 64), f"z*{NORM}"),  # an input of the graph
    (lambda g: leaf(g, 1, 64, fixed=True), f"z*{NORM}"),
    (lambda g: leaf(g, 1, 64), NORM),  # an input of rank 2 may be anything
    (lambda g: leaf(g, "B", "S", 64), NORM),
    (lambda g: g.op("neg", leaf(g, 64)), f"v5*{NORM}"),
    (lambda g: g.op("add", g.w, g.c(1.0)), f"v5*{NORM}"),
    (lambda g: g.op("add", g.w, leaf(g, 64)), f"v5*{NORM}"),
    (lambda g: g.op("add", g.w, leaf(g, 1, 64)), NORM),
    (lambda g: g.op("add", leaf(g, 1, 64), g.w), NORM),
    (lambda g: g.op("reshape", g.op("cast", leaf(g, 64), dtype="float32"), shape=(1, 64)), f"v6*{NORM}"),
    (lambda g: g.op("transpose", leaf(g, 1, 64, fixed=True), perm=(0, 1), shape=(1, 64)), f"v5*{NORM}"),
    (lambda g: g.op("exp", g.w), NORM),  # no arithmetic of a parameter
    (lambda g: g.op("neg", g.op("opaque", g.w)), NORM),
    (lambda g: g.op("add", g.w, opaque(g, g.w, shape=(), number=1.0)), f"v6*{NORM}"),
    (lambda g: g.op("neg", opaque(g, g.w, shape=(), number=1.0)), f"v6*{NORM}"),
    (lambda g: leaf(g, fixed=True), f"z*{NORM}"),
    (lambda g: leaf(g), NORM),  # a number that the caller gives
    (lambda g: leaf(g, 1, fixed=True, overridable=True), NORM),
    (lambda g: leaf(g, 64, fixed=True, overridable=True), f"z*{NORM}"),
    (lambda g: leaf(g, 64, fixed=True, number=2.0), f"2*{NORM}"),
])  # fmt: skip
def test_what_is_a_parameter(weight: Spell, text: str) -> None:
    assert scaled_by(weight) == [text]


def test_a_value_of_unknown_shape_is_no_parameter() -> None:
    g = Build()
    z = g.graph.leaf("z", None, "float32")
    out = g.op("mul", rms(g, g.x), z, shape=("B", "S", 64))
    assert facts(g.found(out)) == [NORM]


def test_a_parameter_may_have_as_many_axes_as_are_normalised() -> None:
    shape = ("B", 8, 64)
    assert scaled_by(lambda g: leaf(g, 8, 64), shape, (1, 2)) == [f"z*{NORM}"]
    assert scaled_by(lambda g: leaf(g, 1, 8, 64), shape, (1, 2)) == [NORM]
    assert scaled_by(lambda g: leaf(g, 8, 64), shape, (2,)) == [NORM]


def test_what_a_root_is_made_of_does_not_scale_it() -> None:
    """softmax-like: x = z*z of rank 1 and its mean; z is light enough, and yet no weight of a norm of x."""
    g = Build((64,))
    g.x.fixed = False
    n = g.op("mul", g.x, g.op("rsqrt", g.op("add", g.mean(g.op("square", g.x), (0,)), g.c(1e-5))))
    second = g.op("mul", n, g.op("rsqrt", g.op("add", g.mean(g.op("square", n), (0,)), g.c(1e-5))))
    y = g.op("mul", second, g.x)
    found = g.found(y)
    assert all(not site.norm.parameters() for site in found.sites)
    assert {site.value.name for site in found.sites} >= {n.name}


def test_what_a_view_is_one_of_does_not_scale_a_norm_of_the_view() -> None:
    g = Build((64,))
    u = g.op("unsqueeze", g.x, axes=(0,), shape=(1, 64))
    found = g.found(g.op("mul", rms(g, u, (1,)), g.x))
    assert roots(found, g.x) == [(0,)] and roots(found, u) == [(1,)]
    assert found.sites and not any(site.norm.parameters() for site in found.sites)


def scaled_row(make: Callable[[Build], tuple[Value, Value]]) -> list[str]:
    """The formulas of a norm of a row times what may be its weight."""
    g = Build((64,))
    row, weight = make(g)
    found = g.found(g.op("mul", rms(g, row, (0,)), weight))
    return [formula(site.fact, "x", lambda atom: "w") for site in found.sites]


def doubled(g: Build, v: Value) -> Value:
    for _ in range(40):  # 2**40 ways back
        v = g.op("add", v, v)
    return v


@pytest.mark.parametrize(("make", "scaled"), [
    (lambda g: (opaque(g, g.x, shape=(64,)), g.op("neg", g.x)), False),
    (lambda g: (opaque(g, g.x, shape=(64,)), g.x), False),
    (lambda g: (opaque(g, g.op("neg", g.x), shape=(64,)), doubled(g, g.x)), False),
    (lambda g: (opaque(g, g.x, shape=(64,)), g.op("neg", leaf(g, 64))), True),
    (lambda g: (opaque(g, g.x, g.b, shape=(64,)), g.op("add", g.w, g.b)), True),  # a constant is nobody's data
    (lambda g: (opaque(g, g.op("mul", g.x, s := leaf(g, 1))), g.op("mul", leaf(g, 64), s)), True),  # nor is a number
])  # fmt: skip
def test_what_is_made_of_the_same_row_does_not_scale_it(make: Callable[[Build], tuple[Value, Value]],
                                                        scaled: bool) -> None:  # fmt: skip
    assert scaled_row(make) == [f"w*{NORM}" if scaled else NORM]


def test_a_weight_that_is_used_twice_is_one() -> None:
    g = Build()
    w = leaf(g, 64)
    assert facts(g.found(g.op("mul", rms(g, opaque(g, g.op("mul", g.x, w), shape=ROW[0])), w)))[0].startswith("z*")


def test_a_row_of_one_axis_has_weights_of_one() -> None:
    g = Build((64,))
    y = g.op("mul", rms(g, g.x, (0,)), g.w)
    assert facts(g.found(y)) == [f"w*{NORM}"]


@pytest.mark.parametrize(("under", "code"), [
    (lambda g, m: g.op("add", m, leaf(g)), "NF104"),
    (lambda g, m: g.op("add", m, opaque(g, g.x, shape=(1,))), "NF104"),
    (lambda g, m: g.op("add", m, leaf(g, 1, fixed=True, overridable=True)), "NF122"),
    (lambda g, m: g.op("add", m, leaf(g, fixed=True, overridable=True)), "NF122"),
    (lambda g, m: g.op("add", m, opaque(g, g.x, shape=("B", "S", 1))), "NF106"),
    (lambda g, m: g.op("add", m, g.graph.value("?", None, "float32"), shape=("B", "S", 1)), "NF106"),
    (lambda g, m: g.op("matmul", m, opaque(g, g.x, shape=(1, 1)), shape=("B", "S", 1)), "NF106"),
    (lambda g, m: g.op("matmul", m, leaf(g, number=2.0, fixed=True), shape=("B", "S", 1)), "NF106"),
    (lambda g, m: g.op("matmul", m, leaf(g, 1, fixed=True), shape=("B", "S")), "NF106"),
])  # fmt: skip
def test_what_meets_a_statistic_and_is_no_constant(under: Callable[[Build, Value], Value], code: str) -> None:
    g = Build()
    m = under(g, g.mean(g.op("square", g.x)))
    found = g.found(g.op("mul", g.x, g.op("rsqrt", m), shape=("B", "S", 64)))
    assert not found.sites and codes(found) == [(code, m.name)]
