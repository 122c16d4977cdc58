"""Sizes that the inputs of a model leave open, and that its operators say all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.errors import InputError
from normfuse.frontends.onnx import Lowering, lower
from normfuse.frontends.onnx_contrib import head_size
from normfuse.frontends.onnx_fold import attribute
from normfuse.frontends.onnx_infer import DTYPE_NAMES
from normfuse.sessions import Given, is_float

CACHES = {"MultiHeadAttention": (6, 7), "GroupQueryAttention": (3, 4)}
"""The inputs that hold the keys and values of what is past, of shape (batch, heads, tokens, size of a head)."""
SCALED = frozenset("Cast Identity Add Sub Mul Div QuantizeLinear DequantizeLinear".split())
"""What is done to an image or a weight ahead of a convolution, and leaves its channels as they are."""
BOTH = frozenset("Add Sub Mul Div".split())
CLASSES = (0, 1, 2)
"""How many tokens an image has beside its patches: none, that of its class, and that of DeiT's distillation."""
LONGEST, MOST_PATCHES, MOST_SIDES = 4, 2**16, 8
"""How many times as wide an image is tried as it is high, or the other way round, how many patches it has, and how many
sizes are tried."""
MOST_STEPS = 16
"""How many of these are looked through."""


def stated_sizes(model: ir.Model) -> dict[str, int]:
    """The open sizes of a model's inputs by name that its operators say: that of a head, which the width of the key
    that is added to a cache does, the least tokens that a cache for a sliding window has room for, and the channels of
    an image, which the weight of a convolution does."""
    found = channels(model)
    low: Lowering | None = None
    for node in list(model.graph):  # which may be sorted on the way
        slots = CACHES.get(node.op_type, ()) if node.domain == "com.microsoft" else ()
        for past in (node.inputs[i] for i in slots if i < len(node.inputs)):
            if past is None or past.shape is None or len(past.shape) != 4 or not past.is_graph_input():
                continue
            room, name = (getattr(dim, "value", None) for dim in past.shape[2:])
            window = attribute(node, "local_window_size", -1)
            if isinstance(room, str) and window > 0 and attribute(node, "sliding_window_cache", 0) == 1:
                found[room] = max(window, found.get(room, 0))
            if not isinstance(name, str) or name in found:
                continue
            low = low or lower(model)[0]
            query, key = (None if v is None else low.value(v).shape for v in node.inputs[:2])
            size = head_size(node, query, key) if key or node.inputs[1] is None else None
            if size is not None:
                found[name] = size
    return found


def demand_given(model: ir.Model, given: Given) -> None:
    """Raise `InputError` for an input that a model lacks, or wants of another shape or type, and for a size that none
    of its inputs has or that a given one has otherwise."""
    dims = input_dims(model)
    if unknown := sorted(set(given.inputs) - set(dims)):
        raise InputError(f"no input is named {unknown[0]!r}; the model has {', '.join(dims) or 'none'}")
    symbols = list(dict.fromkeys(d for shape in dims.values() for d in shape if isinstance(d, str)))
    if absent := sorted(set(given.sizes) - set(symbols)):
        has = f"has {', '.join(symbols)}" if symbols else "has none that is open"
        raise InputError(f"no size of an input is named {absent[0]!r}; the model {has}")
    for value in (v for v in model.graph.inputs if v.name in given.inputs):
        name, array = value.name or "", given.inputs[value.name or ""]
        want, fixed = dims[name], [d if isinstance(d, int) and d >= 0 else n for d, n in
                                   zip(dims[name], array.shape, strict=False)]  # fmt: skip
        single = not want and array.size == 1  # which ONNX Runtime takes
        if value.shape is not None and not single and (len(want) != array.ndim or tuple(fixed) != array.shape):
            shapes = ("x".join("?" if d is None else str(d) for d in shape) or "()" for shape in (array.shape, want))
            raise InputError("input {!r} is given with shape {}, and the model wants {}".format(name, *shapes))
        kind = DTYPE_NAMES[value.dtype] if isinstance(value.type, ir.TensorType) and value.dtype is not None else "?"
        held = "bfloat16" if kind == "bfloat16" and is_float(array) else str(array.dtype)  # which it is made
        if kind not in ("?", "string", held):
            raise InputError(f"input {name!r} is given in {held}, and the model wants {kind}")
        if both := [d for d, n in zip(want, array.shape, strict=False) if given.sizes.get(d, n) != n]:
            raise InputError(f"the size {both[0]!r} is that of input {name!r}, which is given; leave out "
                             f"--size {both[0]}={given.sizes[both[0]]}, or --inputs")  # fmt: skip


