"""The operators of `normfuse.ops.meaning`, name for name, computed by Triton kernels.

What the kernels do not cover is left to `meaning`: rows longer than 262,144, 2^31 rows, empty tensors, and float64
beside a narrower x. On CUDA tensors, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1).

Nothing is tuned while a model runs, so that a CUDA graph can be captured at any time: `config` is a function of N and
the dtypes. It never sees the number of rows or of multiprocessors: a row's result does not depend on its batch, nor a
weight's gradient on the GPU's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from normfuse.ops import kernels, kernels_backward, meaning
from normfuse.ops.kernels import How
from normfuse.ops.meaning import Dtype, Grads, compute_type

LONGEST, MOST_ROWS = 262_144, 2**31 - 2**16
ON_CHIP = 32_768
"""Elements of float32 that a program of 32 warps can hold without spilling."""
TYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32,
                                 torch.float64: tl.float64}  # fmt: skip


# -- configuration -----------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """A tile of `rows` by `block`, its warps, and the most programs that share the rows for a weight's gradient.

    Of `stages` tiles that such a program loads, all but one are under way while it works on that one. Without a
    weight's gradient, and for rows in blocks, both mean nothing.
    """

    rows: int
    block: int
    warps: int
    programs: int
    stages: int = 1


TUNED: dict[tuple[int, int, int], Config] = {}
"""Measured exceptions to `config`, by (block, bytes of an element, tensors): `tests.bench.kernels --tune`."""


def config(n: int, itemsize: int, tensors: int) -> Config:
    """The tile for rows of N elements, when a program holds so many tiles of them at once; block < N: in blocks."""
    block, wide = 1 << (n - 1).bit_length(), 2 if itemsize == 8 else 1
    if tuned := TUNED.get((block, itemsize, tensors)):
        return tuned
    if block * tensors * wide > ON_CHIP:
        block = min(block // 2, 8192 if tensors < 2 else 4096)
    rows = max(1, 2048 // block)
    tile = rows * block * wide
    if block < n:
        return Config(rows, block, min(max((1 << (n - 1).bit_length()) * wide // 1024, 4), 32), 0)
    if tensors < 3:
        # 16 elements to a thread: two accesses of 128 bits; 64 of a long row, so that two programs have room
        return Config(rows, block, min(max(tile // (2048 if tensors < 2 and tile > 8192 else 512), 4), 32), 0)
    if rows > 2:
        return Config(rows, block, 4, 264)
    # a loop with its loads under way has no use for many warps: measured on an H200
    return Config(rows, block, min(max(tile // 1024, 2), 32), 132 * max(1, 8192 // tile), 3)


class Plan(NamedTuple):
    """How an operator is computed for given types, and the types of its results."""

    how: How
    config: Config
    y: torch.dtype
    s: torch.dtype


@lru_cache(maxsize=4096)
def _plan(what: str, x: torch.dtype, residual: Dtype, parameters: tuple[Dtype, ...], n: int, eps: float, offset: float,
          cast: str, dtype: Dtype, kind: str, round_sum: bool) -> Plan | None:  # fmt: skip
    """The plan of a forward, None if the kernels do not cover it."""
    w, b, w2, b2 = (None if p is None else torch.empty(0, dtype=p) for p in parameters)
    narrow = torch.promote_types(x, residual) if what == "add_norm" and residual else x
    applied = meaning.affine_type(narrow, w, b, cast)
    result = y = dtype or (applied if cast == "first" else narrow)
    s, applied2 = narrow, applied
    if what in ("norm_add", "norm_add_norm") and residual:
        s = y = torch.promote_types(residual, result)
    if what == "norm_add_norm":
        applied2 = meaning.affine_type(s, w2, b2, cast)
        y = dtype or (applied2 if cast == "first" else s)
    c = compute_type(x)
    if n > LONGEST or {compute_type(s), compute_type(applied), compute_type(applied2)} != {compute_type(x)}:
        return None
    tile = config(n, s.itemsize, 2 if what == "norm_add_norm" else 1)
    how = How(n, tile.rows, tile.block, eps, offset, kind == "layer_norm", TYPES[c], what, cast == "first", round_sum,
              TYPES[narrow], TYPES[applied], TYPES[result], TYPES[applied2])  # fmt: skip
    return Plan(how, tile, y, s)


@lru_cache(maxsize=4096)
def _plan_backward(x: torch.dtype, others: tuple[Dtype, ...], n: int, eps: float, offset: float, kind: str,
                   tensors: int) -> Plan | None:  # fmt: skip
    """The plan of a backward, None if the kernels do not cover it."""
    c = compute_type(x)
    if n > LONGEST or (c != torch.float64 and torch.float64 in others):
        return None
    tile = config(n, x.itemsize, tensors)
    return Plan(How(n, tile.rows, tile.block, eps, offset, kind == "layer_norm", TYPES[c]), tile, x, c)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _dtype(x: Tensor | None) -> Dtype:
    return None if x is None else x.dtype


def _rows(x: Tensor) -> Tensor:
    """x with a last axis of stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flat(p: Tensor | None) -> Tensor | None:
    return p if p is None else p.contiguous()


