"""Constants behind convolutions, which are spelled so that ONNX Runtime takes them into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import normfuse
from normfuse import Config
from normfuse.sessions import session

C = 4
CONV = "c = Conv<pads = [1, 1, 1, 1]>(x, w) "
RNG = np.random.default_rng(0)
HELD: dict[str, Any] = {
    "w": RNG.standard_normal((C, 3, 3, 3)), "other": RNG.standard_normal((C, 3, 3, 3)),
    "w1": RNG.standard_normal((C, 3, 3)), "w3": RNG.standard_normal((C, 3, 1, 1, 1)),
    "one": [1.5], "scalar": 0.75, "cube": [[[1.25]]], "four": [[[[0.5]]]], "deep": [[[[[0.5]]]]],
    "full": RNG.standard_normal((C, 1, 1)), "batch": RNG.standard_normal((1, C, 1, 1)),
    "line": RNG.standard_normal(C), "wide": RNG.standard_normal((1, C)), "rows": RNG.standard_normal((2, 1, 1, 1)),
    "mean": np.zeros(C), "ones": np.ones(C),
    "huge": [1e30], "tiny": [1e-30], "thousand": [2000.0], "nan": [np.nan], "flag": np.array(True),
    "last": np.array([-1]), "three": np.array(3), "eps": 1e-5,
}  # fmt: skip


def made(lines: str, outputs: str = "float[a,b,c,d] y", kind: str = "float", x: str = "2,3,4,4", given: str = "",
         opset: int = 18) -> onnx.ModelProto:  # fmt: skip
    """A graph of a text, with constants of one type; `given` are constants that the caller may replace."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g ({kind}[{x}] x) => ({outputs}) '
                                    f"{{ {lines} }}")  # fmt: skip
    words = set(lines.replace("(", " ").replace(")", " ").replace(",", " ").split())
    dtype, proto = (np.float16, 10) if kind == "float16" else (np.float32, 1)
    for name in HELD.keys() & words:
        array = np.asarray(HELD[name])
        array = array if array.dtype.kind in "ib" else array.astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        if name in given.split():
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, proto, array.shape))
    return model


def optimised(path: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".opt.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def rewritten(model: onnx.ModelProto, folder: Path, **config: Any) -> tuple[onnx.GraphProto, int]:
    """The graph of the file and how many constants were written anew; the file computes the same without an optimiser,
    bit for bit, and a second time it stays."""
    onnx.save(model, folder / "in.onnx")
    report = normfuse.rewrite(folder / "in.onnx", folder / "out.onnx", Config(**config), overwrite=True)
    again = normfuse.rewrite(folder / "out.onnx", folder / "again.onnx", Config(**config), overwrite=True)
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()
    assert not any("x Conv" in note for note in again.notes)
    out = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(out, full_check=True)
    read = {name for node in out.graph.node for name in node.input}
    assert not {v.name for v in out.graph.initializer} & {"one", "scalar", "four", "cube"} - read  # none is left behind
    found = [int(note.split(" x Conv, a constant behind it: taken in")[0]) for note in report.notes if "x Conv" in note]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for value in (1.0, 0.0):
        feeds: dict[str, Any] = {}
        results = []
        for name in ("in.onnx", "out.onnx"):
            runtime = onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            feeds = feeds or {i.name: (np.random.default_rng(1).standard_normal(i.shape) * value).astype(
                np.float16 if "16" in i.type else np.float32) for i in runtime.get_inputs()}  # fmt: skip
            results.append(runtime.run(None, feeds))
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)
    return out.graph, sum(found)


