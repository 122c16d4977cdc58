"""The branches of an If: what they agree on, and a model in which one of them has been taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

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


@dataclass(frozen=True, slots=True)
class Home:
    """A branch of an If, whose first output is `of`."""

    branch: str
    of: str

    def name(self, value: str) -> str:
        """What a value of the branch is called where that is `taken`: two branches may share names."""
        return f"{value} in {self.branch} of {self.of}"


def homes(graph: ir.Graph) -> dict[ir.Value, Home]:
    """Of each value that a branch of a graph's Ifs computes or holds, which branch that is."""
    found: dict[ir.Value, Home] = {}
    for node, branch in ((node, branch) for node in graph if is_if(node) for branch in BRANCHES):
        inner = node.attributes[branch].as_graph()
        held = (*inner.initializers.values(), *(value for part in inner for value in part.outputs))
        found |= dict.fromkeys(held, Home(branch, node.outputs[0].name or ""))
    return found


def taken(model: ir.Model, branch: str) -> ir.Model:
    """A copy of a model in which a branch stands in the place of each If of its main graph, its values as `Home` calls
    them."""
    model = model.clone()
    graph = model.graph
    names = {value: home.name(value.name or "") for value, home in homes(graph).items() if home.branch == branch}
    for node in [node for node in graph if is_if(node)]:
        inner = node.attributes[branch].as_graph()
        nodes, held, given = list(inner), list(inner.initializers.values()), list(inner.outputs)
        copies = [ir.Node("", "Identity", [value]) for value in given]
        inner.outputs.clear()
        inner.initializers.clear()
        inner.remove(nodes)
        for value in (*held, *(value for part in nodes for value in part.outputs if value.name)):
            tensor, value.const_value = value.const_value, None  # the model's own, which would be renamed, too
            value.name, value.const_value = names[value], tensor
        for value in held:
            graph.register_initializer(value)
        graph.insert_before(node, [*nodes, *copies])
        for old, copy, value in zip(node.outputs, copies, given, strict=True):
            new = copy.outputs[0]
            new.name, new.shape, new.type = old.name, value.shape, value.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    return model
