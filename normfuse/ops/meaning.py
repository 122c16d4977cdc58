"""What each fused operator means, in plain torch; every kernel is tested against these lines.

All of them normalise the last axis, of length N. C is the type of the arithmetic: float64 for float64 x, else float32.

    n = h * (mean(h^2) + eps)^-1/2      with h = x in C ("rms_norm"), or h = x - mean(x) in C ("layer_norm")

`cast` says where the result is rounded back, which models differ in:

- "last":   y = (n * (offset + weight) + bias) in C, then to `dtype` (x's type where it is None): Gemma, OLMo 2,
  GPT-OSS, `torch.nn.RMSNorm`, `torch.nn.LayerNorm`. With `dtype` float32 nothing is rounded.
- "first":  y = n to x's type, then * (offset + weight) + bias in the type that torch promotes to: Llama, Qwen,
  DeepSeek, T5. A float32 weight on bfloat16 x gives a float32 result.

`weight` and `bias` have shape (N,) or are None. Residuals have the shape of x. Sources: Ba et al. 2016
(arXiv:1607.06450) for LayerNorm, Zhang and Sennrich 2019 (arXiv:1910.07467) for RMSNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor

Dtype = torch.dtype | None


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """C: the type in which rows of a dtype are normalised."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def affine_type(dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None, cast: str) -> torch.dtype:
    """The type in which weight and bias are applied to rows of a dtype."""
    found = dtype if cast == "first" else compute_type(dtype)
    for parameter in (weight, bias):
        if parameter is not None:
            found = torch.promote_types(found, parameter.dtype)
    return found


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last",
         dtype: Dtype = None, kind: str = "rms_norm", narrow: Dtype = None) -> Tensor:  # fmt: skip
    """``rms_norm`` and ``layer_norm``: x (..., N) -> (..., N). `narrow` is the type to round to where x is wider."""
    narrow = narrow or x.dtype
    h = x.to(compute_type(x.dtype))
    if kind == "layer_norm":
        h = h - h.mean(-1, keepdim=True)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    applied = affine_type(narrow, weight, bias, cast)
    if cast == "first":
        n = n.to(narrow)
    n = n.to(applied)
    if weight is not None:
        w = weight.to(applied)
        n = n * (w + offset if offset else w)
    if bias is not None:
        n = n + bias.to(applied)
    return n.to(dtype or (applied if cast == "first" else narrow))


