"""The plan of a conversion on networks of a few nodes, without a front end: what is converted, edited and kept for
which reason. Every plan is carried out in numbers as well, and has to give the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from normfuse.centring import Blocked, Centre, Links
from normfuse.graph import Node, Shape, Value
from normfuse.norm import Site
from normfuse.passes.layernorm_to_rmsnorm import Conversion, Means, convert, operator_of, rms
from normfuse.recognise import recognise
from tests.neutral import Evaluation, plain
from tests.test_centring_rules import take
from tests.test_recognise import Build

D = 8


class Net(Build):
    """A graph whose values are the model's own, with the operators of a small front end."""

    def __init__(self, shape: Shape = (2, 6, D)) -> None:
        super().__init__(shape)
        for v in (self.x, self.w, self.b):
            v.native = v.name

    def op(self, kind: str, *inputs: Value, **more: Any) -> Value:
        out = super().op(kind, *inputs, **more)
        out.native = out.name
        return out

    def held(self, *shape: int) -> Value:
        """A constant."""
        name = f"k{self.graph.count}"
        return self.graph.leaf(name, shape, "float32", fixed=True, native=name)

    def given(self, *shape: Any, dtype: str = "float32") -> Value:
        """An input."""
        name = f"in{self.graph.count}"
        return self.graph.leaf(name, shape, dtype, native=name)

    def lin(self, v: Value, wide: int = D, bias: bool = True, weight: Value | None = None) -> Value:
        assert v.shape is not None and isinstance(v.shape[-1], int)
        w = weight or self.held(wide, v.shape[-1])
        return self.op("linear", v, w, *([self.held(wide)] if bias else []), shape=(*v.shape[:-1], wide))

    def look(self, table: Value) -> Value:
        """An embedding."""
        return self.op("gather", table, self.given(2, 6, dtype="int64"), shape=(2, 6, D), dtype="float32")

    def act(self, v: Value) -> Value:
        return self.op("activation", v)

    def cut(self, v: Value, start: int, stop: int, axis: int = 2) -> Value:
        assert v.shape is not None
        shape = tuple(stop - start if i == axis else d for i, d in enumerate(v.shape))
        return self.op("slice", v, shape=shape, axis=axis, start=start, stop=stop)

    def norm(self, v: Value, affine: bool = True, kind: str = "layer_norm", axes: Any = None) -> Value:
        """A norm as one operator of the model."""
        first = len(self.graph.nodes)
        assert v.rank is not None and v.shape is not None
        y = self.op(kind, v, axes=axes or (v.rank - 1,), eps=1e-5)
        if affine:
            size = v.shape[-1]
            assert isinstance(size, int)
            y.native = None
            y = self.op("mul", y, self.held(size))
            y.native = None
            y = self.op("add", y, self.held(size))
        for node in self.graph.nodes[first:]:
            node.native = self.graph.nodes[first].native
        return y

    def spelled(self, v: Value) -> Value:
        """A LayerNorm in several operators."""
        axes = ((v.rank or 1) - 1,)
        c = self.op("sub", v, self.mean(v, axes))
        under = self.op("add", self.mean(self.op("square", c), axes), self.c(1e-5))
        return self.op("mul", self.op("mul", c, self.op("rsqrt", under)), self.held(D))


def channels(node: Node, out: Value, want: Centre) -> Links | None:
    """The table of this front end."""
    if node.kind == "linear" and want.axis == (out.rank or 0) - 1:
        return [(v, Centre(0, want.blocks, want.scales)) for v in node.inputs[1:]]
    if node.kind == "gather":
        return [(node.inputs[0], Centre(1, want.blocks, want.scales))]
    if node.kind == "slice":
        return [(node.inputs[0], want.moved(want.axis, node.attrs["start"] if node.attrs["axis"] == want.axis else 0))]
    if node.kind == "concat" and node.attrs["axis"] != want.axis:
        return [(v, want) for v in node.inputs]
    if node.kind == "opaque":
        raise Blocked(f"{node.name} mixes groups of channels")
    return None


def span(node: Node, out: Value, axis: int) -> tuple[int, int] | None:
    if node.kind == "slice" and node.attrs["axis"] == axis:
        return node.attrs["start"], node.attrs["stop"]
    return None


def blind(node: Node, value: Value, want: Centre) -> bool:
    return bool(node.attrs.get("softmax")) and want.whole(value) and want.axis == (value.rank or 0) - 1


def can(**more: Any) -> Means:
    made: dict[str, Any] = {"uniform": lambda v: False, "locked": lambda v: None, "place": lambda v: True,
                            "fits": lambda site, inner: None}  # fmt: skip
    return Means(channels, span, blind=blind, **made | more)


# -- in numbers -------------------------------------------------------------------------------------------------------


