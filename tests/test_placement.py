"""Where a norm stands, on small graphs: each place, and what it becomes when one condition is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Node, Value
from normfuse.norm import Site
from normfuse.placement import LONG_WALK, SHORT_WALK, Placer, per_head, place, recipe, weight
from normfuse.recognise import recognise
from tests.build import Build, leaf, ln, matrix, rms

ROWS = ("B", "S", 64)
Step = Callable[[Build, Value], Value]


def linear(g: Build, v: Value, bias: bool = False) -> Value:
    out = g.op("linear", v, matrix(g, 64, 64), shape=v.shape)
    return g.op("add", out, g.b) if bias else out


def norm(g: Build, v: Value) -> Value:
    return g.op("mul", rms(g, v), g.w)


def branch(g: Build, v: Value) -> Value:
    return linear(g, g.op("activation", linear(g, v)))


def embedded(g: Build) -> Value:
    return g.op("gather", matrix(g, 100, 64), leaf(g, "B", "S", dtype="int64"), shape=ROWS, dtype="float32")


def places(g: Build, *outputs: Value) -> list[str]:
    for value in outputs:
        value.kept = True
    sites = recognise(g.graph).sites
    place(g.graph, sites)
    return [site.placement for site in sites]


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
    (sandwich, ["sandwich_pre", "sandwich_post"] * 2 + ["final"], "RMSNorm, sandwich"),
])  # fmt: skip
def test_the_places_of_a_transformer(model: Callable[[Build], Value], expected: list[str], text: str) -> None:
    g = Build()
    model(g).kept = True
    sites = recognise(g.graph).sites
    place(g.graph, sites)
    assert [site.placement for site in sites] == expected
    assert recipe(sites) == text


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


# -- the parts of the walk --------------------------------------------------------------------------------------------


def op(g: Build, v: Value) -> Value:
    """A norm as one operator."""
    return g.op("rms_norm", v, axes=((v.rank or 1) - 1,), eps=1e-5)


def placer(g: Build) -> Placer:
    return Placer(g.graph, recognise(g.graph).sites)


def producer(v: Value) -> Node:
    assert v.producer is not None
    return v.producer


@pytest.mark.parametrize(("kind", "through"), [
    ("cast", True), ("identity", True), ("reshape", True), ("transpose", True), ("neg", False),
])  # fmt: skip
def test_what_stands_behind_casts_copies_and_views(kind: str, through: bool) -> None:
    g = Build()
    v = g.op(kind, g.x, shape=ROWS, perm=(0, 1, 2))
    assert placer(g).base(v) is (g.x if through else v)


def test_behind_a_norm_nothing_is_looked_for_and_no_further_than_so_many_steps() -> None:
    g = Build()
    n = op(g, g.x)
    assert placer(g).base(g.op("cast", n, dtype="float64")) is n
    k = Build(dtype="float16")
    n = k.op("cast", rms(k, k.op("cast", k.x, dtype="float32")), dtype="float16")
    assert placer(k).base(n) is n  # its last step is a cast
    h = Build()
    made = [h.x]
    for _ in range(SHORT_WALK + 1):
        made.append(h.op("identity", made[-1]))
    assert SHORT_WALK == 24 and LONG_WALK == 400
    assert placer(h).base(made[-2]) is h.x and placer(h).base(made[-1]) is made[1]


def test_residual_additions_and_what_is_none() -> None:
    g = Build()
    z = leaf(g, *ROWS)
    residual = g.op("add", g.x, z)
    flat = g.op("add", leaf(g, 8, 64), leaf(g, 8, 64))
    n = rms(g, g.x)
    for a, b in ((g.x, leaf(g, *ROWS, fixed=True)), (leaf(g, *ROWS, number=1.0), g.x), (g.x, leaf(g, 1, 1, 64)),
                 (leaf(g, 64), leaf(g, 64)), (n, g.op("mul", n, g.w))):  # fmt: skip
        g.op("add", a, b)
    g.op("sub", g.x, z)
    unknown = [g.graph.leaf("u", None, "float32") for _ in range(2)]
    g.graph.node("add", unknown, [g.graph.value("v", None, "float32")])
    found = placer(g)
    assert found.adds == [producer(residual), producer(flat)]
    assert found.stream[g.x] == found.stream[z] == [producer(residual)]


def test_the_stream_is_what_additions_read_behind_casts() -> None:
    g = Build()
    s = g.op("add", g.op("cast", g.x, dtype="float32"), g.op("neg", g.x))
    found = placer(g)
    assert found.stream[g.x] == [producer(s)] and len(found.stream) == 2


def test_what_a_norm_is_upstream_of() -> None:
    g = Build()
    n = op(g, g.x)
    n.kept = True
    a = g.op("opaque", n)
    b, other = g.op("neg", a), g.op("neg", g.x)
    both = g.op("mul", g.x, n)
    assert placer(g).fed == {a, b, both}
    found = placer(g)
    assert [found._after_norm(v) for v in (n, a, b, other, g.x)] == [True, True, True, False, False]


def test_the_nodes_inside_the_norms() -> None:
    g = Build()
    before, weights = g.op("neg", g.x), g.op("neg", g.w)
    first = len(g.graph.nodes)
    y = g.op("mul", ln(g, before), weights)
    inside = set(g.graph.nodes[first:])
    g.op("opaque", y)
    assert placer(g).inside == inside and len(inside) == 8


@pytest.mark.parametrize("how", ["read", "output"])
def test_what_others_read_of_a_norm_is_not_inside(how: str) -> None:
    g = Build()
    copy, unread = g.op("neg", g.x), g.op("neg", g.x)
    turned = g.op("cast", copy, dtype="float64")
    y = g.op("cast", norm(g, turned), dtype="float32")
    g.op("opaque", y)
    found = placer(g)
    (site,) = found.sites
    assert site.value is y and site.norm.x is copy
    assert turned.producer in found.inside and {copy.producer, unread.producer}.isdisjoint(found.inside)
    if how == "read":
        g.op("opaque", turned)
    else:
        turned.kept = True
    assert turned.producer not in placer(g).inside and len(placer(g).inside) == len(found.inside) - 1


def test_a_view_that_a_norm_shares_is_walked_through() -> None:
    g = Build()
    y = norm(g, linear(g, g.x))
    view = g.op("reshape", y, shape=("B", "S", 64))
    assert places(g, norm(g, view), linear(g, view))[0] == "latent"


def adds(g: Build, v: Value) -> list[Value]:
    return [node.outputs[0] for node in placer(g)._adds_of(v)]


def test_the_additions_that_read_a_value() -> None:
    g = Build()
    v, r = g.op("neg", g.x), leaf(g, *ROWS)
    direct = g.op("add", v, r)
    cast = g.op("add", r, g.op("cast", v, dtype="float32"))
    turned = g.op("add", leaf(g, "S", "B", 64), g.op("transpose", v, perm=(1, 0, 2), shape=("S", "B", 64)))
    g.op("add", g.op("activation", v), r)
    assert adds(g, v) == [direct, cast, turned]
    h = Build()
    v = h.op("neg", h.x)
    twice = h.op("add", v, v)
    assert adds(h, v) == [twice]
    k = Build()
    v = k.op("neg", k.x)
    bias = k.op("add", k.op("transpose", v, perm=(0, 1, 2), shape=ROWS), k.b)
    k.op("add", bias, leaf(k, *ROWS))
    assert adds(k, v) == []


class Told(Placer):
    """Places the norms as it is told, by value."""

    given: dict[Value, str] = {}  # noqa: RUF012

    def _place(self, site: Site) -> str:
        return self.given[site.value]


@pytest.mark.parametrize(("first", "second", "more", "become"), [
    ("pre", "post", None, ["sandwich_pre", "sandwich_post"]),
    ("pre", "qk", None, ["pre", "qk"]),
    ("other", "post", None, ["other", "post"]),
    ("final", "post", None, ["final", "post"]),  # the last norm is no part of a layer
    ("final", "post", "pre", ["final", "sandwich_post", "sandwich_pre"]),
    ("pre", "post", "final", ["sandwich_pre", "sandwich_post", "final"]),
    ("sandwich_pre", "post", None, ["sandwich_pre", "sandwich_post"]),
])  # fmt: skip
def test_a_norm_ahead_of_a_branch_and_one_behind_it_are_a_sandwich(first: str, second: str, more: str | None,
                                                                   become: list[str]) -> None:  # fmt: skip
    for turned in (False, True):
        g = Build()
        a = op(g, g.op("cast", g.x, dtype="float32"))
        b = op(g, linear(g, a))
        wide = g.op("identity", b)
        g.op("add", *((g.x, wide) if not turned else (wide, g.x)))
        given = {a: first, b: second}
        if more:
            given[op(g, g.x)] = more
        found = Told(g.graph, recognise(g.graph).sites)
        found.given = given
        found.run()
        assert [site.placement for site in found.sites] == become


def test_a_norm_that_is_added_in_two_places_needs_one_branch_for_a_sandwich() -> None:
    g = Build()
    a = op(g, g.x)
    b = op(g, linear(g, a))
    g.op("add", g.x, b)
    g.op("add", leaf(g, *ROWS), b)
    found = Told(g.graph, recognise(g.graph).sites)
    found.given = {a: "pre", b: "post"}
    found.run()
    assert [site.placement for site in found.sites] == ["sandwich_pre", "sandwich_post"]


def test_a_pre_norm_whose_branch_ends_without_a_norm_is_no_sandwich() -> None:
    g = Build()
    a = op(g, g.x)
    b = op(g, linear(g, a))
    g.op("add", g.x, linear(g, b))  # b is added to something else
    g.op("add", leaf(g, *ROWS), b)
    c = op(g, leaf(g, *ROWS, name="u"))
    found = Told(g.graph, recognise(g.graph).sites)
    found.given = {a: "pre", b: "post", c: "pre"}
    found.run()
    assert [site.placement for site in found.sites] == ["pre", "post", "pre"]


def test_the_streams_that_a_norm_is_added_to() -> None:
    g = Build()
    n = op(g, linear(g, g.x))
    r, t = leaf(g, *ROWS, name="r"), leaf(g, *ROWS, name="t")
    g.op("add", g.op("cast", r, dtype="float32"), n)
    g.op("add", g.op("identity", n), t)
    found = placer(g)
    assert list(found._others(found.sites[0])) == [r, t]


def number(g: Build, v: Value) -> Value:
    """A number that is worked out, and no leaf."""
    out = g.op("opaque", v, shape=())
    out.number = 2.0
    return out


@pytest.mark.parametrize(("spell", "ends"), [
    (linear, True), (lambda g, v: linear(g, v, bias=True), True),
    (lambda g, v: g.op("matmul", v, leaf(g, *ROWS), shape=ROWS), True),
    (lambda g, v: g.op("attention", v, v, v), True),
    (lambda g, v: g.op("add", g.b, g.op("cast", linear(g, v), dtype="float32")), True),
    (lambda g, v: g.op("add", g.c(1.0), linear(g, v)), True),
    (lambda g, v: g.op("add", linear(g, v), leaf(g, 1, 1, 64)), False),  # a sum of two tensors
    (lambda g, v: g.op("add", linear(g, v), leaf(g, *ROWS)), False),
    (lambda g, v: g.op("slice", linear(g, v), shape=ROWS), True),
    (lambda g, v: g.op("mul", g.w, linear(g, v)), True),
    (lambda g, v: g.op("mul", g.c(2.0), linear(g, v)), True),
    (lambda g, v: g.op("mul", linear(g, v), v), True),
    (lambda g, v: g.op("mul", v, linear(g, v)), False),
    (lambda g, v: g.op("mul", number(g, v), linear(g, v)), True),
    (lambda g, v: g.op("add", number(g, v), linear(g, v)), True),
    (lambda g, v: g.op("opaque", linear(g, v)), True),
    (lambda g, v: g.op("where", linear(g, v)), True),
    (lambda g, v: g.op("div", linear(g, v), g.c(2.0)), True),
    (lambda g, v: g.op("gather", linear(g, v)), True),
    (lambda g, v: g.op("concat", linear(g, v)), True),
    (lambda g, v: g.op("sum", linear(g, v), axes=(), keepdims=True), True),
    (lambda g, v: g.op("transpose", linear(g, v), perm=(0, 1, 2), shape=ROWS), True),
    (lambda g, v: g.op("activation", linear(g, v)), False),
    (lambda g, v: g.op("neg", linear(g, v)), False),
    (lambda g, v: v, False), (lambda g, v: g.op("identity", v), False),
    (lambda g, v: g.op("mul", g.w, g.c(2.0)), False),
])  # fmt: skip
def test_what_comes_out_of_a_branch(spell: Step, ends: bool) -> None:
    g = Build()
    assert placer(g)._branch(spell(g, g.x)) is False or ends
    y = spell(g, g.x)
    assert placer(g)._branch(y) is ends


def test_a_branch_is_looked_for_so_far() -> None:
    g = Build()
    v = linear(g, g.x)
    for _ in range(SHORT_WALK - 1):
        v = g.op("identity", v)
    assert placer(g)._branch(v) and not placer(g)._branch(g.op("identity", v))


def test_what_is_on_the_stream_comes_out_of_no_branch() -> None:
    g = Build()
    v = linear(g, g.x)
    copy = g.op("cast", v, dtype="float32")
    other = linear(g, g.x)
    s = g.op("add", copy, other)
    found = placer(g)
    assert not found._branch(v) and not found._branch(copy)
    assert found._branch(v, added=True) and found._branch(copy, added=True)
    assert not found._branch(s) and not found._branch(s, added=True)
    assert found._first_sum(s) and not found._first_sum(v) and not found._first_sum(g.op("mul", v, g.w))
    h = Build()
    s = h.op("add", leaf(h, *ROWS), h.x)
    assert not placer(h)._first_sum(s)
    s = h.op("add", leaf(h, *ROWS), linear(h, h.x))
    assert placer(h)._first_sum(s)
    k = Build()
    behind = k.op("slice", linear(k, k.x), shape=ROWS)
    early = linear(k, k.x)
    k.op("add", early, leaf(k, *ROWS))
    s = k.op("add", k.op("slice", early, shape=ROWS), k.x)
    assert not placer(k)._first_sum(s) and behind.producer is not None  # what is sliced is on the stream already


@pytest.mark.parametrize(("spell", "feeds"), [
    (linear, True), (lambda g, v: linear(g, g.op("cast", v, dtype="float32")), True),
    (lambda g, v: linear(g, g.op("mul", v, g.w)), True), (lambda g, v: linear(g, g.op("add", v, g.b)), True),
    (lambda g, v: linear(g, g.op("slice", v, shape=ROWS)), True), (lambda g, v: linear(g, g.op("neg", v)), False),
    (lambda g, v: g.op("matmul", v, v, shape=ROWS), False), (lambda g, v: g.op("attention", v, v), False),
    (lambda g, v: g.op("attention", v, matrix(g, 64, 192)), True), (lambda g, v: g.op("attention", v), False),
    (lambda g, v: g.op("attention", v, g.op("concat", matrix(g, 64, 64), matrix(g, 64, 128))), True),
    (lambda g, v: g.op("attention", v, g.op("concat", matrix(g, 64, 64), v)), False),
    (lambda g, v: g.op("activation", v, matrix(g, 64, 64)), False),
    (lambda g, v: g.op("attention", v, matrix(g, 64, 192), g.op("neg", v)), True),
    (lambda g, v: g.op("attention", v, g.op("gather", matrix(g, 9, 64, 64), g.op("neg", v))), True),
])  # fmt: skip
def test_whether_a_projection_reads_a_value(spell: Step, feeds: bool) -> None:
    g = Build()
    g.op("activation", g.x)
    spell(g, g.x)
    assert placer(g)._feeds_linear(g.x) is feeds


@pytest.mark.parametrize(("spell", "kind"), [
    (lambda g, v: g.op("attention", v, v, v), "attention"),
    (lambda g, v: g.op("matmul", v, leaf(g, *ROWS), shape=ROWS), "matmul"),
    (lambda g, v: g.op("matmul", v, matrix(g, 64, 64), shape=ROWS), None),
    (lambda g, v: g.op("matmul", v, g.op("gather", matrix(g, 9, 64, 64), g.w, shape=(64, 64)), shape=ROWS), None),
    (lambda g, v: g.op("attention", linear(g, v), v), "attention"),
    (lambda g, v: g.op("attention", g.op("mul", v, v), v), "attention"),
    (lambda g, v: (g.op("max", v, v), g.op("attention", v, v))[1], "attention"),
    (lambda g, v: g.op("attention", linear(g, v)), None),
    (lambda g, v: g.op("attention", v, matrix(g, 64, 192), g.b), None),  # ONNX Runtime's, with its own projection
    *[(lambda g, v, kind=kind: g.op("attention", g.op(kind, v, g.b)), "attention") for kind in
      "add sub mul div neg slice concat where gather opaque cast identity".split()],
    *[(lambda g, v, kind=kind: g.op("attention", g.op(kind, v, g.b)), None) for kind in "activation max mean".split()],
])  # fmt: skip
def test_the_product_that_a_value_goes_into(spell: Step, kind: str | None) -> None:
    g = Build()
    spell(g, g.x)
    found = Placer(g.graph, [])._attends(g.x)
    assert (found and found.kind) == kind


def test_a_product_is_looked_for_so_far() -> None:
    for steps, seen in ((LONG_WALK - 1, True), (LONG_WALK, False)):
        g = Build()
        v = g.x
        for _ in range(steps):
            v = g.op("neg", v)
        g.op("attention", v)
        assert (placer(g)._attends(g.x) is not None) is seen


def test_readers_are_met_the_near_ones_first_and_once() -> None:
    g = Build()
    a, b = g.op("identity", g.x), g.op("neg", g.x)
    second = g.op("attention", b, b)
    first = g.op("matmul", a, leaf(g, *ROWS), shape=ROWS)
    assert placer(g)._attends(g.x) is producer(first) is not second.producer


@pytest.mark.parametrize(("spell", "gated"), [
    (lambda g, y: g.op("mul", y, g.op("activation", g.x)), True),
    (lambda g, y: g.op("mul", g.op("activation", g.x), g.op("cast", y, dtype="float32")), True),
    (lambda g, y: g.op("mul", y, g.op("mul", g.x, g.op("activation", g.x))), True),
    (lambda g, y: g.op("mul", y, g.op("cast", g.op("activation", g.x), dtype="float32")), True),
    (lambda g, y: g.op("mul", y, g.op("neg", g.op("activation", g.x))), False),
    (lambda g, y: g.op("mul", y, g.op("mul", g.x, g.w)), False),
    (lambda g, y: g.op("mul", y, g.op("mul", g.op("neg", g.x), g.w)), False),
    (lambda g, y: g.op("mul", y, g.x), False),
    (lambda g, y: g.op("add", y, g.op("activation", g.x)), False),
    (lambda g, y: g.op("mul", g.op("neg", y), g.op("activation", g.x)), False),
])  # fmt: skip
def test_whether_a_value_is_gated(spell: Step, gated: bool) -> None:
    g = Build()
    y = g.op("opaque", g.x)
    z = spell(g, y)
    assert placer(g)._gated(g.x, y) is gated
    if gated and producer(z).inputs[0] is y:
        assert placer(g)._gated(z, g.b)  # or what the norm reads is the product
    if producer(z).kind == "add":
        assert not placer(g)._gated(z, g.b)
    assert not placer(g)._gated(y, g.b)


def test_an_activation_is_looked_for_so_far() -> None:
    for steps, seen in ((5, True), (6, False)):
        g = Build()
        v = g.op("activation", g.x)
        for _ in range(steps):
            v = g.op("identity", v)
        assert placer(g)._gated(g.op("mul", g.x, v), g.b) is seen


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
