"""The operators of `normfuse.ops` in ONNX graphs: calls of model-local functions in domain "normfuse".

A function has the name of the torch operator, the operator's tensors that are there as inputs, in the same order, and
`eps` as attribute; one that adds a linear layer's bias to x first is a `bias_add_...`, with it after the residual. Its
body is what `normfuse.ops.meaning` says, each norm as `Emitter` would write it alone: standard operators of the model's
own opset, every rounding where the model has it. What else a body depends on is in its name:
`norm_add_layer_norm_f16_in_f32_first`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from normfuse.facts import number
from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_emit import DOMAIN, Emitter, inside
from normfuse.frontends.onnx_functions import SHORT, function_body
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.graph import Shape, Value
from normfuse.norm import Expr, Norm, Site
from normfuse.plan import Fused, Reason

ROLES = {(True, True): "both", (True, False): "scale", (False, True): "bias", (False, False): "plain"}
INPUTS = {"norm": ("x",), "qk_norm": ("q", "k")}
FIRST_WITH_EPS = 12
"""The opset from which a Constant takes an attribute of the call."""


class FusedEmitter:
    """What can be made with the functions of one model, and the making. `exact`: every rounding is to stay."""

    def __init__(self, emitter: Emitter, exact: bool = True) -> None:
        self.emitter, self.exact = emitter, exact
        self.places: dict[Lowering, dict[ir.Node, int]] = {}  # a graph that is changed is read again

    def unfit(self, low: Lowering, edit: Fused) -> Reason | None:
        """Why an edit has no operator here, as (code, message), or None."""
        for site in edit.sites:
            why = self.emitter.expressible(site.norm, site.value)
            if why is not None:
                return why
        message = self._unfit(low, edit)
        return None if message is None else ("NF202", message)

    def _unfit(self, low: Lowering, edit: Fused) -> str | None:
        norms = [site.norm for site in edit.sites]
        if edit.op == "norm" and (edit.sites[0].is_op or len(self.emitter.form(norms[0])) == 1):
            return "another operator is all that it needs"
        if any(norm.cast == "mixed" for norm in norms) and self.exact:
            return "no operator has this order of roundings"
        if len({_attributes(norm) for norm in norms}) > 1:
            return "the norms are not alike"
        if any(norm.narrow not in ("", narrow_of(edit)) for norm in norms):
            return f"it is cast to {norms[0].narrow} before the weight, and the functions cast to {narrow_of(edit)}"
        if edit.view is not None and not _reshaped(edit.view, edit.outputs[1]):
            return "between the sum and the norm stands more than a Reshape"
        for norm, site in zip(norms, edit.sites, strict=True):
            if norm.size is None or norm.axes != (len(norm.x.shape or ()) - 1,) or norm.axes == (0,):
                return "the operators normalise the last axis of two or more, of a known size"
            if site.value.native is None or not _alike(site.value.shape, norm.x.shape):
                return "a norm ends inside another operator or in another shape"
        for v in (*edit.inputs, *edit.results):
            free = edit.view is not None and v is edit.outputs[0]  # the model's own Reshape gives its shape
            if v.native is None or v.shape is None or (None in v.shape and not free):
                return "one of its tensors is inside another operator or of unknown shape"
        if not all(v.fixed or v.leaf for v in edit.parameters()):
            return "a weight is computed from the data"
        if edit.x_bias is not None and narrowed(edit.x_bias, edit.x_bias.native, narrow_of(edit)) is None:
            return "the bias of x is of another type"
        makers = {v.native.producer() for v in edit.results}
        if len(makers) < len(edit.results) or any(_is_fused(node) for node in makers):
            return "one operator gives it already"
        if any(self._reaches(low, edit, v.native) for v in edit.inputs):
            return "an input of it depends on a result"
        return None

    def _reaches(self, low: Lowering, edit: Fused, value: ir.Value) -> bool:
        """Whether a value depends on a result of an edit."""
        if low not in self.places:
            self.places[low] = {node: i for i, node in enumerate(low.source)}
        place = self.places[low]
        results = {v.native.producer() for v in edit.results}
        start = min(place[node] for node in results)
        todo, seen = [value], set()
        while todo:
            node = todo.pop().producer()
            if node in results:
                return True
            if node is not None and node not in seen and place.get(node, -1) > start:
                seen.add(node)
                todo += [v for v in _reads(node) if v is not None]
        return False

    def emit(self, edit: Fused, operands: Mapping[Value, ir.Value], name: str) -> list[ir.Node]:
        """Nodes that make the weights as the function wants them, and last its call, which gives the results.

        Behind the call of an `add_norm` may stand the model's own Reshape, of y instead of s: see `results`. Its target
        is `operands[edit.view]` where that is given.
        """
        nodes: list[ir.Node] = []
        given: list[ir.Value] = []
        body = _Body()

        def norm(i: int, x: ir.Value) -> ir.Value:
            spec = edit.sites[i].norm

            def rows(expr: Expr, dtype: str, which: str) -> ir.Value:
                label = ("weight" if expr is spec.weight else "bias") + ("" if len(edit.sites) == 1 else str(i + 1))
                given.append(self.emitter.row(nodes, spec, expr, operands, dtype, f"{name}/{label}"))
                return body.input(label)

            # an operator's weight is of the type of its x, and a function has no initializer for one that is missing
            bare = spec.weight is None or inside(spec)[1]
            alone = Emitter(self.emitter.opset, self.emitter.spelled or bare)
            alone.unseen = self.emitter.unseen
            eps = "eps" if self.emitter.opset >= FIRST_WITH_EPS else ""
            return body.take(alone.emit(spec, x, operands, name, rows=rows, eps=eps), alone)

        given += [operands[v] for v in edit.inputs]
        x, *other = [body.input(label) for label in INPUTS.get(edit.op, ("x", "residual"))]
        summands = [x, *other]
        if edit.x_bias is not None:
            bias = operands[edit.x_bias]
            given.append(narrowed(edit.x_bias, bias, narrow_of(edit)) or bias)
            summands.insert(1, body.input("x_bias"))
        if edit.op == "norm":
            results = [norm(0, x)]
        elif edit.op == "qk_norm":
            results = [norm(0, x), norm(1, *other)]
        elif edit.op == "add_norm" and edit.round_sum:
            s = body.sum(*summands)
            results = [norm(0, s), s]
        elif edit.op == "add_norm":
            s = body.sum(*(body.cast(v, edit.sites[0].norm.x.dtype) for v in summands))
            results = [norm(0, s), body.cast(s, edit.outputs[1].dtype)]
        else:
            s = body.op("Add", *other, norm(0, x))
            results = [s] if edit.op == "norm_add" else [norm(1, s), s]
        function = body.function(function_name(edit, self.emitter.opset), results, self.emitter.opset)
        self.emitter.functions[function.identifier()] = function
        attributes = [ir.AttrFloat32("eps", edit.sites[0].norm.eps)] if function.attributes else []
        nodes.append(ir.Node(DOMAIN, function.name, given, attributes, num_outputs=len(results), name=name))
        for unread in nodes[-1].outputs[len(edit.results) :]:
            unread.name = f"{name}/sum"
        if edit.view is not None:
            model: ir.Node = edit.view.native.producer()
            target = operands.get(edit.view, model.inputs[1])
            nodes.append(ir.Node("", model.op_type, [nodes[-1].outputs[0], target], list(model.attributes.values()),
                                 name=f"{name}/view"))  # fmt: skip
        return nodes

    def results(self, edit: Fused, nodes: Sequence[ir.Node]) -> Sequence[ir.Value]:
        """What the nodes of an edit give in the place of its results."""
        last = nodes[-1].outputs[: len(edit.results)]
        return last if edit.view is None else [*last, nodes[-2].outputs[1]]

    def label(self, edit: Fused) -> str:
        """What stands there now, for the report."""
        return f"function {DOMAIN}.{edit.name}"


class _Body:
    """Inputs and nodes of a function."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def input(self, name: str) -> ir.Value:
        self.inputs.append(ir.Value(name=name))
        return self.inputs[-1]

    def op(self, name: str, *inputs: ir.Value, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        self.nodes.append(ir.Node("", name, inputs, attributes))
        return self.nodes[-1].outputs[0]

    def sum(self, first: ir.Value, *others: ir.Value) -> ir.Value:
        for other in others:
            first = self.op("Add", first, other)
        return first

    def cast(self, value: ir.Value, dtype: str | None) -> ir.Value:
        return self.op("Cast", value, attributes=[ir.AttrInt64("to", DTYPES[dtype or ""].value)])

    def take(self, nodes: list[ir.Node], emitter: Emitter) -> ir.Value:
        """Append nodes, calls of an emitter's functions as the functions' nodes; the result of the last."""
        result = nodes[-1].outputs[0]
        for node in nodes:
            function = emitter.functions.get(node.op_identifier())
            if function is None:
                self.nodes.append(node)
                continue
            copy = function_body(function, node)
            assert copy is not None
            formal, inner, (out,) = copy
            for value, actual in zip(formal, node.inputs, strict=True):
                assert actual is not None
                value.replace_all_uses_with(actual)
            node.outputs[0].replace_all_uses_with(out)
            result = out if result is node.outputs[0] else result
            self.nodes += inner
        return result

    def function(self, name: str, results: Sequence[ir.Value], opset: int) -> ir.Function:
        """The function of the nodes, named by position."""
        for i, node in enumerate(self.nodes):
            node.name, node.outputs[0].name = f"n{i}", f"v{i}"
        graph = ir.Graph(self.inputs, results, nodes=self.nodes, opset_imports={"": opset}, name="")
        eps = [ir.Attr("eps", ir.AttributeType.FLOAT, None)] if opset >= FIRST_WITH_EPS else []
        return ir.Function(DOMAIN, name, graph=graph, attributes=eps)


def function_name(edit: Fused, opset: int) -> str:
    """The name of a function: the operator's, then what departs from float32 norms with all their parameters."""
    norm = edit.sites[0].norm
    parts = [edit.name, *(["layer_norm"] if norm.kind == "layer_norm" and edit.name == edit.op else [])]
    roles = [(site.norm.weight is not None, site.norm.bias is not None) for site in edit.sites]
    if any(role != (True, norm.kind == "layer_norm") for role in roles):
        parts += [ROLES[role] for role in roles]
    types = [narrow_of(edit), norm.compute, norm.dtype]
    if types != ["float32"] * 3:
        x, compute, result = (SHORT[t] for t in types)
        parts += [x, "in", compute, norm.cast, *(["to", result] if result != x else [])]
    if not edit.round_sum:
        parts.append("unrounded")
    if opset < FIRST_WITH_EPS:
        parts.append("eps" + number(norm.eps).replace("-", "m").replace(".", "p"))
    return "_".join(parts)


def narrow_of(edit: Fused) -> str:
    """The type of what an operator normalises, or of the summands where it normalises their sum in a wider one."""
    return (edit.sites[0].norm.x if edit.round_sum else edit.inputs[0]).dtype or ""


def narrowed(value: Value, native: ir.Value | None, dtype: str) -> ir.Value | None:
    """A value of a type, or what is of that type and cast to the value; None for any other."""
    if value.dtype == dtype:
        return native
    node = None if native is None else native.producer()
    source = node.inputs[0] if node is not None and (node.domain, node.op_type) == ("", "Cast") else None
    return source if source is not None and source.dtype == DTYPES[dtype] else None


def _alike(a: Shape | None, b: Shape | None) -> bool:
    """Whether two shapes are the same as far as they are known."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(d == e or d is None or e is None for d, e in zip(a, b, strict=True))


def _reshaped(view: Value, source: Value) -> bool:
    """Whether a value of the graph is a Reshape of another."""
    node = None if view.native is None else view.native.producer()
    return node is not None and (node.domain, node.op_type) == ("", "Reshape") and node.inputs[0] is source.native


def _attributes(norm: Norm) -> tuple[object, ...]:
    """What the norms of one operator have in common."""
    return norm.kind, np.float32(norm.eps), norm.x.dtype, norm.compute, norm.cast, norm.narrow, norm.dtype


def fused_already(site: Site) -> str | None:
    """Why a norm inside one of these functions is left alone."""
    return "an operator of NormFuse gives it" if site.value.producer and _is_fused(site.value.producer.native) else None


def _is_fused(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and not node.op_type.startswith(("rms_norm", "layer_norm"))


def _reads(node: ir.Node) -> list[ir.Value | None]:
    """What a node reads, itself and in its sub-graphs."""
    found = list(node.inputs)
    for attr in node.attributes.values():
        graphs = {ir.AttributeType.GRAPH: [attr.value], ir.AttributeType.GRAPHS: attr.value}.get(attr.type, [])
        found += [v for graph in graphs for inner in RecursiveGraphIterator(graph) for v in inner.inputs]
    return found
