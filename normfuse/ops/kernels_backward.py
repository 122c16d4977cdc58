# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The backward operators of `normfuse.ops.meaning` in Triton; see `kernels` for tiles and views.

The gradient of a weight or bias is a sum over all rows, made in two stages without atomics, so that its bits are the
same on every run: each of P programs sums the rows p*ROWS + i, (p+P)*ROWS + i, ... into one line of a (P, N) buffer of
*partials*, and `sum_partials` adds the lines. A partial that nobody needs is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normfuse.ops.kernels import (at, inverse_root, long_statistics, mean, normalised, read, round_to,
                                  rounded, rows_of, widen, write)  # fmt: skip


@triton.jit
def scaled(d, w, cols, how: tl.constexpr):
    """g = dy * (offset + weight)."""
    if w is not None:
        if how.rows == 1:  # the pointer: L1 has the weight, while registers are short
            w = tl.load(w + cols, mask=cols < how.n, other=0.0)
        scale = widen(w, how.c)
        if how.offset != 0.0:
            scale += how.offset
        d = d * scale
    return d


@triton.jit
def gradient(h, d, w, cols, how: tl.constexpr):
    """(dx, n) of a tile of rows h, where d is the gradient of their norm."""
    n, rstd = normalised(h, cols, how.n, how.eps, how)
    g = scaled(d, w, cols, how)
    dx = g - n * mean(g * n, how.n)
    if how.layer:
        dx = tl.where(cols < how.n, dx - mean(g, how.n), 0.0)
    return rstd * dx, n


@triton.jit
def store_partial(partial, line, cols, total, how: tl.constexpr):
    """The sum of a tile's rows as one line of the partials."""
    tl.store(partial + line * how.n + cols, tl.sum(total, 0, keep_dims=True), mask=cols < how.n)


@triton.jit
def backward_tiles(program, programs, dy, ds, x, dx, w, dw, db, x1, dx1, w1, dw1, db1, m, sizes, how: tl.constexpr,
                   stages: tl.constexpr):  # fmt: skip
    """`norm_backward` and, with x1, `norm_add_norm_backward`: there x is the sum that the second norm reads."""
    cols = tl.arange(0, how.block)[None, :]
    if w is not None and how.rows > 1:  # a row's weight is brought to the layout of many rows once
        w = tl.load(w + cols, mask=cols < how.n, other=0.0)
    if w1 is not None and how.rows > 1:
        w1 = tl.load(w1 + cols, mask=cols < how.n, other=0.0)
    sum_w = tl.full([how.rows, how.block], 0.0, how.c)
    sum_b = tl.full([how.rows, how.block], 0.0, how.c)
    sum_w1 = tl.full([how.rows, how.block], 0.0, how.c)
    sum_b1 = tl.full([how.rows, how.block], 0.0, how.c)
    for tile in tl.range(program, tl.cdiv(m, how.rows), programs, num_stages=stages):
        row, inside = rows_of(tile, m, cols, how.n, how)
        # all that is read is asked for before the first reduction waits
        d = tl.load(at(dy, row, sizes) + cols, mask=inside, other=0.0)
        h = tl.load(at(x, row, sizes) + cols, mask=inside, other=0.0)
        if ds is not None:
            add = tl.load(at(ds, row, sizes) + cols, mask=inside, other=0.0)
        if x1 is not None:
            h1 = tl.load(at(x1, row, sizes) + cols, mask=inside, other=0.0)
        d = widen(d, how.c)
        out, n = gradient(widen(h, how.c), d, w, cols, how)
        if dw is not None:
            sum_w += d * n
        if db is not None:
            sum_b += d
        if ds is not None:
            out += widen(add, how.c)
        write(dx, row, sizes, cols, inside, out)
        if x1 is not None:
            d = rounded(out, dx[0].dtype.element_ty)
            out, n = gradient(widen(h1, how.c), d, w1, cols, how)
            if dw1 is not None:
                sum_w1 += d * n
            if db1 is not None:
                sum_b1 += d
            write(dx1, row, sizes, cols, inside, out)
    if dw is not None:
        store_partial(dw, program, cols, sum_w, how)
    if db is not None:
        store_partial(db, program, cols, sum_b, how)
    if dw1 is not None:
        store_partial(dw1, program, cols, sum_w1, how)
    if db1 is not None:
        store_partial(db1, program, cols, sum_b1, how)


@triton.jit(do_not_specialize=["m"])
def backward(dy, ds, x, dx, w, dw, db, x1, dx1, w1, dw1, db1, m, sizes, how: tl.constexpr, stages: tl.constexpr):
    """Grid (P,)."""
    backward_tiles(tl.program_id(0), tl.num_programs(0), dy, ds, x, dx, w, dw, db, x1, dx1, w1, dw1, db1, m, sizes, how,
                   stages)  # fmt: skip


