"""The many ways of writing LayerNorm and RMSNorm in torch, each with the fact it must reduce to.

`SPELLINGS` maps a name to a torch function of `(x, w, b)`, with `w` and `b` of shape `(64,)`, and to what it
means: the normalised axes, eps and the constant factor of the normal form

    rms_norm:    scale * (offset + w) * x * (m2 + eps)**-1/2 + b
    layer_norm:  scale * (offset + w) * (x - m1) * (m2 - m1**2 + eps)**-1/2 + b

where `m1` and `m2` are the means of `x` and `x**2` over the axes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Kind = Literal["rms_norm", "layer_norm"]
Exporter = Literal["dynamo", "torchscript"]
SpellingFn = Callable[[Tensor, Tensor, Tensor], Tensor]

WIDTH = 64
SHAPE = (2, 5, WIDTH)


@dataclass(frozen=True)
class Spelling:
    """One way of writing a norm, and the fact it must reduce to."""

    name: str
    kind: Kind
    fn: SpellingFn
    axes: tuple[int, ...] = (-1,)
    """The normalised axes."""
    eps: float = 1e-6
    """The eps of the normal form."""
    scale: float = 1.0
    """The constant factor of the normal form."""
    shape: tuple[int, ...] = SHAPE
    """The shape of the input."""
    weight: bool = True
    """Whether `w` is used."""
    bias: bool = False
    """Whether `b` is used."""
    upcast: bool = False
    """Whether the statistics of half inputs are computed in float32 (or wider)."""
    offset: float = 0.0
    """What is added to `w`: Gemma's `1 + w`."""
    one_pass: bool = False
    """Whether digits cancel that the normal form keeps: a difference of moments, a shifted input."""
    half_range: bool = True
    """False where in-type statistics leave float16's range or precision on the larger hostile inputs."""
    prescale: float = 1.0
    """A constant that multiplies the input first: read off the scaled tensor, eps is ``eps * prescale**2``."""
    double: SpellingFn | None = None
    """What to run on doubles, where `fn` takes its eps from the type of the input."""


SPELLINGS: dict[str, Spelling] = {}


def _spelling(
    kind: Kind,
    *,
    axes: tuple[int, ...] = (-1,),
    eps: float = 1e-6,
    scale: float = 1.0,
    shape: tuple[int, ...] = SHAPE,
    weight: bool = True,
    bias: bool = False,
    upcast: bool = False,
    offset: float = 0.0,
    one_pass: bool = False,
    half_range: bool = True,
    prescale: float = 1.0,
    double: SpellingFn | None = None,
) -> Callable[[SpellingFn], SpellingFn]:
    """Enter the decorated function into the table under its own name."""

    def enter(fn: SpellingFn) -> SpellingFn:
        name = fn.__name__
        assert name not in SPELLINGS, name
        SPELLINGS[name] = Spelling(
            name,
            kind,
            fn,
            axes,
            eps,
            scale,
            shape,
            weight,
            bias,
            upcast,
            offset,
            one_pass,
            half_range,
            prescale,
            double,
        )
        return fn

    return enter


