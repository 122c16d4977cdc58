"""Names, writes and aliases of FX nodes: what a node calls, what it overwrites, what shares memory with what.

Refusing is the default: a callable that is not known may write to its inputs and return views of them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from normfuse.frontends.fx_meta import is_tensor, meta_of

Function = Callable[..., Any]

ASSERTS = frozenset({"_assert_tensor_metadata"})
"""Checks of a tensor that compute nothing: they go when the tensor goes."""

MODES = {"_set_grad_enabled": 0, "_enter_autocast": 1, "_exit_autocast": -1, "_enter_inference_mode": 0,
         "_exit_inference_mode": 0, "set_grad_enabled": 0}  # fmt: skip
"""Switches of a global mode, and what they do to the depth of autocast."""

_INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem delitem".split()
)
_KEEPS_DATA = frozenset({"requires_grad_", "retain_grad"})
CREATED = frozenset("lift_fresh lift_fresh_copy tensor as_tensor scalar_tensor full zeros ones empty arange".split())
"""What makes a tensor without a history, so that to detach it is to do nothing."""
_SHARES_ALL = frozenset(
    "einsum broadcast_tensors meshgrid atleast_1d atleast_2d atleast_3d cartesian_prod flatten_dense_tensors".split()
)
_SHARES_FIRST = frozenset(
    """dropout feature_dropout alpha_dropout feature_alpha_dropout type_as sum_to_size getitem getattr pos
    resolve_conj resolve_neg conj_physical to_dense _unsafe_view unsafe_chunk unsafe_split unsafe_split_with_sizes lift
    device_put from_local""".split()
)
LATE = {"torch.distributed.tensor._api.DTensor.from_local": "from_local"}
"""Functions of modules that take long to import and that few need."""
_STATISTICS = dict.fromkeys(
    """batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm _batch_norm_impl_index
    batch_norm_gather_stats batch_norm_gather_stats_with_counts""".split(), 3
) | {"batch_norm_update_stats": 1}  # fmt: skip
"""Operators that write running statistics of which their schemas say nothing, and where the mean of these stands."""
RANDOM = frozenset(
    """rand rand_like randn randn_like randint randint_like randperm bernoulli bernoulli_ multinomial normal normal_
    uniform_ exponential_ rrelu""".split()
)
_DROPOUT = frozenset(
    """dropout dropout_ native_dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d
    dropout3d""".split()
)
FLEX = "flex_attention"
"""The higher-order operator of torch's attention: what its functions write torch refuses, and its results are new."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@cache
def functions() -> dict[Function, str]:
    """torch's own functions -> their names."""
    found: dict[Function, str] = {}
    for module in (operator, torch.Tensor, torch.linalg, torch._C._nn, torch.nn.functional, torch):
        for name in dir(module):
            if name.startswith("__") and module is not torch.Tensor:
                continue
            try:
                function = getattr(module, name)
                if callable(function) and not isinstance(function, type):
                    found[function] = getattr(function, "__name__", name)
            except (AttributeError, TypeError, RuntimeError):  # what cannot be read or hashed is no function of ours
                continue
    for name in ("_set_grad_enabled", "_log_api_usage_once"):
        found[getattr(torch._C, name)] = name
    found[getattr] = "getattr"
    autocast = torch.amp.autocast_mode
    for name in ("_enter_autocast", "_exit_autocast"):
        found[getattr(autocast, name)] = name
    return found


def name_of(node: fx.Node) -> str | None:
    """The bare name of what a node calls ("mul", "layer_norm"), or None for what is not torch's."""
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return None
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        full = target._schema.name if isinstance(target, OpOverload) else target._qualified_op_name
        namespace, _, name = full.partition("::")
        return name if namespace in ("aten", "prims") else f"{namespace}::{name}"
    if isinstance(target, HigherOrderOperator):
        return FLEX if str(target) == FLEX else None
    try:
        place = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
        return functions().get(target) or LATE.get(place)  # type: ignore[arg-type]
    except TypeError:  # not hashable
        return None


