"""The plan of a conversion condition by condition: what others read, hooks, and fewer operators."""

from __future__ import annotations

import pytest

from normfuse.conversion import operator_of, rms
from normfuse.graph import Value
from normfuse.passes.layernorm_to_rmsnorm import convert
from normfuse.recognise import recognise
from tests.conversion_tools import D, Net, can, convert_, counts, planned, reasons, stream, two_norms


# -- constants with other readers -------------------------------------------------------------------------------------


def tied(g: Net, norms: int = 1) -> tuple[Value, Value, Value]:
    table = g.held(30, D)
    h = g.look(table)
    y = g.lin(g.norm(h), 30, False, table)
    return table, h, y if norms == 1 else g.op("add", y, g.lin(g.norm(h), 30))


def test_a_table_that_is_the_output_layer_too() -> None:
    g = Net()
    table, h, y = tied(g)
    plan = planned(g, y)
    assert counts(plan) == (0, 0, 1) and f"{table.name}: linear" in reasons(plan)[0][1]
    g = Net()
    table, h, y = tied(g, norms=2)
    plan = planned(g, y)
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [h] and not plan.copies
    g = Net()
    table, h, y = tied(g)
    plan = planned(g, y, untie=True)
    assert counts(plan) == (1, 0, 0) and h.producer is not None
    assert plan.copies == {table: [h.producer]} and list(plan.edits) == [table]


def test_a_copy_here_does_not_hide_a_reader_there() -> None:
    g = Net()
    table, _h, y = tied(g)
    other = g.lin(g.x)
    plan = planned(g, y, two_norms(g, other), g.act(other), untie=True)
    assert counts(plan) == (3, 1, 0) and list(plan.copies) == [table] and [v for v, _ in plan.operators] == [other]


def test_only_constants_are_copied() -> None:
    g = Net()
    h = g.lin(g.x)
    y = g.lin(g.norm(h))
    assert counts(planned(g, y, h, untie=True)) == (0, 0, 1)


def test_constants_of_one_storage() -> None:
    g = Net()
    a, b = g.held(30, D), g.held(30, D)
    y = g.lin(g.norm(g.look(a)), 30, False, b)
    assert counts(planned(g, y)) == (1, 0, 0)
    plan = planned(g, y, twins=lambda v: "one" if v in (a, b) else v)
    assert counts(plan) == (0, 0, 1) and f"its storage is that of {b.name} too" in reasons(plan)[0][1]
    both = Net()
    a, b = both.held(30, D), both.held(30, D)
    h = both.op("add", both.look(a), both.look(b))
    y = both.lin(both.norm(h))
    assert counts(planned(both, y, twins=lambda v: "one" if v in (a, b) else v)) == (1, 0, 0)  # both change alike
    dead = Net()
    a, b = dead.held(30, D), dead.held(30, D)
    y = dead.lin(dead.norm(dead.look(a)))
    dead.look(b)
    assert counts(planned(dead, y, twins=lambda v: "one" if v in (a, b) else v)) == (1, 0, 0)
    z = dead.lin(dead.x, 30, False, b)
    assert counts(planned(dead, y, z, twins=lambda v: "one" if v in (a, b) else v)) == (0, 0, 1)


def test_a_table_that_is_read_at_two_places_is_copied_for_both() -> None:
    g = Net()
    table = g.held(30, D)
    first = g.look(table)
    assert g.graph.nodes[0].outputs[0] is first
    h = g.op("add", first, g.op("neg", g.look(table)))
    y = g.lin(g.norm(h), 30, False, table)
    plan = planned(g, y, untie=True)
    assert counts(plan) == (1, 0, 0) and len(plan.copies[table]) == 2
    derivation = plan.proof[plan.sites[0]].derivation
    assert len(derivation) == len(set(derivation)) == 4 and not any("as shown" in line for line in derivation)


def test_a_value_that_is_reached_twice_is_shown_once() -> None:
    g = Net()
    a, b = g.lin(g.x), g.lin(g.x)
    h = g.op("add", g.op("add", a, g.op("neg", a)), b)
    y = g.norm(h)
    for reader in h.uses:
        reader.name = ""
    plan = planned(g, g.lin(y))
    (proof,) = plan.proof.values()
    assert len(proof.edits) == 4 and len(proof.derivation) == 5 and proof.readers[0] == f"{h.name}: layer_norm"


