"""Shapes and types that a model does not state, by `onnx.shape_inference`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from normfuse.graph import Dim, Shape, Value

_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
DTYPES = {name: dtype for dtype in ir.DataType for name in (_NAMES.get(dtype, dtype.name.lower()),)}
"""Neutral dtype name -> onnx_ir dtype."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Facts = tuple[Shape | None, str | None]
"""Shape and dtype."""
Path = tuple[str, ...]
"""The place of a sub-graph: of each graph around it the node that it is in, by its first output, and the attribute."""
Inferred = dict[tuple[Path, str], Facts]
"""Graph and value name -> what is known; two branches may have a name in common."""

MANY = 64
"""The most elements of a constant that one node is asked about with."""
LONG = 2**24
"""The most elements of a vector for `onnx.shape_inference`, which lists those of whatever might be a shape."""


CHANNELS_LAST = ("NhwcConv", "NhwcFusedConv")
LIKE = {f"com.microsoft::{name}": "Conv" for name in ("FusedConv", *CHANNELS_LAST)} | {
    f"com.microsoft.nchwc::{name}": name
    for name in ("Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")}  # fmt: skip
"""Operators of ONNX Runtime, whose optimiser puts them, and the standard ones whose shapes theirs follow."""


def infer(model: ir.Model, known: dict[ir.Value, Value], arrays: dict[ir.Value, Any]) -> Inferred:
    """Shapes and types by `onnx.shape_inference`, weights left out; empty where that fails.

    It is told what is `known` already, because it stops where a shape is computed, and what follows is lost. `arrays`
    are the constants: with a size among them that no vector has, it does not compute shapes.
    """
    held: list[tuple[ir.Value, Any]] = []
    try:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.size > 64:
                sizes = ir.Shape([int(d) for d in tensor.shape.numpy()])
                if value.shape is None or value.type is None:
                    value.shape, value.type = sizes, ir.TensorType(tensor.dtype)
                held.append((value, tensor))
                value.const_value = ir.ExternalTensor("-", 0, 0, tensor.dtype, shape=sizes, name=value.name or "")
        proto = ir.to_proto(model)
    finally:
        for value, tensor in held:
            value.const_value = tensor
    given = {v.name for v in proto.graph.input}
    for i in reversed(range(len(proto.graph.initializer))):  # what the caller may replace says nothing about shapes
        if proto.graph.initializer[i].name in given:
            del proto.graph.initializer[i]
    _forget_negative(proto.graph)
    _decide(proto.graph, {v.name: bool(a) for v, a in arrays.items() if a.dtype == np.bool_ and a.size == 1})
    stated = {info.name: info for info in proto.graph.value_info}
    for value, seen in known.items():
        if seen.shape is not None and seen.dtype in DTYPES and value.producer() is not None and value.name:
            info = onnx.helper.make_tensor_value_info(value.name, DTYPES[seen.dtype].value, seen.shape)
            if value.name in stated:
                stated[value.name].CopyFrom(info)
            else:
                proto.graph.value_info.append(info)
    try:
        values = not _long(known, arrays) and not _matrix_of_sizes(model.graph, known)
        done = onnx.shape_inference.infer_shapes(proto, data_prop=values)
    except Exception:  # the C++ checker raises various kinds for graphs it does not understand
        return {}
    out: Inferred = {}
    for path, graph in _graphs(done.graph):
        out |= {(path, info.name): _facts(info.type) for info in graph.value_info}
    return out


def infer_node(node: ir.Node, versions: Mapping[str, int], given: Mapping[str, Value],
               arrays: Mapping[str, Any]) -> dict[str, Facts]:  # fmt: skip
    """Shapes and types of the results of one node by `onnx.shape_inference`, from its operands and small constants."""
    op = node.op_type if node.domain in ("", "ai.onnx") else LIKE.get(f"{node.domain}::{node.op_type}", "")
    schema = _schema(op, versions.get("", versions.get("ai.onnx", 1)))
    if schema is None or any(v.dtype not in DTYPES for v in given.values()):
        return {}
    proto, shapes = ir.to_proto(node), {name: value.shape for name, value in given.items()}
    if node.domain not in ("", "ai.onnx"):
        proto.domain, proto.op_type = "", op
        del proto.input[schema.max_input :]
        for i in reversed(range(len(proto.attribute))):
            if proto.attribute[i].name not in schema.attributes:
                del proto.attribute[i]
    last = node.op_type in CHANNELS_LAST
    if last:
        shapes[proto.input[0]] = _moved(shapes[proto.input[0]], -1, 1)
    kinds = {name: DTYPES[v.dtype or ""].value for name, v in given.items()}
    types = {name: onnx.helper.make_tensor_type_proto(kinds[name], shape) for name, shape in shapes.items()}
    data = {name: onnx.numpy_helper.from_array(array) for name, array in arrays.items() if array.size <= MANY}
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data)
    except Exception:  # as above
        return {}
    out: dict[str, Facts] = {}
    symbols = {d for shape in shapes.values() for d in shape or ()}
    for name, made in found.items():
        shape, dtype = _facts(made)
        sizes = None if shape is None else tuple(_kept(d, symbols) for d in shape)
        out[name] = _moved(sizes, 1, -1) if last else sizes, dtype
    return out


