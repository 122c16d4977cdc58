"""Models whose weights do not fit into memory: gigabytes beside the file, few of them real."""

from __future__ import annotations

import json
import os
import pty
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normfuse
from normfuse.errors import InputError
from normfuse.io import files
from normfuse.io.write import copy
from normfuse.sessions import session
from tests.cli_tools import norm_model, saved
from tests.test_certificates import IDS, OPERATOR, chain
from tests.converted import model

GIB = 2**30
WIDTH = 16384
"""A square matrix of float32 of this width is one GiB."""
COLUMNS = 64
LIMIT = 1.0
"""GiB of resident memory."""


def large(folder: Path, gib: int) -> Path:
    """A chain of spelled RMSNorms and matrices of one GiB each, most of the data file a hole."""
    nodes, tensors = [], [numpy_helper.from_array(np.array(v), k) for k, v in (("two", np.float32(2)), ("last", [-1]),
                                                                              ("eps", np.float32(1e-6)))]  # fmt: skip
    data = folder / "weights.bin"
    with data.open("wb") as f:
        f.truncate(gib * GIB)
        for i in range(gib):
            f.seek(i * GIB)
            f.write(np.eye(1, WIDTH, dtype="f4").tobytes())
    x = "x"
    for i in range(gib):
        tensors.append(numpy_helper.from_array(np.linspace(0.5, 1.5, WIDTH, dtype="f4"), f"w{i}"))
        matrix = TensorProto(name=f"W{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH],
                             data_location=TensorProto.EXTERNAL)  # fmt: skip
        for key, value in (("location", "weights.bin"), ("offset", str(i * GIB)), ("length", str(GIB))):
            matrix.external_data.add(key=key, value=value)
        tensors.append(matrix)
        for op, inputs, output in (("Pow", [x, "two"], "q"), ("ReduceMean", [f"q{i}", "last"], "m"),
                                   ("Add", [f"m{i}", "eps"], "e"), ("Sqrt", [f"e{i}"], "t"), ("Div", [x, f"t{i}"], "n"),
                                   ("Mul", [f"n{i}", f"w{i}"], "y"), ("MatMul", [f"y{i}", f"W{i}"], "x")):  # fmt: skip
            nodes.append(helper.make_node(op, inputs, [f"{output}{i}"], name=f"{op}{i}"))
        x = f"x{i}"
    values = [helper.make_tensor_value_info(v, TensorProto.FLOAT, [1, 2, WIDTH]) for v in ("x", x)]
    graph = helper.make_graph(nodes, "large", values[:1], values[1:], tensors)
    source = folder / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), source)
    return source