def test_a_constant_that_a_norm_reads_itself_is_not_copied() -> None:
    """Learned queries: the copy would be the norm's, and what stands in its place reads the old one."""
    g = Net()
    queries = g.held(2, 6, D)
    y = g.lin(g.norm(queries))
    assert counts(planned(g, y, untie=True)) == (1, 0, 0)
    plan = planned(g, y, g.act(queries), untie=True)
    assert counts(plan) == (0, 0, 1) and not plan.copies
    assert reasons(plan)[0][0] == "NF302" and "reads it as it is" in reasons(plan)[0][1]
    moved = g.lin(g.norm(g.op("add", queries, g.held(2, 6, D))))  # nor where a sum asks for it, too
    plan = planned(g, y, moved, g.act(queries), untie=True)
    assert queries not in plan.copies and plan.sites == []


def test_a_constant_that_the_caller_may_replace_is_not_copied() -> None:
    g = Net()
    table, _h, y = tied(g)
    table.fixed, table.overridable = False, True
    assert not planned(g, y, untie=True).copies


# -- norms that are none of ours --------------------------------------------------------------------------------------


def test_norms_that_cannot_be_converted_by_themselves() -> None:
    g = Net()
    h = g.lin(g.x)
    dead = g.norm(h)
    two = g.norm(h, affine=False, axes=(1, 2))
    y = g.lin(g.norm(h))
    plan = planned(g, y, g.lin(two))
    assert len(plan.sites) == 0
    said = {site.value: (r.code, r.message) for site, r in plan.kept.items()}
    assert said[dead] == ("NF301", "no output of the graph depends on it")
    assert said[two] == ("NF301", "it normalises over 2 axes at once")
    k = Net(("B", 6, "D"))
    plan = convert_(k, k.norm(k.op("neg", k.x), affine=False))
    assert reasons(plan) == [("NF301", "the size of its axis is not known")]


def test_a_front_end_may_veto_a_norm() -> None:
    g = Net()
    h = g.lin(g.x)
    first, second = g.norm(h), g.norm(h)
    plan = planned(g, g.lin(first), g.lin(second), fits=lambda site, inner: ("NF305", "no")
                   if site.value is first else None)  # fmt: skip
    assert counts(plan) == (1, 0, 1) and reasons(plan) == [("NF305", "no")]
    assert [site.value for site in plan.sites] == [second]


def test_a_value_that_is_written_in_place_stays() -> None:
    g = Net()
    h = g.lin(g.x)
    y = two_norms(g, h)
    found = recognise(g.graph)
    h.tainted = y.kept = True
    plan = convert(g.graph, found, can())
    assert [v for v, _ in plan.operators] == [h] and plan.seeds[h] == f"{h.name} is written in place"


def test_a_stream_in_another_type_is_centred_through_its_cast() -> None:
    for kind in ("cast", "identity"):
        g = Net()
        h = g.lin(g.x)
        copy = g.op(kind, h, dtype="float64" if kind == "cast" else "float32")
        first = g.spelled(copy)
        s = g.op("add", copy, g.lin(g.act(first)))
        plan = planned(g, g.lin(g.norm(s)))
        assert counts(plan) == (2, 0, 0) and [site.norm.x for site in plan.sites] == [h, s]


def test_a_norm_that_reads_its_input_and_a_copy_of_it() -> None:
    """Its own nodes are not taken for blind then: one might be centred and the other not."""
    g = Net()
    h = g.lin(g.x)
    copy = g.op("identity", h)
    r = g.op("rsqrt", g.op("add", g.mean(g.op("square", g.op("sub", copy, g.mean(copy)))), g.c(1e-5)))
    first = g.op("mul", g.op("sub", h, g.mean(h)), r)
    s = g.op("add", copy, g.lin(g.act(first)))
    plan = planned(g, g.lin(g.norm(s)))
    assert len(plan.sites) + len(plan.kept) == 2 and (len(plan.sites) < 2 or plan.operators)


def test_what_is_centred_already_is_no_copy() -> None:
    g = Net()
    h = g.lin(g.x)
    c = g.op("sub", h, g.mean(h))
    r = g.op("rsqrt", g.op("add", g.mean(g.op("square", c)), g.c(1e-5)))
    s = g.op("add", g.lin(g.x), c)
    plan = planned(g, g.lin(g.op("mul", c, r)), g.lin(g.norm(s)))
    assert s in [site.norm.x for site in plan.sites] and len(plan.sites) == 1


