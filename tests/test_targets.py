"""The forms for each runtime: what the table says, where it holds, and that what comes out runs and is equal."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse import targets
from normfuse.errors import InputError, UnsupportedError
from normfuse.targets import ROWS, WIDE, Row
from normfuse.verify import session
from tests.bench.forms import RESULT, SHAPES
from tests.families import (
    FAMILIES, FUSED, LAYERS, MORE, OTHERS, cached, cached_export, digest, export_onnx,
)  # fmt: skip
from tests.onnx_lines import N, layer, model, rms
from tests.share import share

SKIP = "SkipSimplifiedLayerNormalization"
SKIP_LAYER = "SkipLayerNormalization"
ADD = "s = Add(x, r) " + rms("s", "y")
ADD_LAYER = "s = Add(x, r) " + layer("s", "y")
PLACED = ("norm_add_norm", "norm_add", "qk_norm", "add_rms_norm", "add_layer_norm")
CHOICES = [("ort-cpu", "1.29"), ("ort-cpu", "1.31"), ("ort-cuda", "1.31")]


def rewritten(made: onnx.ModelProto, folder: Path, target: str, version: str = "1.31", **config: Any,
              ) -> tuple[onnx.ModelProto, normfuse.Report]:  # fmt: skip
    """The rewrite of a model: valid, the same when made again, and not rewritten twice."""
    source, out, again = folder / "in.onnx", folder / "out.onnx", folder / "again.onnx"
    onnx.save(made, source)
    settings = normfuse.Config(target=target, ort_version=version, **config)  # type: ignore[arg-type]
    report = normfuse.rewrite(source, out, settings, overwrite=True)
    onnx.checker.check_model(out, full_check=True)
    normfuse.rewrite(source, again, settings, overwrite=True)
    assert again.read_bytes() == out.read_bytes()
    assert normfuse.rewrite(out, again, settings, overwrite=True).fused == 0
    assert again.read_bytes() == out.read_bytes()
    return onnx.load(out), report


def operators(made: onnx.ModelProto) -> Counter[str]:
    """The operators of a model that are norms, and functions of NormFuse."""
    return Counter(n.op_type for n in made.graph.node if "Normalization" in n.op_type or n.domain == "normfuse")


# -- the table ---------------------------------------------------------------------------------------------------------


def measured(row: Row) -> list[dict[str, Any]]:
    """The measurements that a row of the CPU speaks of."""
    versions = json.loads(RESULT.read_text())["versions"]
    return [found for version, rows in versions.items() for found in rows
            if row.since <= tuple(map(int, version.split(".")[:2])) < row.before
            and found["kind"] == row.kind and found["type"] in row.types]  # fmt: skip


def ratio(found: dict[str, Any], a: str, b: str) -> float:
    """The time of a form in parts of another's."""
    return float(found["forms"][a]["us"] / found["forms"][b]["us"])


CPU = [row for row in ROWS
       if row.target == "ort-cpu" and row.form != "refuse" and row.what not in ("conversion", "half")]  # fmt: skip


def gains(row: Row) -> list[float]:
    """The time of an RMSNorm in parts of that of a LayerNorm, both with their addition, by version, type and shape."""
    out = []
    for found in json.loads(RESULT.read_text())["versions"].items():
        if row.since <= tuple(map(int, found[0].split(".")[:2])) < row.before:
            us = {(f["kind"], f["type"], f["rows"], f["n"]): f["forms"]["add, norm"]["us"] for f in found[1]}
            out += [us["rms_norm", *key[1:]] / us[key] for key in us if key[0] == "layer_norm"]
    return out


@pytest.mark.parametrize("row", [row for row in ROWS if row.what == "conversion"], ids=lambda row: row.range)
def test_a_conversion_pays_where_it_was_measured_to(row: Row) -> None:
    found = gains(row)
    assert len(found) >= 4 * len(SHAPES)
    middle = statistics.median(found)
    assert middle < 0.8 if row.form == "operator" else middle > 0.9
    assert f"{min(found):.2g}"[:4] in row.evidence
    assert f"{max(found):.2f}" in row.evidence


def test_a_conversion_that_gains_nothing_is_left_unless_it_is_forced(tmp_path: Path) -> None:
    from tests.test_centring import onnx_net

    source = onnx_net(tmp_path / "in.onnx")
    for version, force, converted in (("1.26", False, 0), ("1.26", True, 1), ("1.31", False, 1)):
        config = normfuse.Config(layernorm_to_rmsnorm="exact", target="ort-cpu", ort_version=version, force=force)
        report = normfuse.optimize(source, config)[1]
        assert report.converted == converted
        assert converted or [r.code for r in report.refusals] == ["NF306"]