def told(*command: str) -> tuple[dict[str, Any], float]:
    """What a command says, and the GiB of resident memory that it took at most (ru_maxrss has the parent's in it)."""
    code = ("import re, sys; from normfuse.cli import main; code = main(sys.argv[1:]); "
            "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]; "
            "print(peak, file=sys.stderr); sys.exit(code)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *command, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), int(done.stderr.splitlines()[-1]) / 2**20


def timed(*command: str) -> tuple[dict[str, Any], float, float]:
    """And the seconds of a processor that it took, which depend less on other jobs than those of the clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found, memory = told(*command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, memory, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rewritten(source: Path, out: Path, *more: str) -> tuple[dict[str, Any], float]:
    return told("rewrite", str(source), str(out), *more)


@pytest.mark.parametrize("gib", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_memory(gib: int, tmp_path: Path) -> None:
    source, out = large(tmp_path, gib), tmp_path / "out.onnx"
    _, _, small = timed("inspect", str(saved(norm_model(), tmp_path / "small.onnx")))
    found, memory, seconds = timed("inspect", str(source))
    print(f"{gib} GiB of weights, inspected: {seconds:.1f} s, a small model {small:.1f} s, {memory:.2f} GiB resident")
    assert len(found["norms"]) == gib and memory < LIMIT and seconds < 1.5 * small + 0.5
    found, memory = rewritten(source, out, "--external-data", "reference")
    print(f"{gib} GiB of weights, referred to: {memory:.2f} GiB resident")
    assert found["fused"] == gib and memory < LIMIT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.onnx", "out.onnx", "small.onnx", "weights.bin"]
    found, memory = rewritten(source, out, "--overwrite")
    print(f"{gib} GiB of weights, copied: {memory:.2f} GiB resident")
    assert found["fused"] == gib and memory < LIMIT
    (data,) = tmp_path.glob("out-*.data")
    assert data.stat().st_size == gib * GIB
    assert data.stat().st_blocks * 512 < GIB  # holes stay holes
    for path in (source, out):
        made = onnx.load(path, load_external_data=False)
        assert {e.value for t in made.graph.initializer for e in t.external_data if e.key == "location"} == {
            data.name if path == out else "weights.bin"}  # fmt: skip
    with data.open("rb") as f:
        f.seek((gib - 1) * GIB)
        assert np.frombuffer(f.read(4 * WIDTH), "f4").tolist() == [1.0] + [0.0] * (WIDTH - 1)
    onnx.checker.check_model(out)


MANY = """
import gc, sys, onnx, normfuse
from normfuse.process import resident

kept = [[] for _ in range(10**6)]  # a process with much in it seldom collects its oldest objects
gc.freeze(), gc.unfreeze()
grown = []
for _ in range(8):
    normfuse.rewrite(sys.argv[1], sys.argv[2], overwrite=True)
    normfuse.inspect(sys.argv[1])
    normfuse.optimize(onnx.load(sys.argv[1]))
    grown.append(resident())
print(grown[-1] - grown[1])
"""


def test_many_models_take_the_memory_of_few(tmp_path: Path) -> None:
    made = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[B, 4096] x) => (float[B, 4096] y) '
                                   "{ q = Mul(x, x) m = ReduceMean<axes=[-1]>(q) e = Add(m, eps) r = Sqrt(e) "
                                   "n = Div(x, r) y = MatMul(n, W) }")  # fmt: skip
    for name, array in (("eps", np.float32(1e-6)), ("W", np.eye(4096, dtype="f4"))):
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.save(made, tmp_path / "in.onnx")
    command = shlex.join(map(str, [sys.executable, "-c", MANY, tmp_path / "in.onnx", tmp_path / "out.onnx"]))
    # by a shell: the peak of a process has that of its parent in it
    done = subprocess.run(f"{command}; exit $?", shell=True, capture_output=True, text=True, check=True)
    print(f"grown by {int(done.stdout) / GIB:.2f} GiB")
    assert int(done.stdout) < GIB / 2


def test_a_reference_out_of_the_folder(tmp_path: Path) -> None:
    source = large(tmp_path, 1)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"may only refer to files in its own folder or below.*external_data='copy'"):
        normfuse.rewrite(source, tmp_path / "other" / "out.onnx", external_data="reference")
    assert not list((tmp_path / "other").iterdir())
    with pytest.raises(InputError, match="holds the weights of the input"):
        normfuse.rewrite(source, tmp_path / "weights.bin", overwrite=True)
    with pytest.raises(InputError, match="external_data='link' is not known"):
        normfuse.rewrite(source, tmp_path / "out.onnx", external_data="link")
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "weights.bin").rename(inside / "weights.bin")
    made = onnx.load(source, load_external_data=False)
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "inside/weights.bin" if entry.key == "location" else entry.value
    onnx.save(made, source)
    normfuse.rewrite(source, tmp_path / "out.onnx", external_data="reference")
    onnx.checker.check_model(tmp_path / "out.onnx")


def test_weights_in_a_branch_of_a_function(tmp_path: Path) -> None:
    """They go with the model, too."""
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]> g (float[3, 8] x, bool c) => (float[3, 8] y)
        { y = own.F(x, c) }
        <domain: "own", opset_import: ["" : 17]> F (a, p) => (q)
        { q = If(p) <then_branch = t () => (float[3, 8] o) <float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}>
            { eps = Constant<value = float {1e-5}>() s = Mul(a, a) m = ReduceMean<axes = [-1]>(s) e = Add(m, eps)
              r = Sqrt(e) d = Div(a, r) o = Mul(d, w) }, else_branch = f () => (float[3, 8] n) { n = Neg(a) }> }"""
    made = onnx.parser.parse_model(text)
    (weight,) = made.functions[0].node[0].attribute[0].g.initializer
    (tmp_path / "w.bin").write_bytes(numpy_helper.to_array(weight).tobytes())
    numbers = numpy_helper.to_array(weight).copy()
    weight.CopyFrom(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8]))
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    onnx.save(made, tmp_path / "in.onnx")
    (tmp_path / "other").mkdir()
    assert normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "other" / "out.onnx").fused == 1
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    (y,) = session(tmp_path / "other" / "out.onnx").run(None, {"x": x, "c": np.array(True)})
    np.testing.assert_allclose(y, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * numbers, rtol=1e-5)


