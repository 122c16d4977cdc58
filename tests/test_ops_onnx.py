"""Programs that hold the operators, taken elsewhere: to ONNX, to a file and back, to a package of AOTInductor."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import normfuse.ops  # noqa: F401  registers the operators
from normfuse.ops.register import decompose_on_cpu
from normfuse.ops.to_onnx import export, translations
from tests.share import share

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CALLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("rms_norm", "xw-", {}), ("rms_norm", "xW-", {"cast": "first"}), ("rms_norm", "x--", {"dtype": FP32}),
    ("rms_norm", "xwb", {"offset": 1.0}), ("rms_norm", "xw-", {"cast": "first", "offset": 1.0}),
    ("layer_norm", "xwb", {}), ("layer_norm", "xW-", {"cast": "first"}), ("layer_norm", "x-b", {"dtype": FP16}),
    ("add_rms_norm", "xrw-", {"cast": "first"}), ("add_rms_norm", "xrw-", {"round_sum": False}),
    ("add_rms_norm", "xRwb", {}), ("add_layer_norm", "xrwb", {}), ("norm_add", "xrw-", {}),
    ("norm_add", "xRwb", {"kind": "layer_norm"}), ("norm_add_norm", "xrw-w-", {"offset": 1.0}),
    ("norm_add_norm", "xrwbW-", {"kind": "layer_norm"}), ("qk_norm", "xkw-w-", {"cast": "first"}),
    ("qk_norm", "xkwbW-", {"kind": "layer_norm"}),
)
"""(operator, its tensors, how): rows x, r, k, weight w, bias b, none -; a capital is float32 beside half precision."""


class Calls(nn.Module):
    """Calls of the operators."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = (nn.Parameter(torch.randn(64).to(dtype)) for _ in range(2))
        self.W = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor, r: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Every result; `R` is r in float32."""
        given = {"x": x, "r": r, "k": k, "w": self.w, "b": self.b, "W": self.W, "R": r.float(), "-": None}

        def results() -> Iterator[Tensor]:
            for name, roles, how in CALLS:
                found = getattr(torch.ops.normfuse, name)(*(given[role] for role in roles), 1e-5, **how)
                yield from found if isinstance(found, tuple) else (found,)

        return tuple(results())


def rows(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(shape).to(dtype) for shape in ((3, 5, 64), (3, 5, 64), (2, 1, 4, 64)))


def program(module: nn.Module, dtype: torch.dtype) -> Any:
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    return torch.export.export(module, rows(dtype), dynamic_shapes=(batch, batch, {}))


def same(found: Any, expected: Tensor, rarely: bool = True) -> None:
    """Equal but for the order of the sums: a rounding may fall to the other side, rarely."""
    found = torch.from_numpy(np.asarray(found, dtype=np.float32))
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected.float(), rtol=2 * eps, atol=4 * eps)
    if expected.dtype != FP32 and rarely:
        assert (found == expected.float()).float().mean() > 0.99


def run(model: onnx.ModelProto, args: tuple[Tensor, ...]) -> list[Any]:
    given = dict(zip((i.name for i in model.graph.input), (t.numpy() for t in args), strict=True))
    found: list[Any] = ort.InferenceSession(model.SerializeToString()).run(None, given)
    return found


@pytest.mark.parametrize(("dtype", "opset", "optimize"),
                         share(product((FP32, FP16), (18, 23), (True, False)), 3), ids=str)  # fmt: skip
def test_a_model_of_functions(dtype: torch.dtype, opset: int, optimize: bool) -> None:
    module = Calls(dtype).eval().requires_grad_(False)
    model = export(program(module, dtype), opset_version=opset, optimize=optimize, verbose=False).model_proto
    onnx.checker.check_model(model, full_check=True)
    assert {i.domain: i.version for i in model.opset_import} == {"": opset, "normfuse": 1}
    functions = {f.name: f for f in model.functions if f.domain == "normfuse"}
    called = [n.op_type for n in model.graph.node if n.domain == "normfuse"]
    assert [re.sub(r"_\d$", "", name) for name in called] == [name for name, *_ in CALLS]
    assert {*called} == {*functions} and {name for name, *_ in CALLS} <= {*functions}
    assert len({(re.sub(r"_\d$", "", f.name), f.doc_string) for f in functions.values()}) == len(functions) > 7
    assert not any(f.overload for f in model.functions)
    for function in functions.values():
        assert {n.domain for n in function.node} == {""} and [i.version for i in function.opset_import] == [opset]
    for a, b in zip(run(model, rows(dtype)), module(*rows(dtype)), strict=True):
        assert a.dtype == b.numpy().dtype
        same(a, b, rarely=False)


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_each_rounding(dtype: torch.dtype) -> None:
    """By the reference evaluator: on the CPU onnxruntime has no bfloat16, and leaves out roundings to float16."""
    module = Calls(dtype).eval().requires_grad_(False)
    model = export(program(module, dtype), opset_version=23, verbose=False).model_proto
    onnx.checker.check_model(model, full_check=True)
    numpy_type = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    given = {i.name: t.float().numpy().astype(numpy_type) for i, t in zip(model.graph.input, rows(dtype), strict=True)}
    for a, b in zip(onnx.reference.ReferenceEvaluator(model).run(None, given), module(*rows(dtype)), strict=True):
        same(a, b)


def test_the_table_alone_gives_a_model_without_functions() -> None:
    """torch's exporter inlines them when it converts to the opset that was asked for."""
    module = Calls(FP32).eval().requires_grad_(False)
    made = torch.onnx.export(program(module, FP32), custom_translation_table=translations(), verbose=False)
    assert made is not None
    proto = made.model_proto
    assert {n.domain for n in proto.graph.node} == {""}
    for a, b in zip(run(proto, rows(FP32)), module(*rows(FP32)), strict=True):
        same(a, b)


def test_saved_and_loaded(tmp_path: Path) -> None:
    module = Calls(BF16).eval().requires_grad_(False)
    exported = program(module, BF16)
    torch.export.save(exported, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    targets = [n.target for n in loaded.graph.nodes if n.op == "call_function"]
    assert targets == [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert sum(str(t).startswith("normfuse.") for t in targets) == len(CALLS)
    for a, b in zip(loaded.module()(*rows(BF16)), module(*rows(BF16)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # importing Inductor
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_of_aot_inductor(tmp_path: Path) -> None:
    decompose_on_cpu()
    module = Calls(FP32).eval().requires_grad_(False)
    path = torch._inductor.aoti_compile_and_package(program(module, FP32), package_path=str(tmp_path / "norms.pt2"))
    for a, b in zip(torch._inductor.aoti_load_package(path)(*rows(FP32)), module(*rows(FP32)), strict=True):
        torch.testing.assert_close(a, b)
