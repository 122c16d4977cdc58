"""Carrying out a plan on an ONNX graph: standard operators where the opset has them, model-local functions below.

- `LayerNormalization` from opset 17, `RMSNormalization` from opset 23, over trailing axes. Both round to the type of
  x before the weight, and compute in `stash_type`; any other order of casts is Cast -> norm -> Cast.
- Otherwise a function in domain "normfuse" whose body is the meaning in operators of the model's own opset, so that
  every runtime runs the result and the opset stays as it is.

Names, types and shapes of the values that stay are kept; a new node takes over the metadata of the one it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.errors import UnsupportedError
from normfuse.frontends.onnx_infer import DTYPES
from normfuse.frontends.onnx_functions import Constant, function_for, operators_for
from normfuse.frontends.onnx_region import rest_of
from normfuse.graph import Node, Shape, Value
from normfuse.norm import Expr, Norm, plain, reads_x

NATIVE = {"layer_norm": ("LayerNormalization", 17), "rms_norm": ("RMSNormalization", 23)}
DOMAIN = "normfuse"
SPREAD = 2**18
"""How many elements a row over several axes may have for its weight to be spread over it."""
Rows = Callable[[Expr, str, str], ir.Value]
"""Gives the value of a weight or bias in a type; the last argument says which it is."""


class Emitter:
    """Makes the ONNX nodes of norms for one model; functions and initializers they need collect here."""

    def __init__(self, opset: int, spelled: bool = False, fold: bool = True, inline: bool = False) -> None:
        self.opset = opset
        self.inline = inline  # write the operators of a function in its place
        self.fold = fold  # make a computed weight a constant
        self.spelled = spelled  # write every norm as a function, whose body any evaluator can run in any type
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}
        self.portable = False  # a LayerNorm with statistics in float16 is a function: the standard has no such operator
        self.unseen = False  # LayerNorms are written so that ONNX Runtime does not make one operator of them
        self.constants: dict[tuple[Any, ...], ir.Value] = {}
        self.exact: dict[ir.Value, np.ndarray[Any, Any]] = {}  # what the constants were rounded from
        self.fresh: list[ir.Value] = []

    def expressible(self, norm: Norm, value: Value) -> tuple[str, str] | None:
        """Why a norm has no form here, as (code, message), or None."""
        if value.shape is None or norm.x.shape is None:
            return "NF115", "the shape of the norm is not known"
        if norm.x.native is None or any(v.native is None for v in norm.parameters()):
            return "NF202", "the norm reads a value inside another operator"
        for step in rest_of(value):
            if step.kind not in ("cast", "mul", "add") or any(v.native is None for v in step.inputs[1:]):
                return "NF202", "the norm ends inside another operator"
        if norm.dtype not in DTYPES or norm.x.dtype not in DTYPES:
            return "NF113", f"the type {norm.dtype} is not a float type"
        if self._lined_up(norm) and not all(_reaches(v, norm) for v in norm.parameters()):
            return "NF202", "the weight does not line up with the normalised axes of the operator"
        return None

    def _lined_up(self, norm: Norm) -> bool:
        """Whether weight and bias are broadcast to x as they stand, and not made as long as a row."""
        return not self._trailing(norm) or norm.size is None

    def _as_it_is(self, norm: Norm, expr: Expr | None = None) -> bool:
        """The same, or because that would take more memory, or, in a function, time: if the parameters have no axes
        that x has not."""
        function = not self.spelled and self.opset < NATIVE[norm.kind][1]
        fits = all(_reaches(v, norm) for _, factors in expr or () for v, _ in factors)
        return self._lined_up(norm) or (fits and spread(norm, 0 if function else None))

    @staticmethod
    def _trailing(norm: Norm) -> bool:
        rank = len(norm.x.shape or ())
        return norm.axes == tuple(range(rank - len(norm.axes), rank))

    def native(self, norm: Norm) -> bool:
        """Whether a standard operator of this opset computes the norm."""
        fits = self._trailing(norm) and norm.size is not None and not spread(norm)
        fits = fits and not (self.portable and _seldom(norm))
        return fits and self.has(norm.kind)

    def has(self, kind: str) -> bool:
        """Whether there is a standard operator of a kind, for some norms."""
        return not self.spelled and self.opset >= NATIVE[kind][1]

    def gives_statistics(self, norm: Norm) -> bool:
        """Whether the operator also gives the mean and the reciprocal of the standard deviation: never in float64."""
        return self.native(norm) and norm.compute in ("float32", "bfloat16")

    def form(self, norm: Norm, native: bool | None = None) -> list[str]:
        """The operators that a norm becomes, but for the making of its weight; or would, were it `native`."""
        inner, wide = inside(norm)
        native = self.native(norm) if native is None else native
        names = ["Cast"] if not reads_x(norm) and norm.x.dtype != norm.compute else []
        if self.inline and not native:
            scale, bias = (None if e is None or wide else ir.Value() for e in (norm.weight, norm.bias))
            bias = None if norm.kind == "rms_norm" else bias
            made = self._operators(norm, ir.Value(), scale, bias, lambda *_: ir.Value())
            names += [node.op_type for node in made]
        else:
            names.append(NATIVE[norm.kind][0] if native else f"function {DOMAIN}.{norm.kind}")
        if norm.kind == "rms_norm" and norm.bias is not None and not wide:
            names.append("Add")
        names += ["Cast"] * len(_casts(norm, inner))
        return names + [op for op, expr in (("Mul", norm.weight), ("Add", norm.bias)) if wide and expr is not None]

    @staticmethod
    def name_of(node: ir.Node) -> str:
        """The name in `form` of a node of a model."""
        kind = next((kind for kind in NATIVE if node.op_type.startswith(kind)), node.op_type)
        return f"function {DOMAIN}.{kind}" if node.domain == DOMAIN else node.op_type

    def emit(self, norm: Norm, x: ir.Value, params: Mapping[Value, ir.Value], name: str,
             statistics: bool = False, rows: Rows | None = None, eps: str = "") -> list[ir.Node]:  # fmt: skip
        """Nodes that compute the norm of x; the last one's first output is the result.

        With `statistics` the operator also gives the mean and the reciprocal of the standard deviation. In the body of
        a function `rows` gives its inputs, instead of values made from `params`, and `eps` is an attribute of its call.
        """
        nodes: list[ir.Node] = []
        rows = rows or (lambda expr, dtype, which: self.row(nodes, norm, expr, params, dtype, f"{name}/{which}"))
        inner, wide = inside(norm)
        if not reads_x(norm) and norm.x.dtype != norm.compute:
            x = self._cast(nodes, x, norm.compute, f"{name}/upcast")
        native = self.native(norm)
        rms_bias = norm.kind == "rms_norm" and norm.bias is not None
        weight = bias = None
        if norm.weight is not None and not wide:
            weight = rows(norm.weight, inner, "weight")
        elif native:
            weight = self.constant(np.ones(_width(norm)), inner, "ones")
        if norm.bias is not None and not wide:
            bias = rows(norm.bias, inner, "bias")
        inputs = [v for v in (x, weight, None if rms_bias else bias) if v is not None]
        attrs = [ir.RefAttr("epsilon", eps, ir.AttributeType.FLOAT) if eps else ir.AttrFloat32("epsilon", norm.eps)]
        stash = norm.compute
        if native:
            attrs = [ir.AttrInt64("axis", -len(norm.axes)), *attrs]
            if stash != "float32":
                attrs.append(ir.AttrInt64("stash_type", DTYPES[stash].value))
            outputs = 3 if statistics else 1
            nodes.append(ir.Node("", NATIVE[norm.kind][0], inputs, attrs, num_outputs=outputs, name=name))
        elif self.inline:
            made = self._operators(norm, x, weight, None if rms_bias else bias, self.constant)
            for node in made:
                node.name = f"{name}/{node.op_type.lower()}"
            nodes += made
        else:
            key = (norm.kind, weight is not None, bias is not None and not rms_bias, inner, stash, self.opset)
            function = function_for(*key, norm.eps, self._unseen(norm))
            self.functions[function.identifier()] = function
            attrs = [ir.AttrInt64s("axes", _from_the_end(norm)), *attrs]
            nodes.append(ir.Node(DOMAIN, function.name, inputs, attrs, name=name))
        y = nodes[-1].outputs[0]
        if rms_bias and bias is not None:
            nodes.append(ir.Node("", "Add", [y, bias], name=f"{name}/add"))
            y = nodes[-1].outputs[0]
        for dtype in _casts(norm, inner):
            y = self._cast(nodes, y, dtype, f"{name}/downcast")
        for op, expr in (("Mul", norm.weight), ("Add", norm.bias)) if wide else ():
            if expr is not None:
                operand = rows(expr, norm.dtype, op.lower())
                y = self._node(nodes, op, [y, operand], name)
        return nodes

    def _unseen(self, norm: Norm) -> bool:
        """Whether ONNX Runtime is not to make one operator of a norm: its own takes the last axis of several."""
        last = norm.axes == (len(norm.x.shape or ()) - 1,) and norm.axes != (0,)
        return (self.unseen and norm.kind == "layer_norm") or not last

    def _operators(self, norm: Norm, x: ir.Value, scale: ir.Value | None, bias: ir.Value | None,
                   constant: Constant) -> list[ir.Node]:  # fmt: skip
        """What the function of a norm is made of."""
        return operators_for(norm.kind, x, scale, bias, inside(norm)[0], norm.compute or "", self.opset, norm.eps,
                             self._unseen(norm), _from_the_end(norm), constant)  # fmt: skip

    def call(self, function: ir.Function, inputs: list[ir.Value], name: str) -> list[ir.Node]:
        """A node that calls a function made of the model's own nodes."""
        self.functions[function.identifier()] = function
        return [ir.Node(DOMAIN, function.name, inputs, name=name)]

    def tail(self, nodes: list[ir.Node], rest: Sequence[Node], params: Mapping[Value, ir.Value], name: str) -> None:
        """The stages of a norm operator behind the value that was replaced: its cast, scale and shift."""
        for step in rest:
            y = nodes[-1].outputs[0]
            if step.kind == "cast":
                self._cast(nodes, y, step.outputs[0].dtype or "", f"{name}/cast")
            else:
                other = step.inputs[1]
                self._node(nodes, step.kind.capitalize(), [y, params.get(other, other.native)], name)

    def constant(self, array: np.ndarray[Any, Any], dtype: str, hint: str) -> ir.Value:
        """A new initializer, shared by all who ask for the same one."""
        with np.errstate(over="ignore"):  # an infinity is told by the check
            data = array.astype(DTYPES[dtype].numpy())
        key = (hint, dtype, data.shape, array.tobytes())
        if key not in self.constants:
            name = f"normfuse_{hint}_{len(self.constants)}"
            value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(DTYPES[dtype]),
                             const_value=ir.Tensor(data, dtype=DTYPES[dtype], name=name))  # fmt: skip
            self.constants[key], self.exact[value] = value, array
            self.fresh.append(value)
        return self.constants[key]

    def _cast(self, nodes: list[ir.Node], value: ir.Value, dtype: str, name: str) -> ir.Value:
        nodes.append(ir.Node("", "Cast", [value], [ir.AttrInt64("to", DTYPES[dtype].value)], name=name))
        return nodes[-1].outputs[0]

    def _node(self, nodes: list[ir.Node], op: str, inputs: Iterable[ir.Value], name: str) -> ir.Value:
        nodes.append(ir.Node("", op, list(inputs), name=f"{name}/{op.lower()}"))
        return nodes[-1].outputs[0]

    def row(self, nodes: list[ir.Node], norm: Norm, expr: Expr, params: Mapping[Value, ir.Value], dtype: str,
            name: str) -> ir.Value:  # fmt: skip
        """The value of a weight or bias in the shape and type that the operator wants."""
        if plain(expr):
            given_as = self.spelled or self._lined_up(norm)  # along inner axes a view of it is what lines up
            base = expr[0][1][0][0] if given_as else _unviewed(expr[0][1][0][0], norm)
            given: ir.Value = params.get(base, base.native)
            as_it_is = self._as_it_is(norm, ((1.0, ((base, 1),)),))
            if base.dtype == dtype and (as_it_is or base.shape == _shape(norm)):
                return given
            if as_it_is:
                return self._cast(nodes, given, dtype, f"{name}/cast")
        folded = evaluate(expr, norm) if self.fold and not self.spelled and not self._lined_up(norm) else None
        if folded is not None:
            return self.constant(_narrowed(folded) if self._as_it_is(norm) else folded, dtype, "folded")
        total: ir.Value | None = None
        several, width = len({v for _, factors in expr for v, _ in factors}) > 1, _width(norm)
        for c, factors in expr:
            term: ir.Value | None = None
            for value, exponent in factors:
                operand = params.get(value, value.native)
                if several and not _reaches(value, norm) and _numel(value.shape) == math.prod(width) != 1:
                    shape = self.constant(np.array(width), "int64", "shape")
                    operand = self._node(nodes, "Reshape", [operand, shape], name)
                if value.dtype != dtype:
                    operand = self._cast(nodes, operand, dtype, f"{name}/cast")
                for _ in range(abs(exponent)):
                    if term is None:
                        term = operand if exponent > 0 else self._node(nodes, "Reciprocal", [operand], name)
                    else:
                        term = self._node(nodes, "Mul" if exponent > 0 else "Div", [term, operand], name)
            if term is None or c != 1:
                number = self.constant(np.array(c), dtype, "number")
                term = number if term is None else self._node(nodes, "Mul", [term, number], name)
            total = term if total is None else self._node(nodes, "Add", [total, term], name)
        assert total is not None
        if self._as_it_is(norm, expr):
            return total
        if any(_numel(v.shape) == math.prod(_width(norm)) != 1 and v.shape != _shape(norm)
               for _, factors in expr for v, _ in factors):  # fmt: skip
            shape = self.constant(np.array(_width(norm)), "int64", "shape")
            return self._node(nodes, "Reshape", [total, shape], name)
        total = self._node(nodes, "Mul", [total, self.constant(np.ones(_width(norm)), dtype, "ones")], name)
        if any(len(v.shape or ()) > len(norm.axes) for _, factors in expr for v, _ in factors):
            shape = self.constant(np.array(_width(norm)), "int64", "shape")
            total = self._node(nodes, "Reshape", [total, shape], name)
        return total


