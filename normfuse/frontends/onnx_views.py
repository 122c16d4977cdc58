"""Rows of ONNX operators that rearrange, spread or sum axes, and the shapes these give."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from normfuse.frontends.onnx_fold import attribute
from normfuse.graph import Dim, Shape, Value

if TYPE_CHECKING:
    from normfuse.frontends.onnx import Lowering

Row = Callable[["Lowering", ir.Node], None]


def product_shape(shapes: list[Shape | None]) -> Shape | None:
    """The shape of an elementwise result by ONNX's broadcasting, or None where an operand's is unknown."""
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes):
        return None
    out: list[Dim] = []
    for i in range(1, max((len(s) for s in known), default=0) + 1):
        dims = {s[-i] for s in known if len(s) >= i} - {1}
        sizes = [d for d in dims if isinstance(d, int)]  # the others must then be 1 or the same
        out.append(sizes[0] if sizes else 1 if not dims else dims.pop() if len(dims) == 1 else None)
    return tuple(reversed(out))


def reduced_shape(x: Value, axes: tuple[int, ...] | None, keepdims: bool) -> Shape | None:
    """The shape after a reduction."""
    if x.shape is None or axes is None:
        return None
    return tuple(1 if i in axes else d for i, d in enumerate(x.shape) if i not in axes or keepdims)


def einsum(low: Lowering, node: ir.Node) -> None:
    """Products and sums along axes that both operands have in the same order: ``...d,...d->...``, ``bsd,d->bsd``."""
    inputs = low.inputs(node)
    terms = _letters(str(attribute(node, "equation")), [v.rank for v in inputs])
    if terms is None or len(inputs) > 2:
        return low.opaque(node)
    *operands, result = terms
    full = max(operands, key=len)
    plain = all(len(set(t)) == len(t) and [c for c in full if c in t] == list(t) for t in (*operands, result))
    if not plain:
        fixed = any(v.fixed for v in inputs)
        return low.opaque(node, "linear" if fixed else "attention" if len(inputs) == 2 else "opaque")
    spread = [_insert(low, node, v, t, full) for v, t in zip(inputs, operands, strict=True)]
    summed = tuple(i for i, c in enumerate(full) if c not in result)
    shape = product_shape([v.shape for v in spread])
    dtype = inputs[0].dtype
    out_shape = None if shape is None else tuple(d for i, d in enumerate(shape) if i not in summed)
    out = low.output(node, out_shape, dtype)
    value = spread[0]
    if len(spread) == 2:
        value = low.virtual(shape, dtype) if summed else out
        low.emit("mul", spread, value, node)
    if summed:
        low.emit("sum", [value], out, node, axes=summed, keepdims=False)
    elif len(spread) == 1:
        low.emit("identity", [value], out, node)


def _letters(equation: str, ranks: list[int | None]) -> list[str] | None:
    """The terms of an equation with its ellipsis spelled out, the result last."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(ranks) or any(r is None for r in ranks):
        return None
    dots = max((r - len(t) + 3 for t, r in zip(terms, ranks, strict=True) if "..." in t and r is not None), default=0)
    names = "".join(chr(0x3B1 + i) for i in range(max(dots, 0)))
    out = []
    for term, rank in zip((*terms, result), (*ranks, None), strict=True):
        here = dots if rank is None else rank - len(term) + 3
        out.append(term.replace("...", names[len(names) - here :] if here > 0 else ""))
    return out if all(len(t) == r for t, r in zip(out, ranks, strict=False)) else None


def _insert(low: Lowering, node: ir.Node, value: Value, term: str, full: str) -> Value:
    """The operand with an axis of size 1 for each letter it lacks."""
    missing = tuple(i for i, c in enumerate(full) if c not in term)
    if missing == tuple(range(len(missing))) or value.shape is None:
        return value  # broadcasting adds axes in front by itself
    dims = iter(value.shape)
    shape = tuple(1 if i in missing else next(dims) for i in range(len(full)))
    out = low.virtual(shape, value.dtype)
    low.emit("unsqueeze", [value], out, node, axes=missing)
    return out


