"""LayerNorm to RMSNorm where an edit would be seen in a place that is easily overlooked: the plan alone has to hold,
with the certificate off, for every input that is given here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from normfuse.frontends.onnx_certify import OPERATORS, others
from normfuse.sessions import session
from tests.converted import RNG, D, check, converted_all, drawn, flags, model, numbers

SPELLED = """mu = ReduceMean<axes=[-1]>({0}) d = Sub({0}, mu) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps)
root = Sqrt(e) n = Div(d, root) m = Mul(n, g) y = Add(m, b)"""
NORM = "y = LayerNormalization<axis=-1>({0}, g, b)"
FLAG, EACH = "bool flag", "bool[B,T,1] flag"
ROWS = numbers(2, 3, 4)


@pytest.mark.parametrize(("opset", "axis", "converted"), [
    (11, "", 0), (11, "<axis=1>", 0), (11, "<axis=2>", 1), (11, "<axis=-1>", 1), (13, "", 1), (13, "<axis=1>", 0),
])  # fmt: skip
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_a_softmax_sees_the_mean_where_it_is_over_several_axes(op: str, opset: int, axis: str, converted: int) -> None:
    """Before opset 13 all axes from `axis` on are one, and `axis` is 1 if it is not given."""
    made = model("float[B,T,4] x", f"s = MatMul(x, w) {SPELLED.format('s')} z = {op}{axis}(s)", "float[] y, float[] z",
                 opset, w=numbers(4, D))  # fmt: skip
    check(made, [{"x": ROWS}], converted)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", ["", "<axis=0>", "<axis=1>", "<axis=-1>"])
def test_the_certificate_computes_a_softmax_as_its_opset_says(op: str, opset: int, axis: str) -> None:
    from onnx.reference import ReferenceEvaluator

    made = model("float[B,T,4] x", f"y = {op}{axis}(x)", opset=opset)
    (found,) = ReferenceEvaluator(made, new_ops=OPERATORS).run(None, {"x": ROWS})
    (want,) = session(made.SerializeToString()).run(None, {"x": ROWS})
    np.testing.assert_allclose(np.asarray(found), want, rtol=1e-6, atol=1e-6)


def test_a_bias_that_a_sub_graph_reads_takes_no_bias_of_a_norm() -> None:
    made = model("float[B,T,4] x, bool flag", f"""h = MatMul(x, w) {NORM.format('h')} m = MatMul(y, k) z = Add(m, c)
        r = If (flag) <then_branch = t () => (float[] o) {{ o = Identity(z) }},
                       else_branch = e () => (float[] o) {{ o = Add(z, c) }}>""",
                 "float[] r", w=numbers(4, D), k=numbers(D, 5), c=numbers(5))  # fmt: skip
    assert "into" not in str(check(made, flags(ROWS), 1).notes)


@pytest.mark.parametrize("reader", ["Reshape(c, shape)", "Neg(c)", "Unsqueeze(c, zero)"])
def test_a_bias_that_a_folded_node_reads_takes_no_bias_of_a_norm(reader: str) -> None:
    """The node is folded for the analysis, and still in the model."""
    made = model("float[B,T,4] x, bool flag", f"""h = MatMul(x, w) {NORM.format('h')} m = MatMul(y, k) z = Add(m, c)
        other = {reader} r = Where(flag, z, other)""", "float[] r", w=numbers(4, D), k=numbers(D, 5), c=numbers(5),
                 shape=np.array([1, 5]), zero=np.array([0]))  # fmt: skip
    check(made, flags(ROWS), 1)


@pytest.mark.parametrize("rows", [50, 500])
def test_a_table_that_is_also_transposed_keeps_its_mean(rows: int) -> None:
    """Small, so that the transposed table is folded, and large."""
    made = model("int64[B,T] ids, bool flag", f"""h = Gather(table, ids) n1 = LayerNormalization<axis=-1>(h, g, b)
        f = MatMul(n1, w) s = Add(h, f) {NORM.format('s')} turned = Transpose<perm=[1,0]>(table)
        head = Where(flag, u, turned) r = MatMul(y, head)""", "float[] r", w=numbers(D, D), table=numbers(rows, D),
                 u=numbers(D, rows))  # fmt: skip
    ids = RNG.integers(0, rows, (2, 5))
    check(made, [{"ids": ids, "flag": np.array(v)} for v in (True, False)], 2)


def test_a_folded_node_that_nobody_reads_is_no_reader() -> None:
    made = model("int64[B,T] ids", f"h = Gather(table, ids) {NORM.format('h')} t = Transpose(table) u = Neg(t)",
                 table=numbers(50, D))  # fmt: skip
    report = check(made, [{"ids": RNG.integers(0, 50, (2, 5))}], 1)
    assert report.norms[0].conversion["verdict"] == "exact"


@pytest.mark.parametrize("untie", [False, True])
def test_a_copy_is_made_of_a_constant_only(untie: bool) -> None:
    """The table is cast, and the cast one has two readers: no edit behind the cast is one of the constant."""
    made = model("int64[B,T] ids", f"""table = Cast<to=1>(half) h = Gather(table, ids)
        n1 = LayerNormalization<axis=-1>(h, g, b) f = MatMul(n1, w) s = Add(h, f) {NORM.format('s')}
        turned = Transpose<perm=[1,0]>(table) r = MatMul(y, turned)""", "float[] r", w=numbers(D, D),
                 half=numbers(500, D, dtype=np.float16))  # fmt: skip
    check(made, [{"ids": RNG.integers(0, 500, (2, 5))}], 2, untie=untie)


@pytest.mark.parametrize("rows", [50, 500])
def test_a_table_of_two_readers_is_copied(rows: int) -> None:
    made = model("int64[B,T] ids", f"""h = Gather(table, ids) n1 = LayerNormalization<axis=-1>(h, g, b)
        f = MatMul(n1, w) s = Add(h, f) {NORM.format('s')}
        turned = Transpose<perm=[1,0]>(table) r = MatMul(y, turned)""",
                 "float[] r", w=numbers(D, D), table=numbers(rows, D))  # fmt: skip
    report = check(made, [{"ids": RNG.integers(0, rows, (2, 5))}], 2, untie=True)
    assert {n.conversion["verdict"] for n in report.norms} == {"exact"}


def test_weights_that_would_not_fit_into_their_type_stay() -> None:
    half: dict[str, Any] = {"dtype": np.float16}
    made = model("float16[B,T,4] x", f"""h = MatMul(x, w) k = MatMul(x, u) kk = Mul(k, c) s = Add(h, kk)
        {NORM.format('s')}""", "float16[] y", g=numbers(D, **half), b=numbers(D, **half), w=numbers(4, D, **half),
                 u=numbers(4, D, scale=300, **half), c=numbers(D, scale=300, **half))  # fmt: skip
    report = check(made, [{"x": numbers(2, 3, 4, scale=0.01, **half)}], 0)
    (refusal,) = report.refusals
    assert refusal.code == "NF304"
    assert refusal.message.startswith("u would hold") and refusal.message.endswith("more than its type does")


@pytest.mark.parametrize(("inputs", "lines", "opset", "feeds"), [
    (f"float[B,T,4] x, {EACH}", "h = MatMul(x, w) p = MatMul(x, u) ones = ConstantOfShape<value=float[1] {1}>(wide) "
     "q = Mul(p, ones) s = Where(flag, h, q)", 18, flags(ROWS, 2, 3, 1)),
    ("float[B,T,4] x", "h = MatMul(x, w) p = MatMul(x, u) ones = ConstantOfShape<value=float[1] {1}>(wide) "
     "q = Mul(p, ones) s = Add(h, q)", 18, [{"x": ROWS}]),
    ("float[2,3,4] x", "h = MatMul(x, w) s = Pad<pads=[0,0,0,0,1,0], value=1.0>(h)", 10, [{"x": ROWS}]),
    (f"float[2,8,4] x, {EACH}", "h = MatMul(x, w) q = MatMul(k, k) s = Where(flag, h, q)", 18,
     flags(numbers(2, 8, 4), 2, 8, 1)),
    (f"float[2,3,4] x, {FLAG}", "h = MatMul(x, w) f = Reshape(h, image) z = Resize<mode=\"linear\", "
     "coordinate_transformation_mode=\"tf_crop_and_resize\", extrapolation_value=5.0>(f, roi, , sizes) "
     "t = Reshape(z, back) s = Where(flag, h, t)", 18, flags(ROWS)),
])  # fmt: skip
def test_no_rule_where_a_number_comes_in(inputs: str, lines: str, opset: int, feeds: list[dict[str, Any]]) -> None:
    """The same number in all channels, a filling, a constant in two roles."""
    norm = (NORM if opset > 16 else SPELLED).format("s")
    made = model(inputs, f"{lines} {norm}", opset=opset, w=numbers(4, D), u=numbers(4, 1), k=numbers(D, D),
                 wide=np.array([D]), image=np.array([2, 3, 1, D]), back=np.array([2, 3, D]),
                 roi=np.array([0, 0, 0, 0, 1, 1, 2, 1], np.float32), sizes=np.array([2, 3, 1, D]))  # fmt: skip
    check(made, feeds, 0)


@pytest.mark.parametrize("width", [D, 1536])
@pytest.mark.parametrize("view", ["Reshape(c, shape)", "Identity(c)", "Unsqueeze(c, zero)"])
def test_a_scale_of_channels_behind_a_view(view: str, width: int) -> None:
    """Small views are folded; a large one is a node, behind which the constant is found."""
    made = model("float[B,T,4] x", f"""h = MatMul(x, w) k = MatMul(x, u) gamma = {view} kk = Mul(k, gamma)
        s = Add(h, kk) {NORM.format('s')}""", g=numbers(width), b=numbers(width), w=numbers(4, width),
                 u=numbers(4, width), c=numbers(width), shape=np.array([1, 1, width]), zero=np.array([0]))  # fmt: skip
    check(made, [{"x": ROWS}], 1, verify="sites")


@pytest.mark.parametrize("width", [D, 1536])
def test_the_bias_of_a_norm_behind_a_cast(width: int) -> None:
    made = model("float[B,T,4] x", """h = MatMul(x, w) b = Cast<to=1>(c) n = LayerNormalization<axis=-1>(h, g, b)
        m = MatMul(n, k) y = Add(m, o)""", g=numbers(width), c=numbers(width, dtype=np.float16), w=numbers(4, width),
                 k=numbers(width, 5), o=numbers(5))  # fmt: skip
    del made.graph.initializer[[v.name for v in made.graph.initializer].index("b")]
    report = check(made, [{"x": ROWS}], 1, verify="sites")
    assert any(note.startswith("the biases of 1 norms went into") for note in report.notes)


def test_a_scale_that_spreads_what_it_scales_stays() -> None:
    """Without it the rank would be another."""
    made = model("float[T,4] x", f"k = MatMul(x, u) s = Mul(k, c) t = Transpose<perm=[1,0,2]>(s) {NORM.format('t')}",
                 u=numbers(4, D), c=numbers(1, 1, D))  # fmt: skip
    check(made, [{"x": ROWS[0]}], 0)


def test_other_masks_are_tried() -> None:
    given = {"x": ROWS, "flag": np.ones((2, 3), bool)}
    tried = others(given)
    assert [t["x"] is ROWS for t in tried] == [True, True]
    assert not tried[1]["flag"].any() and 0 < tried[0]["flag"].sum() < 6 and others({"x": ROWS}) == []


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_norm_of_scaled_channels_reads_what_was_scaled(verify: str) -> None:
    """The factor is in the weights then, and is not to be there twice."""
    made = model("float[T,4] x", f"k = MatMul(x, u) h = Add(k, v) t = Mul(h, c) {NORM.format('t')}", u=numbers(4, D),
                 v=numbers(D), c=numbers(D))  # fmt: skip
    check(made, [{"x": ROWS[0]}], 1, verify=verify)


@pytest.mark.parametrize(("scales", "converted"), [([1, 1, 2], 1), ([1, 1.05, 2], 0)])
def test_channels_that_a_resize_moves(scales: list[float], converted: int) -> None:
    """The size stays the same, and some channels are there twice."""
    made = model("float[2,4,3] x", """k = MatMul(u, x) z = Resize<mode="nearest", nearest_mode="floor",
                 coordinate_transformation_mode="asymmetric">(k, , scales) t = Transpose<perm=[0, 2, 1]>(z) """
                 + NORM.format("t"), u=numbers(1, D, 4), scales=np.array(scales, np.float32))  # fmt: skip
    check(made, [{"x": numbers(2, 4, 3)}], converted, verify="off")


# -- what stands inside a norm that is made anew ----------------------------------------------------------------------


class Doubled(nn.Module):
    """LN(Wx) + LN(Wx) is one norm: an operator that the other two ask for can only stand behind all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(D, D), nn.Linear(D, D)
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n[0](self.f(x))
        h = y + y
        out: Tensor = self.n[2](h + self.g(torch.tanh(self.n[1](h))))
        return out


