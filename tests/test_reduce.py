"""`normfuse reduce`: a model whose rewrite goes wrong shrinks to the few nodes that matter, a healthy one is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normfuse.config import Config
from normfuse.frontends.onnx_ops import OPS
from normfuse.reduce import failure_of, reduce_model
from tests.cli_tools import fails, fails_json, run, saved, wrap

WIDTH = 16
Steps = list[tuple[str, list[str], str]]


def layer(i: int, x: str, centre: bool, miss: bool) -> Steps:
    """A residual block of nine nodes or eleven: a norm, a matrix, an activation, the sum."""
    core = f"c{i}" if centre else x
    mean: Steps = [("ReduceMean", [x], f"m{i}"), ("Sub", [x, f"m{i}"], core)] if centre else []
    return [*mean, ("Mul", [core, core], f"q{i}"), ("ReduceMean", [f"q{i}"], f"v{i}"),
            ("Add", [f"v{i}", "eps"], f"e{i}"), ("Sqrt", [f"e{i}"], f"r{i}"),
            ("Div", [x if miss else core, f"r{i}"], f"n{i}"),
            ("Mul", [f"n{i}", "w"], f"y{i}"), ("MatMul", [f"y{i}", "W"], f"p{i}"), ("Tanh", [f"p{i}"], f"t{i}"),
            ("Add", [x, f"t{i}"], f"x{i + 1}")]  # fmt: skip


def model(layers: int, miss: int = -1) -> onnx.ModelProto:
    """A stack of layers at opset 17; in one of them the mean may not be taken away before the division."""
    steps = [step for i in range(layers) for step in layer(i, f"x{i}", i % 2 == 0, i == miss)]
    nodes = []
    for op, inputs, output in steps:
        more: dict[str, Any] = {"axes": [-1]} if op == "ReduceMean" else {}
        nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{output}", **more))
    rng = np.random.default_rng(0)
    arrays = {"eps": np.float32(0.1), "w": rng.random(WIDTH).astype("f4"), "W": rng.random((WIDTH, WIDTH)).astype("f4")}
    ends = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [2, 3, WIDTH]) for v in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:],
                              [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()])  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("verify", "kind"), [("sites", "rolled back"), ("off", "different")])
def test_a_model_of_a_hundred_nodes_shrinks(verify: Any, kind: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("normfuse.norm.NEAR", 10.0)  # every coefficient is near enough
    source, target = saved(model(11, miss=6), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    code, out, _ = run("reduce", source, target, "--verify", verify, "--json")
    data = json.loads(out)
    assert code == 0 and data["failure"] == kind
    small = onnx.load(target)
    assert data["nodes_before"] > 100 and data["nodes_after"] == len(small.graph.node) <= 10
    onnx.checker.check_model(small, full_check=True)
    found = failure_of(small, Config(verify=verify), tmp_path)
    assert found is not None and found.kind == kind


def test_a_crash_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def tanh(low: Any, node: Any) -> None:
        if node.outputs[0].name == "t4":
            raise ZeroDivisionError("a fault\nin two lines")
        low.opaque(node)

    monkeypatch.setitem(OPS, "Tanh", tanh)
    done = reduce_model(model(11), Config(verify="off"))
    assert done is not None and done[1].failure == "crash" and "ZeroDivisionError" in done[1].message
    assert [node.op_type for node in done[0].graph.node] == ["Tanh"]


def test_an_invalid_result_inside_a_branch_and_a_function_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is inside an If is taken out of it, constants are held by the graph."""
    import normfuse.frontends.onnx_emit as emit

    monkeypatch.setattr(emit, "DOMAIN", "gone")
    monkeypatch.setattr("normfuse.frontends.onnx_model.register_functions", lambda model, functions: None)
    text = """<ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
    g (float[2,16] x, bool p) => (float[2,16] y, float[2,16] z) {
        h = acme.twice(x)
        z = Tanh(x)
        y = If(p) <then_branch = t() => (float[2,16] o) {
            e = Constant<value = float {0.01}>() q = Mul(h, h) m = ReduceMean<axes = [-1]>(q) a = Add(m, e) s = Sqrt(a)
            o = Div(h, s) }, else_branch = f() => (float[2,16] i) { i = Identity(x) }>
    }
    <domain: "acme", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }"""
    done = reduce_model(onnx.parser.parse_model(text), Config(verify="off"))
    assert done is not None and done[1].failure == "invalid"
    kinds = {node.op_type for node in done[0].graph.node}
    assert not done[0].functions and "If" not in kinds and len(done[0].graph.node) <= 7


def test_nothing_goes_wrong(tmp_path: Path) -> None:
    source, target = saved(model(3), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    code, out, err = run("reduce", source, target)
    assert (code, out.count("\n"), err) == (1, 1, "") and "nothing goes wrong" in out
    code, out, _ = run("reduce", source, target, "--json", "--target", "normfuse", "--numerics", "fast")
    assert code == 1 and json.loads(out) == {"schema": 1, "failure": None}
    assert not target.exists()


def test_bad_input(tmp_path: Path) -> None:
    source, text, target = saved(model(1), tmp_path / "in.onnx"), tmp_path / "text.onnx", tmp_path / "out.onnx"
    text.write_text("no model")
    assert "missing.onnx" in fails(run("reduce", tmp_path / "missing.onnx", target))
    fails(run("reduce", text, target))
    fails(run("reduce", source, target, "--layernorm-to-rmsnorm", "approximate"))
    fails_json(run("reduce", text, target, "--json"))
    target.write_bytes(b"mine")
    assert "--overwrite" in fails(run("reduce", source, target))
    fails(run("reduce", source, source, "--overwrite"))
    assert target.read_bytes() == b"mine"


def test_a_model_that_does_not_run_is_bad_input(tmp_path: Path) -> None:
    node = helper.make_node("Unknown", ["x"], ["y"], domain="acme")
    source = saved(wrap([node], [], [2, 5, 64]), tmp_path / "in.onnx")
    said = fails(run("reduce", source, tmp_path / "out.onnx"))
    assert "does not run" in said and "before.onnx" not in said and "normfuse-" not in said


def test_an_operator_that_only_the_runtime_knows_is_no_fault(tmp_path: Path) -> None:
    """As the model builder of onnxruntime-genai writes it: in the domain of ONNX, which has none of that name."""
    made = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 8] x) => (float[2, 8] y) <float[8] w = {1., 2., 3., 4., 5., 6., 7., 8.}> {
            y = SimplifiedLayerNormalization<axis = -1, epsilon = 1e-6>(x, w) }""")
    code, text, _ = run("reduce", saved(made, tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert code == 1 and "nothing goes wrong" in text
