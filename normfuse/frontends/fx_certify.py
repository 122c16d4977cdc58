"""The test that catches everything, for torch graphs: both as wholes, in float64, with random constants.

Every constant is replaced by a random one whose mean is not zero, in the result by what the edits make of it, and the
outputs have to agree to 1e-12. Nodes are run one by one, with float types widened; a constant is made when it is first
read and dropped after the last node that reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_map

from normfuse.calibrate import Hook
from normfuse.config import Config
from normfuse.convert import LIMIT, SEEN, Certificate, Randomiser
from normfuse.distance import normwise, tells, worst
from normfuse.errors import first_line
from normfuse.frontends.fx_effects import held, is_assert, name_of, tainted
from normfuse.frontends.fx_graph import duplicate
from normfuse.frontends.fx_run import FLOATS, here, method

if TYPE_CHECKING:
    from normfuse.frontends.fx_convert import Editor, Weights

MAX_ERROR_SIZE = 2**28
"""Elements of weights up to which the graphs are also run with their own weights."""

Give = Callable[[str], torch.Tensor]


def certify(original: fx.GraphModule, result: fx.GraphModule, editor: Editor, weights: Weights,
            inputs: Callable[[], list[Any]], config: Config) -> Certificate | None:  # fmt: skip
    """Compare a graph with its conversion; None where verification is off."""
    if config.verify == "off":
        return None
    try:
        return _certify(original, result, editor, weights, inputs())
    except Exception as why:  # running a graph raises anything; not certified means not kept
        return Certificate(False, message=f"the certificate's check could not run: {first_line(why)[:200]}")


def _certify(original: fx.GraphModule, result: fx.GraphModule, editor: Editor, weights: Weights,
             feeds: list[Any]) -> Certificate:  # fmt: skip
    own: dict[str, torch.Tensor] = {}
    for node in original.graph.nodes:
        tensor = weights.get(node) if node.op in ("placeholder", "get_attr") else None
        if tensor is not None:
            own[node.name if node.op == "placeholder" else str(node.target)] = tensor
        if tensor is not None and weights.plain(node) is None:
            kind = type(tensor).__name__
            return Certificate(False, message=f"{node.name} is a {kind}, which the certificate cannot replace")
    uniform = {n for v in editor.plan.uniform if (n := _key(v.native))}
    draw = Randomiser(uniform, {n for v in editor.plan.zero if (n := _key(v.native))})

    def random(name: str, attempt: int) -> torch.Tensor:
        tensor = own[name]
        if not tensor.is_floating_point():
            return tensor
        return torch.from_numpy(draw(name, tensor.detach().to("cpu", torch.float64).numpy(), attempt))

    def edited(name: str, attempt: int, edits: bool = True) -> torch.Tensor:
        if name not in editor.edits.made or not edits:
            return random(editor.edits.copies.get(name, name), attempt)
        return torch.from_numpy(editor.edits.get(name, lambda n: random(n, attempt).double().numpy()).copy())

    names = [v.native.name for v in editor.plan.witnesses()]
    new = own | {name: own[source] for name, source in editor.edits.copies.items()}
    for attempt in range(2):
        want = see(original, feeds, own, partial(random, attempt=attempt), names)
        if not all(tells(v.numpy()) for v in want):
            continue
        unedited = see(result, feeds, new, partial(edited, attempt=attempt, edits=False), names)
        if editor.edits.made.keys() <= set(draw.fixed) or worst(want, unedited) > SEEN:
            break
    else:
        return Certificate(False, message="with random constants the outputs are not finite, or hide the norms")
    again = see(original, feeds, own, partial(random, attempt=attempt), names)
    if worst(want, again) > 0:
        return Certificate(False, message="the model gives another result when it is run again")
    gap = worst(want, see(result, feeds, new, partial(edited, attempt=attempt), names))
    for other in others(feeds):
        want = []
        with contextlib.suppress(Exception):  # nothing to compare with where the original does not run so
            want = see(original, other, own, partial(random, attempt=attempt), names)
        if want:
            gap = max(gap, worst(want, see(result, other, new, partial(edited, attempt=attempt), names)))
    if not gap <= LIMIT:
        return Certificate(False, gap, message=f"with random constants the results differ by {gap:.2g} in float64")
    found = Certificate(True, gap, len(draw.replaced))
    if sum(t.numel() for t in own.values()) <= MAX_ERROR_SIZE:
        exact = run(original, feeds, own, lambda name: own[name])
        now = own | editor.tensors
        before = run(original, feeds, own, lambda name: own[name], wide=False)
        after = run(result, feeds, now, lambda name: now[name], wide=False)
        found.before, found.after = normwise(exact, before), normwise(exact, after)
    return found


def others(feeds: list[Any]) -> list[list[Any]]:
    """The inputs again with other masks: what one mask hides another shows."""
    masks = [i for i, v in enumerate(feeds) if isinstance(v, torch.Tensor) and v.dtype == torch.bool and v.numel()]
    if not masks:
        return []
    random = torch.Generator().manual_seed(0)
    drawn = {i: torch.rand(feeds[i].shape, generator=random) < 0.5 for i in masks}
    return [[drawn.get(i, v) for i, v in enumerate(feeds)],
            [~v if i in drawn else v for i, v in enumerate(feeds)]]


def _key(native: Any) -> str | None:
    if isinstance(native, fx.Node):
        return str(native.target) if native.op == "get_attr" else native.name
    return native if isinstance(native, str) else None


def run(module: fx.GraphModule, feeds: list[Any], constants: dict[str, torch.Tensor], give: Give,
        wide: bool = True) -> list[torch.Tensor]:  # fmt: skip
    """The outputs of a graph, floats in float64, given its inputs in order and a source of constants by name."""
    return run_all(module, [feeds], constants, give, wide)[0]


def see(module: fx.GraphModule, feeds: list[Any], constants: Mapping[str, torch.Tensor], give: Give,
        names: Sequence[str]) -> list[torch.Tensor]:  # fmt: skip
    """The outputs in float64, and the results of the nodes of some names."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Hook:
        return lambda values: seen.update({name: torch.from_numpy(values[0])})

    outputs = run_all(module, [feeds], constants, give, watch={name: keep(name) for name in names})[0]
    return outputs + [seen[name] for name in names]


