"""The ONNX front end: from an `onnx_ir` model to neutral graphs, one per graph and control-flow sub-graph.

The model is only read here; `normfuse.frontends.onnx_emit` edits it. Opsets 9 to the newest: axes as attributes or
as inputs, default attributes filled in, constants folded. An initializer that is also a graph input may be overridden
by the caller, so it is never taken for a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from normfuse.frontends.onnx_branches import BRANCHES, agreed, is_if
from normfuse.frontends.onnx_contrib import CONTRIB
from normfuse.frontends.onnx_functions import function_body
from normfuse.frontends.onnx_ops import OPS, Row
from normfuse.frontends.onnx_values import OutOfOrder, Values
from normfuse.frontends.onnx_views import product_shape
from normfuse.graph import Value

MAX_DEPTH = 64
"""Control flow nested deeper than this is left alone."""
SORTED = "normfuse.sorted"
"""In the `meta` of a model: `lower` has put its nodes in order."""


def node_label(node: ir.Node) -> str:
    """What to call a node in a message: its name, or its operator and output where it has none."""
    return node.name or f"{node.op_type}({node.outputs[0].name if node.outputs else ''})"


class Lowering(Values):
    """Builds the neutral graph of one ONNX graph.

    `outer` is the lowering of the graph around, `path` the place in it, and `mapped` whether this is the body of a
    SequenceMap. One that is `flat` has the branches of its Ifs in its own neutral graph: they are lowered as `part` of
    it.
    """

    def __init__(self, source: ir.Graph, outer: Lowering | None = None, path: tuple[str, ...] = (),
                 mapped: bool = False, flat: bool = False, part: bool = False) -> None:  # fmt: skip
        super().__init__(source, outer, path, part)
        self.flat, self.mapped = flat, mapped
        self.place = ""  # for messages
        if outer is not None:
            name, role, _ = path[-1].rsplit(".", 2)
            self.place = f" in {role} of {name}{outer.place}"
        self.inner: list[Lowering] = []
        for node in source:
            self._lower(node)
        for output in source.outputs:
            if output in self.values:
                self.values[output].kept = True
        for node in reversed(self.folded):  # the model still computes it, from a constant that it reads
            made = self.values[node.outputs[0]]
            for operand in node.inputs if made.kept or made.uses else ():
                if operand in self.values:
                    self.values[operand].kept = True

    def emit(self, kind: str, inputs: list[Value], output: Value, node: ir.Node, **attrs: Any) -> None:
        """Append a neutral node for an ONNX node."""
        origin = self.call or node
        output.fixed = all(v.fixed for v in inputs)
        self.graph.node(kind, inputs, [output], native=origin, op=origin.op_type, name=self.label(origin), **attrs)

    def chain(self, kind: str, inputs: Sequence[Value], node: ir.Node, virtual: bool = False) -> Value:
        """A left fold of a binary kind over any number of operands."""
        left = inputs[0]
        shape = product_shape([v.shape for v in inputs])
        for i, right in enumerate(inputs[1:], 2):
            last = i == len(inputs) and not virtual
            out = self.output(node, shape, left.dtype) if last else self.virtual(shape, left.dtype)
            self.emit(kind, [left, right], out, node)
            left = out
        if len(inputs) == 1:
            self.emit("identity", [left], self.output(node, left.shape, left.dtype), node)
        return left

    def opaque(self, node: ir.Node, kind: str = "opaque") -> None:
        """A node about which the core assumes nothing."""
        self.join(kind, self.inputs(node), [self.bind(v, None, None) for v in node.outputs], node)

    def join(self, kind: str, inputs: list[Value], outputs: list[Value], node: ir.Node) -> None:
        """Append a neutral node with several outputs for an ONNX node."""
        origin = self.call or node
        self.graph.node(kind, inputs, outputs, native=origin, op=origin.op_type, name=self.label(origin))

    def note(self, code: str, node: ir.Node, message: str) -> None:
        """A refusal that the front end itself has to make."""
        self.graph.notes.append((code, self.label(node), message))

    def label(self, node: ir.Node) -> str:
        """What to call a node in a message, and in which sub-graph it stands: two branches may share names."""
        return node_label(node) + self.place

    def parts(self) -> Iterator[Lowering]:
        """Itself, and what was lowered as a part of it."""
        yield self
        yield from (low for low in self.inner if low.graph is self.graph)

    def _lower(self, node: ir.Node) -> None:
        if self.constant(node):
            return
        row = _row(node)
        if row is None and node.domain not in ("", "ai.onnx") and self._inline(node):
            return
        if row is None or not node.outputs:
            self._capture(node)
            self.opaque(node)
            return
        before = len(self.graph.nodes)
        row(self, node)
        for extra in node.outputs:
            if extra not in self.values:
                found = self.bind(extra, None, None)
                if len(self.graph.nodes) > before:
                    self.graph.nodes[-1].outputs.append(found)
                    found.producer = self.graph.nodes[-1]

    def _inline(self, node: ir.Node) -> bool:
        """Lower a call of one of our functions as its body, all of it on account of the call."""
        function = self.source.meta.get("normfuse.functions", {}).get(node.op_identifier())
        if function is None or self.call is not None or len(node.inputs) > len(function.inputs):
            return False
        body = function_body(function, node)
        if body is None:
            return False
        inputs, nodes, outputs = body
        for formal, actual in zip(inputs, node.inputs, strict=False):
            if actual is not None:
                self.values[formal] = self.value(actual)
                if actual in self.arrays:
                    self.arrays[formal] = self.arrays[actual]
        self.call = node
        for inner in nodes:
            self._lower(inner)
        self.call = None
        for formal, actual in zip(outputs, node.outputs, strict=False):
            found = self.values[formal]
            found.native, found.name = actual, actual.name or ""
            self.values[actual] = found
        return True

    def _capture(self, node: ir.Node) -> None:
        """Values that a sub-graph reads from this graph are in use."""
        output = node.outputs[0].name or "" if node.outputs else ""
        inner_graphs = [((*self.path, f"{output}.{a.name}.{i}"), g) for a in node.attributes.values()
                        for i, g in enumerate(_subgraphs(a))]  # fmt: skip
        mapped = node.op_type == "SequenceMap"
        flat = self.flat and is_if(node)
        inner = [Lowering(graph, self, path, mapped, part=flat) for path, graph in inner_graphs
                 if len(path) <= MAX_DEPTH]  # fmt: skip
        self.inner += inner
        if is_if(node) and len(inner) == 2:
            truth = self.arrays.get(node.inputs[0]) if node.inputs[0] is not None else None
            first = node.attributes[BRANCHES[0]].value
            self.local[node] = agreed(node, [low for low in inner if truth is None or (low.source is first) == truth])
        todo = [] if flat else [graph for _, graph in inner_graphs]
        while todo:
            graph = todo.pop()
            for value in graph.outputs:
                if value in self.values:
                    self._captured(self.values[value])
            for part in graph:
                for operand in part.inputs:
                    if operand is not None and operand in self.values:
                        self._captured(self.values[operand])
                todo.extend(g for a in part.attributes.values() for g in _subgraphs(a))

    def _captured(self, value: Value) -> None:
        value.kept = True
        if value.captured is None:
            value.captured = len(self.graph.nodes)

def _row(node: ir.Node) -> Row | None:
    """How to lower an operator, where the tables have it."""
    name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    return OPS.get(name) or CONTRIB.get(name)


def _subgraphs(attr: ir.Attr) -> list[ir.Graph]:
    if attr.type == ir.AttributeType.GRAPH:
        return [attr.value]
    return list(attr.value) if attr.type == ir.AttributeType.GRAPHS else []


def lower(model: ir.Model, flat: bool = False) -> list[Lowering]:
    """The neutral graphs of a model: the main graph first, then its control-flow sub-graphs; `flat`, the branches of
    the main graph's Ifs are part of it.

    Nodes that are not in topological order are put into it, in the model itself. ONNX demands that order, but ONNX
    Runtime does not, and its own converter to float16 appends casts at the end. Raises `InputError` for a cycle.
    """
    try:
        return _lowered(model, flat)
    except OutOfOrder as why:
        try:
            model.graph.sort()
        except ValueError:
            raise why from None
        model.meta[SORTED] = True
        return _lowered(model, flat)


def _lowered(model: ir.Model, flat: bool) -> list[Lowering]:
    if model.functions:
        for graph in model.graphs():
            graph.meta["normfuse.functions"] = model.functions
    first = Lowering(model.graph, flat=flat)
    return [first, *(low for low in _nested(first) if low.graph is not first.graph)]


def _nested(outer: Lowering) -> Iterator[Lowering]:
    """The lowerings of the graphs inside of one."""
    for inner in outer.inner:
        yield inner
        yield from _nested(inner)
