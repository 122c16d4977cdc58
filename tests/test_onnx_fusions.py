"""The fusions by placement on ONNX graphs: each happens where it may, and not where one condition is broken."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
import normfuse.ort
from normfuse.frontends.onnx_check import Checker
from normfuse.plan import Edit, Fused
from normfuse.sessions import session
from normfuse.verify import Check, compare_models
from tests.families import (
    BIASED, FAMILIES, FUSED, LAYERS, MORE, OTHERS, cached, cached_export, digest, export_onnx,
)  # fmt: skip
from tests.onnx_lines import MEET, N, QK, SANDWICH, SCORES, layer, model, rms, words

TARGET = normfuse.Config(target="normfuse")


def operators(path: Path) -> dict[str, int]:
    """The calls of NormFuse's functions of norms in a model, by name, those in sub-graphs included."""
    graphs, found = [onnx.load(path).graph], Counter[str]()
    while graphs:
        for node in graphs.pop().node:
            found[node.op_type] += node.domain == "normfuse" and "softmax" not in node.op_type
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return dict(+found)


def rewritten(source: Path, folder: Path, config: normfuse.Config = TARGET) -> tuple[Path, normfuse.Report]:
    """The rewrite of a file: valid, with the same norms in the same places, and not rewritten again."""
    out = folder / "out.onnx"
    before, report = normfuse.inspect(source), normfuse.rewrite(source, out, config, overwrite=True)
    assert not [n for n in report.norms if n.action == "fused" and not n.verified]
    onnx.checker.check_model(out, full_check=True)
    assert normfuse.rewrite(out, folder / "again.onnx", config, overwrite=True).fused == 0
    assert (folder / "again.onnx").read_bytes() == out.read_bytes()
    after = normfuse.inspect(out)
    assert Counter((n.kind, np.float32(n.eps), n.placement) for n in after.norms) == Counter(
        (n.kind, np.float32(n.eps), n.placement) for n in before.norms)  # fmt: skip
    assert {n.form for n in after.norms} == {"op"} or report.refusals
    return out, report


