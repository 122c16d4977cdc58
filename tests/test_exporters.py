"""Norms as other exporters than torch's write them: Flax by jax2tf, quantised models, recurrent ones.

The graphs are modelled on those of published models, which tests/test_pretrained.py reads where they are installed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import normfuse
import normfuse.ort
from normfuse.sessions import feeds_for, session
from tests.cli_tools import saved
from tests.exporters import ARRAYS, NUMBERS, Array, N, flax, layer_norm, model, rows
from tests.families import cached_export

# -- Flax: a variance in one pass, clamped, through reshapes and expansions to a computed shape ------------------------


def test_flax_layer_norm(tmp_path: Path) -> None:
    source, out = saved(flax(), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    (norm,) = report.norms
    assert (norm.kind, norm.action, norm.verified) == ("layer_norm", "fused", True) and not report.refusals
    assert [node.op_type for node in onnx.load(out).graph.node] == ["layer_norm"]
    before, after = session(source), session(out)
    for name, x in rows().items():
        want = layer_norm(x, 1e-3, NUMBERS["w"], NUMBERS["v"])
        old, new = (np.abs(s.run(None, {"x": x, "u": x})[0] - want).max() for s in (before, after))
        assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max(), name


def test_a_clamp_that_acts_is_refused() -> None:
    report = normfuse.inspect(flax(floor="small"))
    assert not report.norms and [r.code for r in report.refusals] == ["NF119"]


# -- icefall and ESPnet: an eps that is learned, as its logarithm ------------------------------------------------------


BASIC = """q = Pow(x, two) m = ReduceMean<axes=[-1]>(q) e = Exp({log}) a = Add(m, e) s = Pow(a, minus_half)
y = Mul(x, s)"""


def basic_norm(log: str = "log_eps") -> onnx.ModelProto:
    given = f"float[B, {N}] x" + (", float given" if log == "given" else "")
    return model(BASIC.format(log=log), given, f"float[B, {N}] y", 13)


@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_a_learned_eps(target: Any, tmp_path: Path) -> None:
    source, out = saved(basic_norm(), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(target=target, verify="model"))
    (norm,) = report.norms
    assert (norm.kind, norm.action, norm.verified) == ("rms_norm", "fused", True) and not report.refusals
    assert norm.eps == pytest.approx(0.25, rel=1e-6)
    before, after = session(source), session(out)
    for name, x in rows().items():
        wide = x.astype("f8")
        want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.exp(np.float64(np.float32(NUMBERS["log_eps"]))))
        old, new = (np.abs(s.run(None, {"x": x})[0] - want).max() for s in (before, after))
        assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max(), name


def test_an_eps_of_a_logarithm_that_is_given_is_refused() -> None:
    report = normfuse.inspect(basic_norm("given"))
    assert not report.norms and [r.code for r in report.refusals] == ["NF104"]


# -- an If that asks how long a shape is: tensor.repeat of unknown sizes, by torch's TorchScript exporter --------------


REPEAT = """s = Shape(x) n = Size(s) {c} = {test}(n, pair)
h = If(c) <then_branch = t () => (float[S] a) {{ a = Identity(v) }},
else_branch = f () => (float[P, Q] e) {{ e = Unsqueeze(v, zero) }}>
k = If(c) <then_branch = t2 () => (float[T] {g}) {{ {g} = Identity(w) }},
else_branch = f2 () => (float[U, V] {o}) {{ {o} = Unsqueeze(w, zero) }}>
u = Add(x, h) z = Add(u, k) m = ReduceMean<axes=[-1]>(z) d = Sub(z, m) q = Mul(d, d) var = ReduceMean<axes=[-1]>(q)
b = Add(var, eps) r = Sqrt(b) y = Div(d, r)"""


def repeat(test: str = "Greater", c: str = "c", g: str = "g", o: str = "o") -> onnx.ModelProto:
    given = f"float[B, 4, {N}] x" + (", bool c" if c != "c" else "")
    return model(REPEAT.format(test=test, c=c, g=g, o=o), given, f"float[B, 4, {N}] y", 13)


@pytest.mark.parametrize("given", [{"test": "Greater"}, {"test": "Less"}, {"g": "a"}, {"o": "e", "test": "Less"}])
def test_an_if_whose_condition_is_known(given: dict[str, str], tmp_path: Path) -> None:
    """Also where two branches have names in common."""
    source, out = saved(repeat(**given), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert [(n.kind, n.size, n.action, n.verified) for n in report.norms] == [("layer_norm", N, "fused", True)]
    assert not report.refusals
    x = np.random.default_rng(0).standard_normal((2, 4, N)).astype("f4")
    old, new = (session(path).run(None, {"x": x})[0] for path in (source, out))
    want = layer_norm(x.astype("f8") + NUMBERS["v"] + NUMBERS["w"], 1e-3)
    assert np.abs(new - want).max() <= 2 * np.abs(old - want).max() + 4 * 2.0**-23 * np.abs(want).max()


def test_an_if_whose_shape_is_not_known() -> None:
    """The condition is an input."""
    report = normfuse.inspect(repeat(c="other"))
    assert not report.norms and {r.code for r in report.refusals} == {"NF115"}


def test_an_if_whose_branch_gives_less_than_it_has_outputs_is_no_crash() -> None:
    made = repeat()
    (node,) = (n for n in made.graph.node if n.output[0] == "k")
    node.output.append("more")
    assert len(normfuse.inspect(made).norms) == 1


# -- JAX: jnp.var gives NaN for no elements at all ---------------------------------------------------------------------


JAX = """mean = ReduceMean<axes=[-1]>(x) d = Sub(x, mean) q = Mul(d, d) ss = ReduceMean<axes=[-1]>(q)
{c} = {test}(ten, c0) var = Where(c, {order}) a = Add(var, eps) r = Sqrt(a) h = Div(d, r) y = Mul(h, w)"""


def jax_var(test: str = "Greater", order: str = "ss, nan11", c: str = "c") -> onnx.ModelProto:
    given = f"float[B, {N}] x" + (", bool c" if c != "c" else "")
    made = "1, " * ("nan111" in order)
    return model(JAX.format(test=test, order=order, c=c), given, f"float[{made}B, {N}] y", 13)


@pytest.mark.parametrize("given", [{}, {"order": "ss, nan"}, {"test": "Less", "order": "nan11, ss"}],
                         ids=["rank 2", "scalar", "second"])  # fmt: skip
def test_a_variance_that_asks_whether_there_are_elements(given: dict[str, str], tmp_path: Path) -> None:
    source, out = saved(jax_var(**given), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert [(n.kind, n.size, n.action, n.verified) for n in report.norms] == [("layer_norm", N, "fused", True)]
    assert not report.refusals
    before, after = session(source), session(out)
    for name, x in rows().items():
        want = layer_norm(x, 1e-3, NUMBERS["w"])
        old, new = (np.abs(s.run(None, {"x": x})[0] - want).max() for s in (before, after))
        assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max(), name


@pytest.mark.parametrize("given", [{"c": "other"}, {"test": "Less"}, {"order": "ss, nan41"}, {"order": "ss, nan111"},
                                   {"order": "ss, x"}], ids=["given", "NaN", "rows", "rank", "width"])  # fmt: skip
def test_a_variance_that_may_be_another(given: dict[str, str]) -> None:
    """The condition is an input, it takes the NaN, or what is not taken has more rows, another rank or width."""
    assert not normfuse.inspect(jax_var(**given)).norms


# -- channels first: ConvNeXt's LayerNorm2d, through transposes or along an inner axis ---------------------------------


TURNED = """t = Transpose<perm = [0, 2, 3, 1]>(x) mean = ReduceMean<axes=[{axes}]>(t) d = Sub(t, mean) q = Mul(d, d)
var = ReduceMean<axes=[{axes}]>(q) a = Add(var, eps) r = Sqrt(a) h = Div(d, r) g = Mul(h, {w}) z = Add(g, {v})
y = Transpose<perm = [0, 3, 1, 2]>(z)"""
INNER = """q = Mul(x, x) m = ReduceMean<axes=[1]>(q) a = Add(m, eps) r = Sqrt(a) h = Div(x, r) s = {weight}
y = Mul(h, s)"""


def images() -> dict[str, Array]:
    """Images of N channels whose rows are hard on norms."""
    return {name: x.reshape(2, N, N, N) for name, x in rows(2 * N * N).items()}


def close(before: Any, after: Any, x: Array, want: Array) -> None:
    old, new = (np.abs(s.run(None, {"x": x})[0] - want).max() for s in (before, after))
    assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max()


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "normfuse"])
@pytest.mark.parametrize("opset", [13, 17])
def test_a_norm_between_transposes_is_that_of_the_rows(target: Any, opset: int, tmp_path: Path) -> None:
    """The channels are as many as there are rows and columns, so that sizes do not tell them apart."""
    given = f"float[B, {N}, {N}, {N}]"
    source = saved(model(TURNED.format(axes=-1, w="w", v="v"), f"{given} x", f"{given} y", opset), tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(target=target, verify="model"))
    (norm,) = report.norms
    assert (norm.kind, norm.axes, norm.action, norm.verified, norm.weight) == ("layer_norm", [-1], "fused", True, "w")
    left = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert left == ["Transpose", "LayerNormalization" if opset >= 17 else "layer_norm", "Transpose"]
    before, after = session(source), session(tmp_path / "out.onnx")
    for x in images().values():
        turned = layer_norm(x.transpose(0, 2, 3, 1), 1e-3, NUMBERS["w"], NUMBERS["v"])
        close(before, after, x, turned.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_a_weight_over_three_axes_goes_with_those_it_is_written_for(target: Any, tmp_path: Path) -> None:
    given = f"float[B, {N}, {N}, {N}]"
    source = saved(model(TURNED.format(axes="1, 2, 3", w="cube", v="v"), f"{given} x", f"{given} y", 17),
                   tmp_path / "in.onnx")  # fmt: skip
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(target=target, verify="model"))
    (norm,) = report.norms
    assert (norm.axes, norm.action, norm.verified, norm.weight) == ([-3, -2, -1], "fused", True, "cube")
    before, after = session(source), session(tmp_path / "out.onnx")
    for x in images().values():
        t = x.transpose(0, 2, 3, 1)
        h = layer_norm(t.reshape(2, -1), 1e-3).reshape(t.shape) * ARRAYS["cube"] + NUMBERS["v"]
        close(before, after, x, h.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "normfuse"])
@pytest.mark.parametrize(("weight", "factor"), [
    ("Identity(wide_w)", lambda w: w), ("Add(wide_w, c1)", lambda w: w + 1), ("Mul(wide_w, ten)", lambda w: w * 10),
    ("Div(wide_w, wide_v)", lambda w: w / (w + 2)), ("Mul(ten, c1)", lambda w: 10 + 0 * w),
])  # fmt: skip
def test_a_computed_weight_along_an_inner_axis(target: Any, weight: str, factor: Any, tmp_path: Path) -> None:
    given = f"float[B, {N}, {N}, {N}]"
    source = saved(model(INNER.format(weight=weight), f"{given} x", f"{given} y", 13), tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(target=target, verify="model"))
    (norm,) = report.norms
    assert (norm.kind, norm.axes, norm.action, norm.verified) == ("rms_norm", [-3], "fused", True)
    assert not report.refusals
    before, after = session(source), session(tmp_path / "out.onnx")
    options = onnxruntime.SessionOptions()
    normfuse.ort.register(options, tmp_path / "out.onnx")
    library = onnxruntime.InferenceSession(tmp_path / "out.onnx", options, providers=["CPUExecutionProvider"])
    for x in images().values():
        wide, w = x.astype("f8"), ARRAYS["wide_w"].astype("f8")
        want = wide / np.sqrt((wide**2).mean(1, keepdims=True) + np.float32(1e-3)) * factor(w)
        for made in (after, library):
            close(before, made, x, want)


def test_the_place_of_a_norm_between_transposes() -> None:
    """A ConvNeXt of two blocks: the norm of the stem starts the stream, and the last one ends it."""
    stem, last = (re.sub(r"\b(t|mean|d|q|var|a|r|h|g|z|y|x)\b", rf"\g<1>{i}", TURNED.format(axes=-1, w="w", v="v"))
                  for i in range(2))  # fmt: skip
    blocks = "k0 = Conv(y0, F) b0 = Add(y0, k0) k1 = Conv(b0, F) x1 = Add(b0, k1)"
    given = f"float[B, {N}, {N}, {N}]"
    lines = f"x0 = Conv(x, F) {stem} {blocks} {last} y = Relu(y1)"
    report = normfuse.inspect(model(lines, f"{given} x", f"{given} y", 17))
    assert [n.placement for n in report.norms] == ["embedding", "final"]


def test_a_weight_along_another_axis_is_no_weight() -> None:
    given = f"float[B, {N}, {N}, {N}]"
    report = normfuse.inspect(model(INNER.format(weight="Identity(w)"), f"{given} x", f"{given} y", 13))
    (norm,) = report.norms
    assert (norm.axes, norm.weight) == ([-3], None) and norm.name != "y"  # what it multiplies is a norm


# -- the branches of an If ---------------------------------------------------------------------------------------------


BRANCHES = """y = If(c) <then_branch = t () => (float[B, 8] a) {{ h = Gemm(x, {then}) m = ReduceMean<axes=[-1]>(h)
d = Sub(h, m) q = Mul(d, d) var = ReduceMean<axes=[-1]>(q) e = Add(var, eps) r = Sqrt(e) n = Div(d, r) a = Mul(n, w) }},
else_branch = f () => (float[B, 8] b) {{ {name} = Gemm(x, {other}) b = Slice({name}, zero, size, one) }}>"""


def branches(then: str = "M", name: str = "k", other: str = "M") -> onnx.ModelProto:
    lines = BRANCHES.format(then=then, name=name, other=other)
    return model(lines, "float[B, 16] x, bool c", "float[B, 8] y", 13)


def test_a_norm_in_a_branch_of_which_no_shape_is_stated(tmp_path: Path) -> None:
    source, out = saved(branches(), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert [(n.kind, n.size, n.action, n.verified) for n in report.norms] == [("layer_norm", 8, "fused", True)]
    assert not report.refusals
    x = np.random.default_rng(0).standard_normal((3, 16)).astype("f4")
    for c in (True, False):
        want, got = (session(path).run(None, {"x": x, "c": np.array(c)})[0] for path in (source, out))
        assert np.abs(want - got).max() <= 4 * 2.0**-23 * np.abs(want).max()


def test_two_branches_that_call_values_of_other_shapes_the_same() -> None:
    """A Gemm has its shape from its operands, an Einsum from ONNX's shape inference, in its own branch."""
    for op, other in (("Gemm", "M16"), ("Gemm", "M"), ("Einsum", "M"), ("Einsum", "M16")):
        made = branches(name="h", other=other)
        for graph in (a.g for node in made.graph.node for a in node.attribute if a.HasField("g")):
            for node in graph.node:
                if op == "Einsum" and node.op_type in ("Gemm", "MatMul"):
                    node.op_type = "Einsum"
                    node.attribute.add(name="equation", type=onnx.AttributeProto.STRING, s=b"ij,jk->ik")
        assert [n.kind for n in normfuse.inspect(made).norms] == ["layer_norm"], (op, other)


