"""The pass for a norm by itself."""

from __future__ import annotations

from typing import Any

import pytest

from normfuse.graph import Node, Value
from normfuse.norm import Refusal
from normfuse.passes.fuse_norm import FuseNorm, computed_twice, stuck
from normfuse.passes.remove_dead import live
from normfuse.plan import Fused, Replace
from normfuse.residual import copies
from tests.build import Build, centred, rms, rstd
from tests.plan_tools import single, able, rows, scaled, start


# -- a norm by itself -------------------------------------------------------------------------------------------------


def operator(g: Build, v: Value) -> Value:
    return g.op("rms_norm", v, axes=(2,), eps=1e-5)


def in_two_types(g: Build, v: Value) -> Value:
    """An order of roundings that no operator has."""
    m = g.op("cast", g.mean(g.op("square", v)), dtype="float32")
    return g.op("mul", v, g.op("cast", g.op("rsqrt", g.op("add", m, g.c(1e-3))), dtype="float16"))


def test_a_norm_that_is_spelled_out_is_replaced() -> None:
    g, y, plan = single()
    FuseNorm(able())(plan)
    (edit,) = plan.replace
    assert (edit.site.value, edit.as_written, edit.mean, edit.rstd) == (y, False, None, None)
    assert edit.sites == (edit.site,) and edit.inputs == (g.x,) and edit.outputs == (y,)
    assert edit.parameters() == [g.w] and edit.computes() == {y: [g.x, g.w]}
    assert not plan.fused and not plan.refused and not plan.left


def test_a_norm_that_is_done_stays() -> None:
    _g, _y, plan = single()
    FuseNorm(able(done=lambda site: True))(plan)
    assert not plan.edits() and not plan.refused and not plan.left


def test_a_step_of_a_norm_that_is_done_stays() -> None:
    """(x + mean(x)) * rstd is none, but it is one that its mean is taken from, which is the first step of another."""
    g = Build()
    centre = g.op("sub", g.x, g.mean(g.x))
    r = g.op("rsqrt", g.op("add", g.mean(g.op("square", centre)), g.c(1e-3)))
    v = g.op("mul", g.op("add", g.x, g.mean(g.x)), r)
    step = g.op("sub", v, g.mean(v))
    y = g.op("mul", step, rstd(g, step))
    z = scaled(g, rows(g, "z"))
    plan = start(g, y, z)
    assert [site.value for site in plan.found.sites] == [step, y, z]
    FuseNorm(able(done=lambda site: site.value is y))(plan)
    assert [edit.site.value for edit in plan.replace] == [z] and list(plan.refused.values()) == [
        Refusal("NF116", step.name, f"it is a step of the norm {y.name}, which stands there already")]
    plan.refused.clear()
    plan.clear()
    FuseNorm(able())(plan)
    assert [edit.site.value for edit in plan.replace] == [y, z] and [r.code for r in plan.refused.values()] == ["NF116"]


def test_a_norm_that_is_an_operator_stays_where_nothing_is_to_be_gained() -> None:
    _g, _y, plan = single(operator)
    FuseNorm(able())(plan)
    assert not plan.edits() and not plan.refused
    FuseNorm(able(leave=lambda site, pair: "as fast"))(plan)
    assert not plan.edits() and list(plan.left.values()) == ["as fast"]
    plan.clear()
    FuseNorm(able(leave=lambda site, pair: None))(plan)
    assert [e.op for e in plan.fused] == ["norm"] and not plan.replace
    plan.clear()
    veto: dict[str, Any] = {"expressible": lambda norm, value: ("NF202", "no such type")}
    FuseNorm(able(lambda edit: ("", ""), leave=lambda site, pair: None, **veto))(plan)  # no plain operator for another
    assert not plan.edits() and not plan.refused


