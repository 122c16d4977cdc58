"""Norms behind operators of ONNX Runtime, of which ONNX's shape inference knows nothing and the file states nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import normfuse
from normfuse.frontends.onnx import lower
from normfuse.io.files import from_proto
from normfuse.sessions import session
from tests.onnx_lines import N, rms

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
ARRAYS: dict[str, Array] = {
    "w": np.linspace(0.5, 1.5, N), "v": np.linspace(-1, 1, N), "W": RNG.standard_normal((N, N)) / 4,
    "P": RNG.standard_normal((N, 3 * N)) / 4, "p": RNG.standard_normal(3 * N) / 4, "eps": np.array(1e-6),
    "last": np.array([-1]), "B4": RNG.integers(0, 256, (N, 1, N // 2), np.uint8), "S4": RNG.random(N) / 8,
    "W8": RNG.integers(-99, 99, (N, N), np.int8), "P8": RNG.integers(-99, 99, (N, 3 * N), np.int8),
    "s8": np.array(0.01), "z8": np.array(0, np.int8), "u8": np.array(128, np.uint8), "flat": np.array([-1, N]),
    "pos": np.array([0]), "turn": RNG.standard_normal((N, N // 4)), "T4": RNG.integers(0, 256, (N, N // 2), np.uint8),
    "t4": RNG.random((N, 1)) / 8, "G": RNG.standard_normal((N, 4)), "E": RNG.standard_normal((4, N, N)) / 4,
}  # fmt: skip
BRANCHES = {
    "FusedMatMul": "f = com.microsoft.FusedMatMul(x, W)",
    "FusedMatMul alpha": "f = com.microsoft.FusedMatMul<alpha = 0.3>(x, W)",
    "FusedMatMul transB": "f = com.microsoft.FusedMatMul<transB = 1>(x, W)",
    "FusedMatMul both computed": "k = com.microsoft.FusedMatMul<transB = 1, alpha = 0.25>(x, x) f = MatMul(k, x)",
    "FusedMatMul transA": "k = com.microsoft.FusedMatMul<transA = 1, alpha = 0.25>(x, x) f = MatMul(x, k)",
    "FastGelu": "f = com.microsoft.FastGelu(x, v)", "BiasGelu": "f = com.microsoft.BiasGelu(x, v)",
    "Gelu": "f = com.microsoft.Gelu(x)", "QuickGelu": "f = com.microsoft.QuickGelu<alpha = 1.5>(x)",
    "Attention": "f = com.microsoft.Attention<num_heads = 2>(x, P, p)",
    "MultiHeadAttention": "f = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x)",
    "MatMulNBits": "f = com.microsoft.MatMulNBits<K = 16, N = 16, bits = 4, block_size = 16>(x, B4, S4)",
    "DynamicQuantizeMatMul": "f = com.microsoft.DynamicQuantizeMatMul(x, W8, s8, z8)",
    "MatMulIntegerToFloat":
        "q, t, z = DynamicQuantizeLinear(x) f = com.microsoft.MatMulIntegerToFloat(q, W8, t, s8, z, z8)",
    "QAttention": "q, t, z = DynamicQuantizeLinear(x) "
                  "f = com.microsoft.QAttention<num_heads = 2>(q, P8, p, t, s8, none, z, z8)",
    "QLinearAdd": "q = QuantizeLinear(x, s8, u8) r = com.microsoft.QLinearAdd(q, s8, u8, q, s8, u8, s8, u8) "
                  "f = DequantizeLinear(r, s8, u8)",
    "RotaryEmbedding": "f = com.microsoft.RotaryEmbedding<num_heads = 2>(x, pos, turn, turn)",
    "FusedGemm": "t = Reshape(x, flat) m = com.microsoft.FusedGemm<activation = \"Relu\">(t, W, v) h = Shape(x) "
                 "f = Reshape(m, h)",
    "GatherBlockQuantized": "i = ArgMax<axis = -1, keepdims = 0>(x) f = com.microsoft.GatherBlockQuantized"
                            "<bits = 4, block_size = 16, gather_axis = 0, quantize_axis = 1>(T4, i, t4)",
    "EmbedLayerNormalization": "j = ArgMax<axis = -1, keepdims = 0>(x) i = Cast<to = 6>(j) "
                               "f, m = com.microsoft.EmbedLayerNormalization(i, none, W, W, none, w, v)",
    "MoE": "t = Reshape(x, flat) o = MatMul(t, G) m = com.microsoft.MoE<k = 2, activation_type = \"relu\">"
           "(t, o, E, none, E) h = Shape(x) f = Reshape(m, h)",
}  # fmt: skip


def model(branch: str) -> onnx.ModelProto:
    """s = x + W f(x); y = rms(s), with sizes that vary and no shape stated inside."""
    body = branch + " g = MatMul(f, W) s = Add(x, g) " + rms("s", "y")
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]> '
        f"g (float[batch, seq, {N}] x) => (float[batch, seq, {N}] y) {{ {body} }}")  # fmt: skip
    for node in made.graph.node:
        node.input[:] = ["" if name == "none" else name for name in node.input]
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype("f4") if a.dtype.kind == "f" else a, k)
                                  for k, a in ARRAYS.items() if k in read)  # fmt: skip
    return made


@pytest.mark.parametrize("name", BRANCHES)
def test_a_norm_behind_it_is_found(name: str, tmp_path: Path) -> None:
    before = model(BRANCHES[name])
    after, report = normfuse.optimize(before, normfuse.Config(target="normfuse"))
    inside = [("layer_norm", "kept", N)] if name == "EmbedLayerNormalization" else []
    assert [(n.kind, n.action, n.size) for n in report.norms] == [*inside, ("rms_norm", "fused", N)]
    assert report.norms[-1].emitted == "function normfuse.add_rms_norm" and not report.refusals
    x = RNG.standard_normal((2, 3, N)).astype("f4")
    outputs = []
    for made, path in ((before, tmp_path / "a.onnx"), (after, tmp_path / "b.onnx")):
        onnx.save(made, path)
        outputs.append(session(path).run(None, {"x": x})[0])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("outputs", "rows", "found"), [
    ("f", "w, v", 1), ("f, m", "w, v", 1), ("f, m, total", "w, v", 1), ("f", "w", 0),  # without a bias it is none
])  # fmt: skip
def test_the_norm_of_embeddings_in_one_operator(outputs: str, rows: str, found: int, tmp_path: Path) -> None:
    """Its formula is that of the operator, whose sum is read from outside; converted it is not."""
    call = BRANCHES["EmbedLayerNormalization"].replace("f, m =", f"{outputs} =").replace("w, v)", f"{rows})")
    before = model(call)
    if "total" in outputs:
        before = model(call + " p = Neg(total)")
        before.graph.output.append(onnx.helper.make_tensor_value_info("p", 1, None))
    for config in (normfuse.Config(), normfuse.Config(layernorm_to_rmsnorm="exact", target="normfuse")):
        after, report = normfuse.optimize(before, config)
        norms = [n for n in report.norms if n.kind == "layer_norm"]
        assert [(n.action, n.axes) for n in norms] == [("kept", [-1])] * found
        assert all(n.eps == pytest.approx(1e-12) for n in norms)
        assert any(n.op_type == "EmbedLayerNormalization" for n in after.graph.node)


def shape_of(lines: str, inputs: str) -> Any:
    """What is known of the shape of y."""
    domains = '"": 18, "com.microsoft": 1, "com.microsoft.nchwc": 1'
    lines += " all = Constant<value = int64[1] {-1}>() z = Reshape(y, all)"
    made = onnx.parser.parse_model(
        f"<ir_version: 8, opset_import: [{domains}]> g ({inputs}) => (float[A] z) {{ {lines} }}")  # fmt: skip
    for value in made.graph.input:
        if not value.type.tensor_type.shape.dim:
            value.type.tensor_type.ClearField("shape")
    found = lower(from_proto(made, Path("model"))[0])[0]
    return next(v.shape for node in found.graph.nodes for v in node.outputs if v.name == "y")


X, W3 = "float[B, S, 16] x, float[B, T, 16] k, float[B, T, 24] u", "float[16, 72] w"


@pytest.mark.parametrize(("lines", "inputs", "shape"), [
    ("y = com.microsoft.Attention<num_heads = 2>(x, w)", f"{X}, {W3}", ("B", "S", 24)),
    ("y = com.microsoft.Attention<num_heads = 2, qkv_hidden_sizes = [24, 24, 8]>(x, w)", f"{X}, {W3}", ("B", "S", 8)),
    ("y = com.microsoft.Attention<num_heads = 2>(x, w)", f"{X}, float w", ("B", "S", "2 of y")),
    ("y = com.microsoft.Attention<num_heads = 2>(x, w)", f"float x, {W3}", None),
    ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, k, u)", X, ("B", "S", 24)),
    ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x)", X, None),  # packed
    ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, k, u)",
     "float[B, S, 16] x, float[B, 2, T, 8] k, float[B, 2, T, 8] u", ("B", "S", 16)),
    ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, k, u)",
     "float[B, S, 16] x, float[B, N, T, 8] k, float[B, N, T, 8] u", ("B", "S", "2 of y")),
    ("y = com.microsoft.MultiHeadAttention<num_heads = 2>(x, k, u)", f"{X.replace('24', '4, 6, 2')}", None),
    ("y = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(x, k, u)", X, ("B", "S", 16)),
    ("y = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(x)", X, ("B", "S", 8)),
    ("y = com.microsoft.GroupQueryAttention<num_heads = 3, kv_num_heads = 1>(x)", X, ("B", "S", "2 of y")),
    ("y = Gemm(x, k)", "float[B, 3] x, float[3, 5] k", ("B", 5)),
    ("y = Gemm<transA = 1, transB = 1>(x, k)", "float[3, B] x, float[5, 3] k", ("B", 5)),
    ("y = com.microsoft.FusedMatMul<transA = 1>(x, k)", "float[B, 3, 16] x, float[B, 3, 5] k", ("B", 16, 5)),
    ("y = com.microsoft.FusedMatMul<transB = 1>(x, k)", X, ("B", "S", "T")),
    ("y = com.microsoft.FusedMatMul<transB = 1>(x, k)", "float[B, S, 16] x, float[16] k", ("B", "S")),
    ("y = com.microsoft.FusedMatMul<transA = 1>(x, k)", "float x, float[16, 4] k", None),
    ("y = com.microsoft.FusedMatMul<transBatchA = 1>(x, k)", X, None),
])  # fmt: skip
def test_the_shape_of_what_it_gives(lines: str, inputs: str, shape: Any) -> None:
    assert shape_of(lines, inputs) == shape


@pytest.mark.parametrize(("lines", "inputs", "shape"), [
    ("y = com.microsoft.FusedConv<kernel_shape = [3, 3], activation = \"Relu\">(x, w)", "", ("B", 5, 6, 7)),
    ("y = com.microsoft.NhwcConv<kernel_shape = [3, 3]>(x, w)", "float[B, 8, 9, 4] x, float[5, 4, 3, 3] w",
     ("B", 6, 7, 5)),
    ("y = com.microsoft.nchwc.Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)", "", ("B", 5, 8, 9)),
    ("y = com.microsoft.nchwc.MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", "", ("B", 4, 4, 4)),
    ("y = com.microsoft.nchwc.GlobalAveragePool(x)", "", ("B", 4, 1, 1)),
    ("y = com.microsoft.nchwc.ReorderInput(x)", "", ("B", "1 of y", 8, 9)),
    ("y = com.microsoft.nchwc.ReorderInput<channels_last = 1>(x)", "", ("B", "1 of y", 4, 8)),
    ("y = com.microsoft.nchwc.ReorderOutput<channels = 3>(x)", "", ("B", 3, 8, 9)),
    ("y = com.microsoft.nchwc.ReorderOutput<channels = 3, channels_last = 1>(x)", "", ("B", 8, 9, 3)),
    ("y = com.microsoft.nchwc.ReorderOutput<channels = 3>(x)", "float[B, 4] x", None),
    ("y = com.microsoft.nchwc.Upsample<scales = [1, 1, 2, 3]>(x)", "float[B, 4, H, 9] x", ("B", 4, "2 of y", 27)),
    ("y = com.microsoft.nchwc.Upsample<scales = [2, 3]>(x)", "", None),
    ("y = com.microsoft.nchwc.Upsample<scales = [1, 1, -2, 1]>(x)", "", None),
    ("y = com.microsoft.nchwc.ReorderOutput<channels = -3>(x)", "", ("B", "1 of y", 8, 9)),
    ("y = Resize(x, s, s)", "float[B, 4, 8, 9] x, float[4] s", ("0 of y", "1 of y", "2 of y", "3 of y")),
])  # fmt: skip
def test_the_shape_of_what_convolutions_give(lines: str, inputs: str, shape: Any) -> None:
    assert shape_of(lines, inputs or "float[B, 4, 8, 9] x, float[5, 4, 3, 3] w") == shape


def test_norms_behind_blocked_convolutions(tmp_path: Path) -> None:
    """As ONNX Runtime saves a model that it has optimised with all it has: the layout is the machine's."""
    text = f"""<ir_version: 8, opset_import: ["": 18]>
        g (float[batch, 3, 8, 8] x) => (float[batch, seq, {N}] y) {{
        c = Conv<kernel_shape = [2, 2], strides = [2, 2]>(x, k)
        f = Reshape(c, rows) t = Transpose<perm = [0, 2, 1]>(f) g = MatMul(t, W) s = Add(t, g) {rms("s", "y")} }}"""
    made = onnx.parser.parse_model(text)
    more = {"k": RNG.standard_normal((N, 3, 2, 2)), "rows": np.array([0, N, -1])}
    for name, a in {**{k: ARRAYS[k] for k in ("W", "w", "eps", "last")}, **more}.items():
        a = a.astype("f4") if a.dtype.kind == "f" else a
        made.graph.initializer.append(onnx.numpy_helper.from_array(a, name))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "a.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    saved = onnx.load(tmp_path / "a.onnx")
    if all(node.domain != "com.microsoft.nchwc" for node in saved.graph.node):
        pytest.skip("ONNX Runtime has no blocked convolutions for this machine")
    _, report = normfuse.optimize(saved)
    assert [n.kind for n in report.norms] == ["rms_norm"] and not report.refusals


