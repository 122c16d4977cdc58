"""Writes in place that nobody else sees, read as what they compute: ``r.add_(eps)`` as ``r.add(eps)``. And tensors that
are read once their memory was written for the last time (``x[mask] = token; norm(x)``), under a name of their own.

A graph is read so, and what of it no operator takes up is written in place again.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from normfuse.frontends import fx_effects
from normfuse.frontends.fx_meta import is_tensor, meta_of, order_of, shape_of

Targets = dict[fx.Node, Any]

_ANYWHERE = frozenset("add sub mul div true_divide neg sqrt square".split())
_WIDENED = frozenset("pow rsqrt reciprocal addcmul addcdiv".split())
"""What autocast computes in float32, unless it is in place."""
_OPERATORS: dict[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
                              operator.itruediv: operator.truediv, operator.ipow: operator.pow}  # fmt: skip
_WRITES_NUMBERS = frozenset(
    """setitem iadd isub imul itruediv copy_ fill_ zero_ add_ sub_ mul_ div_ masked_fill_ masked_scatter_ index_put_
    index_copy_ index_fill_ index_add_ scatter_ scatter_add_""".split()
)
"""What changes the elements of a tensor alone, and not its shape or where they lie."""
MOST = 64
"""Tensors in one memory up to which it is asked who reads them."""


def writes(graph: fx.Graph) -> bool:
    """Whether `read_as_pure` or `name_settled` may change a graph."""
    return any(_pure(node) is not None or fx_effects.name_of(node) in _WRITES_NUMBERS for node in graph.nodes)


def read_as_pure(graph: fx.Graph, exported: bool) -> Targets:
    """Give nodes that write in place the target that does not, where that is the same; gives their targets before.

    What reads the written tensor afterwards by its old name reads the result of the write then: it is the same tensor.
    The outputs of an `exported` program are known by their names, and keep them.
    """
    found = _private(graph, exported)
    before = {node: node.target for node in found}
    for node, target in found.items():
        node.target = target
    return before


def name_settled(graph: fx.Graph, exported: bool) -> list[fx.Node]:
    """Have what reads a tensor behind the last write to its memory read an alias of it, which stays what it is; gives
    the aliases, for `unname`. The outputs of an `exported` program keep their names.
    """
    made = []
    found = fx_effects.tainted(graph)
    place = {node: i for i, node in enumerate(graph.nodes)} if found else {}
    for node, writes in found.items():
        late = [u for u in node.users if place[u] > place[writes[-1]] and not (exported and u.op == "output")]
        if late and is_tensor(meta_of(node)) and all(fx_effects.name_of(w) in _WRITES_NUMBERS for w in writes):
            with graph.inserting_after(writes[-1]):
                alias = graph.call_function(torch.ops.aten.alias.default, (node,))
            alias.meta = dict(node.meta)
            for user in late:
                user.replace_input_with(node, alias)
            made.append(alias)
    return made


def unname(graph: fx.Graph, aliases: Collection[fx.Node]) -> None:
    """Take the aliases away again: whoever reads one stands behind the last write."""
    for node in [node for node in graph.nodes if node in aliases]:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def write_again(graph: fx.Graph, before: Targets, exported: bool, old: Collection[fx.Node]) -> None:
    """Let the nodes that are left of those that `read_as_pure` has changed write in place again, where this is still
    the same; `old` are the nodes of the graph as it was, whose memory nothing new reads or holds."""
    pure = {node: node.target for node in graph.nodes if node in before}
    for node in pure:
        node.target = before[node]
    still = _private(graph, exported, old) if pure else {}
    for node, target in pure.items():
        node.target = before[node] if node in still else target


def _private(graph: fx.Graph, exported: bool, old: Collection[fx.Node] | None = None) -> Targets:
    """The writes in place that nobody else sees, and the target of each that does the same without."""
    if not writes(graph):
        return {}
    found: Targets = {}
    place = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, list[fx.Node]] = {}
    owners: dict[int, fx.Node] = {}
    modes: dict[fx.Node, int] = {}
    mode = 0
    for node in graph.nodes:
        mode += fx_effects.name_of(node) in fx_effects.MODES
        modes[node] = mode
        target, storage = _pure(node), fx_effects.storage_of(node)
        if target is not None:
            first: fx.Node = node.args[0]
            shared = memory[first]
            late = [u for u in first.users if place[u] > place[node]]
            there = old is None or not (late or {*shared, *(u for n in shared for u in n.users)} - {*old})
            if (there and len(shared) <= MOST and all(_made_here(n) and modes[n] == mode for n in shared)
                    and not any(n in shared and n is not first for n in node.all_input_nodes)
                    and not any(place[u] > place[node] for n in shared if n is not first for u in n.users)
                    and not (exported and any(u.op == "output" for u in late))):  # fmt: skip
                for user in late:
                    user.replace_input_with(first, node)
                found[node], memory[node] = target, [node]
                if storage is not None:
                    owners[storage] = node
                continue
        group = [node]
        others = [*fx_effects.shared(node), *fx_effects.nodes_in(node.kwargs.get("out"))]
        if storage is not None:
            others.append(owners.setdefault(storage, node))
        for other in others:
            if memory.get(other, group) is not group:
                group.extend(memory[other])
                memory.update(dict.fromkeys(memory[other], group))
        memory[node] = group
    return found


def _made_here(node: fx.Node) -> bool:
    """Whether nobody else can have the memory of a result."""
    return node.op in ("call_function", "call_method", "call_module") and fx_effects.known(node)


def _pure(node: fx.Node) -> Any:
    """The target that computes the same as a write in place, or None."""
    name = fx_effects.name_of(node)
    if name is None or node.op not in ("call_function", "call_method") or not node.args or "out" in node.kwargs:
        return None
    bare = name[:-1] if name.endswith("_") else getattr(_OPERATORS.get(node.target), "__name__", "")
    bare = "div" if bare == "truediv" else bare
    target = _target(node.target, bare) if bare in _ANYWHERE | _WIDENED else None
    metas = [meta_of(n) for n in node.all_input_nodes]
    if target is None or not isinstance(node.args[0], fx.Node) or not is_tensor(meta_of(node)):
        return None
    tensor, numbers = meta_of(node.args[0]), [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, complex)]
    if not is_tensor(tensor) or numbers or not tensor.dtype.is_floating_point or tensor.dtype != meta_of(node).dtype:
        return None
    if bare in _WIDENED and tensor.dtype not in (torch.float32, torch.float64):
        return None
    rank = len(tensor.shape)
    wide = [m.dtype for m in metas if is_tensor(m) and (len(m.shape) or not rank)]
    if any(torch.promote_types(tensor.dtype, dtype) != tensor.dtype for dtype in wide):
        return None
    plain = shape_of(tensor) is not None and shape_of(tensor) == shape_of(meta_of(node))
    dense = not hasattr(tensor, "stride") or order_of(tensor) == tuple(range(rank))  # a file that is only looked at
    return target if plain and dense else None


@cache
def _target(target: Any, bare: str) -> Any:
    if isinstance(target, str):
        return bare
    if isinstance(target, OpOverload):
        def signature(op: OpOverload) -> list[tuple[str, str]]:
            return [(a.name, str(a.type)) for a in op._schema.arguments]

        packet = getattr(torch.ops.aten, bare)
        found = (getattr(packet, name) for name in packet.overloads())
        return next((op for op in found if signature(op) == signature(target)), None)
    return _OPERATORS.get(target) or getattr(torch, bare, None)
