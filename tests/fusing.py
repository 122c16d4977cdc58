"""Functions whose graphs get fused operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import normfuse
from tests.compiling import operators

N = 16
Arguments = tuple[Tensor, ...]


def rms(x: Tensor, w: Tensor | None, eps: float = 1e-6) -> Tensor:
    """Spelled out, in float32, the weight before the cast back."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h if w is None else w.float() * h).to(x.dtype)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Arguments:
    """Random tensors of these shapes."""
    generator = torch.Generator().manual_seed(0)
    return tuple((torch.randn(s, generator=generator) + 0.5).to(dtype) for s in shapes)


def fused(function: Callable[..., Any], args: Arguments, exact: bool = False, **config: Any) -> dict[str, int]:
    """The operators that a Dynamo graph of a function gets; its results stay the same."""
    captured: list[Any] = []

    def capture(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured.append((graph, [t.clone() for t in inputs]))  # in the order of their first use
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=capture, fullgraph=True)(*[a.clone() for a in args])
    ((graph, inputs),) = captured
    changed, _report = normfuse.optimize(graph, normfuse.Config(**config))
    want, got = (module(*[t.clone() for t in inputs]) for module in (graph, changed))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return dict(operators(changed))


ROWS = ((3, 4, N), (3, 4, N), (N,), (N,))
