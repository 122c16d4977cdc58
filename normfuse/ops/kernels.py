# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The forward operators of `normfuse.ops.meaning` in Triton.

A program takes a tile of ROWS rows by BLOCK columns, reads it once and keeps it on chip; only rows that do not fit
(`forward_long`) are read twice. A tensor comes as its *view*: ``(pointer, stride, ...)``, the strides of one to three
leading axes whose `sizes` all tensors of a launch share, the first of them put as 1; the last axis has stride 1. There
are m rows, and no kernel is compiled anew for another m. n and eps are constants of `How` or, in kernels compiled ahead
of time (`kernels_aot`), arguments. C is the type of the arithmetic, float32 or float64; every rounding to another type
is written out with `rounded` or `round_to`, because the order of roundings is the meaning of an operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))


@dataclass(frozen=True)
class How:
    """What a kernel is compiled for; triton types are `Any`. `optional`: a weight or bias may be a null pointer."""

    n: int
    rows: int
    block: int
    eps: float
    offset: float
    layer: bool
    c: Any
    what: str = "norm"
    first: bool = False
    round_sum: bool = True
    narrow: Any = None
    applied: Any = None
    result: Any = None
    applied2: Any = None
    optional: bool = False


# -- numbers -----------------------------------------------------------------------------------------------------------


@triton.jit
def round_to(v, target: tl.constexpr):
    """v in another type, to the nearest, ties to even; float64 goes to a half type by way of float32, as in torch."""
    if v.dtype == tl.float64 and target.primitive_bitwidth == 16:
        v = v.to(tl.float32)
    if INTERPRET and target == tl.bfloat16:  # the interpreter would truncate
        bits = v.to(tl.uint32, bitcast=True)
        bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        v = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return v.to(target)


