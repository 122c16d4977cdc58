"""The recogniser condition by condition: which tensors are roots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Shape, Value
from normfuse.recognise import MAX_ROOTS, MAX_WALK, recognise
from normfuse.sites import MAX_ROUNDS
from tests.build import Build, leaf, node, opaque, reads, roots, shapeless


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
