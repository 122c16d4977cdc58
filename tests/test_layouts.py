"""Which axis of a value is which of the root: aligning, broadcasting and regrouping, and where each refuses."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.facts import M1, ONE, Root, power
from normfuse.graph import Value
from normfuse.transfer import align, broadcast, identity_layout, regroup, spans
from tests.algebra import BOTH, LAST, ROW, S, SQUARE, WHOLE, leaf, refusal


@pytest.mark.parametrize(("entry", "d", "fits"), [
    ((2,), 64, True), ((2,), 63, False), ((0,), "B", True), ((0,), "C", False), ((0,), None, False), ((), 1, True),
    ((1, 2), 320, True), ((1, 2), 64, False), ((0, 1), "B", False), ((-1, 2), 64, True), ((0,), 5, False),
])  # fmt: skip
def test_whether_axes_have_a_size(entry: tuple[int, ...], d: Any, fits: bool) -> None:
    assert spans(entry, d, LAST) is fits
    assert identity_layout(leaf(1, 5, 2, 64)) == ((), (1,), (2,), (3,))
    assert not spans((0,), None, Root(Value("u", (None, 4), "float32"), (1,), 4))


@pytest.mark.parametrize(("value", "layout", "root", "aligned"), [
    (leaf(64), WHOLE, LAST, ((2,),)), (leaf(1), WHOLE, LAST, ((),)), (leaf(), WHOLE, LAST, ()),
    (leaf(1, 64), WHOLE, LAST, ((), (2,))), (leaf(1, 1, 64), WHOLE, LAST, ((), (), (2,))),
    (leaf(5, 64), WHOLE, LAST, "NF109"), (leaf(5, 64), WHOLE, BOTH, ((1,), (2,))),
    (leaf(5, 1), WHOLE, BOTH, ((1,), ())),
    (leaf(5, 1), WHOLE, LAST, "NF109"), (leaf("B", 1, 1), WHOLE, LAST, "NF109"), (leaf(32), WHOLE, LAST, "NF108"),
    (leaf("N"), WHOLE, LAST, "NF108"), (leaf(8, 1, 1, 1), WHOLE, LAST, "NF108"), (leaf(1, 1, 1, 1), WHOLE, LAST,
                                                                                 ((), (), (), ())),
    (leaf(None), WHOLE, LAST, "NF115"), (leaf(64), ROW, LAST, ((2,),)), (leaf(32), ROW, LAST, "NF108"),
    (leaf(64), ((0,), ()), LAST, ((2,),)), (leaf(64), ((0,), (1,), S), LAST, (S,)),
    (leaf(3), ((0,), (1,), S), LAST, (S,)),
    (leaf(5, 64, number=2.0), WHOLE, LAST, ((1,), (2,))), (leaf(7, 64, number=2.0), WHOLE, LAST, "NF109"),
    (leaf(7, number=2.0), WHOLE, LAST, "NF108"), (leaf("B", 5, 64, number=2.0), WHOLE, LAST, WHOLE),
    (leaf(5), ((0,), (1,)), LAST, "NF109"), (leaf(64, 1, 1, 1), WHOLE, LAST, "NF108"),
    (leaf(64, 1), ((0,), (1,), (), ()), LAST, ((2,), ())), (leaf(320), ((0,), ()), BOTH, ((1, 2),)),
    (leaf(64), ((),), SQUARE, ((1,),)), (leaf(2), ROW, Root(Value("t", ("B", 5, 2), "float32"), (2,), 2), ((2,),)),
])  # fmt: skip
def test_align(value: Value, layout: Any, root: Root, aligned: Any) -> None:
    if isinstance(aligned, str):
        assert refusal(align, value, layout, root) == aligned
    else:
        assert align(value, layout, root) == aligned


def test_align_takes_the_axis_at_its_own_place_first() -> None:
    """Of two normalised axes of one size, a vector beside the statistics means the last, or the one not there yet."""
    square = Root(Value("u", ("B", 8, 8), "float32"), (1, 2), 64)
    assert align(leaf(8), ((0,), (), ()), square) == ((2,),)
    assert align(leaf(8, 1), ((0,), (), ()), square) == ((1,), ())
    assert align(leaf(8), ((1,), ()), square) == ((2,),)
    assert align(leaf(8, 1), ((), (0,), (), ()), square) == ((1,), ())  # behind an axis more, places say nothing


def test_a_power_beyond_all_numbers() -> None:
    assert refusal(power, {ONE: 1e300}, 4.0) == "NF105"
    assert refusal(power, {((M1, 1e6),): 1.0}, 4.0) == "NF105"


@pytest.mark.parametrize(("a", "b", "both"), [
    (WHOLE, ROW, WHOLE), (ROW, WHOLE, WHOLE), (WHOLE, (), WHOLE), ((), WHOLE, WHOLE), (((2,),), WHOLE, WHOLE),
    (WHOLE, ((2,),), WHOLE), (((1,),), WHOLE, "NF107"), (((0,), ()), WHOLE, "NF107"), ((S,), WHOLE, WHOLE),
    (WHOLE, (S,), WHOLE), ((S,), ((),), (S,)), (((),), (S,), (S,)), ((S,), (S,), (S,)),
    (((0,), (1,), S), ROW, ((0,), (1,), S)), (ROW, ((0,), (1,), S), ((0,), (1,), S)),
])  # fmt: skip
def test_broadcast(a: Any, b: Any, both: Any) -> None:
    assert refusal(broadcast, a, b) == both if isinstance(both, str) else broadcast(a, b) == both


@pytest.mark.parametrize(("layout", "shape", "after"), [
    (WHOLE, ("B", 5, 64), WHOLE), (WHOLE, ("B", 1, 5, 64), ((0,), (), (1,), (2,))),
    (WHOLE, (1, "B", 5, 64), ((), *WHOLE)),
    (WHOLE, ("B", 5, 64, 1), (*WHOLE, ())), (WHOLE, ("n", 64), ((0, 1), (2,))), (WHOLE, ("B", 320), ((0,), (1, 2))),
    (WHOLE, ("n",), ((0, 1, 2),)), (WHOLE, ("B", 320, 1), ((0,), (1, 2), ())), (WHOLE, ("B", 64, 5), "NF106"),
    (WHOLE, ("B", 10, 32), "NF106"), (ROW, ("B", 5), ((0,), (1,))), (ROW, ("n",), ((0, 1),)),
    (ROW, (1, "n"), ((), (0, 1))),
    (((0,), S), ("n",), "NF107"), (ROW, ("B",), "NF106"), ((), (), ()), ((), (1, 1), ((), ())),
    (((0,), (1,), (2,), (3,)), (2, 12, 5), ((0,), (1, 2), (3,))), (((0,), (1,), (2,), (3,)), (6, 20), ((0, 1), (2, 3))),
    (((0,), (1,), (2,), (3,)), (6, 4, 5), ((0, 1), (2,), (3,))), (((0,), (1,), (2,), (3,)), (24, 5), ((0, 1, 2), (3,))),
    (((0,), (1,), (2,), (3,)), (2, 2, 6, 5), "NF106"), (((0,), (1,), (2,), (3,)), (6, 2, 10), "NF106"),
    (((0,), (1,), (2,), (3,)), (6, 1, 20), ((0, 1), (), (2, 3))),
    (WHOLE, ("n", 1), ((0, 1, 2), ())), (WHOLE, (0, 64), ((0, 1), (2,))), (((1,), (2,)), (320, "n"), ((1, 2), ())),
    (((0,), (1,), (2,), (3,), (4,)), (12, 2, 30), ((0, 1), (2,), (3, 4))),
])  # fmt: skip
def test_regroup(layout: Any, shape: Any, after: Any) -> None:
    sizes = {4: (2, 3, 4, 5), 5: (3, 4, 2, 5, 6)}.get(len(layout))
    root = Root(Value("t", sizes, "float32"), (3,), 5) if sizes else LAST
    if isinstance(after, str):
        assert refusal(regroup, layout, shape, root) == after
    else:
        assert regroup(layout, shape, root) == after
