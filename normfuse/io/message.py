"""What an ONNX message has to be before anything is made of it: names that mean one thing, data of the stated size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir

from normfuse.errors import InputError, UnsupportedError

KEYS = frozenset(("location", "offset", "length", "checksum"))
TYPES = frozenset({"to", "dtype", "stash_type", "softmax_precision"})
"""Attributes that name a type."""
MOST_AXES = 64
"""Of a tensor: numpy has no more."""
MOST_NODES = 2**20
"""Nodes of a model with its functions inlined: more than any model has, fewer than fill the memory."""
_Scope = tuple[frozenset[str] | set[str], ...]


def check_message(proto: onnx.ModelProto, where: str) -> None:
    """Raise `InputError` for the first thing that makes the message no model; `where` begins its message."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    if len(functions) < len(proto.functions):
        raise InputError(f"{where}: two functions have the same name")
    if proto.training_info:
        raise UnsupportedError(f"{where}: holds training graphs, which may read what a rewrite replaces; remove them "
                               "(training_info) first")  # fmt: skip
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if "ai.onnx.preview.training" in opsets and any(
            (n.domain, n.op_type) == ("ai.onnx.preview.training", "Gradient") for n in proto.graph.node):
        raise UnsupportedError(f"{where}: holds a Gradient operator, which names values that a rewrite may replace")
    strange = [v for v in opsets.values() if not 0 < v < 2**31]
    if strange:
        raise InputError(f"{where}: there is no opset {strange[0]}")
    todo: list[tuple[Any, _Scope]] = [(proto.graph, ()), *((f, ()) for f in proto.functions)]
    count = 0
    while todo:
        graph, outer = todo.pop()
        count += len(graph.node)
        if count > MOST_NODES:
            raise InputError(f"{where}: more than {MOST_NODES:,} nodes")
        todo += _check_graph(graph, outer, opsets.get("", opsets.get("ai.onnx", 0)), where)
    if functions:
        _check_calls(proto.graph, functions, where)
    for tensor in tensors(proto):
        _check_tensor(tensor, f"{where}: tensor {str(tensor.name)[:100]!r}")


def _check_graph(graph: Any, outer: _Scope, opset: int, where: str) -> list[tuple[Any, _Scope]]:
    """Check the names of a graph or function; gives back its sub-graphs and what they may read."""
    function = isinstance(graph, onnx.FunctionProto)
    inputs = list(graph.input) if function else [v.name for v in graph.input]
    outputs = list(graph.output) if function else [v.name for v in graph.output]
    constants = [] if function else [t.name for t in graph.initializer]
    if not function and graph.sparse_initializer:
        name = str(graph.sparse_initializer[0].values.name)[:100]
        raise UnsupportedError(f"{where}: {name!r} is a sparse initializer; make it an ordinary one first")
    _distinct(inputs, "inputs", where)
    _distinct(constants, "initializers", where)
    known = {*inputs, *constants}
    inner: list[onnx.GraphProto] = []
    reads: list[tuple[str, Sequence[str]]] = []
    for node in graph.node:
        op, taken, made = node.op_type, [*node.input], [*node.output]  # each look into a message takes its time
        if not op:
            raise InputError(f"{where}: node {str(node.name)[:100]!r} has no operator")
        if bytes in map(type, (node.name, op, node.domain, *taken, *made)):
            raise InputError(f"{where}: node {str(node.name)[:100]} has a name that is not UTF-8")
        if wrong := _wrong_operands(node, op, taken, made, opset):
            raise InputError(f"{where}: {op} {node.name[:100]!r} {wrong}")
        reads.append((op, taken))
        for name in made:
            if name in known:
                raise InputError(f"{where}: the value {name[:100]!r} is computed twice, the second time by "
                                 f"{op} {node.name[:100]!r}")  # fmt: skip
            if name:
                known.add(name)
        for attr in node.attribute:
            inner += [attr.g] if attr.type == onnx.AttributeProto.GRAPH else attr.graphs
    scope = (*outer, known)
    for reader, names in [*reads, ("the outputs", outputs)]:
        for name in names:
            if name and name not in known and not any(name in names for names in outer):
                raise InputError(f"{where}: nothing computes {str(name)[:100]!r}, which {reader} reads")
    if own := next((name for name in outputs if outer and name and name not in known), None):  # no runtime takes that
        raise InputError(f"{where}: {str(own)[:100]!r} is given by a sub-graph that does not compute it; let an "
                         "Identity do so")  # fmt: skip
    return [(g, scope) for g in inner]


