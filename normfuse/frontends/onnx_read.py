"""A model as the passes read it: without functions of others, types that are stated wrongly, and initializers that
nobody can replace among the inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedOpsetsPass,
)
from onnx_ir.traversal import RecursiveGraphIterator

from normfuse.errors import InputError, UnsupportedError, first_line
from normfuse.frontends.onnx_emit import names_of, unique

OLDEST_OPSET = 9
FIRST_WITH_DEFAULTS = 4
"""The version of the format from which an initializer need not be an input; one that is may be replaced by a caller."""
NUMBERS = ("value_int", "value_ints", "value_float", "value_floats")


def safe_to_read(model: ir.Model) -> ir.Model:
    """The model itself, or a copy where `make_readable` would change it."""
    changed = model.functions or model.ir_version < FIRST_WITH_DEFAULTS or _misstated(model)
    return model.clone() if changed else model


def make_readable(model: ir.Model, kept: Collection[str]) -> tuple[int, bool]:
    """Change a model so that it can be read; gives its opset, and whether functions were inlined: those of the domains
    in `kept` are not. With none kept the model has no function afterwards, and its Constants of numbers are tensors.

    Raises `InputError` where it does not say its opset or a function cannot be inlined, `UnsupportedError` below opset
    9.
    """
    for value, dtype in _misstated(model):
        value.type = ir.TensorType(dtype)
    opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
    if not opset and any(node.domain in ("", "ai.onnx") for node in model.graph):
        raise InputError("the model does not say which ONNX opset it uses")
    if 0 < opset < OLDEST_OPSET:
        raise UnsupportedError(f"opset {opset} is older than {OLDEST_OPSET}; convert it with "
                               "onnx.version_converter first")  # fmt: skip
    inlined = not all(f.domain in kept for f in model.functions.values())
    if inlined:
        try:
            _inline(model, kept)
        except Exception as why:
            raise InputError(f"the model's functions cannot be inlined: {first_line(why)}") from why
    if model.ir_version < FIRST_WITH_DEFAULTS:
        RemoveInitializersFromInputsPass()(model)  # every initializer had to be an input, which nobody could give
        model.ir_version = FIRST_WITH_DEFAULTS
    return opset, inlined


def names_in(model: ir.Model) -> set[str | None]:
    """All that has a name in a model, its sub-graphs included."""
    graphs = list(model.graphs())
    return names_of(graphs) | set(model.graph.initializers) | {node.name for one in graphs for node in one}


def _inline(model: ir.Model, kept: Collection[str]) -> None:
    for function in model.functions.values():
        _align(function, model.graph.opset_imports)
    _complete(model)
    InlinePass(criteria=lambda f: f.domain not in kept)(model)
    if not kept:
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        RemoveUnusedOpsetsPass()(model)
        _plain_constants(model)


def _complete(model: ir.Model) -> None:
    """Give calls all the results that their functions have, by names: onnx_ir inlines no others."""
    used = names_in(model)
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for body in bodies for node in RecursiveGraphIterator(body)):
        function = model.functions.get(node.op_identifier())
        if function is not None:
            node.resize_outputs(max(len(node.outputs), len(function.outputs)))
            for value in node.outputs:
                value.name = value.name or unique("unread", used)


def _align(function: ir.Function, imports: Mapping[str, int]) -> None:
    """Let a function import the opset of the model, where all operators in it are the same in both."""
    for domain, version in function.opset_imports.items():
        wanted = imports.get(domain)
        if wanted is None or wanted == version or domain not in ("", "ai.onnx"):
            continue
        nodes = [node for node in RecursiveGraphIterator(function.graph) if node.domain == domain]
        since = [{onnx.defs.get_schema(node.op_type, v, "").since_version for v in (version, wanted)} for node in nodes]
        if all(len(versions) == 1 for versions in since):
            function.opset_imports[domain] = wanted


def _misstated(model: ir.Model) -> list[tuple[ir.Value, ir.DataType]]:
    """The initializers of which a value_info states another type than they have, as a tool leaves it that changed them
    (ONNX Runtime loads such files), and that type. One that is an input as well has the type of the input."""
    found = [(v, v.const_value.dtype) for graph in model.graphs() for v in graph.initializers.values()
             if v.const_value is not None and not v.is_graph_input()]  # fmt: skip
    return [(value, dtype) for value, dtype in found if value.dtype not in (None, dtype)]


def _plain_constants(model: ir.Model) -> None:
    """Have Constants of numbers say them as a tensor, as every runtime takes them."""
    for node in RecursiveGraphIterator(model.graph):
        name = next((name for name in NUMBERS if name in node.attributes), None)
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and name is not None:
            array = np.array(node.attributes.pop(name).value, np.int64 if "int" in name else np.float32)
            node.attributes.add(ir.AttrTensor("value", ir.tensor(array)))
