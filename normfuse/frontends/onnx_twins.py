"""Nodes that compute the same twice, and of one of which a statistic is taken: the algebra has to see one value.

    a = Cast(x); c = Cast(x); y = c / sqrt(mean(a^2) + eps)      becomes      ... y = a / sqrt(mean(a^2) + eps)

onnxconverter-common's conversion to float16 casts an input of the graph for each of its readers, ONNX Runtime's
optimiser reorders a result for each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import onnx_ir as ir

from normfuse.frontends.onnx_channels import RANDOM
from normfuse.frontends.onnx_emit import DOMAIN

DOMAINS = ("", "ai.onnx", "com.microsoft.nchwc")
"""Whose operators give the same for the same."""
NORMS = ("LayerNormalization", "RMSNormalization")
REDUCTIONS = frozenset("ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 GlobalAveragePool".split())
STEPS = 3
"""How many nodes may stand before the reduction: a cast, a difference, a square."""
MANY = 64
PLAIN = frozenset((ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING, ir.AttributeType.INTS,
                   ir.AttributeType.FLOATS, ir.AttributeType.STRINGS))  # fmt: skip


def twins(model: ir.Model) -> dict[ir.Node, ir.Node]:
    """The nodes that compute what one before them does, with that, where a reduction reads either of them."""
    found: dict[ir.Node, ir.Node] = {}
    for graph in model.graphs():
        first: dict[Hashable, ir.Node] = {}
        alive: set[ir.Node] = set()
        for node in reversed(graph):
            if any(v.is_graph_output() for v in node.outputs) or any(
                    user in alive or user.graph is not graph for user in _readers(node)):
                alive.add(node)
        same: dict[ir.Value, ir.Value] = {}
        ones: dict[ir.Node, ir.Node] = {}
        groups: dict[ir.Node, list[ir.Node]] = {}
        for node in graph:
            key = _key(node, same)
            alone = key is None or node not in alive or _written(node)
            one = node if alone else first.setdefault(key, node)
            if one is not node:
                ones[node] = one
                groups.setdefault(one, [one]).append(node)
                same.update(zip(node.outputs, one.outputs, strict=True))
        reduced = {one for one, group in groups.items() if any(_reduced(node, alive) for node in group)}
        wanted = set[ir.Node]()
        for node in reversed(ones):  # and those that only these read
            one = ones[node]
            if one in reduced or all(user in wanted for user in _readers(node)):
                wanted.add(node)
                found[node] = one
    return found


def merge(found: dict[ir.Node, ir.Node]) -> int:
    """Read one of each; for how many nodes another stands now. What is an output of the graph stays one."""
    count = 0
    for node, one in found.items():  # the last first
        moved = [(user, i, other) for value, other in zip(node.outputs, one.outputs, strict=True)
                 for user, i in value.uses()]  # fmt: skip
        for user, i, other in moved:
            user.replace_input_with(i, other)
        for value, other in zip(node.outputs, one.outputs, strict=True):
            other.shape = value.shape if other.shape is None else other.shape
            other.type = other.type or value.type
        kept = any(v.is_graph_output() for v in node.outputs)
        if node.graph is not None and not kept:
            node.graph.remove(node, safe=True)
        count += bool(moved) or not kept
    return count


def _key(node: ir.Node, same: dict[ir.Value, ir.Value]) -> Hashable:
    """What a node computes, if that is the same each time; else None."""
    if node.domain not in DOMAINS or node.op_type in RANDOM or node.op_type == "Dropout" or not any(node.inputs):
        return None
    if any(attr.type not in PLAIN or attr.is_ref() for attr in node.attributes.values()):
        return None
    values = ((a.name, a.type, tuple(a.value) if isinstance(a.value, (list, tuple)) else a.value)
              for a in node.attributes.values())  # fmt: skip
    inputs = tuple(None if v is None else same.get(v, v) for v in node.inputs)
    given = tuple(bool(v.name) for v in node.outputs)
    return node.domain, node.op_type, node.overload, inputs, frozenset(values), given


def _written(node: ir.Node) -> bool:
    """Whether only norms that are one operator read a node: the cast ahead of one that a rewrite has put there."""
    readers = list(_readers(node))
    return bool(readers) and all(map(_is_norm, readers))


def _is_norm(node: ir.Node) -> bool:
    return node.domain == DOMAIN or node.op_type.endswith(NORMS)


def _reduced(node: ir.Node, alive: set[ir.Node]) -> bool:
    """Whether a reduction is a few nodes behind."""
    todo, seen = [(node, 0)], {node}
    for one, steps in todo:
        for user in (user for user in _readers(one) if user in alive and not _is_norm(user)):
            if user.op_type in REDUCTIONS:
                return True
            if user not in seen and steps < STEPS and len(seen) < MANY:
                seen.add(user)
                todo.append((user, steps + 1))
    return False


def _readers(node: ir.Node) -> Iterator[ir.Node]:
    return (user for value in node.outputs for user, _ in value.uses())
