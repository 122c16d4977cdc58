"""The test that catches everything, for torch graphs: both as wholes, in float64, with random constants.

Every constant is replaced by a random one whose mean is not zero, in the result by what the edits make of it, and the
outputs have to agree to 1e-12. Nodes are run one by one, with float types widened; a constant is made when it is first
read and dropped after the last node that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_map

from normfuse.config import Config
from normfuse.convert import LIMIT, Certificate, Randomiser, distance, worst
from normfuse.frontends.fx_effects import name_of

if TYPE_CHECKING:
    from normfuse.frontends.fx_convert import Editor, Weights

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WIDENING = {"float": "double", "half": "double", "bfloat16": "double"}
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
        text = (str(why).strip() or type(why).__name__).splitlines()[0]
        return Certificate(False, message=f"the certificate's check could not run: {text[:200]}")


def _certify(original: fx.GraphModule, result: fx.GraphModule, editor: Editor, weights: Weights,
             feeds: list[Any]) -> Certificate:  # fmt: skip
    own: dict[str, torch.Tensor] = {}
    for node in original.graph.nodes:
        tensor = weights.get(node) if node.op in ("placeholder", "get_attr") else None
        if tensor is not None:
            own[node.name if node.op == "placeholder" else str(node.target)] = tensor
    uniform = {n for v in editor.plan.uniform if (n := _key(v.native))}
    draw = Randomiser(uniform, {n for v in editor.plan.zero if (n := _key(v.native))})

    def random(name: str, attempt: int) -> torch.Tensor:
        tensor = own[name]
        if not tensor.is_floating_point():
            return tensor
        return torch.from_numpy(draw(name, tensor.detach().to("cpu", torch.float64).numpy(), attempt))

    def edited(name: str, attempt: int) -> torch.Tensor:
        if name not in editor.edits.made:
            return random(name, attempt)
        return torch.from_numpy(editor.edits.get(name, lambda n: random(n, attempt).double().numpy()).copy())

    for attempt in range(2):
        want = run(original, feeds, own, partial(random, attempt=attempt))
        if all(bool(torch.isfinite(v).all()) for v in want):
            break
    else:
        return Certificate(False, message="the model gives no finite result on random constants")
    again = run(original, feeds, own, partial(random, attempt=attempt))
    if worst(want, again) > 0:
        return Certificate(False, message="the model gives another result when it is run again")
    new = own | {name: own[source] for name, source in editor.edits.copies.items()}
    gap = worst(want, run(result, feeds, new, partial(edited, attempt=attempt)))
    if not gap <= LIMIT:
        return Certificate(False, gap, message=f"with random constants the results differ by {gap:.2g} in float64")
    found = Certificate(True, gap, len(draw.replaced))
    if sum(t.numel() for t in own.values()) <= MAX_ERROR_SIZE:
        exact = run(original, feeds, own, lambda name: own[name])
        now = own | editor.tensors
        before = run(original, feeds, own, lambda name: own[name], wide=False)
        after = run(result, feeds, now, lambda name: now[name], wide=False)
        found.before, found.after = distance(exact, before), distance(exact, after)
    return found


def _key(native: Any) -> str | None:
    if isinstance(native, fx.Node):
        return str(native.target) if native.op == "get_attr" else native.name
    return native if isinstance(native, str) else None


def run(module: fx.GraphModule, feeds: list[Any], constants: dict[str, torch.Tensor], give: Give,
        wide: bool = True) -> list[torch.Tensor]:  # fmt: skip
    """The float outputs of a graph in float64, given its inputs in order and a source of constants by name."""
    last: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for operand in node.all_input_nodes:
            last[operand] = node
    values: dict[fx.Node, Any] = {}
    waiting = list(feeds)

    def widen(v: Any) -> Any:
        if isinstance(v, torch.Tensor) and v.dtype in FLOATS and wide:
            return v.double()
        return torch.float64 if wide and v in FLOATS and isinstance(v, torch.dtype) else v

    def load(node: fx.Node) -> Any:
        if node not in values:
            values[node] = widen(give(node.name if node.op == "placeholder" else str(node.target)))
        return values[node]

    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                if node.name not in constants:
                    values[node] = widen(waiting.pop(0))
                continue
            if node.op == "get_attr":
                found: Any = module
                for part in str(node.target).split("."):
                    found = getattr(found, part, None)
                if not isinstance(found, torch.Tensor):
                    values[node] = found
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), load)
            if node.op == "output":
                outputs = [v for v in tree_flatten(args)[0] if isinstance(v, torch.Tensor)]
                return [v.double() if v.is_floating_point() else v for v in outputs]
            args, kwargs = tree_map(widen, args), tree_map(widen, dict(kwargs))
            values[node] = _call(module, node, list(args), kwargs, wide)
            for operand in node.all_input_nodes:
                if last[operand] is node:
                    values.pop(operand, None)
    return []


def _call(module: fx.GraphModule, node: fx.Node, args: list[Any], kwargs: dict[str, Any], wide: bool) -> Any:
    target: Any = node.target
    if node.op == "call_method":
        name = WIDENING.get(str(target), target) if wide else target
        return getattr(args[0], name)(*args[1:], **kwargs)
    if node.op == "call_module":
        part = module.get_submodule(str(target))
        if wide:
            from copy import deepcopy

            part = deepcopy(part).double()
        return part(*args, **kwargs)
    if (name_of(node) or "").startswith("_assert"):
        return None
    return target(*args, **kwargs)
