"""Target "standard": norms in operators of the standard alone, for runtimes that take no functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse import fastest
from normfuse.errors import InputError, VerificationError
from normfuse.frontends import onnx_emit
from normfuse.sessions import session
from tests.families import cached_export
from tests.onnx_lines import layer, rms
from tests.onnx_texts import OLD, ROOT, model, numbers
from tests.share import share
from tests.spelling_files import EXPORTERS, HALF, SINGLE, exported
from tests.targeted import rewritten
from tests.spellings import CANNOT_EXPORT, LOSES_EPS, SPELLINGS, Exporter
from tests.test_spellings import compare_runs

STANDARD = normfuse.Config(target="standard")
RMS = ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
LAYER = ["ReduceMean", "Sub", *RMS, "Add"]


def alone(made: onnx.ModelProto) -> bool:
    """Whether a model has operators of the standard alone."""
    return not made.functions and {node.domain for node in made.graph.node} <= {""} and len(made.opset_import) == 1


def ops(made: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in made.graph.node]


@pytest.mark.parametrize(("exporter", "opset", "dtype", "name"), share(
    ((exporter, opset, dtype, name) for exporter, opset in EXPORTERS for dtype in (SINGLE, HALF) for name in SPELLINGS
     if name not in CANNOT_EXPORT[exporter, opset] | LOSES_EPS[exporter]), 40))  # fmt: skip
def test_spelling(exporter: Exporter, opset: int, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """In the operators of its function, no further from float64; what rounds in its own order stays."""
    source, out, again = exported(exporter, opset, dtype, name), tmp_path / "out.onnx", tmp_path / "again.onnx"
    report, usual = normfuse.rewrite(source, out, STANDARD), normfuse.optimize(str(source))[1]
    made = onnx.load(out)
    onnx.checker.check_model(made, full_check=True)
    assert alone(made)
    normfuse.rewrite(out, again, STANDARD)
    assert again.read_bytes() == out.read_bytes()
    (norm,), (other,) = report.norms, usual.norms
    assert norm.action in ("fused", "kept") or other.emitted.endswith("_as_written")
    assert norm.action != "refused" or [r.code for r in report.refusals] == ["NF117"]
    if other.emitted.endswith("Normalization"):
        assert norm.emitted == other.emitted
    compare_runs(SPELLINGS[name], dtype, source, out)


@pytest.mark.parametrize(("lines", "opset", "wanted"), [
    (rms("x", "y", 13), 13, RMS),
    ("q = ReduceSumSquare(x, last) m = Mul(q, inverse) e = Add(m, eps) r = Reciprocal(e) s = Sqrt(r) n = Mul(s, x) "
     "y = Mul(w, n)", 18, RMS),
    (f"{OLD.format('x', 1)} i = Reciprocal(r) n = Mul(x, i) y = Mul(n, column)", 13, ["Mul", *RMS[1:]]),
    (layer("x", "y", 13), 13, LAYER), (layer("x", "y"), 18, ["LayerNormalization"]),
    (rms("x", "y", 23), 23, ["RMSNormalization"]),
])  # fmt: skip
def test_the_operators_of_a_norm(lines: str, opset: int, wanted: list[str], tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"w": numbers(16), "v": numbers(16), "inverse": np.array(1 / 16, np.float32)}
    arrays["column"] = numbers(3, 1)
    made = model("float[2,3,16] x", lines, "float[2,3,16] y", opset, **arrays)
    done, report = normfuse.optimize(made, STANDARD)
    assert [n.emitted for n in report.norms] == [", ".join(wanted)] and ops(done) == wanted and alone(done)
    x = numbers(2, 3, 16) * 30 + 100
    for a, b in zip(session(made.SerializeToString()).run(None, {"x": x}),
                    session(done.SerializeToString()).run(None, {"x": x}), strict=True):  # fmt: skip
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


def test_what_has_these_operators_is_kept(tmp_path: Path) -> None:
    pow_first = "q = Pow(x, two) m = ReduceMean(q, last) e = Add(m, eps) r = Sqrt(e) n = Div(x, r) y = Mul(n, w)"
    made = model("float[2,3,16] x", pow_first, "float[2,3,16] y", 18, w=numbers(16), two=np.array(2, np.float32))
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", STANDARD)
    assert [n.action for n in report.norms] == ["kept"]
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()


def test_a_step_of_a_norm_is_no_norm_of_its_own_the_second_time(tmp_path: Path) -> None:
    """x + mean(x) is normalised, which makes the first step of the next norm, n - mean(n), one of x."""
    first = ("c = ReduceMean<axes=[-1]>(x) p = Add(x, c) d = Sub(x, c) q = Mul(d, d) m = ReduceMean<axes=[-1]>(q) "
             "e = Add(m, large) r = Sqrt(e) n = Div(p, r) ")
    twice = layer("n", "y", 13).replace("y_q = Mul(y_d, y_d)", "y_f = Sub(n, y_c) y_q = Mul(y_f, y_f)")
    made = model("float[2,3,16] x", first + twice, "float[2,3,16] y", 13,
                 w=numbers(16), v=numbers(16), large=np.array(0.1, np.float32))  # fmt: skip
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", STANDARD)
    assert sorted(n.action for n in report.norms) == ["fused", "refused", "refused"]  # both subtractions
    after = normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "again.onnx", STANDARD)
    assert sorted(n.action for n in after.norms) == ["kept", "refused"]
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def again(made: onnx.ModelProto, folder: Path, feeds: dict[str, Any], **config: Any,
          ) -> tuple[onnx.ModelProto, normfuse.Report]:  # fmt: skip
    """The rewrite of a file, as `rewritten`: with equal outputs, in standard operators alone."""
    done, report = rewritten(made, folder, "standard", **config)
    for a, b in zip(*(session(folder / n).run(None, feeds) for n in ("in.onnx", "out.onnx")), strict=True):
        if a.dtype == object:
            assert a.tolist() == b.tolist()
        else:
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert alone(done)
    return done, report


X = {"x": numbers(2, 3, 16)}


def test_two_norms_of_one_value_share_their_statistics(tmp_path: Path) -> None:
    made = model("float[2,3,16] x", rms("x", "y") + rms("x", "z", weight="k"), "float[2,3,16] y, float[2,3,16] z", 18,
                 w=numbers(16), k=numbers(16))  # fmt: skip
    done, report = again(made, tmp_path, X)
    assert report.fused == 2 and ops(done).count("Pow") == 1


@pytest.mark.parametrize("lines", [
    "a = Exp(x) b = Exp(x) p = ReduceSum(a) q = ReduceSum(b)",
    "".join(layer("x", n, 13).replace(f"Mul({n}_d, {n}_d)", f"Pow({n}_d, two)") for n in "pq"),
])  # fmt: skip
def test_what_the_model_computes_twice_stays(lines: str, tmp_path: Path) -> None:
    """Of nodes that nothing was put in the place of the file keeps the bytes."""
    shape = "[1,1,1]" if "Exp" in lines else "[2,3,16]"
    made = model("float[2,3,16] x", lines + rms("x", "y", 13), f"float[2,3,16] y, float{shape} p, float{shape} q", 13,
                 w=numbers(16), v=numbers(16), two=np.array(2, np.float32))  # fmt: skip
    done, report = again(made, tmp_path, X)
    assert report.fused == 1 and not any("merged" in note for note in report.notes)
    assert {n.SerializeToString() for n in made.graph.node[:-6]} <= {n.SerializeToString() for n in done.graph.node}


def test_what_a_norm_computes_too_is_merged_where_something_is_nearly_one(tmp_path: Path) -> None:
    """As it would be when the result is read again: the cast of the norm, and that of the sum."""
    lines = ("h = Identity(x) c = Cast<to=1>(h) q = Mul(c, c) m = ReduceMean<axes=[-1]>(q) e = Add(m, eps) r = Sqrt(e) "
             "n = Div(c, r) k = Mul(n, w) y = Cast<to=10>(k) d = Cast<to=1>(x) u = Add(d, d) ")
    clamped = "i = Mul(s, s) j = ReduceMean<axes=[-1]>(i) f = Max(j, large) o = Sqrt(f) z = Div(s, o)"
    for near in (True, False):
        made = model("float16[2,3,16] x, float[2,3,16] s", lines + (clamped if near else "z = Neg(s)"),
                     "float16[2,3,16] y, float[2,3,16] z, float[2,3,16] u", 13, w=numbers(16),
                     large=np.array(0.1, np.float32))  # fmt: skip
        onnx.save(made, tmp_path / "in.onnx")
        report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", STANDARD, overwrite=True)
        assert report.fused == 1 and bool(report.refusals) is near
        assert sum(op == "Cast" for op in ops(onnx.load(tmp_path / "out.onnx"))) == (2 if near else 3)
        normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "again.onnx", STANDARD, overwrite=True)
        assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@pytest.mark.parametrize("opset", [18, 23])
def test_operators_of_onnx_runtime_are_spelled_out(opset: int, tmp_path: Path) -> None:
    """As its optimiser leaves them; those that are no norms are named."""
    lines = """p = SimplifiedLayerNormalization <epsilon = 1e-5> (x, w)
        q, , , s = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-5> (p, x, w)
        r = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (s, q, w, v) y = com.microsoft.FastGelu(r)"""
    made = model("float[2,3,16] x", lines, "float[2,3,16] y", opset, w=numbers(16), v=numbers(16))
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", STANDARD)
    done = onnx.load(tmp_path / "out.onnx")
    assert len(report.norms) == 3 and {n.action for n in report.norms} <= {"fused", "kept"}
    assert not any("Simplified" in op or "Skip" in op for op in ops(done))
    assert [node.op_type for node in done.graph.node if node.domain] == ["FastGelu"]
    assert any(note.startswith("FastGelu: no operators of the standard") for note in report.notes)
    assert "RMSNormalization" in ops(done) if opset >= 23 else ops(done)[:6] == RMS
    for a, b in zip(*(session(tmp_path / n).run(None, X) for n in ("in.onnx", "out.onnx")), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    assert normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "again.onnx", STANDARD).fused == 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_names_that_ours_would_have(tmp_path: Path) -> None:
    """Of values of the model, some of which the norm reads."""
    lines = rms("normfuse_two_0", "y", 13, "normfuse_eps_1") + "squared = Neg(y) root = Exp(squared)"
    made = model("float[2,3,16] normfuse_two_0", lines, "float[2,3,16] root", 13, normfuse_eps_1=numbers(16))
    _, report = again(made, tmp_path, {"normfuse_two_0": X["x"]})
    assert report.fused == 1


@pytest.mark.parametrize(("lines", "functions"), [
    ("z = Neg(x)", "<domain: 'own', opset_import: ['': 18]> F (a) => (q) { q = Neg(a) }"),  # called by nobody
    (rms("x", "z"), "<domain: 'normfuse', opset_import: ['': 18]> F (a) => (q) { q = Neg(a) }"),
    ("u, z = own.F(x)", "<domain: 'own', opset_import: ['': 18]> F (a) => (q, p) { q = Neg(a) p = Exp(a) }"),
    ("z = own.F <k = 3, e = 0.5> (x)", """<domain: 'own', opset_import: ['': 18]> F <k, e> (a) => (q)
        { c = Constant <value_float: float = @e> () i = Constant <value_int: int = @k> () f = Cast <to = 1> (i)
          s = Mul(a, c) q = Add(s, f) }"""),
])  # fmt: skip
def test_functions_of_the_model_are_written_out(lines: str, functions: str, tmp_path: Path) -> None:
    """Their numbers as tensors; a Constant of texts stays what it is."""
    made = model("float[2,3,16] x", lines, "float[2,3,16] z", 18, functions.replace("'", '"'), w=numbers(16))
    if "own" in functions:
        made.opset_import.append(onnx.helper.make_opsetid("own", 1))
    if "u, " in lines:
        made.graph.node[0].output[0] = ""  # which nobody asks for
    made.graph.node.append(onnx.helper.make_node("Constant", [], ["t"], value_strings=["a\0", "é"]))
    made.graph.output.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.STRING, [2]))
    done, _ = again(made, tmp_path, X)
    assert not any(a.name in ("value_float", "value_int") for n in done.graph.node for a in n.attribute)


def test_the_fastest_has_no_functions_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "RESTARTS", 1)
    monkeypatch.setattr(fastest, "SECONDS", 0.01)
    monkeypatch.setattr(fastest._File, "faster", lambda self, other: self.first is None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = model("float[2,3,16] x", rms("x", "y") + "z = own.F(y)", "float[2,3,16] z", 18,
                 '<domain: "own", opset_import: ["": 18]> F (a) => (q) { q = Neg(a) }', w=numbers(16))  # fmt: skip
    made.opset_import.append(onnx.helper.make_opsetid("own", 1))
    _, report = again(made, tmp_path, X, first="fastest")
    assert report.fused == 1


def test_an_order_of_roundings_of_its_own_is_refused(tmp_path: Path) -> None:
    """It would be a function of its own nodes; what the file has already is that."""
    source, out = exported("dynamo", 18, HALF, "rms_rounded_rstd"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, STANDARD)
    assert [r.code for r in report.refusals] == ["NF117"] and report.fused == 0
    assert out.read_bytes() == source.read_bytes()
    fast = tmp_path / "fast.onnx"
    (norm,) = normfuse.rewrite(source, fast, normfuse.Config(target="standard", numerics="fast")).norms
    assert norm.action == "fused" and alone(onnx.load(fast))


def test_float64_has_its_own_epsilon() -> None:
    """The attribute of a call would be a float32."""
    lines = f"{ROOT.format('x')} i = Reciprocal(r) n = Mul(x, i) y = Mul(n, w)"
    made = model("double[2,3,16] x", lines, "double[2,3,16] y", 18, w=np.linspace(0.5, 1.5, 16), eps=np.array(1e-5))
    done, report = normfuse.optimize(made, STANDARD)
    assert report.fused == 1 and alone(done)
    assert 1e-5 in [a.item() for a in map(onnx.numpy_helper.to_array, done.graph.initializer) if a.size == 1]


SELDOM = {
    "bfloat16": ("float[2,3,16] x", f"xh = Cast<to=16>(x) xf = Cast<to=1>(xh) {ROOT.format('xf')} i = Reciprocal(r) "
                 "n = Mul(xf, i) nh = Cast<to=16>(n) nf = Cast<to=1>(nh) y = Mul(nf, w)", "float[2,3,16] y"),
    "float64": ("double[2,3,16] x", "m = ReduceMean(x, last) d = Sub(x, m) s = Mul(d, d) v = ReduceMean(s, last) "
                "u = Add(v, eps) r = Sqrt(u) i = Reciprocal(r) n = Mul(d, i) y = Mul(n, w)", "double[2,3,16] y"),
}  # fmt: skip
"""Norms for whose types some runtimes lack the standard's operator: rounded to bfloat16 ahead of a weight of float32,
and a LayerNorm of float64."""


@pytest.mark.parametrize("target", ["onnx", "standard"])
@pytest.mark.parametrize("which", SELDOM)
def test_types_that_the_operators_have_not_everywhere(which: str, target: Any, tmp_path: Path) -> None:
    """ONNX Runtime on the CPU and ONNX's reference evaluator run the result as they run the model."""
    dtype = np.float64 if which == "float64" else np.float32
    made = model(*SELDOM[which], 23, w=np.linspace(0.5, 1.5, 16, dtype=dtype), eps=np.array(1e-5, dtype))
    done, report = normfuse.optimize(made, normfuse.Config(target=target))
    assert report.fused == 1
    assert normfuse.optimize(done, normfuse.Config(target=target))[0] == done
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 16)).astype(dtype)}
    evaluator: Any = onnx.reference.ReferenceEvaluator
    for run in (lambda m: session(m.SerializeToString()), evaluator):
        before, after = (run(m).run(None, x)[0] for m in (made, done))
        np.testing.assert_allclose(after, before, rtol=1e-14 if which == "float64" else 1e-6)