def inside(norm: Norm) -> tuple[str, bool]:
    """The type that an operator for a norm gives, and whether weight and bias are applied behind it, by other nodes.

    They are where they come after a cast back that the operator does not make, or are of a wider type than it gives.
    """
    inner = (norm.x.dtype if reads_x(norm) else norm.compute) or ""
    return inner, norm.cast == "first" and not inner == norm.narrow == norm.dtype


def _seldom(norm: Norm) -> bool:
    """Whether a standard operator is not to be had everywhere for the types of a norm: statistics are float32 or
    bfloat16 by the standard, and ONNX Runtime has no RMSNormalization of bfloat16 on the CPU, where models of which it
    is the weight's type do not run either."""
    inner, wide = inside(norm)
    without = inner == "bfloat16" and (norm.weight is None or wide)
    return norm.compute == "float64" or (norm.compute == "float16" if norm.kind == "layer_norm" else without)


def _casts(norm: Norm, inner: str) -> list[str]:
    """The types that the result of the operator is cast to, in order."""
    return [b for a, b in pairwise((inner, norm.narrow or inner, norm.dtype)) if a != b]


def _from_the_end(norm: Norm) -> list[int]:
    """The axes of a norm, from the end."""
    return [axis - len(norm.x.shape or ()) for axis in norm.axes]


