"""How a centring passes through one node, each condition by itself and in numbers: what the rules say is computed both
ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normfuse.centring import Blocked, Centre, Links, back, blocks_of, centred, regrouped
from normfuse.graph import Value
from tests.neutral import Evaluation
from tests.build import Build, centred as less_mean, leaf, ln, matrix, rms
from tests.conversion_tools import SHAPE, none, take

WHOLE = Centre(2, ((0, 8),))
HALVES = Centre(2, ((0, 4), (4, 4)))
SCALE = Build((8,)).w


def links(out: Value, want: Centre, uniform: tuple[Value, ...] = (), channels: Any = none) -> Links | str:
    assert out.producer is not None
    try:
        return back(out.producer, out, want, channels, lambda v: v in uniform)
    except Blocked as why:
        return str(why)


def holds(g: Build, out: Value, want: Centre, found: Links) -> None:
    """Centring the operands as found gives the result centred as wanted."""
    run = Evaluation(g.graph)
    node = out.producer
    assert node is not None
    again = Evaluation(g.graph)
    for v, c in found:
        again.values[v] = take(run.values[v], c, run.values)
    dropped = {g for _, c in found for g in c.scales} - set(want.scales)
    for v in dropped:  # the multiplication goes
        again.values[v] = np.ones_like(run.values[v])
    got = again._compute(node)
    assert got is not None
    np.testing.assert_allclose(got, take(run.values[out], want, run.values), atol=1e-12)


# -- centrings --------------------------------------------------------------------------------------------------------


def test_a_centring_of_the_whole_axis() -> None:
    g = Build(SHAPE)
    assert WHOLE.whole(g.x) and not HALVES.whole(g.x) and not Centre(1, ((0, 8),)).whole(g.x)
    assert not Centre(2, ((0, 8),), (g.w,)).whole(g.x)
    g.x.shape = None
    assert not WHOLE.whole(g.x)


def test_a_centring_moved_and_cut() -> None:
    assert WHOLE.moved(1) == Centre(1, ((0, 8),)) and HALVES.moved(0, 3) == Centre(0, ((3, 4), (7, 4)))
    assert HALVES.within(0, 8) == HALVES.blocks
    assert HALVES.within(0, 4) == ((0, 4),) and HALVES.within(4, 8) == ((4, 4),)
    assert HALVES.within(0, 5) is None and HALVES.within(3, 8) is None and HALVES.within(8, 12) == ()
    assert HALVES.within(1, 4) is None and HALVES.within(0, 3) is None


@pytest.mark.parametrize(("blocks", "expected"), [
    ([], ()), ([(4, 4), (0, 4)], ((0, 4), (4, 4))), ([(0, 4), (0, 4)], ((0, 4),)), ([(0, 5), (4, 4)], None),
    ([(0, 4), (5, 3)], ((0, 4), (5, 3))), ([(0, 2), (2, 2), (3, 1)], None),
])  # fmt: skip
def test_blocks_in_order(blocks: Any, expected: Any) -> None:
    assert blocks_of(iter(blocks)) == expected


@pytest.mark.parametrize(("spell", "expected"), [
    (ln, True), (less_mean, True), (lambda g, v: g.op("neg", less_mean(g, v)), True),
    (lambda g, v: g.op("mul", ln(g, v), g.w), False), (lambda g, v: g.op("add", ln(g, v), g.b), False),
    (lambda g, v: g.op("add", ln(g, v), g.c(1.0)), False), (rms, False),
    (lambda g, v: g.op("square", less_mean(g, v)), False), (lambda g, v: g.op("abs", less_mean(g, v)), False),
    (lambda g, v: g.op("mul", g.mean(v), g.c(0.0)), False),
    (lambda g, v: (g.mean(v), g.op("sub", v, v))[1], True),
    (lambda g, v: g.op("add", g.op("square", v), less_mean(g, v)), False),
    (lambda g, v: g.op("squeeze", less_mean(g, g.op("unsqueeze", v, axes=(0,), shape=(1, *SHAPE)), (3,)), axes=(0,),
                       shape=SHAPE), True),
    (lambda g, v: g.op("transpose", less_mean(g, g.op("transpose", v, perm=(1, 0, 2), shape=(5, 3, 8))),
                       perm=(1, 0, 2), shape=SHAPE), True),
    (lambda g, v: less_mean(g, v, (1,)), False),
    (lambda g, v: g.op("transpose", less_mean(g, v), perm=(0, 1, 2), shape=SHAPE), True),
    (lambda g, v: g.op("transpose", less_mean(g, v, (1,)), perm=(0, 2, 1), shape=(3, 8, 5)), False),
    (lambda g, v: g.op("unsqueeze", less_mean(g, v), axes=(0,), shape=(1, *SHAPE)), False),
])  # fmt: skip
def test_what_has_mean_zero_already(spell: Callable[[Build, Value], Value], expected: bool) -> None:
    g = Build(SHAPE)
    v = spell(g, g.x)
    want = Centre(2, ((0, (v.shape or ())[2]),)) if len(v.shape or ()) > 2 else WHOLE  # type: ignore[arg-type]
    found = g.found(v)
    assert centred(found, v, want) is expected
    assert not centred(found, v, Centre(2, ((0, 4), (4, 4))))


def test_the_axis_that_was_centred_may_lie_elsewhere() -> None:
    g = Build((8, 5, 8))
    v = g.op("transpose", less_mean(g, g.x), perm=(2, 1, 0), shape=(8, 5, 8))
    assert not centred(g.found(v), v, WHOLE)


def test_of_several_readings_one_is_enough() -> None:
    g = Build(SHAPE)
    v = g.op("add", g.x, g.b)
    y = ln(g, v)  # of x there is no fact that says it, of v there is
    again = less_mean(g, g.op("mul", g.mean(g.x), g.op("opaque", g.x)))
    found = g.found(y, again)
    assert centred(found, y, WHOLE) and not centred(found, g.x, WHOLE)


# -- rules ------------------------------------------------------------------------------------------------------------


def summands(g: Build) -> dict[str, Value]:
    return {"x": g.x, "z": leaf(g, *SHAPE), "row": leaf(g, 8, fixed=True), "one": leaf(g, 1, fixed=True),
            "column": leaf(g, 5, 1, fixed=True), "zero": g.c(0.0), "number": g.c(2.0),
            "full": leaf(g, 8, fixed=True, number=2.0)}  # fmt: skip


@pytest.mark.parametrize(("kind", "a", "b", "expected"), [
    ("add", "x", "z", {"x": 2, "z": 2}), ("sub", "x", "z", {"x": 2, "z": 2}), ("add", "row", "x", {"row": 0, "x": 2}),
    ("add", "x", "zero", {"x": 2}), ("add", "zero", "x", {"x": 2}), ("mul", "x", "full", {"x": 2}),
    ("add", "x", "full", "adds z, which is the same for all channels"),
    ("add", "x", "one", "adds z, which is the same for all channels"),
    ("add", "x", "column", "adds z, which is the same for all channels"),
    ("sub", "number", "x", "adds 2.0, which is the same for all channels"),
    ("mul", "x", "number", {"x": 2}), ("mul", "number", "x", {"x": 2}), ("mul", "x", "column", {"x": 2}),
    ("div", "x", "number", {"x": 2}), ("div", "x", "column", {"x": 2}),
    ("mul", "x", "z", "multiplies two values channel by channel"),
    ("div", "x", "row", "divides the channels by different numbers"),
    ("div", "number", "x", "divides the channels by different numbers"),
    ("div", "x", "z", "divides the channels by different numbers"),
])  # fmt: skip
def test_sums_and_products(kind: str, a: str, b: str, expected: Any) -> None:
    g = Build(SHAPE)
    v = summands(g)
    out = g.op(kind, v[a], v[b], shape=SHAPE)
    for want in (WHOLE, HALVES):
        found = links(out, want)
        if isinstance(expected, str):
            assert isinstance(found, str) and expected in found and found.startswith(f"{kind} {out.name} ")
        else:
            assert found == [(v[k], want.moved(axis)) for k, axis in expected.items()]
            assert not isinstance(found, str)
            holds(g, out, want, found)


def test_a_value_of_unknown_shape_may_not_be_added() -> None:
    g = Build(SHAPE)
    z = leaf(g, *SHAPE)
    out = g.op("add", g.x, z)
    z.shape = None
    assert links(out, WHOLE) == "the shape of z is not known"
    z.shape, out.shape = SHAPE, None
    assert links(out, WHOLE) == "the shape of x is not known"


def test_a_row_is_the_same_along_the_axes_it_does_not_have() -> None:
    g = Build(SHAPE)
    row = leaf(g, 8, fixed=True)
    out = g.op("add", g.x, row)
    assert links(out, Centre(1, ((0, 5),))) == f"add {out.name} adds z, which is the same for all channels"
    assert links(out, Centre(0, ((0, 3),))) == links(out, Centre(1, ((0, 5),)))


def test_an_axis_of_size_1_is_an_axis_where_the_result_has_it() -> None:
    g = Build((3, 5, 1))
    out = g.op("add", g.x, leaf(g, 3, 5, 1))
    assert links(out, Centre(2, ((0, 1),))) == [(v, Centre(2, ((0, 1),))) for v in g.graph.nodes[0].inputs]


@pytest.mark.parametrize("turned", [False, True])
def test_a_factor_for_each_channel_is_handed_on(turned: bool) -> None:
    g = Build(SHAPE)
    scale = leaf(g, 1, 8, fixed=True, name="g", native=object())
    out = g.op("mul", *((scale, g.x) if turned else (g.x, scale)))
    found = links(out, WHOLE)
    assert found == [(g.x, Centre(2, ((0, 8),), (scale,)))] and not isinstance(found, str)
    holds(g, out, WHOLE, found)
    again = Centre(2, ((0, 8),), (g.w,))
    assert links(out, again) == [(g.x, Centre(2, ((0, 8),), (scale, g.w)))]
    assert links(out, WHOLE, (scale,)) == [(g.x, WHOLE)] and links(out, HALVES, (scale,)) == [(g.x, HALVES)]
    assert links(out, HALVES) == f"mul {out.name} scales the channels within a part of the axis"


@pytest.mark.parametrize("change", [{"fixed": False}, {"shape": (5, 8)}, {"shape": (3, 1, 8)}])
def test_a_factor_that_is_not_one_number_for_each_channel(change: dict[str, Any]) -> None:
    g = Build(SHAPE)
    scale = leaf(g, 1, 8, fixed=True, name="g")
    for key, value in change.items():
        setattr(scale, key, value)
    out = g.op("mul", g.x, scale, shape=SHAPE)
    assert links(out, WHOLE) == f"mul {out.name} multiplies two values channel by channel"
    assert links(out, WHOLE, (scale,)) == links(out, WHOLE)


def test_two_factors_for_each_channel_tell_nothing() -> None:
    g = Build((8,))
    out = g.op("mul", g.w, g.b)
    assert links(out, Centre(0, ((0, 8),))) == f"mul {out.name} multiplies two values channel by channel"


@pytest.mark.parametrize("kind", ["neg", "cast", "identity"])
def test_what_changes_no_channel(kind: str) -> None:
    g = Build(SHAPE)
    out = g.op(kind, g.x)
    found = links(out, HALVES)
    assert found == [(g.x, HALVES)] and not isinstance(found, str)
    holds(g, out, HALVES, found)
    ids = leaf(g, *SHAPE, dtype="int64")
    out = g.op(kind, ids, dtype="float32")
    assert links(out, WHOLE) == f"{kind} {out.name} makes floats of int64"


@pytest.mark.parametrize(("kind", "attrs", "source", "shape", "want", "expected"), [
    ("transpose", {"perm": (2, 0, 1)}, SHAPE, (8, 3, 5), Centre(0, ((0, 8),)), WHOLE),
    ("transpose", {"perm": (2, 0, 1)}, SHAPE, (8, 3, 5), Centre(1, ((0, 3),)), Centre(0, ((0, 3),))),
    ("expand", {}, (5, 8), SHAPE, WHOLE, Centre(1, ((0, 8),))),
    ("expand", {}, (5, 1), SHAPE, WHOLE, "repeats one number over the channels"),
    ("unsqueeze", {"axes": (0,)}, (5, 8), (1, 5, 8), WHOLE, Centre(1, ((0, 8),))),
    ("squeeze", {"axes": (0,)}, (1, 5, 8), (5, 8), Centre(1, ((0, 8),)), WHOLE),
    ("reshape", {}, (15, 8), SHAPE, WHOLE, Centre(1, ((0, 8),))),
    ("reshape", {}, (15, 8), (3, 5, 2, 4), Centre(3, ((0, 4),)), Centre(1, ((0, 4), (4, 4)))),
    ("reshape", {}, (3, 5, 2, 4), SHAPE, HALVES, Centre(3, ((0, 4),))),
    ("reshape", {}, (3, 5, 2, 4), SHAPE, WHOLE, "regroups the channels"),
    ("reshape", {}, (8, 15), SHAPE, WHOLE, "regroups the channels"),
])  # fmt: skip
def test_views(kind: str, attrs: Any, source: Any, shape: Any, want: Centre, expected: Any) -> None:
    g = Build(source)
    out = g.op(kind, g.x, shape=shape, **attrs)
    found = links(out, want)
    if isinstance(expected, str):
        assert found == f"{kind} {out.name} {expected}"
    else:
        assert found == [(g.x, expected)] and not isinstance(found, str)
        holds(g, out, want, found)
    out.shape = None
    assert links(out, want) == "the shape of x is not known"
    out.shape, g.x.shape = shape, None
    assert links(out, want) == "the shape of x is not known"


@pytest.mark.parametrize(("kind", "axes", "keepdims", "want", "expected"), [
    ("mean", (1,), True, WHOLE, WHOLE), ("mean", (1,), False, Centre(1, ((0, 8),)), WHOLE),
    ("sum", (0, 1), False, Centre(0, ((0, 4), (4, 4))), HALVES), ("mean", (2,), True, WHOLE, None),
    ("sum", (0,), False, Centre(0, ((0, 5),)), Centre(1, ((0, 5),))), ("mean", None, True, WHOLE, None),
    ("mean", (2,), False, Centre(1, ((0, 5),)), Centre(1, ((0, 5),))),
])  # fmt: skip
def test_means_over_other_axes(kind: str, axes: Any, keepdims: bool, want: Centre, expected: Centre | None) -> None:
    g = Build(SHAPE)
    over = axes or (2,)
    shape = tuple(1 if i in over else d for i, d in enumerate(SHAPE) if keepdims or i not in over)
    out = g.op(kind, g.x, axes=axes, keepdims=keepdims, shape=shape)
    found = links(out, want)
    if expected is None:
        assert found == f"{kind} {out.name} adds the channels up"
    else:
        assert found == [(g.x, expected)] and not isinstance(found, str)
        holds(g, out, want, found)


def test_a_reduction_of_unknown_shape_is_none() -> None:
    g = Build(SHAPE)
    out = g.op("mean", g.x, axes=(0,), keepdims=True, shape=(1, 5, 8))
    g.x.shape = None
    assert links(out, WHOLE) == f"mean {out.name} adds the channels up"


def test_a_native_operator_is_for_the_front_end_to_say() -> None:
    g = Build(SHAPE)
    out = g.op("linear", g.x, matrix(g, 8, 8), shape=SHAPE)
    table = lambda node, value, want: [(node.inputs[1], want.moved(1))]  # noqa: E731
    assert links(out, WHOLE, (), table) == [(g.graph.nodes[0].inputs[1], Centre(1, ((0, 8),)))]
    assert links(out, WHOLE) == f"linear {out.name} mixes or bends the channels"
    node = g.graph.nodes[0]
    for name, op, label in (("", "mm", "mm"), ("mm_1", "mm", "mm_1"), ("v0", "aten.mm", "aten.mm v0")):
        node.name, node.op = name, op
        assert links(out, WHOLE) == f"{label} mixes or bends the channels"


@pytest.mark.parametrize(("source", "target", "want", "expected"), [
    ((8,), (8,), Centre(0, ((0, 8),), (SCALE,)), Centre(0, ((0, 8),), (SCALE,))),
    ((4, 6), (24,), Centre(0, ((0, 24),), (SCALE,)), None), ((24,), (4, 6), Centre(1, ((0, 6),), (SCALE,)), None),
    ((24, "n"), ("n", 24), Centre(0, ((0, 2),)), None), (("n", 24), ("n", 24), Centre(0, ((0, 2),)), None),
    ((0, 24), (24, 0), Centre(1, ()), None), ((0, 24), (0, 24), Centre(0, ()), None),
    ((2, 24), (2, 24), Centre(0, ((0, 2),)), Centre(0, ((0, 2),))),
    ((24, 2), (24, 2), Centre(0, ((0, 24),)), Centre(0, ((0, 24),))),
    (("a", 24, "b"), ("b", 24, "a"), Centre(1, ((0, 24),)), None),
    (("a", 24, "b"), ("c", 24, "b"), Centre(1, ((0, 24),)), Centre(1, ((0, 24),))),
    ((5, 24, 3), (15, 24, 1), Centre(1, ((0, 24),)), None),
    ((2, 3, 24), (3, 2, 24), Centre(2, ((0, 24),)), Centre(2, ((0, 24),))),
    ((6, 24), (2, 3, 24), Centre(1, ((0, 3),)), Centre(0, ((0, 3), (3, 3)))),
    ((4, 6, 5), (24, 5), Centre(0, ((0, 3), (3, 3), (6, 3), (9, 3), (12, 3), (15, 3), (18, 3), (21, 3))),
     Centre(1, ((0, 3), (3, 3)))),
    ((4, 6), (24,), Centre(0, ((0, 6), (6, 6), (12, 6), (18, 6))), Centre(1, ((0, 6),))),
    ((4, 6), (24,), Centre(0, ((0, 6), (6, 6), (12, 6), (18, 5))), None),
    ((4, 6), (24,), Centre(0, ()), None),
    ((7, 24), (168,), Centre(0, ((0, 168),)), None), ((24, 5), ("n", 5), Centre(0, ((0, 4),)), None),
    (("a", 5), (24, 5), Centre(0, ((0, 4),)), None), ((0, 5), (24, 5), Centre(0, ((0, 4),)), None),
    ((4, 6), (24,), Centre(0, ((0, 6), (6, 6), (12, 6), (18, 6)), (SCALE,)), None),
    (("B", 24, "h", "w"), ("B", 24, "n"), Centre(1, ((0, 24),)), Centre(1, ((0, 24),))),
    (("B", None, 24), ("n", None, 24), Centre(2, ((0, 24),)), Centre(2, ((0, 24),))),
    ((None, 24, 5), (None, 24, "x"), Centre(1, ((0, 24),)), None), ((2, 24, None), (3, 24, None), Centre(1, ()), None),
    ((None, 24, 6), (2, 24, 3), Centre(1, ((0, 24),)), None), ((2, 24, 6), (None, 24, 3), Centre(1, ((0, 24),)), None),
    (("a", 2, 24, 5), ("a", 24, 10), Centre(1, ((0, 24),)), None),
    (("a", "b", 24), ("n", 24), Centre(1, ((0, 24),), (SCALE,)), Centre(2, ((0, 24),), (SCALE,))),
    ((None, 24, 6), (1, 24, "y"), Centre(1, ((0, 24),)), None),
    ((1, 24, 6), (None, 24, "y"), Centre(1, ((0, 24),)), None),
    (("a", "b", 24, 5), ("b", "a", 24, "x"), Centre(2, ((0, 24),)), Centre(2, ((0, 24),))),
])  # fmt: skip
def test_axes_behind_a_reshape(source: Any, target: Any, want: Centre, expected: Centre | None) -> None:
    assert regrouped(source, target, want) == expected
