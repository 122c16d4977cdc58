"""Softmaxes as calls of functions that our library has kernels for on the CPU, with an addition of a mask before.

    softmax(x)            softmax(x) over the last axis
    add_softmax(x, mask)  softmax(x + mask)

The body of a function is the model's own operators, so that a runtime without the library does what it did before, and
ONNX Runtime on CUDA, where there is no kernel of ours, too. On the CPU its Softmax of float32 takes masked elements to
denormal numbers, so that rows that are half masked take many times as long as others, and its Softmax of float16 is
five operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import DOMAIN, discard, names_of, register_functions, respell
from normfuse.frontends.onnx_functions import SHORT
from normfuse.targets import Row, Table

FIRST_SOFTMAX_OF_ONE_AXIS = 13
MASKS = ("Add", "Where")
Softmaxes = list[tuple[ir.Node, Row]]


def is_norm(domain: str, name: str) -> bool:
    """Whether a function is one of ours for a norm."""
    return domain == DOMAIN and not name.startswith(("softmax", "add_softmax"))


def softmaxes(lowerings: Sequence[Lowering], table: Table, opset: int) -> Softmaxes:
    """Those that the target's table wants to be calls, or to say something of, with the row."""
    return [(node, row) for low in lowerings if not low.mapped for node in low.source
            if (row := _row(low, node, table, opset)) is not None]  # fmt: skip


def _row(low: Lowering, node: ir.Node, table: Table, opset: int) -> Row | None:
    if node.domain or node.op_type != "Softmax" or node.inputs[0] is None:
        return None
    x, axis = low.value(node.inputs[0]), node.attributes.get("axis")
    over = axis.as_int() if axis is not None else -1 if opset >= FIRST_SOFTMAX_OF_ONE_AXIS else 1
    if over != -1 and over != (x.rank or 0) - 1:
        return None
    row = table.widened("Softmax", x.dtype, opset)
    return (row if row.form == "function" else None) if row is not None else (
        table.masked(x.dtype) if _masked(node.inputs[0]) else None)  # fmt: skip


def _masked(value: ir.Value) -> bool:
    """Whether something is added to a value, or put in its place, before it may be cast."""
    node = value.producer()
    if node is not None and (node.domain, node.op_type) == ("", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and not node.domain and node.op_type in MASKS


def outline(model: ir.Model, found: Softmaxes, graphs: Sequence[ir.Graph], opset: int) -> Counter[Row]:
    """Put calls in the place of softmaxes, and of an addition that nobody else reads; the rows, with how often."""
    wanted = [(node, row) for node, row in found if row.form == "function"]
    used = names_of(graphs) if wanted else set()
    functions: dict[str, ir.Function] = {}
    for node, row in wanted:
        x = node.inputs[0]
        assert x is not None
        add = x.producer()
        whole = (add is not None and (add.domain, add.op_type) == ("", "Add") and add.graph is node.graph
                 and len(x.uses()) == 1 and not x.is_graph_output())  # fmt: skip
        (dtype,) = row.types
        name = "_".join(["add_softmax" if whole else "softmax", *([SHORT[dtype]] if dtype != "float32" else [])])
        functions[name] = functions.get(name) or function_for(name, whole, opset)
        call = ir.Node(DOMAIN, name, add.inputs if whole and add is not None else [x])
        respell(node, [call], {node.outputs[0]: call.outputs[0]}, used)
        if whole and add is not None:
            discard([add], ())
    register_functions(model, list(functions.values()))
    return Counter(row for _, row in found)


def function_for(name: str, masked: bool, opset: int) -> ir.Function:
    """The function of that name."""
    inputs = [ir.Value(name=n) for n in ("x", "mask")[: 1 + masked]]
    nodes = [ir.Node("", "Add", inputs)] if masked else []
    nodes.append(ir.Node("", "Softmax", [nodes[0].outputs[0] if masked else inputs[0]], [ir.AttrInt64("axis", -1)]))
    for i, node in enumerate(nodes):
        node.name, node.outputs[0].name = f"n{i}", "y" if node is nodes[-1] else f"v{i}"
    graph = ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, opset_imports={"": opset}, name="")
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    function.doc_string = f"softmax(x{' + mask' if masked else ''}) over the last axis"
    return function