@triton.jit
def widen(v, c: tl.constexpr):
    """v in C, exactly."""
    if INTERPRET and v.dtype == tl.bfloat16:  # the interpreter loses subnormal numbers
        v = (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return v.to(c)


@triton.jit
def rounded(v, target: tl.constexpr):
    """v rounded to a type, and back in its own."""
    if target.primitive_bitwidth < v.dtype.primitive_bitwidth:
        v = widen(round_to(v, target), v.dtype)
    return v


@triton.jit
def mean(v, n):
    """The mean of N columns, (ROWS, 1); what lies beyond them is 0."""
    total = tl.sum(v, 1, keep_dims=True)
    if v.dtype == tl.float64:
        out = total / n
    else:
        out = tl.div_rn(total, n * 1.0)  # `/` is div.full, 2 ulp
    return out


@triton.jit
def inverse_root(v):
    """v^-1/2: on a GPU rsqrt.approx, 2 ulp, as in torch's CUDA kernels; torch on the CPU divides 1 by the root."""
    return tl.rsqrt(v)


# -- memory ------------------------------------------------------------------------------------------------------------


@triton.jit
def at(view, row, sizes):
    """Pointers to the rows of a view; int64, because a tensor may have more than 2^31 elements."""
    pointer = view[0]
    for axis in tl.static_range(len(sizes) - 1, 0, -1):
        pointer += (row % sizes[axis]).to(tl.int64) * view[axis + 1]
        row = row // sizes[axis]
    return pointer + row.to(tl.int64) * view[1]


@triton.jit
def read(view, row, sizes, cols, inside, c: tl.constexpr):
    """A tile in C, 0 outside."""
    return widen(tl.load(at(view, row, sizes) + cols, mask=inside, other=0.0), c)


@triton.jit
def write(view, row, sizes, cols, inside, v):
    """Store a tile, rounded to the type of the view."""
    tl.store(at(view, row, sizes) + cols, round_to(v, view[0].dtype.element_ty), mask=inside)


@triton.jit
def parameter(p, cols, n, added: tl.constexpr, how: tl.constexpr):
    """A weight or, to be added, a bias in C, (1, BLOCK); what changes nothing where it is a null pointer."""
    if how.optional:
        there = tl.where(p.to(tl.int64, bitcast=True) != 0, n, 0)
        value = tl.load(p + cols, mask=cols < there, other=minus_zero(p) if added else 1.0)
    else:
        value = tl.load(p + cols, mask=cols < n, other=0.0)
    return widen(value, how.c)


@triton.jit
def minus_zero(p):
    """-0.0 of the type that p points to: added even to itself it changes nothing. Triton takes the literal for 0.0."""
    if p.dtype.element_ty.primitive_bitwidth == 16:
        bits = tl.full([1, 1], -0x8000, tl.int16)
    else:
        bits = tl.full([1, 1], -0x80000000, tl.int32)
    return bits.to(p.dtype.element_ty, bitcast=True)


@triton.jit
def rows_of(tile, m, cols, n, how: tl.constexpr):
    """The rows of a tile, (ROWS, 1), and which of its elements there are."""
    row = tile * how.rows + tl.arange(0, how.rows)[:, None]
    inside = cols < n
    if how.rows > 1:
        inside = inside & (row < m)
    return row, inside


# -- the norm ----------------------------------------------------------------------------------------------------------


@triton.jit
def summand(x, r, x_bias, row, sizes, cols, inside, n, how: tl.constexpr):
    """What a norm reads: x or, with a residual, their sum, to x first a bias; in C."""
    h = read(x, row, sizes, cols, inside, how.c)
    if r is not None:
        if x_bias is not None:
            h += parameter(x_bias, cols, n, True, how)
            if how.round_sum:
                h = rounded(h, how.narrow)
        h += read(r, row, sizes, cols, inside, how.c)
        if how.round_sum:
            h = rounded(h, how.narrow)
    return h


@triton.jit
def centred(h, cols, n, how: tl.constexpr):
    """x - mean(x) of a layer norm, in two passes over a tile on chip: E[x^2] - E[x]^2 would cancel."""
    if how.layer:
        h = tl.where(cols < n, h - mean(h, n), 0.0)
    return h


@triton.jit
def normalised(h, cols, n, eps, how: tl.constexpr):
    """h normalised, and the inverse root that it was multiplied with."""
    h = centred(h, cols, n, how)
    rstd = inverse_root(mean(h * h, n) + eps)
    return h * rstd, rstd


@triton.jit
def affine(h, w, b, cols, n, narrow: tl.constexpr, applied: tl.constexpr, how: tl.constexpr):
    """h * (offset + weight) + bias, each step rounded to applied."""
    if how.first:
        h = rounded(h, narrow)
    if w is not None:
        scale = parameter(w, cols, n, False, how)
        if how.offset != 0.0:
            scale = rounded(scale + how.offset, applied)
        h = rounded(h * scale, applied)
    if b is not None:
        h = rounded(h + parameter(b, cols, n, True, how), applied)
    return h


@triton.jit
def forward_tile(tile, x, r, y, s, w, b, w2, b2, m, n, eps, sizes, how: tl.constexpr):
    """One tile of `norm`, `add_norm`, `norm_add` or `norm_add_norm`, by `how.what`; w2 of an `add_norm` is x's bias."""
    cols = tl.arange(0, how.block)[None, :]
    row, inside = rows_of(tile, m, cols, n, how)
    if how.what == "add_norm":
        h = summand(x, r, w2, row, sizes, cols, inside, n, how)
        write(s, row, sizes, cols, inside, h)
    else:
        h = summand(x, None, None, row, sizes, cols, inside, n, how)
    h, _ = normalised(h, cols, n, eps, how)
    h = affine(h, w, b, cols, n, how.narrow, how.applied, how)
    if how.what == "norm_add" or how.what == "norm_add_norm":
        h = rounded(h, how.result) + read(r, row, sizes, cols, inside, how.c)
    if how.what == "norm_add_norm":
        write(s, row, sizes, cols, inside, h)
        h, _ = normalised(rounded(h, s[0].dtype.element_ty), cols, n, eps, how)
        h = affine(h, w2, b2, cols, n, s[0].dtype.element_ty, how.applied2, how)
    write(y, row, sizes, cols, inside, h)


@triton.jit(do_not_specialize=["m"])
def forward(x, r, y, s, w, b, w2, b2, m, sizes, how: tl.constexpr):
    """Grid (tiles,): every program one tile."""
    forward_tile(tl.program_id(0), x, r, y, s, w, b, w2, b2, m, how.n, how.eps, sizes, how)


@triton.jit(do_not_specialize=["tiles", "m", "m2"])
def forward_pair(tiles, x, y, w, b, m, sizes, how: tl.constexpr, x2, y2, w2, b2, m2, sizes2, how2: tl.constexpr):
    """`qk_norm`: the first `tiles` programs are q's, the others k's."""
    tile = tl.program_id(0)
    if tile < tiles:
        forward_tile(tile, x, None, y, None, w, b, None, None, m, how.n, how.eps, sizes, how)
    else:
        forward_tile(tile - tiles, x2, None, y2, None, w2, b2, None, None, m2, how2.n, how2.eps, sizes2, how2)


# -- rows too long for a program's registers ---------------------------------------------------------------------------


@triton.jit
def long_statistics(x, r, x_bias, row, n, eps, sizes, how: tl.constexpr):
    """The mean (0 for an RMS norm) and the inverse root of a row, (1, 1) each, read once in blocks.

    Every column of a block has a mean and a sum of squares about it of its own, by Welford; Chan's formula joins them.
    """
    lane = tl.arange(0, how.block)[None, :]
    centre = tl.full([1, how.block], 0.0, how.c)
    squares = tl.full([1, how.block], 0.0, how.c)
    blocks = tl.full([1, 1], 0.0, how.c)
    for start in range(0, n, how.block):
        inside = start + lane < n
        h = summand(x, r, x_bias, row, sizes, start + lane, inside, n, how)
        if how.layer:
            blocks += 1.0
            delta = tl.where(inside, h - centre, 0.0)
            centre += delta * (1.0 / blocks)
            squares += delta * tl.where(inside, h - centre, 0.0)
        else:
            squares += h * h
    if how.layer:
        last = (n - 1) % how.block  # the last column of the last block
        seen = tl.where(lane <= last, blocks, blocks - 1.0)
        middle = mean(centre * seen, n)
        squares += seen * (centre - middle) * (centre - middle)
    else:
        middle = blocks
    return middle, inverse_root(mean(squares, n) + eps)


@triton.jit
def forward_row(x, r, y, s, w, b, x_bias, n, eps, sizes, how: tl.constexpr):
    """`norm`, `add_norm` or `norm_add` of one row, in blocks."""
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    added = r if how.what == "add_norm" else None
    middle, rstd = long_statistics(x, added, x_bias, row, n, eps, sizes, how)
    for start in range(0, n, how.block):
        cols = start + tl.arange(0, how.block)[None, :]
        inside = cols < n
        h = summand(x, added, x_bias, row, sizes, cols, inside, n, how)
        if s is not None:
            write(s, row, sizes, cols, inside, h)
        if how.layer:
            h -= middle
        h = affine(h * rstd, w, b, cols, n, how.narrow, how.applied, how)
        if how.what == "norm_add":
            h = rounded(h, how.result) + read(r, row, sizes, cols, inside, how.c)
        write(y, row, sizes, cols, inside, h)


@triton.jit
def forward_long(x, r, y, s, w, b, sizes, how: tl.constexpr):
    """Grid (M,): every program one row."""
    forward_row(x, r, y, s, w, b, None, how.n, how.eps, sizes, how)
