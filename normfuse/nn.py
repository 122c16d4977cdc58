"""Modules that take the place of LayerNorms which were converted to RMSNorm.

Plain torch: they train, save, load, export and compile as any other module.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_is_tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x**2) + eps) * (offset + weight) + bias`` over one axis: a LayerNorm of rows of mean zero.

    x: [..., size], or with the size at `axis` (counted from the end), any float type; statistics in float32 for half
    types. `weight` and `bias`: [size], [heads, size] or None. Zhang & Sennrich 2019 (arXiv 1910.07467), with the
    bias of the LayerNorm that it replaces.
    """

    __constants__ = ("normalized_shape", "axis", "offset", "heads")  # for TorchScript
    weight: Tensor | None
    bias: Tensor | None
    offset: float
    heads: bool = False

    def __init__(self, size: int, eps: float, weight: nn.Parameter | None = None, bias: nn.Parameter | None = None,
                 axis: int = -1, offset: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.normalized_shape, self.eps, self.axis, self.offset = (size,), eps, axis, offset
        self.heads = weight is not None and weight.dim() > 1
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    @staticmethod
    def of(norm: nn.Module, size: int, eps: float, axis: int = -1, offset: float = 0.0) -> "RMSNorm":
        """With the parameters of a LayerNorm module; they are shared, not copied."""
        return RMSNorm(size, eps, getattr(norm, "weight", None), getattr(norm, "bias", None), axis, offset)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of each row."""
        weight, bias = self.weight, self.bias
        if weight is not None and self.offset != 0.0:
            weight = weight + self.offset
        if self.axis != -1:
            x = x.movedim(self.axis, -1)
        if _slow(x):
            y = self._plain(x, weight, bias)
        elif self.heads:  # which F.rms_norm does not take
            y = self._plain(x.to(torch.promote_types(x.dtype, torch.float32)), weight, bias).to(x.dtype)
        else:
            y = F.rms_norm(x, self.normalized_shape, weight, self.eps)
            if bias is not None:
                y = (y + bias).to(y.dtype)  # as a LayerNorm gives it, though weights may be wider than x
        return y if self.axis == -1 else y.movedim(-1, self.axis)

    def _plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same in four steps."""
        # a length has no second derivative at zero, which a row of padding may be; and a trace is of either mode
        if torch.is_grad_enabled() or _is_tracing():
            square = (x * x).mean(-1, keepdim=True)
        else:
            root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            square = root * root * (1 / self.normalized_shape[0])
        scale = torch.rsqrt(square + self.eps)
        if weight is None:
            return x * scale if bias is None else x * scale + bias
        return x * scale * weight if bias is None else torch.addcmul(bias, x * scale, weight)

    def extra_repr(self) -> str:
        """Size and eps."""
        offset = f", offset={self.offset}" if self.offset else ""
        size = self.normalized_shape if self.weight is None else self.weight.shape
        return f"{'x'.join(map(str, size))}, eps={self.eps}, bias={self.bias is not None}{offset}"


def _slow(x: Tensor) -> bool:
    """Where F.rms_norm takes twice as long as these steps: eager torch on a CPU, which has no kernel for it."""
    given: Any = x
    if not isinstance(given, Tensor) or given.is_nested:  # a proxy of torch.fx; or one that has not all of these steps
        return False
    wide = x.dtype in (torch.float32, torch.float64)
    return wide and x.device.type == "cpu" and not torch.compiler.is_compiling()


class Centre:
    """A hook: takes the mean along an axis away from what goes into a module (a forward pre-hook) or comes out of it (a
    forward hook), in float32 for half types. Of several tensors the first."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        """The output, or the inputs, centred."""
        given = args if output is None else output
        return (self._centred(given[0]), *given[1:]) if isinstance(given, tuple) else self._centred(given)

    def _centred(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return (wide - wide.mean(self.axis, keepdim=True)).to(x.dtype)
