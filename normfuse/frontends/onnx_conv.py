"""Constants behind a convolution, spelled so that ONNX Runtime takes them into its weights and bias.

    Conv(x, W, b) * s + t      computed as      Conv(x, s*W, s*b + t)

ONNX Runtime's optimiser does that (ConvMulFusion, ConvAddFusion) where the constant is the second operand and has a
number for each channel, or is a number without axes that the result is multiplied by. Paddle2ONNX writes it first, and
as one number with an axis. What is written here is the same product or sum, bit for bit, in any runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import names_of, respell, unique
from normfuse.frontends.onnx_fold import attribute, constant_of
from normfuse.frontends.onnx_infer import DTYPE_NAMES
from normfuse.ort_values import Array
from normfuse.targets import Row, Table

IMAGE = 4
"""The rank from which on ONNX Runtime does it."""
WEIGHTS = 1e30
FACTORS = 1e6
SUMMANDS = 1e3
"""The largest, and of weights and factors by their inverses the smallest, with which nothing leaves the range of
float32, and no sum rounds more than a product does."""
Shape = tuple[int, ...]


def take_in(lowerings: Sequence[Lowering], table: Table, _: int) -> Counter[Row]:
    """Write these constants so where the target's table says so. Gives the row used, with how often."""
    used, found = names_of(low.source for low in lowerings), Counter[Row]()
    for low in lowerings:
        made: dict[tuple[ir.Value | None, Shape], ir.Value] = {}
        for conv in [node for node in low.source if node.op_type == "Conv" and not node.domain]:
            weight = _tensor(conv.inputs[1]) if len(conv.inputs) > 1 else None
            row = None if weight is None else table.convolved(DTYPE_NAMES[weight.dtype])
            if row is None or weight is None or len(weight.shape) < IMAGE:
                continue
            full = (int(weight.shape.numpy()[0]), *(1,) * (len(weight.shape) - 2))
            news = [one for one in _behind(low.source, conv, weight.dtype, full) if not _fits(*one, full)]
            if not news or not 1 / WEIGHTS <= np.abs(weight.numpy()).max(initial=0) <= WEIGHTS:
                continue
            for node, at, array in news:
                form = () if node.op_type == "Mul" else full
                value, constant = node.inputs[1 - at], node.inputs[at]
                if array.shape not in (full, (1, *full)):
                    key = constant, form
                    if key not in made:
                        name = unique(f"{constant.name if constant else ''}_as_taken_in", used)
                        tensor = ir.Tensor(np.full(form, array.reshape(())), name=name)
                        made[key] = ir.Value(name=name, shape=ir.Shape(form), type=ir.TensorType(tensor.dtype),
                                             const_value=tensor)  # fmt: skip
                        low.source.register_initializer(made[key])
                    constant = made[key]
                new = ir.Node("", node.op_type, [value, constant])
                respell(node, [new], {node.outputs[0]: new.outputs[0]}, used)
                found[row] += 1
    return found


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that a value is in the file: nothing that is computed, or that the caller may replace."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Identity" and not node.domain:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if node is None:
        return None if value is None or value.is_graph_input() else value.const_value
    if node.op_type != "Constant" or node.domain:
        return None
    tensor: ir.TensorProtocol | None = attribute(node, "value")
    array = constant_of(node) if tensor is None else None
    return tensor if array is None else ir.Tensor(array)


def _fits(node: ir.Node, at: int, array: Array, full: Shape) -> bool:
    """Whether a constant stands as ONNX Runtime takes it in."""
    return at == 1 and (array.shape in (full, (1, *full)) or (node.op_type == "Mul" and not array.shape))


def _behind(graph: ir.Graph, conv: ir.Node, dtype: ir.DataType, full: Shape) -> Iterator[tuple[ir.Node, int, Array]]:
    """The products and sums with constants, one behind the other, each its only reader; where the constant is, and the
    constant."""
    value, least, most = conv.outputs[0], 1.0, 1.0
    while not value.is_graph_output():
        readers = [use for use in value.uses() if use[0].op_type != "Shape"]  # which a norm may do without
        if len(readers) != 1:
            return
        ((node, at),) = readers
        if node.graph is not graph or node.domain or len(node.outputs) > 1:
            return
        if node.op_type in ("Mul", "Add"):
            tensor = _tensor(node.inputs[1 - at])
            shape = None if tensor is None else tuple(tensor.shape.numpy())
            one = shape is not None and {*shape} <= {1} and len(shape) <= len(full) + 1
            if tensor is None or tensor.dtype != dtype or (shape not in (full, (1, *full)) and not one):
                return
            array = np.asarray(tensor.numpy())
            sizes = np.abs(array)
            if node.op_type == "Mul":
                least, most = least * float(sizes.min(initial=np.inf)), most * float(sizes.max(initial=0))
                if not 1 / FACTORS <= least <= most <= FACTORS:
                    return
            elif not (sizes <= SUMMANDS).all():
                return
            yield node, 1 - at, array
        elif node.op_type != "Identity":
            return
        value = node.outputs[0]
