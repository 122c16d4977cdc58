"""The ONNX nodes behind one norm: what the check runs, and what a function of them is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from normfuse.graph import Dim, Node, Value
from normfuse.norm import Site, end_of
from normfuse.ort_values import Array
from normfuse.plan import Edit, Replace

if TYPE_CHECKING:
    from normfuse.frontends.onnx import Lowering

VIEWS = frozenset({"Reshape", "Expand", "Flatten"})
MAX_REGION = 400


@dataclass(slots=True)
class Region:
    """Nodes in topological order, the values they read from outside (inputs first), and the constants among these."""

    nodes: list[ir.Node] = field(default_factory=list)
    boundary: list[Value] = field(default_factory=list)
    constants: dict[ir.Value, Array] = field(default_factory=dict)


def rest_of(value: Value) -> list[Node]:
    """The stages from a value inside an operator to that operator's output; empty for a value of the graph."""
    out: list[Node] = []
    while value.native is None and value.uses:
        out.append(value.uses[0])
        value = value.uses[0].outputs[0]
    return out


def target_of(site: Site) -> Value:
    """The value of the graph that a replacement computes."""
    return end_of(site.value)


def gives_more(site: Site) -> bool:
    """Whether the operator that computes a norm has other results that are read: it stays then, with its names."""
    native = target_of(site).native
    node = None if native is None else native.producer()
    return node is not None and any(v is not native and (v.uses() or v.is_graph_output()) for v in node.outputs)


def own_sum(site: Site) -> bool:
    """Whether the operator that computes a norm also gives what it normalises, such as one of ours with the sum."""
    native, x = target_of(site).native, site.norm.x.native
    return native is not None and x is not None and x.producer() is not None and x.producer() is native.producer()


def results_of(edit: Edit) -> list[Value]:
    """The values of the graph that an edit computes."""
    return [target_of(edit.site)] if isinstance(edit, Replace) else list(edit.results)


def region(low: Lowering, edit: Edit, sizes: dict[Dim, int] | None = None) -> Region | None:
    """The region of an edit, or None where it is too large or reads what only a whole run knows.

    With `sizes` for symbols, the targets of views that depend on sizes become constants for these.
    """
    rest = rest_of(edit.site.value) if isinstance(edit, Replace) else []
    reads = [*edit.inputs, *edit.parameters(), *(v for step in rest for v in step.inputs[1:])]
    out = Region()
    boundary = {v.native: v for v in reads}
    found: dict[ir.Node, None] = {}
    todo: list[ir.Value] = [v.native for v in results_of(edit)]
    seen: set[ir.Value] = set(boundary)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        node, known = value.producer(), low.values.get(value)
        if value in low.arrays:
            out.constants[value] = low.arrays[value]
        elif known is not None and known.number is not None and (known.leaf or _like(node)):
            dims = [d for d in known.shape or () if isinstance(d, int)]
            out.constants[value] = np.full(dims, known.number, known.dtype)
        elif node is None:
            if known is None:
                return None
            boundary[value] = known
        elif node not in found:
            found[node] = None
            for slot, v in enumerate(node.inputs):
                if v is None:
                    continue
                if sizes is not None and slot == 1 and node.op_type in VIEWS and v not in low.arrays:
                    target = _sizes(low.values[node.outputs[0]], sizes)
                    if target is None:
                        return None
                    out.constants[v] = target
                    seen.add(v)
                else:
                    todo.append(v)
        if len(found) > MAX_REGION:
            return None
    out.nodes, out.boundary = _ordered(found, set(boundary)), list(boundary.values())
    return out


def _like(node: ir.Node | None) -> bool:
    """A number in the type of another operand: in float64 its rounding would be lost."""
    return node is not None and node.op_type == "CastLike"


def _sizes(view: Value, sizes: dict[Dim, int]) -> Array | None:
    """The shape of a view where symbols have the given sizes; one size may be left to the runtime."""
    dims = [d if isinstance(d, int) else sizes.get(d, -1) if d is not None else -1 for d in view.shape or ()]
    return None if view.shape is None or dims.count(-1) > 1 else np.array(dims, np.int64)


def _ordered(nodes: dict[ir.Node, None], stop: set[ir.Value]) -> list[ir.Node]:
    out: list[ir.Node] = []
    state: set[ir.Node] = set()
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, done = stack.pop()
            if done:
                out.append(node)
            elif node not in state:
                state.add(node)
                stack.append((node, True))
                for v in node.inputs:
                    source = v.producer() if v is not None and v not in stop else None
                    if source is not None and source in nodes:
                        stack.append((source, False))
    return out


def as_function(low: Lowering, site: Site, opset: int,
                sizes: dict[Dim, int] | None = None) -> tuple[ir.Function, list[Value]] | None:  # fmt: skip
    """A function of the region's own nodes, so that every rounding stays, and the values to call it with; `sizes` as
    for `region`."""
    found = region(low, Replace(site), sizes)
    if found is None or any(v.native is None or v.dtype is None for v in found.boundary):
        return None
    values: dict[ir.Value, ir.Value] = {v.native: ir.Value(name=f"v{i}") for i, v in enumerate(found.boundary)}
    nodes: list[ir.Node] = []
    for value, array in found.constants.items():
        tensor = ir.tensor(np.array(array, order="C"), name=f"c{len(values)}")
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=f"n{len(nodes)}")
        node.outputs[0].name = f"c{len(values)}"
        values[value] = node.outputs[0]
        nodes.append(node)
    for source in found.nodes:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in source.attributes.values()):
            return None
        operands = [None if v is None else values[v] for v in source.inputs]
        node = ir.Node(source.domain, source.op_type, operands, list(source.attributes.values()),
                       num_outputs=len(source.outputs), name=f"n{len(nodes)}")  # fmt: skip
        for old, new in zip(source.outputs, node.outputs, strict=True):
            new.name = f"t{len(values)}"
            values[old] = new
        nodes.append(node)
    output = values[target_of(site).native]
    text = "\n".join(str(n.op_type) + repr([(a.name, str(a.value)) for a in n.attributes.values()]) + repr(
        [v.name if v is not None else None for v in n.inputs]) for n in nodes)  # fmt: skip
    name = f"{site.norm.kind}_as_written_{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
    inputs = [values[v.native] for v in found.boundary]
    graph = ir.Graph(inputs, [output], nodes=nodes, opset_imports={"": opset}, name="")
    function = ir.Function("normfuse", name, graph=graph, attributes=[])
    function.doc_string = "a norm with the order of roundings of the model it was found in"
    return function, found.boundary
