"""The kernels of softmaxes on the CPU: every shape, hostile rows, threads, instruction sets."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import normfuse.ort
import normfuse.targets
from normfuse.frontends.onnx_softmax import function_for
from tests.test_ort_library import session
from tests.test_softmax import ADDED, NUMBER, Array, causal, feeds, parsed, rewritten

compiled = pytest.mark.skipif(normfuse.ort.library_path() is None, reason="installed without a C compiler")
TYPES = ("float32", "float16")
FORMS = ("", "_of_f16", "_scaled_of_f16")


def softmax(h: Array) -> Array:
    """In float64."""
    e = np.exp(h.astype("f8") - h.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def call(dtype: str, x: tuple[Any, ...], mask: tuple[Any, ...] | None, scale: float | None = None) -> onnx.ModelProto:
    """A model of one call, with the function that it has in a rewritten model; of float16 with the cast of its mask."""
    half, op = dtype == "float16", onnx.helper.make_node
    name = ("softmax" if mask is None else "add_softmax") + "_scaled" * (scale is not None) + "_of_f16" * half
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info
    inputs = [value("x", kind, x)] + ([] if mask is None else [value("m", kind, mask)])
    nodes = [op("Cast", ["m"], ["wide"], to=1)] if half and mask is not None else []
    nodes.append(op(name, ["x", "wide" if nodes else "m"][: len(inputs)], ["y"], domain="normfuse"))
    if scale is not None:
        nodes[-1].attribute.append(onnx.helper.make_attribute("scale", scale))
    function = ir.to_proto(function_for(name, 18))
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("normfuse", 1)]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, [value("y", kind, None)]),
                                  functions=[function], opset_imports=opsets, ir_version=9)  # fmt: skip


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
    ((3,), None), ((3,), (3,)), ((2, 4, 5, 7), None), ((2, 4, 5, 7), (2, 1, 5, 7)), ((2, 4, 5, 7), (7,)),
    ((2, 4, 5, 7), (4, 1, 7)), ((2, 4, 5, 7), (2, 4, 5, 1)), ((2, 4, 5, 7), ()), ((2, 4, 5, 1), (1, 1, 5, 7)),
    ((5, 1), (2, 4, 1, 7)), ((), (2, 7)), ((1,), (7,)), ((2, 1, 1, 7), (2, 4, 5, 1)), ((0, 4), (0, 4)), ((4, 0), None),
    ((3, 0), (0,)), ((6, 1), None), ((6, 1), (1, 1)), ((1, 1, 1, 1, 1, 33), (2, 1, 2, 1, 2, 33)),
    *(((3, n), mask) for n in (15, 16, 17, 63, 64, 65, 200, 1023, 1024, 1025, 4096, 4097, 9000)
      for mask in (None, (n,))),
    ((40, 2000), (40, 2000)),
]  # fmt: skip


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("x", "mask"), SHAPES, ids=str)
def test_every_shape(x: tuple[int, ...], mask: tuple[int, ...] | None, dtype: str) -> None:
    model = call(dtype, x, mask)
    rng = np.random.default_rng(1)
    running = session(model, threads=2)
    for scale in (1e-3, 1.0, 30.0):
        given = {"x": np.asarray(rng.standard_normal(x) * scale, dtype)}
        if mask is not None:
            given["m"] = np.asarray(rng.standard_normal(mask) * scale, dtype)
        found = running.run(None, given)[0]
        h = given["x"].astype("f8") + (given["m"].astype("f8") if mask is not None else 0)
        assert found.shape == h.shape and found.dtype == np.dtype(dtype)
        if h.size:
            # that of x + mask, which is rounded to float32, and of its exponential
            allowed = 2**-11 if dtype == "float16" else 2**-23 * (4 + np.abs(h).max())
            assert np.abs(found - softmax(h)).max() <= allowed


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_no_less_exact_than_the_operators_of_the_runtime(dtype: str) -> None:
    model = call(dtype, (8, 64, 512), (64, 512))
    for scale in (0.1, 3.0, 100.0):
        given = {"x": (np.random.default_rng(2).standard_normal((8, 64, 512)) * scale).astype(dtype),
                 "m": causal(dtype, 64, 512)[0, 0]}  # fmt: skip
        exact = softmax(given["x"].astype("f8") + given["m"])
        ours, theirs = (np.abs(session(model, library).run(None, given)[0] - exact) for library in (True, False))
        assert ours.max() <= 1.5 * theirs.max() and ours.mean() <= 1.05 * theirs.mean()


HOSTILE = {
    "all masked": np.full(40, -np.inf), "one left": np.r_[1.0, np.full(39, -np.inf)],
    "lowest alone": np.full(40, np.finfo("f4").min), "no number": np.r_[np.nan, np.zeros(39)],
    "infinite": np.r_[np.inf, np.zeros(39)], "two infinite": np.r_[np.inf, np.inf, -np.inf, np.zeros(37)],
    "far apart": np.linspace(-200, 0, 40), "large": np.linspace(3e4, 6e4, 40), "equal": np.full(40, -7.25),
}  # fmt: skip


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", HOSTILE)
def test_rows_that_are_masked_or_no_numbers(rows: str, dtype: str) -> None:
    """As the runtime's own, but for a row of float32 that is masked by -inf altogether: it is 1/n."""
    x = np.clip(HOSTILE[rows], -6e4, 6e4) if dtype == "float16" and rows == "lowest alone" else HOSTILE[rows]
    x = np.stack([x, x[::-1], np.linspace(0, 1, 40)]).astype(dtype)
    model = call(dtype, (3, 40), None)
    ours, theirs = (session(model, library).run(None, {"x": x})[0] for library in (True, False))
    if rows == "all masked":
        np.testing.assert_array_equal(ours[:2], 1 / np.full((2, 40), 40, "f4") if dtype == "float32" else np.nan)
        ours, theirs = ours[2:], theirs[2:]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=float(np.finfo(dtype).eps))
    masked = call(dtype, (3, 40), (3, 40))
    for given in ({"x": np.zeros_like(x), "m": x}, {"x": x, "m": np.zeros_like(x)}):
        np.testing.assert_array_equal(session(masked).run(None, given)[0][-len(ours):], ours)