@pytest.mark.parametrize("flags", [
    (), *(pytest.param(f, marks=pytest.mark.slow) for f in (("-q",), ("--json",))),
])  # fmt: skip
def test_a_bar_on_a_terminal_only(flags: tuple[str, ...], tmp_path: Path) -> None:
    source = large(tmp_path, 1)
    code = ("import normfuse.cli_print as p, sys; p.PATIENCE = 0; from normfuse.cli import main; "
            "sys.exit(main(sys.argv[1:]))")  # fmt: skip
    command = [sys.executable, "-c", code, "rewrite", str(source), str(tmp_path / "out.onnx"), *flags]
    ours, theirs = pty.openpty()
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    out = done.communicate()[0]
    assert done.returncode == 0 and b"\x1b" not in out
    assert (b"copying weights" in shown) == (flags != ("-q",))
    piped = subprocess.run([*command, "--overwrite"], capture_output=True, check=True)
    assert b"copying weights" not in piped.stderr + piped.stdout


# -- weights that a conversion edits -----------------------------------------------------------------------------------


def beside(folder: Path) -> Path:
    """A chain whose weights lie in a file beside it, with a matrix that no conversion edits."""
    rng, path = np.random.default_rng(0), folder / "in.onnx"
    lines = f"{chain(OPERATOR)} y = MatMul(n, head)"
    shapes = {"table": (90, COLUMNS), "w": (COLUMNS, COLUMNS), "g": (COLUMNS,), "b": (COLUMNS,), "head": (COLUMNS, 320)}
    held: dict[str, Any] = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    made = model("int64[1,3] i", lines, **held)
    made.graph.initializer.append(numpy_helper.from_array(np.array(["a" * 600, "b" * 700], object), "words"))
    onnx.save(made, path, save_as_external_data=True, location="in.data",
              size_threshold=1024)  # fmt: skip
    return path


@pytest.mark.parametrize("inline", [0, 2**28])
@pytest.mark.parametrize("data", ["copy", "reference"])
def test_edited_weights_get_a_file_of_their_own(inline: int, data: str, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A model of more than 2 GiB stays one that can be written; of what was edited there is no second copy."""
    monkeypatch.setattr(files, "INLINE", inline)
    source, out = beside(tmp_path), tmp_path / "out.onnx"
    config = normfuse.Config(layernorm_to_rmsnorm="exact", verify="model")
    report = normfuse.rewrite(source, out, config, external_data=data)
    assert report.converted == 2 and not report.refusals
    want, got = (session(path).run(None, {"i": IDS[0]["i"]})[0] for path in (source, out))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    made = onnx.load(out, load_external_data=False).graph.initializer
    where = {t.name: t.external_data[0].value if t.external_data else "" for t in made}
    edited = 4 * COLUMNS * (90 + COLUMNS)
    assert (where["table"] == where["w"] == "") is bool(inline) and where["g"] == where["b"] == ""
    assert (out.stat().st_size > edited) is bool(inline)
    assert where["head"] == "in.data" if data == "reference" else where["head"].startswith("out-")
    if not inline:
        assert where["table"] == where["w"] != where["head"]
        assert (tmp_path / where["w"]).stat().st_size in range(edited, edited + 8192)
    if data == "copy":
        copied = (tmp_path / where["head"]).read_bytes()
        assert len(copied) == (tmp_path / "in.data").stat().st_size
        offsets = {t.name: int(t.external_data[1].value) for t in onnx.load(source, load_external_data=False)
                   .graph.initializer if t.external_data}  # fmt: skip
        assert not any(copied[offsets["table"] :][: 4 * 90 * COLUMNS])
        assert not any(copied[offsets["w"] :][: 4 * COLUMNS**2])
    assert not list(tmp_path.glob(".normfuse-*"))


def test_parts_of_a_file_with_holes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source, out = tmp_path / "source", tmp_path / "out"
    want, size = bytearray(40 * 4096), 40 * 4096
    with source.open("wb") as f:
        f.truncate(size)
        for i in rng.permutation(40)[:20]:
            f.seek(i * 4096)
            f.write(bytes([i + 1]) * 4096)
    held, at, parts = source.read_bytes(), 0, []
    while at < size:
        start, end = at + int(rng.integers(1, 3000)), at + int(rng.integers(3000, 9000))
        parts.append((start, min(end, size)))
        want[start:end], at = held[start:end], end
    with source.open("rb") as a, out.open("wb+") as b:
        copy(a.fileno(), b.fileno(), None, [p for p in parts if p[0] < p[1]])
    assert out.read_bytes() == bytes(want[:size])


@pytest.mark.parametrize("failing", ["write_bytes", "_serialised"])
def test_nothing_is_left_of_edited_weights_that_were_not_written(failing: str, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(files, "INLINE", 0)
    source = beside(tmp_path)
    before = sorted(tmp_path.iterdir())

    def fail(*args: Any) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(files, failing, fail)
    with pytest.raises(InputError, match="the disk is full"):
        normfuse.rewrite(source, tmp_path / "out.onnx", normfuse.Config(layernorm_to_rmsnorm="exact", verify="off"))
    assert sorted(tmp_path.iterdir()) == before
