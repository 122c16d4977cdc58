"""Where a norm stands, on small graphs of transformers: each place, and what becomes of it if a condition breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Value
from normfuse.placement import place, recipe
from normfuse.recognise import recognise
from tests.build import Build, leaf, matrix
from tests.placing import ROWS, Step, linear, norm, op, places


def branch(g: Build, v: Value) -> Value:
    return linear(g, g.op("activation", linear(g, v)))


def embedded(g: Build) -> Value:
    return g.op("gather", matrix(g, 100, 64), leaf(g, "B", "S", dtype="int64"), shape=ROWS, dtype="float32")


# -- transformers, each in a few lines --------------------------------------------------------------------------------


def pre_norm(g: Build, layers: int = 2) -> Value:
    h = embedded(g)
    for _ in range(layers):
        h = g.op("add", h, branch(g, norm(g, h)))
    return linear(g, norm(g, h))


def post_norm(g: Build, layers: int = 2) -> Value:
    """BERT: the norm stands on the stream, behind the addition."""
    h = norm(g, g.op("add", embedded(g), embedded(g)))
    for _ in range(layers):
        h = norm(g, g.op("add", h, branch(g, h)))
    return linear(g, h)


def inside_residual(g: Build, layers: int = 2) -> Value:
    """OLMo 2."""
    h = embedded(g)
    for _ in range(layers):
        h = g.op("add", h, norm(g, branch(g, h)))
    return linear(g, norm(g, h))


def begun_by_a_norm(g: Build, layers: int = 2) -> Value:
    """CLIP's eyes: what a linear layer gives is normed, and begins the stream."""
    h = norm(g, linear(g, g.x))
    for _ in range(layers):
        h = g.op("add", h, branch(g, norm(g, h)))
    return linear(g, norm(g, h))


def sandwich(g: Build, layers: int = 2) -> Value:
    """Gemma 2."""
    h = embedded(g)
    for _ in range(layers):
        h = g.op("add", h, norm(g, branch(g, norm(g, h))))
    return linear(g, norm(g, h))


@pytest.mark.parametrize(("model", "expected", "text"), [
    (pre_norm, ["pre", "pre", "final"], "RMSNorm, pre-norm"),
    (post_norm, ["embedding", "post_residual", "post_residual"],
     "RMSNorm, post-norm after the residual, embedding norm"),
    (inside_residual, ["post", "post", "final"], "RMSNorm, post-norm inside the residual"),
    (begun_by_a_norm, ["embedding", "pre", "pre", "final"], "RMSNorm, pre-norm, embedding norm"),
    (sandwich, ["sandwich_pre", "sandwich_post"] * 2 + ["final"], "RMSNorm, sandwich"),
])  # fmt: skip
def test_the_places_of_a_transformer(model: Callable[[Build], Value], expected: list[str], text: str) -> None:
    g = Build()
    model(g).kept = True
    sites = recognise(g.graph).sites
    place(g.graph, sites)
    assert [site.placement for site in sites] == expected
    assert recipe(sites) == text


@pytest.mark.parametrize(("kinds", "rows", "expected"), [
    (["slice"], ("B", "T", 64), "final"), (["gather"], ("B", 64), "final"),
    (["slice", "reshape", "cast", "slice"], ("B", "T", 64), "final"),
    (["slice"], ("B", "S", 32), "other"), (["slice"], ("B", "S", None), "other"),
    (["unknown", "slice"], ROWS, "other"), (["unknown", "reshape", "slice"], ROWS, "other"),
    (["activation"], ROWS, "other"),
])  # fmt: skip
def test_a_norm_of_some_rows_of_the_end(kinds: list[str], rows: Any, expected: str) -> None:
    """Flux: of text and image the image's rows; or the first token's."""
    g = Build()
    h = embedded(g)
    end = g.op("add", h, branch(g, norm(g, h)))
    last = end
    for kind in kinds:
        last = g.op("slice" if kind == "unknown" else kind, last, dtype="float32", shape=rows)
        last.shape = None if kind == "unknown" else rows
    y = g.op("rms_norm", last, axes=(len(rows) - 1,), eps=1e-5)
    assert places(g, linear(g, y))[-1] == expected


def test_rows_of_a_stream_that_goes_on_are_not_its_end() -> None:
    g = Build()
    h = embedded(g)
    middle = g.op("add", h, branch(g, norm(g, h)))
    side = linear(g, norm(g, g.op("slice", middle, shape=ROWS)))
    end = g.op("add", middle, branch(g, norm(g, middle)))
    assert places(g, side, end) == ["pre", "other", "pre"]


def heads(g: Build, v: Value) -> Value:
    return g.op("transpose", g.op("reshape", v, shape=("B", "S", 4, 16)), perm=(0, 2, 1, 3), shape=("B", 4, "S", 16))


def head_norm(g: Build, v: Value) -> Value:
    return g.op("rms_norm", v, axes=(3,), eps=1e-5)


def attended(g: Build, q: Value, k: Value) -> Value:
    turned = g.op("transpose", k, perm=(0, 1, 3, 2), shape=("B", 4, 16, "S"))
    scores = g.op("matmul", q, turned, shape=("B", 4, "S", "S"))
    return g.op("matmul", g.op("opaque", scores), k, shape=("B", 4, "S", 16))


