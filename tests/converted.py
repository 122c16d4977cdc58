"""Models whose LayerNorms are converted, and what has to hold of them: what the tests of the conversion share."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

import normfuse
from normfuse.sessions import session

D = 8
RNG = np.random.default_rng(0)


def numbers(*shape: int, dtype: type = np.float32, scale: float = 1.0) -> np.ndarray[Any, Any]:
    """Random ones with a mean."""
    return ((RNG.standard_normal(shape) + 0.5) * scale).astype(dtype)


def model(inputs: str, lines: str, outputs: str = "float[] y", opset: int = 18, **more: Any) -> onnx.ModelProto:
    """A graph of a text, with a weight `g` and a bias `b` of the norm, and more constants."""
    head = f'<ir_version: 9, opset_import: ["": {opset}]>'
    made = onnx.parser.parse_model(f"{head} a ({inputs}) => ({outputs}) {{ {lines} }}")
    held = {"g": numbers(D), "b": numbers(D), "eps": np.array(1e-5, np.float32)} | more
    made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in held.items() if n in lines)
    for output in made.graph.output:
        output.type.tensor_type.ClearField("shape")
    return made


def check(made: onnx.ModelProto, feeds: list[dict[str, Any]], converted: int, **config: Any) -> Any:
    """So many norms are converted, and the outputs stay for each of the inputs."""
    asked = normfuse.Config(layernorm_to_rmsnorm="exact", **{"verify": "off"} | config)
    result, report = normfuse.optimize(made, asked)
    done = [n.conversion["verdict"] for n in report.norms if n.conversion]
    assert sum(v != "kept" for v in done) == converted, report.refusals
    before, after = (session(m.SerializeToString()) for m in (made, result))
    for given in feeds:
        for a, b in zip(before.run(None, given), after.run(None, given), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-6)
    return report


def flags(x: np.ndarray[Any, Any], *shape: int) -> list[dict[str, Any]]:
    return [{"x": x, "flag": np.full(shape, flag)} for flag in (True, False)]


def proved(module: nn.Module, *given: Any, **config: Any) -> tuple[Any, normfuse.Report]:
    """What becomes of a module by the proof alone, and the report."""
    found, report = normfuse.optimize(module, normfuse.Config(layernorm_to_rmsnorm="exact", **config), args=given)
    return found, report


def verdicts(report: normfuse.Report) -> list[str]:
    return [(n.conversion or {})["verdict"] for n in report.norms]


def drawn(module: nn.Module) -> nn.Module:
    """With random parameters that have a mean."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + 0.4)
    return module.eval()


def converted_all(module: nn.Module, converted: int, opset: int, width: int = D, **config: Any) -> None:
    """As an exported program, and in ONNX with norms of one operator and of many, with the certificate and without."""
    x = torch.randn(2, 3, width)
    verify: Any
    for verify in ("off", "sites"):
        asked = normfuse.Config(layernorm_to_rmsnorm="exact", verify=verify, **config)
        if opset:
            buffer: Any = io.BytesIO()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(module, (x,), buffer, dynamo=False, opset_version=opset, input_names=["x"],
                                  do_constant_folding=False)  # fmt: skip
            result, report = normfuse.optimize(onnx.load_from_string(buffer.getvalue()), asked)
            got = torch.from_numpy(session(result.SerializeToString()).run(None, {"x": x.numpy()})[0])
        else:
            result, report = normfuse.optimize(torch.export.export(module, (x,)), asked)
            got = result.module()(x)
        assert sum(n.action == "converted" for n in report.norms) == converted, report.refusals
        torch.testing.assert_close(got, module(x), rtol=1e-4, atol=1e-5)