def drops(node: fx.Node) -> bool:
    """Whether a function drops values at random."""
    bare = (name_of(node) or "").rpartition("::")[2]

    def argument(i: int, *names: str, default: Any) -> Any:
        given = next((node.kwargs[name] for name in names if name in node.kwargs), default)
        return node.args[i] if len(node.args) > i else given

    if bare == "scaled_dot_product_attention":
        return bool(argument(4, "dropout_p", default=0) != 0)
    train = argument(2, "training", "train", default=True) is not False
    return bare in _DROPOUT and train and bool(argument(1, "p", default=0.5) != 0)


def is_assert(node: fx.Node) -> bool:
    """A check of a tensor's metadata, to be dropped with the tensor."""
    return node.op == "call_function" and name_of(node) in ASSERTS


def _modules(node: fx.Node) -> Iterator[torch.nn.Module]:
    """The module that a node calls, or the sub-graphs that a higher-order operator is given."""
    nodes = [node] if node.op == "call_module" else [n for n in node.all_input_nodes if n.op == "get_attr"]
    for module in (held(n.graph.owning_module, n.target) for n in nodes):
        if isinstance(module, torch.nn.Module):
            yield module


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values this one overwrites, as far as can be told: all inputs of what is not known."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return []
    hidden = _hidden_writes(node)
    if name_of(node) == FLEX:
        return []
    if isinstance(node.target, OpOverload):
        return hidden + _schema_writes(node, node.target)
    out = hidden + nodes_in(node.kwargs.get("out"))
    name = name_of(node)
    if node.op == "call_module" or isinstance(node.target, HigherOrderOperator):
        inner = list(_modules(node))
        pure = inner or "functional" in str(node.target)  # an operator that hides what it runs may write
        own = [n for m in inner for n in _state(node, m)]
        return own if pure and not any(_module_writes(m) for m in inner) else own + list(node.all_input_nodes)
    if name is None:
        return list(node.all_input_nodes)
    bare = name.strip("_")
    inplace = name in _INPLACE_OPERATORS or bare in _INPLACE_OPERATORS or (
        name.endswith("_") and not name.endswith("__") and bare)  # fmt: skip
    kept = name in _KEEPS_DATA or (name == "detach_" and without_history(node.args[0], True))
    if not kept and (inplace or (node.op == "call_function" and _inplace_flag(node))):
        out += nodes_in(node.args[:1]) or list(node.all_input_nodes)
    for i, argument in _packet_writes(name) if not kept else ():
        out += nodes_in(node.args[i] if i < len(node.args) else node.kwargs.get(argument))
    return out


@cache
def _packet_writes(name: str) -> list[tuple[int, str]]:
    """The tensors, or of those that work on lists the lists, that some operator of a name writes, results aside.

    Others that are said to be written are lists of TorchScript's: `sort` has such.
    """
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return []
    found = [getattr(packet, o)._schema for o in packet.overloads() if "out" not in o]  # type: ignore[no-untyped-call]
    lists = {"List[Tensor]"} if name.startswith(("_foreach", "_fused", "_amp")) else set()
    kinds = {"Tensor", "Optional[Tensor]"} | lists
    return sorted({(i, a.name) for schema in found for i, a in enumerate(schema.arguments)
                   if a.alias_info is not None and a.alias_info.is_write and str(a.type) in kinds})  # fmt: skip


