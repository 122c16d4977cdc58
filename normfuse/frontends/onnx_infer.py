"""Shapes and types that a model does not state, by `onnx.shape_inference` of one node by itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir

from normfuse.graph import Dim, Shape, Value

_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
DTYPES = {name: dtype for dtype in ir.DataType for name in (_NAMES.get(dtype, dtype.name.lower()),)}
"""Neutral dtype name -> onnx_ir dtype."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Facts = tuple[Shape | None, str | None]
"""Shape and dtype."""

MANY = 64
"""The most elements of a constant that one node is asked about with."""
CHANNELS_LAST = ("NhwcConv", "NhwcFusedConv")
LIKE = {f"com.microsoft::{name}": "Conv" for name in ("FusedConv", *CHANNELS_LAST)} | {
    f"com.microsoft.nchwc::{name}": name
    for name in ("Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")}  # fmt: skip
"""Operators of ONNX Runtime, whose optimiser puts them, and the standard ones whose shapes theirs follow."""


def infer_node(node: ir.Node, versions: Mapping[str, int], given: Mapping[str, Value], arrays: Mapping[str, Any],
               others: dict[str, onnx.TypeProto]) -> dict[str, Facts]:  # fmt: skip
    """Shapes and types of the results of one node by `onnx.shape_inference`, from its operands and small constants.

    `others` has the types of operands that are no tensors (sequences of them), and gets those of such results.
    """
    op = node.op_type if node.domain in ("", "ai.onnx") else LIKE.get(f"{node.domain}::{node.op_type}", "")
    schema = _schema(op, versions.get("", versions.get("ai.onnx", 1)))
    given = {name: v for name, v in given.items() if name not in others}
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
    types |= {name: others[name] for name in proto.input if name in others}
    data = {name: onnx.numpy_helper.from_array(array) for name, array in arrays.items() if array.size <= MANY}
    try:
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data)
        if schema.has_function and any(not made.tensor_type.HasField("shape") for made in found.values()):
            found |= _by_body(proto, types, versions)  # of an operator that has no rule, such as LessOrEqual
    except Exception:  # the C++ checker raises various kinds
        return {}
    out: dict[str, Facts] = {}
    symbols = {d for shape in shapes.values() for d in shape or ()}
    for name, made in found.items():
        if not made.HasField("tensor_type"):
            others[name] = made
            continue
        shape, dtype = _facts(made)
        sizes = None if shape is None else tuple(_kept(d, symbols) for d in shape)
        out[name] = _moved(sizes, 1, -1) if last else sizes, dtype
    return out


def _by_body(proto: onnx.NodeProto, types: Mapping[str, onnx.TypeProto], versions: Mapping[str, int]
             ) -> dict[str, onnx.TypeProto]:  # fmt: skip
    """The types of the results of a node that the standard says by other operators."""
    inputs = [onnx.helper.make_value_info(name, types[name]) for name in dict.fromkeys(proto.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    opsets = [onnx.helper.make_opsetid("", versions.get("", versions.get("ai.onnx", 1)))]
    made = onnx.helper.make_model(onnx.helper.make_graph([proto], "one", inputs, outputs), opset_imports=opsets)
    found = onnx.shape_inference.infer_shapes(made).graph.output
    return {v.name: v.type for v in found if v.type.tensor_type.HasField("shape")}


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


def _facts(kind: onnx.TypeProto) -> Facts:
    tensor_type = kind.tensor_type
    dims: Shape | None = None
    if tensor_type.HasField("shape"):
        dims = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor_type.shape.dim)
    return dims, DTYPE_NAMES.get(ir.DataType(tensor_type.elem_type)) if tensor_type.elem_type else None
