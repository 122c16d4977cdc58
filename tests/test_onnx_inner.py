"""ONNX graphs with functions, branches and sequences: outputs, their shapes too, stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import normfuse
from normfuse.errors import InputError, UnsupportedError
from normfuse.frontends import onnx_emit
from normfuse.sessions import session
from tests.cli_tools import saved
from tests.onnx_texts import OLD, ROOT, SUM, ZERO, check, model, numbers

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


@pytest.mark.parametrize("known", [True, False])
def test_a_name_in_two_branches(known: bool, tmp_path: Path) -> None:
    """What is told of one of the values does not hold for the other. A sixteenth of the sum of 8 squares is half of
    their mean, and a norm as well."""
    other = "h = Slice(x, zero, eight, last)" if known else "h = com.microsoft.Pad(x, pads)"
    lines = f"""y = If (c) <then_branch = t1 () => (float[P,Q] ya) {{ h = Neg(x) {SUM.format("h")} ya = Div(h, r) }},
        else_branch = t2 () => (float[P,Q] yb) {{ {other} {SUM.format("h")} yb = Div(h, r) }}>"""
    made = model("float[N,16] x, bool c", lines, inv=np.array(1 / 16, np.float32), pads=np.array([0, 0, 0, -8]),
                 zero=ZERO, eight=np.array([8]))  # fmt: skip
    made.opset_import.add(domain="com.microsoft", version=1)
    check(made, [{"x": numbers(3, 16), "c": np.array(c)} for c in (True, False)], tmp_path, 1 + known)


def test_a_name_in_two_branches_of_which_one_is_known(tmp_path: Path) -> None:
    """By inference alone, which does not know the operator in the other."""
    norm = "z = LpPool<kernel_shape=[1]>({0}) " + OLD.format("z", -1) + "{1} = Div(z, r) "
    lines = f"""y = If (c) <then_branch = t1 () => (float[N,4,16] ya) {{ h = Neg(x) {norm.format("h", "ya")} }},
        else_branch = t2 () => (float[N,4,16] yb) {{ h = com.microsoft.Pad(x, pads) {norm.format("h", "yb")} }}>"""
    made = model("float[N,4,16] x, bool c", lines, "float[N,4,16] y", 13, pads=np.zeros(6, np.int64))
    made.opset_import.add(domain="com.microsoft", version=1)
    check(made, [{"x": numbers(3, 4, 16), "c": np.array(c)} for c in (True, False)], tmp_path, 1)


@pytest.mark.parametrize("other", ["Neg(x)", "Unsqueeze(x, last)"])
def test_a_norm_behind_branches_without_a_shape(other: str, tmp_path: Path) -> None:
    """They have one if they agree on it; their axes are constants of the graph around."""
    norm = "sq{1} = Mul({0}, {0}) ms{1} = ReduceMean(sq{1}, last) a{1} = Add(ms{1}, eps) r{1} = Sqrt(a{1}) "
    lines = f"""h = If (c) <then_branch = t1 () => (float[] ya) {{ {norm.format("x", 1)} ya = Div(x, r1) }},
        else_branch = t2 () => (float[] yb) {{ yb = {other} }}> {norm.format("h", 2)} y = Div(h, r2)"""
    made = model("float[N,4,16] x, bool c", lines, "float[N,4,16] y")
    for attribute in made.graph.node[0].attribute:
        attribute.g.output[0].type.tensor_type.ClearField("shape")
    if other == "Neg(x)":
        check(made, [{"x": numbers(3, 4, 16), "c": np.array(c)} for c in (True, False)], tmp_path, 2)
    else:
        assert len(normfuse.inspect(made).norms) == 1


@pytest.mark.parametrize(("axes", "shape", "weight"), [
    ("[1]", (2, 16, 12), (16, 1)), ("[1,2]", (2, 6, 8), (6, 1)), ("[2]", (2, 6, 16), (16,))])  # fmt: skip
@pytest.mark.parametrize("mean", [True, False])
def test_a_function_is_written_for_its_axes(axes: str, shape: tuple[int, ...], weight: tuple[int, ...], mean: bool,
                                            tmp_path: Path) -> None:  # fmt: skip
    """ONNX Runtime makes an operator of a power and a mean over the last axis; over others a product is faster, and so
    are weights as short as they come."""
    lines = f"""{"mu = ReduceMean<axes=" + axes + ">(x) d = Sub(x, mu)" if mean else "d = Identity(x)"} sq = Mul(d, d)
        ms = ReduceMean<axes={axes}>(sq) a = Add(ms, eps) r = Sqrt(a) q = Div(d, r) z = Mul(q, w) y = Identity(z)"""
    made = model(f"float[{','.join(map(str, shape))}] x", lines, "float[A,B,C] y", 14, w=numbers(*weight))
    done = check(made, [{"x": numbers(*shape)}], tmp_path, 1)
    assert any(node.op_type == "Pow" for f in done.functions for node in f.node) is (axes == "[2]")
    assert all(w.dims == list(weight) for w in done.graph.initializer)


def test_a_branch_that_reads_from_far_above(tmp_path: Path) -> None:
    """What it reads is known from the graph around, and not looked for again up to the inputs."""
    chain = "".join(f"v{i + 1} = {('Neg', 'Sigmoid')[i % 2]}(v{i}) " for i in range(2000))
    lines = f"""v0 = Identity(x) {chain} h = If (c) <then_branch = t1 () => (float[A,B] ya) {{ ya = Neg(v2000) }},
        else_branch = t2 () => (float[A,B] yb) {{ yb = Abs(v2000) }}> {ROOT.format("h")} y = Div(h, r)"""
    made = model("float[N,16] x, bool c", lines)
    assert [n.kind for n in normfuse.inspect(made).norms] == ["rms_norm"]


@pytest.mark.parametrize(("opset", "kind", "fused"), [(18, "rms_norm", 0), (18, "layer_norm", 1), (23, "rms_norm", 1)])
@pytest.mark.parametrize("target", ["onnx", "normfuse", "ort-cpu"])
def test_no_function_inside_a_sequence_map(opset: int, kind: str, fused: int, target: Any, tmp_path: Path) -> None:
    """ONNX Runtime (1.31) does not load calls of functions of several nodes there."""
    centred = "c = ReduceMean(a, last) d = Sub(a, c)" if kind == "layer_norm" else "d = Identity(a)"
    made = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[2, 6, 8] x, int64 n) => (float[2, 6, 8] y) <float eps = {{1e-5}}, int64[1] last = {{-1}}> {{
            s = SplitToSequence<axis = 1, keepdims = 1>(x)
            t = SequenceMap<body = b (float[2, 1, 8] a) => (float[2, 1, 8] o) {{
                {centred} q = Mul(d, d) m = ReduceMean(q, last) e = Add(m, eps) r = Sqrt(e) o = Div(d, r) }}>(s)
            y = ConcatFromSequence<axis = 1>(t) }}""")
    source, out = saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(target=target, verify="model"))
    assert [(n.kind, n.action) for n in report.norms] == [(kind, "fused" if fused else "refused")]
    assert [r.code for r in report.refusals] == ["NF202"] * (1 - fused)