def _shape(norm: Norm) -> tuple[Any, ...]:
    assert norm.x.shape is not None
    return tuple(norm.x.shape[a] for a in norm.axes)


def spread(norm: Norm, most: int | None = None) -> bool:
    """Whether the operator, which wants a weight for each element of a row, would get one much larger than what it is
    made of, and than `most`: a file that holds a vector of channels does not get a large image of them."""
    if len(norm.axes) < 2 or (norm.size or 0) <= (SPREAD if most is None else most):
        return False
    rows = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
    return any(expr is None or all(_numel(v.shape) != norm.size for _, factors in expr for v, _ in factors)
               for expr in rows)  # fmt: skip


def _narrowed(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same with one element along each axis along which all are equal."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        array = first if (array == first).all() else array
    return array


def _numel(shape: Shape | None) -> int | None:
    sizes = [d for d in shape or () if isinstance(d, int)]
    return math.prod(sizes) if shape is not None and len(sizes) == len(shape) else None


def _width(norm: Norm) -> list[int]:
    return [d for d in _shape(norm) if isinstance(d, int)]


def _unviewed(value: Value, norm: Norm) -> Value:
    """The parameter behind reshapes, if one of the normalised shape stands there."""
    current = value
    for _ in range(8):
        if current.shape == _shape(norm):
            return current
        node = current.producer
        if node is None or node.kind not in ("reshape", "unsqueeze", "squeeze", "identity"):
            break
        current = node.inputs[0]
    return value


def _reaches(value: Value, norm: Norm) -> bool:
    """Whether a parameter, as it stands, broadcasts along the normalised axes of x only."""
    x = norm.x.shape
    if x is None or value.shape is None or len(value.shape) > len(x):
        return False
    offset = len(x) - len(value.shape)
    return all(d == 1 or (i + offset in norm.axes and d == x[i + offset]) for i, d in enumerate(value.shape))


def evaluate(expr: Expr, norm: Norm) -> np.ndarray[Any, Any] | None:
    """The elements of a weight made of initializers, in float64, spread over the normalised shape."""
    total = np.zeros(_width(norm))
    for c, factors in expr:
        term = np.full((), c)
        for value, exponent in factors:
            tensor = value.native.const_value if value.leaf and value.fixed and value.native is not None else None
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or value.native.producer() is not None:
                return None
            array = np.asarray(tensor.numpy()).astype(np.float64)
            while array.ndim > len(norm.axes) and array.shape[0] == 1:
                array = array[0]
            term = term * (array.reshape(_width(norm)) if array.size == total.size else array) ** exponent
        total = total + term
    return total


def register_functions(model: ir.Model, functions: Sequence[ir.Function]) -> None:
    """Add functions to a model, with the domain import and the IR version they need."""
    if not functions:
        return
    for function in functions:
        known = model.functions.get(function.identifier())
        if known is not None and _body(known) != _body(function):
            raise UnsupportedError(f"the model has a function {function.domain}.{function.name} of its own, which does "
                                   "something else than ours of that name; inline it (onnx.inliner) or rename it")
        model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    model.ir_version = max(model.ir_version, 8)


def _body(function: ir.Function) -> bytes:
    """What a function does. Of which opset is the model's business: a file may have been given another since."""
    proto = ir.to_proto(function)
    for field in ("doc_string", "metadata_props", "value_info", "opset_import"):
        proto.ClearField(field)
    for node in proto.node:
        for field in ("name", "doc_string", "metadata_props"):
            node.ClearField(field)
    return bytes(proto.SerializeToString(deterministic=True))


def unique(name: str, used: set[str | None]) -> str:
    """A name that is not used yet; it is now."""
    found, i = name, 1
    while found in used:
        i += 1
        found = f"{name}_{i}"
    used.add(found)
    return found


def discard(nodes: Iterable[ir.Node], needed: Collection[ir.Node]) -> None:
    """Delete nodes that nobody reads, then the constants and initializers that only they read, and what these are made
    of, but what is `needed`."""
    todo, gone, homes = list(nodes), set[ir.Node](), dict[ir.Graph, list[ir.Node]]()
    while todo:
        node = todo.pop(0)
        if node.graph is None or node in gone or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        operands = [v for v in node.inputs if v is not None]
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)
        gone.add(node)
        homes.setdefault(node.graph, []).append(node)
        for v in operands:
            producer = v.producer()
            if v.uses() or v.is_graph_output():
                continue
            if producer is not None and producer not in needed:
                todo.append(producer)
            elif v.is_initializer() and not v.is_graph_input() and v.graph is not None:
                v.graph.initializers.pop(v.name or "")
    for graph, removed in homes.items():  # at once: each time it looks at all outputs
        graph.remove(removed)


def names_of(graphs: Iterable[ir.Graph]) -> set[str | None]:
    """The names of all values of graphs, inputs and initializers included."""
    used: set[str | None] = set()
    for graph in graphs:
        used.update(v.name for v in (*graph.inputs, *graph.initializers.values()))
        used.update(v.name for node in graph for v in node.outputs)
    return used


def respell(node: ir.Node, nodes: Sequence[ir.Node], results: Mapping[ir.Value, ir.Value],
            used: set[str | None]) -> None:  # fmt: skip
    """Put nodes, the last of which is given its name, in the place of one, and values in that of its outputs."""
    assert node.graph is not None
    for i, new in enumerate(nodes):
        new.outputs[0].name = unique(f"{node.outputs[0].name}_{i}", used)
        new.name = f"{node.name or node.outputs[0].name}/{i}"
        new.metadata_props.update(node.metadata_props)
    nodes[-1].name, nodes[-1].doc_string = node.name, node.doc_string
    node.graph.insert_before(node, nodes)
    for old, value in results.items():
        value.name, value.shape, value.type = old.name, old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    discard([node], ())
