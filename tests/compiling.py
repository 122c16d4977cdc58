"""What the tests of `torch.compile(model, backend="normfuse")` share."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import normfuse
from tests.families import FAMILIES

EPS = 1e-6


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Compile what was compiled before; in a cache folder of its own Inductor would compile its headers as well."""
    with functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False):
        yield


def operators(graph: torch.fx.GraphModule) -> Counter[str]:
    """The operators of NormFuse in a graph, by name."""
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    return Counter(n.split(".")[1] for n in names if n.startswith("normfuse."))


def run(model: Callable[..., Any], args: tuple[Any, ...], parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    """The output, and the gradient of every parameter of a loss that tells its elements apart."""
    for p in parameters.values():
        p.grad = None
    out = model(*args)
    out = out[0] if isinstance(out, tuple) else out
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    (out * slope).sum().backward()
    return [out.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values())]


def check_model(name: str, inner: str, dynamic: bool | None = None, backend: str = "normfuse") -> None:
    """Outputs and gradients of the compiled model against eager in float64, no further than eager in float32 is."""
    family = FAMILIES[name]
    args, model = family.args(), family.build()
    parameters = dict(model.named_parameters())
    eager = run(model, args, parameters)
    options: dict[str, Any] = {"options": {"inner": inner}} if backend == "normfuse" else {}
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, **options)
    got = run(compiled, args, parameters)
    assert not counters["graph_break"]
    wide = family.build().double()
    exact = run(wide, tuple(a.double() if a.is_floating_point() else a for a in args), dict(wide.named_parameters()))
    zero = 1e-6 * max(float(c.abs().max()) for c in exact[1:])  # some gradients are zero: a bias before a softmax
    for label, a, b, c in zip(["output", *parameters], eager, got, exact, strict=True):
        allowed = max(1e-5 * float(c.abs().max()), 2 * float((a - c).abs().max()), zero if label != "output" else 0)
        assert float((b - a).abs().max()) <= allowed, label


def small(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A residual addition and the norm behind it, as Llama spells it."""
    s = x + torch.tanh(x)
    h = s.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(s.dtype), s


class Block(nn.Module):
    """A pre-norm block with a sandwich, small enough to look through."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.pre, self.post = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.post(self.down(torch.relu(self.up(self.pre(x)))))
        return out


class Stack(nn.Module):
    """Blocks, their activations recomputed in the backward where asked for."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm, self.recompute = nn.ModuleList(Block() for _ in range(2)), nn.LayerNorm(16), recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        out: Tensor = self.norm(x)
        return out


def rms(h: Tensor, v: Tensor | None = None) -> Tensor:
    """The norm; `v` its mean square, if that was taken before."""
    return h * torch.rsqrt((h.pow(2).mean(-1, keepdim=True) if v is None else v) + EPS)


def compiled(f: Any, inner: str = "aot_eager") -> Any:
    """With the backend, and nothing compiled before."""
    torch._dynamo.reset()
    return torch.compile(f, backend="normfuse", options={"inner": inner})


def last() -> normfuse.Report:
    """What became of the graph that was compiled last."""
    report = normfuse.last_report()
    assert report is not None
    return report
