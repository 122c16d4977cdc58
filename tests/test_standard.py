"""Target "standard": norms in operators of the standard alone, for runtimes that take no functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import normfuse
from normfuse.errors import InputError
from normfuse.sessions import session
from tests.families import cached_export
from tests.onnx_lines import layer, rms
from tests.onnx_texts import ROOT, model, numbers
from tests.share import share
from tests.spelling_files import EXPORTERS, HALF, SINGLE, exported
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
    assert norm.action != "refused" or {r.code for r in report.refusals} <= {"NF117", "NF201"}
    if other.emitted.endswith("Normalization"):
        assert norm.emitted == other.emitted
    compare_runs(SPELLINGS[name], dtype, source, out)


@pytest.mark.parametrize(("lines", "opset", "wanted"), [
    (rms("x", "y", 13), 13, RMS),
    ("q = ReduceSumSquare(x, last) m = Mul(q, inverse) e = Add(m, eps) r = Reciprocal(e) s = Sqrt(r) n = Mul(s, x) "
     "y = Mul(w, n)", 18, RMS),
    (layer("x", "y", 13), 13, LAYER), (layer("x", "y"), 18, ["LayerNormalization"]),
    (rms("x", "y", 23), 23, ["RMSNormalization"]),
])  # fmt: skip
def test_the_operators_of_a_norm(lines: str, opset: int, wanted: list[str], tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"w": numbers(16), "v": numbers(16), "inverse": np.array(1 / 16, np.float32)}
    made = model("float[2,3,16] x", lines, "float[2,3,16] y", opset, **arrays)
    done, report = normfuse.optimize(made, STANDARD)
    assert [n.emitted for n in report.norms] == [", ".join(wanted)] and ops(done) == wanted and alone(done)
    names = [t.name for t in done.graph.initializer]
    assert len(set(names)) == len(names) == sum(name not in arrays for name in names) + len(set(arrays) & set(names))
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


def test_two_norms_of_one_value_share_their_statistics() -> None:
    made = model("float[2,3,16] x", rms("x", "y") + rms("x", "z", weight="k"), "float[2,3,16] y, float[2,3,16] z", 18,
                 w=numbers(16), k=numbers(16))  # fmt: skip
    done, report = normfuse.optimize(made, STANDARD)
    assert report.fused == 2 and ops(done).count("Pow") == 1


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
    assert {n.action for n in report.norms} == {"converted"}
    before, after = (session(path).run(None, tokens)[0] for path in (source, tmp_path / "out.onnx"))
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_a_note_says_that_functions_are_not_taken_everywhere() -> None:
    made = model("float[2,3,16] x", rms("x", "y"), "float[2,3,16] y", 18, w=numbers(16))
    told = [note for note in normfuse.optimize(made)[1].notes if "target 'standard'" in note]
    assert len(told) == 1 and told[0].startswith("1 norms are calls of functions now")
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
    report = normfuse.export(module, (torch.randn(3, 16),), tmp_path / "out.onnx", STANDARD, opset_version=18)
    assert report.fused == 1 and alone(onnx.load(tmp_path / "out.onnx"))
    given = ir.load(tmp_path / "out.onnx")
    before = ir.to_proto(given).SerializeToString()
    normfuse.optimize(given, normfuse.Config(target="onnx"))
    assert ir.to_proto(given).SerializeToString() == before
