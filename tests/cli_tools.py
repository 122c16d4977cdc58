"""What the tests of the command line share: small models, a way to run a command, and what an error looks like."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from normfuse.cli import main

COMMAND = [sys.executable, "-m", "normfuse"]
EVIL = "\x1b[31mred\x1b[0m\x1b]0;title\x07[bold]\u202ename\r"

Result = tuple[int, str, str]
"""Exit code, stdout, stderr."""


def run(*argv: object) -> Result:
    """Run the command line in this process; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return code, out.getvalue(), err.getvalue()


def fails(result: Result, code: int = 2) -> str:
    """The one line on stderr of a command that failed as the contract says."""
    assert result[0] == code, result
    assert result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("normfuse: ")
    return lines[0]


def fails_json(result: Result, kind: str | None = None, code: int = 2) -> str:
    assert result[0] == code, result
    data = json.loads(result[1])
    assert set(data) == {"schema", "error"}
    assert data["schema"] == 1
    assert kind is None or data["error"]["kind"] == kind
    assert "\n" not in data["error"]["message"]
    return str(data["error"]["message"])


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model and give back where."""
    onnx.save(model, path)
    return path


def norm_model(prefix: str = "", eps: float = 1e-6, outside: bool = False) -> onnx.ModelProto:
    """x * (mean(x^2) + eps)^-1/2 * w at opset 17, each value named with a prefix; or with eps outside the root."""
    name = prefix.__add__
    root = [("Add", ["mean", "eps"], "sum"), ("Sqrt", ["sum"], "root")]
    if outside:
        root = [("Sqrt", ["mean"], "sum"), ("Add", ["sum", "eps"], "root")]
    steps: list[tuple[str, list[str], str]] = [
        ("Mul", ["x", "x"], "square"), ("ReduceMean", ["square"], "mean"), *root,
        ("Div", ["x", "root"], "normed"), ("Mul", ["normed", "w"], "y"),
    ]  # fmt: skip
    nodes = []
    for op, inputs, output in steps:
        more: dict[str, Any] = {"axes": [-1], "keepdims": 1} if op == "ReduceMean" else {}
        node = helper.make_node(op, list(map(name, inputs)), [name(output)], name=name(f"{op}_{output}"), **more)
        nodes.append(node)
    weight = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    constants = [
        numpy_helper.from_array(np.array(eps, np.float32), name("eps")), numpy_helper.from_array(weight, name("w")),
    ]  # fmt: skip
    return wrap(nodes, constants, [2, 5, 64], name)


def wrap(
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    shape: list[int],
    name: Callable[[str], str] = str,
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name(v), TensorProto.FLOAT, shape) for v in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


RMS = "sq = Mul(x, x) ms = ReduceMean(sq, last) a = Add(ms, eps) r = Sqrt(a) n = Div(x, r) y = Mul(n, w)"


def rms_file(path: Path, lines: str = RMS, outputs: str = "float[B,16] y") -> Path:
    """Write a model of x of 16 columns, by its nodes."""
    head = '<ir_version: 9, opset_import: ["": 18]>'
    made = onnx.parser.parse_model(f"{head} g (float[B,16] x) => ({outputs}) {{ {lines} }}")
    held = {"last": np.array([-1]), "eps": np.float32(1e-5), "w": np.ones(16, np.float32)}
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in held.items())
    onnx.save(made, path)
    return path


def cli(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "normfuse", *map(str, args)]
    return subprocess.run(command, text=True, check=False, timeout=60, **({"capture_output": True} | more))


def program(path: Path) -> Path:
    """Write an exported program with a LayerNorm."""
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.LayerNorm(256)).eval()
    torch.export.save(torch.export.export(module, (torch.randn(2, 16),)), path)
    return path
