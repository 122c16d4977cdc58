"""The branches of an If: what they agree on, and a model in which one of them has been taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from normfuse.frontends.onnx_emit import names_of, unique
from normfuse.frontends.onnx_infer import Facts

if TYPE_CHECKING:
    from normfuse.frontends.onnx import Lowering

BRANCHES = ("then_branch", "else_branch")


def is_if(node: ir.Node) -> bool:
    """Whether a node is ONNX's If, with both of its branches."""
    return node.op_type == "If" and node.domain in ("", "ai.onnx") and {*BRANCHES} <= node.attributes.keys()


def agreed(node: ir.Node, branches: Sequence[Lowering]) -> dict[str, Facts]:
    """Shapes and types of the results of an If on which the branches that it may take agree; a size is known if it is
    the same."""
    out: dict[str, Facts] = {}
    for value, *made in zip(node.outputs, *(low.source.outputs for low in branches), strict=False):
        found = [low.value(v) for low, v in zip(branches, made, strict=True)]
        shapes = [v.shape for v in found if v.shape is not None]
        if len(shapes) == len(found) and len({(len(v.shape or ()), v.dtype) for v in found}) == 1:
            dims = tuple(d[0] if len(set(d)) == 1 else None for d in zip(*shapes, strict=True))
            out[value.name or ""] = dims, found[0].dtype
    return out


def homes(graph: ir.Graph) -> dict[ir.Value, str]:
    """Of each value that a branch of a graph's Ifs computes or holds, which branch that is."""
    found: dict[ir.Value, str] = {}
    for node, branch in ((node, branch) for node in graph if is_if(node) for branch in BRANCHES):
        inner = node.attributes[branch].as_graph()
        held = (*inner.initializers.values(), *(value for part in inner for value in part.outputs))
        found |= dict.fromkeys(held, branch)
    return found


def taken(model: ir.Model, branch: str) -> ir.Model:
    """A copy of a model in which a branch stands in the place of each If of its main graph.

    Raises `ValueError` where two that are taken have a name in common.
    """
    model = model.clone()
    graph = model.graph
    used = names_of([graph])
    for node in [node for node in graph if is_if(node)]:
        inner = node.attributes[branch].as_graph()
        results, nodes = list(inner.outputs), list(inner)
        for old, value in zip(node.outputs, results, strict=True):
            if value.name == old.name:  # as in optimum's decoders
                value.name = unique(f"{old.name}_taken", used | names_of([inner]))
        shared = used & names_of([inner]) - {"", None}
        if shared:
            raise ValueError(f"two values of the model have the name {min(map(str, shared))!r}")
        used |= names_of([inner])
        for name in list(inner.initializers):
            graph.register_initializer(inner.initializers.pop(name))
        inner.remove(nodes)
        copies = [ir.Node("", "Identity", [value]) for value in results]
        graph.insert_before(node, [*nodes, *copies])
        for old, copy, value in zip(node.outputs, copies, results, strict=True):
            new = copy.outputs[0]
            new.name, new.shape, new.type = old.name, value.shape, value.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return model
