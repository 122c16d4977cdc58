"""LayerNorm to RMSNorm inside the branches of an If: what both read is edited once, and both are certified."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import normfuse
from normfuse.sessions import session
from tests.branches import EXACT, HELD, NORM, ROWS, SPELLED, branches, hide, made
from tests.converted import RNG, D, check, flags, model, numbers
from tests.layernorm_models import CASES, to_onnx


def merged(case: str, opset: int = 18) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model twice, as the branches of an If that share its weights and all names, as optimum merges decoders; the
    second takes the negative of its tokens twice first."""
    found = CASES[case]
    one = to_onnx(found.build(), found.inputs(), opset).model_proto
    feeds = dict(zip([i.name for i in one.graph.input], [a.numpy() for a in found.inputs()], strict=True))
    graphs = []
    for turned in (False, True):
        graph = onnx.GraphProto()
        graph.CopyFrom(one.graph)
        ahead = []
        if turned:
            ids = graph.input[0].name
            ahead = [onnx.helper.make_node("Neg", *names) for names in (([ids], ["minus"]), (["minus"], ["again"]))]
            for node in graph.node:
                node.input[:] = ["again" if name == ids else name for name in node.input]
        nodes = [*ahead, *graph.node]
        del graph.node[:], graph.input[:], graph.initializer[:]
        graph.node.extend(nodes)
        graphs.append(graph)
    node = onnx.helper.make_node("If", ["flag"], [o.name for o in one.graph.output], "merged", then_branch=graphs[0],
                                 else_branch=graphs[1])  # fmt: skip
    del one.graph.node[:], one.graph.value_info[:]
    one.graph.node.append(node)
    one.graph.input.append(onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    return one, feeds


@pytest.mark.parametrize("target", ["onnx", "normfuse", "ort-cpu"])
def test_a_decoder_of_two_branches(target: Any) -> None:
    one, feeds = merged("gpt2")
    result, report = normfuse.optimize(one, normfuse.Config(layernorm_to_rmsnorm="exact", target=target))
    assert report.converted == 2 * CASES["gpt2"].converted and len(report.norms) == report.converted
    for norm in report.norms:
        assert norm.verified and norm.conversion and norm.conversion["check"]["max_rel"] < 1e-12
    assert {norm.kind for norm in normfuse.inspect(result).norms} == {"rms_norm"}
    assert "the biases of 12 norms went into the linear layers behind them" in report.notes
    before, after = (session(m.SerializeToString()) for m in (one, result))
    for flag in (True, False):
        given = feeds | {"flag": np.array(flag)}
        for a, b in zip(before.run(None, given), after.run(None, given), strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-5 * np.abs(a).max())
    again, second = normfuse.optimize(result, normfuse.Config(layernorm_to_rmsnorm="exact", target=target))
    assert second.converted == 0 and again.SerializeToString() == result.SerializeToString()


@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize("norm", [NORM, SPELLED])
def test_both_branches_are_converted(norm: str, verify: str) -> None:
    check(made(norm.format("o"), norm.format("o")), flags(ROWS), 2, verify=verify)


@pytest.mark.parametrize("verify", ["off", "sites"])
@pytest.mark.parametrize(("other", "converted"), [
    ("h = MatMul(x, w) n = Relu(h) o = MatMul(n, k)", 0), ("h = MatMul(x, w) o = MatMul(h, k)", 0),
    ("o = MatMul(x, u)", 1), ("t = Transpose<perm=[1,0]>(w) r = MatMul(x, w) o = MatMul(r, t)", 0)])
def test_a_weight_that_the_other_branch_reads_as_it_was(other: str, converted: int, verify: str) -> None:
    check(made(NORM.format("o"), other, u=numbers(4, 5)), flags(ROWS), converted, verify=verify)


def test_a_weight_that_the_other_branch_reads_is_copied_on_request() -> None:
    check(made(NORM.format("o"), "h = MatMul(x, w) r = Relu(h) o = MatMul(r, k)"), flags(ROWS), 1, untie=True)


@pytest.mark.parametrize("branch", [0, 1])
def test_what_became_of_a_norm_is_told_of_its_own_branch(branch: int) -> None:
    """All names are the same, the constants of each branch are its own, and the mean is read in one."""
    read = NORM.format("t") + " mu = ReduceMean<axes=[-1]>(h) o = Add(t, mu)"
    texts = [NORM.format("o"), NORM.format("o")]
    texts[1 - branch] = read
    one = model("float[B,T,4] x, bool flag", branches(*texts), opset=17)
    for i in range(2):
        hide(one, i, w=numbers(4, D), k=numbers(D, 5))
    for verify in ("off", "sites"):
        report = check(one, flags(ROWS), 1, verify=verify)
        told = [(n.action, n.conversion["verdict"]) for n in report.norms]
        assert told[branch] == ("converted", "exact") and told[1 - branch][1] == "kept"


def test_constants_of_a_branch_are_edited() -> None:
    """By Constant nodes and initializers, whose names are the same in both."""
    one = made(NORM.format("o"), NORM.format("o"))
    own = {name: one.graph.initializer.pop([i.name for i in one.graph.initializer].index(name)) for name in "wk"}
    hide(one, 0, **{name: numpy_helper.to_array(held) for name, held in own.items()})
    inner = one.graph.node[0].attribute[1].g
    nodes = [onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(
        numbers(*numpy_helper.to_array(held).shape))) for name, held in own.items()]  # fmt: skip
    nodes += inner.node
    del inner.node[:]
    inner.node.extend(nodes)
    for verify in ("off", "sites"):
        check(one, flags(ROWS), 2, verify=verify)
    result = normfuse.optimize(one, EXACT)[0]
    assert [i.name for i in result.graph.node[0].attribute[0].g.initializer] == ["k"]  # w is not there twice