def add_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0,
             cast: str = "last", dtype: Dtype = None, round_sum: bool = True, kind: str = "rms_norm",
             x_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``add_rms_norm`` and ``add_layer_norm``: s = x + residual, y = norm(s) -> (y, s).

    With `round_sum` False the norm reads the sum before it is rounded to the type of s. `x_bias` (N,), of the type of
    x, is added to x first; only ONNX has these operators, ``bias_add_rms_norm`` and ``bias_add_layer_norm``.
    """
    if round_sum:
        s = (x if x_bias is None else x + x_bias) + residual
        return norm(s, weight, bias, eps, offset, cast, dtype, kind), s
    narrow = torch.promote_types(x.dtype, residual.dtype)
    c = compute_type(narrow)
    wide = (x.to(c) if x_bias is None else x.to(c) + x_bias.to(c)) + residual.to(c)
    s = x + residual if x_bias is None else wide.to(narrow)
    return norm(wide, weight, bias, eps, offset, cast, dtype, kind, narrow), s


def norm_add(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0,
             cast: str = "last", dtype: Dtype = None, kind: str = "rms_norm") -> Tensor:  # fmt: skip
    """``norm_add``: residual + norm(x), the norm rounded before the addition: OLMo 2."""
    return residual + norm(x, weight, bias, eps, offset, cast, dtype, kind)


def norm_add_norm(x: Tensor, residual: Tensor, weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None,
                  bias2: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last", dtype: Dtype = None,
                  kind: str = "rms_norm") -> tuple[Tensor, Tensor]:  # fmt: skip
    """``norm_add_norm``: s = residual + norm1(x), y = norm2(s) -> (y, s): the sandwich of Gemma 2 and 3, GLM-4."""
    s = norm_add(x, residual, weight1, bias1, eps, offset, cast, dtype, kind)
    return norm(s, weight2, bias2, eps, offset, cast, dtype, kind), s


def qk_norm(q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
            k_bias: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last", dtype: Dtype = None,
            kind: str = "rms_norm") -> tuple[Tensor, Tensor]:  # fmt: skip
    """``qk_norm``: norm(q), norm(k); the two may differ in every size."""
    return (norm(q, q_weight, q_bias, eps, offset, cast, dtype, kind),
            norm(k, k_weight, k_bias, eps, offset, cast, dtype, kind))  # fmt: skip


# -- backward ------------------------------------------------------------------------------------------------------

Grads = tuple[Tensor, Tensor, Tensor]


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, ds: Tensor | None, eps: float,
                  offset: float, kind: str, need_weight: bool, need_bias: bool) -> Grads:  # fmt: skip
    """The gradients of a norm: (dx, dweight, dbias); one that is not needed is an empty tensor.

        g = dy * (offset + weight)
        dx = rstd * (g - n * mean(g*n)) + ds             rms_norm
        dx = rstd * (g - mean(g) - n * mean(g*n)) + ds   layer_norm
        dweight = sum over rows of dy * n,  dbias = sum over rows of dy

    in C, rounded once, where `ds` is the gradient that x gets from its other readers. The statistics are computed again
    from x: that costs no memory traffic beyond the x that is read anyway.
    """
    c = compute_type(x.dtype)
    h = x.to(c)
    if kind == "layer_norm":
        h = h - h.mean(-1, keepdim=True)
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    n, dy = h * rstd, dy.to(c)
    g = dy if weight is None else dy * (weight.to(c) + offset if offset else weight.to(c))
    dx = g - n * (g * n).mean(-1, keepdim=True)
    if kind == "layer_norm":
        dx = dx - g.mean(-1, keepdim=True)
    dx = rstd * dx
    if ds is not None:
        dx = dx + ds.to(c)
    dweight = _over_rows(dy * n).to(weight.dtype) if need_weight and weight is not None else x.new_empty(0)
    dbias = _over_rows(dy).to(bias.dtype) if need_bias and bias is not None else x.new_empty(0)
    return dx.to(x.dtype), dweight, dbias


def _over_rows(v: Tensor) -> Tensor:
    """The sum over all axes but the last."""
    return v.sum(tuple(range(v.dim() - 1))) if v.dim() > 1 else v.clone()


def norm_add_norm_backward(dy: Tensor, ds: Tensor, x: Tensor, s: Tensor, weight1: Tensor | None, bias1: Tensor | None,
                           weight2: Tensor | None, bias2: Tensor | None, eps: float, offset: float, kind: str,
                           need: list[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of `norm_add_norm`: (dx, dresidual in s's type, dweight1, dbias1, dweight2, dbias2)."""
    dr, dw2, db2 = norm_backward(dy, s, weight2, bias2, ds, eps, offset, kind, need[2], need[3])
    dx, dw1, db1 = norm_backward(dr, x, weight1, bias1, None, eps, offset, kind, need[0], need[1])
    return dx, dr, dw1, db1, dw2, db2


def qk_norm_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None,
                     k_weight: Tensor | None, k_bias: Tensor | None, eps: float, offset: float, kind: str,
                     need: list[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of `qk_norm`: (dq, dk, dq_weight, dq_bias, dk_weight, dk_bias)."""
    a, dwq, dbq = norm_backward(dq, q, q_weight, q_bias, None, eps, offset, kind, need[0], need[1])
    b, dwk, dbk = norm_backward(dk, k, k_weight, k_bias, None, eps, offset, kind, need[2], need[3])
    return a, b, dwq, dbq, dwk, dbk