class Run:
    """The values of a network, as it is or with a plan carried out."""

    def __init__(self, g: Build, numbers: dict[Value, Any], plan: Conversion | None = None) -> None:
        self.plan, self.numbers = plan or Conversion(), numbers
        self.neutral = Evaluation(g.graph)  # for its rules
        self.values = dict(numbers)
        self.made = {v: take(numbers[v], want, numbers) for v, want in self.plan.edits.items()}
        self.values |= {v: a for v, a in self.made.items() if v not in self.plan.copies}
        norms = {self.plan.inner.get(site, site).value: site for site in self.plan.sites}
        for node in g.graph.nodes:
            out = node.outputs[0]
            self.values[out] = self.norm(norms[out]) if out in norms else self.step(node)

    def expr(self, expr: Any) -> Any:
        self.neutral.values.update(self.values)
        return self.neutral.expr(expr)

    def read(self, v: Value, by: Any) -> Any:
        """A value as a reader sees it."""
        if v in self.plan.copies and not isinstance(by, Site) and by[0] in self.plan.copies[v]:
            return self.made[v]
        for (value, want), readers in self.plan.operators.items():
            if value is v and by in readers:
                return take(self.values[v], want, self.numbers)
        return self.values[v]

    def norm(self, site: Site) -> Any:
        """What stands in the place of a converted norm."""
        norm = rms(self.plan.inner.get(site, site).norm)
        assert norm.kind == "rms_norm"
        out = plain("rms_norm", self.read(norm.x, site), norm.axes, norm.eps)
        if norm.weight is not None:
            out = out * self.expr(norm.weight)
        return out if norm.bias is None else out + self.expr(norm.bias)

    def step(self, node: Node) -> Any:
        args = [self.read(v, (node, node.outputs[0])) for v in node.inputs]
        a, attrs = args[0], node.attrs
        if node.kind == "linear":
            return a @ args[1].T + sum(args[2:])
        if node.kind == "gather":
            return a[(np.arange(12).reshape(2, 6) * 7) % a.shape[0]]
        if node.kind == "slice":
            return np.take(a, range(attrs["start"], attrs["stop"]), attrs["axis"])
        if node.kind == "concat":
            return np.concatenate(args, attrs["axis"])
        if node.kind in ("activation", "opaque"):
            e = np.exp(a - a.max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True) if attrs.get("softmax") else np.tanh(a) + a * a
        if node in self.plan.scaled:
            return next(x for x, v in zip(args, node.inputs, strict=True) if not v.fixed)
        self.neutral.values.update(zip(node.inputs, args, strict=True))
        return self.neutral._compute(node)


def planned(g: Net, *outputs: Value, **more: Any) -> Conversion:
    """The plan, after it was carried out in numbers."""
    for v in outputs:
        v.kept = True
    uniform = more.pop("same", ())
    if uniform:
        more["uniform"] = lambda v: v in uniform
    plan = convert(g.graph, recognise(g.graph), can(**more))
    rng = np.random.default_rng(0)
    numbers: dict[Value, Any] = {}
    for v in g.graph.leaves:
        noise = rng.standard_normal(tuple(d for d in v.shape or () if isinstance(d, int))) + 0.7
        numbers[v] = noise if v.number is None else np.full_like(noise, v.number)
    twins: dict[Any, Any] = {}
    for v in g.graph.leaves:
        if "twins" in more:
            numbers[v] = twins.setdefault(more["twins"](v), numbers[v])
        if v in uniform:
            numbers[v] = np.full_like(numbers[v], 1.3)
    before, after = Run(g, numbers), Run(g, numbers, plan)
    for v in outputs:
        want = before.values[v]
        np.testing.assert_allclose(after.values[v], want, rtol=0, atol=1e-9 * np.abs(want).max())
    for v, c in plan.values.items():  # what the plan says of a value is so
        if not any(g_ for g_ in c.scales) and v.producer is not None and c.whole(v):
            assert np.abs(after.values[v].mean(axis=c.axis)).max() < 1e-9
    assert set(plan.sites).isdisjoint(plan.kept) and set(plan.sites) == set(plan.proof)
    return plan


def counts(plan: Conversion) -> tuple[int, int, int]:
    """(converted, operators, kept)"""
    return len(plan.sites), len(plan.operators), len(plan.kept)


def reasons(plan: Conversion) -> list[tuple[str, str]]:
    return [(r.code, r.message) for r in plan.kept.values()]


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


def stream(g: Net, layers: int = 2, spelled: bool = False) -> tuple[Value, Value]:
    """(what the layers start from, the result) of a pre-norm model."""
    h = start = g.lin(g.x)
    norm = g.spelled if spelled else g.norm
    for _ in range(layers):
        h = g.op("add", h, g.lin(g.act(norm(h))))
    return start, g.lin(norm(h))


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


def two_norms(g: Net, h: Value) -> Value:
    """Two norms of one value, and nothing else."""
    return g.op("add", g.lin(g.norm(h)), g.lin(g.norm(h)))


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


def convert_(g: Net, *outputs: Value, **more: Any) -> Conversion:
    """The plan alone."""
    for v in outputs:
        v.kept = True
    return convert(g.graph, recognise(g.graph), can(**more))


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
    """b is asked for by the sum and by another norm: centred by its constants it serves both."""
    g = Net()
    a, b = g.act(g.x), g.lin(g.x)
    h = g.op("add", a, b)
    y = g.op("add", two_norms(g, h), g.lin(g.norm(b)))
    plan = planned(g, y)
    assert counts(plan) == (3, 1, 0) and [v for v, _ in plan.operators] == [a]


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