def up(x: Tensor) -> Tensor:
    """Cast half types to float32; a wider type gets the no-op cast that model code leaves in its graph."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- RMSNorm: the square and its mean -----------------------------------------------------------------------


@_spelling("rms_norm")
def rms_pow_mean_rsqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


@_spelling("rms_norm", eps=1e-5)
def rms_square_weight_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5))


@_spelling("rms_norm")
def rms_mul_self(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.mul(torch.mul(x, torch.rsqrt(torch.mean(x * x, -1, True).add(1e-6))), w)


@_spelling("rms_norm")
def rms_abs_square(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.abs().square().mean(-1, keepdim=True) + 1e-6) * w


@_spelling("rms_norm")
def rms_mul_abs_abs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt((x.abs() * x.abs()).mean(-1, keepdim=True) + 1e-6) * w


@_spelling("rms_norm", upcast=True)
def rms_sum_times_inverse_n(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    rstd = torch.rsqrt((h * h).sum(-1, keepdim=True) * (1.0 / x.shape[-1]) + 1e-6)
    return (h * rstd).to(x.dtype) * w


@_spelling("rms_norm", half_range=False)
def rms_sum_div_n(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * w


@_spelling("rms_norm", upcast=True)
def rms_einsum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = torch.einsum("...d,...d->...", h, h) / x.shape[-1]
    return (h * torch.rsqrt(ms + 1e-6).unsqueeze(-1)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_einsum_named(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = torch.einsum("bsd,bsd->bs", h, h)[..., None] / x.shape[-1]
    return torch.einsum("bsd,d->bsd", (h / torch.sqrt(ms + 1e-6)).to(x.dtype), w)


@_spelling("rms_norm", upcast=True)
def rms_row_dot_matmul(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = (h.unsqueeze(-2) @ h.unsqueeze(-1)).squeeze(-1) / x.shape[-1]
    return (h * torch.rsqrt(ms + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_row_dot_bmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x).reshape(-1, x.shape[-1])
    ms = torch.bmm(h.unsqueeze(1), h.unsqueeze(2)).squeeze(-1) / x.shape[-1]
    return (h * torch.rsqrt(ms + 1e-6)).reshape(x.shape).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_vecdot(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = torch.linalg.vecdot(h, h).unsqueeze(-1) / x.shape[-1]
    return (h * torch.rsqrt(ms + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_vector_norm_square(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / x.shape[-1]
    return (h * torch.rsqrt(ms + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm")
def rms_vector_norm_over_root_n(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return x / torch.sqrt(rms * rms + 1e-6) * w


@_spelling("rms_norm", upcast=True)
def rms_linalg_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    norm = torch.linalg.norm(h, dim=-1, keepdim=True)
    rstd: Tensor = (norm**2 / x.shape[-1] + 1e-6) ** -0.5
    return (h * rstd).to(x.dtype) * w


@_spelling("rms_norm")
def rms_torch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rms = torch.norm(x, p=2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x * torch.rsqrt(rms.pow(2) + 1e-6) * w


@_spelling("rms_norm")
def rms_method_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rms = x.norm(2, dim=-1, keepdim=True).div(x.shape[-1] ** 0.5)
    return x.div(rms.square().add(1e-6).sqrt()).mul(w)


@_spelling("rms_norm", upcast=True)
def rms_matmul_ones(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ones = torch.ones(x.shape[-1], 1, dtype=h.dtype)
    return (h * torch.rsqrt((h * h) @ ones / x.shape[-1] + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm")
def rms_linear_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    row = torch.full((1, WIDTH), 1.0 / WIDTH, dtype=x.dtype)
    return x * torch.rsqrt(F.linear(x * x, row) + 1e-6) * w


@_spelling("rms_norm")
def rms_adaptive_avg_pool(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(F.adaptive_avg_pool1d(x * x, 1) + 1e-6) * w


@_spelling("rms_norm", upcast=True)
def rms_scaled_before_square(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = (h / math.sqrt(x.shape[-1])).pow(2).sum(-1, keepdim=True)
    return (h * torch.rsqrt(ms + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True, one_pass=True)
def rms_variance_plus_mean_square(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = h.var(-1, correction=0, keepdim=True) + h.mean(-1, keepdim=True).square()
    return (h * torch.rsqrt(ms + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_power_of_magnitude(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = torch.pow(torch.abs(h), 2.0).mean((-1,), keepdim=True)
    return (h * torch.rsqrt(ms + 1e-6)).to(x.dtype) * w


# --- RMSNorm: the inverse root ------------------------------------------------------------------------------


@_spelling("rms_norm")
def rms_one_over_sqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w


@_spelling("rms_norm")
def rms_pow_minus_half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5) * w


@_spelling("rms_norm")
def rms_reciprocal_sqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w


@_spelling("rms_norm", upcast=True)
def rms_sqrt_of_reciprocal(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    return (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).reciprocal().sqrt()).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_inverse_times_root(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = h.pow(2).mean(-1, keepdim=True) + 1e-6
    return (h / ms * torch.sqrt(ms)).to(x.dtype) * w


@_spelling("rms_norm")
def rms_div_sqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.div(x, torch.sqrt(torch.mean(torch.pow(x, 2), dim=[-1], keepdim=True) + 1e-6)) * w


@_spelling("rms_norm")
def rms_div_pow_half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** 0.5


@_spelling("rms_norm")
def rms_method_chain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.mul(x.square().mean(-1).add(1e-6).rsqrt().unsqueeze(-1)).mul(w)


@_spelling("rms_norm")
def rms_rstd_expanded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd.expand_as(x) * w.expand_as(x)


@_spelling("rms_norm")
def rms_two_negations(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = -x
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * torch.neg(w)


# --- RMSNorm: eps and constant factors ----------------------------------------------------------------------


@_spelling("rms_norm", eps=1e-5, upcast=True)
def rms_eps_times_n_in_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, n = up(x), x.shape[-1]
    return (h * math.sqrt(n) / torch.sqrt(h.pow(2).sum(-1, keepdim=True) + n * 1e-5)).to(x.dtype) * w


@_spelling("rms_norm", eps=1e-4 / WIDTH, scale=WIDTH**-0.5, upcast=True)
def rms_unscaled_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    return (h * torch.rsqrt((h * h).sum(-1, keepdim=True) + 1e-4)).to(x.dtype) * w


@_spelling("rms_norm", eps=1e-4 / WIDTH, scale=WIDTH**-0.5, upcast=True)
def rms_norm_squared_plus_eps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    return (h / torch.sqrt(torch.linalg.vector_norm(h, 2, -1, True) ** 2 + 1e-4)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_add_alpha(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    total = h.pow(2).sum(-1, keepdim=True)
    ms = torch.add(torch.full_like(total, 1e-6), total, alpha=1.0 / x.shape[-1])
    return (h * torch.rsqrt(ms)).to(x.dtype) * w


@_spelling("rms_norm", eps=1e-5)
def rms_eps_tensor(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.tensor(1e-5, dtype=x.dtype)) * w


@_spelling("rms_norm", eps=1e-5)
def rms_eps_new_full(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.new_full((1,), 1e-5) + x.pow(2).mean(-1, keepdim=True)) * w


@_spelling("rms_norm", eps=1e-5)
def rms_eps_full_like(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ms = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(ms + torch.full_like(ms, 1e-5)) * w


@_spelling("rms_norm", eps=1e-5, upcast=True)
def rms_eps_inside_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    return (h * torch.rsqrt((h.pow(2) + 1e-5).mean(-1, keepdim=True))).to(x.dtype) * w


@_spelling("rms_norm", eps=1e-5, upcast=True)
def rms_addcmul_in_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    ms = torch.addcmul(torch.full((1,), 1e-5, dtype=h.dtype), h, h).mean(-1, keepdim=True)
    return (h * torch.rsqrt(ms)).to(x.dtype) * w


@_spelling("rms_norm", eps=2e-5)
def rms_two_epsilons(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5 + 1e-5) * w


@_spelling("rms_norm", eps=1e-5 * 64.0, upcast=True, prescale=0.125)
def rms_prescaled_input(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x) * 0.125
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


@_spelling("rms_norm", eps=4e-5, scale=2.0)
def rms_scaled_statistics(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt((0.5 * x).pow(2).mean(-1, keepdim=True) + 1e-5) * w


@_spelling("rms_norm", scale=8.0)
def rms_scaled_output(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 8.0 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


@_spelling("rms_norm", scale=0.5)
def rms_halved_output(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w / 2


# --- RMSNorm: the shape of the statistics -------------------------------------------------------------------


@_spelling("rms_norm")
def rms_keepdim_false_unsqueeze(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).unsqueeze(-1) * w


@_spelling("rms_norm")
def rms_keepdim_false_index(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1)[..., None] + 1e-6) * w


@_spelling("rms_norm")
def rms_keepdim_false_view(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6).view(x.shape[0], x.shape[1], 1) * w


@_spelling("rms_norm")
def rms_flatten_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.reshape(-1, x.shape[-1])
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w).reshape(x.shape)


@_spelling("rms_norm", shape=(2, 3, 5, WIDTH))
def rms_flatten_middle(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.flatten(0, 2)
    return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).view_as(x)


@_spelling("rms_norm", shape=(5, WIDTH))
def rms_rank_2(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w


@_spelling("rms_norm", shape=(2, 5, 4, WIDTH))
def rms_rank_4(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(3, keepdim=True) + 1e-6) * w


@_spelling("rms_norm", shape=(WIDTH,))
def rms_rank_1(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean() + 1e-6) * w


@_spelling("rms_norm", shape=(2, WIDTH, 4, 6), axes=(1,))
def rms_channels_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w[:, None, None]


@_spelling("rms_norm", shape=(2, 5, 8, 8), axes=(-2, -1))
def rms_two_axes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + 1e-6) * w.view(8, 8)


@_spelling("rms_norm", shape=(2, 8, WIDTH), axes=(-2, -1))
def rms_two_axes_row_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6) * w


@_spelling("rms_norm", shape=(2, 8, WIDTH), axes=(-2, -1))
def rms_mean_of_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).mean(-2, keepdim=True) + 1e-6) * w


@_spelling("rms_norm", shape=(WIDTH, 5), axes=(0,))
def rms_first_axis(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6) * w.unsqueeze(1)


@_spelling("rms_norm", shape=(WIDTH, 5), axes=(0,))
def rms_first_axis_broadcast(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(0) + 1e-6) * w[:, None]


# --- RMSNorm: the weight and the bias -----------------------------------------------------------------------


@_spelling("rms_norm", weight=False)
def rms_no_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@_spelling("rms_norm")
def rms_weight_before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x * w) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@_spelling("rms_norm")
def rms_weight_times_rstd(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * (w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@_spelling("rms_norm", offset=1.0)
def rms_n_plus_n_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return n + n * w


@_spelling("rms_norm", offset=1.0)
def rms_addcmul_offset(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.addcmul(n, n, w)


@_spelling("rms_norm", bias=True)
def rms_addcmul_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addcmul(b, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), w)


@_spelling("rms_norm", bias=True)
def rms_addcdiv_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addcdiv(b, x * w, torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@_spelling("rms_norm", bias=True, weight=False)
def rms_bias_only(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return b + x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@_spelling("rms_norm", eps=1e-5)
def rms_functional(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), w, 1e-5)


@_spelling("rms_norm", eps=1e-5, weight=False)
def rms_functional_no_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), eps=1e-5)


@_spelling("rms_norm", eps=1e-5, shape=(2, 5, 8, 8), axes=(-2, -1))
def rms_functional_two_axes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (8, 8), w.view(8, 8), 1e-5)


def _rms_default_eps_double(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), w, torch.finfo(torch.float32).eps)


@_spelling("rms_norm", eps=torch.finfo(torch.float32).eps, double=_rms_default_eps_double)
def rms_functional_default_eps(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), w)


# --- RMSNorm: as model code writes it -----------------------------------------------------------------------


@_spelling("rms_norm", upcast=True)
def rms_llama(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    dtype = x.dtype
    h = up(x)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-6)
    return w * h.to(dtype)


@_spelling("rms_norm", eps=1e-5, upcast=True)
def rms_olmo2(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    dtype = x.dtype
    h = up(x)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + 1e-5)
    return (w * h).to(dtype)


@_spelling("rms_norm", upcast=True, offset=1.0)
def rms_gemma(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + up(w))).type_as(x)


@_spelling("rms_norm", upcast=True)
def rms_gemma3n(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    h = h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)
    return (h * up(w)).type_as(x)


@_spelling("rms_norm", upcast=True, weight=False)
def rms_gemma4_value(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    mean_squared = h.pow(2).mean(-1, keepdim=True) + 1e-6
    return (h * torch.pow(mean_squared, -0.5)).type_as(x)


@_spelling("rms_norm", eps=1e-5, upcast=True)
def rms_llama4(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return n.type_as(x) * w


@_spelling("rms_norm", eps=1e-5, upcast=True, weight=False, shape=(2, 5, 4, WIDTH))
def rms_llama4_l2(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)


@_spelling("rms_norm", upcast=True)
def rms_t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = up(x).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + 1e-6)
    if w.dtype in (torch.float16, torch.bfloat16):
        h = h.to(w.dtype)
    return w * h


@_spelling("rms_norm", eps=1e-5)
def rms_imagegpt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    ms = torch.mean(torch.square(x), axis=-1, keepdim=True)  # type: ignore[call-overload]
    return x / torch.sqrt(ms + 1e-5) * w[..., :]


@_spelling("rms_norm", upcast=True)
def rms_float_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (up(w) * n).to(x.dtype)


@_spelling("rms_norm", upcast=True)
def rms_double(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.double()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w


@_spelling("rms_norm", upcast=True)
def rms_rounded_rstd(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rstd = torch.rsqrt(up(x).pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd.to(x.dtype) * w


@_spelling("rms_norm", upcast=True, shape=(2, 5, 4, WIDTH))
def rms_query_heads(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    n = w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return n.transpose(1, 2).transpose(1, 2)


# --- LayerNorm: the operator --------------------------------------------------------------------------------


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_functional(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w, b, 1e-5)


@_spelling("layer_norm", eps=1e-12, bias=True)
def ln_functional_bert(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w, b, 1e-12)


@_spelling("layer_norm", eps=1e-5)
def ln_functional_no_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w, None, 1e-5)


@_spelling("layer_norm", eps=1e-5, weight=False)
def ln_functional_no_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


@_spelling("layer_norm", eps=1e-5, bias=True, shape=(2, 5, 8, 8), axes=(-2, -1))
def ln_functional_two_axes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (8, 8), w.view(8, 8), b.view(8, 8))


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_native(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.native_layer_norm(x, (WIDTH,), w, b, 1e-5)[0]


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_functional_then_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True, offset=1.0)
def ln_nemotron(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w + 1, b, 1e-5)


@_spelling("layer_norm", eps=1e-5, weight=False, upcast=True)
def ln_olmo1(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(up(x), (WIDTH,), None, None, eps=1e-5).to(x.dtype)


# --- LayerNorm: the mean and the centring -------------------------------------------------------------------


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_mean_once(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_mean_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5)
def ln_add_negative_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x + (-x.mean(-1, keepdim=True))
    return c * torch.rsqrt((c * c).mean(-1, keepdim=True) + 1e-5) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_sub_alpha(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = torch.sub(h, h.sum(-1, keepdim=True), alpha=1.0 / x.shape[-1])
    return (c * torch.rsqrt(c.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_negated_reverse(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = -(x.mean(-1, keepdim=True) - x)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_reverse_and_subtract(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    d = x.mean(-1, keepdim=True) - x
    return b - d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * w


@_spelling("layer_norm", eps=1e-5)
def ln_rsub(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = torch.rsub(x.mean(-1, keepdim=True), x)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_matmul_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    average = torch.ones(x.shape[-1], 1, dtype=h.dtype) / x.shape[-1]
    c = h - h @ average
    return (c * torch.rsqrt((c * c) @ average + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_matmul_square_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    average = torch.full((WIDTH, WIDTH), 1.0 / WIDTH, dtype=h.dtype)
    c = h - torch.matmul(h, average)
    return (c * torch.rsqrt(torch.matmul(c * c, average) + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_einsum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, n = up(x), x.shape[-1]
    c = h - torch.einsum("bsd->bs", h).unsqueeze(-1) / n
    return (c * torch.rsqrt(torch.einsum("bsd,bsd->bs", c, c).unsqueeze(-1) / n + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_centred_twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = h - h.mean(-1, keepdim=True)
    c = c - c.mean(-1, keepdim=True)
    return (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, one_pass=True)
def ln_shifted_input(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x + 0.5
    c = h - h.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w


@_spelling("layer_norm", eps=4e-5, upcast=True, prescale=0.5)
def ln_prescaled_input(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x) * 0.5
    c = h - h.mean(-1, keepdim=True)
    return (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5)
def ln_centred_then_rms(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.rms_norm(x - x.mean(-1, keepdim=True), (WIDTH,), w, 1e-5)


# --- LayerNorm: the variance --------------------------------------------------------------------------------


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_var_biased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = x.var(-1, unbiased=False, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_var_correction_0(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance = torch.var(x, dim=[-1], correction=0, keepdim=True)
    return w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)) + b


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_var_unbiased_corrected(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, n = up(x), x.shape[-1]
    variance = h.var(-1, keepdim=True) * ((n - 1) / n)
    return ((h - h.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5 * (WIDTH - 1) / WIDTH, scale=math.sqrt((WIDTH - 1) / WIDTH), upcast=True)
def ln_var_unbiased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    return ((h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_var_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_std_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    std, mean = torch.std_mean(h, -1, correction=0, keepdim=True)
    return ((h - mean) / torch.sqrt(std * std + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True, bias=True)
def ln_std_square(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = (h - h.mean(-1, keepdim=True)) * (h.std(-1, correction=0, keepdim=True) ** 2 + 1e-5) ** -0.5
    return c.to(x.dtype) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True, one_pass=True, half_range=False)
def ln_one_pass(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = x.pow(2).mean(-1, keepdim=True) - mean.pow(2)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True, upcast=True, one_pass=True)
def ln_one_pass_clamp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    mean = h.mean(-1, keepdim=True)
    variance = ((h * h).mean(-1, keepdim=True) - mean * mean).clamp(min=0)
    return ((h - mean) * torch.rsqrt(variance + 1e-5)).to(x.dtype) * w + b


@_spelling("layer_norm", eps=1e-5, upcast=True, one_pass=True)
def ln_one_pass_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    mean = h.mean(-1, keepdim=True)
    variance = F.relu(h.square().mean(-1, keepdim=True) - mean.square())
    return ((h - mean) / torch.sqrt(variance + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True, one_pass=True)
def ln_one_pass_maximum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    mean = h.mean(-1, keepdim=True)
    variance = h.square().mean(-1, keepdim=True) - mean.square()
    variance = torch.maximum(variance, torch.zeros((), dtype=h.dtype))
    return ((h - mean) * torch.rsqrt(variance + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, bias=True, upcast=True, one_pass=True)
def ln_tf2onnx(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, inverse_n = up(x), 1.0 / x.shape[-1]
    mean = h.sum(-1, keepdim=True) * inverse_n
    variance = torch.clamp_min((h * h).sum(-1, keepdim=True) * inverse_n - mean * mean, 0.0)
    scale = torch.rsqrt(variance + 1e-5) * up(w)
    return (h * scale + (up(b) - mean * scale)).to(x.dtype)


@_spelling("layer_norm", eps=1e-5, bias=True, upcast=True, one_pass=True)
def ln_keras_scale_shift(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    mean = h.mean(-1, keepdim=True)
    scale = torch.rsqrt((h - mean).square().mean(-1, keepdim=True) + 1e-5) * up(w)
    return (h * scale + (up(b) - mean * scale)).to(x.dtype)


@_spelling("layer_norm", eps=1e-5, upcast=True, one_pass=True)
def ln_covariance_with_itself(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = h - h.mean(-1, keepdim=True)
    return (c * torch.rsqrt((h * c).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5)
def ln_abs_centred(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.abs().pow(2).mean(-1, keepdim=True) + 1e-5) * w


@_spelling("layer_norm", eps=1e-5, half_range=False)
def ln_sum_div_n(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    n = x.shape[-1]
    c = x - x.sum(-1, keepdim=True) / n
    return c / torch.sqrt((c * c).sum(-1, keepdim=True) / n + 1e-5) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_eps_times_n_in_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, n = up(x), x.shape[-1]
    c = h - h.mean(-1, keepdim=True)
    root_n = math.sqrt(n)
    return (c * root_n * torch.rsqrt(c.pow(2).sum(-1, keepdim=True) + n * 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-4 / WIDTH, scale=WIDTH**-0.5, upcast=True)
def ln_unscaled_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = h - h.mean(-1, keepdim=True)
    return (c / torch.sqrt(c.pow(2).sum(-1, keepdim=True) + 1e-4)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_vector_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = h - h.mean(-1, keepdim=True)
    std = torch.linalg.vector_norm(c, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return (c * torch.rsqrt(std**2 + 1e-5)).to(x.dtype) * w


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_row_dot_matmul(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    c = h - h.mean(-1, keepdim=True)
    variance = (c.unsqueeze(-2) @ c.unsqueeze(-1)).squeeze(-1) / x.shape[-1]
    return (c * torch.rsqrt(variance + 1e-5)).to(x.dtype) * w


# --- LayerNorm: the inverse root, the weight and the bias ---------------------------------------------------


@_spelling("layer_norm", bias=True)
def ln_pow_minus_half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * (c.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5 * w + b


@_spelling("layer_norm", bias=True)
def ln_reciprocal_sqrt(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * (c.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt().reciprocal() * w + b


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_addcmul(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return torch.addcmul(b, c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5), w)


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_addcdiv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return torch.addcdiv(b, c * w, torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5))


@_spelling("layer_norm", eps=1e-5, bias=True, scale=2.0)
def ln_addcmul_value(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return torch.addcmul(b, c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5), w, value=2.0)


@_spelling("layer_norm", eps=1e-5, bias=True, offset=1.0)
def ln_one_plus_weight(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w) + b


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_weight_before(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return (w * c) / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) + b


@_spelling("layer_norm", eps=1e-5, bias=True, weight=False)
def ln_bias_only(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) + b


@_spelling("layer_norm", eps=1e-5, weight=False)
def ln_no_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5)


@_spelling("layer_norm", eps=1e-5, bias=True, one_pass=True)
def ln_distributed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * rstd * w - mean * rstd * w + b


# --- LayerNorm: shapes --------------------------------------------------------------------------------------


@_spelling("layer_norm", eps=1e-5)
def ln_keepdim_false(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(-1).unsqueeze(-1)
    return c * torch.rsqrt(c.pow(2).mean(-1) + 1e-5)[..., None] * w


@_spelling("layer_norm", eps=1e-5, bias=True)
def ln_flatten_rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.reshape(-1, x.shape[-1])
    c = h - h.mean(-1, keepdim=True)
    return (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b).reshape(x.shape)


@_spelling("layer_norm", eps=1e-5, bias=True, shape=(5, WIDTH))
def ln_rank_2(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(1, keepdim=True) + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, shape=(2, 5, 4, WIDTH))
def ln_rank_4(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(3, keepdim=True)
    return c / torch.sqrt(c.square().mean(3, keepdim=True) + 1e-5) * w


@_spelling("layer_norm", eps=1e-5, bias=True, shape=(WIDTH,))
def ln_rank_1(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean()
    return c * torch.rsqrt(c.pow(2).mean() + 1e-5) * w + b


@_spelling("layer_norm", eps=1e-5, bias=True, shape=(WIDTH, 5), axes=(0,))
def ln_first_axis(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean(0)
    return c * torch.rsqrt(c.pow(2).mean(0) + 1e-5) * w[:, None] + b[:, None]


@_spelling("layer_norm", eps=1e-5, bias=True, shape=(2, 5, 8, 8), axes=(-2, -1))
def ln_two_axes(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    c = x - x.mean((2, 3), keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean((2, 3), keepdim=True) + 1e-5) * w.view(8, 8) + b.view(8, 8)


@_spelling("layer_norm", bias=True, shape=(2, WIDTH, 4, 6), axes=(1,))
def ln_convnext(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + 1e-6)
    return w[:, None, None] * x + b[:, None, None]


@_spelling("layer_norm", bias=True, shape=(2, WIDTH, 9), axes=(1,))
def ln_channels_first_1d(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-6) * w.view(1, -1, 1) + b.view(1, -1, 1)


# --- LayerNorm: as model code writes it ---------------------------------------------------------------------


@_spelling("layer_norm", eps=1e-5, upcast=True)
def ln_cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    dtype = x.dtype
    h = up(x)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    h = up(w) * h
    return h.to(dtype)


@_spelling("layer_norm", eps=1e-7, bias=True, upcast=True)
def ln_deberta(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    dtype = x.dtype
    h = up(x)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) / torch.sqrt(variance + 1e-7)
    h = h.to(dtype)
    return w * h + b


@_spelling("layer_norm", eps=1e-12, bias=True, upcast=True)
def ln_tf_style_bert(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    u = h.mean(-1, keepdim=True)
    s = (h - u).pow(2).mean(-1, keepdim=True)
    return w * ((h - u) / torch.sqrt(s + 1e-12)).to(x.dtype) + b


@_spelling("layer_norm", bias=True, upcast=True, shape=(2, WIDTH, 4, 6), axes=(1,))
def ln_sam_channels_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = up(x)
    u = h.mean(1, keepdim=True)
    s = (h - u).pow(2).mean(1, keepdim=True)
    h = ((h - u) / torch.sqrt(s + 1e-6)).to(x.dtype)
    return w[:, None, None] * h + b[:, None, None]


@_spelling("layer_norm", eps=1e-5, bias=True, upcast=True)
def ln_fp32_affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(up(x), (WIDTH,), up(w), up(b), 1e-5).type_as(x)


# --- what they must equal -----------------------------------------------------------------------------------


def parameters(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random float32 weight (around 1.5) and bias (around 0.3), far from one and zero."""
    g = torch.Generator().manual_seed(seed)
    return 1.5 + 0.5 * torch.randn(WIDTH, generator=g), 0.3 + 0.1 * torch.randn(WIDTH, generator=g)