@pytest.mark.parametrize("row", CPU, ids=lambda row: f"{row.kind} {row.what} {row.form} {row.range}")
def test_the_rows_are_what_was_measured(row: Row) -> None:
    """The form that a row gives is the fastest over the shapes among those that are as exact as the model."""
    found = measured(row)
    assert len(found) >= len(SHAPES)

    def middle(a: str, b: str) -> float:
        return statistics.median(ratio(f, a, b) for f in found)

    error = max(f["forms"]["add, norm"]["error"] / f["forms"]["spelled out"]["error"] for f in found)
    if row.form == "skip":
        assert middle("skip", "add, norm") < 0.95
    elif row.what == "skip":
        form, alike = "apart" if "float16" in row.types else "add, norm", [r for r in CPU if r.evidence == row.evidence]
        slower = [ratio(f, "skip", form) for r in alike for f in measured(r)]
        assert f"{min(slower):.2g} to {max(slower):.2g} times" in row.evidence and statistics.median(slower) > 1.5
        assert all(f["forms"][form]["error"] <= f["forms"]["skip"]["error"] for r in alike for f in measured(r))
    elif row.form == "leave":
        assert error > 100 or middle("spelled out", "add, norm") < 0.95
    elif row.since == (1, 30):
        assert middle("spelled out", "add, norm") > 1.5 and middle("skip", "add, norm") > 1.1 and error < 20
    else:
        assert middle("spelled out", "add, norm") > 0.9


def test_operators_in_float32_pay_where_they_were_measured_to() -> None:
    found = [o for ops in json.loads(RESULT.read_text())["operators"].values() for o in ops]
    assert {o["operator"] for o in found} == set(WIDE)
    ratios = [o["float32 us"] / o["us"] for o in found]
    rows = {(row.target, row.kind): row for row in ROWS if row.what == "half"}
    assert set(rows) == {(target, op) for target in ("ort-cpu", "onnx", "normfuse") for op in WIDE}
    for row in rows.values():
        assert f"{min(ratios):.2f} to {max(ratios):.2f} of the time" in row.evidence and max(ratios) < 1


def test_our_operators_against_the_skip_operators() -> None:
    chains = json.loads((RESULT.parent / "ort-ops.json").read_text())["chains"]
    found = [c["ms"].get("normfuse, unrounded", c["ms"]["normfuse"]) / time for c in chains
             if (c["rows"], c["size"]) == (512, 2048) for form, time in c["ms"].items() if form.startswith("Skip")]
    (evidence,) = {row.evidence for row in ROWS if row.target == "normfuse" and row.what == "skip"}
    assert f"{min(found):.2f} to {max(found):.2f} of the time" in evidence


def test_every_row_says_how_it_is_known() -> None:
    assert all(row.evidence.startswith(("measured", "tried", "cited")) for row in ROWS)
    assert {row.form for row in ROWS} <= {"operator", "skip", "leave", "apart", "float32", "refuse"}


@pytest.mark.parametrize("text", ["new", "1", "1.x", "31"])
def test_a_version_that_is_none(text: str, tmp_path: Path) -> None:
    onnx.save(model(ADD, "y s"), tmp_path / "in.onnx")
    with pytest.raises(InputError, match="is not a version"):
        config = normfuse.Config(target="ort-cpu", ort_version=text)
        normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    assert not (tmp_path / "out.onnx").exists()


def test_a_version_that_is_too_old(tmp_path: Path) -> None:
    onnx.save(model(ADD, "y s"), tmp_path / "in.onnx")
    old = normfuse.Config(target="ort-cpu", ort_version="1.19.2")
    with pytest.raises(UnsupportedError, match=r"1.19 is older .* 1.20; use target 'onnx'"):
        normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", old)
    assert not (tmp_path / "out.onnx").exists()
    normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", normfuse.Config(ort_version="1.19.2"))


def test_a_version_newer_than_measured(tmp_path: Path) -> None:
    _, report = rewritten(model(ADD, "y s"), tmp_path, "ort-cpu", "1.99")
    assert "1.99 on CPU, newer than 1.32, the newest measured" in report.notes[0]