@compiled
@pytest.mark.parametrize("scale", [0.125, 0.0883, -2.0])
@pytest.mark.parametrize(("x", "mask"), [
    ((2, 4, 5, 7), None), ((2, 4, 5, 7), (2, 1, 5, 7)), ((2, 4, 5, 7), ()), ((2, 4, 5, 1), (1, 1, 5, 7)),
    ((5, 1), (7,)), ((3, 1), (1,)), ((3, 33), (3, 1)),
], ids=str)  # fmt: skip
def test_a_number_multiplies_x_and_not_the_mask(x: tuple[int, ...], mask: tuple[int, ...] | None, scale: float) -> None:
    scale = float(np.float16(scale))
    rng = np.random.default_rng(6)
    given = {"x": (rng.standard_normal(x) * 9).astype("f2")}
    if mask is not None:
        given["m"] = np.asarray(rng.standard_normal(mask) * 3, "f2")
    found = session(call("float16", x, mask, scale)).run(None, given)[0]
    want = softmax(given["x"].astype("f8") * scale + (given["m"].astype("f8") if mask is not None else 0))
    assert np.abs(found - want).max() <= 2**-11


@compiled
def test_what_is_masked_is_zero_and_no_denormal_number() -> None:
    given = {"x": np.zeros((4, 200), "f4"), "m": np.linspace(-120, 0, 200, dtype="f4")[None]}
    given["x"][2, 100:] = -86.5
    found = session(call("float32", (4, 200), (1, 200))).run(None, given)[0]
    assert ((found == 0) | (found >= np.finfo("f4").tiny)).all() and (found[0, given["m"][0] < -87] == 0).all()
    assert (found[0, given["m"][0] > -85] > 0).all()


@compiled
@pytest.mark.parametrize("n", [4096, 4096 + 5])
def test_every_element_is_near_what_it_should_be_not_the_largest_alone(n: int) -> None:
    """Down to the least number that is no denormal one, e^-87.34; what is less is 0."""
    x = np.linspace(-89, 0, n, dtype="f4")[np.random.default_rng(3).permutation(n)][None]
    found = session(call("float32", (1, n), None)).run(None, {"x": x})[0].astype("f8")
    exact = softmax(x.astype("f8"))
    least = float(np.finfo("f4").tiny)
    assert (found[exact < least * (1 - 1e-6)] == 0).all()
    seen = exact > least * (1 + 1e-6)
    assert 0.9 * n < seen.sum() < n
    assert np.abs(found[seen] / exact[seen] - 1).max() < 3 * 2**-23