@pytest.mark.parametrize(("seldom", "code"), [(True, "NF202"), (False, "NF201")])
def test_the_arithmetic_of_a_norm_inside_a_sequence_map_is_no_function_either(
        seldom: bool, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A norm of float64 would get a function, of its parts or, were it written as ONNX Runtime's operator, which
    computes less, of the model's own nodes."""
    monkeypatch.setattr(onnx_emit, "_seldom", lambda norm: seldom)
    made = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18]>
        g (double[2, 6, 8] x) => (double[2, 6, 8] y) <double eps = {1e-5}, int64[1] last = {-1}> {
            s = SplitToSequence<axis = 1, keepdims = 1>(x)
            t = SequenceMap<body = b (double[2, 1, 8] a) => (double[2, 1, 8] o) { c = ReduceMean(a, last) d = Sub(a, c)
                q = Mul(d, d) m = ReduceMean(q, last) e = Add(m, eps) r = Sqrt(e) o = Div(d, r) }>(s)
            y = ConcatFromSequence<axis = 1>(t) }""")
    source = saved(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(verify="model"))
    assert [r.code for r in report.refusals] == [code] and report.fused == 0


@pytest.mark.parametrize("body", [
    "o = If(yes) <then_branch = t () => (float[2, 1, 8] p) { NORM }, "
    "else_branch = e () => (float[2, 1, 8] n) { n = Neg(a) }>",
    "f = Loop(two, yes) <body = l (int64 i, bool c) => (bool k, float[2, 1, 8] p) { k = Identity(c) NORM }> "
    "o = ReduceSum<keepdims = 0>(f, first)",
])  # fmt: skip
def test_a_function_further_inside_a_sequence_map(body: str, tmp_path: Path) -> None:
    """There ONNX Runtime loads it."""
    body = body.replace("NORM", "q = Mul(a, a) m = ReduceMean(q, last) e = Add(m, eps) r = Sqrt(e) p = Div(a, r)")
    made = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 6, 8] x, bool yes) => (float[2, 6, 8] y)
        <float eps = {{1e-5}}, int64[1] last = {{-1}}, int64 two = {{2}}, int64[1] first = {{0}}> {{
            s = SplitToSequence<axis = 1, keepdims = 1>(x)
            t = SequenceMap<body = b (float[2, 1, 8] a) => (float[2, 1, 8] o) {{ {body} }}>(s)
            y = ConcatFromSequence<axis = 1>(t) }}""")
    source, out = saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = normfuse.rewrite(source, out, normfuse.Config(verify="model"))
    assert [n.action for n in report.norms] == ["fused"]