def test_a_stream_that_crosses_the_border() -> None:
    """The stream of the main graph is normalised there and in both branches, where it goes on."""
    ahead = "s = MatMul(x, w) m0 = LayerNormalization<axis=-1>(s, g, b) f0 = MatMul(m0, k0) r = Add(s, f0)"
    inner = "n = LayerNormalization<axis=-1>(r, g, b) f = MatMul(n, k1) u = Add(r, f) " \
            "l = LayerNormalization<axis=-1>(u, g, b) o = MatMul(l, k)"  # fmt: skip
    held: dict[str, Any] = {"k0": numbers(D, D), "k1": numbers(D, D)}
    for verify in ("off", "sites"):
        check(made(inner, inner, ahead, **held), flags(ROWS), 5, verify=verify)
    given = inner.partition(" l =")[0] + " o = MatMul(u, k)"  # in one the mean of the stream is seen
    report = check(made(inner, given, ahead, **held), flags(ROWS), 3, verify="off")
    operators = {place for n in report.norms for place in n.conversion.get("operators", ())}
    assert {place.partition(":")[0] for place in operators} == {"behind r", "behind f"}


def test_a_stream_that_a_branch_gives_is_read_by_anyone() -> None:
    inner = "h = MatMul(x, w) n = LayerNormalization<axis=-1>(h, g, b) f = MatMul(n, k1) o = Add(h, f)"
    lines = branches(inner, inner, "r") + " y = LayerNormalization<axis=-1>(r, g, b)"
    one = model("float[B,T,4] x, bool flag", lines, w=numbers(4, D), k1=numbers(D, D))
    assert check(one, flags(ROWS), 0).refusals


def test_a_norm_of_which_parts_stand_in_the_main_graph() -> None:
    ahead = "h = MatMul(x, w) mu = ReduceMean<axes=[-1]>(h) d = Sub(h, mu)"
    inner = SPELLED.format("o").split("d = Sub(h, mu) ")[1]
    for verify in ("off", "sites"):
        check(made(inner, NORM.format("o").partition(") ")[2], ahead), flags(ROWS), 2, verify=verify)