@compiled
@pytest.mark.parametrize(("x", "mask"), [((1, 4, 5, 7), (2, 4, 5, 7)), ((2, 4, 5, 7), (1, 4, 5, 7))])
def test_a_size_that_is_said_to_be_the_same_and_is_not(x: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """ONNX Runtime takes such models; the result is no smaller than the sum, and lies not in the place of x."""
    model = call("float32", ("b", 4, "s", 7), ("b", 4, "s", 7))
    for i, name in enumerate("xm"):
        model.graph.node.insert(0, onnx.helper.make_node("Neg", [name], [f"{name}_neg"]))
        model.graph.node[-1].input[i] = f"{name}_neg"
    model.graph.node.append(onnx.helper.make_node("Neg", ["y"], ["z"]))
    model.graph.output[0].name = "z"
    given = {"x": np.random.default_rng(4).standard_normal(x, "f4"), "m": np.ones(mask, "f4")}
    for library in (True, False):
        found = session(model, library).run(None, given)[0]
        assert found.shape == (2, 4, 5, 7) and np.abs(found + softmax(-given["x"] - given["m"])).max() < 1e-6


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_depends_on_nothing_but_itself(dtype: str) -> None:
    shape = (6, 50, 333)
    given = {"x": np.random.default_rng(3).standard_normal(shape).astype(dtype), "m": causal(dtype, 50, 333)[0]}
    one, two = (session(call(dtype, shape, (1, 50, 333)), threads=n).run(None, given)[0] for n in (1, 2))
    small = session(call(dtype, (1, 333), (1, 333))).run(None, {"x": given["x"][5, 49:], "m": given["m"][0, 49:]})[0]
    assert one.tobytes() == two.tobytes()
    assert one[5, 49:].tobytes() == small.tobytes()


@compiled
@pytest.mark.parametrize(("x", "mask", "message"), [
    ((2, 3), (2, 4), r"normfuse\.add_softmax: dimension 1 from the last is 3 in x, 4 in the mask"),
    ((2, 3), (5, 3), r"dimension 2 from the last is 2 in x, 5 in the mask"),
    ((2, 0), (2, 4), r"dimension 1 from the last is 0 in x, 4 in the mask"),
    ((), (), r"normfuse\.add_softmax: x has no dimension"),
])  # fmt: skip
def test_shapes_that_do_not_fit(x: tuple[int, ...], mask: tuple[int, ...], message: str) -> None:
    model = call("float32", x, mask)
    for info in model.graph.input:
        info.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=message):
        session(model).run(None, {"x": np.ones(x, "f4"), "m": np.ones(mask, "f4")})


@compiled
@pytest.mark.parametrize(("x", "mask", "shape"), [
    (("b", 4, "s", 7), (1, 1, 1, 7), ["b", 4, "s", 7]), (("b", 4, "s", 7), (7,), ["b", 4, "s", 7]),
    (("b", 4, "s", 7), ("b", 1, "s", 7), None), (("b", 4), ("c", 4), None), (("b", 1), ("b", 7), None),
    ((7,), ("b", 7), None), (("b", 4), None, ["b", 4]), ((None, 4), None, None),
])  # fmt: skip
def test_the_shape_that_the_runtime_is_told(x: tuple[Any, ...], mask: tuple[Any, ...] | None,
                                            shape: list[Any] | None) -> None:  # fmt: skip
    found = session(call("float32", x, mask)).get_outputs()[0].shape
    assert found == (shape if shape is not None else [])


@compiled
def test_the_kernel_is_the_one_that_runs(tmp_path: Path) -> None:
    model = rewritten(parsed(ADDED), tmp_path)[0]
    ran: dict[bool, list[str]] = {}
    for library in (True, False):
        running = session(model, library, profile=tmp_path)
        running.run(None, feeds("float32"))
        events = json.loads(Path(running.end_profiling()).read_text())
        nodes = (e["args"] for e in events if e.get("cat") == "Node")
        ran[library] = [args["op_name"] for args in nodes if "op_name" in args]
    assert ran == {True: ["add_softmax", "MatMul"], False: ["Add", "Softmax", "MatMul"]}