def fused(made: onnx.ModelProto, folder: Path, **config: Any) -> dict[str, int]:
    """The operators that a model gets; its results stay the same, in ONNX Runtime and the reference evaluator."""
    source = folder / "in.onnx"
    onnx.save(made, source)
    out, _ = rewritten(source, folder, normfuse.Config(target="normfuse", **config))
    loaded = onnx.load(out)
    assert [o.name for o in loaded.graph.output] == [o.name for o in made.graph.output]
    assert [n.version for n in loaded.opset_import if not n.domain] == [made.opset_import[0].version]
    assert not {n.op_type for f in loaded.functions for n in f.node if n.domain}
    rng = np.random.default_rng(1)
    feeds = {i.name: (rng.standard_normal([d.dim_value or 2 for d in i.type.tensor_type.shape.dim]) + 0.5).astype("f4")
             for i in made.graph.input}  # fmt: skip
    want = session(source).run(None, feeds)
    for found in (session(out).run(None, feeds), ReferenceEvaluator(loaded).run(None, feeds)):
        for a, b in zip(found, want, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return operators(out)




# -- each fusion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23])
def test_each_opset(opset: int, tmp_path: Path) -> None:
    # opset 11 has no Constant that takes an attribute: eps is in the body
    eps = "_eps1em06" if opset < 12 else ""
    add = model("s = Add(x, r) " + rms("s", "y", opset), "y s", opset)
    assert fused(add, tmp_path) == {f"add_rms_norm{eps}": 1}
    add = model("s = Add(x, r) " + layer("s", "y", opset), "s y", opset)
    assert fused(add, tmp_path) == {f"add_layer_norm{eps}": 1}
    after = model(layer("x", "n", opset) + "y = Add(n, r) ", "y", opset)
    assert fused(after, tmp_path) == {f"norm_add_layer_norm{eps}": 1}
    pair = rms("q", "a", opset) + rms("k", "b", opset)
    pair = model(f"q = MatMul(x, W) k = MatMul(x, U) {pair} {MEET}", "y", opset, "x", types=SCORES)
    assert fused(pair, tmp_path) == {f"qk_norm{eps}": 1}


@pytest.mark.parametrize(("lines", "outputs", "want"), [
    ("s = Add(x, r) " + rms("s", "a") + "f = MatMul(a, W) y = Add(s, f)", "y", {"add_rms_norm": 1}),
    ("s = Add(x, r) " + rms("s", "n") + "y = Add(s, n)", "y", {"norm_add": 1}),
    ("s = Add(x, r) y = LayerNormalization(s, w)", "y", {"add_layer_norm_scale": 1}),
    ("s = Sum(x, r) y = LayerNormalization(s, w, v)", "y", {"add_layer_norm": 1}),
    ("o = Add(w, v) s = Add(x, r) y = LayerNormalization(s, o)", "y", {"add_layer_norm_scale": 1}),
    ("o = ReduceMax(r, lead) s = Add(x, r) " + rms("s", "y", weight="o"), "y", {"add_rms_norm_plain": 1}),
    ("c = Identity(r) s = Add(x, c) " + rms("s", "y"), "y s", {"add_rms_norm": 1}),
    (rms("x", "n") + "d = Identity(n) y = Add(r, d)", "y", {"norm_add": 1}),
    (SANDWICH.replace("EPS", "eps"), "y", {"rms_norm": 1, "norm_add_norm": 2}),
])  # fmt: skip
def test_fused(lines: str, outputs: str, want: dict[str, int], tmp_path: Path) -> None:
    inputs = "x r" if "r" in words(lines) else "x"
    assert fused(model(lines, outputs, inputs=inputs), tmp_path) == want


FLAT = "s = Add(x, r) f = Reshape(s, TARGET) " + rms("f", "y")
OF_X = "d = Shape(x) l = Slice(d, two, three) t = Concat<axis=0>(less, l) "
OF_S = FLAT.replace("f =", "d = Shape(s) l = Slice(d, two, three) t = Concat<axis=0>(less, l) f =", 1)


@pytest.mark.parametrize("shape", ["2,3,16", "batch,seq,16"])
@pytest.mark.parametrize("lines", [FLAT.replace("TARGET", "flat"), OF_X + FLAT.replace("TARGET", "t"),
                                   OF_S.replace("TARGET", "t")])  # fmt: skip
def test_a_view_between_sum_and_norm(lines: str, shape: str, tmp_path: Path) -> None:
    """OPT: the view of the norm's input becomes one of its result."""
    made = model(lines, "y s", shape=shape, types={"y": "float[6,16]" if shape == "2,3,16" else "float[rows,16]"})
    assert fused(made, tmp_path) == {"add_rms_norm": 1}
    (call,) = (node for node in onnx.load(tmp_path / "out.onnx").graph.node if node.domain == "normfuse")
    assert call.output[1] == "s"


def test_symbolic_rows(tmp_path: Path) -> None:
    lines = "s = Add(x, r) " + rms("s", "y")
    assert fused(model(lines, "y s", shape="batch,seq,16"), tmp_path) == {"add_rms_norm": 1}


def test_a_pair_waits_for_the_later_input(tmp_path: Path) -> None:
    lines = ("q = MatMul(x, W) " + rms("q", "a") + "p = Transpose<perm=[0, 2, 1]>(a) k = MatMul(x, U) "
             + rms("k", "b") + "T = Transpose<perm=[0, 2, 1]>(p) U2 = Transpose<perm=[0, 2, 1]>(b) y = MatMul(T, U2)")
    assert fused(model(lines, "y", inputs="x", types=SCORES), tmp_path) == {"qk_norm": 1}


def test_in_a_branch(tmp_path: Path) -> None:
    norm = rms("s", "n") + "o = MatMul(n, W)"
    lines = f"c = Cast<to=9>(z) y = If(c) <then_branch = g1 () => (float[2,3,16] o) {{ s = Add(x, r) {norm} }}, " \
            f"else_branch = g2 () => (float[2,3,16] o2) {{ o2 = Identity(x) }}>"  # fmt: skip
    made = model(lines, "y", inputs="x r z", types={"z": "float[1]"})
    assert fused(made, tmp_path) == {"add_rms_norm": 1}


def test_after_a_rewrite_without_fusions(tmp_path: Path) -> None:
    onnx.save(model("s = Add(x, r) " + rms("s", "y"), "y s"), tmp_path / "in.onnx")
    normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "plain.onnx")
    assert operators(tmp_path / "plain.onnx") == {"rms_norm": 1}
    out, _ = rewritten(tmp_path / "plain.onnx", tmp_path)
    assert operators(out) == {"add_rms_norm": 1}
    assert [f.name for f in onnx.load(out).functions] == ["add_rms_norm"]
    normfuse.rewrite(out, tmp_path / "default.onnx")  # the default target leaves them
    assert (tmp_path / "default.onnx").read_bytes() == out.read_bytes()


