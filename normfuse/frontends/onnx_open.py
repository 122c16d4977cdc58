"""Sizes that the inputs of a model leave open, and that its operators say all the same."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from normfuse.frontends.onnx import Lowering, lower
from normfuse.frontends.onnx_contrib import head_size
from normfuse.frontends.onnx_fold import attribute

CACHES = {"MultiHeadAttention": (6, 7), "GroupQueryAttention": (3, 4)}
"""The inputs that hold the keys and values of what is past, of shape (batch, heads, tokens, size of a head)."""
SCALED = frozenset("Cast Identity Add Sub Mul Div QuantizeLinear DequantizeLinear".split())
"""What is done to an image or a weight ahead of a convolution, and leaves its channels as they are."""
BOTH = frozenset("Add Sub Mul Div".split())
CLASSES = (0, 1, 2)
"""How many tokens an image has beside its patches: none, that of its class, and that of DeiT's distillation."""
MOST_STEPS = 16
"""How many of these are looked through."""


def stated_sizes(model: ir.Model) -> dict[str, int]:
    """The open sizes of a model's inputs by name that its operators say: that of a head, which the width of the key
    that is added to a cache does, the least tokens that a cache for a sliding window has room for, and those of an
    image."""
    found = image_sizes(model)
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


def image_sizes(model: ir.Model) -> dict[str, int]:
    """The open sizes of an image, which a convolution reads as it is or scaled: its channels, as many as the weight
    has, and height and width, where the model has one table of positions for as many patches as a square has."""
    found: dict[str, int] = {}
    for node in model.graph:
        if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
            continue
        value, shape = _behind(node.inputs[0]), _size(node.inputs[1])
        if shape is None or value is None or not value.is_graph_input() or len(value.shape or ()) != len(shape):
            continue
        for axis, size in enumerate((shape[1] * attribute(node, "group", 1), *_square(model, node, shape)), 1):
            name = getattr(value.shape[axis], "value", None) if value.shape is not None else None
            if isinstance(name, str):
                found[name] = int(size)
    return found


def _square(model: ir.Model, node: ir.Node, weight: tuple[int, ...]) -> list[int]:
    """Height and width of an image that a convolution cuts into as many patches as the model has positions, next to
    those of a class token perhaps."""
    if len(weight) != 4 or any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET")[:4] == "SAME":
        return []
    read = [v for one in model.graph for v in {"Add": one.inputs, "Gather": one.inputs[:1]}.get(one.op_type, ())]
    shapes = [shape for v in read if (shape := _size(v)) is not None and len(shape) > 1 and shape[-1] == weight[0]]
    counts = {shape[-2] - more for shape in shapes for more in CLASSES}
    sides = {math.isqrt(n) for n in counts if n > 3 and math.isqrt(n) ** 2 == n}
    if len(sides) != 1:
        return []
    steps = max(sides) - 1
    return [k + steps * stride for k, stride in zip(weight[2:], attribute(node, "strides", [1, 1]), strict=True)]


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