def _hidden_writes(node: fx.Node) -> list[fx.Node]:
    """What functions overwrite whose name and schema do not say so."""
    name, functional = name_of(node) or "", getattr(node.target, "__module__", "") == "torch.nn.functional"
    if name in _STATISTICS:
        at = 1 if functional else _STATISTICS[name]
        means = node.args[at : at + 2]
        told = True if "stats" in name else node.args[5] if len(node.args) > 5 else node.kwargs.get(
            "training", node.kwargs.get("use_input_stats", name == "instance_norm"))  # fmt: skip
        named = [node.kwargs.get(n) for n in ("running_mean", "running_var")]
        return [] if told is False else nodes_in((means, named))
    if name in ("embedding", "embedding_bag") and functional:
        limit = node.args[3] if len(node.args) > 3 else node.kwargs.get("max_norm")
        return [] if limit is None else nodes_in((node.args[1:2], node.kwargs.get("weight")))
    return []


def _schema_writes(node: fx.Node, op: OpOverload) -> list[fx.Node]:
    name = op._schema.name.partition("::")[2]
    if not op._schema.is_mutable or name in _KEEPS_DATA or (name == "detach_" and without_history(node.args[0], True)):
        return []
    out: list[fx.Node] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            out += nodes_in(node.args[i] if i < len(node.args) else node.kwargs.get(argument.name))
    return out


def without_history(node: Any, inplace: bool) -> bool:
    """Whether no gradient goes through a node, so that to detach it is to do nothing.

    It was just made; or Dynamo, which makes a new graph where that changes, has seen that it has none (not `inplace`,
    which changes what it has seen).
    """
    if not isinstance(node, fx.Node):
        return False
    seen = node.meta.get("example_value")
    guarded = not inplace and is_tensor(seen) and not getattr(seen, "requires_grad", True)
    return guarded or (node.op == "call_function" and name_of(node) in CREATED)


def hooked(module: torch.nn.Module) -> bool:
    """Whether a call of one of torch's modules is more than that of the `forward` of its class."""
    return _patched(module) or any(getattr(module, name, None) for name in _HOOKS)


def _patched(module: torch.nn.Module) -> bool:
    return "forward" in vars(module) and type(module).__module__.startswith("torch.nn.modules")


def _hooks_write(module: torch.nn.Module) -> bool:
    """Whether hooks may write what goes in or out; those of torch's own utilities write the module's weight alone."""
    hooks = [hook for name in _HOOKS[:2] for hook in (getattr(module, name, None) or {}).values()]
    return any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)