def test_the_installed_version(tmp_path: Path) -> None:
    import onnxruntime

    found = targets.runtime_version("")
    assert ".".join(map(str, found)) == ".".join(onnxruntime.__version__.split(".")[:2])


# -- each form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "version", "numerics", "lines", "want"), [
    ("ort-cpu", "1.29", "exact", ADD, {SKIP: 1}),
    ("ort-cpu", "1.30", "exact", ADD, {"rms_norm": 1}),
    ("ort-cuda", "1.30", "exact", ADD, {SKIP: 1}),
    ("onnx", "1.29", "exact", ADD, {"rms_norm": 1}),
    ("ort-cpu", "1.29", "exact", ADD_LAYER, {}),  # no operator there is as exact as the model
    ("ort-cpu", "1.29", "fast", ADD_LAYER, {SKIP_LAYER: 1}),
    ("ort-cpu", "1.30", "exact", ADD_LAYER, {"LayerNormalization": 1}),
    ("ort-cuda", "1.31", "exact", ADD_LAYER, {"LayerNormalization": 1}),
    ("ort-cuda", "1.31", "fast", ADD_LAYER, {SKIP_LAYER: 1}),
])  # fmt: skip
@pytest.mark.parametrize("shape", ["2,3,16", "6,16", "batch,rows,16"])
def test_form(target: str, version: str, numerics: str, lines: str, want: dict[str, int], shape: str,
              tmp_path: Path) -> None:  # fmt: skip
    made = model(lines, "y s", shape=shape)
    found, report = rewritten(made, tmp_path, target, version, numerics=numerics)
    assert operators(found) == want
    assert [o.name for o in found.graph.output] == ["y", "s"]
    assert bool(report.notes) == (target != "onnx")
    if target != "onnx" and want:
        form = "skip" if {SKIP, SKIP_LAYER} & set(want) else "operator"
        assert f": {form} (" in report.notes[1] and report.notes[1].startswith("1 x ")
    if not want:
        assert "leave" in report.notes[1] and report.norms[0].action == "left" and "errs" in report.norms[0].reason
    rng = np.random.default_rng(1)
    dims = [2, 3, N] if shape == "batch,rows,16" else [int(d) for d in shape.split(",")]
    feeds = {v: (rng.standard_normal(dims) + far).astype("f4") for v, far in (("x", 0), ("r", 0.5))}
    before, after = (session(tmp_path / f"{p}.onnx").run(None, feeds) for p in ("in", "out"))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lines", "outputs", "shape", "types"), [
    (ADD, "y s", "1,2,3,16", {}),  # rank 4
    (ADD, "y s", "2,3,16", {"r": "float[1,3,16]"}),  # a broadcast
    (ADD, "y s", "?,3,16", {}),  # shapes that are not proved equal
    (ADD + " z = Add(y, v)", "z s", "2,3,16", {}),  # the operator has no bias
    ("s = Add(x, r) y = RMSNormalization<axis=1>(s, V)", "y", "2,3,16", {"V": "float[3,16]"}),  # two axes
])  # fmt: skip
def test_no_skip_where_a_condition_is_broken(lines: str, outputs: str, shape: str, types: dict[str, str],
                                             tmp_path: Path) -> None:  # fmt: skip
    inputs = " ".join(n for n in "xrV" if n in lines)
    made = model(lines, outputs, 23 if "RMSN" in lines else 18, inputs, shape, types)
    found, _ = rewritten(made, tmp_path, "ort-cpu", "1.29")
    assert SKIP not in operators(found)


def half(lines: str, dtype: str) -> onnx.ModelProto:
    """A model of half types: x and r, and a weight of that type."""
    made = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> g ({dtype}[2,3,16] x, {dtype}[2,3,16] r) '
                                   f"=> ({dtype}[2,3,16] y, {dtype}[2,3,16] s) {{ {lines} }}")  # fmt: skip
    code = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    weight = np.linspace(0.5, 1.5, N)
    made.graph.initializer.extend([
        onnx.helper.make_tensor("w", code, [N], weight), onnx.numpy_helper.from_array(np.array(2.0, "f4"), "two"),
        onnx.numpy_helper.from_array(np.array(1e-6, "f4"), "eps"), onnx.numpy_helper.from_array(np.array([-1]), "last"),
    ])  # fmt: skip
    return made


