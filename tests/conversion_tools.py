"""Networks of a few nodes for plans of a conversion; every plan is carried out in numbers as well."""

from __future__ import annotations

from typing import Any

import numpy as np

from normfuse.centring import Blocked, Centre, Links
from normfuse.conversion import Conversion, Means, rms
from normfuse.graph import Node, Shape, Value
from normfuse.norm import Site
from normfuse.passes.layernorm_to_rmsnorm import convert
from normfuse.recognise import recognise
from tests.build import Build
from tests.neutral import Evaluation, plain

D = 8
SHAPE = (3, 5, D)


def take(a: Any, want: Centre, numbers: dict[Value, Any]) -> Any:
    """A centring in numbers: scaled, then the mean of each block taken away."""
    a = np.moveaxis(np.array(a, float), want.axis, -1)
    for g in want.scales:
        a = a * numbers[g].reshape(-1)
    for start, length in want.blocks:
        part = a[..., start : start + length]
        a[..., start : start + length] = part - part.mean(axis=-1, keepdims=True)
    return np.moveaxis(a, -1, want.axis)


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


def two_norms(g: Net, h: Value) -> Value:
    """Two norms of one value, and nothing else."""
    return g.op("add", g.lin(g.norm(h)), g.lin(g.norm(h)))


def convert_(g: Net, *outputs: Value, **more: Any) -> Conversion:
    """The plan alone."""
    for v in outputs:
        v.kept = True
    return convert(g.graph, recognise(g.graph), can(**more))


def stream(g: Net, layers: int = 2, spelled: bool = False) -> tuple[Value, Value]:
    """(what the layers start from, the result) of a pre-norm model."""
    h = start = g.lin(g.x)
    norm = g.spelled if spelled else g.norm
    for _ in range(layers):
        h = g.op("add", h, g.lin(g.act(norm(h))))
    return start, g.lin(norm(h))


def none(node: Node, out: Value, want: Centre) -> Links | None:
    """The table of a front end, without entries."""
    return None