Schema = tuple[range, range, frozenset[int], dict[str, int], frozenset[str]]
_EPS: dict[str, int] = {"epsilon": onnx.AttributeProto.FLOAT}
_INT = onnx.AttributeProto.INT


def _reads(*operands: int, **attributes: int) -> Schema:
    """Of an operator of which these operands are read, and attributes of these types; others it may have or not."""
    return range(max(operands) + 1, 20), range(1, 20), frozenset(range(20)) - {*operands}, attributes, frozenset()


RUNTIME: dict[str, Schema] = {
    "SimplifiedLayerNormalization": (range(2, 3), range(1, 3), frozenset(),
                                     {**_EPS, "axis": onnx.AttributeProto.INT, "stash_type": onnx.AttributeProto.INT},
                                     frozenset()),
    "SkipSimplifiedLayerNormalization": (range(3, 5), range(1, 5), frozenset({3}), _EPS, frozenset()),
    "SkipLayerNormalization": (range(3, 6), range(1, 5), frozenset({3, 4}), _EPS, frozenset()),
    "QuantizeLinear": (range(2, 4), range(1, 2), frozenset({2}), {}, frozenset()),
    "DequantizeLinear": (range(2, 4), range(1, 2), frozenset({2}), {}, frozenset()),
    "QuickGelu": (range(1, 2), range(1, 2), frozenset(), {"alpha": onnx.AttributeProto.FLOAT}, frozenset()),
    "FastGelu": (range(1, 3), range(1, 2), frozenset({1}), {}, frozenset()),
    "BiasGelu": (range(2, 3), range(1, 2), frozenset(), {}, frozenset()),
    "Gelu": (range(1, 2), range(1, 2), frozenset(), {}, frozenset()),
    "FusedMatMul": (range(2, 3), range(1, 2), frozenset(),
                    {"alpha": onnx.AttributeProto.FLOAT,
                     **dict.fromkeys(("transA", "transB", "transBatchA", "transBatchB"), onnx.AttributeProto.INT)},
                    frozenset()),
    "Attention": _reads(0, 1, qkv_hidden_sizes=onnx.AttributeProto.INTS),
    "MultiHeadAttention": _reads(0, num_heads=_INT),
    "GroupQueryAttention": _reads(0, num_heads=_INT, kv_num_heads=_INT),
    "QAttention": _reads(0, 1),
    "MatMulNBits": _reads(0, N=_INT),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat"), _reads(0, 1)),
    "FusedGemm": _reads(0, 1, transA=_INT, transB=_INT),
    **dict.fromkeys(("EmbedLayerNormalization", "QEmbedLayerNormalization"), _reads(0, 2)),
    "GatherBlockQuantized": _reads(0, 1, bits=_INT, gather_axis=_INT),
    **dict.fromkeys(("QLinearAdd", "QLinearMul"), _reads(0, 3)),
    **dict.fromkeys(("RotaryEmbedding", "MoE", "QMoE"), _reads(0)),
    **dict.fromkeys(("FusedConv", "NhwcConv", "NhwcFusedConv"), _reads(0, 1)),
}  # fmt: skip
"""The same of ONNX Runtime's operators that are read (its docs/ContribOperators.md), which `onnx` does not know."""
BLOCKED: dict[str, Schema] = {
    **dict.fromkeys(("ReorderInput", "ReorderOutput"), _reads(0, channels=_INT, channels_last=_INT)),
    "Upsample": _reads(0, scales=onnx.AttributeProto.INTS),
}
"""And of those of its domain com.microsoft.nchwc."""