@pytest.mark.parametrize("name", ["FusedMatMul", "Attention", "MultiHeadAttention", "GroupQueryAttention", "BiasGelu",
                                  "FastGelu", "Gelu", "GroupNormalization", "InstanceNormalization", "QAttention",
                                  "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "FusedGemm",
                                  "EmbedLayerNormalization", "QEmbedLayerNormalization", "GatherBlockQuantized",
                                  "QLinearAdd", "QLinearMul", "RotaryEmbedding", "MoE", "QMoE", "FusedConv", "NhwcConv",
                                  "NhwcFusedConv", "nchwc.ReorderInput", "nchwc.ReorderOutput", "nchwc.Upsample",
                                  "nchwc.Conv", "nchwc.MaxPool"])  # fmt: skip
def test_too_few_or_too_many_operands_are_said_in_one_line(name: str) -> None:
    for given in ([], ["x"], ["x", "w"], ["", "w"], ["x", "", "w"], ["x", "x", "w", "w", "w", "w"], ["", "", ""]):
        for outputs in (["o"], ["o", "p", "q"]):
            made = model("f = Identity(x)")
            domain = "" if name.endswith("Normalization") else "com.microsoft"
            *part, op = name.split(".")
            domain = ".".join((domain, *part))
            made.graph.node.append(onnx.helper.make_node(op, given, outputs, domain=domain, num_groups=1))
            try:
                normfuse.optimize(made)
            except normfuse.NormFuseError as why:
                assert "\n" not in str(why)