def test_a_computed_weight_that_lies_beside_the_file(tmp_path: Path) -> None:
    """It is not folded, so that the norm is one operator and a weight; that is not taken apart again."""
    made = model("o = Add(w, v) s = Add(x, r) " + rms("s", "y", 17, weight="o"), "y s", 17)
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save_model(made, source, save_as_external_data=True, location="in.data", size_threshold=64)
    report = normfuse.rewrite(source, out, normfuse.Config(target="normfuse", verify="model"))
    assert report.model_check is not None and report.model_check["equal"]
    for i, config in enumerate((TARGET, normfuse.Config())):
        again = normfuse.rewrite(out, tmp_path / f"{i}.onnx", config)
        assert [n.action for n in again.norms] == ["left"]
        assert operators(tmp_path / f"{i}.onnx") == operators(out) == {"add_rms_norm": 1}


# -- not where a condition is broken -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "outputs", "want", "types"), [
    ("s = Sub(x, r) " + rms("s", "y"), "y s", {"rms_norm": 1}, {}),
    ("s = Add(x, w) " + rms("s", "y"), "y s", {"rms_norm": 1}, {}),
    ("s = Add(x, r) " + rms("s", "y"), "y s", {"rms_norm": 1}, {"r": "float[1,3,16]"}),
    ("s = Add(x, r) " + rms("s", "y"), "y s", {"rms_norm": 1}, {"x": "float[?,3,16]", "r": "float[?,3,16]"}),
    ("s = Add(x, r) f = Transpose<perm=[1, 0, 2]>(s) " + rms("f", "y"), "y s", {"rms_norm": 1}, {"y": "float[3,2,16]"}),
    ("s = Add(x, x) " + rms("s", "y"), "y s", {"rms_norm": 1}, {}),
    ("h = Cast<to=10>(x) a = Cast<to=1>(h) b = Cast<to=1>(h) s = Add(a, b) " + rms("s", "y"), "y s",
     {"rms_norm": 1}, {}),
    (rms("x", "n") + "y = Add(n, r)", "y n", {"rms_norm": 1}, {}),
    (rms("x", "n") + "s = Add(n, r) y = Mul(s, n)", "y", {"rms_norm": 1}, {}),
    (rms("x", "n") + "y = Add(n, r)", "y", {"rms_norm": 1}, {"r": "float[1,16]"}),
    ("s = Add(x, r) " + rms("s", "y"), "y y_m", {}, {"y_m": "float[2,3,1]"}),
    ("s = Add(x, r) y = LayerNormalization<axis=1>(s, V)", "y", {}, {"V": "float[3,16]"}),
    (SANDWICH.replace("EPS", "small"), "y", {"rms_norm": 2, "norm_add": 1, "norm_add_norm": 1}, {}),
    (QK.replace("EPS", "small") + MEET, "y", {"rms_norm": 2}, SCORES),
    (QK.replace("k = MatMul(x, U)", "").replace("EPS", "eps").replace("b_q", "k = MatMul(a, U) b_q", 1) + MEET, "y",
     {"rms_norm": 2}, SCORES),
])  # fmt: skip
def test_not_fused(lines: str, outputs: str, want: dict[str, int], types: dict[str, str], tmp_path: Path) -> None:
    inputs = " ".join(n for n in "xrzV" if n in words(lines))
    assert fused(model(lines, outputs, inputs=inputs, types=types), tmp_path) == want


def test_a_fusion_that_fails_falls_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Checker.check

    def fails(self: Checker, low: Any, edit: Edit) -> Check:
        found = check(self, low, edit)
        return Check(False, message="on purpose") if isinstance(edit, Fused) and edit.op == "norm_add_norm" else found

    monkeypatch.setattr(Checker, "check", fails)
    made = model(SANDWICH.replace("EPS", "eps"), "y", inputs="x")
    assert fused(made, tmp_path) == {"rms_norm": 3, "norm_add": 2}


