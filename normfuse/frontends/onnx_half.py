"""Operators of half types that ONNX Runtime takes apart on the CPU, computed in float32 by one kernel instead.

An operator without a kernel of its type gets a cast before and behind it, unless the standard says what it is made of:
then these operators run one by one, a Softmax as ReduceMax, Sub, Exp, ReduceSum and Div, in float32 between the same
casts. With the casts in the file it is one operator, which computes in float32 as well and rounds once, at the end.

Of a product and a number behind it, as in attention, ONNX Runtime's optimiser makes one operator in float32, and not in
float16, of which it only later knows that it will be computed so. In the file as one, it also rounds once, at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import names_of, respell
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.targets import WIDE, Row, Table

MATRIX = 2
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
SCALES = (("Mul", 0), ("Mul", 1), ("Div", 0))
"""By which operators, and where in them, a product may be read."""


def widen(lowerings: Sequence[Lowering], table: Table, opset: int) -> Counter[Row]:
    """Put casts around the operators for which the target's table says so. Gives the rows used, with how often.

    Among them those that say to leave an operator: the report tells of the target that would not.
    """
    chosen = [(node, row) for low in lowerings for node in low.source
              if node.op_type in WIDE and not node.domain and node.inputs and node.inputs[0] is not None
              and (row := table.widened(node.op_type, low.value(node.inputs[0]).dtype, opset)) is not None
              and row.form != "function"]  # fmt: skip
    wide = [(node, row) for node, row in chosen if row.form != "leave"]
    used = names_of(low.source for low in lowerings if wide)
    for node, row in wide:
        (narrow,) = row.types
        before = ir.Node("", "Cast", [node.inputs[0]], [ir.AttrInt64("to", DTYPES["float32"])])
        same = ir.Node("", node.op_type, before.outputs, list(node.attributes.values()))
        behind = ir.Node("", "Cast", same.outputs, [ir.AttrInt64("to", DTYPES[narrow])])
        respell(node, [before, same, behind], {node.outputs[0]: behind.outputs[0]}, used)
    return Counter(row for _, row in chosen)


def scale(lowerings: Sequence[Lowering], table: Table, _: int) -> Counter[Row]:
    """Make one operator of a product of two computed values and the numbers that it is multiplied or divided by, where
    the target's table says so: FusedMatMul of ONNX Runtime's contrib operators, alpha * A @ B. Gives the row used, with
    how often.
    """
    used, found = names_of(low.source for low in lowerings), Counter[Row]()
    for low in lowerings:
        for node in [node for node in low.source if node.op_type == "MatMul" and not node.domain]:
            product, operands = low.value(node.outputs[0]), low.inputs(node)
            row = table.scaled(product.dtype)
            if row is None or any(v.fixed or (v.rank or 0) < MATRIX for v in operands):
                continue
            if product.shape is None or product.shape[-1] == 1:  # a dot of rows may be a step of a norm
                continue
            scales = list(_scales(low, node))
            alpha = math.prod(by for _, by in scales)
            if not scales or not SMALLEST <= abs(alpha) <= LARGEST:
                continue
            last = scales[-1][0].outputs[0]
            new = ir.Node("com.microsoft", "FusedMatMul", node.inputs, [ir.AttrFloat32("alpha", alpha)])
            low.values[new.outputs[0]] = low.value(last)  # another product may read it
            respell(scales[-1][0], [new], {last: new.outputs[0]}, used)
            lowerings[0].source.opset_imports.setdefault(new.domain, 1)
            found[row] += 1
    return found


def _scales(low: Lowering, node: ir.Node) -> Iterator[tuple[ir.Node, float]]:
    """The operators that multiply a product by a number, one behind the other, each its only reader."""
    while not (out := node.outputs[0]).is_graph_output() and len(out.uses()) == 1:
        ((node, i),) = out.uses()
        if node.graph is not low.source or (number := factor(low, node, i)) is None:
            return
        yield node, number


def factor(low: Lowering, node: ir.Node, at: int) -> float | None:
    """The number by which an operator multiplies its input at `at`, if it does that."""
    if node.domain or (node.op_type, at) not in SCALES:
        return None
    by, x = low.value(node.inputs[at - 1]), low.value(node.inputs[at])
    if not by.number or by.shape is None or not {*by.shape} <= {1} or len(by.shape) > (x.rank or 0):
        return None
    return float(by.number) if node.op_type == "Mul" else 1 / by.number
