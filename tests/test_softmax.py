"""Softmaxes of attention: when they become calls of functions, and what these mean (kernels: test_softmax_kernels)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

import normfuse
from normfuse.bench_norms import norms_of
from tests.test_ort_library import session

pytest.importorskip("onnxruntime")
Array = npt.NDArray[Any]
NAMES = {"float": "float32", "float16": "float16", "double": "float64"}


def parsed(lines: str, dtype: str = "float", opset: int = 18, outputs: str = "", more: str = "",
           inputs: str = "") -> onnx.ModelProto:  # fmt: skip
    """Scores x of four heads, a mask m, lines that make p of them, and the values v that are weighted by p."""
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> g ({dtype}[b,4,s,t] x, {dtype}[b,1,s,t] m, '
        f"{dtype}[b,4,t,3] v{inputs}) => ({dtype}[b,4,s,3] y{outputs}) {more} {{ {lines} y = MatMul(p, v) }}"
    )  # fmt: skip


def rewritten(model: onnx.ModelProto, folder: Path, target: Any = "normfuse",
              convert: Any = "off") -> tuple[onnx.ModelProto, Any]:  # fmt: skip
    onnx.save(model, folder / "in.onnx")
    config = normfuse.Config(target=target, layernorm_to_rmsnorm=convert)
    report = normfuse.rewrite(folder / "in.onnx", folder / "out.onnx", config, overwrite=True)
    made = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(made, full_check=True)
    return made, report


def causal(dtype: str, queries: int = 5, keys: int = 7) -> Array:
    """A mask of the lowest number of the type, for what comes later."""
    later = np.arange(keys)[None, :] > np.arange(queries)[:, None] + keys - queries
    return np.where(later, np.finfo(dtype).min, 0).astype(dtype)[None, None]


def feeds(dtype: str, scale: float = 3.0, shape: tuple[int, ...] = (2, 4, 5, 7)) -> dict[str, Array]:
    x = np.random.default_rng(0).standard_normal(shape) * scale
    mask = np.broadcast_to(causal(dtype, *shape[-2:]), (shape[0], 1, *shape[-2:]))
    values = np.random.default_rng(1).standard_normal((*shape[:-2], shape[-1], 3)).astype(dtype)
    return {"x": x.astype(dtype), "m": np.ascontiguousarray(mask), "v": values}


PLAIN, ADDED = "p = Softmax<axis=-1>(x)", "h = Add(x, m) p = Softmax<axis=-1>(h)"
NUMBER = "f = Constant<value = float {0.125}> () c = Cast<to=10>(f)"
HALF, SCALED = ["Cast", "add_softmax_of_f16"], ["Cast", "add_softmax_scaled_of_f16"]
"""With the cast of the mask."""
WHERE = "zero = Constant<value = float {0.0}> () c = Less(m, zero) w = Where(c, m, x) p = Softmax<axis=-1>(w)"


@pytest.mark.parametrize(("lines", "dtype", "opset", "ops"), [
    (ADDED, "float", 18, ["add_softmax"]),
    (ADDED, "float", 9, ["add_softmax"]),
    (ADDED, "float", 23, ["add_softmax"]),
    (ADDED.replace("x, m", "m, x"), "float", 18, ["add_softmax"]),
    (ADDED.replace("-1", "3"), "float", 18, ["add_softmax"]),
    (ADDED.replace("<axis=-1>", ""), "float", 18, ["add_softmax"]),
    (ADDED, "float16", 18, HALF),
    (PLAIN, "float16", 13, ["softmax_of_f16"]),
    *((f"{number} k = {product} {ADDED.replace('x, m', 'k, m')}", "float16", 18, SCALED)
      for number, product in ((NUMBER, "Mul(x, c)"), (NUMBER, "Mul(c, x)"),
                              (NUMBER.replace("0.125", "8.0"), "Div(x, c)"))),
    (f"{NUMBER} k = Mul(x, c) {ADDED.replace('x, m', 'm, k')}", "float16", 18, SCALED),
    (f"{NUMBER} k = Mul(x, c) p = Softmax(k)", "float16", 18, ["softmax_scaled_of_f16"]),
    (WHERE, "float", 18, ["Constant", "Less", "Where", "softmax"]),
    ("h = Add(x, m) c = Cast<to=1>(h) q = Softmax(c) p = Cast<to=10>(q)", "float16", 18,
     ["Add", "Cast", "softmax", "Cast"]),
    ("h = Add(x, m) p = Softmax(h) q = Exp(h)", "float", 18, ["Add", "softmax", "Exp"]),
    ("h = Add(x, m) q = Softmax(h) n = IsNaN(q) p = Where(n, m, q)", "float", 18, ["add_softmax", "IsNaN", "Where"]),
    ("h = Add(x, m) q = Softmax(h) p = Neg(q)", "float16", 18, ["Add", "softmax_of_f16", "Neg"]),
])  # fmt: skip
def test_it_becomes_a_call_that_means_the_same(lines: str, dtype: str, opset: int, ops: list[str],
                                               tmp_path: Path) -> None:  # fmt: skip
    model = parsed(lines, dtype, opset)
    made, report = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node] == [*ops, "MatMul"]
    assert report.notes == [note for note in report.notes if note.startswith("1 x Softmax")] != []
    given = feeds(NAMES[dtype])
    evaluated = (next(iter(ReferenceEvaluator(m).run(None, given))) for m in (model, made))
    run = (session(m, library=False).run(None, given)[0] for m in (model, made))
    for before, after in (evaluated, run):
        np.testing.assert_array_equal(before, after)
    again, report = rewritten(made, tmp_path)
    assert again == made and not report.notes


@pytest.mark.parametrize(("lines", "why"), [
    ("c = Cast<to=10>(three) k = Div(x, c)", "a third is no number of float16"),
    ("c = Cast<to=10>(small) k = Div(x, c)", "2^20 is none either"),
    ("c = Cast<to=10>(three) z = Shape(x) e = Expand(c, z) k = Mul(x, e)", "no number, but a tensor"),
    ("c = Cast<to=10>(two) k = Div(c, x)", "the number is divided"),
    ("c = Cast<to=10>(x) d = Cast<to=10>(m) k = Mul(c, d)", "no constant"),
    ("c = Cast<to=10>(zero) k = Mul(x, c)", "by 0"),
    ("i = Constant<value = int64[5] {0, 1, 2, 3, 4}> () j = Constant<value = int64[1] {0}> () c = Cast<to=10>(two) "
     "d = Unsqueeze(c, i) r = Mul(x, d) k = Squeeze(r, j)", "behind a number of more dimensions is another operator"),
    ("c = Cast<to=10>(two) k = Mul(x, c) unseen = Neg(k)", "somebody else reads the product"),
    ("c = Cast<to=10>(two) k = com.microsoft.Mul(x, c)", "another operator of that name"),
])  # fmt: skip
def test_a_product_that_is_not_taken_in(lines: str, why: str, tmp_path: Path) -> None:
    more = "<float two = {2}, float three = {3}, float zero = {0}, float small = {9.5367431640625e-7}>"
    outputs = ", float16[b,4,s,t] unseen" if "unseen" in lines else ""
    more = more.replace(">", ", float16[b,4,s,t] k>") if "microsoft" in lines else more
    model = parsed(f"{lines} h = Add(k, m) p = Softmax(h)", "float16", more=more, outputs=outputs)
    made, _ = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node if n.domain == "normfuse"] == HALF[1:], why


def test_of_two_products_one_is_taken_in(tmp_path: Path) -> None:
    """And a mask that several read is cast once."""
    lines = (f"{NUMBER} k = Mul(x, c) n = Mul(m, c) h = Add(k, n) a = Softmax(h) o = MatMul(a, z) g = Add(o, m) "
             "p = Softmax(g)")  # fmt: skip
    model = parsed(lines, "float16", inputs=", float16[t,t] z")
    made, _ = rewritten(model, tmp_path)
    ops = [n.op_type for n in made.graph.node]
    assert [op for op in ops if op.startswith("add_softmax")] == [SCALED[1], HALF[1]] and ops.count("Mul") == 1
    again = parsed(f"{ADDED.replace('p =', 'a =')} o = MatMul(a, z) g = Add(o, m) p = Softmax(g)", "float16",
                   inputs=", float16[t,t] z")  # fmt: skip
    (tmp_path / "again").mkdir()
    made, _ = rewritten(again, tmp_path / "again")
    casts = [n.input[0] for n in made.graph.node if n.op_type == "Cast"]
    assert casts == ["m"]


@pytest.mark.parametrize(("lines", "dtype", "opset", "why"), [
    (PLAIN, "float", 18, "ONNX Runtime's own is as fast where nothing is masked"),
    ("h = Mul(x, m) p = Softmax(h)", "float", 18, "no mask"),
    ("h = Add(x, m) q = Softmax(h) p = Neg(q)", "float", 18, "no attention: a bias, and few elements"),
    (ADDED.replace("-1", "2"), "float", 18, "another axis"),
    (ADDED.replace("<axis=-1>", ""), "float", 12, "axes from the second on"),
    (ADDED, "double", 18, "no kernel of its type"),
    (PLAIN, "float16", 12, "the standard has no parts of it yet"),
    (ADDED.replace("Softmax", "LogSoftmax"), "float", 18, "another operator"),
    (ADDED.replace("Softmax", "com.microsoft.Softmax"), "float", 18, "another operator of that name"),
    ("k = SequenceConstruct(x) z = SequenceMap(k, m) <body = r (float[b,4,s,t] u, float[b,1,s,t] n) => "
     "(float[b,4,s,3] w) { h = Add(u, n) q = Softmax(h) w = MatMul(q, v) }> i = Constant<value = int64 {0}> () "
     "a = SequenceAt(z, i) p = Softmax(x)",
     "float", 18, "no function is called in a SequenceMap"),
])  # fmt: skip
def test_it_stays(lines: str, dtype: str, opset: int, why: str, tmp_path: Path) -> None:
    model = parsed(lines, dtype, opset)
    made, _ = rewritten(model, tmp_path)
    assert made == model, why


@pytest.mark.parametrize(("dtype", "ops"), [
    ("float", ["Add", "Softmax"]), ("float16", ["Add", "softmax_of_f16"]),
])  # fmt: skip
def test_an_addition_of_another_domain_is_none(dtype: str, ops: list[str], tmp_path: Path) -> None:
    model = parsed("h = com.microsoft.Add(x, m) p = Softmax(h)", dtype, more=f"<{dtype}[b,4,s,t] h>")
    assert [n.op_type for n in rewritten(model, tmp_path)[0].graph.node] == [*ops, "MatMul"]


@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "ort-cuda"])
def test_other_targets_have_no_call_of_it(target: str, tmp_path: Path) -> None:
    model = parsed(ADDED)
    made, report = rewritten(model, tmp_path, target)
    assert made == model
    told = [note for note in report.notes if note.startswith("1 x Softmax with its mask: leave") and "normfuse" in note]
    assert len(told) == (target == "ort-cpu")


def test_a_sum_that_is_an_output_stays(tmp_path: Path) -> None:
    model = parsed(ADDED, outputs=", float[b,4,s,t] h")
    model.graph.node[1].name, model.graph.node[1].doc_string = "layer.0/weights", "of attention"
    made, _ = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node] == ["Add", "softmax", "MatMul"]
    assert (made.graph.node[1].name, made.graph.node[1].doc_string) == ("layer.0/weights", "of attention")
    assert [o.name for o in made.graph.output] == ["y", "h"]


@pytest.mark.parametrize("convert", ["off", "exact"])
@pytest.mark.parametrize("target", ["normfuse", "ort-cpu"])
def test_in_a_branch(target: str, convert: str, tmp_path: Path) -> None:
    """What is edited in a sub-graph only is written, too."""
    model = parsed("k = Neg(x) p = If(c) <then_branch = t () => (float16[b,4,s,t] r) { r = Softmax(k) }, else_branch = "
                   "e () => (float16[b,4,s,t] q) { h = Add(k, m) o = Softmax(h) u = MatMul(o, w) q = Add(o, u) }>",
                   "float16", inputs=", bool c, float16[t,t] w")  # fmt: skip
    made, report = rewritten(model, tmp_path, target, convert)
    branches = {a.name: [n.op_type for n in a.g.node] for a in made.graph.node[1].attribute}
    parts = ["Cast", "Softmax", "Cast"]
    behind = ["MatMul", "Add"]
    ours = ["softmax_of_f16"], [*HALF, *behind]
    theirs = parts, ["Add", *parts, *behind]
    assert (branches["then_branch"], branches["else_branch"]) == (ours if target == "normfuse" else theirs)
    assert any(note.startswith("2 x Softmax: ") for note in report.notes)
    for taken in (False, True):
        given = feeds("float16") | {"c": np.array(taken), "w": np.eye(7, dtype="f2")}
        before, after = (session(m, library=False).run(None, given)[0].astype("f8") for m in (model, made))
        assert np.abs(before - after).max() <= 2**-9


def test_a_sum_outside_of_a_branch_stays_there(tmp_path: Path) -> None:
    model = parsed("h = Add(x, m) p = If(c) <then_branch = t () => (float[b,4,s,t] r) { o = Softmax(h) "
                   "r = MatMul(o, w) }, else_branch = e () => (float[b,4,s,t] q) { q = Identity(m4) }> ",
                   inputs=", bool c, float[b,4,s,t] m4, float[t,t] w")  # fmt: skip
    made, _ = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node] == ["Add", "If", "MatMul"]
    assert [n.op_type for n in made.graph.node[1].attribute[0].g.node] == ["softmax", "MatMul"]


def test_it_is_no_norm_to_the_benchmark(tmp_path: Path) -> None:
    lines = ADDED.replace("p =", "k =") + " o = MatMul(k, z) p = RMSNormalization<epsilon=1e-6>(o, w)"
    model = parsed(lines, opset=23, more="<float[7] w = {1,2,1,2,1,2,1}>", inputs=", float[t,7] z")
    made, _ = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node] == ["add_softmax", "MatMul", "RMSNormalization", "MatMul"]
    assert norms_of(str(tmp_path / "out.onnx"))[1] == frozenset()


def test_a_function_of_that_name_with_another_body(tmp_path: Path) -> None:
    model = parsed(ADDED.replace("p =", "k =") + " o = MatMul(k, w) p = normfuse.add_softmax(o, m)",
                   inputs=", float[t,t] w")  # fmt: skip
    body = [onnx.helper.make_node("Add", ["x", "mask"], ["y"])]
    model.functions.append(onnx.helper.make_function("normfuse", "add_softmax", ["x", "mask"], ["y"], body,
                                                     [onnx.helper.make_opsetid("", 18)]))  # fmt: skip
    model.opset_import.append(onnx.helper.make_opsetid("normfuse", 1))
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(normfuse.UnsupportedError, match=r"function normfuse\.add_softmax of its own"):
        normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", normfuse.Config(target="normfuse"))
    assert not (tmp_path / "out.onnx").exists()


def test_a_sum_that_becomes_part_of_a_norm(tmp_path: Path) -> None:
    """The bias of a LayerNorm is added last; the norm is one operator when the softmax is looked at."""
    lines = ("a = ReduceMean<axes=[-1]>(x) d = Sub(x, a) q = Mul(d, d) e = ReduceMean<axes=[-1]>(q) f = Add(e, eps) "
             "g = Sqrt(f) n = Div(d, g) k = Mul(n, w) h = Add(k, w) p = Softmax(h)")  # fmt: skip
    model = parsed(lines, opset=17, more="<float[7] w = {1,2,1,2,1,2,1}, float eps = {0.00001}>")
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 7
    made, _ = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node] == ["LayerNormalization", "softmax", "MatMul"]
    before, after = (session(m, library=False).run(None, feeds("float32"))[0] for m in (model, made))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


def test_a_long_and_branching_way_to_the_product(tmp_path: Path) -> None:
    """Each step is looked at once."""
    steps = " ".join(f"c{i} = Cast<to=1>(p{i}) p{i + 1} = Where(z, p{i}, c{i})" for i in range(1500))
    model = parsed(f"h = Add(x, m) p0 = Softmax(h) {steps} p = Identity(p1500)", inputs=", bool z")
    assert [n.op_type for n in rewritten(model, tmp_path)[0].graph.node][:2] == ["add_softmax", "Cast"]


def test_a_file_that_was_given_another_opset_since(tmp_path: Path) -> None:
    model, _ = rewritten(parsed(ADDED), tmp_path)
    model.opset_import[0].version = 21
    model.graph.node.extend(parsed("h2 = Add(x, m) p2 = Softmax(h2)").graph.node[:2])
    model.graph.node.append(onnx.helper.make_node("MatMul", ["p2", "v"], ["z"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["b", 4, "s", 3]))
    made, _ = rewritten(model, tmp_path)
    assert [n.op_type for n in made.graph.node] == ["add_softmax", "MatMul"] * 2
    found = session(made, library=False).run(None, feeds("float32"))
    np.testing.assert_array_equal(found[0], found[1])
