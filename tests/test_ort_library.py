"""The operators for ONNX Runtime: under every name that a rewrite gives, and equal to the body of each."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import normfuse.ort
from normfuse.errors import InputError, UnsupportedError
from normfuse.frontends.onnx_functions import function_name as lone_name
from normfuse.verify import EPSILON, representable, rows
from tests.ort_cases import (
    FLAGS, KINDS, OPS, Roles, Types, alone, call, lone, meaning, name, roles, there, types, usual,
)  # fmt: skip

ort = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "normfuse" / "ort"
CPU = ("library.c", "call.c", "softmax.c", "cpu.c")
Arrays = dict[str, np.ndarray[Any, Any]]

compiled = pytest.mark.skipif(normfuse.ort.library_path() is None, reason="installed without a C compiler")


def test_the_library_is_there_where_a_compiler_is() -> None:
    """Or all the tests below would be skipped, and nobody would know."""
    assert normfuse.ort.library_path() is not None or not (shutil.which("cc") or shutil.which("gcc"))

pytestmark = compiled


def session(model: onnx.ModelProto, library: bool = True, threads: int = 1, profile: Path | None = None) -> Any:
    """A session with or without the operators."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "run")
    if library:
        normfuse.ort.register(options, model)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds_for(model: onnx.ModelProto, how: Types, x: np.ndarray[Any, Any], seed: int = 0) -> Arrays:
    """The inputs of a call: x, a residual like it or the rows of k, weights near 1; all exact in their types."""
    rng = np.random.default_rng(seed)
    feeds: Arrays = {}
    for info in model.graph.input:
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        if info.name == "x_f32":
            array = x.reshape(shape)
        elif info.name == "r_f32":
            array = representable(rng.standard_normal(shape), "bfloat16" if "bfloat16" in str(how) else how.x)
        else:
            array = representable(rng.uniform(0.5, 1.5, shape), how.affine)
        feeds[info.name] = array.astype(np.float32)
    return feeds


