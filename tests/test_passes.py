"""The passes on graphs written by hand, with a front end that is told what it can do: which edit comes of which norm,
and that each condition alone prevents it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from normfuse.residual import added, copies, is_bias, sum_of, summed, taken
from tests.build import Build, leaf, ln, rms
from tests.plan_tools import ROWS, able, native, rows, sandwich, scaled, shown, start


# -- residual additions -----------------------------------------------------------------------------------------------


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


# -- addition, then norm ----------------------------------------------------------------------------------------------


def add_norm(*, view: bool = False) -> tuple[Build, list[Value]]:
    g = Build((4, 6, 64))
    a, b = leaf(g, 4, 6, 64, name="a"), leaf(g, 4, 6, 64, name="b")
    s = native(g.op("add", a, b))
    x = native(g.op("reshape", s, shape=(24, 64))) if view else s
    y = g.op("mul", rms(g, x, ((x.rank or 0) - 1,)), g.w)
    return g, [a, b, s, x, y]


@pytest.mark.parametrize("view", [False, True])
def test_a_sum_and_its_norm_are_one_operator(view: bool) -> None:
    g, (a, b, s, x, y) = add_norm(view=view)
    plan = start(g, y, s)
    AddNorm(able())(plan)
    assert shown(plan) == [("add_norm", [y.name], ["a", "b"], [y.name, s.name])]
    (edit,) = plan.fused
    assert edit.round_sum and edit.name == "add_rms_norm"
    assert edit.view is (x if view else None)
    assert edit.parameters() == [g.w] and edit.computes() == {y: [a, b, g.w], s: [a, b, g.w]}


def test_the_summands_may_have_to_change_places() -> None:
    g, (_a, b, s, _x, y) = add_norm()
    plan = start(g, y, s)
    AddNorm(able(lambda edit: None if edit.inputs[0] is b else ("NF202", "")))(plan)
    assert [e.inputs[0].name for e in plan.fused] == ["b"]
    for can in (able(lambda edit: ("NF202", "")), able(None)):
        plan = start(g, y, s)
        AddNorm(can)(plan)
        assert not plan.fused


def test_of_two_norms_of_a_sum_the_first_takes_it() -> None:
    g, (_a, _b, s, x, y) = add_norm()
    second = g.op("mul", ln(g, x), g.w)
    plan = start(g, y, s, second)
    AddNorm(able())(plan)
    assert [e.sites[0].value for e in plan.fused] == [y]
    refusing = start(g, y, s, second)
    AddNorm(able(lambda edit: ("", "") if edit.sites[0].value is y else None))(refusing)
    assert [e.sites[0].value for e in refusing.fused] == [second]


def test_a_sum_that_another_operator_gives_is_not_taken_again() -> None:
    g, (_a, _b, s, _x, y) = add_norm()
    plan = start(g, y, s)
    other = plan.found.sites[0]
    plan.fused.append(Fused("norm_add", (), (), (s,)))
    assert taken(plan) == {s}
    AddNorm(able())(plan)
    assert len(plan.fused) == 1 and other in plan.free()


def test_a_sum_that_is_a_norm_is_no_addition() -> None:
    g = Build()
    n = rms(g, g.x)
    s = native(g.op("add", n, g.op("mul", n, g.w)))
    y = scaled(g, s)
    plan = start(g, y)
    assert [site.value for site in plan.found.sites] == [s, y]
    AddNorm(able())(plan)
    assert not plan.fused


def test_an_operator_that_gives_the_sum_and_its_norm_keeps_it() -> None:
    g = Build()
    a, b = rows(g, "a"), rows(g, "b")
    s = native(g.op("add", a, b))
    y = g.op("rms_norm", s, axes=(2,), eps=1e-5)
    assert s.producer is not None and y.producer is not None
    plan = start(g, y)
    AddNorm(able())(plan)
    assert len(plan.fused) == 1
    s.producer.native = y.producer.native
    plan = start(g, y)
    AddNorm(able())(plan)
    assert not plan.fused


def test_a_sum_in_the_operator_that_scales_a_norm_is_an_addition() -> None:
    """addcmul(r, n, w) is a product and a sum."""
    g = Build()
    y1 = scaled(g, g.x)
    s = native(g.op("add", rows(g), y1))
    assert s.producer is not None and y1.producer is not None
    s.producer.native = y1.producer.native
    y = scaled(g, s)
    plan = start(g, y)
    AddNorm(able())(plan)
    assert [e.sites[0].value for e in plan.fused] == [y]


def in_float32(change: Callable[[Build, dict[str, Value]], None] = lambda g, v: None,
               rounded: bool = True) -> tuple[Plan, dict[str, Value]]:  # fmt: skip
    """The norm of a sum of casts, and the sum cast back."""
    g = Build(dtype="bfloat16")
    x, r = rows(g, "x16", "bfloat16"), rows(g, "r16", "bfloat16")
    made = {"x": x, "r": r}
    made["x32"], made["r32"] = g.op("cast", x, dtype="float32"), g.op("cast", r, dtype="float32")
    made["s"] = native(g.op("add", made["x32"], made["r32"]))
    made["y"] = g.op("cast", rms(g, made["s"]), dtype="bfloat16")
    if rounded:
        made["narrow"] = g.op("cast", made["s"], dtype="bfloat16")
    change(g, made)
    return start(g, *(made[name] for name in ("y", "narrow") if name in made)), made


def test_a_norm_of_a_sum_before_it_is_rounded() -> None:
    plan, v = in_float32()
    AddNorm(able())(plan)
    (edit,) = plan.fused
    assert (edit.op, edit.inputs, edit.outputs, edit.round_sum, edit.view) == (
        "add_norm", (v["x"], v["r"]), (v["y"], v["narrow"]), False, None)  # fmt: skip
    plan.clear()
    AddNorm(able(lambda edit: None if edit.round_sum else ("", "")))(plan)  # the sum in float32 is one of its own
    assert [(e.inputs, e.outputs[1]) for e in plan.fused] == [((v["x32"], v["r32"]), v["s"])]


def test_a_sum_in_float32_that_only_its_norm_reads() -> None:
    plan, v = in_float32(rounded=False)
    AddNorm(able())(plan)
    (edit,) = plan.fused
    assert (edit.inputs, edit.round_sum, edit.results) == ((v["x"], v["r"]), False, (v["y"],))
    assert (edit.outputs[1].dtype, edit.outputs[1].shape) == ("bfloat16", v["s"].shape)


def test_a_second_norm_of_that_sum_has_nothing_left_to_take() -> None:
    def again(g: Build, v: dict[str, Value]) -> None:
        v["second"] = g.op("cast", ln(g, v["s"]), dtype="bfloat16")
        v["second"].kept = True

    plan, v = in_float32(again)
    plan.found.sites.sort(key=lambda site: site.value is not v["y"])
    AddNorm(able())(plan)
    assert len(plan.fused) == 1


def all_of(dtype: str | None, *values: Value) -> None:
    for value in values:
        value.dtype = dtype


@pytest.mark.parametrize("change", [
    lambda g, v: setattr(v["s"], "kept", True),
    lambda g, v: setattr(v["s"], "dtype", "float64"),
    lambda g, v: g.op("opaque", v["s"]),
    lambda g, v: g.op("cast", v["s"], dtype="float16"),
    lambda g, v: setattr(v["narrow"].producer, "kind", "identity"),
    lambda g, v: setattr(v["x"], "tainted", True),
    lambda g, v: setattr(v["r"], "tainted", True),
    lambda g, v: setattr(v["x32"].producer, "kind", "identity"),
    lambda g, v: setattr(v["r32"], "producer", None),
    lambda g, v: setattr(v["x"], "dtype", "float16"),
    lambda g, v: setattr(v["r"], "dtype", "float16"),
    lambda g, v: setattr(v["narrow"], "dtype", "float16"),
    lambda g, v: all_of("float32", v["x"], v["r"], v["narrow"]),
    lambda g, v: all_of(None, v["x"], v["r"], v["narrow"]),
    lambda g, v: v["r32"].producer.inputs.__setitem__(0, v["x"]),
])  # fmt: skip
def test_a_sum_in_float32_that_stays(change: Any) -> None:
    plan, v = in_float32()
    change_graph = Build()
    change_graph.graph = plan.graph
    change(change_graph, v)
    AddNorm(able())(plan)
    assert all(edit.round_sum for edit in plan.fused)


def test_a_sum_in_float32_behind_a_view_stays() -> None:
    g = Build((4, 6, 64), dtype="bfloat16")
    x, r = leaf(g, 4, 6, 64, name="a", dtype="bfloat16"), leaf(g, 4, 6, 64, name="b", dtype="bfloat16")
    s = native(g.op("add", g.op("cast", x, dtype="float32"), g.op("cast", r, dtype="float32")))
    y = g.op("cast", rms(g, native(g.op("reshape", s, shape=(24, 64))), (1,)), dtype="bfloat16")
    plan = start(g, y, g.op("cast", s, dtype="bfloat16"))
    AddNorm(able())(plan)
    assert [e.round_sum for e in plan.fused] == [True]


def biased(change: Callable[[Build, dict[str, Value]], None] = lambda g, v: None, first: bool = True,
           wide: bool = False) -> tuple[Plan, dict[str, Value]]:  # fmt: skip
    """r + (x + b) and its norm; `wide`, from casts of bfloat16."""
    g = Build(dtype="bfloat16" if wide else "float32")
    dtype = g.x.dtype or ""
    v = {"x": rows(g, "x", dtype), "r": rows(g, "r", dtype), "b": g.b}
    read = {n: g.op("cast", v[n], dtype="float32") if wide else v[n] for n in "xr"}
    read["b"] = v["b"] = g.graph.leaf("b", (64,), "float32", fixed=True)
    v["t"] = native(g.op("add", *((read["x"], read["b"]) if first else (read["b"], read["x"]))))
    v["s"] = native(g.op("add", *((v["t"], read["r"]) if first else (read["r"], v["t"]))))
    v["y"] = g.op("cast", rms(g, v["s"]), dtype=dtype) if wide else rms(g, v["s"])
    v["out"] = g.op("cast", v["s"], dtype=dtype) if wide else v["s"]
    change(g, v)
    return start(g, v["y"], v["out"]), v


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_bias_of_a_linear_layer_is_taken_in(first: bool, wide: bool) -> None:
    plan, v = biased(first=first, wide=wide)
    AddNorm(able())(plan)
    (edit,) = plan.fused
    assert (edit.name, edit.inputs, edit.outputs) == ("bias_add_rms_norm", (v["x"], v["r"]), (v["y"], v["out"]))
    assert edit.x_bias is v["b"] and edit.parameters() == [v["b"]] and edit.round_sum is not wide
    plan.clear()
    AddNorm(able(lambda edit: ("", "") if edit.x_bias else None))(plan)  # a front end without such an operator
    assert [(e.name, e.x_bias) for e in plan.fused] == [("add_rms_norm", None)]


@pytest.mark.parametrize("change", [
    lambda g, v: setattr(v["t"], "kept", True),
    lambda g, v: setattr(v["t"], "tainted", True),
    lambda g, v: g.op("neg", v["t"]),
    lambda g, v: setattr(v["t"].producer, "kind", "sub"),
    lambda g, v: setattr(v["t"], "producer", None),
    lambda g, v: setattr(v["b"], "fixed", False),
    lambda g, v: setattr(v["b"], "shape", (1, 64)),
    lambda g, v: setattr(v["b"], "shape", (1,)),
    lambda g, v: setattr(v["b"], "shape", ("B", "S", 64)),
    lambda g, v: setattr(v["b"], "dtype", "float16"),
    lambda g, v: setattr(v["x"], "fixed", True),
    lambda g, v: setattr(v["x"], "shape", (1, "S", 64)),
])  # fmt: skip
def test_a_bias_that_stays(change: Any) -> None:
    plan, _ = biased(change)
    AddNorm(able())(plan)
    assert [(e.name, e.x_bias) for e in plan.fused] == [("add_rms_norm", None)]


def test_the_bias_of_a_norm_stays_there() -> None:
    g = Build()
    r = rows(g, "r")
    n = native(g.op("add", g.op("mul", rms(g, rows(g, "z")), g.w), g.b))
    s = native(g.op("add", n, r))
    y = rms(g, s)
    plan = start(g, y, s)
    AddNorm(able())(plan)
    assert [(e.name, e.inputs) for e in plan.fused] == [("add_rms_norm", (n, r))]


def test_of_two_biases_one_is_taken_in() -> None:
    g = Build()
    a, b = (native(g.op("add", rows(g, name), bias)) for name, bias in (("a", g.b), ("b", g.w)))
    s = native(g.op("add", a, b))
    plan = start(g, rms(g, s), s)
    AddNorm(able())(plan)
    (edit,) = plan.fused
    assert edit.inputs[1] is b and edit.x_bias is g.b


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
    ((True, False), []), ((True, False, True), [(0, 2)]), ((True,), []),
    ((True, False, True, False), [(0, 2)]),  # pairs that interlace could each wait for the other
    ((False, True, True, False), [(0, 3)]), ((True, True, False, False), [(0, 1), (2, 3)]),
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
    assert [e.sites[0].value for e in plan.fused] == [made[1]]


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