@pytest.mark.parametrize("around", ["if", "loop"])
def test_deeper_ones_stay(around: str) -> None:
    inner = branches("h = MatMul(x, w) o = LayerNormalization<axis=-1>(h, g, b)", "o = MatMul(x, w)", "i")
    if around == "loop":
        inner = """i = Loop(two, flag, x0) <body = l (int64 n, bool c, float[B,T,8] p) => (bool c2, float[B,T,8] o) {
                   c2 = Identity(c) o = LayerNormalization<axis=-1>(p, g, b) }>"""
    one = made(NORM.format("o"), f"x0 = MatMul(x, w) {inner} o = MatMul(i, k)", two=np.array(2))
    report = check(one, flags(ROWS), 0)
    assert any("sub-graph" in r.message for r in report.refusals)


@pytest.mark.parametrize("shared", [False, True])
def test_several_ifs(shared: bool) -> None:
    """Of names of their own, or the same."""
    second = branches(NORM.format("o"), NORM.format("o"), "z")
    for name in "" if shared else "hno":
        second = re.sub(rf"\b{name}\b", f"{name}2", second)
    lines = f"{branches(NORM.format('o'), NORM.format('o'))} {second}"
    one = model("float[B,T,4] x, bool flag", lines, "float[] y, float[] z", **HELD)
    for verify in ("off", "sites"):
        check(one, flags(ROWS), 4, verify=verify)