def gap(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The largest difference; infinite where one is finite and the other not."""
    both = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return float("inf") if not (both | same).all() else float(np.abs(a[both] - b[both]).max(initial=0))


class Tally:
    """Elements of half-precision results that differ from the definition's, over all that is compared.

    The definition is taken with its means in float32, as the bodies have them, and in float64: on rows with a large
    mean ours are the more exact ones.
    """

    def __init__(self) -> None:
        self.differ = self.count = 0

    def check(self, op: str, kind: str, how: Types, role: Roles, feeds: Arrays, found: Sequence[np.ndarray[Any, Any]],
              axes: Sequence[int] = (-1,)) -> None:  # fmt: skip
        """Compare with the definition and with float64."""
        want, exact = (meaning(op, kind, how, role, feeds, wide, axes) for wide in (False, True))
        better = meaning(op, kind, how, role, feeds, False, axes, sums=True)
        for i, (a, b, c, truth) in enumerate(zip(found, want, better, exact, strict=True)):
            a = a.astype(np.float64)
            dtype = how.x if op.startswith("add_norm") and i == 1 else how.result
            top = float(np.abs(b[np.isfinite(b)]).max(initial=0))
            assert a.shape == b.shape
            if how.compute == "float32" and np.isfinite(b).all():
                assert gap(a, truth) <= 2 * gap(b, truth) + 4 * EPSILON[dtype] * top
            if dtype == "float32" and how.affine == "float32" and not how.first:
                continue
            self.differ += int(((a != b) & (a != c) & ~(np.isnan(a) & np.isnan(b))).sum())
            self.count += a.size

    @property
    def share(self) -> float:
        return self.differ / max(1, self.count)


# -- names -------------------------------------------------------------------------------------------------------------


def every_name() -> set[str]:
    """What the two functions that name functions can give, for opsets from 12 on and types up to float32."""
    found = {name(op, kind, how, role) for op in OPS for kind in KINDS for how in types() for role in roles(op)
             if there(op, how) and not alone(op, kind, how, role)}  # fmt: skip
    pairs = {(how.x if how.first or how.cast == "none" else how.compute, how.compute) for how in types()}
    found |= {f"{add}softmax{form}" for add in ("", "add_") for form in ("", "_of_f16", "_scaled_of_f16")}
    return found | {lone_name(kind, w, b, inner, stash, 18, 1e-5) for kind in KINDS for w, b in FLAGS
                    for inner, stash in pairs if not (b and kind == "rms_norm")}  # fmt: skip


def test_every_name_has_an_operator() -> None:
    names = normfuse.ort.names()
    assert len(names) == len(set(names))
    assert set(names) == every_name()


def test_no_operator_for_what_is_left_to_the_body() -> None:
    assert not [n for n in normfuse.ort.names() if "eps" in n or "written" in n or "f64" in n]


def operators(of: Iterable[Types]) -> list[tuple[str, Types]]:
    """The operators that there are."""
    return [(op, how) for op in OPS for how in of if there(op, how)]


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "how"), operators(types()), ids=str)
def test_every_operator_computes_its_body(op: str, how: Types) -> None:
    tally = Tally()
    for kind, role in itertools.product(KINDS, roles(op)):
        if alone(op, kind, how, role):
            continue
        model = call(op, kind, how, role, (37, 21 if op == "qk_norm" else 37))
        x = representable(np.random.default_rng(1).standard_normal((2, 3, 37)), how.x)
        feeds = feeds_for(model, how, x)
        tally.check(op, kind, how, role, feeds, session(model).run(None, feeds))
    assert tally.share < 0.003


HOSTILE = (1, 2, 7, 31, 256, 4099)


@pytest.mark.parametrize(("op", "how"), operators([
    Types(), Types("float16", "float32", "first", "float16"), Types("bfloat16", "float32", "first", "bfloat16"),
    Types("float16", "float32", "last", "float16"), Types("bfloat16", "float32", "last", "bfloat16"),
    Types("bfloat16", "float32", "first", "float32"), Types("float16", "float16", "none", "float16"),
    ]), ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_rows(op: str, kind: str, how: Types) -> None:
    role, tally = usual(op, kind), Tally()
    for size in HOSTILE:
        if alone(op, kind, how, role):
            model = lone(kind, how.x, how.compute, *role[0], (2, 3, size), [-1], [size])
            for info in model.graph.input:
                info.name = {"w_f32": "w0_f32", "b_f32": "b0_f32"}.get(info.name, info.name)
            for node in model.graph.node:
                node.input[:] = [{"w_f32": "w0_f32", "b_f32": "b0_f32"}.get(n, n) for n in node.input]
        else:
            model = call(op, kind, how, role, (size, size))
        running, body = session(model), session(model, library=False) if how.x == "float32" else None
        for label, x in rows((2, 3, size), how.x):
            feeds = feeds_for(model, how, x)
            found = running.run(None, feeds)
            if how.compute == how.x != "float32" and label in ("large", "large mean", "offset"):
                assert [f.shape for f in found]  # float16 statistics overflow or cancel: nothing to compare
                continue
            tally.check(op, kind, how, role, feeds, found)
            if body is not None:
                truth = meaning(op, kind, how, role, feeds, exact=True)
                for a, b, c in zip(found, body.run(None, feeds), truth, strict=True):
                    assert gap(a.astype("f8"), c) <= 2 * gap(b.astype("f8"), c) + 4 * 2**-23 * np.abs(c).max(initial=0)
    assert tally.share < 0.003


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize(("kind", "shape", "axes", "weight"), [
    (kind, *case) for kind in KINDS for case in [
        ((2, 3, 33), [-1], [33]), ((2, 5, 9), [-2, -1], [5, 9]), ((2, 19, 3, 5), [-3], [19, 1, 1]),
        ((7, 4, 40), [-2], [4, 1]), ((3, 4, 5, 6), [-3, -1], [4, 1, 6]), ((6, 5), [-2, -1], [6, 5]),
        ((33, 4), [-2], [33, 1]), ((2, 3, 8), [-1], [1]), ((4, 8), [1], [8])]])  # fmt: skip
def test_axes(kind: str, shape: tuple[int, ...], axes: list[int], weight: list[int], opset: int) -> None:
    tally = Tally()
    for inner, stash in (("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")):
        how = Types(inner, stash, "none" if inner == stash else "first", inner)
        model = lone(kind, inner, stash, True, kind == "layer_norm", shape, axes, weight, opset)
        x = representable(np.random.default_rng(2).standard_normal(shape), inner)
        feeds = feeds_for(model, how, x)
        found = session(model).run(None, feeds)
        renamed = {{"w_f32": "w0_f32", "b_f32": "b0_f32"}.get(n, n): a for n, a in feeds.items()}
        tally.check("norm", kind, how, ((True, kind == "layer_norm"),), renamed, found, axes)
        if inner == "float32":
            body = session(model, library=False).run(None, feeds)
            np.testing.assert_allclose(found[0], body[0], rtol=1e-5, atol=1e-6)
    assert tally.share < 0.01


@pytest.mark.parametrize("op", [op for op, _ in operators([Types()])][1:])
@pytest.mark.parametrize("sizes", [(0, 0), (8, 8)])
def test_empty(op: str, sizes: tuple[int, int]) -> None:
    lead = (2, 3) if sizes[0] == 0 else (0, 3)
    model = call(op, "layer_norm", Types(), usual(op, "layer_norm"), sizes, lead)
    feeds = {i.name: np.zeros([d.dim_value for d in i.type.tensor_type.shape.dim], "f4") for i in model.graph.input}
    assert {f.shape for f in session(model).run(None, feeds)} == {(*lead, sizes[0])}


# -- order, threads, memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "how"), operators([Types(), Types("float16", "float32", "first", "float16")]), ids=str)
def test_a_row_depends_on_nothing_but_itself(op: str, how: Types) -> None:
    kind, size, lead = "layer_norm", 1027, (5, 50)
    if alone(op, kind, how, usual(op, kind)):
        op = "add_norm"
    model = call(op, kind, how, usual(op, kind), (size, size), lead)
    feeds = feeds_for(model, how, representable(np.random.default_rng(3).standard_normal((*lead, size)), how.x))
    one, two = (session(model, threads=n).run(None, feeds) for n in (1, 2))
    small = call(op, kind, how, usual(op, kind), (size, size), (1, 1))
    row = {n: a if a.ndim == 1 else a[4:, 49:] for n, a in feeds.items()}
    for a, b, c in zip(one, two, session(small).run(None, row), strict=True):
        assert a.tobytes() == b.tobytes()
        assert a[4:, 49:].tobytes() == c.tobytes()


def chain(length: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    """add_rms_norm after add_rms_norm, which lets results take the place of inputs; the body as a function."""
    one = call("add_norm", "rms_norm", Types(), ((True, False),), (shape[-1],) * 2, shape[:-1])
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("add_rms_norm", [f"y{i}", f"s{i}", "w"], [f"y{i + 1}", f"s{i + 1}"], domain="normfuse",
                              eps=1e-5) for i in range(length)]  # fmt: skip
    weight = onnx.numpy_helper.from_array(np.linspace(0.5, 1.5, shape[-1], dtype="f4"), "w")
    graph = helper.make_graph(nodes, "chain", [value(n, TensorProto.FLOAT, shape) for n in ("y0", "s0")],
                              [value(f"{n}{length}", TensorProto.FLOAT, shape) for n in "ys"], [weight])  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("normfuse", 1)]
    return helper.make_model(graph, functions=list(one.functions), opset_imports=opsets, ir_version=9)


def test_results_in_the_place_of_inputs_and_the_kernel_is_the_one_that_runs(tmp_path: Path) -> None:
    model = chain(6, (2, 3, 64))
    rng = np.random.default_rng(4)
    feeds = {n: rng.standard_normal((2, 3, 64)).astype("f4") for n in ("y0", "s0")}
    ran: list[set[str]] = []
    results = []
    for library in (True, False):
        running = session(model, library, profile=tmp_path)
        results.append(running.run(None, feeds))
        events = json.loads(Path(running.end_profiling()).read_text())
        ran.append({e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "op_name" in e.get("args", {})})
    assert ran[0] == {"add_rms_norm"}
    assert "Add" in ran[1]
    assert "add_rms_norm" not in ran[1]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def symbolic(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with sizes that only a run tells."""
    for i, info in enumerate(model.graph.input):
        for j, dim in enumerate(info.type.tensor_type.shape.dim):
            dim.dim_param = f"d{i}_{j}"
    return model


@pytest.mark.parametrize(("op", "shapes", "message"), [
    ("add_norm", {"r": (1, 3, 8)}, r"add_rms_norm: residual has shape \(1, 3, 8\), expected that of x, \(2, 3, 8\)"),
    ("add_norm", {"r": (8,)}, "residual has shape"),
    ("add_norm", {"w0": (7,)}, r"weight has shape \(7\), expected the 8 elements of a normalised row of x, \(2, 3"),
    ("add_norm", {"w0": (3, 8)}, "weight has shape"),
    ("norm_add_norm", {"w1": (9,)}, "norm_add_norm: weight2 has shape"),
    ("qk_norm", {"w1": (9,)}, "qk_norm: weight2 has shape"),
    ("add_norm", {"x": (), "r": ()}, "x has 0 dimensions, expected one with axis -1")])  # fmt: skip
def test_shapes_that_a_function_is_not_written_for(op: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    model = symbolic(call(op, "rms_norm", Types(), usual(op, "rms_norm"), (8, 8)))
    for info in model.graph.input:
        if len(shapes.get(info.name.removesuffix("_f32"), (1, 1, 1))) != len(info.type.tensor_type.shape.dim):
            info.type.tensor_type.ClearField("shape")
    running = session(model)
    feeds = {i.name: np.ones(shapes.get(i.name.removesuffix("_f32"), (8,) if i.name[0] in "wb" else (2, 3, 8)), "f4")
             for i in model.graph.input}  # fmt: skip
    with pytest.raises(Exception, match=message):
        running.run(None, feeds)


def test_functions_of_an_exported_torch_program_keep_their_bodies() -> None:
    node = helper.make_node("rms_norm", ["x", "w"], ["y"], domain="normfuse", eps=1e-6, offset=1.0)
    body = [helper.make_node("Mul", ["x", "w"], ["y"])]
    function = helper.make_function("normfuse", "rms_norm", ["x", "w"], ["y"], body, [helper.make_opsetid("", 18)],
                                    ["eps", "offset"])  # fmt: skip
    x, w, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xwy")
    graph = helper.make_graph([node], "g", [x, w], [y])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("normfuse", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    feeds = {"x": np.arange(4, dtype="f4"), "w": np.full(4, 3, "f4")}
    assert (session(model).run(None, feeds)[0] == feeds["x"] * 3).all()
    options = ort.SessionOptions()
    normfuse.ort.register(options)
    with pytest.raises(Exception, match=r"attribute `offset`.*without the library"):
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_all_operators_at_once_load_beside_any_model() -> None:
    options = ort.SessionOptions()
    normfuse.ort.register(options)
    model = chain(1, (1, 8))
    feeds = {n: np.ones((1, 8), "f4") for n in ("y0", "s0")}
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(running.run(None, feeds)[1], 2)


def test_a_model_that_the_runtime_optimised_and_saved(tmp_path: Path) -> None:
    """It has calls of the operators, and no functions any more."""
    model, saved = chain(1, (1, 8)), tmp_path / "saved.onnx"
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(saved)
    normfuse.ort.register(options, model)
    feeds = {n: np.ones((1, 8), "f4") for n in ("y0", "s0")}
    want = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)
    assert not onnx.load(saved).functions and normfuse.ort.called(saved) == normfuse.ort.called(model) != []
    for found, known in zip(session(onnx.load(saved)).run(None, feeds), want, strict=True):
        np.testing.assert_array_equal(found, known)


def test_options_are_for_one_model() -> None:
    options, model = ort.SessionOptions(), chain(1, (1, 8))
    normfuse.ort.register(options, model)
    with pytest.raises(InputError, match="hold NormFuse's operators already; make new ones for each model"):
        normfuse.ort.register(options, model)


CUDA = """#include "ops.h"
int nf_cuda_has(const Spec *spec) { return spec->op == OP_ADD_NORM; }
const char *nf_cuda_run(const Spec *spec, const Args *args) { return (void)spec, (void)args, "not here"; }
"""


DISABLED = "optimization.disable_specified_optimizers"


@compiled
@pytest.mark.parametrize(("lines", "none"), [
    ("y = Neg(x)", True), ("y = MatMul(x, x)", True), ("y = Conv(x, x)", False),
    ("y = MaxPool<kernel_shape = [1]>(x)", False), ("y = GlobalAveragePool(x)", False),
    ("y = com.microsoft.FusedConv(x, x)", False),
    ("c = Shape(x) f = Cast<to = 9>(c) y = If(f) <then_branch = t () => (float[1] a) { a = Conv(x, x) }, "
     "else_branch = e () => (float[1] b) { b = Neg(x) }>", False),
    ("y = my.f(x)", False),
])  # fmt: skip
def test_an_optimiser_of_convolutions_is_left_out_where_there_are_none(lines: str, none: bool) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["": 18, "my": 1]>
        g (float[1,1,1] x) => (float[1,1,1] y) {{ {lines} }}
        <domain: "my", opset_import: ["": 18]> f (a) => (b) {{ b = Conv(a, a) }}""" if "my.f" in lines else
        f'<ir_version: 9, opset_import: ["": 18]> g (float[1,1,1] x) => (float[1,1,1] y) {{ {lines} }}')  # fmt: skip
    for given in ("", "GeluFusion"):
        options = ort.SessionOptions()
        if given:
            options.add_session_config_entry(DISABLED, given)
        normfuse.ort.register(options, model)
        if none or given:
            assert options.get_session_config_entry(DISABLED) == (given or "NchwcTransformer")
        else:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry(DISABLED)


def test_operators_of_the_cuda_provider_do_not_disturb_the_cpu(tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None
    stub, path = tmp_path / "cuda.c", tmp_path / "both.so"
    stub.write_text(CUDA)
    sources = [str(stub), *(str(SOURCES / f) for f in CPU)]
    subprocess.run([compiler, "-std=c11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w",
                    "-fno-math-errno", "-DNORMFUSE_CUDA", f"-I{SOURCES}", *sources, "-lm", "-o", str(path)],
                   check=True)  # fmt: skip
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(path))
    model, feeds = chain(2, (1, 8)), {n: np.ones((1, 8), "f4") for n in ("y0", "s0")}
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for a, b in zip(running.run(None, feeds), session(model).run(None, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


_Get, _Version = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32), ctypes.CFUNCTYPE(ctypes.c_void_p)


class _Base(ctypes.Structure):
    """OrtApiBase."""

    _fields_ = (("get", _Get), ("version", _Version))


def test_another_layout_is_refused() -> None:
    path = normfuse.ort.library_path()
    assert path is not None
    found = ctypes.CDLL(str(path))
    found.RegisterCustomOps.restype = ctypes.c_void_p
    said: list[tuple[int, bytes]] = []

    def create_status(code: int, message: bytes) -> int:
        said.append((code, message))
        return 4711

    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(create_status)
    table = (ctypes.c_void_p * 400)(ctypes.cast(create, ctypes.c_void_p).value)
    version = ctypes.create_string_buffer(b"1.16.3")
    old = _Base(_Get(lambda v: ctypes.addressof(table) if v <= 16 else 0), _Version(lambda: ctypes.addressof(version)))
    assert found.RegisterCustomOps(None, ctypes.byref(old)) == 4711
    assert said[0][0] == 9
    assert said[0][1] == (b"NormFuse's operators need ONNX Runtime 1.17 or newer, and this is 1.16.3: update it, or "
                          b"load the model without them")  # fmt: skip
    unknown = _Base(_Get(lambda v: 0), _Version(lambda: 0))
    assert found.RegisterCustomOps(None, ctypes.byref(unknown)) is None  # nothing registered, nothing touched


def test_errors_of_register(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = 5
    with pytest.raises(InputError, match="a int is no model"):
        normfuse.ort.register(ort.SessionOptions(), model)
    monkeypatch.setattr(ort, "__version__", "1.16.3")
    with pytest.raises(UnsupportedError, match=r"need ONNX Runtime 1\.17 or newer, and this is 1\.16\.3"):
        normfuse.ort.register(ort.SessionOptions())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        normfuse.ort.register(None)
    monkeypatch.setattr(normfuse.ort, "EXTENSION_SUFFIXES", [".none"])
    with pytest.raises(UnsupportedError, match="without a C compiler"):
        normfuse.ort.register(None)


def test_import_is_lazy() -> None:
    code = "import normfuse, sys; print('normfuse.ort' in sys.modules, 'onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# -- under the sanitizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sanitizers(baseline: bool, tmp_path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    flags = ["-std=c11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off",
             "-DINLINE=inline __attribute__((unused))"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    assert compiler is not None
    build = [compiler, *flags, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(build, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    extra = ["-DNORMFUSE_BASELINE"] if baseline else []
    sources = [str(ROOT / "tests" / "ort_driver.c"), *(str(SOURCES / f) for f in CPU)]
    subprocess.run([compiler, *flags, *extra, "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", *sources, "-lm", "-o",
                    str(tmp_path / "driver")], check=True)  # fmt: skip
    done = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-1] == "ok"
