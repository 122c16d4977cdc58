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
from typing import NamedTuple

import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import DOMAIN, discard, register_functions
from normfuse.frontends.onnx_functions import SHORT
from normfuse.targets import Row, Table

FIRST_SOFTMAX_OF_ONE_AXIS = 13
MASKS = ("Add", "Where")
BETWEEN = ("Cast", "Dropout", "Identity", "Reshape", "Transpose", "Where")
"""What may stand between the softmax of attention and the product that reads it."""


class Found(NamedTuple):
    """A softmax, the row of the target's table, and whether the call takes the addition before in."""

    node: ir.Node
    row: Row
    whole: bool


def is_norm(domain: str, name: str) -> bool:
    """Whether a function is one of ours for a norm."""
    return domain == DOMAIN and not name.startswith(("softmax", "add_softmax"))


def softmaxes(lowerings: Sequence[Lowering], table: Table, opset: int) -> list[Found]:
    """Those that the target's table wants to be calls, or to say something of, with the row."""
    return [Found(node, row, _whole(low, node)) for low in lowerings if not low.mapped for node in low.source
            if (row := _row(low, node, table, opset)) is not None]  # fmt: skip


def _row(low: Lowering, node: ir.Node, table: Table, opset: int) -> Row | None:
    if node.domain or node.op_type != "Softmax" or node.inputs[0] is None:
        return None
    x, axis = low.value(node.inputs[0]), node.attributes.get("axis")
    over = axis.as_int() if axis is not None else -1 if opset >= FIRST_SOFTMAX_OF_ONE_AXIS else 1
    if over != -1 and over != (x.rank or 0) - 1:
        return None
    row = table.widened("Softmax", x.dtype, opset)
    if row is not None:
        return row if row.form == "function" else None
    return table.masked(x.dtype) if _masked(node.inputs[0]) and _attention(node) else None


def _masked(value: ir.Value) -> bool:
    """Whether something is added to a value, or put in its place, before it may be cast."""
    node = value.producer()
    if node is not None and (node.domain, node.op_type) == ("", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and not node.domain and node.op_type in MASKS


def _attention(node: ir.Node) -> bool:
    """Whether a product reads a softmax: one at the end of a classifier has few elements, and its sum is a bias, which
    ONNX Runtime adds in the product before."""
    todo, seen = [node], {node}
    while todo:
        readers = {use.node for use in todo.pop().outputs[0].uses()} - seen
        if any(one.op_type == "MatMul" for one in readers):
            return True
        seen |= readers
        todo += [one for one in readers if one.op_type in BETWEEN]
    return False


def _whole(low: Lowering, node: ir.Node) -> bool:
    """Whether nobody else reads the sum that a softmax reads, and both stand in one graph."""
    x = node.inputs[0]
    add = _addition(x)
    return (x is not None and add is not None and add.graph is node.graph and len(x.uses()) == 1
            and not low.value(x).kept and _attention(node))  # fmt: skip


def _addition(value: ir.Value | None) -> ir.Node | None:
    """The Add that gives a value, if one does."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", "Add") else None


def outline(model: ir.Model, found: Sequence[Found], opset: int) -> Counter[Row]:
    """Put calls in the place of softmaxes, and of the additions that they take in; the rows, with how often."""
    functions: dict[str, ir.Function] = {}
    gone: list[ir.Node] = []
    for node, row, whole in found:
        x, old = node.inputs[0], node.outputs[0]
        if row.form != "function" or x is None or node.graph is None:
            continue
        add = _addition(x) if whole else None  # a norm may have taken it in
        (dtype,) = row.types
        name = "_".join(["add_softmax" if add else "softmax", *([SHORT[dtype]] if dtype != "float32" else [])])
        functions[name] = functions.get(name) or function_for(name, add is not None, opset)
        call = ir.Node(DOMAIN, name, add.inputs if add else [x], name=node.name, doc_string=node.doc_string)
        call.metadata_props.update(node.metadata_props)
        node.graph.insert_before(node, call)
        new = call.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=old.is_graph_output())
        gone += [node, add] if add else [node]
    discard(gone, ())
    register_functions(model, list(functions.values()))
    return Counter(one.row for one in found)


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
