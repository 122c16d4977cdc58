"""What is known of the values of an ONNX graph: shapes and types, the elements of small constants, and the sizes that
small integer vectors hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from normfuse.errors import InputError
from normfuse.frontends.onnx_fold import FOLDS, MAX_ELEMENTS, attribute, constant_of, fold
from normfuse.frontends.onnx_infer import DTYPE_NAMES, Facts, infer_node
from normfuse.frontends.onnx_sizes import SIZES, rank_of, sizes_of
from normfuse.graph import FLOATS, Dim, Graph, Shape, Value
from normfuse.ort_values import Array
from normfuse.sessions import is_float

NUMBERS = ("MatMul", "InstanceNormalization", "BatchNormalization")
"""The operators that may read a tensor of one number as that number."""


class OutOfOrder(InputError):
    """A node reads what a later one computes."""


def shape_of(shape: ir.Shape | None) -> Shape | None:
    """The neutral form of an onnx_ir shape."""
    if shape is None:
        return None
    return tuple(_dim(d) for d in shape.dims)


def _dim(d: Any) -> Dim:
    """A size; "?" and -1 are how some exporters write that they do not know one."""
    if isinstance(d, int):
        return d if d >= 0 else None
    return None if d.value == "?" else d.value


class Values:
    """The values of one graph, and what is known of them.

    Shapes and types that the model does not state come of the operators' rows and, where these leave them open, of
    `onnx.shape_inference` of a node by itself. `outer` are those of the graph around, for the captures of a sub-graph,
    `path` its place; as a `part` of that they share all that is known.
    """

    def __init__(self, source: ir.Graph, outer: Values | None, path: tuple[str, ...], part: bool) -> None:
        self.source, self.outer, self.path = source, outer, path
        self.values: dict[ir.Value, Value] = {}
        self.arrays: dict[ir.Value, Array] = {}
        self.stated: set[str] | None = None
        self.sizes: dict[ir.Value, Shape] = {}  # what is known of small integer vectors that hold sizes
        self.graph = Graph(source.name or "", typed=True)
        if outer is not None and part:
            self.graph, self.values, self.arrays, self.sizes = outer.graph, outer.values, outer.arrays, outer.sizes
        self.call: ir.Node | None = None
        self.versions: dict[str, int] = outer.versions if outer is not None else dict(source.opset_imports)
        self.local: dict[ir.Node, dict[str, Facts]] = {}
        self.others: dict[str, Any] = dict(outer.others) if outer is not None else {}  # the types of what is no tensor
        self.open: set[str] = outer.open if outer is not None else {
            d for v in source.inputs for d in shape_of(v.shape) or () if isinstance(d, str)}  # fmt: skip
        self.folded: list[ir.Node] = []
        for value in source.inputs:
            self._leaf(value, fixed=False)
        for value in source.initializers.values():
            if value in self.values:
                self.values[value].overridable = True
            else:
                self._initializer(value)

    @staticmethod
    def dtype_name(dtype: ir.DataType | None) -> str:
        """The neutral name of a dtype."""
        return "?" if dtype is None else DTYPE_NAMES[dtype]

    def _facts(self, value: ir.Value, shape: Shape | None, dtype: str | None) -> tuple[Shape | None, str | None]:
        """Shape and dtype: the operator's row, or what `onnx` infers, and what the model states, merged axis by axis.

        Sizes win over symbols, and what follows from the inputs over what a `value_info` says. A number where the
        inputs have a symbol of their own may be left over from before they were made dynamic: it is not believed, but
        for the size of a row, which weights settle. A size of which nothing is known gets a symbol too: what is made of
        a value by additions and norms has its size, whatever that is.
        """
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            self._alone(value)
            self.others.setdefault(value.name or "", ir.to_proto(value).type)
        stated, kind = shape_of(value.shape), None if value.dtype is None else DTYPE_NAMES[value.dtype]
        if shape is None and (stated is None or (self.open and 1 in stated)):
            shape, own = self._alone(value)
            dtype = dtype or own
        known = [s for s in (shape, stated) if s is not None]
        known = [s for s in known if len(s) == len(known[0])]
        merged = []
        for axis, dims in enumerate(zip(*known, strict=True)):
            sizes, symbols = [d for d in dims if isinstance(d, int)], [d for d in dims if isinstance(d, str)]
            if shape is not None and dims[0] in self.open and (axis + 1 < len(shape) or 1 in sizes):
                sizes = []
            merged.append((sizes or symbols or [self.unknown(value.name or "", axis)])[0])
        return tuple(merged) if known else None, kind or dtype

    def _alone(self, value: ir.Value) -> Facts:
        """What `onnx` makes of the node of a value, from what is known of its operands."""
        node = value.producer()
        if node is None or node.graph is not self.source or self.call is not None:
            return None, None
        if node not in self.local:
            self.local[node] = {}  # while it is asked for
            given = {v.name or "": self.value(v) for v in node.inputs if v is not None}
            arrays = {v.name or "": self.arrays[v] for v in node.inputs if v in self.arrays}
            self.local[node] = infer_node(node, self.versions, given, arrays, self.others)
        name = value.name or ""
        shape, dtype = self.local[node].get(name, (None, None))
        if shape is not None:
            shape = tuple(self.unknown(name, i) if d is None else d for i, d in enumerate(shape))
        return shape, dtype

    def _leaf(self, value: ir.Value, fixed: bool, number: float | None = None) -> Value:
        shape, dtype = self._facts(value, None, None)
        found = self.graph.leaf(value.name or "", shape, dtype, fixed=fixed, number=number, native=value)
        self.values[value] = found
        return found

    def _initializer(self, value: ir.Value) -> None:
        tensor = value.const_value
        number = None
        if tensor is not None and tensor.dtype != ir.DataType.STRING:
            size, integer = tensor.size, tensor.dtype.is_integer()
            external = isinstance(tensor, ir.ExternalTensor)
            if size == 1 or (size <= MAX_ELEMENTS and not external) or (integer and size <= 64):
                self.arrays[value] = array = np.asarray(tensor.numpy())
                number = _number(array, self._may_be_number(value, array))
            elif not external and size <= 2**20 and self._may_be_number(value, tensor):
                number = _number(np.asarray(tensor.numpy()), True)
        found = self._leaf(value, fixed=True, number=number)
        if tensor is not None:  # it is what it is, whatever a value_info says of it
            found.shape = tuple(int(d) for d in tensor.shape.numpy())

    @staticmethod
    def _may_be_number(value: ir.Value, tensor: Any) -> bool:
        """Whether a uniform tensor may count as a number: as the factor of a product, or what an operator has for each
        row where channels are meant, not as a weight or bias."""
        if not len(tensor.shape):
            return False
        todo = [value]
        while todo:
            for node, _ in todo.pop().uses():
                if node.domain not in ("", "ai.onnx") or node.op_type not in (*NUMBERS, "Identity", "Transpose"):
                    return False
                todo += node.outputs if node.op_type not in NUMBERS else ()
        return True

    def value(self, value: ir.Value | None) -> Value:
        """The neutral value of an operand; one of an outer graph is captured as a leaf."""
        if value is None:
            return self.graph.leaf("", None, None)
        found = self.values.get(value)
        if found is None:
            source = value.producer()
            above: Values | None = self
            while above is not None and value not in above.values:
                if source is not None and source.graph is above.source:
                    raise OutOfOrder(f"{value.name!r} is read before it is computed: the graph has a cycle")
                above = above.outer
            known = above.values[value] if above is not None else None
            if above is not None and value in above.arrays:
                self.arrays[value] = above.arrays[value]
            if above is not None and value in above.sizes:
                self.sizes[value] = above.sizes[value]
            fixed = known is not None and known.fixed
            found = self._leaf(value, fixed, known.number if known is not None else None)
            if known is not None:
                found.shape, found.dtype = known.shape, known.dtype
        return found

    def inputs(self, node: ir.Node) -> list[Value]:
        """The operands of a node."""
        return [self.value(v) for v in node.inputs if v is not None]

    def array(self, value: ir.Value) -> Array | None:
        """The elements of a small constant."""
        self.value(value)
        return self.arrays.get(value)

    def bind(self, value: ir.Value, shape: Shape | None, dtype: str | None) -> Value:
        """The neutral value for the output of a node."""
        shape, dtype = self._facts(value, shape, dtype)
        found = self.graph.value(value.name or "", shape, dtype, native=None if self.call is not None else value)
        self.values[value] = found
        return found

    def unknown(self, name: str, axis: int = -1) -> Dim:
        """A symbol for a size of which nothing is known but that it is one; None where the model has that symbol, and
        in the body of a function, whose names each call has."""
        if self.call is not None:
            return None
        symbol, low = " ".join((f"{axis} of {name}", *self.path)), self
        while symbol not in low.symbols() and low.outer is not None:
            low = low.outer
        return None if symbol in low.symbols() else symbol

    def symbols(self) -> set[str]:
        """The sizes that the graph itself gives a name."""
        if self.stated is None:
            values = (*self.source.inputs, *(v for node in self.source for v in node.outputs))
            self.stated = {d for v in values for d in shape_of(v.shape) or () if isinstance(d, str)}
        return self.stated

    def output(self, node: ir.Node, shape: Shape | None, dtype: str | None) -> Value:
        """The neutral value for the first output of a node."""
        return self.bind(node.outputs[0], shape, dtype)

    def virtual(self, shape: Shape | None, dtype: str | None) -> Value:
        """A value that the model computes inside one operator."""
        return self.graph.value("", shape, dtype)

    def number(self, c: float, dtype: str | None) -> Value:
        """A constant that an operator implies."""
        return self.graph.leaf(str(c), (), dtype, number=c, fixed=True)

    # -- constants and sizes ------------------------------------------------------------------------------------------

    def constant(self, node: ir.Node) -> bool:
        """Fold a node whose inputs are small constants; its output is a leaf of the neutral graph."""
        if len(node.outputs) != 1 or node.domain not in ("", "ai.onnx"):
            return False
        out = node.outputs[0]
        if node.op_type == "Constant":
            array = constant_of(node)
            if array is None:
                self._large(out, attribute(node, "value"))
                return True
        elif node.op_type not in FOLDS and node.op_type not in SIZES:
            return False
        elif any(v is not None and v not in self.arrays for v in node.inputs) or not node.inputs:
            return node.op_type in SIZES and self._sizes(node)
        else:
            array = fold(node, [None if v is None else self.arrays[v] for v in node.inputs])
        if array is None or (array.size > 1 and is_float(array) and self._squared(node)):
            return False
        uniform = array.size > 1 and (node.op_type in ("ConstantOfShape", "Expand") or self._may_be_number(out, array))
        self._fold(out, array, uniform)
        if node.op_type not in ("Shape", "Size"):
            self.folded.append(node)
        return True

    def _squared(self, node: ir.Node) -> bool:
        """Whether a norm may begin here, also one of constants, such as a class token: a square of which a mean is
        taken."""
        if node.op_type not in ("Mul", "Pow"):
            return False
        a, b = node.inputs
        power = self.arrays.get(b) if b is not None else None
        square = a is b if node.op_type == "Mul" else power is not None and power.size == 1 and power.flat[0] == 2
        return square and any(user.op_type in ("ReduceMean", "ReduceSum") for user, _ in node.outputs[0].uses())

    def _large(self, out: ir.Value, tensor: Any) -> None:
        """A Constant node too large to fold, such as a weight."""
        value = self._leaf(out, True)
        if isinstance(tensor, ir.TensorProtocol):
            value.shape = tuple(int(d) for d in tensor.shape.numpy())
            value.dtype = DTYPE_NAMES[tensor.dtype]
            if value.dtype in FLOATS and tensor.size <= 2**20 and self._may_be_number(out, tensor):
                value.number = _number(np.asarray(tensor.numpy()), True)

    def _fold(self, out: ir.Value, array: Array, uniform: bool = False) -> None:
        self.arrays[out] = array
        value = self._leaf(out, True, _number(array, uniform))
        value.shape, value.dtype = array.shape, value.dtype or _dtype_of(array)
        if self.call is not None:
            value.native = None

    def _sizes(self, node: ir.Node) -> bool:
        """Follow sizes of tensors through the small integer vectors that models compute shapes with."""
        out = node.outputs[0]
        if node.op_type in ("Shape", "Size"):
            args = [None if v is None else self.value(v).shape for v in node.inputs]
        else:
            args = [self.known_sizes(v) for v in node.inputs]
        arrays = [None if v is None else self.arrays.get(v) for v in node.inputs]
        sizes = sizes_of(node, args, arrays)
        if sizes is None:
            return False
        rank = rank_of(node, len(self.value(node.inputs[0]).shape or ()), arrays)
        if rank == 0 and len(sizes) > 1:
            rank = 1  # nothing is squeezed off
        if rank not in (0, 1):
            return False  # the rows of a matrix are no sizes
        numbers = [d for d in sizes if isinstance(d, int)]
        scalar = rank == 0
        kind = ir.DataType.BOOL if node.op_type == "Equal" else ir.DataType.INT64
        dtype = ir.DataType(attribute(node, "to", kind.value))
        if len(numbers) == len(sizes):
            self._fold(out, np.array(numbers[0] if scalar else numbers, dtype.numpy()))
            return True
        value = self._leaf(out, False)
        value.shape, value.dtype = (() if scalar else (len(sizes),)), value.dtype or DTYPE_NAMES[dtype]
        self.sizes[out] = sizes
        return True

    def known_sizes(self, value: ir.Value | None) -> Shape | None:
        """What is known of the elements of an integer vector, or None; for Shape, of the operand's own shape."""
        if value is None:
            return None
        self.value(value)
        array = self.arrays.get(value)
        if array is not None and array.dtype.kind in "iub" and array.ndim <= 1:
            return tuple(int(d) for d in array.reshape(-1))
        return self.sizes.get(value)


def _dtype_of(array: Array) -> str:
    name = _KNOWN.get(array.dtype)
    if name is None:
        name = _KNOWN[array.dtype] = DTYPE_NAMES[ir.DataType.from_numpy(array.dtype)]
    return name


_KNOWN: dict[Any, str] = {}


def _number(array: Array, uniform: bool) -> float | None:
    """The number that all elements are, for a single element or where a uniform tensor may count as one."""
    if array.size == 0 or (array.dtype.kind not in "fiu" and "float" not in array.dtype.name):
        return None
    if array.size > 1 and (not uniform or (array != array.flat[0]).any()):
        return None
    number = float(array.flat[0])
    return number if math.isfinite(number) else None