def test_torch_is_not_imported(tmp_path: Path) -> None:
    onnx.save(model("s = Add(x, r) " + rms("s", "y"), "y s"), tmp_path / "in.onnx")
    code = ("import sys; from normfuse.cli import main; "
            "code = main(['rewrite', 'in.onnx', 'out.onnx', '--target', 'normfuse']); "
            "assert 'torch' not in sys.modules; sys.exit(code)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert operators(tmp_path / "out.onnx") == {"add_rms_norm": 1}


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "olmo2", "deepseek_v3", "gpt2", "bert", "opt"])
def test_family(name: str, tmp_path: Path) -> None:
    family, source = FAMILIES[name], cached_export(name, 18)
    out, report = rewritten(source, tmp_path, normfuse.Config(target="normfuse", verify="model"))
    assert report.model_check is not None and report.model_check["equal"]
    assert len(report.norms) == family.norms and not report.refusals
    assert dict(Counter(n.placement for n in normfuse.inspect(out).norms)) == family.placements
    want = {op: n * LAYERS for op, n in (FUSED.get(name) or OTHERS[report.norms[-1].kind]).items()}
    want = Counter(want) + MORE.get(name, Counter())
    add, biased = f"add_{report.norms[-1].kind}", LAYERS * BIASED.get(name, 0)
    want = want - Counter({add: biased}) + Counter({f"bias_{add}": biased})
    made = operators(out)
    assert {op: n for op, n in made.items() if op != "rms_norm"} == want
    assert {n.emitted for n in report.norms} - {"", "function normfuse.rms_norm"} == {
        f"function normfuse.{op}" for op in want}  # fmt: skip


@pytest.mark.parametrize(("name", "want"), [
    ("llama", {"rms_norm_f16_in_f32": 1, "add_rms_norm_f16_in_f32_first": 4}),
    ("gpt2", {"add_layer_norm_f16_in_f32_first": 4}),
    ("gemma3", {"rms_norm_f16_in_f32_last": 1, "qk_norm_f16_in_f32_last": 2, "norm_add_norm_f16_in_f32_last": 4}),
])  # fmt: skip
def test_half_precision_keeps_the_order_of_roundings(name: str, want: dict[str, int], tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = cached(f"{name}-half-18-{digest(family)}.onnx",
                    lambda path: export_onnx(family.build().half(), family.args(), path, 18))  # fmt: skip
    out, report = rewritten(source, tmp_path)
    assert operators(out) == want and not report.refusals
    (output,) = compare_models(source, out)["outputs"]
    assert output["max_rel"] <= 2.0**-10


@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.slow), 23])
def test_a_residual_stream_that_is_rounded_beside_the_norms(opset: int, tmp_path: Path) -> None:
    import torch

    from tests.rounded_stream import VOCABULARY, Model

    net, ids = Model(2, torch.float16).eval().requires_grad_(False), torch.arange(14).view(2, 7) % VOCABULARY
    source, made = tmp_path / "in.onnx", "add_rms_norm_f16_in_f32_first_unrounded"
    exported: Any = torch.onnx.export(net, (ids,), dynamo=True, opset_version=opset, verbose=False)
    exported.save(source)
    out, report = rewritten(source, tmp_path)
    assert operators(out) == {made: 4} | ({"rms_norm_f16_in_f32": 1} if opset < 23 else {})
    assert [n.placement for n in report.norms] == ["pre"] * 4 + ["final"] and not report.refusals
    assert all(n.weight and n.cast == "float32, cast to float16 before the weight" for n in report.norms)
    lost = "4 norm operators of mixed types"  # at opset 23 the exporter loses casts, and no runtime takes the model
    told = ["2 x Softmax: function"] if opset < 23 else [lost, "2 x Softmax: function"]
    assert [note.startswith(how) for note, how in zip(report.notes, told, strict=True)] == [True] * len(told)
    half, true = net(ids).numpy(), Model(2, torch.float16).double()(ids).detach().numpy()
    found = session(out).run(None, {"ids": ids.numpy()})[0]
    assert np.abs(found - true).max() <= 2 * np.abs(half - true).max()
    program, report = normfuse.optimize(torch.export.export(net, (ids,)))
    assert [n.emitted for n in report.norms][1:] == ["normfuse.add_rms_norm"] * 4
    assert torch.equal(program.module()(ids), net(ids))


# -- a sum that is normalised before it is rounded ---------------------------------------------------------------------

