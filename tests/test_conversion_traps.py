"""LayerNorm to RMSNorm where an edit would be seen in a place that is easily overlooked: the plan alone has to hold,
with the certificate off, for every input that is given here."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import normfuse
from normfuse.frontends.onnx_certify import OPERATORS, others
from normfuse.sessions import session

D = 8
RNG = np.random.default_rng(0)
SPELLED = """mu = ReduceMean<axes=[-1]>({0}) d = Sub({0}, mu) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps)
root = Sqrt(e) n = Div(d, root) m = Mul(n, g) y = Add(m, b)"""
NORM = "y = LayerNormalization<axis=-1>({0}, g, b)"
FLAG, EACH = "bool flag", "bool[B,T,1] flag"


def numbers(*shape: int, dtype: type = np.float32, scale: float = 1.0) -> np.ndarray[Any, Any]:
    return ((RNG.standard_normal(shape) + 0.5) * scale).astype(dtype)


def model(inputs: str, lines: str, outputs: str = "float[] y", opset: int = 18, **more: Any) -> onnx.ModelProto:
    """A graph of a text, with a weight `g` and a bias `b` of the norm, and more constants."""
    head = f'<ir_version: 9, opset_import: ["": {opset}]>'
    made = onnx.parser.parse_model(f"{head} a ({inputs}) => ({outputs}) {{ {lines} }}")
    held = {"g": numbers(D), "b": numbers(D), "eps": np.array(1e-5, np.float32)} | more
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in held.items() if n in lines)
    for output in made.graph.output:
        output.type.tensor_type.ClearField("shape")
    return made


def check(made: onnx.ModelProto, feeds: list[dict[str, Any]], converted: int, **config: Any) -> Any:
    """So many norms are converted, and the outputs stay for each of the inputs."""
    asked = normfuse.Config(layernorm_to_rmsnorm="exact", **{"verify": "off"} | config)
    result, report = normfuse.optimize(made, asked)
    done = [n.conversion["verdict"] for n in report.norms if n.conversion]
    assert sum(v != "kept" for v in done) == converted, report.refusals
    before, after = (session(m.SerializeToString()) for m in (made, result))
    for given in feeds:
        for a, b in zip(before.run(None, given), after.run(None, given), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-6)
    return report


def flags(x: np.ndarray[Any, Any], *shape: int) -> list[dict[str, Any]]:
    return [{"x": x, "flag": np.full(shape, flag)} for flag in (True, False)]


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
    assert report.notes[0].startswith("the biases of 1 norms went into")


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


# -- torch ------------------------------------------------------------------------------------------------------------


class Chosen(nn.Module):
    """A norm of one of two things."""

    def __init__(self, other: Callable[[Chosen, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.single, self.norm = nn.Linear(4, D), nn.Linear(4, D), nn.Linear(4, 1), nn.LayerNorm(D)
        self.w, self.square, self.other = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D)), other
        for p in self.parameters():
            nn.init.normal_(p, 0.5)

    def forward(self, x: Tensor, z: Tensor, flag: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.norm(torch.where(flag, self.one(x), self.other(self, x, z)))
        return found


@pytest.mark.parametrize(("other", "converted"), [
    (lambda m, x, z: torch.roll(m.two(x), 1), 0), (lambda m, x, z: torch.roll(m.two(x), 1, 0), 1),
    (lambda m, x, z: torch.roll(m.two(x), 1, -1), 0), (lambda m, x, z: m.single(x) * torch.ones(D), 0),
    (lambda m, x, z: F.linear(z, m.w), 0), (lambda m, x, z: m.square @ m.square, 0),
])  # fmt: skip
@pytest.mark.parametrize("verify", ["off", "sites"])
def test_torch(other: Callable[[Chosen, Tensor, Tensor], Tensor], converted: int, verify: Any) -> None:
    torch.manual_seed(0)
    module, x, z = Chosen(other).eval(), torch.randn(2, D, 4), torch.randn(2, D, D, D)
    masks = [torch.full((2, D, 1), v) for v in (True, False)]
    program = torch.export.export(module, (x, z, masks[0]))
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify))
    assert sum((n.conversion or {})["verdict"] != "kept" for n in report.norms) == converted
    for mask in masks:
        torch.testing.assert_close(result.module()(x, z, mask), module(x, z, mask), rtol=1e-4, atol=1e-4)


def test_what_is_detached_is_centred_ahead_of_that() -> None:
    """No operator stands behind it, and still no gradient goes through it."""
    torch.manual_seed(0)
    module, given = Chosen(lambda m, x, z: m.two(x).detach()).eval(), (torch.randn(2, D, 4), torch.zeros(1))
    flag = torch.rand(2, D, 1) > 0.5
    program = torch.export.export(module, (*given, flag))
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert [(n.conversion or {})["verdict"] for n in report.norms] == ["exact"]
    converted = result.module()
    found = converted(*given, flag)
    torch.testing.assert_close(found, module(*given, flag), rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    assert converted.one.weight.grad is not None and converted.two.weight.grad is None


class Scaled(nn.Module):
    """A factor for each channel, seen as one of an image (timm's LayerScale2d)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv1d(4, D, 1), nn.Conv1d(4, D, 1), nn.LayerNorm(D)
        self.gamma = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.norm((self.one(x) + self.two(x) * self.gamma.view(1, -1, 1)).transpose(1, 2))
        return found


class Halved(nn.Module):
    """A norm in float32 of a half model (CLIP), and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, D), nn.Linear(D, 3)
        self.w, self.b = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(D))
        self.half()

    def forward(self, x: Tensor) -> Tensor:
        """The second layer."""
        x = self.one(x)
        found: Tensor = self.two(F.layer_norm(x.float(), (D,), self.w.float(), self.b.float()).to(x.dtype))
        return found


class Offset(nn.Module):
    """Gemma's norm, of 1 + w, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.w = nn.Linear(4, D), nn.Linear(D, 3), nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        """The second layer."""
        x = self.one(x)
        found: Tensor = self.two(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.w))
        return found


