"""`torch.compile(model, backend="normfuse")`: which operators Inductor takes apart, and which are left to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import normfuse
from normfuse import backend, verify
from normfuse.frontends import fx_check
from normfuse.ops import register
from tests.compiling import Stack, small, uncached

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("how", [{"backend": "normfuse"}, {"options": {"pre_grad_custom_pass": True}}])
def test_inductor_takes_the_operators_apart_on_a_cpu(how: dict[str, Any]) -> None:
    """Also where it has compiled something before, and keeps a table of decompositions from then."""
    torch.compile(lambda x: x + 1)(torch.ones(3))
    if "options" in how:
        how = {"options": {"pre_grad_custom_pass": normfuse.InductorPass()}}
    with uncached():
        _, code = run_and_get_code(torch.compile(Stack().requires_grad_(False), **how), torch.randn(4, 16))
    report = normfuse.last_report()
    assert report is not None and report.fused == 3
    assert "cpp_fused" in code[0] and "torch.ops.normfuse" not in code[0]


@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_operators_stay_where_they_do_not_come_apart(before: bool) -> None:
    """What happens on a GPU, played on the CPU by decompositions that decline."""
    program = f"""
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from normfuse.ops import register
from tests.compiling import Stack, uncached
if {before}:
    torch.compile(lambda x: x + 1)(torch.ones(3))
for op in register.DECOMPOSITIONS:
    register.DECOMPOSITIONS[op] = lambda *args: NotImplemented
model, x = Stack(), torch.randn(4, 16)
compiled = torch.compile(model, backend="normfuse")
with uncached():
    _, code = run_and_get_code(lambda: compiled(x).sum().backward())
    torch.testing.assert_close(compiled(x), model(x))
print([[f"= torch.ops.normfuse.{{name}}.default(" in c for name in ("norm_add", "norm_backward")] for c in code])
"""
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False)
    assert done.stdout.strip() == "[[True, False], [False, True]]", done.stderr


@pytest.mark.parametrize(("rows", "n", "left"), [
    (8, 2048, "both"), (4095, 2048, "both"), (4096, 2048, "none"), (1024, 8192, "none"),
    (512, 16384, "backward")])  # fmt: skip
@pytest.mark.parametrize("symbols", [False, True])
def test_what_is_small_or_wide_on_a_gpu_is_left_to_inductor(rows: int, n: int, left: str, symbols: bool) -> None:
    """What operators say to AOTAutograd of tensors on a GPU, which need not be there for that."""
    ops = torch.ops.normfuse
    forward, back = (register.DECOMPOSITIONS[op] for op in (ops.add_rms_norm.default, ops.norm_backward.default))
    how: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC if symbols else DimDynamic.STATIC, DimDynamic.STATIC])
    mode, real = FakeTensorMode(shape_env=ShapeEnv()), torch.empty(rows, n, device="meta")
    sizes = mode.from_tensor(real, symbolic_context=how).shape
    with mode:
        x, w = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in (sizes, sizes[1:]))
        outs = forward(x, x, w, None, 1e-6, 0.0, "first"), back(x, x, w, None, None, 1e-6, 0.0, "rms_norm", True, False)
    assert isinstance(x.shape[0], int) != symbols
    assert [out is not NotImplemented for out in outs] == [left == "both", left != "none"]


@pytest.mark.parametrize(("device", "rows", "more", "apart"), [
    ("cuda", 4096, {}, False), ("cuda", 4095, {}, True), ("cpu", 4096, {}, True), ("cpu", 8, {"inner": "eager"}, False),
    ("cuda", 8, {"before_autograd": False}, False)])  # fmt: skip
def test_a_note_says_which_operators_inductor_takes_apart(
    device: str, rows: int, more: dict[str, Any], apart: bool
) -> None:
    graph = torch.fx.symbolic_trace(small)
    with FakeTensorMode() as mode:
        args = [torch.empty(*shape, device=device) for shape in ((rows, 2048), (2048,))]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*args)
    backend.rewrite(graph, normfuse.Config(verify="off"), **more)
    report = normfuse.last_report()
    assert report is not None and report.norms[0].emitted == "normfuse.add_rms_norm"
    assert [note.split(" are ")[0] for note in report.notes] == ["1 of 1 operators"] * apart


def attention(queries: tuple[int, ...], keys: tuple[int, ...], device: str) -> torch.fx.GraphModule:
    """A graph with norms of query and key, on a device that need not be there."""

    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        q, k = (w * (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6)) for t in (q, k))
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    graph = torch.fx.symbolic_trace(attend)
    with FakeTensorMode() as mode:
        args = [torch.empty(*shape, device=device) for shape in (queries, keys, keys, queries[-1:])]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*args)
    return graph


@pytest.mark.parametrize(("device", "inner", "training", "fused"), [
    ("cuda", "inductor", False, 0), ("cuda", "inductor", True, 2), ("cuda", "eager", False, 2),
    ("cpu", "inductor", False, 2)])  # fmt: skip
def test_norms_of_query_and_key_are_inductors_where_nothing_is_trained(
    device: str, inner: str, training: bool, fused: int
) -> None:
    graph = attention((2, 4, 8, 16), (2, 4, 8, 16), device)
    backend.rewrite(graph, normfuse.Config(verify="off"), inner, training)
    report = normfuse.last_report()
    assert report is not None and report.fused == fused
    assert [n.emitted for n in report.norms] == (["normfuse.qk_norm"] * 2 if fused else [""] * 2)
    assert fused or all("Inductor fuses it as well" in (n.reason or "") for n in report.norms)


def test_a_check_takes_as_long_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are fewer heads of keys than of queries, so that the shapes differ."""
    shapes: list[tuple[int, ...]] = []

    def compare(old: Any, new: Any, shape: tuple[int, ...], *more: Any) -> verify.Check:
        shapes.append(shape)
        return verify.compare(old, new, shape, *more)

    monkeypatch.setattr(fx_check, "compare", compare)
    backend.rewrite(attention((2, 16, 4096, 16), (2, 4, 4096, 16), "cpu"), normfuse.Config())
    report = normfuse.last_report()
    assert report is not None and [(n.emitted, n.verified) for n in report.norms] == [("normfuse.qk_norm", True)] * 2
    assert shapes == [(2, 3, 3, 16)] * 2
