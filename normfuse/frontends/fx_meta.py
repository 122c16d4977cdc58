"""What the tracer left in `node.meta`: shapes, types, strides and devices, as the core wants them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata

from normfuse.graph import Dim, Shape

MISSING = object()


class Symbol(str):
    """A size or a number that a file gives as an expression; equal texts mean equal values."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says of a tensor that is not there."""

    shape: tuple[int | Symbol, ...]
    dtype: torch.dtype
    device: str
    requires_grad: bool = False
    layout: torch.layout = torch.strided


_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)


def meta_of(node: fx.Node) -> Any:
    """What the tracer knows of a node's result, or MISSING."""
    for key in ("val", "example_value", "tensor_meta"):
        if key in node.meta:
            return node.meta[key]
    return MISSING


def is_tensor(meta: Any) -> bool:
    """Whether a node's meta describes one tensor."""
    return isinstance(meta, (torch.Tensor, TensorMetadata, TensorInfo))


def dim_of(d: Any) -> Dim:
    """The neutral form of one size: an int, or the symbolic expression as text."""
    if isinstance(d, (int, Symbol)):
        return d
    exact = d.node.maybe_as_int()
    return str(d) if exact is None else int(exact)


def shape_of(meta: Any) -> Shape | None:
    """The neutral shape of a tensor's meta; None for what is no plain strided tensor."""
    quantized = isinstance(meta, torch.Tensor) and meta.is_quantized
    if quantized or getattr(meta, "layout", torch.strided) != torch.strided:
        return None
    return tuple(dim_of(d) for d in meta.shape)


def elsewhere(a: Any, b: Any) -> bool:
    """Whether two tensors are on different devices, as far as it is known."""
    known = [getattr(meta, "device", None) for meta in (a, b)]
    return None not in known and known[0] != known[1]


def dtype_of(meta: Any) -> str:
    """The neutral name of a tensor's dtype."""
    return str(meta.dtype).removeprefix("torch.")


def label(node: fx.Node) -> str:
    """What to call a node in a message: the path of its module, where known, and its name."""
    path = module_of(node)
    return f"{path}/{node.name}" if path else node.name


def module_of(node: fx.Node) -> str:
    """The path of the module that a node comes from, where the tracer kept it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = next(reversed(stack.values()))
    path = entry[0] if isinstance(entry, tuple) else str(entry)
    path = re.sub(r"^L\['self'\]\.?|_modules\b|['\"]", "", path)
    return re.sub(r"\[(\w+)\]", r".\1", path).replace("..", ".").strip(".")


def size_of(d: Any, symbols: dict[str, int] | None = None, numbers: Sequence[int] = _PRIMES) -> int:
    """A size as a number: symbols take the values given, or one of some primes, so that unlike sizes stay unlike."""
    if isinstance(d, int):
        return d
    given = symbols if symbols is not None else {}
    expr = d.node.expr
    for symbol in sorted(expr.free_symbols, key=str):
        given.setdefault(str(symbol), numbers[len(given) % len(numbers)])
    return int(expr.subs({s: given[str(s)] for s in expr.free_symbols}))


def order_of(meta: Any) -> tuple[int, ...] | None:
    """The axes from the widest stride to the narrowest, axes of size 1 where they stand; None if not dense.

    The identity for a contiguous tensor. A dense tensor permuted by this order is contiguous.
    """
    symbols: dict[str, int] = {}
    sizes = [size_of(d, symbols) for d in meta.shape]
    strides = meta.stride() if isinstance(meta, torch.Tensor) else meta.stride
    steps = [size_of(s, symbols) for s in strides]
    wide = [a for a, d in enumerate(sizes) if d != 1]
    sorted_ = iter(sorted(wide, key=lambda a: -steps[a]))
    order = tuple(next(sorted_) if d != 1 else a for a, d in enumerate(sizes))
    expected = 1
    for a in reversed(order):
        if sizes[a] != 1:
            if steps[a] != expected:
                return None
            expected *= sizes[a]
    return order