def _state(node: fx.Node, module: torch.nn.Module) -> list[fx.Node]:
    """The nodes that give parameters and buffers of a module which its call may write."""
    kinds = torch.nn.modules.batchnorm._NormBase, (torch.nn.Embedding, torch.nn.EmbeddingBag)

    def writes(part: torch.nn.Module) -> bool:
        if isinstance(part, kinds[0]):
            return part.training and part.running_mean is not None
        if isinstance(part, kinds[1]) and part.max_norm is not None:
            return True
        return _module_writes(part) or any(getattr(part, name, None) for name in _HOOKS[:2])

    parts = [] if isinstance(module, fx.GraphModule) else [part for part in module.modules() if writes(part)]
    own = {_memory(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    found = _attributes(node.graph) if own else {}
    return [n for memory in own for n in found.get(memory, ())]


def _attributes(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """The nodes that give what a module holds, by its memory; made once for a graph of this many nodes, and kept on it,
    so that it goes when the graph goes."""
    found: dict[int | None, list[fx.Node]]
    size, found = vars(graph).get("_normfuse_attributes", (0, {}))
    if size != len(graph.nodes):
        found = {}
        for n in graph.nodes:
            if n.op == "get_attr":
                found.setdefault(storage_of(n), []).append(n)
        vars(graph)["_normfuse_attributes"] = len(graph.nodes), found
    return found


def _module_writes(module: torch.nn.Module) -> bool:
    if isinstance(module, fx.GraphModule):
        return any(written(n) for n in module.graph.nodes)
    ours = type(module).__module__.startswith(("torch.nn.modules", "torch.export."))
    return bool(getattr(module, "inplace", False)) or not ours or _patched(module) or _hooks_write(module)


def _inplace_flag(node: fx.Node) -> bool:
    """A call of a Python function such as relu(x, inplace=True)."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    at = _inplace_position(node.target)
    return 0 <= at < len(node.args) and bool(node.args[at])


@cache
def _inplace_position(function: Function) -> int:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return -1
    return names.index("inplace") if "inplace" in names else -1


def nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, lambda n: found.append(n))
    return found


def known(node: fx.Node) -> bool:
    """Whether the node calls something of torch's, so that it has no effects beyond those of its writes."""
    if node.op == "call_module":
        return not any(_module_writes(m) for m in _modules(node))
    return node.op == "call_method" or isinstance(node.target, OpOverload) or name_of(node) is not None


def shared(node: fx.Node) -> list[fx.Node]:
    """The inputs that the result may share memory with: none for new memory, all for what is not known."""
    name = name_of(node)
    if node.op not in ("call_function", "call_method", "call_module"):
        return []
    if name is None or name in _SHARES_ALL:
        return list(node.all_input_nodes)
    if name == "getitem" and any(is_tensor(meta_of(n)) for n in nodes_in(node.args[1:])):
        return []
    if name == FLEX:
        return []
    first = nodes_in(node.args[:1]) or list(node.all_input_nodes)
    if name in _SHARES_FIRST:
        return first
    if isinstance(node.target, OpOverload):
        return [] if all(r.alias_info is None for r in node.target._schema.returns) else first
    if node.op == "call_function" and getattr(operator, name, None) is node.target:
        return first if name in _INPLACE_OPERATORS else []
    return [] if _fresh_packet(name) else first


def given(node: fx.Node) -> bool:
    """Whether a graph gives a result, or a view of it."""
    views = [node]
    for view in views:
        views += [user for user in view.users if view in shared(user) and user not in views]
    return any(user.op == "output" for view in views for user in view.users)


@cache
def _fresh_packet(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return False
    overloads = [getattr(packet, o) for o in packet.overloads() if "out" not in o]  # type: ignore[no-untyped-call]
    return all(r.alias_info is None for o in overloads for r in o._schema.returns)


def storage_of(node: fx.Node) -> int | None:
    """What a result shares with those that lie in the same memory, as far as its tensor tells."""
    found = meta_of(node)
    if not isinstance(found, torch.Tensor) and node.op == "get_attr":
        found = held(node.graph.owning_module, node.target)
    return _memory(found)


def _memory(tensor: Any) -> int | None:
    try:
        return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None
    except (NotImplementedError, RuntimeError):  # a layout without a storage
        return None


def held(module: Any, path: Any) -> Any:
    """What a module has under a dotted path, or None."""
    for part in str(path).split("."):
        module = getattr(module, part, None)
    return module


def tainted(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The nodes whose memory somebody overwrites after them, with all that may share it, and the writes to that memory,
    in their order. Linear in the graph.

    What is made of that memory once it was written for the last time, a view say, stays what it is.
    """
    places = {node: i for i, node in enumerate(graph.nodes)}
    writes: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        for n in written(node):
            writes.setdefault(n, {})[node] = None
    if not writes:
        return {}
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while (above := parent.get(node, node)) is not node:
            parent[node] = parent.get(above, above)
            node = above
        return node

    for node in graph.nodes:
        for n in (*shared(node), *nodes_in(node.kwargs.get("out"))):
            parent[find(n)] = find(node)
    owners: dict[int, fx.Node] = {}
    for node in graph.nodes:
        storage = storage_of(node)
        if storage is not None:
            parent[find(owners.setdefault(storage, node))] = find(node)
    found: dict[fx.Node, dict[fx.Node, None]] = {}
    for node, by in writes.items():
        found.setdefault(find(node), {}).update(by)
    ordered = {root: sorted(by, key=places.__getitem__) for root, by in found.items()}
    each = ((node, ordered.get(find(node), [])) for node in places)
    return {node: by for node, by in each if by and places[node] < places[by[-1]]}
