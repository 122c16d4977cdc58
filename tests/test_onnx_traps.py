"""ONNX graphs in which a shape, a constant or a name is not what it seems: outputs, their shapes too, stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import normfuse
from normfuse.errors import InputError, UnsupportedError
from normfuse.verify import session

RNG = np.random.default_rng(0)
TARGETS = ("onnx", "normfuse", "ort-cpu")


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def model(inputs: str, lines: str, outputs: str = "float[A,B] y", opset: int = 18, functions: str = "",
          **held: Any) -> onnx.ModelProto:  # fmt: skip
    """A graph of a text, with constants."""
    head = f'<ir_version: 10, opset_import: ["": {opset}, "normfuse": 1]>'
    made = onnx.parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {lines} }} {functions}")
    held = {"eps": np.array(1e-5, np.float32), "last": np.array([-1])} | held
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in held.items() if n in lines)
    if not functions:
        del made.opset_import[1]
    return made


def check(made: onnx.ModelProto, feeds: list[dict[str, Any]], folder: Path, norms: int,
          target: Any = "onnx") -> onnx.ModelProto:  # fmt: skip
    """So many norms are fused, ONNX Runtime loads the result, and its outputs are those of the model."""
    onnx.save(made, folder / "in.onnx")
    report = normfuse.rewrite(folder / "in.onnx", folder / "out.onnx", normfuse.Config(target=target), overwrite=True)
    assert sum(n.action == "fused" for n in report.norms) == norms, report.refusals
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)
    before, after = (session(folder / name) for name in ("in.onnx", "out.onnx"))
    for given in feeds:
        for a, b in zip(before.run(None, given), after.run(None, given), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return onnx.load(folder / "out.onnx")


ROOT = "sq = Mul({0}, {0}) ms = ReduceMean(sq, last) a = Add(ms, eps) r = Sqrt(a) "
OLD = "sq = Mul({0}, {0}) ms = ReduceMean<axes=[{1}]>(sq) a = Add(ms, eps) r = Sqrt(a) "


@pytest.mark.parametrize(("lines", "norms"), [
    (ROOT.format("x") + "sh = Shape<end=1>(z) to = Concat<axis=0>(sh, sixteen) e = Expand(r, to) y = Div(x, e)", 0),
    ("sh = Shape<end=1>(z) to = Concat<axis=0>(sh, sixteen) e = Expand(x, to) " + ROOT.format("x")
     + "y = Div(e, r)", 0),
    (ROOT.format("x") + "to = Shape(x) e = Expand(r, to) y = Div(x, e)", 1),
])  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
def test_an_expand_of_rows(lines: str, norms: int, target: str, tmp_path: Path) -> None:
    """With one row, it makes as many as something else has."""
    made = model("float[N,16] x, float[M,4] z", lines, sixteen=np.array([16]))
    check(made, [{"x": numbers(1, 16), "z": numbers(3, 4)}], tmp_path, norms, target)


@pytest.mark.parametrize(("op", "eps"), [("Max(e1, e2, e3)", 1e-2), ("Min(e1, e2, e3)", 1e-7), ("Max(e1)", 1e-6)])
def test_the_largest_of_three(op: str, eps: float, tmp_path: Path) -> None:
    made = model("float[N,16] x", f"eps = {op} " + ROOT.format("x") + "y = Div(x, r)", e1=np.float32(1e-6),
                 e2=np.float32(1e-7), e3=np.float32(1e-2))  # fmt: skip
    del made.graph.initializer[[v.name for v in made.graph.initializer].index("eps")]
    check(made, [{"x": numbers(2, 16) * np.float32(0.01)}], tmp_path, 1)
    assert normfuse.inspect(made).norms[0].eps == pytest.approx(eps)


def test_a_shape_that_the_caller_may_replace(tmp_path: Path) -> None:
    made = model("float[N,16] x, int64[2] sh", """s = Reshape(x, sh) sq = Mul(s, s) su = ReduceSum(sq, last)
        ms = Mul(su, eighth) a = Add(ms, eps) r = Sqrt(a) y = Div(s, r)""", sh=np.array([-1, 8]),
                 eighth=np.float32(0.125))  # fmt: skip
    x = numbers(2, 16)
    check(made, [{"x": x}, {"x": x, "sh": np.array([-1, 4])}], tmp_path, 0)


@pytest.mark.parametrize(("inputs", "norms"), [("float[N,1,16] x", 0), ("float[3,1,16] x", 1)])
def test_a_squeeze_of_all_that_are_1(inputs: str, norms: int, tmp_path: Path) -> None:
    made = model(inputs, "s = Squeeze(x) " + OLD.format("s", -1) + "n = Div(s, r) y = Mul(n, w)", opset=17,
                 w=numbers(1, 16) if norms == 0 else numbers(16))  # fmt: skip
    check(made, [{"x": numbers(n, 1, 16)} for n in ((1, 3) if norms == 0 else (3,))], tmp_path, norms)


def test_a_row_of_a_matrix_of_sizes(tmp_path: Path) -> None:
    made = model("float[N,16] x", """sh = Shape(x) u = Unsqueeze(sh, zero) t = Gather<axis=0>(u, first)
        s = Reshape(x, t) """ + OLD.format("s", 0) + "y = Div(s, r)", opset=17, zero=np.array([0]),
                 first=np.array(0))  # fmt: skip
    x = numbers(3, 16)
    before = session(made.SerializeToString()).run(None, {"x": x})
    check(made, [{"x": x}], tmp_path, 1)
    assert before[0].shape == (3, 16)


BODY = """<domain: "normfuse", opset_import: ["": 18]> {} <axes, epsilon> (x) => (y) {{ y = Add(x, x) }}"""


def test_a_function_of_our_name_that_does_something_else(tmp_path: Path) -> None:
    lines = "z = normfuse.rms_norm_plain<axes=[-1], epsilon=0.1>(x) " + ROOT.format("x") + "y = Div(x, r)"
    made = model("float[N,16] x", lines, "float[A,B] y, float[N,16] z", functions=BODY.format("rms_norm_plain"))
    onnx.save(made, tmp_path / "in.onnx")
    with pytest.raises(UnsupportedError, match=r"a function normfuse\.rms_norm_plain of its own, which does something"):
        normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_an_operator_of_another_domain_is_not_the_standards(tmp_path: Path) -> None:
    body = """<domain: "normfuse", opset_import: ["": 18]> Neg (x) => (y)
        { t = Abs(x) c = Constant<value_float = -1000.0>() y = Mul(t, c) }"""
    lines = "e = normfuse.Neg(e0) sq = Mul(x, x) ms = ReduceMean(sq, last) a = Sub(ms, e) r = Sqrt(a) y = Div(x, r)"
    made = model("float[N,16] x", lines, functions=body, e0=np.float32(1e-6))
    report = normfuse.inspect(made)
    assert all(norm.eps == pytest.approx(1e-3) for norm in report.norms)


@pytest.mark.parametrize(("inputs", "opset", "w", "behind"), [
    ("float[M] x", 17, np.float32(2.5), ""), ("float[4] x", 13, numbers(4), ""),
    ("float[4] x", 13, numbers(4), "z = Add(y, p)"),
])  # fmt: skip
@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_of_one_row_without_other_axes(inputs: str, opset: int, w: Any, behind: str, layer: bool, target: str,
                                              tmp_path: Path) -> None:  # fmt: skip
    """ONNX Runtime's own fusion of such breaks the model, so that it must not see the pattern in a function."""
    x = "d" if layer else "x"
    lines = ("m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) " if layer else "") + OLD.format(x, -1)
    outputs = "float[A,B] z" if behind else "float[A] y"
    made = model(inputs, lines + f"n = Div({x}, r) y = Mul(n, w) {behind}", outputs, opset, w=w, p=numbers(2, 1))
    check(made, [{"x": numbers(4)}], tmp_path, 1, target)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_a_mean_that_a_branch_reads(early: bool, target: str, tmp_path: Path) -> None:
    """The operator that would give it stands behind the branch, or ahead of it."""
    branch = """z = If (c) <then_branch = t1 () => (float[N,1] za) { za = Neg(m) },
                           else_branch = t2 () => (float[N,1] zb) { zb = Abs(m) }> """
    lines = "m = ReduceMean(x, last) " + branch * early + "d = Sub(x, m) " + ROOT.format("d") + "y = Div(d, r) "
    made = model("float[N,16] x, bool c", lines + branch * (not early), "float[N,16] y, float[N,1] z")
    found = check(made, [{"x": numbers(3, 16), "c": np.array(c)} for c in (True, False)], tmp_path, not early, target)
    assert ("LayerNormalization" in [node.op_type for node in found.graph.node]) is not early


