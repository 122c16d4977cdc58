"""Additions ahead of LayerNorms that ONNX Runtime would take into one operator, which is slower there.

Its optimiser makes SkipLayerNormalization of an Add and the LayerNormalization that alone reads it. From 1.30 on that
takes up to eleven times as long on the CPU; a Sum of two, which computes the same, is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import names_of, respell
from normfuse.targets import Row, Table


def summed(lowerings: Sequence[Lowering], table: Table) -> Counter[Row]:
    """Write these additions as Sum where the target's table says so. Gives the row used, with how often."""
    used, found = names_of(low.source for low in lowerings), Counter[Row]()
    for low in lowerings:
        for norm in [node for node in low.source if _layer_norm(node)]:
            x = norm.inputs[0]
            node = None if x is None else x.producer()
            known = None if x is None else low.values.get(x)
            row = None if known is None else table.summed(known.dtype)
            if row is None or x is None or node is None or node.op_type != "Add" or node.domain or len(x.uses()) > 1:
                continue
            if x.is_graph_output() or any(v is None or _fixed(v, low) for v in node.inputs):  # a bias stays
                continue
            new = ir.Node("", "Sum", node.inputs)
            respell(node, [new], {x: new.outputs[0]}, used)
            found[row] += 1
    return found


def _fixed(value: ir.Value, low: Lowering) -> bool:
    known = low.values.get(value)  # of what was written anew nothing is
    return value.is_initializer() or (known is not None and known.fixed)


def _layer_norm(node: ir.Node) -> bool:
    if node.domain == "normfuse":
        return node.op_type.startswith("layer_norm")
    return node.op_type == "LayerNormalization" and not node.domain
