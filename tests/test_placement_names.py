"""What the place of a norm follows from, and the words for a model's recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Value
from normfuse.norm import Site
from normfuse.placement import SHORT_WALK, per_head, recipe, weight
from normfuse.recognise import recognise
from tests.build import Build, leaf, matrix
from tests.placing import ROWS, linear, op, placer, producer


# -- the decision -----------------------------------------------------------------------------------------------------


def decided(*, x: str = "other", y: str = "", **told: Any) -> str:
    """The place of a norm by what is known of it: `x` is "sum", "stream" or "other", `told` what the walks find."""
    g = Build()
    source = g.op("neg", g.x)
    if x == "sum":
        source = g.op("add", leaf(g, *ROWS), source)
    n = op(g, source)
    sums = [producer(g.op("add", n if i == 0 else g.op("cast", n, dtype="float32"), leaf(g, *ROWS)))
            for i in range(told.pop("added", 0))]  # fmt: skip
    for _ in range(told.pop("readers", 0)):
        g.op("neg", n)
    if told.pop("normed", False):
        op(g, n)
    if x == "stream" or told.pop("on", False):
        g.op("add", source, leaf(g, *ROWS))
    sites = recognise(g.graph).sites
    found: Any = placer(g)
    (site,) = [s for s in found.sites if s.value is n]
    assert found._adds_of(n) == sums and sites[0].value is n
    names = {"attends": producer(n) if told.get("attends") else None}
    found._attends = lambda value: names["attends"]
    for name in ("branch", "after_norm", "first_sum", "gated", "feeds_linear"):
        setattr(found, f"_{name}", lambda *values, name=name: bool(told.get(name, False)))
    place_ = found._place(site)
    assert site.attends is names["attends"]
    return str(place_)


@pytest.mark.parametrize(("told", "place_"), [
    ({"attends": True, "added": 1, "branch": True}, "qk"),
    ({"added": 1, "branch": True}, "post"),
    ({"added": 1, "branch": True, "readers": 1}, "embedding"),  # somebody else reads the norm
    ({"added": 1, "branch": True, "normed": True}, "post"),  # another norm does not count
    ({"added": 2, "branch": True, "readers": 1}, "post"),
    ({"added": 1, "branch": True, "readers": 1, "after_norm": True}, "final"),
    ({"added": 1, "branch": True, "x": "sum"}, "embedding"),
    ({"added": 1, "branch": True, "x": "stream", "after_norm": True}, "pre"),
    ({"branch": True}, "other"), ({"branch": True, "feeds_linear": True}, "latent"),
    ({"added": 1}, "embedding"), ({"added": 1, "first_sum": True, "x": "sum"}, "post_residual"),
    ({"added": 1, "after_norm": True, "x": "sum"}, "post_residual"),
    ({"added": 1, "after_norm": True, "x": "stream"}, "pre"),
    ({"added": 1, "after_norm": True}, "final"), ({"added": 1, "first_sum": True}, "other"),
    ({"gated": True}, "gated"), ({"gated": True, "x": "sum"}, "gated"), ({"gated": True, "x": "stream"}, "gated"),
    ({"added": 1, "gated": True, "first_sum": True}, "gated"),
    ({"x": "stream"}, "pre"), ({"x": "sum", "on": True}, "pre"), ({"x": "sum"}, "final"),
    ({"x": "sum", "after_norm": True}, "final"),
    ({"after_norm": True}, "final"), ({"after_norm": True, "feeds_linear": True}, "other"), ({}, "other"),
    ({"feeds_linear": True}, "other"),
])  # fmt: skip
def test_the_place_of_a_norm(told: dict[str, Any], place_: str) -> None:
    assert decided(**told) == place_


def test_a_sum_of_a_norm_on_the_stream_is_one_behind_the_residual() -> None:
    """The last norm of a post-norm model, which nothing is added to."""
    for before, expected in (("post_residual", "post_residual"), ("embedding", "post_residual"), ("pre", "final")):
        g = Build()
        first = op(g, g.x)
        s = g.op("add", g.op("identity", first), linear(g, first))
        last = op(g, s)
        found = placer(g)
        by = {site.value: site for site in found.sites}
        by[first].placement = before
        assert found._place(by[last]) == expected


# -- names ------------------------------------------------------------------------------------------------------------


def qk_site(shape: tuple[Any, ...], product: tuple[Any, ...] | None, kind: str = "matmul", size: Any = 64) -> Site:
    g = Build((*shape[:-1], size if size else "D"))
    n = op(g, g.x)
    (site,) = recognise(g.graph).sites
    site.placement = "qk"
    if product is not None:
        v = leaf(g, *product)
        site.attends = producer(g.op(kind, v, leaf(g, "B", 8, 999), shape=product))
        if product == ("?",):
            v.shape = None
    assert site.value is n
    return site


@pytest.mark.parametrize(("shape", "product", "kind", "size", "single"), [
    (("B", "S", 64), ("B", "S", 64), "matmul", 64, True), (("B", "S", 64), ("B", "S", 16), "matmul", 64, False),
    (("B", "S", 64), ("B", "S", 65), "matmul", 64, True),
    (("B", "S", 64), ("B", "S", 64), "attention", 64, False),
    (("B", 4, "S", 64), ("B", "S", 16), "attention", 64, True),
    (("B", "S", 64), None, "", 64, False), (("B", 4, "S", 64), None, "", 64, True),
    (("B", "S", 64), ("B", "S", "D"), "matmul", 64, False), (("B", 4, "S", 64), ("B", "S", "D"), "matmul", 64, True),
    (("B", 4, "S", 64), ("?",), "matmul", 64, True), (("B", "S", 64), ("?",), "matmul", 64, False),
    (("B", "S", 64), ("B", "S", 64), "matmul", None, False), (("B", 4, "S", 64), ("B", "S", 1), "matmul", None, True),
])  # fmt: skip
def test_whether_a_norm_is_one_per_head(shape: Any, product: Any, kind: str, size: Any, single: bool) -> None:
    assert per_head(qk_site(shape, product, kind, size)) is single


@pytest.mark.parametrize(("spell", "expected"), [
    (lambda g: g.w, True), (lambda g: leaf(g, 64, number=1.0), True), (lambda g: g.x, False),
    (lambda g: g.op("gather", matrix(g, 9, 64), g.x), True), (lambda g: g.op("slice", matrix(g, 9, 64)), True),
    (lambda g: g.op("cast", g.w, dtype="float64"), True), (lambda g: g.op("gather", g.x, g.w), False),
    (lambda g: g.op("neg", g.w), False), (lambda g: g.op("reshape", g.op("slice", g.w), shape=(64, 1)), True),
])  # fmt: skip
def test_what_is_a_weight(spell: Callable[[Build], Value], expected: bool) -> None:
    assert weight(spell(Build())) is expected


def test_a_weight_is_looked_for_so_far() -> None:
    g = Build()
    v = g.w
    for _ in range(SHORT_WALK - 1):
        v = g.op("identity", v)
    assert weight(v) and not weight(g.op("identity", v))


def sites(*norms: tuple[str, str]) -> list[Site]:
    """(kind, placement) of each."""
    out = []
    for kind, placement in norms:
        g = Build()
        g.op(kind, g.x, axes=(2,), eps=1e-5)
        (site,) = recognise(g.graph).sites
        site.placement = placement
        out.append(site)
    return out


RMS, LN = "rms_norm", "layer_norm"


@pytest.mark.parametrize(("norms", "text"), [
    ((), "no norms"), (((RMS, "other"),), "RMSNorm"), (((LN, "other"),), "LayerNorm"),
    (((LN, "pre"), (RMS, "pre"), (LN, "final")), "LayerNorm and RMSNorm, pre-norm"),
    (((LN, "pre"), (RMS, "pre"), (RMS, "final")), "RMSNorm and LayerNorm, pre-norm"),
    (((LN, "pre"), (RMS, "pre")), "RMSNorm and LayerNorm, pre-norm"),
    (((RMS, "sandwich_pre"), (RMS, "pre")), "RMSNorm, sandwich"), (((RMS, "sandwich_post"),), "RMSNorm, sandwich"),
    (((RMS, "post"), (RMS, "pre")), "RMSNorm, pre-norm, post-norm inside the residual"),
    (((RMS, "post_residual"),), "RMSNorm, post-norm after the residual"),
    (((RMS, "latent"), (RMS, "gated"), (RMS, "embedding")), "RMSNorm, latent norms, gated norms, embedding norm"),
    (((RMS, "qk"),), "RMSNorm, QK-norm over the full width"),
])  # fmt: skip
def test_a_recipe_in_words(norms: tuple[tuple[str, str], ...], text: str) -> None:
    assert recipe(sites(*norms)) == text


def test_a_recipe_with_norms_per_head_and_of_the_full_width() -> None:
    narrow, wide = qk_site(("B", "S", 64), ("B", "S", 64)), qk_site(("B", "S", 64), ("B", "S", 16))
    other = qk_site(("B", "S", 64), ("B", "S", 16))
    other.placement = "other"
    assert recipe([narrow, other]).endswith("per head") and recipe([narrow, wide]).endswith("full width")
