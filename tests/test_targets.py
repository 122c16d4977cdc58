"""The forms for each runtime: where they hold, and that what comes out runs and is equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import normfuse
from normfuse.sessions import session
from normfuse.targets import WIDE
from tests.onnx_lines import N, layer, model, rms
from tests.targeted import ADD, ADD_LAYER, SKIP, SKIP_LAYER, operators, rewritten


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
    assert bool(report.notes) == (target != "onnx" or any("function" in n.emitted for n in report.norms))
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
    ("LogSoftmax", "float16", 18, "normfuse"),
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