def spelled(last: bool, code: int) -> str:
    """An RMSNorm of s in float32, cast back before or after the weight."""
    start = ("s = Add(x, r) c = Cast<to=1>(s) q = Pow(c, two) m = ReduceMean(q, last) e = Add(m, eps) t = Sqrt(e) "
             "n = Div(c, t) ")  # fmt: skip
    back = f"Cast<to={code}>"
    return start + (f"wf = Cast<to=1>(w) z = Mul(n, wf) y = {back}(z)" if last else f"h = {back}(n) y = Mul(h, w)")


@pytest.mark.parametrize(("target", "version", "numerics", "last", "skip"), [
    ("ort-cuda", "1.27", "exact", True, True),
    ("ort-cuda", "1.26", "exact", True, False),  # sums in half
    ("ort-cuda", "1.27", "exact", False, False),  # rounds elsewhere
    ("ort-cuda", "1.27", "fast", False, True),
    ("ort-cpu", "1.29", "exact", True, False),  # slower there
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "code"), [("float16", 10), ("bfloat16", 16)])
def test_half_types(target: str, version: str, numerics: str, last: bool, skip: bool, dtype: str, code: int,
                    tmp_path: Path) -> None:  # fmt: skip
    found, _ = rewritten(half(spelled(last, code), dtype), tmp_path, target, version, numerics=numerics)
    assert (SKIP in operators(found)) == skip


def test_a_type_that_the_runtime_lacks(tmp_path: Path) -> None:
    made = half(spelled(False, 16), "bfloat16")
    found, report = rewritten(made, tmp_path, "ort-cpu")
    assert [r.code for r in report.refusals] == ["NF203"] and report.norms[0].action == "refused"
    assert "no kernel for bfloat16" in report.refusals[0].message and "'normfuse'" in report.refusals[0].message
    assert [n.op_type for n in found.graph.node] == [n.op_type for n in made.graph.node]
    wide, _ = rewritten(half(spelled(True, 16), "bfloat16"), tmp_path, "ort-cpu")  # there it is a norm of float32
    assert operators(wide) == {"rms_norm": 1}


LINEAR = "f = Neg(x) t = Add(f, v) s = Add(t, r) "
BARE = LINEAR + layer("s", "y").replace("y = Add(y_s, v)", "y = Identity(y_s)")


@pytest.mark.parametrize(("lines", "numerics", "want"), [
    (LINEAR + rms("s", "y"), "exact", [SKIP, "f", "r", "w", "v"]),
    (LINEAR + layer("s", "y"), "fast", [SKIP_LAYER, "f", "r", "w", "v", "v"]),
    (BARE, "fast", [SKIP_LAYER, "f", "r", "w", "", "v"]),
])  # fmt: skip
@pytest.mark.parametrize(("far", "small"), [(0.0, 1.0), (100.0, 1.0), (0.0, 1e-4)])
def test_a_skip_operator_takes_the_bias_of_a_linear_layer(lines: str, numerics: str, want: list[str], far: float,
                                                          small: float, tmp_path: Path) -> None:  # fmt: skip
    found, _ = rewritten(model(lines, "y s"), tmp_path, "ort-cpu", "1.29", numerics=numerics)
    (node,) = [n for n in found.graph.node if "Skip" in n.op_type]
    assert [node.op_type, *node.input] == want and "Add" not in {n.op_type for n in found.graph.node}
    rng, row = np.random.default_rng(3), np.linspace(0.5, 1.5, N)
    feeds = {v: (small * rng.standard_normal((2, 3, N)) + far).astype("f4") for v in "xr"}
    bias = (row[::-1] - 1).astype("f4").astype("f8")
    s = -feeds["x"].astype("f8") + bias + feeds["r"]  # the operator adds these three in another order
    h = s - s.mean(-1, keepdims=True) if want[0] == SKIP_LAYER else s
    true = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * row + (bias if "y = Add(y_s, v)" in lines else 0)
    before, after = (session(tmp_path / f"{p}.onnx").run(None, feeds) for p in ("in", "out"))
    for a, b, c in zip(before, after, (true, s), strict=True):
        assert np.abs(b - c).max() <= 2 * np.abs(a - c).max() + 2.0**-20 * np.abs(c).max()