# -- quantised models --------------------------------------------------------------------------------------------------


BLOCK = """n = LayerNormalization(x, w, v) n8 = QuantizeLinear(n, scale, point) nf = DequantizeLinear(n8, scale, point)
V = DequantizeLinear(W8, scale, point) U = DequantizeLinear(U8, scale, point) h = MatMul(nf, V) r = Relu(h)
r8 = QuantizeLinear(r, scale, point) rf = DequantizeLinear(r8, scale, point) f = MatMul(rf, U) y = Add(x, f)"""


def test_placements_are_read_through_quantisation() -> None:
    report = normfuse.inspect(model(BLOCK, f"float[B, 3, {N}] x", f"float[B, 3, {N}] y", 18))
    assert report.recipe == "LayerNorm, pre-norm" and [n.placement for n in report.norms] == ["pre"]
    assert report.card is not None
    assert [report.card.formula(b) for b in report.card.stacks[0].blocks[0].branches] == [
        "x + feed-forward(LayerNorm(x))"]  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "normfuse"])
def test_a_weight_that_is_kept_in_eight_bits(target: Any, tmp_path: Path) -> None:
    """ONNX Runtime's static quantisation leaves the weights of LayerNormalization so."""
    lines = ("wf = DequantizeLinear(W8row, scale, point) h = Add(x, u) q = Mul(h, h) m = ReduceMean(q, last) "
             "a = Add(m, eps) s = Sqrt(a) n = Div(h, s) y = Mul(n, wf)")  # fmt: skip
    made = model(lines, f"float[B, 3, {N}] x, float[B, 3, {N}] u, int8[{N}] W8row", f"float[B, 3, {N}] y", 18)
    row = np.arange(N, dtype=np.int8) - 3
    made.graph.initializer.append(onnx.numpy_helper.from_array(row, "W8row"))
    made.graph.input.remove(next(v for v in made.graph.input if v.name == "W8row"))
    source, out = saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(target=target, verify="model"))
    assert [(n.weight, n.action) for n in report.norms] == [("wf", "fused")]
    assert "Mul" not in [n.op_type for n in onnx.load(out).graph.node]


