"""Torch graphs rewritten where a user's would be: inside a `torch.compile` backend, or as an exported program."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import normfuse
from normfuse.frontends.fx_effects import name_of
from normfuse.report import Report
from tests.families import exported_program

SINGLE, BRAIN = torch.float32, torch.bfloat16
ULP = {SINGLE: 2.0**-23, BRAIN: 2.0**-7}


class Rewritten:
    """A module with its graphs rewritten at one level, and what was done."""

    def __init__(self, module: nn.Module, args: tuple[Tensor, ...], how: str, config: normfuse.Config | None = None,
                 dynamic: bool | None = None) -> None:  # fmt: skip
        self.config = config
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.reports: list[Report] = []
        with silent(), torch.no_grad():
            if how == "export":
                new = self._optimize(exported_program(module, args, dynamic=bool(dynamic)))
                self.run: Callable[..., Any] = new.module()
            else:
                torch._dynamo.reset()
                backend = self._dynamo if how == "dynamo" else self._aot()
                self.run = torch.compile(module, backend=backend, dynamic=dynamic)
                self.run(*args)

    def _optimize(self, model: Any) -> Any:
        text = str(model.graph)
        new, report = normfuse.optimize(model, self.config)
        assert str(model.graph) == text
        self.before.append(model)
        self.after.append(new)
        self.reports.append(report)
        return new

    def _dynamo(self, graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        return self._optimize(graph).forward

    def _aot(self) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
            new = self._optimize(graph)

            def boxed(arguments: list[Any]) -> Any:
                values = list(arguments)
                arguments.clear()
                return new(*values)

            boxed._boxed_call = True  # type: ignore[attr-defined]
            return boxed

        return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)

    def __call__(self, *args: Tensor) -> Tensor:
        """The result of the rewritten module."""
        with silent(), torch.no_grad():
            out: Tensor = self.run(*args)
            return out

    @property
    def norms(self) -> list[Any]:
        """The records of all graphs."""
        return [norm for report in self.reports for norm in report.norms]

    @property
    def codes(self) -> list[str]:
        """The codes of all refusals."""
        return [refusal.code for report in self.reports for refusal in report.refusals]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No warnings of the tracers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def rewriting(reports: list[Report]) -> Callable[..., Any]:
    """A backend that rewrites each graph and keeps what was done."""

    def backend(graph: fx.GraphModule, _inputs: list[Any]) -> Any:
        new, report = normfuse.optimize(graph)
        reports.append(report)
        return new.forward

    return backend


def names(graph: fx.Graph) -> Counter[str]:
    """The bare names of what a graph calls."""
    found = (name_of(n) or str(n.target) for n in graph.nodes if n.op.startswith("call"))
    return Counter(found)


def dangling(graph: fx.Graph) -> int:
    """How many nodes nobody uses."""
    return sum(not n.users and n.op not in ("output", "placeholder") for n in graph.nodes)


class NearMissModule(nn.Module):
    """A near miss with its weight as a parameter."""

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(1.5 + 0.5 * torch.randn(64, generator=torch.Generator().manual_seed(3)), False)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.fn(x, self.w)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square, in its own type."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