class OwnBias(nn.Module):
    """The bias of a norm, of which a later norm asks that it has no mean, is read somewhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.n, self.m = nn.Linear(D, D, bias=False), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.m(self.n(self.f(x + self.n.bias)))
        return out


class SharedBias(OwnBias):
    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.f(x))
        return F.layer_norm(y, (D,), self.m.weight, self.n.bias)


@pytest.mark.parametrize("opset", [0, 13, 17])
def test_an_operator_inside_a_norm_would_be_lost(opset: int) -> None:
    converted_all(drawn(Doubled()), 3, opset)


@pytest.mark.parametrize("taken", [lambda h: h.unbind(0), lambda h: [part.squeeze(0) for part in h.split(1, 0)]])
@pytest.mark.parametrize("opset", [0, 13, 17])
def test_query_and_key_that_are_taken_from_one_tensor(taken: Callable[[Tensor], Any], opset: int) -> None:
    """An operator ahead of the node that takes them would change the value as well."""
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.f, self.n = nn.Linear(D, D), nn.Linear(D, 3 * D), nn.LayerNorm(D)
            self.q, self.k = nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(self.n(self.e(x))).view(2, 3, 3, D).permute(2, 0, 1, 3).tanh()
            q, k, v = taken(h)
            out: Tensor = self.q(q) + self.k(k) + v
            return out

    converted_all(drawn(Taken()), 1, opset)


@pytest.mark.parametrize("made", [OwnBias, SharedBias])
@pytest.mark.parametrize("opset", [0, 13, 17])
def test_a_norm_reads_the_copy_of_its_bias(made: type[nn.Module], opset: int) -> None:
    module: Any = drawn(made())
    torch.nn.init.constant_(module.n.weight, 1.5)
    converted_all(module, 2, opset, untie=True)


@pytest.mark.parametrize("part", [
    lambda y: y[..., :D], lambda y: y.chunk(2, -1)[1], lambda y: y.split([3, D, D - 3], -1)[1],
    lambda y: y.narrow(-1, 2, D)])  # fmt: skip
@pytest.mark.parametrize("opset", [0, 17])
def test_a_factor_of_a_part_of_the_channels(part: Callable[[Tensor], Tensor], opset: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.n = nn.Linear(D, 2 * D), nn.Parameter(torch.ones(D)), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.n(part(self.f(x)) * self.g)
            return out

    converted_all(drawn(Scaled()), 0, opset)


@pytest.mark.parametrize(("lines", "converted"), [
    ("h = CumSum(e, one)", 1), ("h = CumSum(e, two)", 0),
    ("i = Expand(rows, sizes) h = ScatterElements<axis=1>(e, i, f)", 1),
    ("i = Expand(rows, sizes) h = ScatterElements<axis=1, reduction=\"add\">(e, i, f)", 1),
    ("i = Expand(rows, sizes) h = ScatterElements<axis=1, reduction=\"mul\">(e, i, f)", 0),
    ("i = Expand(rows, half) f4 = MatMul(u, k4) h = ScatterElements<axis=1>(e, i, f4)", 0),
    ("h = ScatterElements<axis=1>(e, each, f)", 0),
])  # fmt: skip
def test_rows_that_are_added_up_or_written(lines: str, converted: int) -> None:
    held: dict[str, Any] = {
        "one": np.array(1), "two": np.array([2]), "rows": np.array([0, 2])[None, :, None], "k4": numbers(4, 4),
        "sizes": np.array([2, 2, D]), "half": np.array([2, 2, 4]),
        "each": np.arange(2 * 2 * D).reshape(2, 2, D) % 3}  # fmt: skip
    if "two)" in lines and "Cum" in lines:
        held["two"] = np.array(2)
    made = model("float[2,3,4] x, float[2,2,4] u", f"e = MatMul(x, w) f = MatMul(u, k) {lines} {NORM.format('h')}",
                 w=numbers(4, D), k=numbers(4, D), **held)  # fmt: skip
    check(made, [{"x": numbers(2, 3, 4), "u": numbers(2, 2, 4)}], converted)


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_norm_without_a_weight_is_not_changed_by_the_next(verify: str) -> None:
    """What reads it reads the same: it comes with mean zero."""
    lines = "h0 = MatMul(x, w) " + " ".join(
        f"a{i} = MatMul({h}, k) r{i} = Relu(a{i}) c{i} = MatMul(r{i}, w{i}) s{i} = Add({h}, c{i}) "
        f"n{i} = LayerNormalization<axis=-1>(s{i}, ones)" for i, h in enumerate(("h0", "n0", "n1")))
    held: dict[str, Any] = {name: numbers(4, D) for name in ("w", "w0", "w1", "w2")}
    made = model("float[2,3,4] x", f"{lines} y = MatMul(n2, k)", k=numbers(D, 4), ones=np.ones(D, np.float32), **held)
    check(made, [{"x": ROWS}], 2, verify=verify)


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_what_is_made_of_a_centred_value_is_changed(verify: str) -> None:
    """An operator ahead of two of them would be seen by what else reads the one: it gets its own, behind it."""
    norms = " ".join(f"{h}{i} = LayerNormalization<axis=-1>({h}, {w})" for h in "hk" for i, w in enumerate("gb"))
    made = model("float[2,3,4] x", f"""p = MatMul(x, w) r = Relu(p) h = Mul(r, two) k = Neg(r) {norms}
        t = Tanh(h)""", ", ".join(f"float[] {out}" for out in ("h0", "h1", "k0", "k1", "t")),
                 w=numbers(4, D), two=np.float32(2))  # fmt: skip
    check(made, [{"x": ROWS}], 4, verify=verify)
