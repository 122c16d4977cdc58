"""Registers the operators of `normfuse.ops.meaning` with torch, as `torch.ops.normfuse.*`.

Each has: a schema; one kernel for every device, which is the definition itself or, on CUDA, the Triton kernel; a fake
kernel; autograd by a fused backward operator. Second derivatives come from the definition of the backward, which is
plain torch. `Library.define` and not `custom_op`, whose call takes half as long again.

Results of x's shape, gradients too, have the strides of ``torch.empty_like`` of x (of q and k, of x and s: each its
own), as the elementwise operations of a model's own norm give them.
Integer or complex tensors, a weight of another length, eps <= 0, several devices, an empty last axis and a residual of
another shape than x raise `InputError`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from normfuse.ops import meaning, sharding
from normfuse.ops.checks import check, check_beside, check_device, check_rows
from normfuse.ops.meaning import Dtype, compute_type

_HOW = 'float eps, float offset=0., str cast="last", ScalarType? dtype=None'
_KIND = 'str kind="rms_norm"'
_NORM = f"(Tensor x, Tensor? weight, Tensor? bias, {_HOW}) -> Tensor"
_ADD = f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {_HOW}, bool round_sum=True) -> (Tensor y, Tensor s)"
_FOUR = "Tensor? {0}weight{1}, Tensor? {0}bias{1}, Tensor? {2}weight{3}, Tensor? {2}bias{3}"
_SANDWICH, _PAIR = _FOUR.format("", 1, "", 2), _FOUR.format("q_", "", "k_", "")
_BACK = "float eps, float offset, str kind"

library: Any = torch.library.Library("normfuse", "DEF")  # type: ignore[no-untyped-call]
Gradients = tuple[Tensor | None, ...]
Where = ModuleType | Any
"""Where the arithmetic is: `normfuse.ops.meaning`, or `normfuse.ops.launch` with kernels of the same names."""


# -- the operators: check, compute -----------------------------------------------------------------------------------


def _norm(op: str, where: Where, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
          offset: float = 0.0, cast: str = "last", dtype: Dtype = None) -> Tensor:  # fmt: skip
    check(op, eps, cast, op, dtype)
    check_rows(op, "x", x, ("weight", weight), ("bias", bias))
    out: Tensor = where.norm(x, weight, bias, eps, offset, cast, dtype, op)
    return out


def _add_norm(op: str, where: Where, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
              eps: float, offset: float = 0.0, cast: str = "last", dtype: Dtype = None, round_sum: bool = True,
              ) -> tuple[Tensor, Tensor]:  # fmt: skip
    kind = op.removeprefix("add_")
    check(op, eps, cast, kind, dtype)
    check_rows(op, "x", x, ("weight", weight), ("bias", bias))
    check_beside(op, "residual", residual, x)
    out: tuple[Tensor, Tensor] = where.add_norm(x, residual, weight, bias, eps, offset, cast, dtype, round_sum, kind)
    return out


def _norm_add(op: str, where: Where, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
              eps: float, offset: float = 0.0, cast: str = "last", dtype: Dtype = None, kind: str = "rms_norm",
              ) -> Tensor:  # fmt: skip
    check(op, eps, cast, kind, dtype)
    check_rows(op, "x", x, ("weight", weight), ("bias", bias))
    check_beside(op, "residual", residual, x)
    out: Tensor = where.norm_add(x, residual, weight, bias, eps, offset, cast, dtype, kind)
    return out


def _norm_add_norm(op: str, where: Where, x: Tensor, residual: Tensor, weight1: Tensor | None, bias1: Tensor | None,
                   weight2: Tensor | None, bias2: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last",
                   dtype: Dtype = None, kind: str = "rms_norm") -> tuple[Tensor, Tensor]:  # fmt: skip
    check(op, eps, cast, kind, dtype)
    check_rows(op, "x", x, ("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2))
    check_beside(op, "residual", residual, x)
    out: tuple[Tensor, Tensor] = where.norm_add_norm(x, residual, weight1, bias1, weight2, bias2, eps, offset, cast,
                                                     dtype, kind)  # fmt: skip
    return out


def _qk_norm(op: str, where: Where, q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None,
             k_weight: Tensor | None, k_bias: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last",
             dtype: Dtype = None, kind: str = "rms_norm") -> tuple[Tensor, Tensor]:  # fmt: skip
    check(op, eps, cast, kind, dtype)
    check_rows(op, "q", q, ("q_weight", q_weight), ("q_bias", q_bias))
    check_device(op, "k", k, "q", q)
    check_rows(op, "k", k, ("k_weight", k_weight), ("k_bias", k_bias))
    out: tuple[Tensor, Tensor] = where.qk_norm(q, k, q_weight, q_bias, k_weight, k_bias, eps, offset, cast, dtype, kind)
    return out


def _backward(op: str, where: Where, *args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = getattr(where, op)(*args)
    return out


# -- autograd ----------------------------------------------------------------------------------------------------------


def _back(name: str, *args: Any) -> tuple[Tensor, ...]:
    """A backward operator; where its own derivative is asked for, its definition."""
    where: Any = meaning if torch.is_grad_enabled() else torch.ops.normfuse
    out: tuple[Tensor, ...] = getattr(where, name)(*args)
    return out


def _wanted(ctx: Any, *gradients: tuple[int, Tensor | None]) -> Gradients:
    """The gradients of the inputs at these places, None for each that nobody needs."""
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, gradient in gradients:
        out[i] = gradient if ctx.needs_input_grad[i] else None
    return tuple(out)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient; zeros for a result that nobody read, sharded as `like` is, which autograd's own zeros are not."""
    return torch.zeros_like(like) if gradient is None else gradient


