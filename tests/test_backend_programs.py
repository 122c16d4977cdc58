"""`torch.compile(model, backend="normfuse")`: what it must not add, and what programs do besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import normfuse
from normfuse import backend
from tests.compiling import Stack, operators, run, small

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
def test_no_more_recompiles_than_inductor(dynamic: bool | None) -> None:
    counts = {}
    for name in ("inductor", "normfuse"):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(small, backend=name, dynamic=dynamic)
        for rows in (3, 5, 9, 17):
            x, w = torch.randn(rows, 8), torch.rand(8) + 0.5
            for got, want in zip(compiled(x, w), small(x, w), strict=True):
                torch.testing.assert_close(got, want)
        counts[name] = counters["stats"]["unique_graphs"]
    assert counts["normfuse"] <= counts["inductor"]


def test_eps_as_a_dynamic_scalar() -> None:
    def norm(x: Tensor, r: Tensor, w: Tensor, eps: float) -> Tensor:
        s = x + r
        return w * (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)) + s

    compiled = torch.compile(norm, backend="normfuse", dynamic=True, options={"inner": "aot_eager"})
    x, r, w = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    for eps in (1e-6, 1e-5, 0.5):
        torch.testing.assert_close(compiled(x, r, w, eps), norm(x, r, w, eps))
        report = normfuse.last_report()
        assert report is not None and [(n.eps, n.action) for n in report.norms] == [(eps, "fused")]


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_activation_checkpointing(inner: str, graphs: list[torch.fx.GraphModule]) -> None:
    model, x = Stack(recompute=True), torch.randn(4, 16)
    parameters = dict(model.named_parameters())
    want = run(model, (x,), parameters)
    got = run(torch.compile(model, backend="normfuse", options={"inner": inner}), (x,), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    inside = [operators(part) for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule)]
    assert sum(inside, Counter())["norm_add"] == 2


@pytest.mark.parametrize("more", [{"mode": "reduce-overhead"}, {"options": {"mode": "max-autotune-no-cudagraphs"}}])
def test_modes_of_inductor(more: dict[str, Any]) -> None:
    x, w = torch.randn(4, 8), torch.rand(8)
    for got, want in zip(torch.compile(small, backend="normfuse", **more)(x, w), small(x, w), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # eager, under autocast
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_autocast(inner: str, inside: bool, graphs: list[torch.fx.GraphModule]) -> None:
    model, x = Stack(), torch.randn(4, 16)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = model(x)
        return out

    call: Callable[..., Any] = forward if inside else model
    compiled = torch.compile(call, backend="normfuse", options={"inner": inner})
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        want, got = call(x), compiled(x)
    assert got.dtype == want.dtype
    # Inductor drops roundings between the pieces that it fuses, ours and others alike
    torch.testing.assert_close(got, want, rtol=0, atol=0 if inner == "aot_eager" else 0.05)
    assert operators(graphs[0])["norm_add"] + operators(graphs[0])["norm_add_norm"] == 2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_values_used_elsewhere_and_views_stay(inner: str) -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> list[Tensor]:
        s = x + r
        n = nn.functional.rms_norm(s, (8,), w, 1e-6)
        t = r + n  # n is read twice: no norm_add
        view = s.view(-1)
        return [n * 2, t, view[:8].clone(), nn.functional.layer_norm(t, (8,), w, w, 1e-5), s.transpose(0, 1)]

    x, r, w = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    got = torch.compile(f, backend="normfuse", options={"inner": inner})(x, r, w)
    for a, b in zip(got, f(x, r, w), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_writes_in_place_are_respected(graphs: list[torch.fx.GraphModule]) -> None:
    def f(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        s.mul_(2)
        y = nn.functional.rms_norm(s, (8,), w, 1e-6)
        s.add_(1)
        return y + s, x

    def g(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        x += 1  # a summand that is written before it is read
        s = x + r
        return nn.functional.rms_norm(s, (8,), w, 1e-6), s

    x, r, w = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    for function, fused in ((f, 0), (g, 1)):
        got = torch.compile(function, backend="normfuse", options={"inner": "aot_eager"})(x, r, w)
        for a, b in zip(got, function(x, r, w), strict=True):
            torch.testing.assert_close(a, b)
        assert operators(graphs[-1])["add_rms_norm"] == fused


def test_promotion_is_respected(graphs: list[torch.fx.GraphModule]) -> None:
    x, r, w = torch.randn(4, 8).bfloat16(), torch.randn(4, 8), torch.rand(8)
    got = torch.compile(small, backend="normfuse", options={"inner": "aot_eager"})(x, w)
    for a, b in zip(got, small(x, w), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)

    def residual(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s = x + r
        return nn.functional.rms_norm(s, (8,), w, 1e-6), s

    got = torch.compile(residual, backend="normfuse", options={"inner": "aot_eager"})(x, r, w)
    for a, b in zip(got, residual(x, r, w), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b)
    assert [operators(g)["add_rms_norm"] for g in graphs] == [1, 1]


def test_what_dynamo_noted_stays() -> None:
    """Without it Inductor takes parameters for inputs, and copies them into each CUDA graph."""
    seen: list[torch.fx.GraphModule] = []

    def spy(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        noted = {k for k in vars(graph) if k.startswith(("_param", "_source"))}
        sources = [n._dynamo_source for n in graph.graph.nodes if n.op == "placeholder"]
        compiled = backend.backend(graph, inputs, options={"inner": "aot_eager"})
        assert noted <= vars(graph).keys() and "dynamo_compile_id" in graph.meta
        assert sources == [n._dynamo_source for n in graph.graph.nodes if n.op == "placeholder"]
        seen.append(graph)
        return compiled

    torch.compile(Stack(), backend=spy)(torch.randn(4, 16))
    assert operators(seen[0])["norm_add"] + operators(seen[0])["norm_add_norm"] == 2