@pytest.mark.parametrize(("made", "x", "converted"), [
    (Scaled, torch.randn(2, 4, 3), 1), (Halved, torch.randn(2, 4).half(), 1), (Offset, torch.randn(2, 4), 0),
])  # fmt: skip
@pytest.mark.parametrize("as_module", [False, True])
def test_parameters_behind_views_and_casts(made: type[nn.Module], x: Tensor, converted: int, as_module: bool) -> None:
    torch.manual_seed(0)
    module = made().eval()
    config = normfuse.Config(layernorm_to_rmsnorm="exact", fold_scale=not as_module)
    given: Any = module if as_module else torch.export.export(module, (x,))
    want = module(x)
    if as_module:
        result, report = normfuse.optimize(given, config, args=(x,))
    else:
        result, report = normfuse.optimize(given, config)
    done = sum((n.conversion or {}).get("verdict", "kept") != "kept" for n in report.norms)
    assert done == (converted if not as_module or made is Scaled else 0)  # a module's norms are modules of their own
    found = (result if as_module else result.module())(x)
    torch.testing.assert_close(found, want, rtol=1e-2 if x.dtype == torch.half else 1e-4, atol=1e-3)


# -- whole programs and modules ---------------------------------------------------------------------------------------


def proved(module: nn.Module, *given: Any, **config: Any) -> tuple[Any, normfuse.Report]:
    """What becomes of a module by the proof alone, and the report."""
    found, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact", **config), args=given)
    return found, report


def verdicts(report: normfuse.Report) -> list[str]:
    return [(n.conversion or {})["verdict"] for n in report.norms]


