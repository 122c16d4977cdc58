"""The passes on graphs written by hand, condition by condition: an addition, and the norm of the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from normfuse.graph import Value
from normfuse.passes.add_norm import AddNorm
from normfuse.plan import Fused, Plan
from normfuse.residual import taken
from tests.build import Build, leaf, ln, rms
from tests.plan_tools import able, in_float32, native, rows, scaled, shown, start


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