def test_two_ways_to_be_centred_are_one_too_many() -> None:
    g = Net()
    h = g.lin(g.x)
    heads = g.op("reshape", h, shape=(2, 6, 2, 4))
    plan = planned(g, g.lin(g.norm(h)), g.lin(g.norm(heads)))
    assert counts(plan) == (0, 0, 2) and any("overlap" in text for _, text in reasons(plan))
    k = Net((2, D, D))
    h = k.lin(k.x)
    turned = k.op("transpose", h, perm=(0, 2, 1), shape=(2, D, D))
    plan = planned(k, k.lin(k.norm(h)), k.lin(k.norm(turned)))
    assert counts(plan) == (0, 0, 2) and any("centred in two ways" in text for _, text in reasons(plan))


# -- the inside of a norm ---------------------------------------------------------------------------------------------


def leaking(which: str) -> tuple[Net, Value, Value]:
    g = Net()
    h = g.lin(g.x)
    mean = g.mean(h)
    c = g.op("sub", h, mean)
    var = g.mean(g.op("square", c))
    r = g.op("rsqrt", g.op("add", var, g.c(1e-5)))
    y = g.lin(g.op("mul", c, r))
    return g, y, {"mean": mean, "c": c, "var": var, "r": r}[which]


@pytest.mark.parametrize("which", ["mean", "c", "var", "r"])
def test_an_inner_value_that_is_read_elsewhere(which: str) -> None:
    g, y, inner = leaking(which)
    assert counts(planned(g, y)) == (1, 0, 0)
    g.act(inner)  # by what is dead
    assert counts(planned(g, y)) == (1, 0, 0)
    for kept in (False, True):
        g, y, inner = leaking(which)
        plan = planned(g, y, inner if kept else g.act(inner))
        assert counts(plan) == (0, 0, 1)


def test_a_copy_that_others_read_does_not_make_a_norm_see_more() -> None:
    for kind, x in (("cast", "h"), ("identity", "h"), ("neg", "copy")):
        g = Net()
        h = g.lin(g.x)
        copy = g.op(kind, h, dtype="float64" if kind == "cast" else "float32")
        first, second = g.spelled(copy), g.spelled(copy)
        plan = planned(g, g.lin(first), g.lin(second))
        assert counts(plan) == (2, 1 if x == "h" else 0, 0), kind
        assert {site.norm.x for site in plan.sites} == {h if x == "h" else copy}
        plan = planned(g, g.lin(first), g.lin(second), g.act(copy))
        assert counts(plan) == (2, 1, 0), kind


def test_the_operator_that_a_norm_stands_in() -> None:
    g = Net()
    h = g.lin(g.x)
    flat = g.op("reshape", h, shape=(12, D))
    n = g.norm(flat)
    y = g.op("reshape", n, shape=(2, 6, D))
    (site,) = recognise(g.graph).sites
    inner = operator_of(site)
    assert site.value in (n, y) and inner.value is n and inner.norm.x is flat and inner.norm.axes == (1,)
    plan = planned(g, g.lin(y))
    assert counts(plan) == (1, 0, 0)
    assert plan.inner == ({site_: plan.inner[site_] for site_ in plan.sites} if site.value is y else {})
    k = Net()
    k.spelled(k.x)
    (plain_,) = recognise(k.graph).sites
    assert operator_of(plain_) is plain_
    for node in k.graph.nodes:
        node.native = "one"
    (taken_apart,) = recognise(k.graph).sites
    assert taken_apart.is_op and operator_of(taken_apart) is taken_apart
    scaled_ = Net()
    n = scaled_.norm(scaled_.op("reshape", scaled_.x, shape=(12, D)), affine=False)
    last = scaled_.op("reshape", scaled_.op("mul", n, scaled_.w), shape=(2, 6, D))
    (site,) = recognise(scaled_.graph).sites
    assert site.value is last and not site.is_op and operator_of(site) is site
    m = Net()
    m.norm(m.x)
    (whole,) = recognise(m.graph).sites
    assert operator_of(whole) is whole and rms(whole.norm).kind == "rms_norm" and rms(whole.norm).x is m.x
    assert rms(whole.norm, m.w).x is m.w


# -- hooks ------------------------------------------------------------------------------------------------------------


def test_an_operator_that_changes_a_value_for_all_its_readers() -> None:
    g = Net()
    h = g.act(g.lin(g.x))
    y = two_norms(g, h)
    assert counts(convert_(g, y, hooks=True)) == (2, 1, 0)
    dead = g.act(h)
    assert counts(convert_(g, y, hooks=True)) == (2, 1, 0)
    plan = convert_(g, y, dead, hooks=True)
    assert counts(plan) == (0, 0, 2)
    assert reasons(plan) == [("NF302", f"{h.name} is also read by {dead.name}")] * 2
    assert counts(convert_(g, y, dead)) == (2, 1, 0)
    dead.producer.name = ""  # type: ignore[union-attr]
    assert reasons(convert_(g, y, dead, hooks=True))[0][1] == f"{h.name} is also read by activation"


