"""Rewrites that differ from their models: what computes the norms in float64 decides which of the two is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16

import normfuse
from normfuse.frontends import onnx_wide
from normfuse.frontends.onnx_wide import _has_half, compare_rewritten, widen_norms
from normfuse.io.files import read_onnx, write_onnx
from normfuse.sessions import session
from normfuse.verify import compare_models
from tests.cli_tools import run, saved
from tests.exporters import FLAX, NUMBERS, N, flax, layer_norm, model, rows
from tests.families import cached_export

FAR = "t = Mul(x, tenth) x1 = Add(t, ten) "
"""A mean of a hundred standard deviations: of a variance in one pass in float32 three digits are right."""


def test_a_rewrite_is_measured_against_the_norms_in_float64(tmp_path: Path) -> None:
    source, out = saved(flax(FAR, "x1"), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert report.fused == 1 and report.model_check is not None and report.model_check["equal"]
    (output,) = report.model_check["outputs"]
    assert output["before"] > 100 * 2.0**-23 and output["after"] < output["before"] / 10
    assert not compare_models(source, out)["equal"]  # by themselves the two are told apart
    code, text, _ = run("verify", source, out)
    assert code == 0 and "from the input with its norms in float64" in text
    code, text, _ = run("reduce", source, tmp_path / "less.onnx")
    assert code == 1 and "nothing goes wrong" in text and not (tmp_path / "less.onnx").exists()


def test_types_that_a_file_states_are_those_of_the_norm_in_float64(tmp_path: Path) -> None:
    """ONNX Runtime demands it of values inside a norm, too."""
    stated = onnx.shape_inference.infer_shapes(flax(FAR, "x1"))
    assert len(stated.graph.value_info) > 9
    source, out = saved(stated, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert report.fused == 1 and report.model_check is not None and report.model_check["equal"]


@pytest.mark.parametrize("change", ["eps", "w", "v", "kind"])
def test_a_wrong_rewrite_of_such_a_model_is_told(change: str, tmp_path: Path) -> None:
    source, right = saved(flax(FAR, "x1"), tmp_path / "in.onnx"), tmp_path / "right.onnx"
    normfuse.rewrite(source, right, normfuse.Config())
    wrong = onnx.load(right)
    (norm,) = (node for node in wrong.graph.node if node.domain == "normfuse")
    if change == "eps":
        next(a for a in norm.attribute if a.name == "epsilon").f *= 2
    elif change == "kind":
        wrong = onnx.load(source)
        next(node for node in wrong.graph.node if node.output[0] == "diff").input[1] = "c0"  # an RMSNorm's variance
    else:
        tensor = next(t for t in wrong.graph.initializer if t.name == change)
        array = onnx.numpy_helper.to_array(tensor) + np.float32(0.1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, change))
    assert compare_rewritten(source, right)["equal"]
    assert not compare_rewritten(source, saved(wrong, tmp_path / "wrong.onnx"))["equal"]


def test_with_weights_beside_the_file_too(tmp_path: Path) -> None:
    """They are read where they lie; wrong ones are told."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(flax(FAR, "x1"), source, save_as_external_data=True, location="w.bin", size_threshold=60)
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert report.fused == 1 and report.model_check is not None and report.model_check["equal"]
    assert report.model_check["outputs"][0]["after"] < report.model_check["outputs"][0]["before"] / 10
    assert not compare_models(source, out)["equal"]
    (data,) = [p for p in tmp_path.iterdir() if p.suffix != ".onnx" and p.name != "w.bin"]
    values = np.fromfile(data, "f4")
    (values + np.float32(0.1)).tofile(data)
    found = compare_rewritten(source, out)
    assert not found["equal"] and found["outputs"][0]["after"] > 100 * found["outputs"][0]["before"]