def reshape(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    shape: Shape | None = None
    target = low.known_sizes(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "shape")
    if target is not None and x.shape is not None:
        dims: list[Dim] = list(target)
        zero = not attribute(node, "allowzero", 0)
        dims = [x.shape[i] if d == 0 and zero and i < len(x.shape) else d for i, d in enumerate(dims)]
        shape = tuple(_fill_in(dims, x.shape))
    elif target is None and isinstance(rank := _length(low, node.inputs[1]), int):
        shape = (None,) * rank
    out = low.output(node, shape, x.dtype)
    if target is not None and out.shape is not None and len(out.shape) == len(target):
        pairs = zip(out.shape, target, strict=True)
        out.shape = tuple(low.unknown(out.name) if d is None and t == -1 else d for d, t in pairs)
    low.emit("reshape", [x], out, node)


def _length(low: Lowering, value: ir.Value | None) -> Dim:
    """How long a vector is."""
    found = None if value is None else low.value(value).shape
    return found[0] if found is not None and len(found) == 1 else None


def _fill_in(dims: list[Dim], source: Shape) -> list[Dim]:
    """Replace a -1 by the size that keeps the number of elements, where it can be told."""
    if -1 not in dims:
        return dims
    rest = list(source)
    others: list[Dim] = [d for d in dims if d != -1]
    for d in list(others):
        if d is not None and d in rest:
            rest.remove(d)
            others.remove(d)
    filled: Dim = None
    if len(rest) == 1 and not others:
        filled = rest[0]
    else:
        sizes, needed = [d for d in rest if isinstance(d, int)], [d for d in others if isinstance(d, int)]
        if len(sizes) == len(rest) and len(needed) == len(others):
            total = part = 1
            for d in sizes:
                total *= d
            for d in needed:
                part *= d
            filled = total // part if part else None
    return [filled if d == -1 else d for d in dims]


def flatten(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    axis = attribute(node, "axis", 1)
    shape: Shape | None = None
    if x.shape is not None and all(isinstance(d, int) for d in x.shape):
        front = back = 1
        for i, d in enumerate(x.shape):
            assert isinstance(d, int)
            if i < (axis % len(x.shape) if axis < 0 else axis):
                front *= d
            else:
                back *= d
        shape = (front, back)
    low.emit("reshape", [x], low.output(node, shape, x.dtype), node)


def view_axes(kind: str) -> Row:
    """Unsqueeze and Squeeze, axes as an attribute or as an input."""

    def row(low: Lowering, node: ir.Node) -> None:
        x = low.value(node.inputs[0])
        axes: Any = attribute(node, "axes")
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            array = low.array(node.inputs[1])
            axes = None if array is None or not array.size else [int(a) for a in array.reshape(-1)]
        elif axes is None and kind == "squeeze" and all(isinstance(d, int) for d in x.shape or (None,)):
            axes = [i for i, d in enumerate(x.shape or ()) if d == 1]
        if axes is None or x.shape is None:
            return low.emit("reshape", [x], low.output(node, None, x.dtype), node)
        rank = len(x.shape) + (len(axes) if kind == "unsqueeze" else 0)
        axes = tuple(sorted(a % rank for a in axes)) if rank else ()
        dims: list[Dim] = list(x.shape)
        if kind == "unsqueeze":
            for a in axes:
                dims.insert(a, 1)
        else:
            dims = [d for i, d in enumerate(dims) if i not in axes]
        low.emit(kind, [x], low.output(node, tuple(dims), x.dtype), node, axes=axes)

    return row


def expand(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    target = low.known_sizes(node.inputs[1])
    out = low.output(node, None if target is None else product_shape([x.shape, target]), x.dtype)
    low.emit("expand", [x], out, node)
    out.number = x.number


def cut(low: Lowering, node: ir.Node) -> None:
    """A Slice: of one whose ends only a run tells, the axes that it does not cut have their sizes."""
    x = low.value(node.inputs[0])
    given = [None if v is None else low.array(v) for v in node.inputs[1:]]
    if x.shape is None or len(given) < 2 or (given[0] is not None and given[1] is not None):
        return low.opaque(node, "slice")  # nothing is known, or all of it by `onnx`
    count = _length(low, node.inputs[1]) if len(given) < 3 or node.inputs[3] is None else 0
    axes = given[2].reshape(-1).tolist() if len(given) > 2 and given[2] is not None else (
        list(range(count)) if isinstance(count, int) and count else None)  # fmt: skip
    if axes is None:
        return low.opaque(node, "slice")
    dims = [None if {i, i - len(x.shape)} & {*axes} else d for i, d in enumerate(x.shape)]
    low.emit("slice", low.inputs(node), low.output(node, tuple(dims), x.dtype), node)


def tile(low: Lowering, node: ir.Node) -> None:
    """Of an axis of one element a Tile makes what an Expand does."""
    x, times = low.value(node.inputs[0]), None if node.inputs[1] is None else low.array(node.inputs[1])
    counts = [] if times is None else times.reshape(-1).tolist()
    sizes = [*zip(x.shape or (), counts, strict=False)]
    if not sizes or len(sizes) != x.rank or any(d != 1 != n for d, n in sizes):
        return low.opaque(node)
    out = low.output(node, tuple(n if d == 1 else d for d, n in sizes), x.dtype)
    low.emit("expand", [x], out, node)
    out.number = x.number


def fill(low: Lowering, node: ir.Node) -> None:
    """ConstantOfShape with a shape that is known only in part."""
    tensor = attribute(node, "value")
    number = 0.0 if tensor is None else float(tensor.numpy().reshape(-1)[0])
    dtype = "float32" if tensor is None else low.dtype_name(tensor.dtype)
    out = low.output(node, low.known_sizes(node.inputs[0]), dtype)
    low.emit("opaque", [], out, node)
    out.number = number


def global_pool(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    axes = None if x.shape is None else tuple(range(2, len(x.shape)))
    low.emit("mean", [x], low.output(node, reduced_shape(x, axes, True), x.dtype), node, axes=axes, keepdims=True)


def average_pool(low: Lowering, node: ir.Node) -> None:
    """With a window over all of the axes that it moves along, a mean over them."""
    x, window = low.value(node.inputs[0]), tuple(attribute(node, "kernel_shape") or ())
    padded = any(attribute(node, "pads") or ()) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    spread = any(d != 1 for d in attribute(node, "dilations") or ())
    if x.shape is None or window != x.shape[2:] or padded or spread:
        return low.opaque(node)
    global_pool(low, node)


def transpose(low: Lowering, node: ir.Node) -> None:
    x = low.value(node.inputs[0])
    perm = tuple(attribute(node, "perm") or reversed(range(len(x.shape or ()))))
    shape = tuple(x.shape[p] for p in perm) if x.shape is not None and len(perm) == len(x.shape) else None
    low.emit("transpose", [x], low.output(node, shape, x.dtype), node, perm=perm)