SUM = "a = Cast<to=1>(x) b = Cast<to=1>(r) s = Add(a, b) "
LAST = SUM + rms("s", "n") + "y = Cast<to=10>(n) t = Cast<to=10>(s)"
VLLM = (SUM + rms("s", "n").removesuffix("n = Mul(n_n, w) ")
        + "c = Cast<to=10>(n_n) h = Cast<to=10>(w) y = Mul(c, h) t = Cast<to=10>(s)")
HALF = dict.fromkeys("xryt", "float16[2,3,16]")


def halves(lines: str, folder: Path, outputs: str = "y t", **types: str) -> Path:
    """A model of float16 tensors in a file; `types` those of others."""
    onnx.save(model(lines, outputs, types=HALF | types), folder / "in.onnx")
    return folder / "in.onnx"


def wide_norm(x: Any, r: Any, lines: str, narrow: str) -> Any:
    """What the lines mean in float64, but for the casts to a narrow type."""
    s = x.astype("f8") + r.astype("f8")
    h = s - s.mean(-1, keepdims=True) if "n_c" in lines else s
    row = np.linspace(0.5, 1.5, N).astype("f4").astype("f8")
    n = h / np.sqrt((h * h).mean(-1, keepdims=True) + np.float64(np.float32(1e-6)))
    n = n.astype(narrow).astype("f8") if "c = Cast<to=10>(n_n)" in lines else n
    row = row.astype(narrow).astype("f8") if "h = Cast<to=10>(w)" in lines else row
    return n if "Identity" in lines else n * row + (row[::-1] - 1 if h is not s else 0)


@pytest.mark.parametrize(("lines", "want"), [
    (LAST, "add_rms_norm_f16_in_f32_last_unrounded"), (VLLM, "add_rms_norm_f16_in_f32_first_unrounded"),
    (VLLM.replace("h = Cast<to=10>(w) y = Mul(c, h)", "y = Identity(c)"),
     "add_rms_norm_plain_f16_in_f32_last_unrounded"),
    (VLLM.replace("h = Cast<to=10>(w) y = Mul(c, h)", "d = Cast<to=1>(c) y = Mul(d, w)"),
     "add_rms_norm_f16_in_f32_first_to_f32_unrounded"),
    (SUM + rms("s", "y") + "t = Cast<to=10>(s)", "add_rms_norm_f16_in_f32_none_to_f32_unrounded"),
    (SUM + layer("s", "n") + "y = Cast<to=10>(n) t = Cast<to=10>(s)", "add_layer_norm_f16_in_f32_last_unrounded"),
])  # fmt: skip
def test_a_sum_normalised_before_it_is_rounded(lines: str, want: str, tmp_path: Path) -> None:
    wide = {"y": "float[2,3,16]"} if "to_f32" in want else {}
    early = SUM.replace("s = ", "e = ") + "i = Cast<to=10>(e) s = Cast<to=1>(i) " + lines.removeprefix(SUM)
    rounded = session(halves(early, tmp_path, **wide))
    source = halves(lines, tmp_path, **wide)
    out, report = rewritten(source, tmp_path)
    assert operators(out) == {want: 1} and not report.refusals
    options = onnxruntime.SessionOptions()
    normfuse.ort.register(options, onnx.load(out))
    library = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    rng, told = np.random.default_rng(0), 0
    for scale, mean in ((1, 0), (1e-3, 0), (1e-6, 0), (1, 300), (2e4, 0), (2e4, 3e4)):
        feeds = {n: np.clip(rng.standard_normal((2, 3, N)) * scale + mean, -6e4, 6e4).astype("f2") for n in "xr"}
        y, t = session(source).run(None, feeds)
        truth, rounds = (wide_norm(feeds["x"], feeds["r"], lines, narrow) for narrow in ("f8", "f2"))
        found, kept = session(out).run(None, feeds)
        near = 2.0**-22 * np.abs(truth).max()
        assert np.abs(found - truth).max() <= np.abs(y - truth).max() + near
        ours, also = library.run(None, feeds)
        assert kept.tobytes() == also.tobytes() == t.tobytes() and found.dtype == ours.dtype == y.dtype
        assert (np.abs(ours - rounds.astype(y.dtype)) > near).mean() <= 0.02  # ONNX Runtime itself leaves out a cast
        told += int((rounded.run(None, feeds)[0] != y).sum())
    assert told > 20  # what is normalised after it was rounded is something else


