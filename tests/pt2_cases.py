"""Small modules as exported programs on disk, and a way to edit such a file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A residual stream with a LayerNorm and an RMSNorm that is written out, its weight 1 + w."""

    one: Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.register_buffer("one", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        s = x + self.linear(self.norm(x))
        y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.one + self.weight)
        out: Tensor = y.flatten(0, 1)
        return out


class Lifted(nn.Module):
    """An eps that torch.export lifts to a constant of the program."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.tensor([[[1e-4]]], dtype=x.dtype))
        return out


class Frozen(nn.Module):
    """A norm inside a graph that a higher-order operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.norm(x) * 2
        a, b = torch.var_mean(x, -1, keepdim=True, correction=0)
        out: Tensor = (x - b) * torch.rsqrt(a + 1e-5) + y
        return out


class Branches(nn.Module):
    """A norm in one branch of a condition."""

    def forward(self, x: Tensor) -> Tensor:
        def normed(x: Tensor) -> Tensor:
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

        out: Tensor = torch.cond(x.sum() > 0, normed, lambda x: x + 1, (x,))
        return out


class Stateful(nn.Module):
    """A weight that the program writes is none."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.rms_norm(x, (16,), self.weight, 1e-5)
        self.weight.add_(1)
        return y


class Scalars(nn.Module):
    """Numbers that depend on sizes and on data, lists of tensors, and a cast."""

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        a, b = x.half().chunk(2, 0)
        y = a.float() * torch.rsqrt(a.float().square().mean(-1, keepdim=True) + 1e-6)
        return y.reshape(-1), torch.topk(b, 2).values, x.to(torch.float64).sum() * x.shape[1], n[: n.shape[0] // 2]


X = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
FREE = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
MODULES: dict[str, tuple[type[nn.Module], tuple[Any, ...], Any]] = {
    "small": (Small, (X,), None),
    "small with free sizes": (Small, (X,), (FREE,)),
    "lifted eps": (Lifted, (X,), None),
    "lifted eps in float16": (Lifted, (X.half(),), None),
    "no grad": (Frozen, (X,), None),
    "condition": (Branches, (X,), None),
    "written weight": (Stateful, (X,), None),
    "scalars": (Scalars, (torch.cat([X, X]), torch.arange(6)), ({1: FREE[1]}, {0: FREE[0]})),
}  # fmt: skip


def exported(name: str) -> torch.export.ExportedProgram:
    """One of the modules above as a program."""
    module, args, dynamic = MODULES[name]
    torch.manual_seed(0)
    return torch.export.export(module().eval(), args, dynamic_shapes=dynamic)


def saved(program: torch.export.ExportedProgram, path: Path) -> Path:
    """Write a program and give back where."""
    torch.export.save(program, path)
    return path


def edited(data: bytes, member: str, change: Callable[[Any], Any]) -> bytes:
    """An archive with one JSON member changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(member):
                content = json.dumps(change(json.loads(content))).encode()
            new.writestr(info.filename, content)
    return out.getvalue()