@pytest.mark.parametrize(("numerics", "inputs"), [("exact", 3), ("fast", 4)])
def test_a_skip_operator_of_half_types_takes_no_bias_that_is_rounded_before(numerics: str, inputs: int,
                                                                            tmp_path: Path) -> None:  # fmt: skip
    lines = "f = Neg(x) k = Add(f, w) " + spelled(True, 10).replace("Add(x, r)", "Add(k, r)")
    found, _ = rewritten(half(lines, "float16"), tmp_path, "ort-cuda", "1.27", numerics=numerics)
    (node,) = [n for n in found.graph.node if "Skip" in n.op_type]
    assert len(node.input) == inputs


def shifted(h: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """h less its maximum."""
    return np.asarray(h - h.max(axis, keepdims=True))


TAKEN_APART: dict[str, Callable[[npt.NDArray[Any]], Any]] = {
    "Softmax<axis=-1>": lambda h: np.exp(shifted(h, -1)) / np.exp(shifted(h, -1)).sum(-1, keepdims=True),
    "LogSoftmax<axis=0>": lambda h: shifted(h, 0) - np.log(np.exp(shifted(h, 0)).sum(0, keepdims=True)),
    'Gelu<approximate="tanh">': lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
    "HardSwish": lambda h: h * np.clip(h / 6 + 0.5, 0, 1),
    "HardSigmoid<alpha=0.3>": lambda h: np.clip(np.float64(np.float32(0.3)) * h + 0.5, 0, 1),
    "LeakyRelu<alpha=0.1>": lambda h: np.where(h < 0, np.float64(np.float32(0.1)) * h, h),
}
"""Operators that ONNX Runtime has in float32 only, and their definitions."""


def lone(call: str, dtype: str = "float16", opset: int = 0) -> onnx.ModelProto:
    """An operator between two others, whose result is also an output."""
    low, high = WIDE.get(call.partition("<")[0], (13, 99))
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset or max(low, min(high, 18))}]> g ({dtype}[b,40] x) => '
        f"({dtype}[b,40] y, {dtype}[b,40] z) {{ h = Neg(x) y = {call}(h) z = Abs(y) }}")  # fmt: skip


@pytest.mark.parametrize("call", TAKEN_APART)
def test_an_operator_of_half_types_is_computed_in_float32(call: str, tmp_path: Path) -> None:
    """One kernel with two casts runs, and its result is no further from float64 than that of its parts."""
    made = lone(call)
    found, report = rewritten(made, tmp_path, "ort-cpu")
    name = call.partition("<")[0]
    assert [n.op_type for n in found.graph.node] == ["Neg", "Cast", name, "Cast", "Abs"]
    assert list(found.graph.node[2].attribute) == list(made.graph.node[1].attribute)
    assert found.graph.node[3].output == made.graph.node[1].output
    assert report.notes[1].startswith(f"1 x {name}: float32 (float16 in 1.20 and newer; measured")
    rng = np.random.default_rng(4)
    rows = np.concatenate([rng.standard_normal((4, 40)) * scale for scale in (1e-4, 1, 30, 5e3)])
    rows[0, 1:4] = 3e4, -3e4, 0
    x = {"x": rows.astype(np.float16)}
    y = TAKEN_APART[call](-x["x"].astype("f8"))
    before, after = (session(tmp_path / f"{p}.onnx").run(None, x) for p in ("in", "out"))
    for a, b, c in zip(before, after, (y, np.abs(y)), strict=True):
        assert b.dtype == np.float16 and np.isfinite(b).all()
        step = np.spacing(np.abs(c).astype(np.float16)).astype("f8")  # one in the last place
        assert (np.abs(b - c) <= np.maximum(np.abs(a - c), 0.51 * step)).all()


def test_a_softmax_of_a_row_that_is_masked(tmp_path: Path) -> None:
    rewritten(lone("Softmax"), tmp_path, "ort-cpu")
    x = np.zeros((2, 40), np.float16)
    x[0, 1:], x[1] = np.inf, np.inf  # all but one, and all: h = -x
    before, after = (session(tmp_path / f"{p}.onnx").run(["y"], {"x": x})[0] for p in ("in", "out"))
    np.testing.assert_array_equal(before, after)
    assert after[0, 0] == 1 and np.isnan(after[1]).all()


