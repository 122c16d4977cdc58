"""Nodes of ONNX that compute the same twice are one value to the algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import normfuse
from normfuse.frontends.onnx_twins import twins
from normfuse.io.files import from_proto
from normfuse.sessions import session

N = 16
TAIL = "q = Mul(a, a) v = ReduceMean<keepdims = 1>(q, axes) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Mul(n, w)"
TWICE = {
    "cast": ("a = Cast<to = 1>(x) c = Cast<to = 1>(x)", "float16"),
    "transpose": ("a = Transpose<perm = [0, 2, 1]>(x) c = Transpose<perm = [0, 2, 1]>(x)", "float"),
    "slice": ("a = Slice(x, zero, size, axes) c = Slice(x, zero, size, axes)", "float"),
    "chain": ("b = Relu(x) a = Add(b, w) d = Relu(x) c = Add(d, w)", "float"),
    "two results": ("a, i = Split<axis = 2, num_outputs = 2>(x) c, j = Split<axis = 2, num_outputs = 2>(x)", "float"),
}


def model(body: str, kind: str = "float", more: str = "", inside: str = "f4") -> onnx.ModelProto:
    width = 2 * N if "Split" in body or "Slice" in body else N
    shape = f"{N}, {N}" if "Transpose" in body else f"4, {width}"
    made = onnx.parser.parse_model(f'''<ir_version: 8, opset_import: ["": 18]>
        g ({kind}[B, {shape}] x) => (float[B, m, {N}] y{more}) {{ {body} }}''')
    rng = np.random.default_rng(0)
    eps = np.array(1e-5 if inside == "f4" else 1e-3, inside)
    arrays: dict[str, Any] = {"w": (rng.random(N) + 1).astype(inside), "eps": eps, "axes": np.array([-1]),
                              "zero": np.array([0]), "size": np.array([N])}  # fmt: skip
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    onnx.checker.check_model(made, full_check=True)
    return made


def equal(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    shape = [3 if d.dim_param else d.dim_value for d in one.graph.input[0].type.tensor_type.shape.dim]
    kind = {1: "f4", 10: "f2"}[one.graph.input[0].type.tensor_type.elem_type]
    x = (np.random.default_rng(1).standard_normal(shape) + 3).astype(kind)
    results = [session(m.SerializeToString()).run(None, {"x": x}) for m in (one, other)]
    return all(np.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("twice", TWICE)
def test_what_is_computed_twice_is_one_value(twice: str, kept: bool) -> None:
    """Also where one of the two is an output of the graph, which stays."""
    ahead, kind = TWICE[twice]
    given = model(f"{ahead} {TAIL}", kind, f", float[B, m, {N}] c" if kept else "")
    before = given.SerializeToString()
    (norm,) = normfuse.inspect(given).norms
    read, _ = from_proto(given, Path("m"))
    assert normfuse.inspect(read).norms[0].fact == norm.fact and len(list(read.graph)) == len(given.graph.node)
    made, report = normfuse.optimize(given)
    assert report.fused == 1 and equal(given, made)
    assert len(made.graph.node) == (len(given.graph.node) - 6) // 2 + 1 + kept
    assert any("merged" in note for note in report.notes) == (twice != "cast")  # it is found as it is
    assert report.nodes_before == len(given.graph.node)
    again, report = normfuse.optimize(made)
    assert again.SerializeToString() == made.SerializeToString() and not any("merged" in n for n in report.notes)
    assert given.SerializeToString() == before


def test_an_input_that_is_cast_to_float16_for_each_reader(tmp_path: Path) -> None:
    """As onnxconverter-common does, with keep_io_types=True."""
    tail = TAIL.replace("y =", "h =")
    given = model(f"a = Cast<to = 10>(x) c = Cast<to = 10>(x) {tail} y = Cast<to = 1>(h)", inside="f2")
    (norm,) = normfuse.inspect(given).norms
    assert norm.kind == "rms_norm"
    onnx.save(given, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", normfuse.Config(verify="model"))
    assert report.fused == 1 and any("merged" in note for note in report.notes)


def test_a_model_without_norms_is_left_as_it_is(tmp_path: Path) -> None:
    """Such as an average for each channel of two equal casts, byte for byte."""
    lines = "a = Cast<to = 1>(x) b = Cast<to = 1>(x) m = ReduceMean<keepdims = 1>(a, axes) y = Sub(b, m)"
    given = model(lines, "float16")
    onnx.save(given, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert not report.norms and not report.notes
    assert (tmp_path / "in.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_results_that_are_left_out_are_not_read(tmp_path: Path) -> None:
    """Of two that differ in that, neither is the other."""
    given = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 18]>
        g (float[1, 2, 8, 8] x) => (float[1, 2, 4, 4] y, int64[1, 2, 4, 4] k) {
            a, no = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
            b, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) q = Mul(a, a)
            v = ReduceMean<keepdims = 1>(q, axes) e = Add(v, eps) r = Sqrt(e) y = Div(b, r) k = Identity(i) }''')
    given.graph.node[0].output[1] = ""
    arrays: dict[str, Any] = {"axes": np.array([-1]), "eps": np.float32(1e-5)}
    given.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    made, _ = normfuse.optimize(given)
    assert equal(given, made)


@pytest.mark.parametrize("ahead", [
    "a = Cast<to = 1>(x) h = Cast<to = 10>(x) c = Cast<to = 1>(h)",
    "a = LeakyRelu<alpha = 0.1>(x) c = LeakyRelu<alpha = 0.2>(x)",
    "a = Add(x, w) c = Add(x, eps)",
    "r = RandomUniformLike(x) t = RandomUniformLike(x) a = Add(x, r) c = Add(x, t)",
])  # fmt: skip
def test_what_is_not_the_same_is_not(ahead: str) -> None:
    given = model(f"{ahead} {TAIL}")
    made, report = normfuse.optimize(given)
    assert not report.norms and not report.notes
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in given.graph.node]


def test_only_what_a_mean_is_taken_of() -> None:
    """A graph without norms is left as it is."""
    given = model("a = Relu(x) b = Relu(x) y = Mul(a, b)")
    read, _ = from_proto(given, Path("m"))
    assert not twins(read)
    made, report = normfuse.optimize(given)
    assert [n.op_type for n in made.graph.node] == ["Relu", "Relu", "Mul"] and not report.notes
