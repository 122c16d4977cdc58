"""Remove what the fusions leave without a reader, and nothing else.

Nodes that were dead before stay: they are the model's own business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normfuse.graph import Graph, Node
from normfuse.plan import Edit, Plan


def live(graph: Graph, replaced: Sequence[Edit] = (), also: Iterable[Node] = ()) -> set[Node]:
    """The nodes that an output, a kept value or a node of `also` depends on, once the replacements are made."""
    instead = {value: inputs for edit in replaced for value, inputs in edit.computes().items()}
    todo = [value for node in graph.nodes for value in node.outputs if value.kept]
    start = {*also, *(node for node in graph.nodes if node.attrs.get("effect"))}
    todo += [value for node in start for value in node.inputs]
    seen, alive = set(todo), start
    while todo:
        value = todo.pop()
        if value in instead:
            inputs = instead[value]
        elif value.producer is not None:
            alive.add(value.producer)
            inputs = value.producer.inputs
        else:
            inputs = []
        for operand in inputs:
            if operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return alive


@dataclass(frozen=True, slots=True)
class RemoveDead:
    """No options."""

    def __call__(self, plan: Plan) -> None:
        """Mark each node that was live before the replacements and is not after them."""
        if edits := plan.edits():
            before = live(plan.graph)
            used = {node.native for node in before}  # of an operator with several results, some may be unread
            given = {value.producer for edit in edits for value in edit.computes()}  # others give these values now
            dead = [node for node in plan.graph.nodes if node.native not in used and node not in given]
            after = live(plan.graph, edits, dead)
            plan.remove.extend(node for node in plan.graph.nodes if node not in after)
