"""What an FX graph needs when nodes of it are replaced: a copy, an order, metadata, the modules that nodes stand in."""

from __future__ import annotations

import copy
import heapq
import itertools
import operator
import warnings
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata
from torch.utils import _pytree as pytree

from normfuse.frontends import fx_effects
from normfuse.frontends.fx_meta import is_tensor, meta_of

PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor, TensorMetadata)


def duplicate(thing: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy. Of tree specs torch warns that its own way of copying them is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(thing, memo)


def copied(source: fx.GraphModule) -> fx.Graph:
    """The graph again, node for node under the same names."""
    out = copy.deepcopy(source.graph)
    out.owning_module = source
    for before, after in zip(source.graph.nodes, out.nodes, strict=True):
        after.name = before.name
        if hasattr(before, "_dynamo_source"):  # by which AOTAutograd knows parameters from inputs
            after._dynamo_source = before._dynamo_source
    return out


def operators(graph: fx.Graph) -> Counter[str]:
    """The operations of a graph by name; picking one result of several is none."""
    calls = (n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module"))
    return Counter(fx_effects.name_of(n) or str(n.target) for n in calls
                   if n.target is not operator.getitem or is_tensor(meta_of(n.args[0])))  # fmt: skip


def sort(graph: fx.Graph) -> None:
    """Let each node wait for its inputs, otherwise keeping the order."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    if all(place[n] < place[node] for node in place for n in node.all_input_nodes):
        return
    missing = {node: len(node.all_input_nodes) for node in place}
    ready = [(i, node) for node, i in place.items() if not missing[node]]
    last = graph._root
    while ready:
        _, node = heapq.heappop(ready)
        last.append(node)
        last = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (place[user], user))


def alike(new: Any, old: Any, olds: dict[fx.Node, Any]) -> bool:
    """Whether two nodes compute the same of the same operands, of which `olds` has the nodes or attributes' names."""
    if isinstance(new, fx.Node) and isinstance(old, fx.Node):
        if new in olds:
            return olds[new] is old or (old.op == "get_attr" and olds[new] == old.target)
        new, old = ((n.op, n.target, n.args, *n.kwargs.items()) for n in (new, old))
    if isinstance(new, (tuple, list)) and isinstance(old, (tuple, list)):
        return len(new) == len(old) and all(alike(a, b, olds) for a, b in zip(new, old, strict=True))
    return type(new) is type(old) and bool(new == old)


def gives_tuple(node: fx.Node, parts: list[fx.Node], olds: list[fx.Node]) -> bool:
    """Give the call of which the parts are the results their meta, which is known."""
    key = next((k for k in ("val", "example_value") if k in olds[0].meta), None)
    if key is None or any(part.args[:1] != (node,) for part in parts):
        return False
    node.meta[key] = tuple(old.meta.get(key) for old in olds)
    return True


Call = tuple[str, Any]
"""A call of a module, as `nn_module_stack` has it: a key of its own, and (path, class)."""


def scattered(graph: fx.Graph) -> set[Call]:
    """The calls of modules whose nodes are not side by side: `torch.export.unflatten` would make two of each."""
    found, left, last = set[Call](), set[Call](), set[Call]()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            now = {(key, entry[0]) for key, entry in (node.meta.get("nn_module_stack") or {}).items()}
            found |= now & left
            left |= last - now
            last = now
    return found


def take_out(graph: fx.Graph, calls: set[Call]) -> None:
    """Take nodes out of some calls of modules, into those around."""
    for node in graph.nodes if calls else ():
        stack = node.meta.get("nn_module_stack") or {}
        if any((key, entry[0]) in calls for key, entry in stack.items()):
            node.meta["nn_module_stack"] = dict(
                itertools.takewhile(lambda item: (item[0], item[1][0]) not in calls, stack.items()))  # fmt: skip


def house(nodes: list[fx.Node], olds: list[fx.Node]) -> None:
    """Say that nodes stand in the module that all of `olds` stand in: `torch.export.unflatten` takes tuples apart at
    the borders of modules."""
    stacks = [old.meta.get("nn_module_stack") for old in olds]
    if all(isinstance(stack, dict) for stack in stacks):
        rows = zip(*(stack.items() for stack in stacks if stack is not None), strict=False)
        common = dict(row[0] for row in itertools.takewhile(lambda row: all(e == row[0] for e in row), rows))
        for node in nodes:
            node.meta["nn_module_stack"] = common


def infer(node: fx.Node, like: fx.Node) -> None:
    """The meta of a new inner node, by running it on fake tensors of what its operands are."""
    key = next((k for k in ("val", "example_value", "tensor_meta") if k in like.meta), None)
    if key is None or any(key not in n.meta for n in node.all_input_nodes):
        return
    tensor = next(filter(is_tensor, pytree.tree_leaves(like.meta[key], is_leaf=is_tensor)), None)
    metas = [tensor, *(n.meta[key] for n in node.all_input_nodes)]
    if tensor is None or type(tensor) not in PLAIN or any(is_tensor(m) and type(m) not in PLAIN for m in metas):
        return  # a DTensor, or what a file says of a tensor
    mode = getattr(tensor, "fake_mode", None) or FakeTensorMode()

    def fake(operand: fx.Node) -> Any:
        meta = operand.meta[key]
        if not is_tensor(meta) or getattr(meta, "fake_mode", None) is mode:
            return meta
        stride = meta.stride if isinstance(meta, TensorMetadata) else meta.stride()
        return torch.empty_strided(meta.shape, stride, dtype=meta.dtype, device=getattr(meta, "device", None),
                                   requires_grad=meta.requires_grad)  # fmt: skip

    target: Any = node.target
    with mode, torch.set_grad_enabled(bool(tensor.requires_grad)):
        args, kwargs = fx.map_arg((node.args, node.kwargs), fake)
        if node.op == "call_method":
            made = getattr(args[0], target)(*args[1:], **kwargs)
        elif node.op == "call_function":
            made = target(*args, **kwargs)
        else:
            return
    node.meta[key] = made if key != "tensor_meta" else pytree.tree_map_only(
        torch.Tensor, _extract_tensor_metadata, made)  # fmt: skip