@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_skip_operators_of_float16_are_measured_too(kind: str, tmp_path: Path) -> None:
    """With an output of float32, as converters to float16 keep it, what is rounded inside decides."""
    weights = "wh, vh" if kind.startswith("SkipL") else "wh"
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>
        g (float16[B, 3, {N}] x, float16[B, 3, {N}] r) => (float[B, 3, {N}] y) {{
            a, n1, n2, s = com.microsoft.{kind}<epsilon=1e-5>(x, r, {weights})
            b, n3, n4, t = com.microsoft.{kind}<epsilon=1e-5>(a, s, {weights}) c = Add(b, t) y = Cast<to=1>(c) }}''')
    for name in "wv":
        made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(NUMBERS[name], "f2"), f"{name}h"))
    source, out = saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(target="normfuse", verify="model"))
    assert report.fused == 2 and report.model_check is not None and report.model_check["equal"]
    assert not compare_models(source, out)["equal"]  # by themselves the two are told apart
    assert report.model_check["outputs"][0]["after"] <= 2 * report.model_check["outputs"][0]["before"]
    wrong = onnx.load(out)
    next(a for n in wrong.graph.node if n.domain == "normfuse" for a in n.attribute if a.name == "eps").f = 0.1
    assert not compare_rewritten(source, saved(wrong, tmp_path / "wrong.onnx"))["equal"]


def test_a_skip_operator_that_stays_is_not_computed_in_float64() -> None:
    """Its mean is read, so it is not written out: nothing of what is before it may be taken for a part of the norm."""
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>
        g (float[B, 3, {N}] x, float[B, 3, {N}] r, float[{N}] w) => (float[B, 3, {N}] y, float[B, 3, 1] m) {{
            h = Tanh(x) y, m, i, s = com.microsoft.SkipLayerNormalization<epsilon=1e-5>(h, r, w) }}''')
    wide, before = ir.from_proto(made), [n.op_type for n in made.graph.node]
    assert widen_norms(wide) == 0 and [n.op_type for n in wide.graph] == before
    assert len(normfuse.inspect(made).norms) == 1


def test_a_label_has_no_leeway(tmp_path: Path) -> None:
    """Where the model's own label is off by one, that of the rewrite may still not be."""
    lines = FAR + FLAX.format(x="x1", floor="c0", spread="column") + "many = Mul(y, large) label = Cast<to=7>(many) "
    given = f"float[A, {N}] x, float[B, {N}] u"
    source = saved(model(lines, given, f"int64[A, {N}] label", 15), tmp_path / "in.onnx")
    wrong = saved(model(lines.replace("label =", "less =") + "label = Add(less, one)", given,
                        f"int64[A, {N}] label", 15), tmp_path / "wrong.onnx")  # fmt: skip
    for path, right in ((source, True), (wrong, False)):
        out = tmp_path / f"out-{path.name}"
        normfuse.rewrite(path, out, normfuse.Config())
        assert not compare_models(source, out)["equal"]
        found = compare_rewritten(source, out)
        assert found["equal"] == right
        assert found["outputs"][0]["before"] * 2 >= found["outputs"][0]["after"]


def multiply(path: Path, name: str, factor: float) -> None:
    """A weight of a file, whose name has this in it."""
    made = onnx.load(path)
    weight = next(t for t in made.graph.initializer if name in t.name)
    array = onnx.numpy_helper.to_array(weight) * np.float16(factor)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(made, path)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_half_model_with_outputs_of_float32_is_measured_against_itself(wrong: bool, tmp_path: Path) -> None:
    """ONNX Runtime leaves out roundings to float16 of it, others than of its rewrite."""
    made = convert_float_to_float16(onnx.load(cached_export("opt", 18, True)), keep_io_types=True,
                                    op_block_list=["LayerNormalization", "Softmax"])  # fmt: skip
    source, out = saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    normfuse.rewrite(source, out, normfuse.Config(target="normfuse"))
    if wrong:
        multiply(out, "final_layer_norm.weight", 1.02)
    assert not compare_models(source, out)["equal"]
    found = compare_rewritten(source, out)
    assert found["equal"] != wrong
    assert found["outputs"][0]["unoptimised"] > 1e-4
    code, text, _ = run("verify", source, out)
    assert code == wrong and (wrong or "without ONNX Runtime's optimisers" in text)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_conversion_of_a_half_model_with_outputs_of_float32(wrong: bool, tmp_path: Path) -> None:
    """The weights it edits are rounded to float16 anew, which outputs of float32 show: all in float64 decides."""
    made = convert_float_to_float16(onnx.load(cached_export("gpt2", 18, True)), keep_io_types=True,
                                    op_block_list=["LayerNormalization"])  # fmt: skip
    source, out = saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    config = normfuse.Config(layernorm_to_rmsnorm="exact", verify="model")
    assert normfuse.rewrite(source, out, config).converted == 5
    if wrong:
        multiply(out, "ln_f.weight", 1.01)
    found = compare_rewritten(source, out)
    assert found["equal"] != wrong and found["float64"] == "model"
    code, text, _ = run("verify", source, out)
    assert code == wrong and (wrong or "equal: from the input in float64, the result is" in text)