@pytest.mark.parametrize("attribute", [{"bits": 0}, {"bits": 16}, {"bits": -4}, {"gather_axis": 7}])
def test_rows_that_cannot_be_packed_so_have_no_shape(attribute: dict[str, int]) -> None:
    text = ", ".join(f"{name} = {number}" for name, number in attribute.items())
    assert shape_of(f"y = com.microsoft.GatherBlockQuantized<{text}>(k, i)", "uint8[9, 8] k, int64[B] i") is None


@pytest.mark.parametrize(("name", "attribute"), [
    ("FusedMatMul", {"alpha": "a"}), ("FusedMatMul", {"transA": "a"}), ("FusedMatMul", {"transB": [1]}),
    ("FusedMatMul", {"transBatchA": 0.5}), ("GroupQueryAttention", {"kv_num_heads": "a"}),
    ("GroupQueryAttention", {"num_heads": 0.5}), ("MultiHeadAttention", {"num_heads": [2]}),
    ("MatMulNBits", {"N": "a"}), ("GatherBlockQuantized", {"bits": 0.5}), ("FusedGemm", {"transB": "a"}),
    ("nchwc.ReorderOutput", {"channels": "a"}), ("nchwc.ReorderInput", {"channels_last": [1]}),
    ("nchwc.Upsample", {"scales": [0.5]}),
])  # fmt: skip
def test_attributes_of_another_type_are_refused(name: str, attribute: dict[str, Any]) -> None:
    made = model("f = Identity(x)")
    *part, op = name.split(".")
    domain = ".".join(("com.microsoft", *part))
    made.graph.node.append(onnx.helper.make_node(op, ["x", "x"], ["o"], domain=domain, **attribute))
    with pytest.raises(normfuse.InputError, match="of another type"):
        normfuse.optimize(made)