def test_norms_of_query_and_key() -> None:
    g = Build()
    q, k = (head_norm(g, heads(g, linear(g, g.x))) for _ in range(2))
    attended(g, q, k).kept = True
    sites = recognise(g.graph).sites
    place(g.graph, sites)
    assert [site.placement for site in sites] == ["qk", "qk"] and recipe(sites) == "RMSNorm, QK-norm per head"
    assert all(site.attends is not None and site.attends.kind == "matmul" for site in sites)
    h = Build()
    q, k = (heads(h, op(h, linear(h, h.x))) for _ in range(2))
    attended(h, q, k).kept = True
    sites = recognise(h.graph).sites
    place(h.graph, sites)
    assert recipe(sites) == "RMSNorm, QK-norm over the full width"


@pytest.mark.parametrize("kind", ["activation", "max"])
def test_norms_of_query_and_key_of_linear_attention(kind: str) -> None:
    g = Build()
    zero = g.graph.leaf("0", (), "float32", number=0.0, fixed=True)
    q, k = (g.op(kind, head_norm(g, heads(g, linear(g, g.x))), *[zero] * (kind == "max")) for _ in range(2))
    turned = g.op("transpose", k, perm=(0, 1, 3, 2), shape=("B", 4, 16, "S"))
    whole = g.op("matmul", turned, heads(g, linear(g, g.x)), shape=("B", 4, 16, 16))
    assert places(g, g.op("matmul", q, whole, shape=("B", 4, "S", 16))) == ["qk", "qk"]
    h = Build()
    assert places(h, linear(h, h.op("activation", norm(h, linear(h, h.x))))) == ["other"]


@pytest.mark.parametrize("spell", [lambda g, v: op(g, v), norm])
def test_what_stands_behind_the_next_norm_does_not_count(spell: Step) -> None:
    g = Build()
    q, k = (heads(g, spell(g, op(g, linear(g, g.x)))) for _ in range(2))
    assert places(g, attended(g, q, k)) == ["other", "qk"] * 2
    h = Build()
    assert places(h, linear(h, spell(h, op(h, linear(h, h.x)))))[0] == "other"


@pytest.mark.parametrize(("shape", "other", "residual"), [
    (ROWS, ROWS, True),
    (ROWS, ("A", "T", 64), True), (ROWS, ("B", None, 64), True), ((2, "S", 64), ("B", 3, 64), True),  # they may be
    ((2, 3, 64), (2, 3, 64), True), ((2, 3, 64), (2, 4, 64), False),
    (ROWS, (1, "S", 64), False), ((1, "S", 64), ROWS, False), ((1, "S", 64), (1, "S", 64), True),
    (ROWS, ("B", "S", "N"), False), (ROWS, ("B", "S", 1), False),
    (ROWS, ("S", 64), False), (ROWS, None, False),
])  # fmt: skip
def test_a_residual_addition_is_of_shapes_that_may_be_the_same(shape: Any, other: Any, residual: bool) -> None:
    for turned in (False, True):
        g = Build()
        h = g.op("gather", matrix(g, 100, 64), leaf(g, *shape[:-1], dtype="int64"), shape=shape, dtype="float32")
        f = g.op("reshape", branch(g, norm(g, h)), shape=other)
        f.shape = other
        s = g.op("add", *((f, h) if turned else (h, f)), shape=shape)
        assert places(g, s) == ["pre" if residual else "other"]


def test_a_sum_of_vectors_is_no_residual_addition() -> None:
    g = Build()
    y = norm(g, embedded(g))
    f = g.op("reshape", linear(g, y), shape=(64,))
    assert places(g, g.op("add", g.op("reshape", y, shape=(64,)), f, shape=(64,))) == ["other"]


def test_of_what_is_quantized_the_scale_is_not_followed() -> None:
    g = Build()
    y = norm(g, g.op("slice", g.op("linear", g.x, matrix(g, 80, 64), shape=("B", "S", 80)), shape=ROWS))
    codes, scale = g.graph.value("codes", ROWS, "uint8"), g.graph.value("scale", (), "float32")
    g.graph.node("quantize", [y], [codes, scale])
    q, k = (heads(g, g.op("mul", g.op("cast", linear(g, codes), dtype="float32"), scale)) for _ in range(2))
    assert places(g, attended(g, q, k)) == ["latent"]


def test_of_what_is_split_all_parts_are_followed() -> None:
    g = Build()
    y = norm(g, linear(g, g.x))
    parts = [g.graph.value(name, ROWS, "float32") for name in "ab"]
    g.graph.node("slice", [y], parts)
    assert places(g, attended(g, heads(g, parts[1]), heads(g, linear(g, g.x)))) == ["qk"]


def test_a_norm_of_a_latent() -> None:
    g = Build()
    down = g.op("slice", g.op("linear", g.x, matrix(g, 80, 64), shape=("B", "S", 80)), shape=ROWS)
    y = norm(g, down)
    assert places(g, linear(g, y)) == ["latent"]
    h = Build()
    y = norm(h, h.op("slice", linear(h, h.x), shape=ROWS))
    assert places(h, h.op("activation", y)) == ["other"]


def test_a_gated_norm() -> None:
    def silu(g: Build, z: Value, whole: bool) -> Value:
        return g.op("activation", z) if whole else g.op("mul", z, g.op("activation", z))

    for whole in (True, False):
        g = Build()
        z = silu(g, linear(g, g.x), whole)
        assert places(g, linear(g, g.op("mul", norm(g, linear(g, g.x)), z))) == ["gated"]
        h = Build()
        y = norm(h, h.op("mul", linear(h, h.x), silu(h, linear(h, h.x), whole)))
        assert places(h, linear(h, y)) == ["gated"]