@pytest.mark.parametrize("target", ["onnx", "standard", "normfuse"])
def test_an_operator_of_such_a_type_is_kept(target: Any) -> None:
    lines = "d = Cast<to=11>(x) n = LayerNormalization(d, w) y = Cast<to=1>(n)"
    made = model("float[2,3,16] x", lines, "float[2,3,16] y", 17, w=np.ones(16))
    done, report = normfuse.optimize(made, normfuse.Config(target=target))
    assert report.norms[0].action == "kept" and ops(done) == ops(made)


def test_a_result_that_does_not_load_is_not_the_input_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model(*SELDOM["bfloat16"], 23, w=numbers(16)), source)
    monkeypatch.setattr(onnx_emit, "_seldom", lambda norm: False)
    with pytest.raises(VerificationError, match=f"^{source}: .*the result, which was not saved: ONNX Runtime does not"):
        normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


@pytest.mark.parametrize("first", ["onnx", "normfuse"])
def test_a_file_with_functions_has_none_then(first: Any, tmp_path: Path) -> None:
    """Also where they stand for a norm and its neighbour, or a softmax."""
    source, called, out = cached_export("llama", 18), tmp_path / "called.onnx", tmp_path / "out.onnx"
    normfuse.rewrite(source, called, normfuse.Config(target=first))
    assert not alone(onnx.load(called))
    report = normfuse.rewrite(called, out, normfuse.Config(target="standard", verify="model"))
    assert report.model_check is not None and report.model_check["equal"]
    assert alone(onnx.load(out)) and len(report.norms) == 5 and not report.refusals
    assert "model-local functions were inlined" in report.notes


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_inside_a_sequence_map(kind: str, tmp_path: Path) -> None:
    """Where ONNX Runtime loads no calls of functions, and other targets refuse the norm."""
    centred = "c = ReduceMean(p, last) d = Sub(p, c)" if kind == "layer_norm" else "d = Identity(p)"
    made = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 6, 8] x) => (float[2, 6, 8] y) <float eps = {{1e-5}}, int64[1] last = {{-1}}> {{
            s = SplitToSequence<axis = 1, keepdims = 1>(x)
            t = SequenceMap<body = b (float[2, 1, 8] p) => (float[2, 1, 8] o) {{
                {centred} {ROOT.format("d")} i = Reciprocal(r) o = Mul(d, i) }}>(s)
            y = ConcatFromSequence<axis = 1>(t) }}""")
    onnx.save(made, tmp_path / "in.onnx")
    config = normfuse.Config(target="standard", verify="model")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    assert [n.action for n in report.norms] == ["fused"] and alone(onnx.load(tmp_path / "out.onnx"))


@pytest.mark.parametrize(("target", "numerics", "made"), [
    ("standard", "exact", ""), ("standard", "fast", "Cast, Mul, ReduceMean, Add, Sqrt, Div, Cast"),
    ("onnx", "exact", "function normfuse.rms_norm_as_written"),
    ("onnx", "fast", "Cast, function normfuse.rms_norm, Cast"),
])  # fmt: skip
def test_an_eps_that_float16_does_not_hold(target: Any, numerics: Any, made: str, tmp_path: Path) -> None:
    """eps / 300^2 would be 0 there, and rows of zeros NaN; found without a check of what was written, too."""
    lines = ("t = Transpose<perm=[0,2,1]>(x) a = Mul(t, s) q = Mul(a, a) m = ReduceMean<axes=[-1]>(q) e = Add(m, eps) "
             "r = Sqrt(e) n = Div(a, r) y = Transpose<perm=[0,2,1]>(n)")
    half = {"s": np.array(300, np.float16), "eps": np.array(1e-6, np.float16)}
    made_of = model("float16[2,3,16] x", lines, "float16[2,3,16] y", 13, s=half["s"], eps=half["eps"])
    onnx.save(made_of, tmp_path / "in.onnx")
    config = normfuse.Config(target=target, numerics=numerics, verify="off")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    assert [n.emitted for n in report.norms] == [made] and [r.code for r in report.refusals] == ["NF117"] * (not made)
    x = numbers(2, 3, 16).astype(np.float16)
    x[0], x[1] = 0, x[1] * np.float16(1e-3)
    was, now = (session(tmp_path / name).run(None, {"x": x})[0] for name in ("in.onnx", "out.onnx"))
    assert not np.isnan(was).any() and np.abs(was[1]).max() > 0.5
    np.testing.assert_allclose(now, was, rtol=2**-9, atol=0)


@pytest.mark.parametrize("verify", ["sites", "off"])
@pytest.mark.parametrize(("target", "numerics", "made"), [
    ("standard", "exact", ""), ("standard", "fast", "Cast, Pow, ReduceMean, Add, Sqrt, Div, Mul, Cast"),
    ("onnx", "exact", "function normfuse.rms_norm_as_written"),
    ("onnx", "fast", "Cast, function normfuse.rms_norm, Cast"),
])  # fmt: skip
def test_squares_that_a_scale_keeps_finite_in_float16(target: Any, numerics: Any, made: str, verify: Any) -> None:
    """64 x (mean(x^2) + 4096 eps)^-1/2 of rows of 300, of whose squares float16 has none but those / 64^2."""
    lines = "a = Mul(x, s) q = Mul(a, a) m = ReduceMean<axes=[-1]>(q) e = Add(m, eps) r = Sqrt(e) y = Div(x, r)"
    half = {"s": np.array(1 / 64, np.float16), "eps": np.array(1e-5, np.float16)}
    given = model("float16[2,3,16] x", lines, "float16[2,3,16] y", 13, s=half["s"], eps=half["eps"])
    result, report = normfuse.optimize(given, normfuse.Config(target=target, numerics=numerics, verify=verify))
    assert [n.emitted for n in report.norms] == [made] and [r.code for r in report.refusals] == ["NF117"] * (not made)
    x = 300 + numbers(2, 3, 16).astype(np.float16)
    was, now = (np.asarray(ReferenceEvaluator(one).run(None, {"x": x}))[0] for one in (given, result))
    assert (was > 63).all() and now.dtype == np.float16
    np.testing.assert_allclose(now, was, rtol=2**-8, atol=0)


def test_a_norm_less_exact_than_the_model_is_refused(tmp_path: Path) -> None:
    """As one whose roundings have no operator: a function would keep them."""
    lines = f"{ROOT.format('x')} i = Reciprocal(r) n = Mul(x, i) y = Mul(n, w)"
    half = {"w": numbers(16).astype(np.float16), "eps": np.array(1e-3, np.float16)}
    made = model("float16[2,3,16] x", lines, "float16[2,3,16] y", 18, **half)  # type: ignore[arg-type]
    assert normfuse.optimize(made)[1].norms[0].emitted.startswith("function normfuse.rms_norm_as_written")
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", STANDARD)
    assert [r.code for r in report.refusals] == ["NF117"]
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()


def test_an_approximation(tmp_path: Path) -> None:
    lines = "t = Tanh(x) n = LayerNormalization(t, w, v) y = MatMul(n, W)"
    made = model("float[2,3,16] x", lines, "float[2,3,16] y", 18, w=numbers(16), v=numbers(16), W=numbers(16, 16))
    given = [{"x": numbers(2, 3, 16) + 1.0} for _ in range(4)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", target="standard", tolerance=0.9)
    done, report = normfuse.optimize(made, config, calibration=given)
    assert [n.conversion["verdict"] for n in report.norms if n.conversion] == ["approximate"]
    assert alone(done) and ops(done)[1:7] == RMS and not any("inlined" in note for note in report.notes)


@pytest.mark.parametrize(("mode", "more"), [("exact", {}), ("approximate", {"tolerance": 0.5})])
def test_conversions(mode: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """An RMSNorm that a LayerNorm becomes is spelled out below opset 23, a centring operator ahead of it as ever."""
    source = cached_export("gpt2", 18)
    config = normfuse.Config(layernorm_to_rmsnorm=mode, target="standard", **more)
    tokens = {session(source).get_inputs()[0].name: np.arange(14, dtype=np.int64).reshape(2, 7)}
    given: Sequence[dict[str, Any]] = [{name: (a + i) % 128 for name, a in tokens.items()} for i in range(4)]
    report = normfuse.rewrite(source, tmp_path / "out.onnx", config,
                              calibration=given if mode == "approximate" else None)  # fmt: skip
    made = onnx.load(tmp_path / "out.onnx")
    assert alone(made) and "LayerNormalization" not in ops(made)
    assert not any("inlined" in note for note in report.notes)
    assert {n.action for n in report.norms} == {"converted"}
    before, after = (session(path).run(None, tokens)[0] for path in (source, tmp_path / "out.onnx"))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_a_note_says_that_functions_are_not_taken_everywhere() -> None:
    made = model("float[2,3,16] x", rms("x", "y"), "float[2,3,16] y", 18, w=numbers(16))
    told = [note for note in normfuse.optimize(made)[1].notes if "target 'standard'" in note]
    assert len(told) == 1 and told[0].startswith("1 operator is a function of the model")
    linear = "h = MatMul(x, W) a = Add(h, c) n = LayerNormalization(a, w, v) y = MatMul(n, U)"
    made = model("float[2,3,16] x", linear, "float[2,3,16] y", 18, w=numbers(16), v=numbers(16), W=numbers(16, 16),
                 c=numbers(16), U=numbers(16, 16))  # fmt: skip
    converted, report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm="exact"))
    assert len(converted.functions) == 1 and any(note.startswith("1 operator is a function") for note in report.notes)
    made = model("float[2,3,16] x", rms("x", "y"), "float[2,3,16] y", 18, w=numbers(16))
    for target in ("standard", "normfuse", "ort-cpu"):
        config = normfuse.Config(target=target)
        assert not any("target 'standard'" in note for note in normfuse.optimize(made, config)[1].notes)
    newer = model("float[2,3,16] x", rms("x", "y", 23), "float[2,3,16] y", 23, w=numbers(16))
    assert not any("target 'standard'" in note for note in normfuse.optimize(newer)[1].notes)


def test_it_is_for_onnx_models(tmp_path: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.RMSNorm(4))
    program = torch.export.export(linear, (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "in.pt2")
    with pytest.raises(InputError, match="target='standard' is for ONNX models"):
        normfuse.optimize(program, STANDARD)
    with pytest.raises(InputError, match=r"torch runs a \.pt2, and target 'standard'"):
        normfuse.rewrite(tmp_path / "in.pt2", tmp_path / "out.pt2", STANDARD)
    with pytest.raises(InputError, match="operators of ONNX Runtime"):
        normfuse.Config(target="standard", first="onnxscript")


def test_an_export(tmp_path: Path) -> None:
    """And a model of onnx_ir, whose caller's own stays as it is."""
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.RMSNorm(16))
    args = (torch.randn(3, 16),)
    report = normfuse.export(module, args, tmp_path / "out.onnx", STANDARD, opset_version=18)
    assert report.fused == 1 and alone(onnx.load(tmp_path / "out.onnx"))
    normfuse.export(module, args, tmp_path / "called.onnx", opset_version=18)
    given = ir.load(tmp_path / "called.onnx")
    assert given.functions
    before = ir.to_proto(given).SerializeToString()
    assert alone(ir.to_proto(normfuse.optimize(given, STANDARD)[0]))
    assert ir.to_proto(given).SerializeToString() == before