class Scaling(nn.Module):
    """A norm that reads a multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.c, self.n = nn.Linear(4, D), nn.Parameter(torch.randn(D)), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        found: Tensor = self.n(self.l(x) * self.c)
        return found


@pytest.mark.parametrize("verify", ["off", "sites"])
def test_a_scaled_norm_in_torch(verify: Any) -> None:
    torch.manual_seed(0)
    module, x = Scaling().eval(), torch.randn(2, 4)
    config = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify)
    program = torch.export.export(module, (x,))
    for result, report in (normfuse.optimize(program, config), proved(module, x, verify=verify)):
        assert verdicts(report) == ["exact"]
        run = result.module() if isinstance(result, torch.export.ExportedProgram) else result
        torch.testing.assert_close(run(x), module(x), rtol=1e-4, atol=1e-4)


class Rotated(nn.Module):
    """A stream whose angles are computed in a sub-graph, as rotary embeddings are: without gradients, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.n, self.o = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.speeds: Tensor
        self.register_buffer("speeds", torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        """The norm, turned."""
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            angles = self.speeds.float() * torch.arange(x.shape[0]).to(torch.float32)[:, None]
            turn = angles.cos().to(x.dtype)
        found: Tensor = self.o(self.n(self.l(x)) * turn)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_sub_graph_that_asserts_its_types(gradients: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Rotated().eval().to(dtype), torch.randn(3, D, dtype=dtype)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(module, (x,))
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert [n.action for n in report.norms] == ["converted"], report.refusals
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(result.module()(x), module(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["off", "exact"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_decomposed_norm_that_is_an_output(kind: type[nn.Module], mode: Any) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(D, D), kind(D)).eval(), torch.randn(2, D)
    program = torch.export.export(module, (x,)).run_decompositions()
    result, report = normfuse.optimize(program, normfuse.Config(layernorm_to_rmsnorm=mode))
    assert len(report.norms) == 1
    torch.testing.assert_close(result.module()(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [
    lambda h: (h * 3).to(torch.int64), lambda h: (h * 3).sum(1, dtype=torch.int64, keepdim=True),
    lambda h: (h * 3).cumsum(1, dtype=torch.int64),
])  # fmt: skip
def test_whole_numbers_are_rounded(whole: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module, given = Chosen(lambda m, x, z: whole(m.two(x))).eval(), (torch.randn(2, D, 4), torch.zeros(1))
    flag = torch.zeros(2, D, 1, dtype=torch.bool)
    result, report = proved(module, *given, flag, verify="off")
    assert "exact" not in verdicts(report)
    with torch.no_grad():
        torch.testing.assert_close(result(*given, flag), module(*given, flag), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """An embedding and a head with one weight, and dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.e, self.n, self.d = nn.Embedding(9, D), nn.LayerNorm(D), nn.Dropout(p)
        self.head = nn.Linear(D, 9, bias=False)

    def forward(self, ids: Tensor, logits: bool = False) -> Tensor:
        """The hidden states, or what the head makes of them."""
        h: Tensor = self.n(self.d(self.e(ids)))
        return self.head(h) if logits else h


@pytest.mark.parametrize("tied", [True, False])
def test_a_parameter_of_a_module_that_the_inputs_do_not_reach(tied: bool) -> None:
    module, ids = Tied(0.0).eval(), torch.arange(9)[None]
    if tied:
        module.head.weight = module.e.weight
    result, report = proved(module, ids)
    assert verdicts(report) == ["kept" if tied else "exact"]
    torch.testing.assert_close(result(ids, True), module(ids, True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_dropout_is_told_of(p: float) -> None:
    _, report = proved(Tied(p), torch.arange(9)[None])
    assert verdicts(report) == ["exact"] and any("dropout" in note for note in report.notes) is (p > 0)


class Borrowed(nn.Module):
    """A bias that another layer has as well, and modules under two names."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.c: nn.Module = nn.Conv1d(4, D, 1) if conv else nn.Linear(4, D)
        self.o, self.n, self.conv = nn.Linear(4, D), nn.LayerNorm(D), conv
        self.again = self.n
        for p in self.parameters():
            nn.init.normal_(p, 0.5)
        self.o.bias = self.c.bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The norm, and the other layer."""
        h = self.c(x.transpose(1, 2)).transpose(1, 2) if self.conv else self.c(x)
        return self.again(h), self.o(x)


@pytest.mark.parametrize("conv", [True, False])
def test_a_bias_that_is_untied_and_a_norm_of_two_names(conv: bool) -> None:
    torch.manual_seed(0)
    module, x = Borrowed(conv).eval(), torch.randn(2, 3, 4)
    result, report = proved(module, x, untie=True)
    assert verdicts(report) == ["exact"] and result.n is result.again
    torch.testing.assert_close(result(x), module(x), rtol=1e-4, atol=1e-4)
    assert list(result.state_dict()) == list(module.state_dict())


class TwoNames(nn.Module):
    """A layer that is called under both of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.n = nn.Linear(4, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.act, self.b = nn.ReLU(), self.a
        self.last = self.act

    def forward(self, x: Tensor) -> Tensor:
        """The norm of what the second call gives."""
        found: Tensor = self.n(self.last(self.b(self.act(self.a(self.i(x))))))
        return found


def test_a_module_that_is_called_under_two_names() -> None:
    """No hook can stand behind one of the calls."""
    module, x = TwoNames().eval(), torch.randn(2, 4)
    result, report = proved(module, x, force=True)
    assert verdicts(report) == ["kept"] and "NF304" not in str(report.to_dict())
    torch.testing.assert_close(result(x), module(x))


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


def drawn(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + 0.4)
        if isinstance(module, OwnBias):
            module.n.weight.fill_(1.5)
    return module.eval()


def converted_all(module: nn.Module, converted: int, opset: int, width: int = D, **config: Any) -> None:
    """As an exported program, and in ONNX with norms of one operator and of many, with the certificate and without."""
    x = torch.randn(2, 3, width)
    verify: Any
    for verify in ("off", "sites"):
        asked = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify, **config)
        if opset:
            buffer: Any = io.BytesIO()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(module, (x,), buffer, dynamo=False, opset_version=opset, input_names=["x"],
                                  do_constant_folding=False)  # fmt: skip
            result, report = normfuse.optimize(onnx.load_from_string(buffer.getvalue()), asked)
            got = torch.from_numpy(session(result.SerializeToString()).run(None, {"x": x.numpy()})[0])
        else:
            result, report = normfuse.optimize(torch.export.export(module, (x,)), asked)
            got = result.module()(x)
        assert sum(n.action == "converted" for n in report.norms) == converted, report.refusals
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)


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
    converted_all(drawn(made()), 2, opset, untie=True)


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