@pytest.mark.parametrize("first", ["done", "left", "fused"])
def test_a_norm_that_is_settled_does_not_end_the_pass(first: str) -> None:
    g = Build()
    y, z = scaled(g, g.x), scaled(g, rows(g, "z"))
    plan = start(g, y, z)

    def is_first(site: Any, yes: Any, no: Any) -> Any:
        return yes if getattr(site, "value", None) is y else no

    can = {"done": able(None, done=lambda s: is_first(s, True, False)),
           "left": able(None, leave=lambda s, pair: is_first(s, "small", None)),
           "fused": able(lambda e: is_first(e.sites[0], None, ("", "")), leave=lambda *_: None)}[first]  # fmt: skip
    FuseNorm(can)(plan)
    assert [e.site.value for e in plan.replace] == [z]


def test_an_operator_of_its_own_goes_first_where_the_front_end_weighs_gains() -> None:
    _g, _y, plan = single()
    FuseNorm(able(leave=lambda site, pair: None))(plan)
    assert [e.op for e in plan.fused] == ["norm"] and not plan.replace
    plan.clear()
    FuseNorm(able(lambda edit: ("", ""), leave=lambda site, pair: None))(plan)
    assert not plan.fused and len(plan.replace) == 1
    plan.clear()
    FuseNorm(able(leave=lambda site, pair: "small"))(plan)
    assert not plan.edits() and list(plan.left.values()) == ["small"]


def test_where_the_plain_operator_will_not_do_another_may() -> None:
    veto: dict[str, Any] = {"expressible": lambda norm, value: ("NF202", "no such type")}
    _g, y, plan = single()
    FuseNorm(able(**veto))(plan)
    assert [e.op for e in plan.fused] == ["norm"] and not plan.replace and not plan.refused
    plan.clear()
    FuseNorm(able(None, **veto))(plan)
    assert not plan.edits()
    assert list(plan.refused.values()) == [Refusal("NF202", y.name, "no such type")]


@pytest.mark.parametrize(("functions", "numerics", "written", "code"), [
    (True, "exact", True, ""), (False, "exact", False, "NF117"), (False, "fast", False, ""), (True, "fast", False, ""),
])  # fmt: skip
def test_an_order_of_roundings_that_no_operator_has(functions: bool, numerics: str, written: bool, code: str) -> None:
    _g, y, plan = single(in_two_types, dtype="float16")
    FuseNorm(able(None, functions=True) if functions else able(None), numerics)(plan)
    assert [e.as_written for e in plan.replace] == ([] if code else [written])
    assert [r.code for r in plan.refused.values()] == ([code] if code else [])
    if code:
        assert plan.refused[plan.found.sites[0]].message.startswith("no operator has this order of roundings: stat")
    assert y.name == plan.found.sites[0].label


def test_a_reduction_that_is_read_elsewhere_would_be_computed_twice() -> None:
    g = Build()
    m = g.mean(g.op("square", g.x))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))
    elsewhere = g.op("opaque", m)
    for value, text in ((elsewhere, f"{m.name}, inside the norm, is also read by {elsewhere.name}"),
                        (m, f"{m.name}, inside the norm, is an output of the graph")):  # fmt: skip
        for v in (elsewhere, m):
            v.kept = False
        plan = start(g, y, value)
        FuseNorm(able())(plan)
        assert not plan.replace
        assert list(plan.refused.values()) == [Refusal("NF116", y.name, text)]
    m.kept = elsewhere.kept = False
    plan = start(g, y)
    FuseNorm(able())(plan)
    assert len(plan.replace) == 1  # nobody reads what reads it


def test_a_reader_without_a_name_is_told_by_its_operator() -> None:
    g = Build()
    m = g.mean(g.op("square", g.x))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))
    dead, reader = g.op("opaque", m), g.op("activation", m)
    assert reader.producer is not None and dead.producer is not None
    reader.producer.name = ""
    plan = start(g, y, reader)
    FuseNorm(able())(plan)
    assert [r.message.rsplit(" ", 1)[1] for r in plan.refused.values()] == ["activation"]


def test_a_value_read_elsewhere_that_holds_no_reduction_is_no_obstacle() -> None:
    g = Build()
    wide = g.op("add", g.w, g.c(1.0))
    y = g.op("mul", rms(g, g.op("identity", g.x)), wide)
    plan = start(g, y, g.op("opaque", wide))
    FuseNorm(able())(plan)
    assert len(plan.replace) == 1 and not plan.refused
    g = Build()
    square = g.op("square", g.x)
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", g.mean(square), g.c(1e-5))))
    plan = start(g, y, g.op("opaque", square))
    FuseNorm(able())(plan)
    assert len(plan.replace) == 1 and not plan.refused