@pytest.mark.parametrize("lines", [
    LAST, LAST + " z = Mul(n_n, v)", LAST.removesuffix("t = Cast<to=10>(s)") + "z = Mul(n_n, v)"])  # fmt: skip
def test_two_norms_of_a_sum_that_is_rounded_once(lines: str, tmp_path: Path) -> None:
    """They share their statistics: each operator has the sum before it is rounded, one of them gives it rounded."""
    outputs = [name for name in ("y", "t", "z") if f"{name} = " in lines]
    out, report = rewritten(halves(lines, tmp_path, " ".join(outputs), z="float[2,3,16]"), tmp_path)
    graph = onnx.load(out).graph
    assert [n.op_type[:12] for n in graph.node] == ["add_rms_norm"] * (1 + ("z" in outputs)) and not report.refusals
    assert sorted(o for n in graph.node for o in n.output if o in "ytz") == sorted(outputs)
    rng = np.random.default_rng(0)
    for mean in (0, 300, 3e4):
        feeds = {n: (rng.standard_normal((2, 3, N)) + mean).astype("f2") for n in "xr"}
        for a, b in zip(session(out).run(None, feeds), session(tmp_path / "in.onnx").run(None, feeds), strict=True):
            assert a.dtype == b.dtype and np.abs(a.astype("f8") - b).max() <= 2.0**-10 * np.abs(b.astype("f8")).max()


LINEAR = "f = Neg(x) t = Add(f, v) s = Add(t, r) "


@pytest.mark.parametrize("norm", [rms, layer])
@pytest.mark.parametrize("half", [False, True])
def test_the_bias_of_a_linear_layer_is_taken_in(norm: Any, half: bool, tmp_path: Path) -> None:
    """With all of its roundings: the library's sum has the bits that the model says."""
    lines = LINEAR + norm("s", "y")
    if half:  # the sums are float16, and the norm is of float32
        lines = (f"i = Cast<to=10>(v) {LINEAR.replace('v)', 'i)')} c = Cast<to=1>(s) {norm('c', 'y')} "
                 "Y = Cast<to=10>(y)")  # fmt: skip
    types = dict.fromkeys("xrsY", "float16[2,3,16]") if half else {}
    onnx.save(model(lines, "Y s" if half else "y s", types=types), tmp_path / "in.onnx")
    out, report = rewritten(tmp_path / "in.onnx", tmp_path)
    kind = "layer_norm" if norm is layer else "rms_norm"
    assert operators(out) == {f"bias_add_{kind}" + ("_f16_in_f32_last" if half else ""): 1} and not report.refusals
    assert "Add" not in {n.op_type for n in onnx.load(out).graph.node}
    options = onnxruntime.SessionOptions()
    normfuse.ort.register(options, onnx.load(out))
    library = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for scale, mean in ((1, 0), (1e-3, 0), (1, 300), (1e4, 0)):
        feeds = {n: (rng.standard_normal((2, 3, N)) * scale + mean).astype("f2" if half else "f4") for n in "xr"}
        want, _ = session(tmp_path / "in.onnx").run(None, feeds)
        s = -feeds["x"] + (np.linspace(0.5, 1.5, N)[::-1] - 1).astype("f4").astype(feeds["x"].dtype) + feeds["r"]
        wide = s.astype("f8") - (s.astype("f8").mean(-1, keepdims=True) if kind == "layer_norm" else 0)
        row = np.linspace(0.5, 1.5, N)
        true = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + 1e-6) * row
        true = true + (row[::-1] - 1 if kind == "layer_norm" else 0)
        near = np.abs(true).max() * (2.0**-10 if half else 2.0**-20)
        for running in (session(out), library):
            found, kept = running.run(None, feeds)
            # of float16 ONNX Runtime on the CPU leaves out a rounding between two additions
            assert kept.tobytes() == s.tobytes() or (half and running is not library)
            assert found.dtype == want.dtype
            assert np.abs(found - true).max() <= 2 * np.abs(want - true).max() + near


