"""The norms of query and key as one operator: where attention is, of each kind, and not where a condition is broken."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import normfuse
from tests.compiling import operators
from tests.fusing import N, fused, rms, tensors


def attention(x: Tensor, a: Tensor, b: Tensor, wq: Tensor, wk: Tensor, *, eps: float = 1e-6, late: bool = False,
              chained: bool = False) -> Tensor:  # fmt: skip
    """Attention with norms of query and key per head."""
    q = rms(F.linear(x, a).view(3, 4, 2, N).transpose(1, 2), wq)
    k = F.linear(q.transpose(1, 2).reshape(3, 4, 2 * N)[..., :N] if chained else x, b).view(3, 4, 2, N)
    k = rms(k.transpose(1, 2), wk, eps)
    if late:
        x.add_(1)
    return F.scaled_dot_product_attention(q, k, x.view(3, 4, 2, N // 2).transpose(1, 2))


QK = ((3, 4, N), (2 * N, N), (2 * N, N), (N,), (N,))


def test_qk_pair_waits_for_the_key() -> None:
    assert fused(attention, tensors(*QK)) == {"qk_norm": 1}


def test_a_query_with_a_weight_and_a_key_without() -> None:
    def f(x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        q, k = (rms(F.linear(x, m).view(3, 4, 2, N).transpose(1, 2), None if m is b else w) for m in (a, b))
        return F.scaled_dot_product_attention(q, k, k)

    assert fused(f, tensors(*QK[:-1])) == {"qk_norm": 1}


def test_joint_attention_has_two_pairs() -> None:
    def f(x: Tensor, a: Tensor, b: Tensor, w: Tensor, v: Tensor) -> Tensor:
        def heads(y: Tensor, weight: Tensor) -> Tensor:
            return rms(y.view(3, 4, 2, N).transpose(1, 2), weight)

        image = heads(F.linear(x, a), w), heads(F.linear(x, b), v)
        text = heads(F.linear(x * 2, a), w), heads(F.linear(x * 2, b), v)
        q, k = (torch.cat(pair, 2) for pair in zip(image, text, strict=True))
        return F.scaled_dot_product_attention(q, k, k)

    assert fused(f, tensors(*QK)) == {"qk_norm": 2}


def flexible(x: Tensor, a: Tensor, b: Tensor, wq: Tensor, wk: Tensor, *,
             mask: BlockMask | None = None) -> Tensor:  # fmt: skip
    q, k = (rms(F.linear(x, m).view(1, 128, 2, N).transpose(1, 2), w) for m, w in ((a, wq), (b, wk)))
    return flex_attention(q, k, k, score_mod=lambda score, _b, _h, i, j: score + (i - j), block_mask=mask)


FLEXIBLE = ((1, 128, N), *QK[1:])


def test_flex_attention_is_attention_too() -> None:
    assert fused(flexible, tensors(*FLEXIBLE)) == {"qk_norm": 1}


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # torch 2.10's
def test_flex_attention_writes_nothing_of_what_its_mask_looks_up() -> None:
    """The mask is a sub-graph that calls a function of Dynamo's, which may write for all that is known of it."""

    class Looked(torch.nn.Module):
        frames: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frames", torch.arange(128) // 8)

        def forward(self, *args: Tensor) -> Tensor:
            def mask(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return self.frames[i] >= self.frames[j]

            return flexible(*args, mask=create_block_mask(mask, None, None, 128, 128, "cpu"))

    module, args = Looked(), tensors(*FLEXIBLE)
    program, _ = normfuse.optimize(torch.export.export(module, args))
    assert operators(program.graph_module) == {"qk_norm": 1}
    torch.testing.assert_close(program.module()(*args), module(*args), rtol=1e-5, atol=1e-5)


@torch.library.custom_op("normfuse_tests::flash_attn_fwd", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("normfuse_tests::other", mutates_args=())
def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + k + v


@other.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@pytest.mark.parametrize(("operator", "made"), [(flash, {"qk_norm": 1}), (other, {})])
def test_an_operator_of_another_library_with_attention_in_its_name(operator: Any, made: dict[str, int]) -> None:
    def f(x: Tensor, a: Tensor, b: Tensor, wq: Tensor, wk: Tensor) -> Tensor:
        q, k = (rms(F.linear(x, m).view(3, 4, 2, N).transpose(1, 2), w).contiguous() for m, w in ((a, wq), (b, wk)))
        return cast(Tensor, operator(q, k, k))

    found = fused(f, tensors(*QK))
    assert {name: n for name, n in found.items() if name == "qk_norm"} == made


@pytest.mark.parametrize("how", [{"eps": 1e-5}, {"chained": True}])
def test_qk_pair_is_refused(how: dict[str, Any]) -> None:
    assert "qk_norm" not in fused(lambda *a: attention(*a, **how), tensors(*QK))


def test_a_write_between_query_and_key_keeps_them_apart() -> None:
    def f(x: Tensor, a: Tensor, b: Tensor, wq: Tensor, wk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        q = rms(F.linear(x, a).view(3, 4, 2, N).transpose(1, 2), wq)
        state.add_(1)
        k = rms(F.linear(x, b).view(3, 4, 2, N).transpose(1, 2), wk)
        return F.scaled_dot_product_attention(q, k, k), state + 0

    assert "qk_norm" not in fused(f, tensors(*QK, (3,)))
