"""Additions ahead of LayerNorms that target `ort-cpu` writes as Sum, as ONNX Runtime makes a slow operator of Add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import normfuse
from normfuse import Config
from normfuse.verify import compare_models
from tests.onnx_texts import numbers

SPELLED = """m = ReduceMean<axes=[-1]>(s) d = Sub(s, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps)
r = Sqrt(e) n0 = Div(d, r) n1 = Mul(n0, g) n = Add(n1, b)"""
OPERATOR = "n = LayerNormalization<axis=-1>(s, g, b)"
END = "y = Neg(n)"


def made(lines: str, opset: int = 17, kind: str = "float", outputs: str = "y") -> onnx.ModelProto:
    shown = ", ".join(f"{kind}[1,4,16] {name}" for name in outputs.split())
    head = f'<ir_version: 9, opset_import: ["": {opset}]>'
    model = onnx.parser.parse_model(f"{head} a ({kind}[1,4,16] x, {kind}[1,4,16] z) => ({shown}) {{ {lines} }}")
    held = {"g": numbers(16), "b": numbers(16), "c": numbers(16), "eps": np.float32(1e-5)}
    dtype = np.float16 if kind == "float16" else np.float32
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v, dtype), n) for n, v in held.items()
                                   if n in lines)  # fmt: skip
    return model


def rewritten(model: onnx.ModelProto, folder: Path, **config: Any) -> tuple[list[str], list[str]]:
    """The operators of the file, and of ONNX Runtime's graph for it; the outputs stay."""
    onnx.save(model, folder / "in.onnx")
    report = normfuse.rewrite(folder / "in.onnx", folder / "out.onnx",
                              Config(**{"target": "ort-cpu", "ort_version": "1.31"} | config))  # fmt: skip
    assert compare_models(folder / "in.onnx", folder / "out.onnx")["equal"]
    found = [node.op_type for node in onnx.load(folder / "out.onnx").graph.node]
    assert any("layer_norm, the addition ahead: sum (float32 in 1.30" in n for n in report.notes) == ("Sum" in found)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "run.onnx"), 4
    onnxruntime.InferenceSession(folder / "out.onnx", options, providers=["CPUExecutionProvider"])
    return found, [node.op_type for node in onnx.load(folder / "run.onnx").graph.node]


@pytest.mark.parametrize(("norm", "opset"), [(OPERATOR, 17), (OPERATOR, 23), (SPELLED, 13), (SPELLED, 17)])
@pytest.mark.parametrize("mode", ["off", "exact"])
def test_what_a_layer_norm_alone_reads(norm: str, opset: int, mode: Any, tmp_path: Path) -> None:
    model = made(f"s = Add(x, z) {norm} {END}", opset)
    written, run = rewritten(model, tmp_path, layernorm_to_rmsnorm=mode)
    assert "Sum" in written and "Add" not in written
    assert "Sum" in run and "SkipLayerNormalization" not in run
    again = normfuse.rewrite(tmp_path / "out.onnx", tmp_path / "again.onnx", Config(target="ort-cpu"))
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes() and not again.fused


@pytest.mark.parametrize(("lines", "outputs"), [
    (f"s = Add(x, z) {OPERATOR} y = Add(n, s)", "y"), (f"s = Add(x, z) {OPERATOR} {END}", "y s"),
    (f"s = Add(x, c) {OPERATOR} {END}", "y"), (f"s = Mul(x, z) {OPERATOR} {END}", "y"),
    ("s = Add(x, z) q = Mul(s, s) v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) r = Sqrt(e) n = Div(s, r) y = Mul(n, g)",
     "y"),
    (f"w = Add(x, z) s = Neg(w) {OPERATOR} {END}", "y"),
])  # fmt: skip
def test_what_stays(lines: str, outputs: str, tmp_path: Path) -> None:
    """What others read, an output, a bias, another operation, an RMSNorm, and what stands further ahead."""
    assert "Sum" not in rewritten(made(lines, outputs=outputs), tmp_path)[0]


@pytest.mark.parametrize("config", [{"ort_version": "1.29"}, {"target": "onnx", "ort_version": ""},
                                    {"target": "normfuse", "ort_version": ""}, {"target": "ort-cuda"}])  # fmt: skip
def test_where_it_stays(config: dict[str, Any], tmp_path: Path) -> None:
    assert "Sum" not in rewritten(made(f"s = Add(x, z) {OPERATOR} {END}"), tmp_path, **config)[0]


def test_half_types_stay(tmp_path: Path) -> None:
    """Of these ONNX Runtime makes no slower operator."""
    assert "Sum" not in rewritten(made(f"s = Add(x, z) {OPERATOR} {END}", kind="float16"), tmp_path)[0]


def test_in_a_branch(tmp_path: Path) -> None:
    """What is written there is in the file, too."""
    model = made(f"""y = If (f) <then_branch = t () => (float[1,4,16] o) {{ s = Add(x, z) {OPERATOR} o = Neg(n) }},
                                 else_branch = e () => (float[1,4,16] p) {{ p = Neg(x) }}>""".replace("\n", " "))
    model.graph.input.append(onnx.helper.make_tensor_value_info("f", onnx.TensorProto.BOOL, []))
    onnx.save(model, tmp_path / "in.onnx")
    config = Config(target="ort-cpu", ort_version="1.31", verify="model")
    normfuse.rewrite(tmp_path / "in.onnx", tmp_path / "out.onnx", config)
    (branch, _) = (attribute.g for attribute in onnx.load(tmp_path / "out.onnx").graph.node[0].attribute)
    assert next(node.op_type for node in branch.node) == "Sum"