@lru_cache(maxsize=4096)
def _axes(shape: tuple[int, ...], *strides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The leading axes in the order of their strides, neighbours joined where all tensors allow: sizes, then strides.

    The order of rows means nothing, so that transposed heads are as good as contiguous ones.
    """
    axes = [(size, *at) for size, *at in zip(shape[:-1], *(s[:-1] for s in strides), strict=True) if size > 1]
    axes.sort(key=lambda axis: axis[1:], reverse=True)
    joined: list[tuple[int, ...]] = []
    for axis in axes:
        if joined and all(outer == inner * axis[0] for outer, inner in zip(joined[-1][1:], axis[1:], strict=True)):
            axis = (joined.pop()[0] * axis[0], *axis[1:])
        joined.append(axis)
    return tuple(zip(*(joined or [(1, *(0 for _ in strides))]), strict=True))


def _views(*tensors: Tensor | None) -> tuple[tuple[int, ...], list[Any]] | None:
    """The sizes of the leading axes, the first as 1, and each tensor as a view; None for more than three axes."""
    there = [t for t in tensors if t is not None]
    shape = there[0].shape
    if all(t.is_contiguous() for t in there):
        return (1,), [t if t is None else (t, shape[-1]) for t in tensors]
    sizes, *strides = _axes(shape, *(t.stride() for t in there))
    rest = iter(strides)
    return None if len(sizes) > 3 else ((1, *sizes[1:]), [t if t is None else (t, *next(rest)) for t in tensors])


def _launch(kernel: Any, grid: tuple[int, ...], x: Tensor, warps: int, *args: Any) -> None:
    """Start a kernel where x is. Without fp fusion: a fused multiply-add would skip a rounding."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, num_warps=warps, enable_fp_fusion=False)
    else:
        kernel[grid](*args, num_warps=warps, enable_fp_fusion=False)


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward(what: str, x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor | None], eps: float,
             offset: float, cast: str, dtype: Dtype, kind: str, round_sum: bool = True,
             ) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """(y, s) of an operator; None if the kernels do not cover it."""
    n, number = x.shape[-1], x.numel()
    plan = _plan(what, x.dtype, _dtype(residual), tuple(map(_dtype, parameters)), n, eps, offset, cast, dtype, kind,
                 round_sum)  # fmt: skip
    if plan is None or not 0 < number < MOST_ROWS * n or (what == "norm_add_norm" and plan.config.block < n):
        return None
    x, residual = _rows(x), residual if residual is None else _rows(residual)
    y = torch.empty_like(x, dtype=plan.y)
    s = torch.empty_like(x, dtype=plan.s) if what in ("add_norm", "norm_add_norm") else None
    found = _views(x, residual, y, s)
    if found is None:
        residual = residual if residual is None else residual.contiguous()
        return _forward(what, x.contiguous(), residual, parameters, eps, offset, cast, dtype, kind, round_sum)
    (sizes, views), tile, given = found, plan.config, [*map(_flat, parameters)]
    if tile.block < n:
        _launch(kernels.forward_long, (number // n,), x, tile.warps, *views, *given[:2], sizes, plan.how)
    else:
        grid = (-(-(number // n) // tile.rows),)
        _launch(kernels.forward, grid, x, tile.warps, *views, *given, number // n, sizes, plan.how)
    return y, s


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last",
         dtype: Dtype = None, kind: str = "rms_norm") -> Tensor:  # fmt: skip
    """`meaning.norm`."""
    out = _forward("norm", x, None, (weight, bias, None, None), eps, offset, cast, dtype, kind)
    return out[0] if out else meaning.norm(x, weight, bias, eps, offset, cast, dtype, kind)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0,
             cast: str = "last", dtype: Dtype = None, round_sum: bool = True, kind: str = "rms_norm",
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`meaning.add_norm`."""
    out = _forward("add_norm", x, residual, (weight, bias, None, None), eps, offset, cast, dtype, kind, round_sum)
    if out is None or out[1] is None:
        return meaning.add_norm(x, residual, weight, bias, eps, offset, cast, dtype, round_sum, kind)
    return out[0], out[1]


def norm_add(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0,
             cast: str = "last", dtype: Dtype = None, kind: str = "rms_norm") -> Tensor:  # fmt: skip
    """`meaning.norm_add`."""
    out = _forward("norm_add", x, residual, (weight, bias, None, None), eps, offset, cast, dtype, kind)
    return out[0] if out else meaning.norm_add(x, residual, weight, bias, eps, offset, cast, dtype, kind)


def norm_add_norm(x: Tensor, residual: Tensor, weight1: Tensor | None, bias1: Tensor | None, weight2: Tensor | None,
                  bias2: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last", dtype: Dtype = None,
                  kind: str = "rms_norm") -> tuple[Tensor, Tensor]:  # fmt: skip
    """`meaning.norm_add_norm`; two kernels where a row does not fit on chip."""
    out = _forward("norm_add_norm", x, residual, (weight1, bias1, weight2, bias2), eps, offset, cast, dtype, kind)
    if out is not None and out[1] is not None:
        return out[0], out[1]
    s = norm_add(x, residual, weight1, bias1, eps, offset, cast, dtype, kind)
    return norm(s, weight2, bias2, eps, offset, cast, dtype, kind), s


def qk_norm(q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None,
            k_bias: Tensor | None, eps: float, offset: float = 0.0, cast: str = "last", dtype: Dtype = None,
            kind: str = "rms_norm") -> tuple[Tensor, Tensor]:  # fmt: skip
    """`meaning.qk_norm`; two kernels where a row does not fit on chip."""
    outs, args, tiles, warps = [], [], [], []
    for x, *p in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        n, number = x.shape[-1], x.numel()
        plan = _plan("norm", x.dtype, None, (_dtype(p[0]), _dtype(p[1]), None, None), n, eps, offset, cast, dtype,
                     kind, True)  # fmt: skip
        if plan is None or plan.config.block < n or not 0 < number < MOST_ROWS * n:
            break
        x = _rows(x)
        y = torch.empty_like(x, dtype=plan.y)
        found = _views(x, y)
        if found is None:
            break
        outs.append(y)
        args += [*found[1], *map(_flat, p), number // n, found[0], plan.how]
        tiles.append(-(-(number // n) // plan.config.rows))
        warps.append(plan.config.warps)
    if len(outs) < 2:
        return (norm(q, q_weight, q_bias, eps, offset, cast, dtype, kind),
                norm(k, k_weight, k_bias, eps, offset, cast, dtype, kind))  # fmt: skip
    _launch(kernels.forward_pair, (sum(tiles),), q, max(warps), tiles[0], *args)
    return outs[0], outs[1]


# -- backward ----------------------------------------------------------------------------------------------------------

Parameter = tuple[Tensor | None, bool]
"""A weight or bias, and whether its gradient is needed."""


class _Gradients:
    """The gradients of the parameters of one launch: partial sums, then their sums."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.partials: list[Tensor] = []
        self.outs: list[Tensor] = []

    def lines(self, programs: int, dtype: torch.dtype, *parameters: Parameter) -> list[Tensor | None]:
        """A buffer (programs, N) for each parameter whose gradient is needed."""
        wanted = [p for p, need in parameters if need and p is not None]
        new = iter(torch.empty((len(wanted), programs, self.x.shape[-1]), dtype=dtype, device=self.x.device))
        self.outs += [torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted]
        found = [next(new) if need and p is not None else None for p, need in parameters]
        self.partials += [p for p in found if p is not None]
        return found

    def sums(self, *parameters: Parameter) -> list[Tensor]:
        """The gradients, an empty tensor for each that is not needed."""
        if self.outs:
            lines, sizes = zip(*(p.shape for p in self.partials), strict=True)
            height = min(1 << (max(lines) - 1).bit_length(), 256)
            width = max(16, 1024 // height)
            _launch(kernels_backward.sum_partials, (-(-max(sizes) // width), len(lines)), self.x, 8,
                    tuple(self.partials), tuple(self.outs), lines, sizes, height, width)  # fmt: skip
        outs = iter(self.outs)
        return [next(outs) if need and p is not None else self.x.new_empty(0) for p, need in parameters]


def _backward_plan(x: Tensor, others: Sequence[Tensor | None], eps: float, offset: float, kind: str, needed: int,
                   ) -> Plan | None:  # fmt: skip
    """The plan of a backward with so many gradients of parameters."""
    n, number = x.shape[-1], x.numel()
    plan = _plan_backward(x.dtype, tuple(map(_dtype, others)), n, eps, offset, kind, 2 + needed)
    return plan if 0 < number < MOST_ROWS * n else None


def _programs(x: Tensor, tile: Config, needed: int) -> int:
    """The programs of a backward: one for each tile, or as many as have lines in the partials."""
    tiles = -(-(x.numel() // x.shape[-1]) // tile.rows)
    return min(tiles, tile.programs) if needed else tiles


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a GPU."""
    if device.type != "cuda":
        return 0
    found: Any = torch.cuda.get_device_properties(device)
    return int(found.shared_memory_per_block_optin)


def _stages(x: Tensor, tile: Config, loads: int) -> int:
    """As many tiles of so many loads as there is room for beside the reductions' own; it changes no result."""
    room = _shared_memory(x.device) - 8192
    return max(1, min(tile.stages, room // (tile.rows * tile.block * x.itemsize * loads)))


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, ds: Tensor | None, eps: float,
                  offset: float, kind: str, need_weight: bool, need_bias: bool) -> Grads:  # fmt: skip
    """`meaning.norm_backward`."""
    parameters = (weight, need_weight and weight is not None), (bias, need_bias and bias is not None)
    needed = parameters[0][1] + parameters[1][1]
    plan = _backward_plan(x, (dy, ds, weight, bias), eps, offset, kind, needed)
    if plan is None:
        return meaning.norm_backward(dy, x, weight, bias, ds, eps, offset, kind, need_weight, need_bias)
    x, dy, ds = _rows(x), _rows(dy), None if ds is None else _rows(ds)
    dx = torch.empty_like(x)
    found = _views(dy, ds, x, dx)
    if found is None:
        ds = None if ds is None else ds.contiguous()
        return norm_backward(dy.contiguous(), x.contiguous(), weight, bias, ds, eps, offset, kind, need_weight,
                             need_bias)  # fmt: skip
    (sizes, views), tile, flat, gradients = found, plan.config, _flat(weight), _Gradients(x)
    if tile.block < x.shape[-1]:
        _backward_long(gradients, plan, sizes, views, flat, parameters, needed)
    else:
        programs = _programs(x, tile, needed)
        lines = gradients.lines(programs, plan.s, *parameters)
        _launch(kernels_backward.backward, (programs,), x, tile.warps, *views, flat, *lines, None, None, None, None,
                None, x.numel() // x.shape[-1], sizes, plan.how,
                _stages(x, tile, 2 + (ds is not None)))  # fmt: skip
    dw, db = gradients.sums(*parameters)
    return dx, dw, db


def _backward_long(gradients: _Gradients, plan: Plan, sizes: tuple[int, ...], views: list[Any], weight: Tensor | None,
                   parameters: tuple[Parameter, ...], needed: int) -> None:  # fmt: skip
    """dx and the partials of rows that do not fit on chip: the partials read x and dy once more, by column blocks."""
    x = gradients.x
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty((rows, 2), dtype=plan.s) if needed else None
    _launch(kernels_backward.backward_long, (rows,), x, plan.config.warps, *views, weight, statistics, sizes, plan.how)
    if needed:
        how = replace(plan.how, rows=8, block=256)
        blocks = -(-x.shape[-1] // how.block)
        programs = min(-(-rows // how.rows), max(1056 // blocks, 1))
        lines = gradients.lines(programs, plan.s, *parameters)
        _launch(kernels_backward.partials_long, (blocks, programs), x, 4, views[0], views[2], statistics, *lines, rows,
                sizes, how)  # fmt: skip


def norm_add_norm_backward(dy: Tensor, ds: Tensor, x: Tensor, s: Tensor, weight1: Tensor | None, bias1: Tensor | None,
                           weight2: Tensor | None, bias2: Tensor | None, eps: float, offset: float, kind: str,
                           need: list[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    """`meaning.norm_add_norm_backward`; two kernels where a row does not fit on chip."""
    parameters = tuple(zip((weight1, bias1, weight2, bias2), need, strict=True))
    needed = sum(flag and p is not None for p, flag in parameters)
    plan = _backward_plan(x, (dy, ds, s, weight1, weight2, bias1, bias2), eps, offset, kind, needed)
    found = None
    if plan is not None and plan.config.block >= x.shape[-1] and compute_type(s.dtype) == compute_type(x.dtype):
        read = [_rows(t) for t in (dy, ds, s, x)]
        dr, dx = torch.empty_like(read[2]), torch.empty_like(read[3])
        found = _views(*read[:3], dr, read[3], dx)
    if plan is None or found is None:
        dr, dw2, db2 = norm_backward(dy, s, weight2, bias2, ds, eps, offset, kind, need[2], need[3])
        dx, dw1, db1 = norm_backward(dr, x, weight1, bias1, None, eps, offset, kind, need[0], need[1])
        return dx, dr, dw1, db1, dw2, db2
    sizes, views = found
    programs, gradients = _programs(x, plan.config, needed), _Gradients(x)
    lines = gradients.lines(programs, plan.s, *parameters)
    _launch(kernels_backward.backward, (programs,), x, plan.config.warps, *views[:4], _flat(weight2), *lines[2:],
            *views[4:], _flat(weight1), *lines[:2], x.numel() // x.shape[-1], sizes, plan.how,
            _stages(x, plan.config, 4))  # fmt: skip
    return dx, dr, *gradients.sums(*parameters)


def qk_norm_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, q_bias: Tensor | None,
                     k_weight: Tensor | None, k_bias: Tensor | None, eps: float, offset: float, kind: str,
                     need: list[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    """`meaning.qk_norm_backward`; two kernels where a row does not fit on chip."""
    parameters = tuple(zip((q_weight, q_bias, k_weight, k_bias), need, strict=True))
    outs, args, programs, warps, gradients = [], [], [], [], []
    for dy, x, own in ((dq, q, parameters[:2]), (dk, k, parameters[2:])):
        needed = sum(flag and p is not None for p, flag in own)
        plan = _backward_plan(x, (dy, own[0][0], own[1][0]), eps, offset, kind, needed)
        if plan is None or plan.config.block < x.shape[-1]:
            break
        dy, x = _rows(dy), _rows(x)
        dx = torch.empty_like(x)
        found = _views(dy, x, dx)
        if found is None:
            break
        gradients.append(_Gradients(x))
        programs.append(_programs(x, plan.config, needed))
        outs.append(dx)
        lines = gradients[-1].lines(programs[-1], plan.s, *own)
        args += [*found[1], _flat(own[0][0]), *lines, x.numel() // x.shape[-1], found[0], plan.how,
                 _stages(x, plan.config, 2)]  # fmt: skip
        warps.append(plan.config.warps)
    if len(outs) < 2:
        a, dwq, dbq = norm_backward(dq, q, q_weight, q_bias, None, eps, offset, kind, need[0], need[1])
        b, dwk, dbk = norm_backward(dk, k, k_weight, k_bias, None, eps, offset, kind, need[2], need[3])
        return a, b, dwq, dbq, dwk, dbk
    _launch(kernels_backward.backward_pair, (sum(programs),), q, max(warps), programs[0], *args)
    gradients[0].partials += gradients[1].partials
    gradients[0].outs += gradients[1].outs
    return (*outs, *gradients[0].sums(*parameters))
