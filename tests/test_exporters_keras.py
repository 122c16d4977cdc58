"""Norms as Keras and tf2onnx write them: by way of a batch normalization with statistics of x itself, or an instance
normalization, and with statistics that are repeated for each channel; other exporters: tests/test_exporters.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import normfuse
from normfuse.sessions import session
from tests.cli_tools import saved
from tests.exporters import NUMBERS, N, layer_norm, model, rows

# -- LayerNormalization by way of FusedBatchNormV3 in training mode ---------------------------------------------------


KERAS = """r = Reshape(x, four) mean = ReduceMean<axes=[0, 2, 3], keepdims=1>({of}) d = Sub(r, mean)
ss = ReduceSumSquare<axes=[0, 2, 3], keepdims=0>(d) m = Squeeze(mean, behind) s = Shape(r)
dims = Gather<axis=0>(s, behind) count = ReduceProd<axes=[0], keepdims=0>(dims) many = Cast<to=1>(count)
var = Div(ss, many) shape = Shape(x) lead = Slice(shape, zero, one, zero) ones = Expand(c1, lead)
zeros = Expand(c0, lead) {outputs} = BatchNormalization<epsilon=0.001{mode}>(r, {statistics})
back = Reshape(b, shape) h = Mul(back, w) y = Add(h, v)"""
WRITTEN = {"of": "r", "outputs": "b", "mode": "", "statistics": "ones, zeros, m, var"}


def keras(opset: int, **changes: str) -> onnx.ModelProto:
    inputs = f"float[B, {N}] x" + (f", float[1, B, {N}, 1] z" if "z" in changes.values() else "")
    return model(KERAS.format(**WRITTEN | changes), inputs, f"float[B, {N}] y", opset)


@pytest.mark.parametrize("opset", [13, 15, 17])
@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_keras_layer_norm(opset: int, target: Any, tmp_path: Path) -> None:
    source, out = saved(keras(opset), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(target=target, verify="model"))
    (norm,) = report.norms
    assert (norm.kind, norm.size, norm.action, norm.verified, norm.proved) == ("layer_norm", N, "fused", True, True)
    assert norm.eps == pytest.approx(1e-3)
    left = [node.op_type for node in onnx.load(out).graph.node]
    assert left == ["LayerNormalization" if opset >= 17 else "layer_norm"]
    before, after = session(source), session(out)
    for name, x in rows().items():
        want = layer_norm(x, 1e-3, NUMBERS["w"], NUMBERS["v"])
        old, new = (np.abs(s.run(None, {"x": x})[0] - want).max() for s in (before, after))
        assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max(), name


DEEP = """b = Slice(s, zero, one, zero) n = Squeeze(b, zero) many = Mul(n, eight)
d0 = Unsqueeze(many, zero) dims = Cast<to=7>(d0) ones = Expand(c1, dims) zeros = Expand(c0, dims)"""
ROWS = """shape = Shape(x) s = Cast<to=6>(shape) {made}
r = Reshape(x, four) mean = ReduceMean<axes=[0, 2, 3]>(r) d = Sub(r, mean)
ss = ReduceSumSquare<axes=[0, 2, 3], keepdims=0>(d) m = Squeeze(mean, behind) rs = Shape(r)
k = Gather<axis=0>(rs, behind) count = ReduceProd<axes=[0], keepdims=0>(k) c = Cast<to=1>(count) var = Div(ss, c)
o = BatchNormalization<epsilon=0.001>(r, {given}, m, var) back = Cast<to=7>(s) q = Reshape(o, back)
h = Mul(q, w) y = Add(h, v)"""


@pytest.mark.parametrize(("batch", "made", "given"), [
    ("B", DEEP, "ones, zeros"), ("2", DEEP, "ones, zeros"), ("2", "", "ones16, zeros16"),  # folded where they are known
])  # fmt: skip
@pytest.mark.parametrize("opset", [13, 17])
def test_keras_layer_norm_of_sequences(batch: str, made: str, given: str, opset: int, tmp_path: Path) -> None:
    kind, out, lines = f"float[{batch}, 8, {N}]", tmp_path / "out.onnx", ROWS.format(made=made, given=given)
    source = saved(model(lines, f"{kind} x", f"{kind} y", opset), tmp_path / "in.onnx")
    (norm,) = normfuse.rewrite(source, out, normfuse.Config(verify="model")).norms
    assert (norm.kind, norm.axes, norm.action, norm.verified, norm.proved) == ("layer_norm", [-1], "fused", True, True)
    assert [n.op_type for n in onnx.load(out).graph.node] == ["LayerNormalization" if opset == 17 else "layer_norm"]
    before, after = session(source), session(out)
    for name, row in rows(16).items():
        x = row.reshape(2, 8, N)
        want = layer_norm(x, 1e-3, NUMBERS["w"], NUMBERS["v"])
        old, new = (np.abs(s.run(None, {"x": x})[0] - want).max() for s in (before, after))
        assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max(), name


@pytest.mark.parametrize(("shape", "norms"), [("int64[3] t", 1), ("int64[K] t", 0)])
@pytest.mark.parametrize("op", ["Reshape", "Expand"])
def test_a_view_of_which_only_the_number_of_axes_is_known(op: str, shape: str, norms: int, tmp_path: Path) -> None:
    """As tf2onnx writes an attention: the residual sum behind it has the size that x has."""
    lines = f"""z = {op}(u, t) h = Add(x, z) m = ReduceMean<axes=[-1]>(h) d = Sub(h, m) p = Mul(d, d)
    a = ReduceMean<axes=[-1]>(p) e = Add(a, eps) r = Sqrt(e) n = Div(d, r) k = Mul(n, w) y = Add(k, v)"""
    inputs = f"float[B, T, {N}] x, float[1, {N}] u, {shape}"
    source = saved(model(lines, inputs, "float[P, Q, R] y", 17), tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(verify="sites"))
    assert len(report.norms) == norms and {n.action for n in report.norms} <= {"fused"}
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((2, 3, N)).astype("f4"), "u": rng.standard_normal((1, N)).astype("f4"),
            "t": np.array([1, 1, N])}  # fmt: skip
    before, after = (session(path).run(None, feed)[0] for path in (source, tmp_path / "out.onnx"))
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_statistics_of_a_batch_by_name_of_a_foreign_operator(tmp_path: Path) -> None:
    """Over six rows the check keeps them all; and an operator of another domain may have the name of a view."""
    lines = """mu = ReduceMean<axes=[1], keepdims=0>(x) c = ReduceMean<axes=[1]>(x) d = Sub(x, c) q = Mul(d, d)
    a = ReduceMean<axes=[1], keepdims=0>(q) t = Unsqueeze(x, zero)
    n = BatchNormalization<epsilon=0.001>(t, ones6, zeros6, mu, a) u = Squeeze(n, zero) m = Mul(u, w) y = Add(m, v)"""
    source = model(lines, f"float[6, {N}] x", f"float[6, {N}] y", 17)
    made, report = normfuse.optimize(source)
    assert [(n.kind, n.action, n.verified) for n in report.norms] == [("layer_norm", "fused", True)]
    assert [n.op_type for n in made.graph.node] == ["LayerNormalization"]
    source.graph.node.append(onnx.helper.make_node("Identity", ["ones6"], [], domain="my.own"))
    source.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    assert not normfuse.inspect(source).norms  # which may do anything with a weight of ones


def test_a_size_that_is_left_open_has_no_name_of_the_models() -> None:
    lines = """t = Reshape(x, open) q = Mul(t, t) m = ReduceMean<axes=[-1]>(q) e = Add(m, eps) s = Sqrt(e)
    d = Div(t, s) y = Mul(d, k)"""
    made = model(lines, "float[A, B, 4] x, float[C] k", "float[4, D] y", 17)
    made.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "-1 of t"
    after, _ = normfuse.optimize(made)
    for n in (2, 1):
        feed = {"x": np.random.default_rng(0).standard_normal((n, n, 4)).astype("f4"), "k": np.ones(4, "f4")}
        want, got = (session(m.SerializeToString()).run(None, feed)[0] for m in (made, after))
        np.testing.assert_allclose(got, want, atol=1e-6)


GROUPS = """r = Reshape(x, grouped) mean = ReduceMean<axes=[1, 3]>(r) d = Sub(r, mean) p = Mul(d, d)
a = ReduceMean<axes=[1, 3]>(p) e = Add(a, eps) t = Sqrt(e) n = Div(d, t) h = Mul(n, {w}) k = Add(h, {v}) s = Shape(x)
y = Reshape(k, s)"""


@pytest.mark.parametrize(("w", "v"), [("w", "v"), ("deep_w", "deep_v"), ("deep_w", "v")])
@pytest.mark.parametrize("opset", [13, 17])
def test_keras_group_norm_of_one_group(w: str, v: str, opset: int, tmp_path: Path) -> None:
    """Its weights have an axis more than the input, which they are not to give to the result."""
    kind, out = f"float[B, 4, {N}]", tmp_path / "out.onnx"
    source = saved(model(GROUPS.format(w=w, v=v), f"{kind} x", f"{kind} y", opset), tmp_path / "in.onnx")
    (norm,) = normfuse.rewrite(source, out, normfuse.Config(verify="model")).norms
    assert (norm.axes, norm.size, norm.action, norm.verified) == ([-2, -1], 4 * N, "fused", True)
    x = np.random.default_rng(0).standard_normal((3, 4, N)).astype("f4")
    before, after = (session(path).run(None, {"x": x})[0] for path in (source, out))
    assert before.shape == after.shape and np.abs(before - after).max() < 1e-6


@pytest.mark.parametrize("changes", [
    {"statistics": "ones, zeros, fixed, fixed"},  # statistics of a training
    {"statistics": "ones, zeros, m, m"},  # the mean twice
    {"of": "z"},  # the mean of another tensor
])  # fmt: skip
def test_batch_normalization_that_is_no_norm(changes: dict[str, str], tmp_path: Path) -> None:
    source = saved(keras(13, **changes), tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config())
    assert not report.norms
    assert (tmp_path / "out.onnx").read_bytes() == source.read_bytes()


def test_batch_normalization_in_training_mode_is_left() -> None:
    assert not normfuse.inspect(keras(15, outputs="b, mean2, var2", mode=", training_mode=1")).norms


# -- tf2onnx: a LayerNorm over the last of three axes as an InstanceNormalization --------------------------------------


CHANNELS = """shape = Shape(x) row = Slice(shape, one, pair, zero) zeros = ConstantOfShape(row)
ones = ConstantOfShape<value = float[1] {1.0}>(row)"""
INSTANCE = "n = InstanceNormalization<epsilon=0.001>(x, %s) h = Mul(n, w) y = Add(h, v)"


@pytest.mark.parametrize(("made", "t"), [
    (CHANNELS + INSTANCE % "ones, zeros", "T"), (CHANNELS + INSTANCE % "ones, zeros", "4"),
    (INSTANCE % "ones4, zeros4", "4"), ("same = Identity(ones4)" + INSTANCE % "same, zeros4", "4"),
])  # fmt: skip
@pytest.mark.parametrize("opset", [13, 18])
def test_an_instance_normalization_over_rows(made: str, t: str, opset: int, tmp_path: Path) -> None:
    shape, out = f"float[B, {t}, {N}]", tmp_path / "out.onnx"
    source = saved(model(made, f"{shape} x", f"{shape} y", opset), tmp_path / "in.onnx")
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    (norm,) = report.norms
    assert (norm.kind, norm.axes, norm.size) == ("layer_norm", [-1], N)
    if opset == 13:  # where no operator is a LayerNorm, what the file has is better than a function of several
        assert norm.action == "left" and "several would be slower" in norm.reason
        return
    assert norm.action == "fused" and norm.verified and norm.proved
    assert [n.op_type for n in onnx.load(out).graph.node] == ["LayerNormalization"]
    before, after = session(source), session(out)
    for name, row in rows().items():
        x = np.stack([row, row[::-1]])
        want = layer_norm(x, 1e-3, NUMBERS["w"], NUMBERS["v"])
        old, new = (np.abs(s.run(None, {"x": x})[0] - want).max() for s in (before, after))
        assert new <= 2 * old + 4 * 2.0**-23 * np.abs(want).max(), name


@pytest.mark.parametrize("made", [
    INSTANCE % "w4, zeros4",  # a weight by channel
    INSTANCE % "ones4, ones4",  # a bias by channel
    "n = InstanceNormalization(x, ones4, zeros4) k = Reshape(n, three) y = Mul(k, w)",  # of groups
    "n = InstanceNormalization(x, ones4, zeros4) y = Relu(n)",  # of an image's rows
])  # fmt: skip
def test_an_instance_normalization_that_is_no_norm_of_rows(made: str) -> None:
    assert not normfuse.inspect(model(made, f"float[2, 4, {N}] x", f"float[2, 4, {N}] y", 18)).norms


def test_an_instance_normalization_of_images_is_no_norm_of_rows() -> None:
    made = model(INSTANCE % "ones4, zeros4", f"float[2, 4, 5, {N}] x", f"float[2, 4, 5, {N}] y", 18)
    assert not normfuse.inspect(made).norms


# -- statistics that are repeated for each channel ---------------------------------------------------------------------


TILED = """m = ReduceMean<axes=[-1]>(x) mm = Tile(m, once) d = Sub(x, mm) q = Mul(d, d) a = ReduceMean<axes=[-1]>(q)
e = Add(a, eps) r = Sqrt(e) s = Tile(r, once) n = Div(d, s) h = Mul(n, w) y = Add(h, v)"""
PAIRS = """g = Reshape(x, pairs) p = Mul(g, g) a = ReduceMean<axes=[-1], keepdims=0>(p) e = Add(a, eps) r = Sqrt(e)
s = Tile(r, half) n = Div(x, s) y = Mul(n, w)"""


@pytest.mark.parametrize("batch", ["B", "3"])
@pytest.mark.parametrize("opset", [13, 17])
def test_tiled_statistics(opset: int, batch: str) -> None:
    made, report = normfuse.optimize(model(TILED, f"float[{batch}, {N}] x", f"float[{batch}, {N}] y", opset))
    (norm,) = report.norms
    assert (norm.kind, norm.action, norm.verified) == ("layer_norm", "fused", True)
    assert [n.op_type for n in made.graph.node] == ["LayerNormalization" if opset == 17 else "layer_norm"]


def test_tiled_statistics_of_groups() -> None:
    assert not normfuse.inspect(model(PAIRS, f"float[B, {N}] x", f"float[B, {N}] y", 17)).norms