def reference(spelling: Spelling, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The spelling's own arithmetic, in float64."""
    fn = spelling.double or spelling.fn
    return fn(x.double(), w.double(), b.double())


def normal_form(spelling: Spelling, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The fact's arithmetic, in float64, without using the spelling's function."""
    x = x.double()
    axes = tuple(sorted(a % x.ndim for a in spelling.axes))
    size = math.prod(x.shape[a] for a in axes)
    broadcast = [x.shape[a] if a in axes else 1 for a in range(x.ndim)]

    def along(p: Tensor) -> Tensor:
        return p.double().reshape(broadcast) if p.numel() == size else p.double()

    m1 = x.mean(axes, keepdim=True) if spelling.kind == "layer_norm" else torch.zeros((), dtype=x.dtype)
    c = x - m1
    y = spelling.scale * c * (c.square().mean(axes, keepdim=True) + spelling.eps).pow(-0.5)
    if spelling.weight:
        y = y * (along(w) + spelling.offset)
    return y + along(b) if spelling.bias else y


def hostile_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs that tell a right rewrite from one that is right on average; the same ones on every call."""
    g = torch.Generator().manual_seed(20)
    normal = torch.randn(shape, generator=g)
    bounded = normal.clamp(-3.0, 3.0)  # 3 * 50 squared is still a float16
    large = bounded * 50.0 if dtype == torch.float16 else normal * 1e3
    zero_row = normal.clone()  # along whichever axis is normalised
    zero_row[0 if len(shape) > 1 else slice(None)] = 0.0
    if len(shape) == 2:
        zero_row[:, 0] = 0.0
    inputs = {
        "normal": normal,
        "offset": normal + 3.0,
        "tiny": normal * 1e-4,
        "large_mean": normal + 100.0,
        "large_scale": large,
        "zero_row": zero_row,
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


# --- export to ONNX -----------------------------------------------------------------------------------------


_RMS_FUNCTIONAL = frozenset(
    {
        "rms_functional",
        "rms_functional_no_weight",
        "rms_functional_two_axes",
        "rms_functional_default_eps",
        "ln_centred_then_rms",
    }
)
_TORCHSCRIPT_LACKS = _RMS_FUNCTIONAL | {"rms_vecdot", "rms_addcdiv_bias", "ln_addcdiv"}

CANNOT_EXPORT: dict[tuple[Exporter, int], frozenset[str]] = {
    # TorchScript's exporter has no symbolic for aten::rms_norm, linalg_vecdot and addcdiv at any opset,
    # and none for einsum below opset 12. Dynamo's exporter can export all. Types make no difference.
    ("torchscript", 9): _TORCHSCRIPT_LACKS | {"rms_einsum", "rms_einsum_named", "ln_einsum"},
    ("torchscript", 10): _TORCHSCRIPT_LACKS | {"rms_einsum", "rms_einsum_named", "ln_einsum"},
    ("torchscript", 11): _TORCHSCRIPT_LACKS | {"rms_einsum", "rms_einsum_named", "ln_einsum"},
    ("torchscript", 17): _TORCHSCRIPT_LACKS,
    ("dynamo", 18): frozenset(),
    ("dynamo", 23): frozenset(),
}
"""What an exporter refuses (torch 2.13)."""

LOSES_EPS: dict[Exporter, frozenset[str]] = {
    # Dynamo's exporter drops the addition of 1e-12, as if it were 0: what is left divides by zero on a constant row.
    "dynamo": frozenset({"ln_tf_style_bert"}),
    "torchscript": frozenset(),
}
"""What is no norm any more once exported: its eps is gone."""

CANNOT_RUN: dict[tuple[Exporter, int, torch.dtype], frozenset[str]] = {
    # From opset 23 on, Dynamo's exporter fuses RMSNorms by pattern and drops the casts between float16 and
    # float32: RMSNormalization gets an x and a scale of different types, which ONNX Runtime's CPU provider
    # refuses when it loads the model, as does onnx.checker with full_check. The unoptimised exports run.
    ("dynamo", 23, torch.float16): frozenset(
        {
            "rms_prescaled_input",
            "rms_olmo2",
            "rms_gemma",
            "rms_float_weight",
            "ln_sub_alpha",
            "ln_centred_twice",
            "ln_prescaled_input",
        }
    ),
}
"""What exports but does not load in ONNX Runtime (onnxscript 0.7.2, ONNX Runtime 1.31)."""

WIDENED_BY_EXPORT: dict[Exporter, frozenset[str]] = {
    # Its addcmul multiplies by a float32 one: Cast to float32, and the output stays float32.
    "torchscript": frozenset({"rms_addcmul_offset", "rms_addcmul_bias", "ln_addcmul", "ln_addcmul_value"}),
    "dynamo": frozenset(),
}
"""What returns float32 for float16 once exported, where the torch function returns float16."""


class SpellingModule(nn.Module):
    """A spelling with its weight and bias as parameters."""

    def __init__(self, spelling: Spelling, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        w, b = parameters(seed)
        self.fn = spelling.fn
        self.weight = nn.Parameter(w.to(dtype), requires_grad=False)
        self.bias = nn.Parameter(b.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Call the spelling's function."""
        return self.fn(x, self.weight, self.bias)


def dynamic_dims(spelling: Spelling) -> dict[int, str]:
    """Names for the first axes that are not normalised (batch, then sequence)."""
    rank = len(spelling.shape)
    normalised = {a % rank for a in spelling.axes}
    free = [a for a in range(rank) if a not in normalised]
    return dict(zip(free, ("batch", "sequence"), strict=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters print, log and warn."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def export(
    spelling: Spelling,
    exporter: Exporter,
    opset: int,
    dtype: torch.dtype,
    path: str | Path,
    *,
    optimize: bool = True,
) -> None:
    """Export the spelling to an ONNX file with dynamic batch and sequence; raises where the exporter cannot.

    From opset 23 on, Dynamo's exporter fuses some RMSNorms itself; without `optimize` it leaves the graph as
    translated. TorchScript's exporter takes it to mean constant folding.
    """
    module = SpellingModule(spelling, dtype).eval()
    x = torch.randn(spelling.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dims = dynamic_dims(spelling)
    with _quiet():
        if exporter == "dynamo":
            torch.onnx.export(
                module,
                (x,),
                str(path),
                dynamo=True,
                opset_version=opset,
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=({a: torch.export.Dim(n, min=2) for a, n in dims.items()},),
                external_data=False,
                optimize=optimize,
                verbose=False,
            )
        else:
            torch.onnx.export(
                module,
                (x,),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": dims, "y": dims},
                do_constant_folding=optimize,
                verbose=False,
            )