@pytest.mark.parametrize("factor", [1.01, 1.02, 1.05])
def test_a_stream_far_from_float64_excuses_nothing(factor: float, tmp_path: Path) -> None:
    """A mean of 64 in float16 takes the model further from float64 than a wrong weight does."""
    rng, paths = np.random.default_rng(0), []
    held = {"W": rng.standard_normal((N, N)) / N**0.5, "v": rng.standard_normal(N)}
    held["w"] = 1 + held["v"] / 10
    text = f'''<ir_version: 8, opset_import: ["": 17]> g (float[A, {N}] x) => (float[B, {N}] y) {{
        m = Cast<to=10>(x) h = MatMul(m, W) o = Add(h, c) t = Concat<axis=0>(o, o) n = LayerNormalization(t, w, v)
        p = MatMul(n, W) z = LayerNormalization(p, g, v) y = Cast<to=1>(z) }}'''
    for by in (1.0, factor):
        made = onnx.parser.parse_model(text)
        arrays = held | {"c": np.array(64.0), "g": held["w"] * by}
        made.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype("f2"), k) for k, a in arrays.items())
        paths.append(saved(made, tmp_path / f"{by}.onnx"))
    found = compare_rewritten(*paths)
    assert not found["equal"] and found["outputs"][0]["before"] > 2 * onnx_wide.FEW * 2.0**-10


def test_what_the_reference_takes_long_for_is_not_measured_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wide, "Program", None)
    paths = []
    for factor in (1, 2):
        made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]>
            g (float[1, 1, 8, 8] x) => (float[1, 1, 4, 4] y) <float16 w = {{15360}}, float16 v = {{0}}> {{
                m = Cast<to=10>(x) l = Mul(m, w) f = Cast<to=1>(l) p = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(f)
                s = Constant<value_float={factor}.0>() y = Mul(p, s) }}''')
        paths.append(saved(made, tmp_path / f"{factor}.onnx"))
    assert not compare_rewritten(*paths)["equal"]


CHAOS = "s0 = Sigmoid(g) " + " ".join(f"a{i} = Sub(c1, s{i}) b{i} = Mul(a{i}, s{i}) c{i}_ = Add(b{i}, b{i}) "
                                     f"s{i + 1} = Add(c{i}_, c{i}_)" for i in range(40))  # fmt: skip
"""Steps that make of one rounding any number from 0 to 1."""
GELU = ("q = Constant<value_float=1.4142135>() h = Constant<value_float=0.5>() d = Div(x, q) e = Erf(d) f = Add(e, c1) "
        "i = Mul(x, f) g = Mul(i, h) ")  # fmt: skip
HALF = ("m = Cast<to=10>(x) V = Cast<to=10>(W) u = Cast<to=10>(v) h = MatMul(m, V) d = Add(h, u) e = MatMul(d, V) "
        "g = Cast<to=1>(e) ")  # fmt: skip


@pytest.mark.parametrize("steps", [GELU + CHAOS, HALF + CHAOS])
def test_a_model_that_is_far_from_itself_excuses_nothing(steps: str, tmp_path: Path) -> None:
    """What makes anything of a rounding tells nothing of its rewrite."""
    made = model(steps + " y = LayerNormalization(s40, w, v)", f"float[A, {N}] x", f"float[A, {N}] y", 17)
    source, wrong = saved(made, tmp_path / "in.onnx"), saved(heavier(made), tmp_path / "wrong.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((64, N)).astype("f4")}
    plain, whole = (session(source, optimise=on).run(["y"], feeds)[0] for on in (False, True))
    assert abs(plain - whole).max() > abs(whole).max() / 4
    assert not compare_rewritten(source, wrong, inputs=feeds)["equal"]


def test_a_model_that_runs_with_optimisers_only_is_told_from_its_rewrite(tmp_path: Path) -> None:
    """They take away the branch that is never taken, for whose operator ONNX Runtime has no kernel."""
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17]> g (float[A, {N}] x) => (float[A, {N}] y)
        <bool never = {{0}}, float16[{N}] b = {{{", ".join("0" * N)}}}, float[{N}] w = {{{", ".join("1" * N)}}}> {{
        n = Cast<to=1>(b) t = Add(x, n)
        u = If(never) <then_branch = yes () => (float[A, {N}] p) {{
            i = Cast<to=11>(t) j = Tan(i) p = Cast<to=1>(j) }},
            else_branch = no () => (float[A, {N}] q) {{ q = Identity(t) }}>
        y = LayerNormalization(u, w) }}''')
    source = saved(made, tmp_path / "in.onnx")
    assert not compare_rewritten(source, saved(heavier(made), tmp_path / "wrong.onnx"))["equal"]