def test_two_branches_that_share_their_names() -> None:
    """As those of merged decoders do: each norm is told once."""
    made = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]> g (float[2,4] x, bool c) => (float[2,4] y)
        <float[4] w = {1,2,3,4}, float[4] b = {1,2,3,4}> {
        y = If (c) <then_branch = t () => (float[2,4] n) { h = Relu(x) n = LayerNormalization(h, w, b) },
                    else_branch = e () => (float[2,4] n) { h = Tanh(x) n = LayerNormalization(h, w, b) }> }''')
    for mode in ("off", "exact"):
        report = normfuse.optimize(made, normfuse.Config(layernorm_to_rmsnorm=mode))[1]
        assert [n.action for n in report.norms] == ["kept", "kept"] and report.totals()["found"] == 2


@pytest.mark.parametrize(("kind", "taken"), [
    ("seq(float[b, 8, 16])", "SequenceAt(s, zero)"), ("optional(float[b, 8, 16])", "OptionalGetElement(s)")])
def test_what_is_taken_from_a_sequence_or_may_be_missing(kind: str, taken: str) -> None:
    made = model(f"{kind} s", f"x = {taken} " + ROOT.format("x") + "n = Div(x, r) y = Mul(n, w)", "float[b, 8, 16] y",
                 zero=np.array(0), w=numbers(16))  # fmt: skip
    assert normfuse.inspect(made).norms[0].size == 16


def test_elements_of_a_sequence_have_sizes_of_their_own(tmp_path: Path) -> None:
    """Though of one symbol: to add two of them may spread one over the other."""
    lines = "h = SequenceAt(s, zero) z = SequenceAt(s, one) x = Add(h, z) " + ROOT.format("x") + "y = Div(x, r)"
    made = model("seq(float[b, 16]) s", lines, zero=np.array(0), one=np.array(1))
    done = check(made, [{"s": [numbers(3, 16), numbers(3, 16)]}], tmp_path, 1, "normfuse")
    assert not any(node.op_type.startswith("add_rms_norm") for node in done.graph.node)


@pytest.mark.parametrize("stated", ["seq(float[N,16])", "seq(float[A,B])"])
def test_a_sequence_that_is_an_output(stated: str, tmp_path: Path) -> None:
    """What is taken from it has the sizes of what was put into it, whatever the output states."""
    lines = "d = Neg(x) s = SequenceConstruct(x, d) h = SequenceAt(s, one) " + ROOT.format("h") + "y = Div(h, r)"
    made = model("float[N,16] x", lines, f"float[A,B] y, {stated} s", one=np.array(1))
    onnx.save(made, tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert [(n.action, n.size) for n in report.norms] == [("fused", 16)]
    x = {"x": numbers(3, 16)}
    before, after = (session(tmp_path / name).run(None, x) for name in ("in.onnx", "out.onnx"))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5)
