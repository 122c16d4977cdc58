"""Skip operators that a model has already: taken apart where they are slow, and left where a condition is broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import normfuse
import normfuse.ort
from normfuse.errors import InputError
from normfuse.sessions import session
from tests.families import FAMILIES, cached_export
from tests.onnx_lines import N
from tests.targeted import SKIP_LAYER, operators, rewritten


def skipping(call: str, outputs: str = "y, , , s", kind: str = "float", shape: str = "2,3,16") -> onnx.ModelProto:
    """A model with a Skip operator of x and r, and its own weights."""
    given = ", ".join(f"{kind}[{shape}] {v}" for v in "ys" if v in outputs.split(", "))
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g ({kind}[{shape}] x, {kind}[{shape}] r) => '
        f"({given}) {{ {outputs} = com.microsoft.{call} }}")  # fmt: skip
    dtype, rng = {"float": "f4", "float16": "f2", "double": "f8"}[kind], np.random.default_rng(3)
    weights = {n: rng.uniform(0.5, 1.5, N).astype(dtype) for n in "wvb" if n in call}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    return made


def unread() -> onnx.ModelProto:
    """Nothing comes of the norm: what reads it is read by nobody, as where a builder reads another layer."""
    made = skipping("SkipSimplifiedLayerNormalization(x, r, w)")
    del made.graph.output[0]
    made.graph.node.append(onnx.helper.make_node("Relu", ["y"], ["z"]))
    return made


CALLS = (
    "SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, r, w)",
    "SkipSimplifiedLayerNormalization(x, r, w, b)",
    "SkipLayerNormalization<epsilon = 0.01>(x, r, w)",
    "SkipLayerNormalization(x, r, w, v)",
    "SkipLayerNormalization<epsilon = 0.01>(x, r, w, v, b)",
)


@pytest.mark.parametrize("outputs", ["y, , , s", "y"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("target", "version", "apart"), [
    ("ort-cpu", "1.31", True), ("normfuse", "1.29", True), ("ort-cpu", "1.29", False), ("ort-cuda", "1.31", False),
    ("onnx", "1.31", False),
])  # fmt: skip
def test_a_skip_operator_that_is_slow_is_taken_apart(call: str, outputs: str, target: str, version: str, apart: bool,
                                                     tmp_path: Path) -> None:  # fmt: skip
    found, report = rewritten(skipping(call, outputs), tmp_path, target, version)
    assert [o.name for o in found.graph.output] == [v for v in "ys" if v in outputs]
    (norm,), ops = report.norms, [n.op_type for n in found.graph.node]
    kind = "rms_norm" if "Simplified" in call else "layer_norm"
    assert norm.kind == kind and report.nodes_before == 1
    assert norm.eps == pytest.approx(0.01 if "epsilon" in call else 1e-12)
    assert any("in a Skip operator of the model: apart" in note for note in report.notes) == apart
    if apart:
        assert (norm.action, norm.verified) == ("fused", True)
        assert call[: call.index("Norm")] not in " ".join(ops) and len(ops) <= 3
        bias = "bias_" if ", b)" in call else ""
        assert target != "normfuse" or (len(ops) == 1 and ops[0].startswith(f"{bias}add_{kind}"))
    else:
        assert norm.action == "kept" and len(ops) == 1
    rng = np.random.default_rng(4)
    for far, small in ((0.0, 1.0), (100.0, 1.0), (0.0, 1e-3)):
        feeds = {v: (small * rng.standard_normal((2, 3, N)) + far).astype("f4") for v in "xr"}
        weights = {t.name: onnx.numpy_helper.to_array(t).astype("f8") for t in skipping(call).graph.initializer}
        s = feeds["x"].astype("f8") + feeds["r"] + weights.get("b", 0.0)
        c = s - s.mean(-1, keepdims=True) if kind == "layer_norm" else s
        y = c / np.sqrt((c * c).mean(-1, keepdims=True) + norm.eps) * weights["w"] + weights.get("v", 0.0)
        before, after = (session(tmp_path / f"{p}.onnx").run(None, feeds) for p in ("in", "out"))
        for want, a, b in zip((y, s), before, after, strict=False):
            limit = 2.0**-23 * (np.abs(want).max() + (50 if far and kind == "layer_norm" and want is y else 0))
            assert np.abs(b - want).max() <= max(2 * np.abs(a - want).max(), 8 * limit)


@pytest.mark.parametrize("outputs", ["y, , , s", "y"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("target", ["normfuse", "ort-cpu"])
def test_a_skip_operator_of_half_types_has_the_sum_in_float32(call: str, outputs: str, target: str,
                                                              tmp_path: Path) -> None:  # fmt: skip
    found, report = rewritten(skipping(call, outputs, "float16"), tmp_path, target, "1.31")
    kind = "rms_norm" if "Simplified" in call else "layer_norm"
    plain = "_scale" if kind == "layer_norm" and "v" not in call else ""
    if target == "normfuse":
        (name,) = {n.op_type for n in found.graph.node if n.domain}
        bias = "bias_" if ", b)" in call else ""
        assert name == f"{bias}add_{kind}{plain}_f16_in_f32_last_unrounded"
        assert [n.op_type for n in found.graph.node] == ["Cast"] * (1 + (", v" in call)) + [name]  # of the weights
    assert not [n for n in found.graph.node if "Skip" in n.op_type]
    assert (report.norms[0].action, report.norms[0].verified) == ("fused", True)
    options = onnxruntime.SessionOptions()
    normfuse.ort.register(options, found)
    library = onnxruntime.InferenceSession(tmp_path / "out.onnx", options, providers=["CPUExecutionProvider"])
    rng, total = np.random.default_rng(4), 0
    for far, small in ((0.0, 1.0), (100.0, 1.0), (0.0, 1e-3), (0.0, 2e4)):
        feeds = {v: (small * rng.standard_normal((2, 3, N)) + far).astype("f2") for v in "xr"}
        before = session(tmp_path / "in.onnx").run(None, feeds)
        for running in (session(tmp_path / "out.onnx"), library):
            after = running.run(None, feeds)
            assert [a.dtype for a in after] == [b.dtype for b in before]
            assert all(a.tobytes() == b.tobytes() for a, b in zip(after[1:], before[1:], strict=True))  # the sum
            apart = np.abs(after[0].astype("f4") - before[0].astype("f4"))
            assert (apart <= 2 * np.spacing(np.abs(before[0])).astype("f4")).all()
            total += int((apart > 0).sum())
    assert total <= 0.03 * 2 * 4 * 6 * N


@pytest.mark.parametrize("made", [
    skipping("SkipSimplifiedLayerNormalization(x, r, w)", kind="double"),
    skipping("SkipLayerNormalization(x, r, w)", "y, s"),  # the mean is read
    skipping("SkipLayerNormalization(x, r, w)", "y, , s"),  # the deviation is read
    skipping("SkipSimplifiedLayerNormalization(x, r, w)", shape="2,3,width"),
    skipping("SkipLayerNormalization(x, r, w, x)"),  # no bias, and no runtime takes it
    unread(),
], ids=["type", "mean", "deviation", "width", "bias", "unread"])  # fmt: skip
def test_a_skip_operator_stays_where_a_condition_is_broken(made: onnx.ModelProto) -> None:
    config = normfuse.Config(target="ort-cpu", ort_version="1.31")
    found, report = normfuse.optimize(made, config)
    assert [n.op_type for n in found.graph.node] == [n.op_type for n in made.graph.node]
    assert not any("apart" in note for note in report.notes)


@pytest.mark.parametrize(("target", "converted"), [("ort-cpu", 1), ("normfuse", 1), ("onnx", 0), ("ort-cuda", 0)])
def test_a_layernorm_in_a_skip_operator_that_is_taken_apart_is_converted(target: Any, converted: int,
                                                                             tmp_path: Path) -> None:  # fmt: skip
    text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (int64[2,3] ids) => (float[2,3,{N}] z) {{
        h = Gather(E, ids) f = Gather(P, ids) y = com.microsoft.SkipLayerNormalization<epsilon = 0.01>(f, h, w, v)
        z = MatMul(y, U) }}"""
    made, rng = onnx.parser.parse_model(text), np.random.default_rng(5)
    for n, shape in {"E": (20, N), "P": (20, N), "U": (N, N), "w": (N,), "v": (N,)}.items():
        made.graph.initializer.append(onnx.numpy_helper.from_array(rng.uniform(-0.5, 1.5, shape).astype("f4"), n))
    report = rewritten(made, tmp_path, target, layernorm_to_rmsnorm="exact", untie=True)[1]
    assert report.converted == converted and (report.norms[0].action == "converted") == bool(converted)
    feeds = {"ids": rng.integers(0, 20, (2, 3))}
    want, got = (session(tmp_path / f"{p}.onnx").run(None, feeds)[0] for p in ("in", "out"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_skip_operator_stays_in_a_model_without_onnx_operators() -> None:
    made = skipping("SkipLayerNormalization(x, r, w)")
    del made.opset_import[0]
    found, report = normfuse.optimize(made, normfuse.Config(target="normfuse"))
    assert [n.op_type for n in found.graph.node] == [SKIP_LAYER] and not report.notes


@pytest.mark.parametrize(("call", "message"), [
    ("SkipSimplifiedLayerNormalization(x, r)", "has 2 inputs, and takes 3 to 4"),
    ("SkipLayerNormalization()", "has 0 inputs, and takes 3 to 5"),
    ('SkipLayerNormalization(x, r, "")', "lacks its input 2"),
    ("SkipLayerNormalization<epsilon = 1>(x, r, w)", "'epsilon' of another type"),
    ("SimplifiedLayerNormalization(x)", "has 1 inputs, and takes 2"),
    ("QuickGelu()", "has 0 inputs, and takes 1"),
])  # fmt: skip
def test_operators_of_the_runtime_that_are_none(call: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        normfuse.inspect(skipping(call, "y"))


def optimised(name: str, path: Path) -> Path:
    """What ONNX Runtime's own optimiser makes of a family."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(cached_export(name, 18)), options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
@pytest.mark.parametrize("target", ["ort-cpu", "normfuse"])
def test_what_onnx_runtime_has_optimised(name: str, target: Any, tmp_path: Path) -> None:
    """It puts a LayerNorm and the addition in front of it into a Skip operator, slow or not."""
    source, out = optimised(name, tmp_path / "ort.onnx"), tmp_path / "out.onnx"
    before = operators(onnx.load(source))
    version = "1.31" if target == "ort-cpu" else ""
    config = normfuse.Config(target=target, ort_version=version, verify="model")
    report = normfuse.rewrite(source, out, config)
    assert before[SKIP_LAYER] and not operators(onnx.load(out))[SKIP_LAYER]
    assert len(report.norms) == FAMILIES[name].norms and not report.refusals
    assert report.model_check is not None and report.model_check["equal"]
    assert f"{before[SKIP_LAYER]} x layer_norm in a Skip operator" in " ".join(report.notes)
    if name != "bert":  # post-norm
        exact = replace(config, layernorm_to_rmsnorm="exact")
        report = normfuse.rewrite(source, out, exact, overwrite=True)
        assert report.converted == len(report.norms) and report.model_check is not None
        assert report.model_check["equal"] and all("rms" in op for op in operators(onnx.load(out)))


# -- norms in one type, casts around them ------------------------------------------------------------------------------


def cast_around(op: str, opset: int) -> onnx.ModelProto:
    """As onnxruntime-genai's builder writes a float16 model whose norms compute in float32: y of a cast, cast back."""
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> g (float16[B, 3, {N}] x, '
        f"float[B, 3, {N}] r) => (float16[B, 3, {N}] z) {{ c = Cast<to=1>(x) {op} d = Cast<to=10>(y) "
        "z = Relu(d) }")  # fmt: skip
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.linspace(0.5, 1.5, N, dtype="f4"), "w"))
    return made


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda", "normfuse"])
@pytest.mark.parametrize("op", ["y = SimplifiedLayerNormalization(c, w)", "y = LayerNormalization(c, w)"])
def test_an_operator_with_casts_around_it(op: str, target: str, opset: int, tmp_path: Path) -> None:
    """Of the casts nothing is gained by a function, unless one that the library has takes them in.

    LayerNormalization with casts is a form that NormFuse itself makes, which stays what it is.
    """
    made = cast_around(op, opset)  # SimplifiedLayerNormalization is ONNX Runtime's, which the checker does not know
    version = "1.31" if target.startswith("ort-") else ""
    found, report = normfuse.optimize(made, normfuse.Config(target=target, ort_version=version))  # type: ignore[arg-type]
    assert normfuse.optimize(found, normfuse.Config(target=target))[1].fused == 0  # type: ignore[arg-type]
    (norm,) = report.norms
    if target == "normfuse" and "Simplified" in op:
        assert norm.action == "fused" and norm.verified and len(found.graph.node) == 2
        x = np.random.default_rng(0).standard_normal((2, 3, N)).astype("f2")
        outputs = []
        for one in (made, found):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            normfuse.ort.register(options)
            runs = onnxruntime.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
            outputs.append(runs.run(None, {"x": x, "r": x.astype("f4")})[0])
        want, got = outputs
        np.testing.assert_allclose(got.astype("f4"), want.astype("f4"), rtol=2e-3, atol=1e-6)
    else:
        assert norm.action == "kept" and [n.op_type for n in found.graph.node] == [n.op_type for n in made.graph.node]


@pytest.mark.parametrize("outputs", ["y", "y, , , s"])
def test_a_skip_operator_with_a_cast_behind_it_is_left(outputs: str, tmp_path: Path) -> None:
    made = cast_around(f"{outputs} = com.microsoft.SkipSimplifiedLayerNormalization(c, r, w)", 17)
    found, report = rewritten(made, tmp_path, "onnx", "1.31")
    (norm,) = report.norms
    assert (norm.action, norm.reason) == ("left", "an operator of the model computes it and the sum ahead")
    assert not report.refusals
    assert found.SerializeToString() == made.SerializeToString()
