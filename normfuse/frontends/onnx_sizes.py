"""Sizes in motion: models compute the targets of Reshape and Expand from the shapes of tensors.

Each small integer vector is followed as a tuple of sizes, some of them symbols or unknown, so that a Reshape whose
target mixes a batch size with constants still has a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from normfuse.frontends.onnx_fold import attribute
from normfuse.graph import Dim, Shape
from normfuse.ort_values import Array

Sizes = Shape | None
Arrays = Sequence[Array | None]
Rule = Callable[[ir.Node, Sequence[Sizes], Arrays], Sizes]


def _shape(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    return None if args[0] is None else args[0][attribute(node, "start", 0) : attribute(node, "end")]


def _size(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    return None if args[0] is None else (_product(args[0]),)


def _product(sizes: Shape) -> Dim:
    if len(sizes) == 1:
        return sizes[0]
    total = 1
    for d in sizes:
        if not isinstance(d, int):
            return None
        total *= d
    return total


def _gather(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    if args[0] is None or arrays[1] is None or arrays[1].ndim > 1:
        return None
    picked = [int(i) for i in arrays[1].reshape(-1)]
    return tuple(args[0][i] for i in picked) if all(-len(args[0]) <= i < len(args[0]) for i in picked) else None


def _slice(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    if args[0] is None:
        return None
    if len(arrays) > 1:
        if any(a is None for a in arrays[1:]):
            return None
        starts, ends = ([int(i) for i in a.reshape(-1)] for a in arrays[1:3] if a is not None)
        steps = [int(i) for i in arrays[4].reshape(-1)] if len(arrays) > 4 and arrays[4] is not None else [1]
    else:
        starts, ends, steps = attribute(node, "starts"), attribute(node, "ends"), [1]
    return args[0][starts[0] : ends[0] : steps[0]] if len(starts) == 1 and steps[0] > 0 else None


def _concat(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    return None if any(a is None for a in args) else tuple(d for a in args if a is not None for d in a)


def _same(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    return args[0] if args else None


def _cast(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    return args[0] if attribute(node, "to") in (ir.DataType.INT32, ir.DataType.INT64) else None


def _all(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    if len(arrays) < 2 and attribute(node, "axes") is None and attribute(node, "noop_with_empty_axes", 0):
        return args[0]
    return None if args[0] is None else (_product(args[0]),)


def _columns(args: Sequence[Sizes]) -> list[tuple[Dim, ...]] | None:
    """The elements of vectors that stand side by side, of which those of one element are repeated."""
    if any(a is None for a in args):
        return None
    vectors = [a for a in args if a is not None]
    long = max(map(len, vectors))
    return list(zip(*(v * long if len(v) == 1 else v for v in vectors), strict=True))


def _equal(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    columns = _columns(args)
    return None if columns is None else tuple(_same_size(a, b) for a, b in columns)


def _same_size(a: Dim, b: Dim) -> Dim:
    """1 for two sizes that are the same, 0 for two that are not (none is negative), None where only a run tells."""
    if a is None or b is None:
        return None
    numbers = [d for d in (a, b) if isinstance(d, int)]
    return 1 if a == b else 0 if len(numbers) == len((a, b)) or min(numbers, default=0) < 0 else None


def _where(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    columns = _columns(args)
    return None if columns is None else tuple((b if c == 0 else None if c is None else a) for c, a, b in columns)


SIZES: dict[str, Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Cast": _cast,
    "Identity": _same,
    "Unsqueeze": _same,
    "Squeeze": _same,
    "Reshape": _same,
    "ReduceProd": _all,
    "Equal": _equal,
    "Where": _where,
}


def rank_of(node: ir.Node, rank: int, arrays: Arrays) -> int | None:
    """The rank of what a node computes from sizes of a rank, 0 or 1; None where it depends on what is not known."""
    op, given = node.op_type, arrays[1] if len(arrays) > 1 else None
    if op in ("Cast", "Identity"):
        return rank
    if op in ("Equal", "Where"):
        return rank or None  # of a single element the others may have another rank
    if op == "Gather":
        return None if given is None else rank - 1 + given.ndim
    if op == "Reshape":
        return None if given is None else given.size
    axes = attribute(node, "axes") if len(arrays) < 2 else None if given is None else given.reshape(-1).tolist()
    if op == "Unsqueeze":
        return None if axes is None else rank + len(axes)
    if op == "ReduceProd":
        if len(arrays) > 1 and not axes:
            return None  # all or none of them, which runtimes do not agree on
        whole = axes is None and attribute(node, "noop_with_empty_axes", 0)
        return rank if whole or attribute(node, "keepdims", 1) else 0
    return int(op not in ("Size", "Squeeze"))


def sizes_of(node: ir.Node, args: Sequence[Sizes], arrays: Arrays) -> Sizes:
    """The sizes that a node computes from sizes; None where it does something else."""
    rule = SIZES.get(node.op_type)
    if rule is None or not args or args[0] is None or node.domain not in ("", "ai.onnx"):
        return None
    try:
        return rule(node, args, arrays)
    except (IndexError, TypeError, ValueError):
        return None  # a run-time error of the model is the runtime's to report