def test_a_norm_that_falls_away_takes_those_behind_it_along() -> None:
    """The second norm's statistics are read by an addition whose own reader is the first one's."""
    g = Build()
    m = g.mean(g.op("square", g.x))
    y = g.op("mul", g.x, g.op("rsqrt", g.op("add", m, g.c(1e-5))))
    z = rows(g, "z")
    mz = g.mean(g.op("square", z))
    second = g.op("mul", z, g.op("rsqrt", g.op("add", mz, g.c(1e-5))))
    plan = start(g, y, second, g.op("opaque", m))
    FuseNorm(able())(plan)
    assert [e.site.value for e in plan.replace] == [second]
    assert [site.value for site in plan.refused] == [y]


def deviations(g: Build, eps: float = 1e-5) -> dict[str, Value]:
    c = centred(g, g.x)
    (mean,) = [n.outputs[0] for n in g.graph.nodes if n.kind == "mean"]
    r = rstd(g, c, eps=eps)
    return {"mean": mean, "rstd": r, "y": g.op("mul", g.op("mul", c, r), g.w), "c": c}


@pytest.mark.parametrize("read", [("mean",), ("rstd",), ("mean", "rstd")])
def test_the_mean_and_the_deviation_may_come_out_of_the_operator(read: tuple[str, ...]) -> None:
    for named in (True, False):
        g = Build()
        v = deviations(g)
        readers = [g.op("opaque", v[k]) for k in read] if named else [v[k] for k in read]
        plan = start(g, v["y"], *readers)
        FuseNorm(able(statistics=lambda norm: True))(plan)
        (edit,) = plan.replace
        assert edit.mean is (v["mean"] if "mean" in read else None)
        assert edit.rstd is (v["rstd"] if "rstd" in read else None)
        assert not edit.as_written and not Replace(edit.site).as_written
        assert edit.computes() == {**{v[k]: [g.x] for k in read}, v["y"]: [g.x, g.w]}
        plan = start(g, v["y"], *readers)
        FuseNorm(able())(plan)
        assert [r.code for r in plan.refused.values()] == ["NF116"]


@pytest.mark.parametrize("other", [
    lambda g, v: g.mean(v["c"]),  # zero
    lambda g, v: g.op("mul", v["mean"], g.c(2.0)),
    lambda g, v: g.op("abs", v["mean"]),
    lambda g, v: rstd(g, v["c"], eps=1e-3),  # of another eps
    lambda g, v: g.op("squeeze", v["mean"], axes=(2,), shape=("B", "S")),  # of another shape
    lambda g, v: g.op("cast", v["mean"], dtype="float64"),
])  # fmt: skip
def test_another_statistic_does_not_come_out_of_it(other: Any) -> None:
    g = Build()
    v = deviations(g)
    z = other(g, v)
    plan = start(g, v["y"], g.op("opaque", z))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert not [e for e in plan.replace if e.mean is z or e.rstd is z]


def test_a_statistic_that_is_read_before_the_operator_could_stand() -> None:
    g = Build()
    c = centred(g, g.x)
    (mean,) = [n.outputs[0] for n in g.graph.nodes if n.kind == "mean"]
    early = g.op("opaque", mean)
    y = g.op("mul", g.op("mul", c, rstd(g, c)), g.w)
    plan = start(g, y, early)
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert not plan.replace and [r.code for r in plan.refused.values()] == ["NF116"]
    early.kept = False
    plan = start(g, y)
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert [e.mean for e in plan.replace] == [None]  # nobody needs it, and what reads it still may not
    plan = start(g, y, g.op("opaque", mean))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert not plan.replace and [r.code for r in plan.refused.values()] == ["NF116"]
    g = Build()
    c = centred(g, g.x)
    (mean,) = [n.outputs[0] for n in g.graph.nodes if n.kind == "mean"]
    y = g.op("mul", g.op("mul", c, rstd(g, c)), g.w)
    later = g.op("opaque", mean)
    plan = start(g, y, later)
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert [e.mean for e in plan.replace] == [mean]


