"""Softmaxes as calls of functions that our library has kernels for on the CPU, with an addition of a mask before.

    softmax(x)                                  softmax(x) over the last axis
    add_softmax(x, mask)                        softmax(x + mask)
    softmax_of_f16, add_softmax_of_f16          the same of float16
    ..._scaled_of_f16(..., scale)               and of scale * x

The body of a function is the model's own operators, so that a runtime without the library does what it did before, and
ONNX Runtime on CUDA, where there is no kernel of ours, too. On the CPU its Softmax of float32 takes masked elements to
denormal numbers, so that rows that are half masked take many times as long as others, and its Softmax of float16 is
five operators. The mask of a call of float16 is cast to float32, and back in the body: the products beside it are
computed in float32, and an operator whose operands of float16 all come from such ones ONNX Runtime, but 1.24 to 1.29,
runs so as well, without casts in between. A mask may come from anywhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import DOMAIN, names_of, register_functions, respell
from normfuse.frontends.onnx_half import factor
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.targets import Row, Table

FIRST_SOFTMAX_OF_ONE_AXIS = 13
MASKS = ("Add", "Where")
SMALLEST, LARGEST = 2.0**-24, 2.0**15
"""Of the powers of two in float16."""
BETWEEN = ("Cast", "Dropout", "Identity", "Reshape", "Transpose", "Where")
"""What may stand between the softmax of attention and the product that reads it."""


class Scale(NamedTuple):
    """An operator that multiplies a value, its input at `at`, by a number."""

    node: ir.Node
    at: int
    number: float


class Found(NamedTuple):
    """A softmax, the row of the target's table, whether the call takes the addition before in, and what multiplies its
    operand by a number."""

    node: ir.Node
    row: Row
    whole: bool
    scale: Scale | None


def is_norm(domain: str, name: str) -> bool:
    """Whether a function is one of ours for a norm."""
    return domain == DOMAIN and not name.startswith(("softmax", "add_softmax"))


def softmaxes(lowerings: Sequence[Lowering], table: Table, opset: int) -> list[Found]:
    """Those that the target's table wants to be calls, or to say something of, with the row."""
    found = []
    for low in lowerings:
        for node in low.source if not low.mapped else ():
            if (row := _row(low, node, table, opset)) is not None:
                whole = _whole(low, node)
                found.append(Found(node, row, whole, _scaled(low, node, whole) if _half(row) else None))
    return found


def _half(row: Row) -> bool:
    return row.form == "function" and row.types == {"float16"}


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


def _scaled(low: Lowering, node: ir.Node, whole: bool) -> Scale | None:
    """What multiplies a value that a softmax reads by a number, or divides it by a power of two, and is read by the
    softmax alone, or the addition that it is taken in with."""
    add = _addition(node.inputs[0]) if whole else None
    for value in add.inputs if add else node.inputs[:1]:
        one = None if value is None else value.producer()
        if one is None or value is None or one.graph is not node.graph:
            continue
        if len(value.uses()) > 1 or low.value(value).kept:
            continue
        for at in range(len(one.inputs)):
            number = factor(low, one, at)
            if number is not None and (one.op_type == "Mul" or (abs(math.frexp(number)[0]) == 0.5 and
                                                                SMALLEST <= abs(number) <= LARGEST)):  # fmt: skip
                return Scale(one, at, number)
    return None


def outline(model: ir.Model, lowerings: Sequence[Lowering], found: Sequence[Found], opset: int) -> Counter[Row]:
    """Put calls in the place of softmaxes, and of the operators that they take in; the rows, with how often."""
    functions: dict[str, ir.Function] = {}
    masks: dict[tuple[Any, ir.Value], ir.Value] = {}
    used = names_of(low.source for low in lowerings) if found else set()
    for node, row, whole, scale in found:
        if row.form != "function" or node.inputs[0] is None or node.graph is None:
            continue
        add, half = _addition(node.inputs[0]) if whole else None, _half(row)  # a norm may have taken it in
        operands = [v for v in (add.inputs if add else node.inputs[:1]) if v is not None]
        if scale is not None and (at := [v.producer() for v in operands]).count(scale.node) == 1:
            del operands[at.index(scale.node)]
            operands = [x for x in scale.node.inputs[scale.at : scale.at + 1] if x is not None] + operands
        else:
            scale = None
        name = "_".join(["add_softmax" if add else "softmax", *["scaled"] * (scale is not None), *["of_f16"] * half])
        functions[name] = functions.get(name) or function_for(name, opset)
        nodes: list[ir.Node] = []
        if half and add:
            key = node.graph, operands[1]  # one mask is for all layers
            if key not in masks:
                nodes.append(ir.Node("", "Cast", operands[1:], [ir.AttrInt64("to", DTYPES["float32"])]))
                masks[key] = nodes[0].outputs[0]
            operands[1] = masks[key]
        nodes.append(ir.Node(DOMAIN, name, operands, [ir.AttrFloat32("scale", scale.number)] if scale else []))
        respell(node, nodes, {node.outputs[0]: nodes[-1].outputs[0]}, used)
    register_functions(model, list(functions.values()))
    return Counter(one.row for one in found)


def function_for(name: str, opset: int) -> ir.Function:
    """The function of that name."""
    masked, half, scaled = name.startswith("add_"), name.endswith("_of_f16"), "_scaled" in name
    inputs = [ir.Value(name=n) for n in ("x", "mask")[: 1 + masked]]
    nodes: list[ir.Node] = []

    def op(kind: str, operands: Sequence[ir.Value], *attributes: ir.Attr) -> ir.Value:
        nodes.append(ir.Node("", kind, operands, attributes, name=f"n{len(nodes)}"))
        nodes[-1].outputs[0].name = f"v{len(nodes)}"
        return nodes[-1].outputs[0]

    def narrow(value: ir.Value) -> ir.Value:
        return op("Cast", [value], ir.AttrInt64("to", DTYPES["float16"])) if half else value

    value = inputs[0]
    if scaled:
        number = op("Constant", [], ir.RefAttr("value_float", "scale", ir.AttributeType.FLOAT))
        value = op("Mul", [value, narrow(number)])
    if masked:
        value = op("Add", [value, narrow(inputs[1])])
    value = op("Softmax", [value], ir.AttrInt64("axis", -1))
    value.name = "y"
    graph = ir.Graph(inputs, [value], nodes=nodes, opset_imports={"": opset}, name="")
    declared = [ir.Attr("scale", ir.AttributeType.FLOAT, None)] if scaled else []
    function = ir.Function(DOMAIN, name, graph=graph, attributes=declared)
    function.doc_string = f"softmax({'scale * ' * scaled}x{' + mask' * masked}) over the last axis"
    return function
