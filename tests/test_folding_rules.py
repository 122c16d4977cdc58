"""Into which linear layers a norm's weight and bias may go, each condition by itself and in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normfuse.graph import Node, Value
from normfuse.passes.fold_affine import (
    Contraction, Readers, constants, contraction, elements, leaf_of,
)  # fmt: skip
from normfuse.recognise import recognise
from tests.build import Build, leaf, rms
from tests.conversion_tools import SHAPE, none


# -- folding ----------------------------------------------------------------------------------------------------------


def layer(g: Build, v: Value, wide: int = 4, bias: bool = True) -> Value:
    """A linear layer as one operator: x, W (out x in), c."""
    w = leaf(g, wide, 8, fixed=True, name=f"W{len(g.graph.nodes)}", native=object())
    more = [leaf(g, wide, fixed=True, name=f"c{len(g.graph.nodes)}", native=object())] if bias else []
    return g.op("linear", v, w, *more, shape=(*(v.shape or ())[:-1], wide))


def linear(node: Node, value: Value, axis: int) -> Contraction | None:
    if node.kind != "linear" or value is not node.inputs[0] or axis != (value.rank or 0) - 1:
        return None
    return contraction(node, node.inputs[1], 1, 0, node.inputs[2] if len(node.inputs) > 2 else None, none)


def found(g: Build, v: Value, axis: int = 2, twins: Callable[[Value], Any] = lambda v: v) -> list[str] | None:
    for node in g.graph.nodes:
        if node.kind == "linear" and not node.outputs[0].uses:
            node.outputs[0].kept = True
    readers = Readers(g.graph, linear, none, twins)
    made = readers.of(v, axis)
    return None if made is None or not readers.alone(made) else [one.out.name for one in made]


def test_the_linear_layers_that_alone_read_a_value() -> None:
    g = Build(SHAPE)
    n = rms(g, g.x)
    a, b = layer(g, n), layer(g, g.op("identity", n), bias=False)
    assert found(g, n) == [a.name, b.name] and found(g, n, 1) is None
    dead = g.op("activation", n)
    assert found(g, n) == [a.name, b.name]
    dead.kept = True
    assert found(g, n) is None
    h = Build(SHAPE)
    n = rms(h, h.x)
    h.op("activation", n)
    y = layer(h, n)
    assert found(h, n) == [y.name]


@pytest.mark.parametrize(("view", "read"), [
    (lambda g, n: n, True), (lambda g, n: g.op("identity", n), True),
    (lambda g, n: g.op("reshape", n, shape=(15, 8)), True), (lambda g, n: g.op("reshape", n, shape=(3, 10, 4)), False),
    (lambda g, n: g.op("transpose", n, perm=(1, 0, 2), shape=(5, 3, 8)), True),
    (lambda g, n: g.op("transpose", n, perm=(0, 2, 1), shape=(3, 8, 5)), False),
    (lambda g, n: g.op("unsqueeze", n, axes=(0,), shape=(1, 3, 5, 8)), True),
    (lambda g, n: g.op("squeeze", g.op("unsqueeze", n, axes=(0,), shape=(1, *SHAPE)), axes=(0,), shape=SHAPE), True),
    (lambda g, n: g.op("expand", n, shape=(2, 3, 5, 8)), True),
    (lambda g, n: g.op("neg", n), False), (lambda g, n: g.op("cast", n, dtype="float64"), False),
])  # fmt: skip
def test_a_linear_layer_may_read_a_view(view: Callable[[Build, Value], Value], read: bool) -> None:
    g = Build(SHAPE)
    n = rms(g, g.x)
    v = view(g, n)
    y = layer(g, v)
    assert found(g, n) == ([y.name] if read else None)
    if v is not n:
        v.shape = None
        assert found(g, n) is None
        v.shape, n.shape = SHAPE, None
        assert v.producer is not None and (found(g, n) is None or v.producer.kind == "identity")


def test_a_view_with_two_axes_of_one_size() -> None:
    g = Build((8, 5, 8))
    n = rms(g, g.x)
    y = layer(g, g.op("transpose", n, perm=(1, 0, 2), shape=(5, 8, 8)))
    assert found(g, n) == [y.name] and found(g, n, 0) is None
    h = Build((5, 8, 8))
    n = rms(h, h.x)
    y = layer(h, h.op("transpose", n, perm=(0, 2, 1), shape=(5, 8, 8)))
    assert found(h, n) is None and found(h, n, 1) == [y.name]


@pytest.mark.parametrize("spoil", [
    lambda g, n, y: setattr(n, "kept", True), lambda g, n, y: setattr(n, "tainted", True),
    lambda g, n, y: g.op("opaque", y.producer.inputs[1]), lambda g, n, y: g.op("opaque", y.producer.inputs[2]),
    lambda g, n, y: setattr(y, "kept", False),
])  # fmt: skip
def test_constants_that_somebody_else_reads_stay(spoil: Any) -> None:
    g = Build(SHAPE)
    n = rms(g, g.x)
    y = layer(g, n)
    assert found(g, n) == [y.name]
    spoil(g, n, y)
    for node in g.graph.nodes:
        if node.kind == "opaque":
            node.outputs[0].kept = True
    readers = Readers(g.graph, linear, none, lambda v: v)
    made = readers.of(n, 2)
    assert made is None or not readers.alone(made)


def test_a_weight_that_two_layers_share_stays() -> None:
    g = Build(SHAPE)
    n = rms(g, g.x)
    y = layer(g, n, bias=False)
    assert y.producer is not None
    weight = y.producer.inputs[1]
    other = leaf(g, 4, 8, fixed=True, name="other", native=object())
    g.op("linear", n, other, shape=(3, 5, 4))
    assert found(g, n) is not None
    assert found(g, n, twins=lambda v: "one" if v in (weight, other) else v) is None
    h = Build(SHAPE)
    n = rms(h, h.x)
    w = leaf(h, 4, 8, fixed=True, native=object())
    both = [h.op("linear", n, w, shape=(3, 5, 4)).name for _ in range(2)]
    assert found(h, n) == both  # it is scaled once
    k = Build(SHAPE)
    n = rms(k, k.x)
    y = layer(k, n)
    tied = leaf(k, 4, 8, fixed=True, native=object())
    k.op("opaque", tied).kept = True
    assert y.producer is not None
    first = y.producer.inputs[1]
    assert found(k, n) == [y.name] and found(k, n, twins=lambda v: 0 if v in (first, tied) else v) is None


def test_so_many_readers_are_looked_at() -> None:
    for views, seen in ((63, True), (64, True), (65, False)):
        g = Build(SHAPE)
        n = rms(g, g.x)
        y = layer(g, n)
        for _ in range(views):
            g.op("linear", g.op("identity", n), leaf(g, 4, 8, fixed=True, native=object()), shape=(3, 5, 4))
        got = found(g, n)
        assert (got is not None) is seen, views
        assert y.kept


def held(g: Build, *shape: int, **more: Any) -> Value:
    return leaf(g, *shape, fixed=True, native=object(), **more)


@pytest.mark.parametrize(("view", "axes"), [
    (lambda g, w: w, (1, 0)), (lambda g, w: g.op("identity", w), (1, 0)),
    (lambda g, w: g.op("transpose", w, perm=(1, 0), shape=(8, 4)), (0, 1)),
    (lambda g, w: g.op("unsqueeze", w, axes=(0,), shape=(1, 4, 8)), (2, 1)),
    (lambda g, w: g.op("squeeze", g.op("unsqueeze", w, axes=(0,), shape=(1, 4, 8)), axes=(0,), shape=(4, 8)), (1, 0)),
    (lambda g, w: g.op("reshape", w, shape=(4, 1, 8)), (2, 0)),
])  # fmt: skip
def test_the_constant_behind_a_weight(view: Callable[[Build, Value], Value], axes: tuple[int, int]) -> None:
    g = Build(SHAPE)
    w = held(g, 4, 8)
    assert leaf_of(view(g, w), axes, none) == (w, (1, 0))


@pytest.mark.parametrize("spell", [
    lambda g: g.x, lambda g: leaf(g, 4, 8, fixed=True), lambda g: held(g, 4, 8, overridable=True),
    lambda g: g.op("neg", held(g, 4, 8)), lambda g: g.op("expand", held(g, 1, 8), shape=(4, 8)),
    lambda g: g.op("reshape", held(g, 32), shape=(4, 8)), lambda g: g.op("reshape", held(g, 2, 2, 8), shape=(4, 8)),
    lambda g: g.op("reshape", held(g, 8, 4), shape=(4, 8)), lambda g: leaf(g, 4, 8, native=object()),
])  # fmt: skip
def test_no_constant_is_behind_it(spell: Callable[[Build], Value]) -> None:
    g = Build(SHAPE)
    assert leaf_of(spell(g), (1, 0), none) is None


def test_a_part_of_an_axis_of_a_constant_is_no_axis_of_it() -> None:
    g = Build(SHAPE)
    assert leaf_of(g.op("reshape", held(g, 4, 8), shape=(4, 2, 4)), (2, 0), none) is None


def test_a_constant_behind_a_view_of_unknown_shape() -> None:
    g = Build(SHAPE)
    v = g.op("identity", held(g, 4, 8))
    v.shape = None
    assert leaf_of(v, (1, 0), none) is None
    v.shape = ("n", 8)
    assert leaf_of(v, (1, 0), none) is not None  # an identity keeps every axis


def test_a_constant_is_looked_for_so_far() -> None:
    g = Build(SHAPE)
    v = held(g, 4, 8)
    for _ in range(63):
        v = g.op("identity", v)
    assert leaf_of(v, (1, 0), none) and not leaf_of(g.op("identity", v), (1, 0), none)


def test_a_linear_layer_and_its_constants() -> None:
    g = Build(SHAPE)
    w, c = held(g, 4, 8), held(g, 4, name="c")
    y = g.op("linear", g.x, g.op("transpose", w, perm=(1, 0), shape=(8, 4)), c, shape=(3, 5, 4))
    node = y.producer
    assert node is not None
    one = contraction(node, node.inputs[1], 0, 1, c, none)
    assert one is not None and (one.weight, one.over, one.gives, one.bias, one.out) == (w, 1, 0, c, y)
    other = g.op("neg", y)
    same = contraction(node, node.inputs[1], 0, 1, None, none, other)
    assert same is not None and same.bias is None and same.out is other
    assert contraction(node, g.x, 0, 1, None, none) is None
    for bias in (held(g, 3), held(g, 4, overridable=True), leaf(g, 4, native=object()), leaf(g, 4, fixed=True),
                 g.op("neg", c), held(g, 4, 1), held(g, 1)):  # fmt: skip
        found_ = contraction(node, node.inputs[1], 0, 1, bias, none)
        assert found_ is not None and found_.bias is None
    unknown = held(g, 4)
    unknown.shape = None
    found_ = contraction(node, node.inputs[1], 0, 1, unknown, none)
    assert found_ is not None and found_.bias is None
    wide = contraction(node, node.inputs[1], 0, 1, held(g, 1, 4), none)
    assert wide is not None and wide.bias is not None


def test_a_bias_and_a_weight_in_numbers() -> None:
    rng = np.random.default_rng(0)
    w, x, gain = rng.standard_normal((4, 8)), rng.standard_normal(8), rng.standard_normal(8)
    g = Build(SHAPE)
    y = layer(g, g.x)
    assert y.producer is not None
    rows = Contraction(y.producer, g.w, 1, 0, None, y)
    np.testing.assert_allclose(rows.product(w, x), w @ x)
    np.testing.assert_allclose(rows.scaled(w, gain) @ x, w @ (gain * x))
    columns = Contraction(y.producer, g.w, 0, 1, None, y)
    np.testing.assert_allclose(columns.product(w.T, x), w @ x)
    kernel = rng.standard_normal((4, 8, 3))  # a convolution sums over its window, too
    np.testing.assert_allclose(rows.product(kernel, x), np.einsum("oik,i->o", kernel, x))


def test_a_weight_made_of_constants() -> None:
    g = Build((8,))
    rng = np.random.default_rng(0)
    numbers = {g.w: rng.standard_normal((1, 8)) + 3, g.b: rng.standard_normal(8) + 3}
    expr = ((2.0, ((g.w, 1), (g.b, -2))), (0.5, ()))
    np.testing.assert_allclose(elements(expr, 8, numbers.__getitem__), 2 * numbers[g.w][0] / numbers[g.b] ** 2 + 0.5)
    assert elements(((0.5, ()),), 8, numbers.__getitem__).shape == (8,)


def test_what_is_made_of_constants() -> None:
    g = Build(SHAPE)
    a, b = held(g, 8), held(g, 8)
    good = ((1.0, ((a, 1), (b, 1))),)
    assert constants(good) and not constants(None) and not constants(((1.0, ()),))
    for key, value in (("fixed", False), ("overridable", True), ("native", None)):
        old = getattr(b, key)
        setattr(b, key, value)
        assert not constants(good)
        setattr(b, key, old)


def test_a_found_norm_is_folded_by_its_own_constants() -> None:
    g = Build(SHAPE)
    g.w.native = object()
    y = g.op("mul", rms(g, g.x), g.w)
    (site,) = recognise(g.graph).sites
    assert site.value is y and constants(site.norm.weight)


def test_layers_that_read_a_weight_in_other_ways_do_not_share_it() -> None:
    """Over the other axis, or with another bias."""
    g = Build(SHAPE)
    w, c, d = (leaf(g, 8, 8, fixed=True, name="w"), leaf(g, 8, fixed=True, name="c"), leaf(g, 8, fixed=True, name="d"))
    made = [g.op("linear", g.x, w, v, shape=SHAPE) for v in (c, c, d)]
    for value in made:
        value.kept = True
    readers = Readers(g.graph, linear, none, lambda v: v)
    readers.reads = {w: 2, c: 2, d: 1}
    layers = [Contraction(v.producer, w, 1, 0, c, v) for v in made[:2] if v.producer]
    assert readers.alone(layers)
    assert not readers.alone([layers[0], replace(layers[1], over=0, gives=1)])
    assert not readers.alone([layers[0], replace(layers[1], bias=d)])
    assert not readers.alone(layers[:1])