@pytest.mark.parametrize(("call", "dtype", "opset", "target"), [
    ("Softmax", "float", 18, "ort-cpu"),  # there is a kernel
    ("Softmax", "bfloat16", 18, "ort-cpu"),  # not even what it is made of runs
    ("Softmax", "float16", 12, "ort-cpu"),  # the standard has no parts of it yet: one kernel, between casts
    ("LeakyRelu", "float16", 22, "ort-cpu"),  # no more
    ("Relu", "float16", 18, "ort-cpu"),
    ("Softmax", "float16", 18, "onnx"),
    ("Softmax", "float16", 18, "ort-cuda"),
    ("Softmax", "float16", 18, "normfuse"),
])  # fmt: skip
def test_an_operator_that_stays_as_it_is(call: str, dtype: str, opset: int, target: str, tmp_path: Path) -> None:
    made = lone(call, dtype, opset)
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", normfuse.Config(target=target))  # type: ignore[arg-type]
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()
    told = [note for note in report.notes if note.startswith(f"1 x {call}: leave") and "target ort-cpu" in note]
    assert len(told) == (target in ("onnx", "normfuse"))


def test_an_operator_behind_a_skip_operator_that_is_taken_apart(tmp_path: Path) -> None:
    made = half("", "float16")
    made.graph.node.extend([
        onnx.helper.make_node(SKIP, ["x", "r", "w"], ["h", "", "", "s"], domain="com.microsoft", epsilon=1e-6),
        onnx.helper.make_node("Softmax", ["h"], ["y"]),
    ])  # fmt: skip
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    found, report = rewritten(made, tmp_path, "ort-cpu", "1.31")
    ops = [n.op_type for n in found.graph.node]
    assert ops[-3:] == ["Cast", "Softmax", "Cast"] and SKIP not in ops and len(report.notes) >= 3


@pytest.mark.parametrize("far", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("small", [1.0, 1e-4])
def test_the_operators_of_the_runtime_are_exact(far: float, small: float, tmp_path: Path) -> None:
    """On hostile rows, in the runtime that is installed, they are no further from float64 than the model is."""
    made = model(ADD, "y s")
    rewritten(made, tmp_path, "ort-cpu", "1.29")
    rng = np.random.default_rng(2)
    feeds = {v: (small * rng.standard_normal((2, 3, N)) + far).astype("f4") for v in "xr"}
    s = (feeds["x"] + feeds["r"]).astype("f8")
    true = s / np.sqrt((s * s).mean(-1, keepdims=True) + float(np.float32(1e-6)))
    true *= np.linspace(0.5, 1.5, N).astype("f4")
    before, after = (session(tmp_path / f"{p}.onnx").run(["y"], feeds)[0] for p in ("in", "out"))
    unit = 2.0**-23 * np.abs(true).max()
    assert np.abs(after - true).max() <= 2 * np.abs(before - true).max() + 4 * unit


# -- whole models ------------------------------------------------------------------------------------------------------


def placed(name: str, kind: str) -> Counter[str]:
    """The operators with a neighbour that a family gets."""
    layers = FUSED.get(name) or OTHERS[kind]
    return Counter({op: n * LAYERS for op, n in layers.items()}) + MORE.get(name, Counter())


@pytest.mark.parametrize(("target", "version"), [*CHOICES, ("normfuse", "")])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, target: str, version: str, tmp_path: Path) -> None:
    family, source, out = FAMILIES[name], cached_export(name, 18), tmp_path / "out.onnx"
    # what differs between the runtimes are the operators, and ort-cuda has those of ort-cpu before 1.30
    verify = "sites" if target == "ort-cuda" else "model"
    config = normfuse.Config(target=target, ort_version=version, verify=verify)  # type: ignore[arg-type]
    report = normfuse.rewrite(source, out, config)
    assert report.model_check is None or report.model_check["equal"]
    assert len(report.norms) == family.norms and not report.refusals
    onnx.checker.check_model(out, full_check=True)
    assert normfuse.rewrite(out, tmp_path / "again.onnx", config).fused == 0
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
    assert Counter(n.placement for n in normfuse.inspect(out).norms) == family.placements
    made = operators(onnx.load(out))
    if target == "normfuse":
        single = Counter({op: n for op, n in made.items() if op.startswith(("rms_norm", "layer_norm", "LayerN"))})
        found: Counter[str] = Counter()
        for op, n in (made - single).items():
            found[next(known for known in PLACED if op.removeprefix("bias_").startswith(known))] += n
        assert found == placed(name, report.norms[-1].kind)
    elif version == "1.29":
        assert all(n.action in ("fused", "kept") or n.kind == "layer_norm" for n in report.norms)
    else:
        assert all(n.action in ("fused", "kept") for n in report.norms)
    want = placed(name, report.norms[-1].kind)
    beside = want["add_rms_norm"] + want["norm_add_norm"]
    if target == "ort-cuda" or version == "1.29":
        assert made[SKIP] == beside + (name == "olmo2")  # its last sum goes to the final norm, and not to norm_add