def test_a_model_that_was_quantised_statically_has_the_same_placements(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feeds: dict[str, Array]) -> None:
            self.left = [feeds]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    source, out = cached_export("bert", 18), tmp_path / "out.onnx"
    quantize_static(source, out, Once(feeds_for(session(source))))
    before, after = normfuse.inspect(source), normfuse.inspect(out)
    assert "DequantizeLinear" in after.operators_before and after.recipe == before.recipe
    assert [(n.kind, n.placement) for n in after.norms] == [(n.kind, n.placement) for n in before.norms]


@pytest.mark.parametrize("made_of", [
    "V = Transpose(W)", "i = Cast<to = 3>(W) d = Constant<value_float = 0.1>() V = DequantizeLinear(i, d)",
    "V = Identity(W)",
])  # fmt: skip
def test_a_product_with_weights_that_are_put_side_by_side_is_no_attention(made_of: str) -> None:
    """onnxoptimizer makes one product of those of query, key and value."""
    made = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 18]>
        g (float[2, 3, 64] x, float[64] w, float[64, 64] W) => (float[2, 3, 64] y) {
            n = LayerNormalization(x, w) V = NONE K = Concat<axis = 1>(W, W, V) p = MatMul(n, K)
            a, b, c = Split<num_outputs = 3, axis = -1>(p) t = Transpose<perm = [0, 2, 1]>(b) s = MatMul(a, t)
            o = Softmax(s) r = MatMul(o, c) f = MatMul(r, W) y = Add(x, f) }""".replace("V = NONE", made_of))
    for name, shape in (("w", (64,)), ("W", (64, 64))):
        made.graph.input.remove(next(v for v in made.graph.input if v.name == name))
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    report = normfuse.inspect(made)
    assert [n.placement for n in report.norms] == ["pre"] and report.card is not None
    assert [report.card.formula(b) for b in report.card.stacks[0].blocks[0].branches] == ["x + attention(LayerNorm(x))"]


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "gpt2", "deepseek_v3"])
def test_a_model_that_onnx_runtime_quantised_has_the_same_placements(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    source, out = cached_export(name, 18), tmp_path / "out.onnx"
    made = onnx.load(source)
    del made.graph.value_info[:]  # of the weights before they were transposed, which the quantiser does not take
    quantize_dynamic(made, tmp_path / "in.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    before, after = normfuse.inspect(source), normfuse.inspect(tmp_path / "in.onnx")
    assert "MatMulInteger" in after.operators_before
    assert after.recipe == before.recipe and not after.refusals
    assert [(n.kind, n.placement) for n in after.norms] == [(n.kind, n.placement) for n in before.norms]
    config = normfuse.Config(target="normfuse", verify="model")
    done = [normfuse.rewrite(path, out, config, overwrite=True).norms for path in (source, tmp_path / "in.onnx")]
    plain, quantised = ([(n.action, n.emitted, n.verified) for n in norms] for norms in done)
    assert quantised == plain and any(action == "fused" for action, *_ in plain)


def test_a_norm_around_a_quantised_value_is_none() -> None:
    """Rounded to eight bits, a mean is another number; what is left is the RMSNorm of the difference."""
    lines = ("m = ReduceMean(x, last) m8 = QuantizeLinear(m, scale, point) mf = DequantizeLinear(m8, scale, point) "
             "d = Sub(x, mf) q = Mul(d, d) var = ReduceMean(q, last) a = Add(var, eps) s = Sqrt(a) y = Div(d, s)")
    made = model(lines, f"float[B, {N}] x", f"float[B, {N}] y", 18)
    assert [n.kind for n in normfuse.inspect(made).norms] == ["rms_norm"]
    plain = model(lines.replace("Sub(x, mf)", "Sub(x, m)"), f"float[B, {N}] x", f"float[B, {N}] y", 18)
    assert [n.kind for n in normfuse.inspect(plain).norms] == ["layer_norm"]


# -- sizes that nobody knows to be the same, and recurrent layers ------------------------------------------------------


def test_a_residual_of_sizes_that_have_other_names() -> None:
    """It is one in the drawing; but the addition is not taken into an operator, which demands that it is proved."""
    lines = ("a = LayerNormalization(x, w, v) h = MatMul(a, W) shape = Shape(u) lead = Slice(shape, zero, pair, zero) "
             "target = Concat<axis=0>(lead, size) f = Reshape(h, target) s = Add(x, f) y = LayerNormalization(s, w, v)")
    for name, emitted in (("u", {""}), ("x", {"", "function normfuse.add_layer_norm"})):
        made = model(lines.replace("Shape(u)", f"Shape({name})"), f"float[A, S, {N}] x, float[B, T, {N}] u",
                     f"float[A, S, {N}] y", 18)  # fmt: skip
        report = normfuse.optimize(made, normfuse.Config(target="normfuse"))[1]
        assert [n.placement for n in report.norms] == ["pre", "final"]
        assert {n.emitted for n in report.norms} == emitted


def test_recurrent_layers_are_told_from_attention() -> None:
    lines = ("n = LayerNormalization(x, w, v) all, state = GRU<hidden_size=8>(n, G, R) f = Squeeze(all, one) "
             "y = Add(x, f)")  # fmt: skip
    report = normfuse.inspect(model(lines, f"float[S, B, {N}] x", f"float[S, B, {N}] y", 18))
    assert [n.placement for n in report.norms] == ["pre"] and report.card is not None
    assert [report.card.formula(b) for b in report.card.stacks[0].blocks[0].branches] == [
        "x + recurrent(LayerNorm(x))"]  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gru = nn.LayerNorm(N), nn.GRU(N, N, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.gru(self.norm(x))[0]
        return out


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_recurrent_layers_in_torch() -> None:
    card = normfuse.inspect(torch.export.export(Recurrent(), (torch.randn(2, 5, N),))).card
    assert card is not None
    assert [card.formula(b) for b in card.stacks[0].blocks[0].branches] == ["x + recurrent(LayerNorm(x))"]