@cache
def _schema(op: str, opset: int) -> Schema | None:
    """Of an operator of ONNX: how many inputs and outputs, which inputs may be left out, the types of attributes, and
    which of them it has to have."""
    try:
        found = onnx.defs.get_schema(op, opset, "")
    except Exception:  # not an operator of ONNX: nothing is known of it
        return None
    types: dict[str, int] = {name: attr.type for name, attr in found.attributes.items()}  # type: ignore[misc]
    needed = frozenset(name for name, attr in found.attributes.items() if attr.required)
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    free = frozenset(i for i, parameter in enumerate(found.inputs) if parameter.option == optional)
    outputs = range(found.min_output, found.max_output + 1)
    return range(found.min_input, found.max_input + 1), outputs, free, types, needed


def _wrong_operands(node: onnx.NodeProto, op: str, inputs: list[str], outputs: list[str], opset: int) -> str:
    """What is wrong with the operands and attributes of a node, or nothing."""
    schema = _schema(op, opset) if node.domain in ("", "ai.onnx") else None
    if schema is None and node.domain in ("", "com.microsoft"):
        schema = RUNTIME.get(op)
    if node.domain == "com.microsoft.nchwc":
        schema = BLOCKED.get(op)
    attributes = [*node.attribute]
    if schema is not None:
        for side, given, allowed in (("inputs", inputs, schema[0]), ("outputs", outputs, schema[1])):
            if len(given) not in allowed:
                return f"has {len(given)} {side}, and takes {_range(allowed)}"
        if "" in inputs and (missing := [i for i, name in enumerate(inputs) if not name and i not in schema[2]]):
            return f"lacks its input {missing[0]}"
        if schema[4] and (lacking := sorted(schema[4] - {attr.name for attr in attributes})):
            return f"lacks its attribute {lacking[0]!r}"
    if any(not device.configuration_id for device in node.device_configurations):
        return "is for a device without a configuration"
    for attr in attributes:
        name, kind = attr.name, attr.type
        if not name or not isinstance(name, str) or not kind:
            return "has an attribute without a name or a type"
        if schema is not None and name in TYPES and kind == onnx.AttributeProto.INT and attr.i not in _known_types():
            return f"says that something is of type {attr.i}, and there is no such type"
        if schema is not None and schema[3].get(name, kind) != kind:
            return f"has an attribute {name[:50]!r} of another type than is said of it"
    return ""


@cache
def _known_types() -> frozenset[int]:
    return frozenset(int(t) for t in ir.DataType)


def _range(allowed: range) -> str:
    low, high = allowed.start, allowed.stop - 1
    return str(low) if low == high else f"{low} to {high}" if high < 2**30 else f"{low} or more"


def _distinct(names: Sequence[str], what: str, where: str) -> None:
    if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        twice = next((n for n, k in Counter(names).items() if k > 1), "")
        raise InputError(f"{where}: two {what} are named {str(twice)[:100]!r}" if twice or "" in names else
                         f"{where}: the name of one of the {what} is not UTF-8")  # fmt: skip


def _check_calls(main: onnx.GraphProto, functions: dict[tuple[str, str, str], onnx.FunctionProto], where: str) -> None:
    """Raise `InputError` where functions call themselves, or become too many nodes when they are inlined."""
    sizes: dict[tuple[str, str, str], int] = {}
    calls = {key: [k for n in nodes_of(f) for k in [(n.domain, n.op_type, n.overload)]] for key, f in functions.items()}
    todo = [(key, False) for key in functions]
    open_: set[tuple[str, str, str]] = set()
    while todo:
        key, leaving = todo.pop()
        if leaving:
            open_.discard(key)
            sizes[key] = sum(sizes.get(k, 1) for k in calls[key])
            if sizes[key] > MOST_NODES:
                raise InputError(f"{where}: function {key[1][:100]!r} inlined is more than {MOST_NODES:,} nodes")
        elif key not in sizes:
            if key in open_:
                raise InputError(f"{where}: function {key[1][:100]!r} calls itself")
            open_.add(key)
            todo += [(key, True), *((k, False) for k in calls[key] if k in functions and k not in sizes)]
    if sum(sizes.get((n.domain, n.op_type, n.overload), 1) for n in nodes_of(main)) > MOST_NODES:
        raise InputError(f"{where}: with its functions inlined it is more than {MOST_NODES:,} nodes")


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph or function, and the sub-graphs in it, at any depth."""
    todo = [graph]
    for one in todo:
        yield one
        todo += [g for node in one.node for attr in node.attribute
                 for g in ([attr.g] if attr.type == onnx.AttributeProto.GRAPH else attr.graphs)]  # fmt: skip


def nodes_of(graph: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of these."""
    return (node for one in graphs_of(graph) for node in one.node)