def _cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return gradient if gradient is None else gradient.to(dtype)


def _needed(ctx: Any, outputs: Any, *sources: tuple[int, ...]) -> None:
    """Results need a gradient where one of their own sources among the operands does, and not as soon as any does."""
    need = ctx.needs_input_grad
    none = [out for out, own in zip(outputs, sources, strict=True) if not any(need[i] for i in own)]
    ctx.mark_non_differentiable(*none)


def _save_norm(ctx: Any, inputs: Any, output: Any, kind: str) -> None:
    x, weight, bias, ctx.eps, ctx.offset, *_ = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.kind = kind


def _norm_gradients(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dw, db = _back("norm_backward", dy, x, weight, bias, None, ctx.eps, ctx.offset, ctx.kind, need[1], need[2])
    return _wanted(ctx, (0, dx), (1, dw), (2, db))


def _save_add_norm(ctx: Any, inputs: Any, output: Any, kind: str) -> None:
    x, residual, weight, bias, ctx.eps, ctx.offset, _, _, round_sum = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, bias, *((output[1],) if round_sum else (x, residual)))
    ctx.types, ctx.kind = (x.dtype, residual.dtype), kind
    _needed(ctx, output, (0, 1, 2, 3), (0, 1))


def _add_norm_gradients(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> Gradients:
    weight, bias, *read = ctx.saved_tensors
    need, dw, db, dx = ctx.needs_input_grad, None, None, ds
    if dy is not None:
        s = read[0]
        if len(read) == 2:
            c = compute_type(torch.promote_types(*ctx.types))
            s = read[0].to(c) + read[1].to(c)
        dx, dw, db = _back("norm_backward", dy, s, weight, bias, ds, ctx.eps, ctx.offset, ctx.kind, need[2], need[3])
    return _wanted(ctx, (0, _cast(dx, ctx.types[0])), (1, _cast(dx, ctx.types[1])), (2, dw), (3, db))


def _save_norm_add(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, bias, ctx.eps, ctx.offset, _, _, ctx.kind = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.dtype = residual.dtype


def _norm_add_gradients(ctx: Any, ds: Tensor) -> Gradients:
    x, weight, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dw, db = _back("norm_backward", ds, x, weight, bias, None, ctx.eps, ctx.offset, ctx.kind, need[2], need[3])
    return _wanted(ctx, (0, dx), (1, _cast(ds, ctx.dtype)), (2, dw), (3, db))


def _save_norm_add_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, w1, b1, w2, b2, ctx.eps, ctx.offset, _, _, ctx.kind = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], w1, b1, w2, b2)
    ctx.dtype = residual.dtype
    _needed(ctx, output, (0, 1, 2, 3, 4, 5), (0, 1, 2, 3))