@pytest.mark.parametrize(("lines", "count"), [
    ("y = Mul(one, c)", 1), ("y = Mul(c, one)", 1), ("y = Mul(scalar, c)", 1), ("y = Mul(c, cube)", 1),
    ("y = Mul(four, c)", 1), ("y = Add(c, one)", 1), ("y = Add(scalar, c)", 1), ("y = Mul(full, c)", 1),
    ("y = Add(batch, c)", 1), ("m = Mul(one, c) y = Add(m, scalar)", 2), ("m = Mul(c, full) y = Add(scalar, m)", 1),
    ("m = Mul(one, c) i = Identity(m) y = Add(i, one)", 2), ("m = Add(c, batch) i = Identity(m) y = Mul(one, i)", 1),
    ("k = Constant<value_float = 0.5>() y = Add(k, c)", 1), ("i = Identity(one) y = Mul(i, c)", 1),
    ("k = Constant<value_floats = [0.5]>() i = Identity(k) y = Mul(c, i)", 1),
])  # fmt: skip
@pytest.mark.parametrize("target", ["onnx", "ort-cpu", "normfuse"])
def test_a_constant_goes_into_the_convolution(lines: str, count: int, target: str, tmp_path: Path) -> None:
    graph, found = rewritten(made(CONV + lines), tmp_path, target=target)
    assert found == count and graph.output[0].name == "y"
    before, after = (optimised(tmp_path / f"{name}.onnx") for name in ("in", "out"))
    assert after.count("Conv") == 1 and not {"Mul", "Add", "BatchNormalization"} & {*after}
    assert {"Mul", "Add"} & {*before} or before.count("Conv") > 1


@pytest.mark.parametrize("lines", [
    "y = Mul(c, full)", "y = Mul(c, scalar)", "m = Mul(c, batch) y = Add(m, full)",  # as they should be
    "y = Mul(c, line)", "y = Mul(wide, c)", "y = Add(c, rows)", "y = Mul(deep, c)",  # not for each channel
    "y = Div(c, one)", "y = Sub(one, c)", "m = Neg(c) y = Mul(one, m)", "y = Mul(c, c)", "y = Add(c, x2)",
    "m = Mul(one, c) y = Add(m, c)",  # it has another reader
    "n = Relu(c) y = Mul(n, one)", "n = BatchNormalization(c, ones, mean, mean, ones) y = Mul(one, n)",
    "y = Mul(huge, c)", "y = Mul(c, tiny)", "y = Add(c, thousand)", "y = Mul(nan, c)",
    "e = Exp(one) y = Mul(e, c)",  # ONNX Runtime's, not that of anybody else
    "z = Shape<start = 3>(c) f = Cast<to = 1>(z) y = Mul(f, c)",
])  # fmt: skip
def test_what_stays(lines: str, tmp_path: Path) -> None:
    outputs = "float[a,b,c,d] y" if "deep" not in lines else "float[a,b,c,d,e] y"
    second = "x2 = Conv<pads = [1, 1, 1, 1]>(x, other) " if "x2" in lines else ""
    assert rewritten(made(second + CONV + lines, outputs), tmp_path)[1] == 0


def test_a_chain_and_weights_that_would_leave_the_range(tmp_path: Path) -> None:
    """The factors of a chain count together, and the weights with them."""
    lines = CONV + "m = Mul(thousand, c) n = Mul(thousand, m) y = Mul(thousand, n)"
    assert rewritten(made(lines), tmp_path)[1] == 1
    for size, count in ((1e25, 1), (1e32, 0), (1e-32, 0)):
        model = made(CONV + "y = Mul(one, c)")
        (weight,) = (v for v in model.graph.initializer if v.name == "w")
        weight.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weight) * size).astype(np.float32), "w"))
        assert rewritten(model, tmp_path)[1] == count


def test_a_shape_that_only_a_norm_reads(tmp_path: Path) -> None:
    """It is gone once the norm is one operator, and a second rewrite would find the convolution without it."""
    lines = CONV + ("m = Mul(one, c) p = Mul(m, m) s = ReduceSum(p, last) sh = Shape(c) n = Gather(sh, three) "
                    "f = Cast<to = 1>(n) q = Div(s, f) e = Add(q, eps) r = Sqrt(e) y = Div(m, r)")  # fmt: skip
    onnx.save(made(lines), tmp_path / "in.onnx")
    report = normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert report.fused == 1 and any("1 x Conv" in note for note in report.notes)
    normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_outputs_of_the_graph(tmp_path: Path) -> None:
    """What is an output stays what it was, and what is behind it is not taken in."""
    both = "float[a,b,c,d] y, float[a,b,c,d] "
    assert rewritten(made(CONV + "y = Mul(one, c)", both + "c"), tmp_path)[1] == 0
    assert rewritten(made(CONV + "m = Mul(one, c) y = Add(m, one)", both + "m"), tmp_path)[1] == 1


@pytest.mark.parametrize("given", ["w", "one"])
def test_a_constant_that_the_caller_may_replace(given: str, tmp_path: Path) -> None:
    assert rewritten(made(CONV + "y = Mul(one, c)", given=given), tmp_path)[1] == 0


