"""The recogniser condition by condition: which tensors are roots, and what is a parameter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from normfuse.facts import formula
from normfuse.graph import Shape, Value
from normfuse.norm import Refusal
from normfuse.recognise import MAX_READERS, MAX_ROOTS, MAX_WALK, recognise
from normfuse.sites import MAX_ROUNDS
from tests.build import Build, Spell, codes, facts, leaf, matrix, opaque, rms, roots, rstd
from tests.neutral import compare

ROW = (("B", "S", 64), (2,))


# -- roots ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("through", [
    lambda g, x: x,
    lambda g, x: g.op("square", x),
    lambda g, x: g.op("pow", x, g.c(2.0)),
    lambda g, x: g.op("abs", x),
    lambda g, x: g.op("neg", x),
    lambda g, x: g.op("identity", x),
    lambda g, x: g.op("cast", x, dtype="float64"),
    lambda g, x: g.op("mul", x, x),
    lambda g, x: g.op("mul", x, g.c(3.0)),
    lambda g, x: g.op("mul", g.c(3.0), x),
    lambda g, x: g.op("div", x, g.c(3.0)),
    lambda g, x: g.op("mul", x, g.w),  # refused later, by the rule of the mean
    lambda g, x: g.op("add", g.w, x),
    lambda g, x: g.op("sub", x, g.mean(g.x)),  # whatever it is a mean of: the rules of the algebra tell
    lambda g, x: g.op("mul", x, leaf(g, "B", "S", 1)),
    lambda g, x: g.op("add", x, leaf(g, 64)),
    lambda g, x: g.op("sub", x, g.op("add", g.mean(g.x), opaque(g, g.x, shape=(), number=1.0))),
    lambda g, x: g.op("mul", x, g.op("opaque", x)),  # a product of two tensors of one shape may be a square
    lambda g, x: g.op("max", x, g.c(0.0)),
    lambda g, x: g.op("add", x, opaque(g, x, shape=(), number=2.0)),
    lambda g, x: g.op("sub", x, g.op("square", g.mean(g.x))),
    lambda g, x: g.op("sub", x, g.op("mul", g.mean(g.x), g.c(2.0))),
    lambda g, x: g.op("sub", x, g.op("mul", g.mean(g.x), g.w)),
    lambda g, x: g.op("sub", x, g.op("expand", g.mean(g.x), shape=("B", "S", 64))),
    lambda g, x: g.op("sub", x, reads(("B", "S", 1), "std")(g, g.x)),
    lambda g, x: g.op("sub", x, reads(("B", "S", 1), "var")(g, g.x)),
    lambda g, x: g.op("sub", x, reads(("B", "S", 1), "sum")(g, g.x)),
    lambda g, x: g.op("sub", x, reads(("B", "S", 1), "vecnorm")(g, g.x)),
    lambda g, x: g.op("sub", x, g.op("matmul", g.x, leaf(g, 64, 64, number=1 / 64, fixed=True), shape=("B", "S", 64))),
    lambda g, x: g.op("sub", x, g.op("matmul", g.x, leaf(g, 64, 1, fixed=True), shape=("B", "S", 1))),
    lambda g, x: g.op("sub", x, g.op("unsqueeze", g.mean(g.x, keepdims=False), axes=(2,), shape=("B", "S", 1))),
    lambda g, x: g.op("reshape", x, shape=("B", "S", 64)),
    lambda g, x: g.op("unsqueeze", g.op("squeeze", x, axes=(), shape=("B", "S", 64)), axes=(), shape=("B", "S", 64)),
])  # fmt: skip
def test_a_mean_is_one_of_the_tensor_behind_scalings_and_squares(through: Callable[[Build, Value], Value]) -> None:
    g = Build()
    x = g.op("opaque", g.x)
    found = g.found(g.mean(through(g, x)))
    assert roots(found, x) == [(2,)]


@pytest.mark.parametrize("through", [
    lambda g, x: g.op("opaque", x),
    lambda g, x: g.op("add", x, g.op("opaque", x)),  # a sum of two tensors is a tensor of its own
    lambda g, x: g.op("sub", g.op("opaque", x), x),
    lambda g, x: g.op("div", x, leaf(g, "B", "S", 1)),  # neither a square nor scaled by a parameter
    lambda g, x: g.op("add", x, leaf(g, 2, "B", "S", 64, fixed=True), shape=(2, "B", "S", 64)),  # wider than x
    lambda g, x: g.op("mul", leaf(g, 1, 1, 1, 64, fixed=True), x, shape=(1, "B", "S", 64)),
    lambda g, x: g.op("add", x, leaf(g, "B", 64)),  # rank 2: no parameter
    lambda g, x: g.op("add", x, leaf(g)),  # a number given at run time
    lambda g, x: g.op("add", x, opaque(g, x, shape=())),
    lambda g, x: g.op("add", x, g.op("linear", x, shape=("B", "S", 64))),
    lambda g, x: g.op("sub", x, g.op("matmul", g.x, leaf(g, 64, 64, fixed=True), shape=("B", "S", 64))),
    lambda g, x: g.op("sub", x, g.op("add", g.mean(g.x), g.op("opaque", x, shape=("B", "S", 1)))),
    lambda g, x: g.op("sub", x, g.op("mul", g.w, g.op("opaque", x))),
    lambda g, x: g.op("reshape", x, shape=("n", 32)),  # cut through
    lambda g, x: g.op("expand", x, shape=("B", "S", 64)),
    lambda g, x: shapeless(g.op("reshape", x)),
])  # fmt: skip
def test_a_mean_is_none_of_a_tensor_behind_anything_else(through: Callable[[Build, Value], Value]) -> None:
    g = Build()
    x = g.op("opaque", g.x)
    v = through(g, x)
    found = g.found(node(g, "mean", v, axes=((v.rank or 1) - 1,), keepdims=True))
    assert roots(found, x) == []


@pytest.mark.parametrize(("shape", "view", "axes", "over"), [
    (("B", "S", 64), lambda g, x: g.op("transpose", x, perm=(2, 0, 1), shape=(64, "B", "S")), (0,), (2,)),
    (("B", "S", 64), lambda g, x: g.op("transpose", x, perm=(2, 0, 1), shape=(64, "B", "S")), (0, 2), (1, 2)),
    (("B", "S", 64), lambda g, x: g.op("unsqueeze", x, axes=(0,), shape=(1, "B", "S", 64)), (0, 3), (2,)),
    (("B", 1, 64), lambda g, x: g.op("squeeze", x, axes=(1,), shape=("B", 64)), (1,), (2,)),
    ((4, 8, 6), lambda g, x: g.op("reshape", x, shape=(4, 48)), (1,), (1, 2)),
    ((4, 8, 6), lambda g, x: g.op("reshape", x, shape=(32, 6)), (1,), (2,)),
])  # fmt: skip
def test_the_axes_of_a_mean_seen_from_its_root(shape: Shape, view: Callable[[Build, Value], Value], axes: Any,
                                               over: Any) -> None:  # fmt: skip
    g = Build(shape)
    v = view(g, g.x)
    found = g.found(g.mean(v, axes))
    assert roots(found, g.x) == ([over] if over else [])
    wide = tuple(a for a in axes if v.shape is not None and v.shape[a] != 1)
    assert roots(found, v) == [wide]


@pytest.mark.parametrize(("axes", "more", "second", "over"), [
    ((2,), {}, (1,), [(1, 2), (2,)]),
    ((1,), {"keepdims": False}, (1,), [(1,), (1, 2)]),
    ((1,), {"keepdims": False}, (0,), [(0, 1), (1,)]),
    ((1,), {"keepdims": False, "kind": "sum"}, (1,), [(1,), (1, 2)]),
    ((1,), {"kind": "vecnorm"}, (2,), [(1,)]),
])  # fmt: skip
def test_a_mean_in_two_steps(axes: Any, more: Any, second: Any, over: Any) -> None:
    g = Build((4, 8, 6))
    found = g.found(g.mean(g.mean(g.x, axes, **more), second))
    assert roots(found, g.x) == over


def test_a_mean_of_a_mean_of_what_is_not_known() -> None:
    for axes, shape in ((None, ("B", "S", 64)), ((1,), None)):
        g = Build()
        x = g.graph.leaf("z", shape, "float32")
        first = node(g, "mean", x, shape=("B", 1, 64), axes=axes, keepdims=True)
        found = g.found(g.mean(first))
        assert roots(found, first) == [(2,)] and roots(found, x) == []
    g = Build()
    v = node(g, "reshape", g.graph.leaf("z", None, "float32"), shape=("B", "S", 64))
    assert roots(g.found(g.mean(v)), v) == [(2,)]


def test_a_mean_of_a_parameter_made_of_others() -> None:
    g = Build()
    p = g.op("add", g.w, g.c(1.0))
    assert roots(g.found(g.mean(g.op("neg", p), (0,))), p) == [(0,)]


def test_of_a_product_only_a_factor_of_its_shape_is_a_root() -> None:
    g = Build((4, 8, 6))
    z = leaf(g, 4, 8, 1)
    assert roots(g.found(g.mean(g.op("mul", g.x, z), (1,))), z) == []


def test_every_end_of_the_ways_back_is_looked_at() -> None:
    g = Build()
    x, y = g.op("opaque", g.x), g.op("opaque", g.x)
    far = g.op("neg", g.op("neg", y))
    found = g.found(g.mean(g.op("mul", g.op("mul", x, x), far)))
    assert roots(found, x) == roots(found, y) == [(2,)]
    h = Build()
    z = h.op("opaque", h.x)
    found = h.found(h.mean(h.op("mul", h.op("mul", h.x, h.x), h.op("neg", h.op("neg", z)))))  # x has no producer
    assert roots(found, z) == [(2,)]


def test_a_mean_of_a_squared_mean_is_one_of_the_mean() -> None:
    g = Build((4, 8, 6))
    m = g.mean(g.x, (1,))
    assert roots(g.found(g.mean(g.op("square", m), (2,))), m) == [(2,)]
    g = Build((4, 8, 6))
    m, other = g.mean(g.x, (1,)), g.mean(g.op("opaque", g.x), (1,))
    found = g.found(g.mean(g.op("mul", m, m), (2,)))
    assert roots(found, m) == [(2,)]
    assert roots(g.found(g.mean(g.op("mul", m, other), (2,))), other) == []
    h = Build((4, 8, 6))
    m = h.mean(h.x, (1,))
    assert roots(h.found(h.mean(h.op("neg", m), (2,))), m) == []  # x - mean(x) is not one of mean(x)


def test_two_means_over_other_axes_are_two_roots_and_over_the_same_one() -> None:
    g = Build()
    found = g.found(g.mean(g.x), g.mean(g.op("square", g.x)), g.mean(g.x, (1, 2)), g.mean(g.x, (1,)))
    assert roots(found, g.x) == [(1,), (1, 2), (2,)]


def test_axes_of_size_1_are_no_row() -> None:
    g = Build(("B", 1, 64))
    found = g.found(g.mean(g.x, (1, 2)), g.mean(g.op("opaque", g.x, shape=("B", 1, 1)), (2,)))
    assert roots(found, g.x) == [(2,)]
    assert [k for f in found.facts.values() for k in f if not k[1]] == []


def test_the_second_result_of_an_operator_is_a_root_of_its_own() -> None:
    g = Build()
    first, second = (g.graph.value(n, ("B", "S", 64), "float32") for n in ("first", "second"))
    g.graph.node("identity", [g.x], [first, second], native=object())
    found = g.found(g.mean(g.op("square", second)), g.mean(g.op("square", first)))
    assert roots(found, second) == [(2,)] and roots(found, first) == [(2,)]
    other = Build()
    first, second = (other.graph.value(n, ("B", "S", 64), "float32") for n in ("first", "second"))
    other.graph.node("identity", [other.x], [first, second], native=object())
    found = other.found(other.mean(other.op("square", second)))
    assert roots(found, second) == [(2,)] and roots(found, other.x) == []


@pytest.mark.parametrize(("steps", "seen"), [(MAX_WALK - 2, True), (MAX_WALK - 1, True), (MAX_WALK, False)])
def test_a_root_is_looked_for_so_far_and_no_further(steps: int, seen: bool) -> None:
    g = Build()
    v = g.x
    for _ in range(steps):
        v = g.op("neg", v)
    assert MAX_WALK == 16
    assert roots(g.found(g.mean(v)), g.x) == ([(2,)] if seen else [])


def test_of_two_ways_the_near_ends_are_looked_at_first() -> None:
    g = Build()
    near, far = g.op("opaque", g.x), g.op("opaque", g.x)
    a, b = near, far
    for _ in range(3):
        a = g.op("neg", a)
    for _ in range(14):
        b = g.op("neg", b)
    for product in ((a, b), (b, a)):
        h = g.found(g.mean(g.op("mul", *product)))
        assert roots(h, near) == [(2,)] and roots(h, far) == []


def test_a_number_or_an_integer_is_no_root() -> None:
    g = Build()
    full = leaf(g, "B", "S", 64, number=2.0, fixed=True)
    ids = leaf(g, "B", "S", 64, dtype="int64")
    found = g.found(g.mean(full), g.mean(g.op("cast", ids, dtype="float32")))
    assert roots(found, full) == roots(found, ids) == []


def test_a_value_has_facts_in_so_many_roots_and_keeps_the_latest() -> None:
    g = Build()
    v, keys = g.x, []
    for _ in range(MAX_ROOTS + 1):
        keys.append((v.index, (2,)))
        v = g.op("add", v, g.op("mul", g.mean(v), g.c(0.5)))
    found = g.found(v)
    assert MAX_ROOTS == 32
    assert sorted(found.facts[v.index]) == keys[1:]
    before = g.graph.nodes[-4].outputs[0]
    assert sorted(found.facts[before.index]) == keys  # its own is planted whatever there is


def test_of_too_many_roots_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[recognise.__module__], "MAX_ROOTS", 2)
    assert (MAX_ROOTS, MAX_ROUNDS) == (32, 8)
    g = Build()
    v, keys = g.x, []
    for _ in range(3):
        keys.append((v.index, (2,)))
        v = g.op("add", v, g.op("mul", g.mean(v), g.c(0.5)))
    found = g.found(v)
    assert sorted(found.facts[v.index]) == keys[1:] and list(found.facts[v.index]) == keys[:0:-1]


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


# -- written in place, and what is not known --------------------------------------------------------------------------


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
    for node in g.graph.nodes:
        node.outputs[0].tainted = True
    v = statistic(g)
    for node in g.graph.nodes:
        node.outputs[0].tainted = node.outputs[0] is not v
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
