"""The walks that tell where a norm stands, each on the graphs that its conditions separate."""

from __future__ import annotations

import pytest

from normfuse.graph import Value
from normfuse.norm import Site
from normfuse.placement import LONG_WALK, SHORT_WALK, Placer
from normfuse.recognise import recognise
from tests.build import Build, leaf, ln, matrix, rms
from tests.placing import ROWS, Step, linear, norm, op, placer, places, producer


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
      "add sub mul div neg slice concat where gather opaque activation max cast identity".split()],
    *[(lambda g, v, kind=kind: g.op("attention", g.op(kind, v, g.b)), None) for kind in "sqrt mean".split()],
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