def test_an_operator_for_all_readers_may_serve_a_node_that_asked() -> None:
    g = Net()
    a = g.act(g.x)
    h = g.op("add", a, g.lin(g.x))
    plan = convert_(g, two_norms(g, h), hooks=True, place=lambda v: v is a)
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [a]


def test_an_output_that_an_operator_would_change() -> None:
    g = Net()
    h = g.act(g.lin(g.x))
    y = two_norms(g, h)
    plan = convert_(g, y, h, hooks=True)
    assert reasons(plan) == [("NF302", f"{h.name} is an output of the graph")] * 2
    k = Net()
    h = k.act(k.lin(k.x))
    y = k.op("add", two_norms(k, h), k.op("activation", h, softmax=True))
    assert counts(convert_(k, y, hooks=True)) == (2, 1, 0)  # a softmax does not see it


# -- fewer operators --------------------------------------------------------------------------------------------------


def test_one_operator_behind_a_sum_in_place_of_two_ahead_of_it() -> None:
    g = Net()
    a, b = g.act(g.x), g.act(g.lin(g.x))
    h = g.op("add", a, b)
    plan = planned(g, two_norms(g, h))
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [h]
    assert plan.seeds[h].startswith(f"activation {a.name}") or plan.seeds[h].startswith(f"activation {b.name}")


def test_an_operator_stays_where_its_value_is_asked_for_by_several() -> None:
    g = Net()
    a = g.act(g.x)
    h = g.op("add", a, g.lin(g.x))
    y = g.op("add", g.lin(g.norm(h)), g.lin(g.norm(a)))
    plan = planned(g, y, g.lin(g.norm(a)))
    assert counts(plan) == (3, 1, 0) and [v for v, _ in plan.operators] == [a] and len(plan.edits) == 2


def test_an_operator_does_not_sink_below_what_else_is_asked_for() -> None:
    """b is asked for by the sum, maybe by way of another value, and by another norm: centred by its constants it serves
    both."""
    for ahead in (False, True):
        g = Net()
        a, b = g.act(g.x), g.lin(g.x)
        h = g.op("add", a, g.op("cast", b) if ahead else b)
        y = g.op("add", two_norms(g, h), g.lin(g.norm(b)))
        plan = planned(g, y)
        assert counts(plan) == (3, 1, 0) and [v for v, _ in plan.operators] == [a]


def test_operators_of_branches_side_by_side_sink_into_one() -> None:
    """What the first sum reads is asked for by norms too; what the others read is not, so that one operator stands
    behind the last, and one where the stream comes from."""
    g = Net()
    x = h = g.lin(g.x)
    for _ in range(3):
        h = g.op("add", h, g.act(g.lin(g.norm(x))))
    plan = planned(g, two_norms(g, h))
    assert counts(plan) == (5, 2, 0) and {v for v, _ in plan.operators} == {h, x}


def test_an_operator_sinks_through_values_where_none_can_stand() -> None:
    g = Net()
    a = g.act(g.x)
    mid = g.op("neg", a)
    h = g.op("neg", mid)
    y = two_norms(g, h)
    for places, expected in (((a, mid, h), h), ((a, h), h), ((a, mid), mid), ((a,), a)):
        plan = planned(g, y, place=lambda v, places=places: v in places)
        assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [expected]


def test_an_operator_does_not_sink_into_parts_of_an_axis() -> None:
    g = Net()
    a = g.act(g.x)
    heads = g.op("reshape", a, shape=(2, 6, 2, 4))
    plan = planned(g, two_norms(g, heads))
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [heads]


def test_an_operator_does_not_sink_below_a_fork() -> None:
    g = Net()
    a = g.act(g.x)
    mid = g.op("neg", a)
    y = g.op("add", g.lin(g.norm(g.op("neg", mid))), g.lin(g.norm(g.op("mul", mid, g.c(2.0)))))
    plan = planned(g, y, place=lambda v: v is not mid)
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [a]


def test_an_operator_sinks_past_a_value_that_is_wanted_in_parts() -> None:
    g = Net((2, 6, 2, 4))
    a = g.act(g.x)
    merged = g.op("reshape", a, shape=(2, 6, D))
    heads = g.op("reshape", merged, shape=(2, 6, 2, 4))
    y = two_norms(g, heads)
    for places, expected in (((a, merged), a), ((a, merged, heads), heads)):
        plan = planned(g, y, place=lambda v, places=places: v in places)
        assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [expected]