@pytest.mark.parametrize(("lines", "outputs"), [
    (LINEAR.replace("Add(f, v)", "Sub(f, v)"), "y s"),
    (LINEAR, "y s t"),  # what the linear layer gives is wanted
    (LINEAR + "u = Neg(t) ", "y s u"),
    (LINEAR.replace("Add(f, v)", "Add(f, z)"), "y s"),  # not a constant
])  # fmt: skip
def test_a_bias_that_stays(lines: str, outputs: str, tmp_path: Path) -> None:
    inputs = "x r z" if "z" in words(lines) else "x r"
    made = model(lines + rms("s", "y"), outputs, inputs=inputs, types={"z": "float[16]"})
    assert fused(made, tmp_path) == {"add_rms_norm": 1}


def test_a_sum_that_only_a_dead_end_reads(tmp_path: Path) -> None:
    """What nobody reads in the model stays, but not the cast whose result the operator gives."""
    out, _ = rewritten(halves(LAST + " end = Neg(t) behind = Neg(end)", tmp_path, "y"), tmp_path)
    assert operators(out) == {"add_rms_norm_f16_in_f32_last_unrounded": 1}
    assert [n.op_type for n in onnx.load(out).graph.node if not n.domain] == ["Neg", "Neg"]


@pytest.mark.parametrize(("lines", "outputs", "types"), [
    (LAST, "y t s", {"s": "float[2,3,16]"}),  # the sum itself is wanted
    (LAST + " u = Mul(s, s)", "y t u", {"u": "float[2,3,16]"}),
    (LAST + " u = Cast<to=11>(s)", "y t u", {"u": "double[2,3,16]"}),  # rounded twice
    (LAST.replace("t = Cast<to=10>(s)", "t = Identity(s)"), "y t", {"t": "float[2,3,16]"}),
    (LAST.replace("Add(a, b)", "Sub(a, b)"), "y t", {}),
    (LAST.replace("b = Cast<to=1>(r)", "b = Identity(r)"), "y t", {"r": "float[2,3,16]"}),
    (LAST, "y t", {"r": "float16[3,16]"}),
    (LAST.replace("Add(a, b)", "Add(a, a)"), "y t", {}),
    (VLLM.replace("<to=10>(n_n) h = Cast<to=10>(w)", "<to=16>(n_n) h = Cast<to=16>(w)"), "y t",
     {"y": "bfloat16[2,3,16]"}),  # cast to another type than the summands'
])  # fmt: skip
def test_a_sum_that_stays_wide(lines: str, outputs: str, types: dict[str, str], tmp_path: Path) -> None:
    report = normfuse.rewrite(halves(lines, tmp_path, outputs, **types), tmp_path / "out.onnx", TARGET)
    assert [n.action for n in report.norms] == ["fused"]
    assert not [op for op in operators(tmp_path / "out.onnx") if "unrounded" in op or "first" in op]


def test_a_bias_wider_than_the_summands_stays_wide(tmp_path: Path) -> None:
    """One of the type of the summands, cast as they are, is taken in: see tests/test_skip_operators.py."""
    lines = LAST.replace("s = Add(a, b)", "d = Add(a, v) s = Add(d, b)")
    out, report = rewritten(halves(lines, tmp_path), tmp_path)
    assert operators(out) == {"bias_add_rms_norm_f32_in_f32_last_to_f16": 1} and not report.refusals


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda"])
def test_a_skip_operator_rounds_the_sum_first(target: Any, tmp_path: Path) -> None:
    for version in ("",) if target == "onnx" else ("1.26", "1.29", "1.31"):
        config = normfuse.Config(target=target, ort_version=version, numerics="fast")
        report = normfuse.rewrite(halves(LAST, tmp_path), tmp_path / "out.onnx", config, overwrite=True)
        assert len(report.norms) == 1
        assert not [node for node in onnx.load(tmp_path / "out.onnx").graph.node if "Skip" in node.op_type]


def test_an_operator_that_stays_because_a_check_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model("s = Add(x, r) y = LayerNormalization(s, w, v)", "y s")
    assert [n.reason for n in normfuse.optimize(net, normfuse.Config(target="normfuse"))[1].norms] == [""]
    monkeypatch.setattr("normfuse.frontends.onnx_check.Checker.check", lambda *_: Check(False, message="not today"))
    made, report = normfuse.optimize(net, normfuse.Config(target="normfuse"))
    assert [(n.action, n.reason) for n in report.norms] == [("kept", "as add_layer_norm it failed: not today")]
    assert [n.op_type for n in made.graph.node] == ["Add", "LayerNormalization"]
