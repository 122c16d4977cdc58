"""Operators of half types that ONNX Runtime takes apart on the CPU, computed in float32 by one kernel instead.

An operator without a kernel of its type gets a cast before and behind it, unless the standard says what it is made of:
then these operators run one by one, a Softmax as ReduceMax, Sub, Exp, ReduceSum and Div, in float32 between the same
casts. With the casts in the file it is one operator, which computes in float32 as well and rounds once, at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import names_of, respell
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.targets import WIDE, Row, Table


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
