"""The plan of a conversion on networks of a few nodes, without a front end: what is converted, edited and kept for
which reason. Every plan is carried out in numbers as well, and has to give the same outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from normfuse.centring import Centre
from normfuse.graph import Value
from tests.conversion_tools import D, Net, convert_, counts, planned, reasons, stream, two_norms


# -- what is converted ------------------------------------------------------------------------------------------------


def test_a_linear_layer_ahead_of_a_norm_takes_its_mean() -> None:
    g = Net()
    h = g.lin(g.x)
    y = g.lin(g.norm(h))
    plan = planned(g, y)
    assert h.producer is not None
    _, w, c = h.producer.inputs
    assert counts(plan) == (1, 0, 0)
    assert plan.edits == {w: Centre(0, ((0, D),)), c: Centre(0, ((0, D),))}
    assert plan.values == plan.edits | {h: Centre(2, ((0, D),))} and not plan.seeds and not plan.scaled
    assert plan.constants() == [*plan.edits] and not plan.copies and not plan.uniform
    (proof,) = plan.proof.values()
    assert proof.derivation == [f"{h.name} = linear: needs {w.name}, {c.name}"]
    assert proof.edits == [f"{v.name}: mean taken away along axis 0" for v in (w, c)]
    assert proof.readers == [f"{h.name}: v1"]
    assert not proof.operators and not proof.depends and plan.inner == {}


@pytest.mark.parametrize("spelled", [False, True])
def test_a_stream_is_centred_as_a_whole(spelled: bool) -> None:
    g = Net()
    start, y = stream(g, spelled=spelled)
    plan = planned(g, y)
    assert counts(plan) == (3, 0, 0) and start in plan.values
    assert len(plan.edits) == 6
    later = plan.proof[plan.sites[1]]
    assert any(line.endswith(f"as shown for {plan.sites[0].label}") for line in later.derivation)


def test_nothing_is_planned_without_a_layer_norm() -> None:
    g = Net()
    plan = planned(g, g.lin(g.norm(g.lin(g.x), kind="rms_norm")))
    assert counts(plan) == (0, 0, 0) and not plan.edits and not plan.values and not plan.constants()


@pytest.mark.parametrize(("spell", "edits"), [
    (lambda g: g.look(g.held(30, D)), 1), (lambda g: g.op("add", g.look(g.held(30, D)), g.held(1, 6, D)), 2),
    (lambda g: g.op("neg", g.lin(g.x)), 2), (lambda g: g.op("sub", g.lin(g.x), g.lin(g.x, bias=False)), 3),
    (lambda g: g.op("mul", g.lin(g.x), g.c(3.0)), 2), (lambda g: g.op("add", g.lin(g.x), g.lin(g.x)), 4),
    (lambda g: g.op("transpose", g.lin(g.op("transpose", g.x, perm=(1, 0, 2), shape=(6, 2, D))), perm=(1, 0, 2),
                    shape=(2, 6, D)), 2),
    (lambda g: g.op("reshape", g.lin(g.op("reshape", g.x, shape=(12, D))), shape=(2, 6, D)), 2),
    (lambda g: g.op("concat", g.cut(g.lin(g.x), 0, 2, 1), g.lin(g.cut(g.x, 0, 4, 1)), shape=(2, 6, D), axis=1), 4),
    (lambda g: g.cut(g.lin(g.x, 3 * D), D, 2 * D), 2),
    (lambda g: g.mean(g.lin(g.x), (1,)), 2), (lambda g: g.op("add", g.lin(g.x), g.held(D)), 3),
])  # fmt: skip
def test_where_the_mean_of_a_norms_input_can_go(spell: Callable[[Net], Value], edits: int) -> None:
    g = Net()
    plan = planned(g, g.lin(g.norm(spell(g))))
    assert counts(plan) == (1, 0, 0) and len(plan.edits) == edits


def test_the_mean_is_zero_already_behind_a_norm_without_weight() -> None:
    g = Net()
    first = g.norm(g.lin(g.x), affine=False)
    plan = planned(g, g.lin(g.norm(first)))
    assert counts(plan) == (2, 0, 0) and len(plan.edits) == 2
    assert [p.derivation for p in plan.proof.values()][1] == [f"{first.name} has mean zero already"]


def test_parts_of_one_projection_are_centred_in_blocks() -> None:
    g = Net()
    qkv = g.lin(g.x, 3 * D)
    q, k, v = (g.cut(qkv, i * D, (i + 1) * D) for i in range(3))
    out = g.op("add", g.op("add", g.norm(q), g.norm(k)), v)
    plan = planned(g, g.lin(out))
    assert counts(plan) == (2, 0, 0) and {c.blocks for c in plan.edits.values()} == {((0, D), (D, D))}
    assert any(line.endswith(f"axis 0, in 2 blocks of {D}") for p in plan.proof.values() for line in p.edits)
    h = Net()
    qkv = h.lin(h.x, 3 * D)
    q, v = h.cut(qkv, 0, D), h.cut(qkv, 4, D + 4)  # reads half of it
    plan = planned(h, h.lin(h.op("add", h.norm(q), v)))
    assert counts(plan) == (0, 0, 1) and reasons(plan)[0][0] == "NF303"


def test_heads_are_centred_each_for_itself() -> None:
    g = Net()
    h = g.op("reshape", g.lin(g.x), shape=(2, 6, 2, 4))
    plan = planned(g, g.lin(g.norm(h)))
    assert counts(plan) == (1, 0, 0) and {c.blocks for c in plan.edits.values()} == {((0, 4), (4, 4))}
    k = Net()
    plan = planned(k, k.lin(k.norm(k.op("reshape", k.cut(k.lin(k.x, 2 * D), 0, D), shape=(2, 6, 2, 4)))))
    (proof,) = plan.proof.values()
    assert counts(plan) == (1, 0, 0) and all(line.endswith(", in 2 blocks of 4") for line in proof.edits)
    one = Net()
    plan = planned(one, one.lin(one.norm(one.cut(one.lin(one.x, 2 * D), 0, D))))
    (proof,) = plan.proof.values()
    assert all(line.endswith(f", in 1 block of {D}") for line in proof.edits)


def layer_scale(g: Net, shape: tuple[int, ...] = (D,)) -> tuple[Value, Value, Value]:
    gain = g.held(*shape)
    h = g.lin(g.x)
    h = g.op("add", h, g.op("mul", gain, g.lin(g.act(g.norm(h)))))
    return gain, h, g.lin(g.norm(h))


def test_a_factor_for_each_channel_goes_into_the_constants() -> None:
    g = Net()
    gain, h, y = layer_scale(g)
    plan = planned(g, y)
    assert counts(plan) == (2, 0, 0) and len(plan.edits) == 4
    assert [node.kind for node in plan.scaled] == ["mul"] and h.producer is not None
    assert plan.scaled[0] is h.producer.inputs[1].producer
    assert [c.scales for c in plan.edits.values()].count((gain,)) == 2 and gain in plan.constants()
    lines = [line for p in plan.proof.values() for line in p.edits]
    assert sum(line.startswith(f"{gain.name} * ") and line.endswith("axis 0") for line in lines) == 2
    assert not plan.uniform


def test_a_factor_that_is_one_number_all_over_stays_and_is_named() -> None:
    g = Net()
    gain, _h, y = layer_scale(g)
    plan = planned(g, y, same=(gain,))
    assert counts(plan) == (2, 0, 0) and not plan.scaled and plan.uniform == [gain] and gain in plan.constants()
    assert [p.depends for p in plan.proof.values()] == [[], [f"{gain.name} is one number all over"]]


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spell", "why"), [
    (lambda g: (g.lin(g.x), g.x)[1], "x is an input of the graph"),
    (lambda g: g.act(g.lin(g.x)), "mixes or bends the channels"),
    (lambda g: g.op("opaque", g.lin(g.x)), "mixes groups of channels"),
    (lambda g: g.norm(g.lin(g.x), kind="rms_norm"), "rms_norm v1 mixes or bends the channels"),
])  # fmt: skip
def test_one_operator_for_two_norms_pays_and_for_one_does_not(spell: Callable[[Net], Value], why: str) -> None:
    g = Net()
    h = spell(g)
    plan = planned(g, two_norms(g, h))
    assert counts(plan) == (2, 1, 0)
    ((place, want),) = plan.operators
    assert place is h and want == Centre(2, ((0, D),)) and set(plan.operators[h, want]) == set(plan.sites)
    assert list(plan.seeds) == [h] and why in plan.seeds[h] and not plan.edits
    assert [p.operators for p in plan.proof.values()] == [[f"behind {h.name}: {plan.seeds[h]}"]] * 2
    one = Net()
    h = spell(one)
    plan = planned(one, one.lin(one.norm(h)))
    assert counts(plan) == (0, 0, 1)
    ((code, text),) = reasons(plan)
    assert code == "NF303" and text.startswith("1 centring operator would be needed for 1 norm: ") and why in text
    assert not plan.operators and not plan.edits and not plan.values


def test_where_no_operator_can_stand_nothing_is_converted() -> None:
    for how in ("place", "native"):
        g = Net()
        h = g.act(g.lin(g.x))
        y = two_norms(g, h)
        if how == "place":
            plan = planned(g, y, place=lambda v: False)
            assert counts(plan) == (0, 0, 2) and {code for code, _ in reasons(plan)} == {"NF302"}
            assert all("mixes or bends" in text for _, text in reasons(plan))
        else:
            h.native = None
            plan = planned(g, y)
            assert reasons(plan) == [("NF301", "its input is a value inside another operator")] * 2


def test_an_operator_stands_behind_the_next_value_where_it_cannot_stand_at_once() -> None:
    g = Net()
    bent = g.act(g.lin(g.x))
    h = g.op("add", bent, g.lin(g.x))
    plan = planned(g, two_norms(g, h), place=lambda v: v is not bent)
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [h] and not plan.edits


@pytest.mark.parametrize("locked", ["w", "c"])
def test_a_constant_that_cannot_be_edited(locked: str) -> None:
    g = Net()
    h = g.lin(g.x)
    assert h.producer is not None
    held = h.producer.inputs[1 if locked == "w" else 2]
    why = {held: "it is quantised"}
    plan = planned(g, two_norms(g, h), locked=why.get)
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [h] and plan.seeds[h] == "it is quantised"


def test_no_operator_stands_behind_a_constant() -> None:
    g = Net()
    h = g.lin(g.x)
    assert h.producer is not None
    w = h.producer.inputs[1]
    plan = planned(g, two_norms(g, h), locked={w: "it is quantised"}.get, place=lambda v: v is not h)
    assert counts(plan) == (0, 0, 2) and reasons(plan) == [("NF302", "it is quantised")] * 2


def test_a_value_inside_an_operator_has_no_operator_behind_it() -> None:
    g = Net()
    a = g.act(g.x)
    a.native = None
    h = g.op("add", a, g.lin(g.x))
    plan = planned(g, two_norms(g, h))
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [h]
    assert all(f"{h.name} = add" not in line for p in plan.proof.values() for line in p.derivation)
    two = Net()
    a = two.act(two.x)
    a.native = None
    h, other = (two.op("add", a, two.lin(two.x)) for _ in range(2))
    plan = planned(two, two_norms(two, h), two_norms(two, other))
    assert counts(plan) == (4, 2, 0) and {v for v, _ in plan.operators} == {h, other}
    k = Net()
    a = k.act(k.x)
    mid = k.op("neg", a)
    mid.native, mid.name = None, ""
    h = k.op("neg", mid)
    plan = planned(k, two_norms(k, h), place=lambda v: v is not h)
    assert counts(plan) == (2, 1, 0) and [v for v, _ in plan.operators] == [a]
    (proof, _) = plan.proof.values()
    assert proof.derivation == [f"{h.name} = neg: needs a value inside"] and len(proof.readers) == 1


def test_of_two_places_where_no_operator_can_stand_the_first_says_why() -> None:
    g = Net()
    a, b = g.act(g.x), g.act(g.lin(g.x))
    h = g.op("add", a, b)
    plan = planned(g, two_norms(g, h), place=lambda v: v not in (a, b))
    assert counts(plan) == (2, 1, 0)
    assert b.producer is not None and plan.seeds[h].startswith(f"activation {b.producer.name} ")


def test_a_norm_that_is_refused_leaves_the_others() -> None:
    g = Net()
    bent = g.act(g.x)
    y, z = g.lin(g.norm(bent)), g.lin(g.norm(g.lin(g.x)))
    plan = planned(g, y, z, place=lambda v: v is not bent)
    assert counts(plan) == (1, 0, 1) and [code for code, _ in reasons(plan)] == ["NF302"]


def test_an_operator_is_put_behind_whole_values_only() -> None:
    """Two views of one value into heads: each gets its own, the value itself is wanted in parts."""
    g = Net()
    a = g.act(g.x)
    first, second = (g.op("reshape", a, shape=(2, 6, 2, 4)) for _ in range(2))
    plan = planned(g, two_norms(g, first), two_norms(g, second))
    assert counts(plan) == (4, 2, 0) and {v for v, _ in plan.operators} == {first, second}


def test_a_norm_that_is_kept_sees_a_centring_in_parts() -> None:
    def reader(g: Net, h: Value, normed: bool) -> Value:
        return g.lin(g.norm(h)) if normed else g.op("var", h, axes=(2,), shape=(2, 6, 1))

    for normed in (True, False):
        g = Net()
        h = g.lin(g.x)
        y = reader(g, h, normed)
        heads = g.op("reshape", h, shape=(2, 6, 2, 4))
        plan = planned(g, y, g.lin(g.norm(heads)),
                       fits=lambda site, inner: ("NF305", "no") if site.norm.size == D else None)  # fmt: skip
        assert not plan.sites
        k = Net()
        h = k.lin(k.x)
        plan = planned(k, k.lin(k.norm(h)), k.lin(k.norm(h)), reader(k, h, normed))
        assert len(plan.sites) >= 2 and not plan.operators


def test_a_linear_layer_that_is_centred_itself_reads_its_input_as_it_is() -> None:
    g = Net()
    h = g.lin(g.x)
    plan = planned(g, g.lin(g.norm(h)), g.lin(g.norm(g.lin(h))))
    assert counts(plan) == (1, 0, 1) and "linear" in reasons(plan)[0][1] and "reads it as it is" in reasons(plan)[0][1]


def test_a_copy_that_is_wanted_centred_in_part_keeps_the_rest() -> None:
    g = Net()
    wide = g.lin(g.x, 2 * D)
    copy = g.op("identity", wide)
    y, z = g.lin(g.norm(g.cut(copy, 0, D))), g.lin(g.norm(g.cut(wide, D, 2 * D)))
    plan = planned(g, y, z, g.act(g.cut(copy, D, 2 * D)))
    assert len(plan.sites) < 2 or plan.operators


def test_an_effect_that_reads_a_value_counts() -> None:
    g = Net()
    h = g.lin(g.x)
    y = g.lin(g.norm(h))
    log = g.op("opaque", h, effect=True)  # whose result nobody reads
    plan = convert_(g, y)
    assert counts(plan) == (0, 0, 1) and f"opaque {log.name} reads it as it is" in reasons(plan)[0][1]


def test_a_constant_that_the_caller_may_replace_is_asked_for_like_one() -> None:
    g = Net()
    h = g.lin(g.x)
    assert h.producer is not None
    w = h.producer.inputs[1]
    w.fixed, w.overridable = False, True
    plan = planned(g, two_norms(g, h), locked=lambda v: "may be replaced by the caller" if v is w else None,
                   place=lambda v: v.producer is not None)  # fmt: skip
    assert counts(plan) == (2, 1, 0) and plan.seeds[h] == "may be replaced by the caller"


@pytest.mark.parametrize(("reader", "converted"), [
    (lambda g, h: g.lin(h), 0), (lambda g, h: g.act(h), 0), (lambda g, h: h, 0),
    (lambda g, h: g.norm(h, kind="rms_norm"), 0), (lambda g, h: g.mean(h), 0), (lambda g, h: g.mean(h, (1,)), 0),
    (lambda g, h: g.op("activation", h, softmax=True), 1), (lambda g, h: g.op("var", h, axes=(2,), shape=(2, 6, 1)), 1),
    (lambda g, h: g.op("std", h, axes=(2,), shape=(2, 6, 1)), 1),
    (lambda g, h: g.op("var", h, axes=(1,), shape=(2, 1, D)), 0),
    (lambda g, h: g.op("var", h, axes=(1, 2), shape=(2, 1, 1)), 0),
    (lambda g, h: g.cut(h, 0, 4), 0), (lambda g, h: g.op("neg", h), 0),
    (lambda g, h: g.spelled(h), 2),
    (lambda g, h: g.op("activation", g.op("neg", h), softmax=True), 0),
    (lambda g, h: g.norm(g.op("neg", h)), 2),
])  # fmt: skip
def test_a_value_with_a_reader_of_another_kind(reader: Callable[[Net, Value], Value], converted: int) -> None:
    g = Net()
    h = g.lin(g.x)
    y, z = g.lin(g.norm(h)), reader(g, h)
    plan = planned(g, y, z)
    assert len(plan.sites) == converted and not plan.operators
    if not converted:
        ((code, text),) = reasons(plan)
        assert code == "NF303" and f"{h.name}: " in text
        assert ("is an output of the graph" if z is h else "reads it as it is") in text
    k = Net()
    h = k.lin(k.x)
    y, z = two_norms(k, h), reader(k, h)
    plan = planned(k, y, z)
    assert len(plan.sites) == converted + 1 + (converted == 0) and len(plan.operators) == (converted == 0)


def test_a_reader_that_nothing_depends_on_does_not_count() -> None:
    g = Net()
    h = g.lin(g.x)
    y = g.lin(g.norm(h))
    z = g.act(h)
    g.lin(h)
    plan = planned(g, y)
    assert counts(plan) == (1, 0, 0) and [p.readers for p in plan.proof.values()] == [[f"{h.name}: v1"]]
    g.op("neg", z)
    assert counts(planned(g, y)) == (1, 0, 0)
    assert counts(planned(g, y, g.op("abs", z))) == (0, 0, 1)  # of three that read it one is read


def test_a_slice_that_is_not_centred_may_be_read_as_it_is() -> None:
    g = Net()
    wide = g.lin(g.x, 2 * D)
    a, b = g.cut(wide, 0, D), g.cut(wide, D, 2 * D)
    plan = planned(g, g.lin(g.norm(a)), g.act(b))
    assert counts(plan) == (1, 0, 0)
    rows = g.cut(wide, 0, 2, 1)
    plan = planned(g, g.lin(g.norm(a)), g.act(b), g.act(rows))  # cut along another axis it holds both
    assert counts(plan) == (2, 1, 0)  # two norms by now


def test_of_two_results_of_one_operator_only_the_one_that_is_read_counts() -> None:
    g = Net()
    h = g.lin(g.x)
    y = g.lin(g.norm(h))
    spare = g.graph.value("spare", (2, 6, D), "float32", native="spare")
    first = g.op("activation", h, softmax=True)
    assert first.producer is not None
    first.producer.attrs.clear()
    first.producer.outputs.append(spare)
    spare.producer = first.producer
    assert counts(convert_(g, y))[0] == 1
    spare.kept = True
    assert counts(convert_(g, y))[0] == 0
    spare.kept = False
    g.op("neg", spare).kept = True
    assert counts(convert_(g, y))[0] == 0