@pytest.mark.parametrize("domain", ["", "com.microsoft."])
def test_an_rmsnorm_of_the_runtime_behind_a_mean_is_a_layernorm(domain: str, tmp_path: Path) -> None:
    """Cohere spells x - mean(x) and the rest, and onnxscript makes the rest one operator."""
    before = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]> g (float[b, s, 16] x, float[b, s, 16] r) '
        "=> (float[b, s, 16] y) { s = Add(x, r) m = ReduceMean(s, last) d = Sub(s, m) "
        f"y = {domain}SimplifiedLayerNormalization<epsilon = 0.00001>(d, w) }}")  # fmt: skip
    before.graph.initializer.extend([onnx.numpy_helper.from_array(ARRAYS["w"].astype("f4"), "w"),
                                     onnx.numpy_helper.from_array(ARRAYS["last"], "last")])  # fmt: skip
    after, report = normfuse.optimize(before, normfuse.Config(target="normfuse"))
    assert [(n.kind, n.action, n.verified) for n in report.norms] == [("layer_norm", "fused", True)]
    assert not report.refusals and next(n.op_type for n in after.graph.node).startswith("add_layer_norm")
    feeds = {k: RNG.standard_normal((2, 3, N)).astype("f4") for k in "xr"}
    onnx.save(after, tmp_path / "b.onnx")
    s = (feeds["x"] + feeds["r"]).astype("f8")
    s = s - s.mean(-1, keepdims=True)
    want = s / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-5) * ARRAYS["w"].astype("f4")
    np.testing.assert_allclose(session(tmp_path / "b.onnx").run(None, feeds)[0], want, rtol=1e-5, atol=1e-5)