@pytest.mark.parametrize(("name", "target", "version"), share(
    ((name, *choice) for name in ("llama", "gemma3", "olmo2", "gpt2")
     for choice in (*CHOICES, ("onnx", ""), ("normfuse", ""))), 2),
)  # fmt: skip
def test_half_precision_is_no_further_from_float64(name: str, target: str, version: str, tmp_path: Path) -> None:
    family, out = FAMILIES[name], tmp_path / "out.onnx"
    module = family.build().half()
    source = cached(f"{name}-half-18-{digest(family)}.onnx",
                    lambda path: export_onnx(module, family.args(), path, 18))  # fmt: skip
    config = normfuse.Config(target=target, ort_version=version)  # type: ignore[arg-type]
    normfuse.rewrite(source, out, config)
    onnx.checker.check_model(out, full_check=True)
    true = module.double()(*family.args()).detach().numpy()
    feeds = dict(zip([i.name for i in session(source).get_inputs()], (a.numpy() for a in family.args()), strict=True))
    before, after = (np.abs(session(p).run(None, feeds)[0].astype("f8") - true).max() for p in (source, out))
    assert after <= 2 * before


def loaded(path: Path) -> tuple[Any, Counter[str]]:
    """A session, and the operators that ONNX Runtime runs in it after fusions of its own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, f"{path}.loaded"
    found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ops = Counter(n.op_type.removeprefix("Fused") for n in onnx.load(f"{path}.loaded").graph.node)
    return found, ops


@pytest.mark.parametrize(("name", "target"), [
    *share(((name, "onnx") for name in FAMILIES), 2), *share(((name, "normfuse") for name in FAMILIES), 2, 1),
])  # fmt: skip
def test_it_runs_without_our_library(name: str, target: str, tmp_path: Path) -> None:
    """In ONNX's reference evaluator, and in ONNX Runtime, where all that is more in it are norms; results are equal."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    shutil.copy(cached_export(name, 18), source)
    normfuse.rewrite(source, out, normfuse.Config(target=target))  # type: ignore[arg-type]
    (before, was), (after, now) = loaded(source), loaded(out)
    more = {op for op in now - was if "Norm" not in op}
    assert more <= ({"Reshape", "Div"} if target == "normfuse" else set())  # a view as in the model; instead of Mul
    assert sum(now.values()) <= sum(was.values()) + (now - was)["Reshape"]
    names = [str(i.name) for i in before.get_inputs()]
    feeds = dict(zip(names, (a.numpy() for a in FAMILIES[name].args()), strict=True))
    want = before.run(None, feeds)[0]
    results = [after.run(None, feeds)[0]]
    if name != "bert":  # the evaluator of onnx 1.23 does not run the GatherElements of the input
        results += [np.asarray(next(iter(ReferenceEvaluator(onnx.load(out)).run(None, feeds))))]
    for found in results:
        assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("target", "version"), [("onnx", ""), *CHOICES, ("normfuse", "")])
def test_the_recogniser_of_pp_ocr(target: str, version: str, tmp_path: Path) -> None:
    """A pretrained model, exported by Paddle, its LayerNorms spelled out."""
    found = importlib.util.find_spec("rapidocr_onnxruntime")
    if found is None or found.origin is None:
        pytest.skip("rapidocr-onnxruntime is not installed")
    source, out = Path(found.origin).parent / "models/ch_PP-OCRv4_rec_infer.onnx", tmp_path / "out.onnx"
    config = normfuse.Config(target=target, ort_version=version)  # type: ignore[arg-type]
    report = normfuse.rewrite(source, out, config)
    assert len(report.norms) == 5 and not report.refusals
    assert {n.action for n in report.norms} == ({"left"} if version == "1.29" else {"fused"})
    onnx.checker.check_model(out, full_check=True)
    if target == "normfuse":
        assert operators(onnx.load(out))["bias_add_layer_norm"] == 4
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 48, 320)).astype("f4")
    a, b = (session(path).run(None, {"x": image})[0] for path in (source, out))
    assert np.abs(a - b).max() <= 1e-5 and (a.argmax(-1) == b.argmax(-1)).all()
    normfuse.rewrite(out, tmp_path / "again.onnx", config)
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()
