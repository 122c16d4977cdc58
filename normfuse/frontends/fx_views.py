"""Rows of the operator table for matrix products and for views."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.frontends.fx_call import Call, axes_of, shape_of_pair
from normfuse.frontends.fx_effects import name_of
from normfuse.frontends.fx_meta import is_tensor, meta_of, shape_of
from normfuse.graph import Value

# -- products ------------------------------------------------------------------------------------------------------


def product(call: Call, a: Value, b: Value, kind: str = "matmul", out: Value | None = None) -> bool:
    """A matrix product; one with a parameter is a linear layer."""
    plain = any(v.fixed and v.number is None for v in (a, b))
    uniform = any(v.number is not None for v in (a, b))
    return call.emit("linear" if plain else "matmul" if uniform else kind, [a, b], out)


def matmul(call: Call) -> bool:
    return product(call, call.tensor(), call.tensor(1, "other", "mat2"))


def mm(call: Call) -> bool:
    return product(call, call.tensor(), call.tensor(1, "mat2"), "linear")


def linear(call: Call) -> bool:
    x, w, b = call.tensor(), call.tensor(1, "weight"), call.value(2, "bias")
    if w.number is None or len(w.shape or ()) != 2:
        call.low.role(call.node, "linear")
        return True
    turned = call.low.number(w.number, w.dtype, tuple(reversed(w.shape or ())))
    if b is None:
        return product(call, x, turned)
    total = call.low.virtual(shape_of(meta_of(call.node)), x.dtype)
    product(call, x, turned, out=total)
    return call.emit("add", [total, b])


def dotted(call: Call, x: Value, y: Value, axes: tuple[int, ...], keep: bool = False) -> bool:
    """sum(x * y) over axes."""
    shape = shape_of_pair(x, y)
    if shape is None:
        return False
    squares = call.low.virtual(shape, x.dtype)
    call.emit("mul", [x, y], squares)
    return call.emit("sum", [squares], axes=axes, keepdims=keep)


def vecdot(call: Call) -> bool:
    x, y = call.tensor(0, "x"), call.tensor(1, "y")
    return len(x.shape or ()) == len(y.shape or ()) and dotted(
        call, x, y, axes_of(call.get(2, "dim", default=-1), len(x.shape or ()))
    )


def einsum(call: Call) -> bool:
    """Products along like letters, summed over those that are gone: ``...d,...d->...``, ``bsd,d->bsd``."""
    equation, rest = call.get(0, "equation"), list(call.node.args[1:])
    if rest and isinstance(rest[0], (tuple, list)):
        rest = list(rest[0])
    operands = [v for v in (call.low.operand(n) for n in rest) if v is not None and v.shape is not None]
    left, arrow, result = str(equation).replace(" ", "").partition("->")
    terms = [t.replace("...", "^") for t in left.split(",")]
    result = result.replace("...", "^")
    first = terms[0]
    if (
        arrow and len(operands) == len(rest) == len(terms) <= 2 and "^" not in first[1:]
        and len(set(first)) == len(first) and first.endswith(terms[-1])
        and (terms[-1] == first or "^" not in terms[-1])
        and len(operands[-1].shape or ()) <= len(operands[0].shape or ())
        and [c for c in first if c in result] == list(result) and ("^" in result or "^" not in first)
    ):  # fmt: skip
        x, y, rank = operands[0], operands[-1], len(operands[0].shape or ())
        gone = tuple(rank - len(first) + i for i, c in enumerate(first) if c not in result)
        if len(terms) == 1:
            return call.emit("sum", [x], axes=gone, keepdims=False) if gone else same(call, x)
        return dotted(call, x, y, gone) if gone else call.emit("mul", [x, y])
    fixed = any(v.fixed for v in operands)
    call.low.role(call.node, "linear" if fixed else "attention" if len(operands) == 2 else "opaque")
    return True


def same(call: Call, x: Value) -> bool:
    """x again."""
    return call.emit("identity", [x])


# -- views ---------------------------------------------------------------------------------------------------------


def reshape(call: Call) -> bool:
    given = (*call.node.args, *call.node.kwargs.values())
    if any(isinstance(a, torch.dtype) for a in given):  # view(dtype) reads the bits anew
        return False
    return call.emit("reshape", [call.tensor()])


def unsqueeze(call: Call) -> bool:
    x, dim = call.tensor(), call.get(1, "dim")
    return isinstance(dim, int) and call.emit("unsqueeze", [x], axes=(dim % (len(x.shape or ()) + 1),))


def squeeze(call: Call) -> bool:
    x = call.tensor()
    axes = axes_of(call.get(1, "dim"), len(x.shape or ()))
    gone = tuple(a for a in axes if (x.shape or ())[a] == 1)
    return call.emit("squeeze", [x], axes=gone) if gone else same(call, x)


def expand(call: Call) -> bool:
    x = call.tensor()
    return same(call, x) if shape_of(meta_of(call.node)) == x.shape else call.emit("expand", [x])


def repeat(call: Call) -> bool:
    """repeat, tile, repeat_interleave: of an axis of one element they make what `expand` does."""
    x, shape = call.tensor(), shape_of(meta_of(call.node))
    counted = any(is_tensor(meta_of(n)) for n in call.node.all_input_nodes[1:])  # by a tensor: each another time
    if x.shape is None or shape is None or len(shape) < len(x.shape) or counted:
        return False
    ahead = len(shape) - len(x.shape)
    return all(d in (1, n) for d, n in zip(x.shape, shape[ahead:], strict=True)) and expand(call)


def permute(call: Call) -> bool:
    x = call.tensor()
    given = call.get(1, "dims")
    listed = list(given) if isinstance(given, (tuple, list)) else list(call.node.args[1:])
    rank = len(x.shape or ())
    dims = [d for d in listed if isinstance(d, int)]
    if len(dims) != rank or len(listed) != rank:
        return False
    return call.emit("transpose", [x], perm=tuple(d % rank for d in dims))


def transpose(call: Call) -> bool:
    x = call.tensor()
    rank = len(x.shape or ())
    a, b = call.get(1, "dim0", "axis0", default=0), call.get(2, "dim1", "axis1", default=1)
    if rank < 2 or not (isinstance(a, int) and isinstance(b, int)):
        return rank < 2 and same(call, x)
    perm = list(range(rank))
    perm[a % rank], perm[b % rank] = b % rank, a % rank
    return call.emit("transpose", [x], perm=tuple(perm))


def moved(call: Call) -> bool:
    """Axes go to other places; the rest stays in order."""
    x = call.tensor()
    rank = len(x.shape or ())
    source, to = (call.get(i, name) for i, name in ((1, "source"), (2, "destination")))
    pairs = list(zip(*([v] if isinstance(v, int) else list(v) for v in (source, to)), strict=True))
    places = {b % rank: a % rank for a, b in pairs} if rank else {}
    rest = iter([a for a in range(rank) if a not in places.values()])
    perm = tuple(places[i] if i in places else next(rest) for i in range(rank))
    return call.emit("transpose", [x], perm=perm) if rank > 1 else same(call, x)


def turned(call: Call) -> bool:
    """x.T reverses all axes, x.mT the last two; of real tensors x.H and x.mH are the same."""
    x = call.tensor()
    rank = len(x.shape or ())
    last = not {name_of(call.node), call.get(1, "name")}.isdisjoint(("mT", "mH", "adjoint"))
    perm = (*range(rank - 2), rank - 1, rank - 2) if last else tuple(reversed(range(rank)))
    return call.emit("transpose", [x], perm=perm) if rank > 1 else same(call, x)


def attribute(call: Call) -> bool:
    """getattr(x, "T")."""
    return call.get(1, "name") in ("T", "H", "mT", "mH") and turned(call)


def getitem(call: Call) -> bool:
    source, index = call.node.args[0], call.node.args[1]
    assert isinstance(source, fx.Node)
    slot = call.low.values.get(source)
    if isinstance(slot, tuple):
        value = slot[index] if isinstance(index, int) and -len(slot) <= index < len(slot) else None
        if value is None:
            return False
        if value.native is None:
            value.native, value.name = call.node, call.node.name
        call.low.values[call.node] = value
        return True
    x = call.tensor()
    items = list(index) if isinstance(index, tuple) else [index]
    full = slice(None)
    if any(isinstance(i, fx.Node) or not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in items):
        call.low.role(call.node, "gather")
        return True
    if any(isinstance(i, int) or (isinstance(i, slice) and i != full) for i in items):
        call.low.role(call.node, "slice")
        return True
    taken = sum(i == full for i in items)
    axes, at = [], 0
    for i in items:
        if i is None:
            axes.append(at)
        at += len(x.shape or ()) - taken if i is Ellipsis else 1
    return call.emit("unsqueeze", [x], axes=tuple(axes)) if axes else same(call, x)


def slice_(call: Call) -> bool:
    x = call.tensor()
    step = call.get(4, "step", default=1)
    if step == 1 and shape_of(meta_of(call.node)) == x.shape:
        return same(call, x)
    call.low.role(call.node, "slice")
    return True