def test_a_mean_that_two_norms_could_give_is_given_once() -> None:
    g = Build()
    v = deviations(g)
    other = g.op("mul", g.op("mul", v["c"], v["rstd"]), g.b)
    plan = start(g, v["y"], other, g.op("opaque", v["mean"]))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert [e.site.value for e in plan.replace] == [v["y"], other] and not plan.refused
    assert [e.mean for e in plan.replace] == [v["mean"], None]


def test_a_magnitude_of_a_mean_does_not_end_the_search() -> None:
    g = Build()
    magnitude = g.op("abs", g.mean(g.x))
    c = centred(g, g.x)
    r = rstd(g, c)
    y = g.op("mul", c, r)
    plan = start(g, y, g.op("opaque", magnitude), g.op("opaque", r))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert [e.rstd for e in plan.replace] == [r]


@pytest.mark.parametrize("again", ["mean", "rstd"])
def test_a_statistic_that_it_gives_already_is_no_way_out(again: str) -> None:
    """The variance is read, and two more means behind the norm, of which it gives one: this ended never."""
    g = Build()
    v = deviations(g)
    (_, variance) = [n.outputs[0] for n in g.graph.nodes if n.kind == "mean"]
    more = [g.mean(g.x) if again == "mean" else rstd(g, v["c"]) for _ in range(2)]
    plan = start(g, v["y"], *(g.op("opaque", u) for u in (variance, *more)))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert not plan.replace and [r.code for r in plan.refused.values()] == ["NF116"]


@pytest.mark.parametrize(("kind", "before", "after", "attrs", "copy"), [
    ("transpose", (4, 4, 64), (4, 4, 64), {"perm": (0, 1, 2)}, True),
    ("transpose", (4, 4, 64), (4, 4, 64), {"perm": (1, 0, 2)}, False),
    ("reshape", (4, "S", 64), (4, "S", 64), {}, True),
    ("reshape", (4, 4, 64), (16, 64), {}, False),
    ("reshape", (4, None, 64), (4, None, 64), {}, False),
    ("reshape", None, None, {}, False),
    ("identity", (4, 64), (4, 64), {}, True),
    ("neg", (4, 64), (4, 64), {}, False),
])  # fmt: skip
def test_a_view_that_changes_nothing_is_a_copy(kind: str, before: Any, after: Any, attrs: Any, copy: bool) -> None:
    source, out = Value("a", before, "float32", index=1), Value("b", after, "float32", index=2)
    assert copies(Node(kind, [source], [out], attrs)) is copy


def test_an_rms_norm_gives_no_statistics() -> None:
    g = Build()
    r = rstd(g, g.x)
    y = g.op("mul", g.x, r)
    plan = start(g, y, g.op("opaque", r))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert not plan.replace and [r.code for r in plan.refused.values()] == ["NF116"]


def test_a_variance_that_no_operator_gives_is_an_obstacle() -> None:
    g = Build()
    v = deviations(g)
    (_, variance) = [n.outputs[0] for n in g.graph.nodes if n.kind == "mean"]
    plan = start(g, v["y"], g.op("opaque", variance), g.op("opaque", v["mean"]))
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert not plan.replace and [r.code for r in plan.refused.values()] == ["NF116"]


def test_the_operator_gives_what_it_can_and_no_more() -> None:
    """One pass: mean(x^2) is read elsewhere, which no operator gives, besides the mean or the deviation."""
    for other in ("mean", "rstd"):
        g = Build()
        mean, square = g.mean(g.x), g.mean(g.op("square", g.x))
        var = g.op("sub", square, g.op("square", mean))
        r = g.op("rsqrt", g.op("add", var, g.c(1e-5)))
        y = g.op("mul", g.op("mul", g.op("sub", g.x, mean), r), g.w)
        plan = start(g, y, g.op("opaque", square), g.op("opaque", mean if other == "mean" else r))
        FuseNorm(able(statistics=lambda norm: True))(plan)
        assert not plan.replace and [why.code for why in plan.refused.values()] == ["NF116"]