@triton.jit(do_not_specialize=["programs", "m", "m2"])
def backward_pair(programs, dy, x, dx, w, dw, db, m, sizes, how: tl.constexpr, stages: tl.constexpr,
                  dy2, x2, dx2, w2, dw2, db2, m2, sizes2, how2: tl.constexpr, stages2: tl.constexpr):  # fmt: skip
    """`qk_norm_backward`: the first `programs` programs are q's, the others k's."""
    program = tl.program_id(0)
    if program < programs:
        backward_tiles(program, programs, dy, None, x, dx, w, dw, db, None, None, None, None, None, m, sizes, how,
                       stages)  # fmt: skip
    else:
        backward_tiles(program - programs, tl.num_programs(0) - programs, dy2, None, x2, dx2, w2, dw2, db2,
                       None, None, None, None, None, m2, sizes2, how2, stages2)  # fmt: skip


@triton.jit
def backward_long(dy, ds, x, dx, w, statistics, sizes, how: tl.constexpr):
    """Grid (M,): dx of one row in blocks; `statistics` (M, 2), or None, gets its mean and inverse root."""
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    lane = tl.arange(0, how.block)[None, :]
    middle, rstd = tl.full([1, 1], 0.0, how.c), tl.full([1, 1], 1.0, how.c)
    if how.layer:
        middle, rstd = long_statistics(x, None, None, row, how.n, how.eps, sizes, how)
    squares = tl.full([1, how.block], 0.0, how.c)
    along = tl.full([1, how.block], 0.0, how.c)
    total = tl.full([1, how.block], 0.0, how.c)
    for start in range(0, how.n, how.block):
        cols = start + lane
        inside = cols < how.n
        g = scaled(read(dy, row, sizes, cols, inside, how.c), w, cols, how)
        n = (read(x, row, sizes, cols, inside, how.c) - middle) * rstd
        squares += n * n
        along += g * n
        total += g
    if not how.layer:  # n was x so far: an RMS norm needs no pass before this one
        rstd = inverse_root(mean(squares, how.n) + how.eps)
        along *= rstd
    if statistics is not None:
        tl.store(statistics + 2 * row.to(tl.int64), middle)
        tl.store(statistics + 2 * row.to(tl.int64) + 1, rstd)
    along = mean(along, how.n)
    total = mean(total, how.n)
    for start in range(0, how.n, how.block):
        cols = start + lane
        inside = cols < how.n
        g = scaled(read(dy, row, sizes, cols, inside, how.c), w, cols, how)
        n = (read(x, row, sizes, cols, inside, how.c) - middle) * rstd
        out = g - n * along
        if how.layer:
            out -= total
        out = rstd * out
        if ds is not None:
            out += read(ds, row, sizes, cols, inside, how.c)
        write(dx, row, sizes, cols, inside, out)


@triton.jit(do_not_specialize=["m"])
def partials_long(dy, x, statistics, dw, db, m, sizes, how: tl.constexpr):
    """Grid (column blocks, P): a block of columns of the partials of one program, `backward_long` having been there."""
    cols = tl.program_id(0) * how.block + tl.arange(0, how.block)[None, :]
    sum_w = tl.full([how.rows, how.block], 0.0, how.c)
    sum_b = tl.full([how.rows, how.block], 0.0, how.c)
    for tile in range(tl.program_id(1), tl.cdiv(m, how.rows), tl.num_programs(1)):
        row, inside = rows_of(tile, m, cols, how.n, how)
        d = read(dy, row, sizes, cols, inside, how.c)
        sum_b += d
        if dw is not None:
            line = tile * how.rows + tl.arange(0, how.rows)  # one-dimensional, so that no lane loads it twice
            middle = tl.load(statistics + 2 * line.to(tl.int64), mask=line < m, other=0.0)[:, None]
            rstd = tl.load(statistics + 2 * line.to(tl.int64) + 1, mask=line < m, other=0.0)[:, None]
            sum_w += d * ((read(x, row, sizes, cols, inside, how.c) - middle) * rstd)
    if dw is not None:
        store_partial(dw, tl.program_id(1), cols, sum_w, how)
    if db is not None:
        store_partial(db, tl.program_id(1), cols, sum_b, how)


@triton.jit
def sum_lines(partial, out, lines, n, height: tl.constexpr, width: tl.constexpr):
    """The sum of the lines of one (lines, n) buffer, for a block of columns."""
    cols = tl.program_id(0) * width + tl.arange(0, width)[None, :]
    total = tl.full([height, width], 0.0, partial.dtype.element_ty)
    for start in range(0, lines, height):
        line = start + tl.arange(0, height)[:, None]
        total += tl.load(partial + line * n + cols, mask=(line < lines) & (cols < n), other=0.0)
    tl.store(out + cols, round_to(tl.sum(total, 0, keep_dims=True), out.dtype.element_ty), mask=cols < n)


@triton.jit(do_not_specialize=["lines"])
def sum_partials(partials, outs, lines, sizes, height: tl.constexpr, width: tl.constexpr):
    """Grid (column blocks, parameters): every gradient of a backward, each with lines and a length of its own."""
    for i in tl.static_range(len(outs)):
        if tl.program_id(1) == i:
            sum_lines(partials[i], outs[i], lines[i], sizes[i], height, width)
