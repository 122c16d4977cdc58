# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Entries to `normfuse.ops.kernels` that are compiled ahead of time: n and eps are arguments, tensors are contiguous.

All entries take the same arguments, so that one caller serves them. A weight or bias that is not there is a null
pointer; so is every tensor that `how.what` has no use for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from normfuse.ops.kernels import forward_row, forward_tile


@triton.jit
def tile(x, r, y, s, w, b, w2, b2, x2, y2, m, n, m2, n2, tiles, eps, how: tl.constexpr):
    """Grid (tiles of x, and of x2): every program a tile.

    x2, y2, w2 and b2 are the key's of a `qk_norm`; w2 of an `add_norm` is a bias of x, of its type.
    """
    i = tl.program_id(0)
    if how.what == "norm":
        if i >= tiles:
            x, y, w, b, m, n, i = x2, y2, w2, b2, m2, n2, i - tiles
        forward_tile(i, (x, n), None, (y, n), None, w, b, None, None, m, n, eps, (1,), how)
    elif how.what == "norm_add":
        forward_tile(i, (x, n), (r, n), (y, n), None, w, b, None, None, m, n, eps, (1,), how)
    else:
        forward_tile(i, (x, n), (r, n), (y, n), (s, n), w, b, w2, b2, m, n, eps, (1,), how)


@triton.jit
def row(x, r, y, s, w, b, w2, b2, x2, y2, m, n, m2, n2, tiles, eps, how: tl.constexpr):
    """Grid (M,): every program a row, in blocks; there is no `norm_add_norm` and no second tensor. w2 as in `tile`."""
    if how.what == "norm":
        forward_row((x, n), None, (y, n), None, w, b, None, n, eps, (1,), how)
    elif how.what == "norm_add":
        forward_row((x, n), (r, n), (y, n), None, w, b, None, n, eps, (1,), how)
    else:
        forward_row((x, n), (r, n), (y, n), (s, n), w, b, w2, n, eps, (1,), how)