@pytest.mark.parametrize(("lines", "want"), [
    ("Slice(k, five, low, zero, back)", [1.0]), ("ReduceProd<keepdims=0, noop_with_empty_axes=1>(k)", [1.0, 2.0, 3.0]),
])  # fmt: skip
def test_what_is_folded_is_what_runs(lines: str, want: list[float], tmp_path: Path) -> None:
    """As a factor of a norm: what numpy gives for these is something else."""
    made = model("float[N,3] x", ROOT.format("x") + f"n = Div(x, r) c = {lines} y = Mul(n, c)",
                 k=np.array([1, 2, 3], np.float32), five=np.array([-5]), low=np.array([-9]), zero=np.array([0]),
                 back=np.array([-1]))  # fmt: skip
    (found,) = session(made.SerializeToString()).run(None, {"x": np.ones((1, 3), np.float32)})
    np.testing.assert_allclose(found, np.broadcast_to(want, (1, 3)), rtol=1e-4)
    check(made, [{"x": numbers(2, 3)}], tmp_path, 1)


@pytest.mark.parametrize(("op", "fits"), [("Mul(x, x)", True), ("ReduceMean<axes=[1]>(x)", False)])
def test_a_function_of_another_opset(op: str, fits: bool, tmp_path: Path) -> None:
    """Its operators are the same in both, or not: from opset 18 on ReduceMean has its axes as an input."""
    lines = "sq = normfuse.f(x) ms = ReduceMean(sq, last) a = Add(ms, eps) r = Sqrt(a) y = Div(x, r)"
    function = f'<domain: "other", opset_import: ["": 17]> f (x) => (y) {{ y = {op} }}'
    made = model("float[N,16] x", lines, functions=function)
    made.graph.node[0].domain = made.opset_import[1].domain = "other"
    if fits:
        check(made, [{"x": numbers(2, 16)}], tmp_path, 1)
    else:
        with pytest.raises(InputError, match="functions cannot be inlined"):
            normfuse.inspect(made)


def test_a_query_without_weight_and_a_key_with_one(tmp_path: Path) -> None:
    """A pair at once: the standard operator has a weight in any case, so that a second run would see two alike."""
    lines = (ROOT.format("x") + "q = Div(x, r) sq2 = Mul(z, z) ms2 = ReduceMean(sq2, last) a2 = Add(ms2, eps) "
             "r2 = Sqrt(a2) n = Div(z, r2) o = Neg(n) k = Mul(n, w) kt = Transpose<perm=[0, 2, 1]>(k) "
             "at = MatMul(q, kt) sm = Softmax<axis=-1>(at) y = MatMul(sm, x)")  # fmt: skip
    made = model("float[A,B,8] x, float[A,B,8] z", lines, "float[A,B,8] y, float[A,B,8] o", 23, w=numbers(8))
    once = check(made, [{"x": numbers(2, 5, 8), "z": numbers(2, 5, 8)}], tmp_path, 3, "normfuse")
    assert [node.op_type for node in once.graph.node][:2] == ["qk_norm_plain_scale", "RMSNormalization"]
    normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "twice.onnx", normfuse.Config(target="normfuse"))
    assert (tmp_path / "twice.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