def _norm_add_norm_gradients(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> Gradients:
    x, s, *parameters = ctx.saved_tensors
    need = _read(ctx, (True, True, dy is not None, dy is not None))
    dy, ds = _or_zeros(dy, s), _or_zeros(ds, s)
    dx, dr, *rest = _back("norm_add_norm_backward", dy, ds, x, s, *parameters, ctx.eps, ctx.offset, ctx.kind, need)
    found = [g if n else None for g, n in zip(rest, need, strict=True)]
    return _wanted(ctx, (0, dx), (1, _cast(dr, ctx.dtype)), *enumerate(found, 2))


def _save_qk_norm(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.eps, ctx.offset, ctx.kind = inputs[6], inputs[7], inputs[10]
    _needed(ctx, output, (0, 2, 3), (1, 4, 5))


def _qk_norm_gradients(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> Gradients:
    q, k, *parameters = ctx.saved_tensors
    sides = [dq is not None, dk is not None]
    need = _read(ctx, [side for side in sides for _ in range(2)])
    dq, dk = _or_zeros(dq, q), _or_zeros(dk, k)
    found = _back("qk_norm_backward", dq, dk, q, k, *parameters, ctx.eps, ctx.offset, ctx.kind, need)
    return _wanted(ctx, *((i, g if n else None) for i, (g, n) in enumerate(zip(found, sides + need, strict=True))))


def _read(ctx: Any, read: Sequence[bool]) -> list[bool]:
    """Which of the four parameters need a gradient: those of a norm that nobody `read` get none, as in torch."""
    return [wanted and norm for wanted, norm in zip(ctx.needs_input_grad[2:6], read, strict=True)]


# -- registration ------------------------------------------------------------------------------------------------------


@cache
def _kernels() -> Where:
    """The Triton kernels, or the definitions where there is no Triton."""
    try:
        from normfuse.ops import launch
    except ImportError:
        return meaning
    return launch


def _several(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _lay(results: Any, likes: tuple[Tensor, ...]) -> Any:
    """Results, of which the first have the strides that the operator promises: of `empty_like`, each of its own."""
    if isinstance(results, tuple):
        return tuple(_lay(r, (like,)) for r, like in zip(results, likes, strict=False)) + results[len(likes) :]
    if results.is_contiguous() and likes[0].is_contiguous():  # the rest takes as long as a launch
        return results
    promised = torch.empty_like(likes[0], dtype=results.dtype, device="meta").stride()
    return results if results.stride() == promised else torch.empty_like(likes[0], dtype=results.dtype).copy_(results)


def _register(name: str, schema: str, like: tuple[int, ...], run: Callable[..., Any],
              save: Callable[..., None] | None = None, gradients: Callable[..., Any] | None = None,
              ) -> None:  # fmt: skip
    """Register one operator, whose results lie as these arguments do; without `gradients` it is a backward."""

    def kernel(*args: Any) -> Any:
        out = run(name, _kernels() if args[0].is_cuda else meaning, *args)
        return _lay(out, tuple(args[i] for i in like))

    def fake(*args: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:
            sharding.register()
        out = run(name, meaning, *args)
        made = [torch.empty_like(args[i], dtype=r.dtype) for i, r in zip(like, _several(out), strict=False)]
        return (*made, *out[len(made) :]) if isinstance(out, tuple) else made[0]

    def decomposition(*args: Any) -> Any:
        return NotImplemented if stays(args[0], backward=gradients is None) else run(name, meaning, *args)

    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel, "CompositeExplicitAutograd")
    # under vmap, grad, jvp and the like: plain torch, which has every rule for batches and every derivative
    library.impl(name, lambda *args: run(name, meaning, *args), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"normfuse::{name}", fake, lib=library)
    if gradients is not None:
        torch.library.register_autograd(f"normfuse::{name}", gradients, setup_context=save, lib=library)
    DECOMPOSITIONS[getattr(torch.ops.normfuse, name).default] = decomposition


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""What each operator is made of, where Inductor does better with that: off a GPU, and what is small or wide on it."""
SMALL = 2**23
"""Elements below which operators are left to Inductor: a step takes as long as its calls then, and to call one takes
longer than to call a kernel of Inductor's (on an H200 a Qwen3 with queries of 2^22 took 1.31 times the time, and 1.01
without the operators; a Llama of 2^22, whose products are larger, took 0.98)."""
WIDEST = 8192
"""The longest rows of which a backward stays: of an add_rms_norm at 16,384 it took 1.03 times Inductor's time
(tests/bench/results/kernels.json)."""


def stays(x: Tensor, backward: bool = False) -> bool:
    """Whether an operator on such a tensor is a call in what Inductor compiles, and not what it is made of."""
    return x.is_cuda and not _small(x) and not (backward and x.shape[-1] > WIDEST)


def _small(x: Tensor) -> bool:
    """Whether a tensor of a graph has few elements, by the sizes that it is compiled with where they are symbols."""
    number: Any = x.numel()
    if not isinstance(number, int):
        number = number.node.hint if number.node.has_hint() else SMALL
    return bool(number < SMALL)


for _name in ("rms_norm", "layer_norm"):
    _register(_name, _NORM, (0,), _norm, partial(_save_norm, kind=_name), _norm_gradients)
    _register(f"add_{_name}", _ADD, (0, 0), _add_norm, partial(_save_add_norm, kind=_name), _add_norm_gradients)
_register("norm_add", f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {_HOW}, {_KIND}) -> Tensor",
          (0,), _norm_add, _save_norm_add, _norm_add_gradients)  # fmt: skip
_register("norm_add_norm", f"(Tensor x, Tensor residual, {_SANDWICH}, {_HOW}, {_KIND}) -> (Tensor y, Tensor s)",
          (0, 0), _norm_add_norm, _save_norm_add_norm, _norm_add_norm_gradients)  # fmt: skip
_register("qk_norm", f"(Tensor q, Tensor k, {_PAIR}, {_HOW}, {_KIND}) -> (Tensor, Tensor)",
          (0, 1), _qk_norm, _save_qk_norm, _qk_norm_gradients)  # fmt: skip
_register("norm_backward", "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? ds, "
          f"{_BACK}, bool need_weight, bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
          (1,), _backward)  # fmt: skip
_SIX = "bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_register("norm_add_norm_backward", f"(Tensor dy, Tensor ds, Tensor x, Tensor s, {_SANDWICH}, {_BACK}, {_SIX}",
          (2, 3), _backward)  # fmt: skip
_register("qk_norm_backward", f"(Tensor dq, Tensor dk, Tensor q, Tensor k, {_PAIR}, {_BACK}, {_SIX}",
          (2, 3), _backward)  # fmt: skip


@cache
def decompose_on_cpu() -> None:
    """Let Inductor see what the operators are made of, so that it fuses them itself where `DECOMPOSITIONS` say so.

    Otherwise they stay. By itself Inductor refuses a fallback for an operator that has a decomposition.
    """
    from torch._inductor import decomposition, lowering
    from torch._library.utils import get_layout_constraint_tag

    # the second table is a copy of the first that Inductor makes once and keeps
    for table in (decomposition.decompositions, decomposition.fast_random_decomps()):
        table.update(DECOMPOSITIONS)
    for op in DECOMPOSITIONS:
        if op not in lowering.lowerings:
            layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op))
            fallback: Any = lowering.make_fallback
            fallback(op, layout, warn=False, override_decomp=True)
