"""The residual additions of graphs written by hand, condition by condition: what is one, and what copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Value
from normfuse.residual import added, copies, is_bias, sum_of, summed
from tests.build import Build, leaf
from tests.plan_tools import native, rows


def spoilt(**more: Any) -> Callable[[Build, Value, Value, Value], None]:
    def change(g: Build, a: Value, b: Value, s: Value) -> None:
        for key, value in more.items():
            setattr({"a": a, "b": b, "s": s}[key[0]], key[2:], value)

    return change


@pytest.mark.parametrize("change", [
    spoilt(s_shape=None), spoilt(s_native=None), spoilt(s_tainted=True), spoilt(a_number=1.0), spoilt(b_number=1.0),
    spoilt(a_dtype="int64"), spoilt(b_dtype="int64"), spoilt(a_shape=(1, 1, 64)), spoilt(b_shape=(64,)),
    spoilt(s_shape=(2, "B", "S", 64)), lambda g, a, b, s: setattr(s.producer, "kind", "sub"),
    lambda g, a, b, s: s.producer.inputs.__setitem__(1, a), lambda g, a, b, s: setattr(s, "producer", None),
    spoilt(a_shape=(), b_shape=(), s_shape=()),
])  # fmt: skip
def test_a_residual_addition_and_what_is_none(change: Any) -> None:
    g = Build()
    a, b = rows(g, "a"), rows(g, "b")
    s = native(g.op("add", a, b))
    assert summed(s) is s.producer
    change(g, a, b, s)
    assert summed(s) is None


def test_a_norm_may_read_a_sum_through_a_view_of_its_rows() -> None:
    g = Build((4, 6, 64))
    for view in (g.op("reshape", g.x, shape=(24, 64)), g.op("reshape", g.x, shape=(64,))):
        assert sum_of(view) is g.x
    wide = g.op("reshape", g.x, shape=(4, 384))
    other = g.op("unsqueeze", g.x, axes=(0,), shape=(1, 4, 6, 64))
    unknown, empty = g.op("reshape", g.x, shape=(24, 64)), g.op("reshape", g.x, shape=())
    unknown.shape = None
    assert [sum_of(v) for v in (wide, other, unknown, empty, g.x)] == [wide, other, unknown, empty, g.x]
    written = g.op("reshape", g.x, shape=(24, 64))
    written.tainted = True
    assert sum_of(written) is written
    g.x.shape = None
    assert sum_of(view) is view


def test_the_sum_that_alone_reads_a_value() -> None:
    g = Build()
    r = rows(g)
    n = g.op("neg", g.x)
    s = native(g.op("add", r, n))
    assert added(n, g.x, (2,)) == (s, r) and added(g.x, g.x, (2,)) is None  # its reader is no addition
    h = Build()
    r = rows(h)
    n = h.op("neg", h.x)
    copy = h.op("cast", h.op("identity", n), dtype="float32")
    s = native(h.op("add", copy, r))
    assert added(n, h.x, (2,)) == (s, r) == added(copy, h.x, (2,))
    assert added(s, h.x, (2,)) is None  # nobody reads it
    copy.kept = True
    assert added(n, h.x, (2,)) is None
    copy.kept = False
    h.op("opaque", n)
    assert added(n, h.x, (2,)) is None and added(copy, h.x, (2,)) == (s, r)
    k = Build()
    cast = k.op("cast", k.x, dtype="float64")
    native(k.op("add", cast, rows(k, dtype="float64")))
    assert added(k.x, k.x, (2,)) is None and added(cast, k.x, (2,))
    one = Build()
    n, again = one.op("neg", one.x), one.op("identity", one.x)
    s = native(one.op("add", n, again))
    assert added(n, one.x, (2,)) == (s, one.x) and added(n, n, (2,)) == (s, again)  # a copy of x is x
    again.tainted = True
    assert added(n, one.x, (2,)) == (s, again)


@pytest.mark.parametrize(("fixed", "shape", "axes", "bias"), [
    (True, (1, 6, 64), (1, 2), True), (True, (1, 6, 64), (-2, -1), True), (True, (1, 1, 64), (-1,), True),
    (True, (1, 6, 64), (2,), False), (False, (1, 6, 64), (1, 2), False),
])  # fmt: skip
def test_a_constant_added_to_a_norm_is_its_bias_or_a_residual_stream(fixed: bool, shape: tuple[int, ...],
                                                                     axes: tuple[int, ...], bias: bool) -> None:
    g = Build(shape)
    other = leaf(g, *shape, name="c")
    other.fixed = fixed
    assert is_bias(other, axes) == bias
    n = g.op("neg", g.x)
    s = native(g.op("add", n, other))
    assert added(n, g.x, axes) == (None if bias else (s, other))


def test_what_copies() -> None:
    g = Build()
    made = [g.op("identity", g.x), g.op("cast", g.x, dtype="float32"), g.op("cast", g.x, dtype="float64"),
            g.op("neg", g.x)]  # fmt: skip
    assert [copies(v.producer) for v in made if v.producer] == [True, True, False, False]
