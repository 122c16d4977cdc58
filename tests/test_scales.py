"""Products of float16 and the numbers behind them, which target `ort-cpu` makes one operator of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import normfuse
from normfuse import Config
from normfuse.frontends.onnx_emit import Emitter
from normfuse.verify import compare_models

PRODUCT = "p = MatMul(q, k)"
END = "y = Softmax(s)"
HELD: dict[str, Any] = {
    "c": 0.125, "row": [0.125], "cube": [[[0.125]]], "four": [[[[0.125]]]], "deep": [[[[[0.125]]]]], "eight": 8.0,
    "third": 1 / 3, "zero": 0.0, "inf": np.inf, "wide": np.full(8, 0.125), "w": np.full((2, 3, 16, 8), 0.125),
    "line": np.full(16, 0.125), "minus": -3.0, "top": 65504.0, "axes": np.array([-1]), "eps": 1e-3,
}  # fmt: skip


def made(lines: str, kind: str = "float16", outputs: str = "y", given: str = "") -> onnx.ModelProto:
    shapes = {"q": [2, 3, 8, 16], "k": [2, 3, 16, 8], "f": []}
    dtype, proto = (np.float16, 10) if kind == "float16" else (np.float32, 1)
    shown = ", ".join(f"{kind}[a,b,c,d] {name}" for name in outputs.split())
    head = '<ir_version: 9, opset_import: ["": 18]>'
    model = onnx.parser.parse_model(f"{head} g ({kind}[1] x) => ({shown}) {{ {lines} }}")
    del model.graph.input[:]
    for name in ("q", "k", *given.split()):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, 9 if name == "f" else proto,
                                                                    shapes.get(name, [])))  # fmt: skip
    words = set(lines.replace("(", " ").replace(")", " ").replace(",", " ").split())
    for name, held in HELD.items():
        array = np.asarray(held)
        array = array if array.dtype.kind == "i" else array.astype(dtype)
        model.graph.initializer.extend([onnx.numpy_helper.from_array(array, name)] if name in words else [])
    return model


def rewritten(model: onnx.ModelProto, folder: Path, compare: bool = True, **config: Any) -> onnx.GraphProto:
    """The graph of the file, which runs and has the outputs of the model, and which a second time stays."""
    onnx.save(model, folder / "in.onnx")
    config = {"target": "ort-cpu"} | config
    report = normfuse.rewrite(folder / "in.onnx", folder / "out.onnx", Config(**config), overwrite=True)
    assert not compare or compare_models(folder / "in.onnx", folder / "out.onnx")["equal"]
    normfuse.rewrite(folder / "out.onnx", folder / "again.onnx", Config(**config), overwrite=True)
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()
    out = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(out, full_check=True)
    n = sum(node.op_type == "FusedMatMul" for node in out.graph.node)
    assert any(f"{n} x MatMul with the number behind it: product" in note for note in report.notes) == (n > 0)
    return out.graph


def alphas(graph: onnx.GraphProto) -> list[float]:
    """The factor of each product that has one."""
    return [a.f for node in graph.node if node.op_type == "FusedMatMul" for a in node.attribute]


@pytest.mark.parametrize(("lines", "alpha"), [
    ("s = Mul(p, c)", 0.125), ("s = Mul(c, p)", 0.125), ("s = Mul(p, row)", 0.125), ("s = Mul(cube, p)", 0.125),
    ("s = Mul(p, four)", 0.125), ("s = Div(p, eight)", 0.125), ("s = Mul(p, third)", float(np.float16(1 / 3))),
    ("t = Mul(p, c) s = Div(t, eight)", 1 / 64), ("t = Div(p, third) s = Mul(c, t)", 0.125 / float(np.float16(1 / 3))),
    ("t = Constant<value_float = 0.5>() h = Cast<to = 10>(t) s = Mul(p, h)", 0.5),
    ("e = Sqrt(eight) s = Div(p, e)", 1 / float(np.float16(8**0.5))), ("s = Mul(p, minus)", -3.0),
])  # fmt: skip
def test_the_number_behind_a_product(lines: str, alpha: float, tmp_path: Path) -> None:
    graph = rewritten(made(f"{PRODUCT} {lines} {END}"), tmp_path)
    assert alphas(graph) == [pytest.approx(alpha, rel=1e-7)]
    assert not {node.op_type for node in graph.node} & {"Mul", "Div", "MatMul"} and not graph.initializer


@pytest.mark.parametrize("lines", [
    "s = Mul(p, wide)", "s = Mul(p, deep)", "s = Div(c, p)", "s = Mul(p, p)", "s = Add(p, c)", "s = Mul(p, zero)",
    "s = Div(p, zero)", "s = Mul(p, inf)", "t = Mul(p, c) r = Neg(p) s = Add(t, r)", "n = Neg(p) s = Mul(n, c)",
])  # fmt: skip
def test_what_stays(lines: str, tmp_path: Path) -> None:
    """Rows of numbers, what adds an axis, other operations, no number, and a product that others read."""
    model = made(f"{PRODUCT} {lines} {END}")
    if "deep" in lines:
        model.graph.output[0].type.tensor_type.shape.dim.add()
    assert not alphas(rewritten(model, tmp_path, compare="zero" not in lines and "inf" not in lines))


NORM = "{0}q = Mul({0}, {0}) {0}m = ReduceMean({0}q, axes) {0}e = Add({0}m, eps) {0}r = Sqrt({0}e) n = Div({0}, {0}r)"


@pytest.mark.parametrize(("lines", "count"), [
    (f"{PRODUCT} s = Mul(p, c) o = MatMul(s, q) t = Mul(o, c) r = MatMul(t, k) u = Div(r, eight) y = Neg(u)", 3),
    (f"{NORM.format('q')} p = MatMul(n, k) s = Mul(p, c) {END}", 1),
    (f"{PRODUCT} s = Mul(p, c) {NORM.format('s')} o = MatMul(n, q) y = Mul(o, c)", 2),
])  # fmt: skip
def test_products_of_what_is_written_anew(lines: str, count: int, tmp_path: Path) -> None:
    """Of other products with their numbers, and of norms."""
    graph = rewritten(made(lines), tmp_path)
    assert len(alphas(graph)) == count and not [node for node in graph.node if node.op_type in ("Mul", "MatMul")]


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
@pytest.mark.parametrize("dot", ["MatMul(x, t) m = Mul(p, part)", "com.microsoft.FusedMatMul<alpha = 0.015625>(x, t)"])
def test_a_dot_of_rows_is_a_step_of_a_norm(dot: str, target: Any, tmp_path: Path) -> None:
    """Whether a factor is behind it or in it."""
    name = "m" if "Fused" in dot else "p"
    model = onnx.parser.parse_model(f'''<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>
        g (float16[2,5,1,64] x) => (float16[2,5,1,64] y)
        <float16 part = {{9216}}, float16 eps = {{5243}}> {{
            t = Transpose<perm = [0, 1, 3, 2]>(x) {name} = {dot} e = Add(m, eps) s = Sqrt(e) y = Div(x, s) }}''')
    (norm,) = normfuse.optimize(model, Config(target=target))[1].norms
    assert norm.action == "fused" and norm.verified


def test_a_weight_as_large_as_none() -> None:
    """What float16 does not hold is told by the check of a norm, and not by NumPy."""
    made = Emitter(18).constant(np.array(65504.0**2), "float16", "number").const_value
    assert made is not None and np.isinf(made.numpy())


def test_a_number_as_large_as_none(tmp_path: Path) -> None:
    steps = " ".join(f"s{i + 1} = Mul(s{i}, top)" for i in range(9))
    assert not alphas(rewritten(made(f"s0 = MatMul(q, k) {steps} y = Neg(s9)"), tmp_path, compare=False))


def test_a_row_of_one_number_that_is_computed(tmp_path: Path) -> None:
    """It is a number for a norm, and here it gives the product another shape."""
    model = made("n = Constant<value_ints = [8]>() u = ConstantOfShape<value = float16[1] {14336}>(n) "
                 "v = ReduceMax(k, axes) p = MatMul(q, v) s = Mul(p, u) y = Neg(s)")
    assert not alphas(rewritten(model, tmp_path))


@pytest.mark.parametrize("lines", [f"p = my.MatMul(q, k) s = Mul(p, c) {END}", f"{PRODUCT} s = my.Mul(p, c) {END}"])
def test_operators_of_others(lines: str, tmp_path: Path) -> None:
    model = made(lines)
    model.opset_import.append(onnx.helper.make_opsetid("my", 1))
    model.graph.value_info.extend(onnx.helper.make_tensor_value_info(name, 10, [2, 3, 8, 8]) for name in "ps")
    assert not alphas(normfuse.optimize(model, Config(target="ort-cpu"))[0].graph)


def test_a_product_outside_of_a_loop(tmp_path: Path) -> None:
    """Within it would be computed each time."""
    lines = f"""{PRODUCT} many = Constant<value_int = 3>() y = Loop (many, , q) <
        body = b (int64 i, bool on, float16[2,3,8,16] h) => (bool go, float16[2,3,8,16] o) {{
            go = Identity(on) s = Mul(p, c) t = MatMul(s, q) o = Add(t, h) }}>"""
    graph = rewritten(made(lines.replace("\n", " ")), tmp_path)
    assert not alphas(graph) and not alphas(graph.node[-1].attribute[0].g)


def test_the_first_number_where_the_second_has_another_reader(tmp_path: Path) -> None:
    graph = rewritten(made(f"{PRODUCT} t = Mul(p, c) u = Div(t, eight) s = Add(u, t) {END}"), tmp_path)
    assert alphas(graph) == [0.125] and "Div" in [node.op_type for node in graph.node]


@pytest.mark.parametrize("config", [{"target": "onnx"}, {"target": "normfuse"}, {"target": "ort-cuda"}])
def test_other_targets(config: dict[str, Any], tmp_path: Path) -> None:
    assert not alphas(rewritten(made(f"{PRODUCT} s = Mul(p, c) {END}"), tmp_path, **config))


@pytest.mark.parametrize("version", ["1.20", "1.29", "1.32"])
def test_versions(version: str, tmp_path: Path) -> None:
    assert alphas(rewritten(made(f"{PRODUCT} s = Mul(p, c) {END}"), tmp_path, ort_version=version))


def test_other_types(tmp_path: Path) -> None:
    """In float32 ONNX Runtime does it."""
    assert not alphas(rewritten(made(f"{PRODUCT} s = Mul(p, c) {END}", "float"), tmp_path))


@pytest.mark.parametrize("lines", [f"p = MatMul(q, w) s = Mul(p, c) {END}", f"p = MatMul(q, line) s = Mul(p, c) {END}",
                                   "v = ReduceMax<keepdims = 0>(q) z = Shape(v) u = Expand(v, z) p = MatMul(q, k) "
                                   f"s = Mul(p, u) {END}"])  # fmt: skip
def test_weights_and_what_is_computed(lines: str, tmp_path: Path) -> None:
    """Linear layers are left to those who know weights, and a number has to be the same in every run."""
    model = made(lines)
    if "line" in lines:
        model.graph.output[0].type.tensor_type.shape.dim.pop()
    assert not alphas(rewritten(model, tmp_path))


def test_outputs_stay(tmp_path: Path) -> None:
    """By their names, whether they are read or not."""
    assert not alphas(rewritten(made(f"{PRODUCT} s = Mul(p, c) {END}", outputs="y p"), tmp_path))
    graph = rewritten(made(f"{PRODUCT} s = Mul(p, c) u = Div(s, eight) y = Neg(u)", outputs="y s"), tmp_path)
    assert alphas(graph) == [0.125] and [o.name for o in graph.output] == ["y", "s"]
    graph = rewritten(made("p = MatMul(q, k) y = Mul(p, c)"), tmp_path)
    assert alphas(graph) == [0.125] and graph.node[-1].output == ["y"]


def test_a_number_that_the_caller_may_give(tmp_path: Path) -> None:
    assert not alphas(rewritten(made(f"{PRODUCT} s = Mul(p, c) {END}", given="c"), tmp_path))


@pytest.mark.parametrize("inside", [False, True])
def test_in_a_branch(inside: bool, tmp_path: Path) -> None:
    """With the number there, and in the graph around."""
    number = "z = Constant<value_float = 0.125>() d = Cast<to = 10>(z)" if inside else ""
    name = "d" if inside else "c"
    lines = f"""m = Mul(q, c) y = If (f) <
        then_branch = t () => (float16[2,3,8,8] o) {{ {number} {PRODUCT} s = Mul(p, {name}) o = Softmax(s) }},
        else_branch = e () => (float16[2,3,8,8] u) {{ n = Mul(q, m) u = MatMul(n, k) }}>"""
    model = made(lines.replace("\n", " "), given="f")
    (_, node) = rewritten(model, tmp_path).node
    assert len(alphas(node.attribute[0].g)) == 1 and not alphas(node.attribute[1].g)


def test_what_onnx_runtime_runs(tmp_path: Path) -> None:
    """Where layers share the number, it runs the factors one by one; of what is written it runs none."""
    layers = f"{PRODUCT} s = Mul(p, c) a = Softmax(s) o = MatMul(a, q) r = MatMul(o, k) t = Mul(r, c) y = Softmax(t)"
    onnx.save(made(layers), tmp_path / "model.onnx")
    rewritten(made(layers), tmp_path)
    counts = []
    for name in ("model", "out"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 4
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        counts.append([node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node].count("Mul"))
    assert counts == [2, 0]


@pytest.mark.parametrize("by", ["Mul(p, c)", "Mul(p, third)", "Div(p, third)"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 60.0, 200.0])
def test_as_near_to_float64_as_the_model(by: str, size: float, tmp_path: Path) -> None:
    """Also where the products are beyond float16, and the scores are not."""
    rewritten(made(f"{PRODUCT} s = {by} y = Identity(s)"), tmp_path, compare=size < 60)
    rng = np.random.default_rng(0)
    feeds = {"q": (rng.standard_normal((2, 3, 8, 16)) * size).astype(np.float16),
             "k": (rng.standard_normal((2, 3, 16, 8)) * size).astype(np.float16)}  # fmt: skip
    number = float(np.float16(HELD["third" if "third" in by else "c"]))
    true = feeds["q"].astype(np.float64) @ feeds["k"].astype(np.float64)
    true = true * number if "Mul" in by else true / number
    errors = []
    for name in ("in", "out"):
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, feeds)
        errors.append(np.abs(found.astype(np.float64) - true)[np.abs(true) < 65000].max())
    assert errors[1] <= errors[0] and errors[1] < np.abs(true).max() / 1000 + 2**-25