def test_a_norm_as_written_gives_no_statistics() -> None:
    g = Build()
    mean = g.mean(g.op("cast", g.x, dtype="float64"))
    c = g.op("sub", g.x, g.op("cast", mean, dtype="float32"))
    y = g.op("mul", c, rstd(g, c))
    for reader in (y, g.op("opaque", mean)):
        plan = start(g, y, reader)
        FuseNorm(able(None, functions=True, statistics=lambda norm: True))(plan)
        assert [(e.as_written, e.mean) for e in plan.replace] == ([(True, None)] if reader is y else [])
    assert [why.code for why in plan.refused.values()] == ["NF116"]


def test_an_effect_without_results_is_no_statistic() -> None:
    g = Build()
    v = deviations(g)
    plan = start(g, v["y"])
    g.graph.node("opaque", [v["rstd"]], [], native=object(), name="print", effect=True)
    FuseNorm(able(statistics=lambda norm: True))(plan)
    assert [e.rstd for e in plan.replace] == [v["rstd"]]


def test_one_reduction_that_stays_alive_is_enough() -> None:
    g = Build()
    v = deviations(g)
    plan = start(g, v["y"], g.op("opaque", v["mean"]))
    (site,) = plan.found.sites
    plan.fused.append(Fused("norm", (site,), (g.x,), (v["y"],)))
    assert stuck(plan) == plan.fused


def test_an_operator_that_gives_a_statistic_too_is_not_doubled() -> None:
    g = Build()
    y = operator(g, g.x)
    assert y.producer is not None
    plan = start(g, y)
    (site,) = plan.found.sites
    edit = Fused("norm", (site,), (g.x,), (y,))

    def needs() -> list[Value]:
        return list(computed_twice(g.graph, [edit], live(g.graph, [edit])).values())

    assert site.is_op and needs() == []
    deviation = g.op("opaque", g.x)  # another output of the same operator
    assert deviation.producer is not None
    deviation.producer.native = y.producer.native = object()
    assert needs() == []
    deviation.kept = True
    assert needs() == [deviation]


def test_what_an_operator_makes_of_a_norm_keeps_nothing_alive() -> None:
    """RMSNormalization with a weight per head: the norm ends inside of it, and its last stage is made anew."""
    g = Build()
    y = operator(g, g.x)
    z = g.op("mul", y, g.op("opaque", g.x))
    assert y.producer is not None and z.producer is not None
    y.producer.native = z.producer.native = object()
    z.kept = True
    plan = start(g, z)
    (site,) = plan.found.sites
    edit = Replace(site)
    assert site.value is y and not computed_twice(g.graph, [edit], live(g.graph, [edit]))
    deviation = g.graph.value("deviation", g.x.shape, g.x.dtype)
    z.producer.outputs.append(deviation)  # what such an operator gives besides stands behind its last stage
    deviation.producer, deviation.kept = z.producer, True
    assert computed_twice(g.graph, [edit], live(g.graph, [edit])) == {edit: deviation}


def test_stages_of_an_operator_may_read_each_other_and_what_it_read() -> None:
    g = Build(dtype="float16")
    wide = g.op("cast", g.x, dtype="float32")
    y = rms(g, wide)
    last = g.op("add", g.op("mul", y, wide), g.op("opaque", g.x, dtype="float32"))
    native = object()
    for node in g.graph.nodes:
        if node.kind != "opaque":
            node.native = native
    plan = start(g, last)
    (site,) = plan.found.sites
    edit = Replace(site)
    assert site.value is y and not computed_twice(g.graph, [edit], live(g.graph, [edit]))


def test_a_norm_that_has_such_an_operator_in_it_is_refused() -> None:
    g = Build()
    y = operator(g, g.x)
    deviation, native = g.op("opaque", g.x), object()
    assert y.producer is not None and deviation.producer is not None
    deviation.producer.native = y.producer.native = native
    plan = start(g, g.op("neg", y), deviation)
    FuseNorm(able())(plan)
    (why,) = plan.refused.values()
    assert why.code == "NF116" and deviation.name in why.message and not plan.edits()
