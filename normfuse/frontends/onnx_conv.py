"""Constants behind a convolution, spelled so that ONNX Runtime takes them into its weights and bias.

    Conv(x, W, b) * s + t      computed as      Conv(x, s*W, s*b + t)

ONNX Runtime's optimiser does that (ConvMulFusion, ConvAddFusion) where the constant is the second operand and has a
number for each channel. Paddle2ONNX writes it first, and as one number for all. What is written here is the same
product, bit for bit, in any runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import names_of, respell, unique
from normfuse.targets import Row, Table

IMAGE = 4
"""The rank from which on ONNX Runtime does it."""


def by_channel(lowerings: Sequence[Lowering], table: Table) -> Counter[Row]:
    """Write these constants so where the target's table says so. Gives the row used, with how often."""
    used, found = names_of(low.source for low in lowerings), Counter[Row]()
    for low in lowerings:
        for conv in [node for node in low.source if node.op_type == "Conv" and not node.domain]:
            shape = _constant(low, conv.inputs[1])
            row = None if shape is None else table.convolved(low.value(conv.inputs[1]).dtype)
            if row is None or shape is None or len(shape) < IMAGE:
                continue
            full = (shape[0], *(1,) * (len(shape) - 2))
            for node, at in list(_behind(low, conv, full)):
                value, constant = node.inputs[1 - at], node.inputs[at]
                assert constant is not None
                if (given := _constant(low, constant)) in (full, (1, *full)) and at == 1:
                    continue
                if given not in (full, (1, *full)):
                    array = np.broadcast_to(np.reshape(low.arrays[constant], ()), full).copy()
                    name = unique(f"{constant.name}_by_channel", used)
                    constant = ir.Value(name=name, shape=ir.Shape(full), type=constant.type,
                                        const_value=ir.Tensor(array, name=name))  # fmt: skip
                    low.source.register_initializer(constant)
                new = ir.Node("", node.op_type, [value, constant])
                respell(node, [new], {node.outputs[0]: new.outputs[0]}, used)
                found[row] += 1
    return found


def _constant(low: Lowering, value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of what is the same in every run, and known to be by ONNX Runtime."""
    known = None if value is None else low.values.get(value)
    if known is None or known.shape is None or not (known.leaf and known.fixed) or known.overridable:
        return None
    return tuple(d for d in known.shape if isinstance(d, int))


def _behind(low: Lowering, conv: ir.Node, full: tuple[int, ...]) -> Iterator[tuple[ir.Node, int]]:
    """The products and sums with constants, one behind the other, each its only reader, and where the constant is."""
    value = conv.outputs[0]
    while not value.is_graph_output() and len(value.uses()) == 1:
        ((node, at),) = value.uses()
        if node.graph is not low.source or node.domain or len(node.outputs) > 1:
            return
        if node.op_type in ("Mul", "Add"):
            constant = node.inputs[1 - at]
            shape = _constant(low, constant)
            one = shape is not None and {*shape} <= {1} and len(shape) <= len(full) + 1 and constant in low.arrays
            if shape not in (full, (1, *full)) and not one:
                return
            yield node, 1 - at
        elif node.op_type != "Identity" and (node.op_type, at) != ("BatchNormalization", 0):
            return
        value = node.outputs[0]