@compiled
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mask", [False, True])
def test_of_float16_beside_products(mask: bool, known: bool, tmp_path: Path) -> None:
    """Where ONNX Runtime computes these in float32, the kernel of float32 runs, and there is no cast beside it."""
    lines = f"k = MatMul(x, z) {NUMBER} q = Mul(k, c) " + ("h = Add(q, m) p = Softmax(h)" if mask else "p = Softmax(q)")
    model = rewritten(parsed(lines, "float16", inputs=", float16[t,t] z"), tmp_path)[0]
    for value in model.graph.input if not known else ():
        value.type.tensor_type.ClearField("shape")
    given = feeds("float16", 1.0) | {"z": np.random.default_rng(7).standard_normal((7, 7)).astype("f2")}
    running = session(model, profile=tmp_path)
    found = running.run(None, {i.name: given[i.name] for i in running.get_inputs()})[0]
    events = json.loads(Path(running.end_profiling()).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and "op_name" in e["args"]]
    (ours,) = (args for args in nodes if "softmax" in args["op_name"])
    if not (1, 23) <= normfuse.targets.runtime_version("") <= (1, 30):  # tried: 1.24 to 1.29 do not
        assert [next(iter(one)) for one in ours["input_type_shape"]] == ["float"] * (1 + mask)
        casts = [args["input_type_shape"] for args in nodes if args["op_name"] == "Cast"]
        assert not any({"float": [2, 4, 5, 7]} in one for one in casts)
    wide = {name: a.astype("f8") for name, a in given.items()}
    exact = softmax(wide["x"] @ wide["z"] * 0.125 + (wide["m"] if mask else 0)) @ wide["v"]
    plain = session(model, library=False).run(None, {i.name: given[i.name] for i in running.get_inputs()})[0]
    assert np.abs(found - exact).max() <= max(1.5 * np.abs(plain - exact).max(), 2**-11)


@compiled
def test_it_stays_with_its_body_on_cuda() -> None:
    names = {f"{add}softmax{form}" for add in ("", "add_") for form in FORMS}
    assert names <= set(normfuse.ort.names("cpu")) and not names & set(normfuse.ort.names("cuda"))


@pytest.mark.parametrize("flag", ["", "-DNORMFUSE_AVX2", "-DNORMFUSE_BASELINE"])
def test_every_instruction_set(flag: str, tmp_path: Path) -> None:
    """The rows by themselves, as processors without AVX-512, and without AVX2, compute them."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path, source = tmp_path / "rows.so", Path(normfuse.ort.__file__).parent / "cpu.c"
    command = [compiler, "-std=c11", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-w",
               "-DINLINE=inline __attribute__((unused))"]  # fmt: skip
    subprocess.run([*command, *filter(None, [flag]), str(source), "-lm", "-o", str(path)], check=True)
    rows = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_longlong
    real, small = ctypes.c_float, ctypes.c_int
    rows.nf_cpu_softmax.argtypes = [small, pointer, real, pointer, real, small, small, pointer, whole, pointer]
    rng = np.random.default_rng(5)
    for by, (kind, dtype) in itertools.product((1.0, 0.125, -3.0), enumerate(TYPES)):
        for n in (1, 3, 4, 5, 8, 15, 16, 17, 31, 64, 65, 300, 1025, 5000):
            for mask in (None, 1, n):
                x = (rng.standard_normal(n) * 20 / by).astype(dtype)
                m = np.zeros(n, "f4")
                m[n // 2 :] = -60000 if mask == n else 0
                y, scratch = np.full(n + 1, 7, dtype), np.empty(n + 16, "f4")
                masked, number = m.ctypes.data if mask == n else None, -9 if mask == 1 else 0
                rows.nf_cpu_softmax(kind, x.ctypes.data, by, masked, number, kind, kind, y.ctypes.data, n,
                                    scratch.ctypes.data)  # fmt: skip
                want = softmax(x.astype("f8") * by + (m.astype("f8") if mask == n else 0))
                assert y[n] == 7 and np.abs(y[:n] - want).max() <= (2**-11 if kind else 2**-23 * 100)
                if mask == n and n > 1:
                    assert (y[n // 2 : n] == 0).all()
    for x, want in ((np.full(20, -np.inf), np.full(20, 0.05)), (np.r_[np.nan, np.zeros(19)], np.full(20, np.nan)),
                    (np.r_[np.inf, np.zeros(19)], np.r_[np.nan, np.full(19, np.nan)])):  # fmt: skip
        row, y, scratch = x.astype("f4"), np.empty(20, "f4"), np.empty(36, "f4")
        for half in (0, 1):
            rows.nf_cpu_softmax(0, row.ctypes.data, 1, None, 0, half, 0, y.ctypes.data, 20, scratch.ctypes.data)
            np.testing.assert_allclose(y, np.nan if half and (x == -np.inf).all() else want, rtol=1e-6)