def _kept(d: Dim, symbols: set[Dim]) -> Dim:
    """A size, or a symbol that means the same everywhere: not one made up for this node."""
    return d if (isinstance(d, int) and d >= 0) or d in symbols else None


def _moved(shape: Shape | None, start: int, to: int) -> Shape | None:
    """A shape with one of its axes, counted from the front or the end, somewhere else."""
    if not shape or len(shape) < 2:
        return shape
    dims = list(shape)
    size = dims.pop(start)
    dims.insert(to % len(shape), size)
    return tuple(dims)


@cache
def _schema(op: str, version: int) -> Any:
    return onnx.defs.get_schema(op, version) if onnx.defs.has(op, version) else None


def inferred(known: Inferred, path: Path, name: str) -> Facts:
    """What is known of a value of a graph; that of a branch that is taken for certain stands in the graph around."""
    for end in range(len(path), -1, -1):
        found = known.get((path[:end], name))
        if found is not None:
            return found
    return None, None


def _matrix_of_sizes(graph: ir.Graph, known: dict[ir.Value, Value]) -> bool:
    """Whether a vector of sizes becomes a matrix: `onnx.shape_inference` takes it for the vector still."""
    for node in graph:
        seen = known.get(node.inputs[0]) if node.op_type == "Unsqueeze" and node.inputs and node.inputs[0] else None
        shape = seen.shape if seen is not None and not seen.fixed and seen.dtype in ("int32", "int64") else None
        if shape and len(shape) == 1 and isinstance(shape[0], int):
            return True
    return False


def _facts(kind: onnx.TypeProto) -> Facts:
    tensor_type = kind.tensor_type
    dims: Shape | None = None
    if tensor_type.HasField("shape"):
        dims = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor_type.shape.dim)
    return dims, DTYPE_NAMES.get(ir.DataType(tensor_type.elem_type)) if tensor_type.elem_type else None


def _graphs(graph: onnx.GraphProto, path: Path = ()) -> Iterator[tuple[Path, onnx.GraphProto]]:
    """A graph and those inside its nodes, each with its place."""
    yield path, graph
    for node in graph.node:
        for attr in node.attribute:
            for i, inner in enumerate((*([attr.g] if attr.HasField("g") else ()), *attr.graphs)):
                yield from _graphs(inner, (*path, step(node.output[0] if node.output else "", attr.name, i)))


def step(output: str, attribute: str, i: int) -> str:
    """The part of a path that leads into the i-th graph of an attribute of a node, whose first output this is."""
    return f"{output}.{attribute}.{i}"


def _decide(graph: onnx.GraphProto, truths: dict[str | None, bool]) -> None:
    """Put the nodes of the branch that is taken in the place of an If whose condition is known: torch's exporter has
    one where it asks whether a shape is as long as another, and the two branches differ in rank."""
    if all(_branch(node, truths) is None for node in graph.node):
        return
    names = Counter(name for _, one in _graphs(graph) for name in _made(one))
    todo, nodes = list(reversed(graph.node)), []
    while todo:
        node = todo.pop()
        branch = _branch(node, truths)
        if branch is None or any(names[name] > 1 for name in _made(branch)):
            nodes.append(node)
            continue
        graph.initializer.extend(branch.initializer)
        graph.value_info.extend(branch.value_info)
        outputs = [onnx.helper.make_node("Identity", [inner.name], [outer])
                   for inner, outer in zip(branch.output, node.output, strict=True) if outer]  # fmt: skip
        todo += reversed([*branch.node, *outputs])
    del graph.node[:]
    graph.node.extend(nodes)


def _branch(node: onnx.NodeProto, truths: dict[str | None, bool]) -> onnx.GraphProto | None:
    """The branch that an If takes; None where that is not known."""
    if node.op_type != "If" or node.input[0] not in truths:
        return None
    name = "then_branch" if truths[node.input[0]] else "else_branch"
    return next((attr.g for attr in node.attribute
                 if attr.name == name and len(attr.g.output) == len(node.output)), None)  # fmt: skip


def _made(graph: onnx.GraphProto) -> Iterator[str]:
    """The names that a graph gives to values of its own."""
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _forget_negative(graph: onnx.GraphProto) -> None:
    """Sizes below zero mean nothing, or "unknown" to some exporters; ONNX's C++ ends the process at a Slice of one."""
    for _, one in _graphs(graph):
        for info in (*one.input, *one.output, *one.value_info):
            for dim in info.type.tensor_type.shape.dim:
                if dim.dim_value < 0:
                    dim.Clear()


def _long(known: dict[ir.Value, Value], arrays: dict[ir.Value, Any]) -> bool:
    """Whether some size, or a number that may become one, is beyond `LONG`; the ends of slices often are."""
    if any(isinstance(d, int) and d > LONG for value in known.values() for d in value.shape or ()):
        return True
    return any(array.size and array.dtype.kind in "iu" and int(np.max(array)) > LONG
               and any(node.op_type != "Slice" for node, _ in value.uses())
               for value, array in arrays.items())  # fmt: skip