@pytest.mark.parametrize("to", ["2.5", "99"])
def test_an_attribute_of_another_operator_names_no_type(to: str, tmp_path: Path) -> None:
    kind, paths = "float" if "." in to else "int", []
    for factor in (1, 2):
        made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17, "my": 1]>
            g (float[2, 4] x) => (float[2, 4] y) {{ y = my.Clip<to = {to}>(x) }}
            <domain: "my", opset_import: ["": 17]> Clip<to>(a) => (b) {{
                c = Constant<value_float = {factor}.0>() t = Constant<value_{kind}: {kind} = @to>()
                f = Cast<to = 1>(t) d = Mul(a, c) b = Add(d, f) }}''')
        paths.append(saved(made, tmp_path / f"{factor}.onnx"))
    assert not compare_rewritten(*paths)["equal"] and compare_rewritten(paths[0], paths[0])["equal"]
    assert normfuse.inspect(paths[0]).norms == []


@pytest.mark.parametrize(("body", "half"), [("f = Cast<to = 10>(a) b = Cast<to = 1>(f)", True), ("b = Neg(a)", False)])
def test_a_cast_in_a_function_is_seen(body: str, half: bool) -> None:
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[2, 4] x) => (float[2, 4] y) {{ y = my.F(x) }}
        <domain: "my", opset_import: ["": 17]> F(a) => (b) {{ {body} }}''')
    assert _has_half(ir.from_proto(made)) == half


def heavier(made: onnx.ModelProto) -> onnx.ModelProto:
    """The model with another weight of its norm."""
    other = onnx.ModelProto()
    other.CopyFrom(made)
    weight = next(t for t in other.graph.initializer if t.name == "w")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.5), "w"))
    return other


def test_norms_in_float64_are_the_same_model(tmp_path: Path) -> None:
    """Also where a result is an output of the graph and is read inside, and where sizes and casts are in between."""
    lines = FAR + FLAX.format(x="x1", floor="c0", spread="column") + " o = Neg(mean)"
    made = model(lines, f"float[A, {N}] x, float[B, {N}] u", f"float[A, {N}] y, float[A] mean, float[A] o", 15)
    source = saved(made, tmp_path / "in.onnx")
    wide, _ = read_onnx(source)
    assert widen_norms(wide) == 1
    write_onnx(wide, tmp_path / "wide.onnx")
    x = rows()["random"]
    t = x * np.float32(0.1) + np.float32(10)
    y, mean, less = session(tmp_path / "wide.onnx").run(None, {"x": x, "u": x})
    want = layer_norm(t, 1e-3, NUMBERS["w"], NUMBERS["v"])
    assert np.abs(y - want).max() <= 1e-6 * np.abs(want).max() and y.dtype == np.float32
    assert np.abs(mean - t.astype("f8").mean(-1)).max() <= 2.0**-21 and (less == -mean).all()
