"""A decoder as vLLM writes them: each residual sum is normalised in float32, and rounded for the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

HIDDEN, HEADS, VOCABULARY = 64, 4, 100


class Norm(nn.Module):
    """The norm of x, or of x + residual and that sum."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((1 + 0.1 * torch.randn(HIDDEN)).to(dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        narrow = x.dtype
        wide = x.float() if residual is None else x.float() + residual.float()
        n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return n.to(narrow) * self.weight, x if residual is None else wide.to(narrow)


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(dtype), Norm(dtype)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False, dtype=dtype)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=dtype)
        self.up, self.down = nn.Linear(HIDDEN, 128, dtype=dtype), nn.Linear(128, HIDDEN, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm1(x, residual)
        batch, rows, _ = x.shape
        q, k, v = (t.view(batch, rows, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5, -1)
        x = self.out((weights @ v).transpose(1, 2).reshape(batch, rows, HIDDEN))
        x, residual = self.norm2(x, residual)
        return self.down(F.silu(self.up(x))), residual


class Model(nn.Module):
    """Token ids (batch, rows) to logits."""

    def __init__(self, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN, dtype=dtype)
        self.layers = nn.ModuleList(Layer(dtype) for _ in range(layers))
        self.norm, self.head = Norm(dtype), nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x, residual = self.tokens(ids), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        logits: Tensor = self.head(self.norm(x, residual)[0])
        return logits
