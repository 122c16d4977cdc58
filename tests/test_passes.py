"""The passes on graphs written by hand, with a front end that is told what it can do: which edit comes of which norm,
and that each condition alone prevents it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from normfuse.graph import Node, Value
from normfuse.norm import Refusal
from normfuse.passes.add_norm import AddNorm
from normfuse.passes.latent import Latent
from normfuse.passes.norm_add import NormAdd
from normfuse.passes.qk_pair import QKPair
from normfuse.passes.sandwich import Sandwich
from normfuse.plan import Fused, Plan
from tests.build import Build, ln, rms
from tests.plan_tools import ROWS, able, in_float32, native, rows, sandwich, scaled, shown, start


# -- norm, then addition, and the sandwich ----------------------------------------------------------------------------


def norm_add(*, two: bool = False) -> tuple[Build, list[Value]]:
    g = Build()
    f, r = rows(g, "f"), rows(g)
    n = scaled(g, f)
    s = native(g.op("add", r if not two else scaled(g, r), n))
    return g, [f, r, n, s]


def test_a_norm_and_the_sum_that_alone_reads_it_are_one_operator() -> None:
    g, (f, r, n, s) = norm_add()
    plan = start(g, s)
    NormAdd(able())(plan)
    assert shown(plan) == [("norm_add", [n.name], ["f", "r"], [s.name])]
    assert plan.fused[0].name == "norm_add" and plan.fused[0].view is None
    assert plan.fused[0].computes() == {s: [f, r, g.w]}
    for spoil in (lambda: setattr(n, "kept", True), lambda: g.op("opaque", n)):
        spoil()
        plan = start(g, s)
        NormAdd(able())(plan)
        assert not plan.fused
        n.kept = False


def test_of_two_norms_that_are_added_the_first_takes_the_sum() -> None:
    g, (_f, _r, _n, s) = norm_add(two=True)
    plan = start(g, s)
    NormAdd(able())(plan)
    assert [(e.op, e.outputs) for e in plan.fused] == [("norm_add", (s,))]
    first = plan.fused[0].sites[0].value
    plan = start(g, s)
    NormAdd(able(lambda edit: ("", "") if edit.sites[0].value is first else None))(plan)
    assert [e.sites[0].value is not first for e in plan.fused] == [True]
    plan = start(g, s)
    plan.fused.append(Fused("add_norm", (), (), (s,)))
    NormAdd(able())(plan)
    assert len(plan.fused) == 1


def test_a_norm_that_is_not_added_does_not_end_the_pass() -> None:
    g = Build()
    first = g.op("opaque", scaled(g, rows(g, "z")))
    s = native(g.op("add", rows(g), scaled(g, rows(g, "f"))))
    plan = start(g, first, s)
    NormAdd(able())(plan)
    assert [e.outputs for e in plan.fused] == [(s,)]
    y = scaled(g, s)
    plan = start(g, first, s, y, places=("sandwich_post",) * 2)
    Sandwich(able())(plan)
    assert [e.outputs for e in plan.fused] == [(y, s)]


def test_two_sums_in_float32_are_two_operators() -> None:
    plan, v = in_float32()
    g = Build()
    g.graph = plan.graph
    a, b = rows(g, "a"), rows(g, "b")
    y = scaled(g, native(g.op("add", a, b)))
    plan = start(g, v["y"], v["narrow"], y)
    AddNorm(able())(plan)
    assert [e.round_sum for e in plan.fused] == [False, True]


PLACES = ("sandwich_post", "sandwich_pre")


def test_norm_sum_and_norm_are_one_operator() -> None:
    g, (_f, _r, n, s, y) = sandwich()
    plan = start(g, s, y, places=PLACES)
    Sandwich(able())(plan)
    assert shown(plan) == [("norm_add_norm", [n.name, y.name], ["f", "r"], [y.name, s.name])]


@pytest.mark.parametrize("spoil", [
    lambda g, v, plan: setattr(plan.found.sites[0], "placement", "post"),
    lambda g, v, plan: plan.refuse(plan.found.sites[1], Refusal("NF116", "", "")),
    lambda g, v, plan: plan.refuse(plan.found.sites[0], Refusal("NF116", "", "")),
    lambda g, v, plan: g.op("opaque", v[2]),
    lambda g, v, plan: plan.fused.append(Fused("add_norm", (), (), (v[3],))),
    lambda g, v, plan: plan.broken.update({("norm_add_norm", plan.found.sites[0]): Refusal("NF201", "", "")}),
])  # fmt: skip
def test_a_sandwich_with_a_flaw_is_none(spoil: Any) -> None:
    g, v = sandwich()
    plan = start(g, v[3], v[4], places=PLACES)
    before = len(plan.fused)
    spoil(g, v, plan)
    Sandwich(able())(plan)
    assert "norm_add_norm" not in [e.op for e in plan.fused] and before == 0


def test_a_sandwich_takes_its_sum_and_the_first_norm_of_it_once() -> None:
    g = Build()
    f, r = rows(g, "f"), rows(g)
    s = native(g.op("add", scaled(g, r), scaled(g, f)))
    y, z = scaled(g, s), g.op("mul", ln(g, s), g.w)
    plan = start(g, s, y, z, places=("sandwich_post", "sandwich_post"))
    Sandwich(able())(plan)
    assert [(e.op, e.outputs) for e in plan.fused] == [("norm_add_norm", (y, s))]
    plan = start(g, s, y, z, places=("sandwich_post", "sandwich_post"))
    first = plan.found.sites[0]
    Sandwich(able(lambda edit: ("", "") if edit.sites[0] is first else None))(plan)
    assert [e.sites[0] is not first for e in plan.fused] == [True]


# -- query and key ----------------------------------------------------------------------------------------------------


def heads(*weights: bool) -> tuple[Build, list[Value], Node]:
    """Norms that go into one product, with or without a weight."""
    g = Build()
    made = []
    for i, weighted in enumerate(weights):
        x = rows(g, f"x{i}")
        made.append(scaled(g, x) if weighted else rms(g, x))
    product = g.op("attention", *made[:3], shape=ROWS)
    assert product.producer is not None
    return g, made, product.producer


def attending(g: Build, made: Sequence[Value], product: Node) -> Plan:
    plan = start(g, *product.outputs, places=["qk"] * len(made))
    for site in plan.found.sites:
        site.attends = product
    return plan


@pytest.mark.parametrize(("weights", "pairs"), [
    ((True, True), [(0, 1)]), ((True, True, True), [(0, 1)]), ((True, True, True, True), [(0, 1), (2, 3)]),
    ((True, False), [(0, 1)]), ((True, False, True), [(0, 2)]), ((True,), []),
    ((True, False, True, False), [(0, 2), (1, 3)]), ((False, True, True, False), [(0, 3), (1, 2)]),
    ((True, True, False, False), [(0, 1), (2, 3)]), ((True, True, False, True, False, False), [(0, 1), (2, 4), (3, 5)]),
])  # fmt: skip
def test_norms_that_meet_in_one_product_are_pairs(weights: tuple[bool, ...], pairs: list[tuple[int, int]]) -> None:
    g, made, product = heads(*weights)
    plan = attending(g, made, product)
    QKPair(able())(plan)
    assert [(e.op, e.sites[0].value, e.sites[1].value) for e in plan.fused] == [
        ("qk_norm", made[i], made[j]) for i, j in pairs]  # fmt: skip
    for edit, (i, j) in zip(plan.fused, pairs, strict=True):
        assert [v.name for v in edit.inputs] == [f"x{i}", f"x{j}"] and edit.outputs == (made[i], made[j])
        assert edit.name == "qk_norm"


def test_norms_of_other_places_or_products_are_no_pair() -> None:
    for key in ("placement", "attends", "product"):
        g, made, product = heads(True, True)
        plan = attending(g, made, product)
        first = plan.found.sites[0]
        if key == "placement":
            first.placement = "other"
        elif key == "product":
            first.attends = made[0].producer
        else:
            for site in plan.found.sites:
                site.attends = None
        QKPair(able())(plan)
        assert not plan.fused


def test_a_pair_that_cannot_be_made_does_not_stand_in_the_way() -> None:
    g, made, product = heads(True, False, True, False)
    plan = attending(g, made, product)
    QKPair(able(lambda edit: ("", "") if edit.sites[0].value is made[0] else None))(plan)
    assert [e.outputs for e in plan.fused] == [(made[1], made[3])]


@pytest.mark.parametrize(("reads", "pairs"), [(None, 2), ("norm", 1), ("captured", 1)])
def test_of_pairs_that_interlace_neither_reads_the_other(reads: str | None, pairs: int) -> None:
    """q1, q2, k1, k2, where what k2 is made of may depend on q1."""
    g = Build()
    made = [scaled(g, rows(g, "q1")), rms(g, rows(g, "q2")), scaled(g, rows(g, "k1"))]
    x = rows(g, "k2")
    if reads == "norm":
        x = g.op("add", x, made[0])
    elif reads == "captured":
        made[0].captured = len(g.graph.nodes)
        x = g.op("opaque", x)
    made.append(rms(g, x))
    product = g.op("attention", *made[:3], shape=ROWS)
    assert product.producer is not None
    plan = attending(g, made, product.producer)
    QKPair(able())(plan)
    assert [e.outputs for e in plan.fused] == [(made[0], made[2]), (made[1], made[3])][:pairs]


def test_a_pair_is_left_where_the_front_end_gains_nothing_by_it() -> None:
    g, made, product = heads(True, False, True, False)
    plan = attending(g, made, product)
    QKPair(able(leave=lambda site, pair: "no gain" if pair else None))(plan)
    assert not plan.fused and not plan.left  # each may still be replaced alone
    QKPair(able(leave=lambda site, pair: None if pair else "no gain"))(plan)
    assert plan.fused


# -- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "leave", "made"), [
    ("latent", None, True), ("latent", lambda *_: None, True), ("latent", lambda *_: "no gain", False),
    ("latent", lambda site, pair: "no gain" if pair else None, True), ("pre", None, False),
])  # fmt: skip
def test_a_latent_norm_gets_an_operator_of_its_own(place: str, leave: Any, made: bool) -> None:
    g = Build()
    y = scaled(g, g.x)
    plan = start(g, y, places=(place,))
    Latent(able(leave=leave))(plan)
    assert shown(plan) == ([("norm", [y.name], ["x"], [y.name])] if made else [])
    assert [e.name for e in plan.fused] == (["rms_norm"] if made else [])