def _check_tensor(tensor: onnx.TensorProto, name: str) -> None:
    """Raise `InputError` where the data are not what type and shape say; of data elsewhere, what is said of them."""
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"{name} has a negative size: {list(tensor.dims)}")
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise InputError(f"{name} has type {tensor.data_type}, which ONNX does not know") from None
    if dtype == ir.DataType.UNDEFINED:
        raise InputError(f"{name} has no type")
    if len(tensor.dims) > MOST_AXES:
        raise InputError(f"{name} has {len(tensor.dims)} axes, more than {MOST_AXES}")
    raw, fields = tensor.HasField("raw_data"), _fields(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        keys = [entry.key for entry in tensor.external_data]
        unknown = [k for k in keys if k not in KEYS and not str(k).startswith("prepacked_")]  # of ONNX Runtime
        if unknown or len(set(keys)) < len(keys):
            raise InputError(f"{name}: its external data have {unknown[0][:50]!r}, which ONNX does not know"
                             if unknown else f"{name}: its external data say something twice")  # fmt: skip
        if not all(isinstance(entry.value, str) for entry in tensor.external_data):
            raise InputError(f"{name}: its external data have a value that is not UTF-8")
        if raw or fields:
            raise InputError(f"{name} has data in the model and in another file")
        return
    if raw + len(fields) > 1 or (raw and dtype == ir.DataType.STRING):
        raise InputError(f"{name} has data in {'two places' if fields else 'a place that is not for strings'}")
    count = 1
    for d in tensor.dims:
        count *= d
    given = len(tensor.raw_data) if raw else len(getattr(tensor, fields[0])) if fields else 0
    need = -(-count * dtype.bitwidth // 8) if raw else _stored(count, dtype, fields)
    if given != need:
        raise InputError(f"{name} has {given} {'bytes' if raw else 'elements'}, its type and shape need {need}")


def _fields(tensor: onnx.TensorProto) -> list[str]:
    return [f for f in ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
            if len(getattr(tensor, f))]  # fmt: skip


def _stored(count: int, dtype: ir.DataType, fields: list[str]) -> int:
    """How many elements a typed field has to have: complex numbers take two, numbers below a byte share one."""
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return 2 * count
    return -(-count * dtype.bitwidth // 8) if dtype != ir.DataType.STRING and dtype.bitwidth < 8 else count


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a message, in sub-graphs and functions too."""
    todo: list[Any] = [proto.graph, *proto.functions]
    kinds = onnx.AttributeProto
    while todo:
        graph = todo.pop()
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
        for node in graph.node:
            for attr in node.attribute:
                if attr.type == kinds.TENSOR:
                    yield attr.t
                elif attr.type == kinds.TENSORS:
                    yield from attr.tensors
                elif attr.type == kinds.GRAPH:
                    todo.append(attr.g)
                elif attr.type == kinds.GRAPHS:
                    todo.extend(attr.graphs)
                elif attr.type in (kinds.SPARSE_TENSOR, kinds.SPARSE_TENSORS):
                    for sparse in (attr.sparse_tensor, *attr.sparse_tensors):
                        yield from (sparse.values, sparse.indices)
