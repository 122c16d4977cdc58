"""What the tests of writes in place share: programs of (x, r, w), and the doors that they go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.frontends.fx_effects import name_of
from tests.compiling import compiled, last

N = 16
EPS = 1e-6
Program = Callable[[Tensor, Tensor, Tensor], Any]


def given(dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(3, 7, N) * scale + shift).to(dtype), torch.randn(3, 7, N).to(dtype), torch.rand(N).to(dtype)]


def exported(f: Program, arguments: list[Tensor]) -> tuple[Any, normfuse.Report]:
    class Module(nn.Module):
        def forward(self, x: Tensor, r: Tensor, w: Tensor) -> Any:
            return f(x, r, w)

    return normfuse.optimize(torch.export.export(Module(), tuple(arguments)))


def through(door: str, f: Program, arguments: list[Tensor]) -> tuple[Any, normfuse.Report]:
    """What a program gives behind one of the doors, without gradients, and the report."""
    with torch.no_grad():
        if door == "export":
            program, report = exported(f, arguments)
            return program.module()(*arguments), report
        return compiled(f, door)(*arguments), last()


def calls(program: Any) -> list[str | None]:
    return [name_of(n) for n in program.graph.nodes if n.op == "call_function"]
