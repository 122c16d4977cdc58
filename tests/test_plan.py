"""What a plan leaves without a reader, and plans as a whole."""

from __future__ import annotations

from normfuse.config import Config
from normfuse.norm import Refusal, Site
from normfuse.passes.fuse_norm import FuseNorm, stuck
from normfuse.passes.remove_dead import RemoveDead, live
from normfuse.passmanager import fuse, passes, plan as planned
from normfuse.plan import Fused, Plan, Replace
from normfuse.recognise import recognise
from tests.build import Build
from tests.plan_tools import able, native, rows, sandwich, scaled, single, start


# -- what is left without a reader ------------------------------------------------------------------------------------


def test_what_an_output_depends_on_is_alive() -> None:
    g = Build()
    a = g.op("neg", g.x)
    b, dead = g.op("neg", a), g.op("neg", a)
    b.kept = True
    nodes = [v.producer for v in (a, b)]
    assert live(g.graph) == set(nodes)
    effect = g.op("opaque", dead, effect=True)
    assert live(g.graph) == {*nodes, dead.producer, effect.producer}
    h = Build()
    effect = h.op("opaque", h.x, effect=True)
    assert live(h.graph) == {effect.producer}


def test_what_is_replaced_depends_on_the_inputs_of_its_operator() -> None:
    g, y, plan = single()
    assert len(live(g.graph)) == len(g.graph.nodes) == 6
    FuseNorm(able())(plan)
    assert live(g.graph, plan.edits()) == set()
    before = g.op("neg", g.op("neg", g.x))
    before.kept = True
    RemoveDead()(plan)
    assert [node.outputs[0] for node in plan.remove][-1] is y and len(plan.remove) == 6
    again = start(g, y)
    RemoveDead()(again)
    assert not again.remove


def test_what_was_dead_before_stays() -> None:
    g, y, plan = single()
    square = g.graph.nodes[0]
    dead = g.op("opaque", square.outputs[0])
    FuseNorm(able())(plan)
    RemoveDead()(plan)
    assert dead.producer not in plan.remove and y.producer in plan.remove
    assert len(plan.remove) == 5 and square not in plan.remove  # nor what it reads
    assert dead.producer is not None
    dead.producer.native = y.producer.native  # of an operator with two results, of which one is unread
    plan.remove.clear()
    RemoveDead()(plan)
    assert len(plan.remove) == 7 and square in plan.remove


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_knows_what_is_free() -> None:
    g = Build()
    y, z = scaled(g, g.x), scaled(g, rows(g, "z"))
    plan = start(g, y, z)
    a, b = plan.found.sites
    assert plan.free() == [a, b]
    plan.left[a] = "why"
    assert plan.free() == [b]
    plan.refuse(b, Refusal("NF202", "", ""))
    assert plan.free() == []
    plan.clear()
    assert plan.free() == [a] and plan.refused
    plan.refused.clear()
    fused = Fused("norm", (a,), (), (y,))
    plan.fused.append(fused)
    plan.replace.append(Replace(b))
    assert plan.free() == [] and plan.edits() == [fused, *plan.replace]
    plan.remove.append(g.graph.nodes[0])
    plan.clear()
    assert plan.free() == [a, b] and not plan.edits() and not plan.remove


def test_an_edit_that_failed_is_not_made_again() -> None:
    g, y, plan = single()
    (site,) = plan.found.sites
    edit = Fused("norm", (site,), (g.x,), (y,))
    assert plan.fuse(edit, able()) and plan.fused == [edit]
    assert not plan.fuse(edit, able(None)) and not plan.fuse(edit, able(lambda e: ("", "")))
    plan.clear()
    plan.fail(edit, Refusal("NF201", "", ""))
    assert not plan.fuse(edit, able()) and not plan.refused and plan.free() == [site]
    assert plan.fuse(Fused("latent", (site,), (g.x,), (y,)), able())
    plan.clear()
    plan.fail(Replace(site), Refusal("NF201", "", ""))
    assert plan.refused[site].code == "NF201" and plan.free() == []


def test_the_widest_fusion_goes_first() -> None:
    order = [type(step).__name__ for step in passes(Config(), able())]
    assert order == ["Sandwich", "NormAdd", "AddNorm", "QKPair", "Latent", "FuseNorm", "RemoveDead"]
    assert [type(step).__name__ for step in passes(Config(), able(None))] == ["FuseNorm", "RemoveDead"]
    step = passes(Config(numerics="fast"), able())[-2]
    assert isinstance(step, FuseNorm) and step.numerics == "fast"


def test_a_plan_of_a_whole_graph() -> None:
    g, (f, r, n, s, y) = sandwich()
    s.kept = y.kept = True
    made = planned(g.graph, Config(), able())
    assert [(e.op, e.outputs) for e in made.fused] == [("norm_add", (s,))]  # by its place it is no sandwich
    assert [e.site.value for e in made.replace] == [y]
    assert {v.name for node in made.remove for v in node.outputs} >= {n.name}
    assert not planned(g.graph, Config(), able(), rewrite=False).edits()
    assert [site.placement for site in made.found.sites] == ["embedding", "post_residual"] and f.uses and r.uses


def test_a_norm_that_nothing_reads_is_left() -> None:
    g = Build()
    y, dead = scaled(g, g.x), scaled(g, rows(g, "z"))
    y.kept = True
    plan = planned(g.graph, Config(), able(None))
    assert [(site.value, why) for site, why in plan.left.items()] == [(dead, "nothing reads it")]
    assert [e.site.value for e in plan.replace] == [y]


def test_a_fusion_that_leaves_a_reduction_alive_is_taken_back() -> None:
    g = Build()
    f, r = rows(g, "f"), rows(g)
    m = g.mean(g.op("square", f))
    n = g.op("mul", f, g.op("rsqrt", g.op("add", m, g.c(1e-5))))
    s = native(g.op("add", r, n))
    for value in (s, g.op("opaque", m)):
        value.kept = True
    plan = Plan(g.graph, recognise(g.graph))
    plan.fused.append(Fused("norm_add", (plan.found.sites[0],), (f, r), (s,)))
    assert stuck(plan) == plan.fused
    plan.clear()
    fuse(plan, Config(), able())
    assert not plan.edits()
    assert [(op, why.code) for (op, _), why in plan.broken.items()] == [("norm_add", "NF116")]
    assert [why.code for why in plan.refused.values()] == ["NF116"]
    assert isinstance(plan.found.sites[0], Site)