def run_all(module: fx.GraphModule, batches: Sequence[list[Any]], constants: Mapping[str, torch.Tensor], give: Give,
            wide: bool = True, watch: Mapping[str, Hook] | None = None) -> list[list[torch.Tensor]]:  # fmt: skip
    """The outputs for each of several inputs, which go through the nodes side by side on the CPU; `watch` has hooks by
    the name of a node, which see its result for all of them. What the graph writes is its own copy of what it is given.
    """
    hooks, writes = watch or {}, bool(tainted(module.graph))
    last: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for operand in node.all_input_nodes:
            last[operand] = node
    shared: dict[fx.Node, Any] = {}
    runs: list[dict[fx.Node, Any]] = [{} for _ in batches]
    waiting = [list(feeds) for feeds in batches]

    def widen(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            v = v.cpu()
            return v.double() if v.dtype in FLOATS and wide else v
        return here(v, wide)

    def own(v: Any) -> Any:
        new = widen(v)
        return new.clone() if writes and new is v and isinstance(v, torch.Tensor) else new

    def see(node: fx.Node) -> None:
        if node.name in hooks:
            new = hooks[node.name]([values[node].double().numpy() for values in runs])
            for values, array in zip(runs, new or (), strict=False):
                values[node] = torch.from_numpy(array).to(values[node].dtype)

    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                if node.name not in constants:
                    for values, left in zip(runs, waiting, strict=True):
                        values[node] = own(left.pop(0))
                    see(node)
                continue
            if node.op == "get_attr":
                found = held(module, node.target)
                if not isinstance(found, torch.Tensor):
                    shared[node] = _brought(found, wide) if isinstance(found, torch.nn.Module) else found
                continue
            for operand in node.all_input_nodes:
                if operand not in runs[0] and operand not in shared:
                    given = give(operand.name if operand.op == "placeholder" else str(operand.target))
                    for values in runs if writes else [shared]:
                        values[operand] = own(given)
            outputs = []
            for values in runs:
                args, kwargs = fx.map_arg((node.args, node.kwargs), partial(_either, values, shared))
                if node.op == "output":
                    flat = [v for v in tree_flatten(args)[0] if isinstance(v, torch.Tensor)]
                    outputs.append([v.double() if v.is_floating_point() else v for v in flat])
                    continue
                args, kwargs = tree_map(widen, args), tree_map(widen, dict(kwargs))
                values[node] = _call(module, node, list(args), kwargs, wide)
            if node.op == "output":
                return outputs
            see(node)
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    for values in (*runs, shared):
                        values.pop(operand, None)
    return [[] for _ in batches]


def with_own_state(module: torch.nn.Module) -> Any:
    """A copy to be run, which has the parameters of a module, and of all else what it writes is its own."""
    return duplicate(module, {id(p): p for p in module.parameters()})


def _either(values: dict[fx.Node, Any], shared: dict[fx.Node, Any], node: fx.Node) -> Any:
    return values[node] if node in values else shared[node]


def _brought(module: torch.nn.Module, wide: bool) -> torch.nn.Module:
    """A copy on the CPU, `wide` in float64: its tensors, and the devices and types that its graphs name, without what
    these assert of types."""
    own: torch.nn.Module = duplicate(module).cpu()
    own = own.double() if wide else own
    for part in own.modules():
        if isinstance(part, fx.GraphModule):
            for node in list(part.graph.nodes):
                if is_assert(node):
                    part.graph.erase_node(node)
                    continue
                node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), partial(here, wide=wide))
                if node.op == "call_method":
                    node.target = method(str(node.target), wide)
            part.recompile()
    return own


def _call(module: fx.GraphModule, node: fx.Node, args: list[Any], kwargs: dict[str, Any], wide: bool) -> Any:
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], method(str(target), wide))(*args[1:], **kwargs)
    if node.op == "call_module":
        return _brought(module.get_submodule(str(target)), wide)(*args, **kwargs)
    if (name_of(node) or "").startswith("_assert"):
        return None
    return target(*args, **kwargs)