@pytest.mark.parametrize(("kind", "target", "count"), [
    ("float16", "ort-cpu", 0), ("float", "ort-cuda", 0), ("float", "onnx", 1),
])  # fmt: skip
def test_other_types_and_targets(kind: str, target: Any, count: int, tmp_path: Path) -> None:
    model = made(CONV + "y = Mul(one, c)", f"{kind}[a,b,c,d] y", kind)
    assert rewritten(model, tmp_path, target=target)[1] == count


@pytest.mark.parametrize(("lines", "shape", "output", "count"), [
    ("c = Conv(x, w1) y = Mul(one, c)", "2,3,8", "float[a,b,c] y", 0),  # ONNX Runtime does it for images only
    ("c = Conv(x, w3) y = Mul(one, c)", "2,3,2,2,2", "float[a,b,c,d,e] y", 1),
    ("c = ConvTranspose(x, w3t) y = Mul(one, c)", "2,4,2,2,2", "float[a,b,c,d,e] y", 0),
])  # fmt: skip
def test_other_ranks(lines: str, shape: str, output: str, count: int, tmp_path: Path) -> None:
    assert rewritten(made(lines.replace("w3t", "w3"), output, x=shape), tmp_path)[1] == count


def test_one_constant_behind_two(tmp_path: Path) -> None:
    """What another still reads stays there."""
    lines = CONV + ("m = Mul(one, c) d = Conv<pads = [1, 1, 1, 1]>(x, other) n = Add(d, one) y = Div(m, n) "
                    "z = Mul(x, one)")  # fmt: skip
    graph, found = rewritten(made(lines, "float[a,b,c,d] y, float[e,f,g,h] z"), tmp_path)
    assert found == 2 and "one" in {v.name for v in graph.initializer}


def test_many_that_share_one_constant(tmp_path: Path) -> None:
    lines = "c0 = Identity(x) " + "".join(f"d{i} = Conv<pads = [1, 1, 1, 1]>(c0, w) p{i} = Mul(one, d{i}) "
                                          for i in range(20)) + "y = Sum(" + ", ".join(f"p{i}" for i in range(20)) + ")"
    graph, found = rewritten(made(lines), tmp_path)
    assert found == 20 and len(graph.initializer) == 2


def test_within_a_branch(tmp_path: Path) -> None:
    branch = " () => (float[a,b,c,d] {0}) {{ c{0} = Conv<pads = [1, 1, 1, 1]>(x, w) {0} = {1}(one, c{0}) }}"
    then, other = branch.format("p", "Mul"), branch.format("q", "Add")
    graph, found = rewritten(made(f"y = If(flag) <then_branch = t{then}, else_branch = e{other}>"), tmp_path)
    assert found == 2 and "one" not in {v.name for v in graph.initializer}


def test_a_norm_behind_a_convolution_is_converted_all_the_same(tmp_path: Path) -> None:
    """Also where the constants were written anew before."""
    lines = CONV + ("m = Mul(one, c) s = Add(scalar, m) t = Transpose<perm = [0, 2, 3, 1]>(s) "
                    "u = LayerNormalization(t, ones, mean) y = Mul(u, scalar)")  # fmt: skip
    assert rewritten(made(lines), tmp_path)[1] == 2
    runs = []
    for name in ("in", "out"):
        report = normfuse.rewrite(tmp_path / f"{name}.onnx", tmp_path / f"{name}-rms.onnx",
                                  Config(layernorm_to_rmsnorm="exact", verify="model"))  # fmt: skip
        assert report.converted == 1 and len(report.refusals) == 0
        feeds = {"x": np.random.default_rng(2).standard_normal((2, 3, 4, 4)).astype(np.float32)}
        runs += [session(tmp_path / f"{name}{end}.onnx").run(None, feeds)[0] for end in ("", "-rms")]
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], rtol=1e-4, atol=1e-5)


def test_large_weights_of_a_constant_node(tmp_path: Path) -> None:
    """As Paddle2ONNX writes all of them."""
    model = made(CONV.replace("w)", "other)") + "d = Conv(c, kernel) y = Mul(one, d)")
    weights = numpy_helper.from_array(RNG.standard_normal((512, C, 1, 1)).astype(np.float32))
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["kernel"], value=weights))
    assert rewritten(model, tmp_path)[1] == 1