def retyped(model: onnx.ModelProto, name: str, dtype: type) -> onnx.ModelProto:
    """A model in another type of floats."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    made = onnx.parser.parse_model(re.sub(r"float(16)?\[", f"{name}[", onnx.printer.to_text(bare)))
    made.graph.initializer.extend(numpy_helper.from_array(numpy_helper.to_array(i).astype(dtype), i.name)
                                  for i in model.graph.initializer)  # fmt: skip
    return made


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hostile_numbers(dtype: type) -> None:
    """A mean of a hundred times the deviation, and tiny deviations: no further from float64 than the model was."""
    one = made(SPELLED.format("o"), SPELLED.format("o"), eps=np.float32(1e-5))
    for held in one.graph.initializer:
        array = numpy_helper.to_array(held)
        array = array + 100 * array.std() if held.name == "w" else array
        held.CopyFrom(numpy_helper.from_array(array.astype(dtype), held.name))
    if dtype is np.float16:
        one = retyped(one, "float16", dtype)
    result, report = normfuse.optimize(one, EXACT)
    assert report.converted == 2, report.refusals
    wide = retyped(one, "double", np.float64)
    for scale in (1.0, 1e-3):
        x: Any = (RNG.standard_normal((2, 3, 4)) * scale).astype(dtype)
        for flag in (True, False):
            given = {"x": x, "flag": np.array(flag)}
            (want,) = session(wide.SerializeToString()).run(None, given | {"x": x.astype(np.float64)})
            before, after = (session(m.SerializeToString()).run(None, given)[0] for m in (one, result))
            error, was = (np.linalg.norm(y.astype(np.float64) - want) for y in (after, before))
            assert error <= 2 * was + 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("names", [("one", "two"), ("then_branch", "else_branch")])
def test_an_if_of_another_domain(names: tuple[str, str]) -> None:
    """Nobody knows what becomes of its graphs."""
    one = made(NORM.format("o"), NORM.format("o"))
    node = one.graph.node[0]
    node.domain = "my.own"
    for attribute, name in zip(node.attribute, names, strict=True):
        attribute.name = name
    one.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    report = normfuse.optimize(one, EXACT)[1]
    assert report.converted == 0 and ["sub-graph" in r.message for r in report.refusals] == [True, True]


def test_an_if_that_stands_ahead_of_what_it_reads() -> None:
    """ONNX Runtime takes such a file: the weight is read as it is, by the branch, of what is computed only then."""
    lines = "m = LayerNormalization<axis=-1>(late, g, b) z = MatMul(m, k) r = Add(z, y)"
    one = made("o = MatMul(late, k)", NORM.format("o"), outputs="float[] r", behind=lines)
    one.graph.node.append(onnx.helper.make_node("MatMul", ["x", "u"], ["late"]))
    one.graph.initializer.append(numpy_helper.from_array(numbers(4, D), "u"))
    given = list(one.graph.node)
    del one.graph.node[:]
    one.graph.node.extend([given[0], given[-1], *given[1:-1]])
    for verify in ("off", "sites"):
        check(one, flags(ROWS), 1, verify=verify)


def test_sizes_and_constants_of_the_main_graph() -> None:
    """Shapes that it computes are used in a branch, and a constant that it folds is a number there."""
    ahead = """n0 = Shape<start=0, end=2>(x) s = Concat<axis=0>(n0, eight) two = Add(one, one)
               h0 = MatMul(x, w)"""
    inner = """r = Reshape(h0, s) mu = ReduceMean<axes=[-1]>(r) d = Sub(r, mu) q = Pow(d, two)
               v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) z = Sqrt(e) t = Div(d, z) m = Mul(t, g) n = Add(m, b)
               o = MatMul(n, k)"""
    held: dict[str, Any] = {"eight": np.array([D]), "one": np.float32(1)}
    for verify in ("off", "sites"):
        check(made(inner, inner, ahead, **held), flags(ROWS), 2, verify=verify)


def test_a_norm_is_told_with_its_branch() -> None:
    """Names are the same in both, and so are those of readers."""
    report = normfuse.inspect(made(NORM.format("o"), NORM.format("o")))
    assert [n.name for n in report.norms] == [
        f"LayerNormalization(n) in {branch} of y" for branch in ("then_branch", "else_branch")]
    raw = "h = MatMul(x, w) r = Relu(h) o = MatMul(r, k)"
    (refusal,) = normfuse.optimize(made(NORM.format("o"), raw), EXACT)[1].refusals
    assert "MatMul(h) in else_branch of y reads it as it is" in refusal.message


@pytest.mark.parametrize("target", ["onnx", "normfuse"])
def test_a_norm_that_was_fused_with_the_sum_ahead_is_told(target: Any) -> None:
    """Its operator reads what it gives itself: it stays, in a branch and without."""
    text = """p = MatMul(x, w) f = MatMul(x, v) h = Add(p, f) n = LayerNormalization<axis=-1>(h, g, b) r = MatMul(n, m)
              a = Add(r, e) s = Add(h, a) l = LayerNormalization<axis=-1>(s, g, b) {0} = MatMul(l, k)"""
    held: dict[str, Any] = {"v": numbers(4, D), "m": numbers(D, D), "e": numbers(D)}
    for one, feeds in ((made(text.format("o"), "o = MatMul(x, u)", u=numbers(4, 5), **held), flags(ROWS)),
                       (model("float[B,T,4] x", text.format("y"), **HELD | held), [{"x": ROWS}])):  # fmt: skip
        fused = normfuse.optimize(one, normfuse.Config(target="normfuse"))[0]
        assert {f.name for f in fused.functions} >= {"add_layer_norm"}
        for verify in ("off", "sites"):
            report = check(fused, feeds, 0, verify=verify, target=target)
            assert report.refusals and {r.code for r in report.refusals} == {"NF301"}, report.refusals


def test_approximation_tells_what_stays_in_a_branch() -> None:
    """And what is converted in one is not among it."""
    one = made(NORM.format("o"), NORM.format("o").replace("h = MatMul(x, w)", "i = MatMul(x, w) h = Relu(i)"))
    feeds = [{"x": numbers(2, 3, 4), "flag": np.array(i % 2 == 0)} for i in range(8)]
    config = normfuse.Config(layernorm_to_rmsnorm="approximate", tolerance=1.0)
    report = normfuse.optimize(one, config, calibration=feeds)[1]
    assert report.converted == 0 and [r.code for r in report.refusals] == ["NF301"] * 2
    assert all("nothing is measured" in r.message for r in report.refusals)
    one = made(NORM.format("o"), NORM.format("o").replace("h = MatMul(x, w)", "i = MatMul(x, u) h = Relu(i)"),
               u=numbers(4, D))  # fmt: skip
    report = normfuse.optimize(one, config, calibration=feeds)[1]
    told = [(n.action, (n.conversion or {})["verdict"]) for n in report.norms]
    assert told == [("converted", "exact"), ("kept", "kept")]