def given_sizes(model: ir.Model, given: Given) -> dict[str, int]:
    """The open sizes of a model's inputs by name that are given, or that inputs have which are."""
    dims = input_dims(model)
    held = {dim: n for name, array in given.inputs.items() for dim, n in zip(dims[name], array.shape, strict=False)}
    return {dim: n for dim, n in (held | dict(given.sizes)).items() if isinstance(dim, str)}


def input_dims(model: ir.Model) -> dict[str, list[Any]]:
    """The sizes of a model's inputs by name, those that are initializers left out."""
    given = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return {v.name or "": [getattr(d, "value", d) for d in v.shape or ()] for v in given}


def possible_sizes(model: ir.Model) -> list[dict[str, int]]:
    """What the open sizes of a model's inputs may be, the likeliest first and at last what is sure: with height and
    width of an image such that it has as many patches as a table of the model has positions, beside those of a class
    token perhaps. A table says nothing for sure: it may be of something else."""
    stated, found = stated_sizes(model), list[dict[str, int]]()
    for node, image, weight in _image_convolutions(model):
        names = [getattr(dim, "value", None) for dim in (image.shape or ())[2:]]
        if len(names) == 2:
            found += [{n: size for n, size in zip(names, sides, strict=True) if isinstance(n, str)}
                      for sides in _sides(model, node, weight)]  # fmt: skip
    return [stated | sizes for i, sizes in enumerate(found[:MOST_SIDES]) if sizes and sizes not in found[:i]] + [stated]


def channels(model: ir.Model) -> dict[str, int]:
    """The open sizes that are the channels of an image, which a convolution reads as it is or scaled."""
    found: dict[str, int] = {}
    for node, image, weight in _image_convolutions(model):
        name = getattr(image.shape[1], "value", None) if image.shape is not None else None
        if isinstance(name, str):
            found[name] = weight[1] * int(attribute(node, "group", 1))
    return found


def _image_convolutions(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value, tuple[int, ...]]]:
    """The convolutions that read an input of the model, that and the shape of the weight."""
    for node in model.graph:
        if node.op_type == "Conv" and node.domain in ("", "ai.onnx"):
            value, shape = _behind(node.inputs[0]), _size(node.inputs[1])
            if shape and value is not None and value.is_graph_input() and len(value.shape or ()) == len(shape):
                yield node, value, shape


def _sides(model: ir.Model, node: ir.Node, weight: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Height and width of images of as many patches as there may be positions, squares first."""
    read = [v for one in model.graph for v in {"Add": one.inputs, "Gather": one.inputs[:1]}.get(one.op_type, ())]
    shapes = [shape for v in read if (shape := _size(v)) is not None and len(shape) > 1 and shape[-1] == weight[0]]
    counts = dict.fromkeys(shape[-2] - more for more in CLASSES for shape in shapes)
    pairs = [(max(a for a in range(1, math.isqrt(n) + 1) if n % a == 0), n) for n in counts if 3 < n < MOST_PATCHES]
    grids = sorted(((a, n // a) for a, n in pairs if n <= LONGEST * a * a), key=lambda grid: grid[1] / grid[0])
    strides, pads = attribute(node, "strides", [1, 1]), attribute(node, "pads", [0] * 4)

    def side(count: int, axis: int) -> int:  # of those that have so many patches, the multiple of the stride
        least = weight[2 + axis] + (count - 1) * strides[axis] - pads[axis] - pads[axis + 2]
        return int(-(-least // strides[axis]) * strides[axis])

    turned = dict.fromkeys(grid for a, b in grids for grid in ((a, b), (b, a)))
    return [tuple(side(count, axis) for axis, count in enumerate(grid)) for grid in turned]


def _behind(value: ir.Value | None) -> ir.Value | None:
    """What an image was before it was scaled by constants, on either side."""
    for _ in range(MOST_STEPS):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type not in SCALED:
            return value
        value = next((v for v in maker.inputs[:2] if v is not None and v.const_value is None), None)
    return None


def _size(weight: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a weight that is a constant, or one that other constants scale."""
    sizes: list[tuple[int, ...]] = []
    todo = [weight]
    for _ in range(MOST_STEPS):
        value = todo.pop()
        maker = None if value is None else value.producer()
        if value is not None and value.const_value is not None:
            sizes.append(tuple(int(d) for d in value.const_value.shape.numpy()))
        elif maker is None or maker.op_type not in SCALED:
            return None
        else:
            todo += maker.inputs[: 1 + (maker.op_type in BOTH)]
        if not todo:
            break
    try:
        return None if todo else tuple(map(int, np.broadcast_shapes(*sizes)))
    except ValueError:  # they do not fit, and the model does not run
        return None