def test_an_operator_ahead_of_a_sum_counts_against_the_norm_behind_it() -> None:
    g = Net()
    a = g.act(g.x)
    h = g.op("add", a, g.lin(g.x))
    plan = planned(g, g.lin(g.norm(h)), place=lambda v: v is a)
    assert counts(plan) == (0, 0, 1) and reasons(plan)[0][0] == "NF303"
    k = Net()
    start = k.act(k.x)
    plan = planned(k, k.lin(k.norm(k.op("neg", k.op("add", start, k.lin(k.x))))), place=lambda v: v is start)
    assert counts(plan) == (0, 0, 1)
    plan = planned(g, two_norms(g, h), place=lambda v: v is a)
    assert counts(plan) == (3, 1, 0)
    proof = plan.proof[plan.sites[0]]
    assert len(proof.operators) == 1 and len(proof.edits) == 2 and len(proof.derivation) == 2
    later = plan.proof[plan.sites[1]]
    assert later.derivation == [f"{h.name}: as shown for {plan.sites[0].label}"]
    assert not later.edits and not later.operators and not later.readers


def test_a_value_of_mean_zero_does_not_tie_two_parts_together() -> None:
    g = Net()
    zero = g.norm(g.lin(g.x), affine=False)
    a, b = g.act(g.x), g.act(g.lin(g.x))
    first = g.lin(g.norm(g.op("add", zero, a)))
    second = two_norms(g, g.op("add", zero, b))
    plan = planned(g, first, second, place=lambda v: v in (a, b))
    assert counts(plan) == (3, 1, 1) and [v for v, _ in plan.operators] == [b]
    proof = plan.proof[plan.sites[1]]
    assert f"{zero.name} has mean zero already" in proof.derivation and proof.operators


def test_parts_that_do_not_meet_are_weighed_each_for_itself() -> None:
    g = Net()
    bent = g.act(g.lin(g.x))
    first = g.lin(g.norm(bent))
    other = g.lin(g.x)
    second = g.op("add", g.lin(g.norm(other)), g.lin(g.norm(other)))
    plan = planned(g, g.op("add", first, second))
    assert counts(plan) == (2, 0, 1) and reasons(plan)[0][0] == "NF303"
    k = Net()
    a, b = k.act(k.x), k.act(k.lin(k.x))
    plan = planned(k, k.op("add", two_norms(k, a), k.lin(k.norm(b))))
    assert counts(plan) == (2, 1, 1) and [v for v, _ in plan.operators] == [a]


def test_the_operators_of_a_part_count_together() -> None:
    """Two operators and two norms on one stream: no gain, though the second norm needs one of them only."""
    g = Net()
    a = g.act(g.x)
    h = g.op("add", a, g.lin(g.x))
    n = g.norm(h)
    b = g.act(n)
    h2 = g.op("add", h, b)
    plan = planned(g, g.lin(g.norm(h2)), g.act(h))
    assert len(plan.sites) == 0
    assert [text.partition(":")[0] for _, text in reasons(plan)] == [
        "2 centring operators would be needed for 2 norms"] * 2  # fmt: skip


def test_a_stream_with_one_output_more_needs_operators() -> None:
    g = Net()
    start, y = stream(g, layers=3)
    plan = planned(g, y, start)
    assert counts(plan) == (4, 1, 0) and plan.seeds.keys() == {v for v, _ in plan.operators} == {start}


# -- what stays as it was ---------------------------------------------------------------------------------------------


def test_witnesses_are_what_folded_layers_give() -> None:
    from normfuse.passes.fold_affine import Contraction

    g = Net()
    h = g.lin(g.x)
    y, z = g.lin(g.norm(h)), g.op("neg", g.x)
    plan = planned(g, y)
    assert not plan.witnesses()
    assert h.producer is not None and y.producer is not None
    w, c, gain, shift = g.held(D, D), g.held(D), g.held(D), g.held(D)
    one = Contraction(y.producer, w, 1, 0, c, y)
    plan.folds = [("bias", ((1.0, ((shift, 1),)),), [one]), ("scale", ((1.0, ((gain, 1),)),), [one])]
    assert plan.witnesses() == [y]
    plan.zero.append(g.b)
    assert plan.constants() == [*plan.edits, g.b, shift, w, c, gain]
    plan.folds = [("bias", ((1.0, ()),), [Contraction(y.producer, w, 1, 0, None, v) for v in (h, z)])]
    assert plan.witnesses() == [z]  # h changes
    z.native = None
    assert plan.witnesses() == [] and plan.constants()[-1] is w
