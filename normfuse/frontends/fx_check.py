"""Checking one replaced region of an FX graph against its replacement, by running both with torch on the CPU.

The region's own nodes are run, not the neutral ones, so that a mistake of the front end shows too. In float64 every
float type that a node names is replaced. Equal regions (the layers of a model) are checked once.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._ops import OpOverload

from normfuse.errors import first_line
from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_effects import is_assert, name_of
from normfuse.frontends.fx_emit import Emitter
from normfuse.frontends.fx_fused import FusedEmitter
from normfuse.frontends.fx_meta import MISSING, is_tensor, meta_of, size_of
from normfuse.frontends.fx_run import FLOATS, here, method
from normfuse.graph import Value
from normfuse.ort_values import Array
from normfuse.plan import Edit, Fused
from normfuse.verify import Check, compare, representable

MAX_REGION = 400
_FILLED = frozenset("full_like ones_like zeros_like new_full new_ones new_zeros".split())
_SHAPED = _FILLED | frozenset(
    "reshape view _unsafe_view expand broadcast_to unflatten full ones zeros bmm expand_as view_as reshape_as".split()
)


class Checker:
    """Checks edits of one graph; remembers what it has checked by the text of region and replacement."""

    def __init__(self, emitter: Emitter, fused: FusedEmitter, numerics: str = "exact") -> None:
        self.emitter, self.fused, self.exact = emitter, fused, numerics == "exact"
        self.done: dict[str, Check] = {}

    def check(self, low: Lowering, edit: Edit) -> Check:
        """Compare the region of an edit with what would take its place, each of its results by itself."""
        inputs, outputs = edit.inputs, edit.outputs
        boundary = list(dict.fromkeys([*inputs, *edit.parameters()]))
        nodes = region(low, [v.native for v in outputs], boundary)
        if nodes is None:
            return Check(False, message="the region depends on values that cannot be reproduced alone")
        symbols: dict[str, int] = {}
        fixed = any(name_of(n) in _SHAPED for n in nodes) or len({len(v.shape or ()) for v in inputs}) > 1
        axes = edit.sites[0].norm.axes
        shapes = [_shape(v, axes if i < len(inputs) else None, fixed, symbols) for i, v in enumerate(boundary)]
        old = _Program(low, nodes, boundary, [v.native for v in outputs], symbols)
        new = self._replacement(low, edit, boundary, symbols)
        key = "\n".join([old.text(), new.text(), repr([(v.dtype, s) for v, s in zip(boundary, shapes, strict=True)]),
                         repr(edit.sites[0].norm.compute)])  # fmt: skip
        if key not in self.done:
            self.done[key] = self._compare(old, new, edit, boundary, shapes)
        return self.done[key]

    def _compare(self, old: _Program, new: _Program, edit: Edit, boundary: list[Value],
                 shapes: list[tuple[int, ...]]) -> Check:  # fmt: skip
        fixed = [_parameter(i, v, s) for i, (v, s) in enumerate(zip(boundary, shapes, strict=True))]

        def runner(program: _Program, k: int) -> Callable[[Array, bool], Array]:
            def run(x: Array, wide: bool) -> Array:
                others = [np.resize(np.roll(x.ravel(), 7 * i), shapes[i]) for i in range(1, len(edit.inputs))]
                return program.run([x, *others, *fixed[len(edit.inputs) :]], wide, k)

            return run

        worst = Check(True, same=True)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for k, out in enumerate(edit.outputs):
                    found = compare(runner(old, k), runner(new, k), shapes[0], boundary[0].dtype or "",
                                    out.dtype or "", self.exact)  # fmt: skip
                    if not found.ok:
                        return found
                    if old.types.get(k) != new.types.get(k):
                        return Check(False, message=f"gives {new.types[k]} instead of {old.types[k]}")
                    worst = max(worst, found, key=lambda check: check.after)
        except Exception as why:  # torch raises anything; not checked means not kept
            return Check(False, message=f"the check could not run: {first_line(why)[:200]}")
        return worst

    def _replacement(self, low: Lowering, edit: Edit, boundary: list[Value], symbols: dict[str, int]) -> _Program:
        graph = fx.Graph()
        inputs = {v: graph.placeholder(f"v{i}") for i, v in enumerate(boundary)}

        def operand(value: Value) -> fx.Node:
            if value not in inputs:  # what a parameter was made from by a cast or an offset
                inputs[value] = _back(graph, inputs, value)
            return inputs[value]

        if isinstance(edit, Fused):
            results = self.fused.emit(graph, edit, operand, lambda n: _sizes(meta_of(n), symbols))[1]
        else:
            results = self.emitter.emit(graph, edit.site.norm, inputs[edit.site.norm.x], operand)[-1:]
        everything = [n for n in graph.nodes if n.op != "placeholder"]
        return _Program(low, everything, boundary, results, symbols, inputs)


def _back(graph: fx.Graph, inputs: Mapping[Value, fx.Node], value: Value) -> fx.Node:
    """A parameter that another one of the boundary was made from, by casts and by adding a number."""
    for wide, node in inputs.items():
        shift = 0.0
        for source, number in _origins(wide):
            if source is value:
                shifted = graph.call_function(operator.sub, (node, shift)) if shift else node
                return graph.call_method("to", (shifted, getattr(torch, value.dtype or "")))
            shift += number
    raise KeyError(value.name)


def region(low: Lowering, results: list[fx.Node], boundary: list[Value]) -> list[fx.Node] | None:
    """The FX nodes that compute results from a boundary, in order; None where more is needed."""
    stop = {v.native for v in boundary}
    found: set[fx.Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node in stop or node in found or is_assert(node):
            continue
        meta = meta_of(node)
        parts = meta if isinstance(meta, (tuple, list)) and not is_tensor(meta) else [meta]
        if meta is not MISSING and not any(is_tensor(m) for m in parts):
            continue  # a size: its value is put in
        if node.op in ("placeholder", "get_attr"):
            slot = low.values.get(node)
            if not isinstance(slot, Value) or slot.number is None:
                return None
        found.add(node)
        todo.extend(_read(low, node))
        if len(found) > MAX_REGION:
            return None
    return [n for n in low.source.nodes if n in found]


def _read(low: Lowering, node: fx.Node) -> list[fx.Node]:
    """The operands of which more than type and shape is read."""
    name, other, slot = name_of(node), node.args[1] if len(node.args) > 1 else None, low.values.get(node)
    if name in _FILLED and isinstance(slot, Value) and slot.number is not None:
        return []
    like = name in ("type_as", "view_as", "reshape_as", "expand_as")
    like = like or (name == "to" and isinstance(other, fx.Node) and is_tensor(meta_of(other)))
    return node.all_input_nodes[:1] if like else node.all_input_nodes


def _shape(value: Value, axes: tuple[int, ...] | None, fixed: bool, symbols: dict[str, int]) -> tuple[int, ...]:
    """The shape to test with: rows, off the given axes, are cut down unless a view in the region fixes them."""
    if not isinstance(value.native, fx.Node):
        return tuple(d for d in value.shape or () if isinstance(d, int))
    sizes = [size_of(d, symbols) for d in meta_of(value.native).shape]
    if axes is not None and not fixed:
        sizes = [d if i in axes else min(d, 3) for i, d in enumerate(sizes)]
    return tuple(sizes)


def _parameter(i: int, value: Value, shape: tuple[int, ...]) -> Array:
    """A random parameter, drawn from its position so that equal regions get equal ones, rounded to half types where
    what it was made of is."""
    chain = list(_origins(value))
    drawn = np.random.default_rng(i + 1).standard_normal(shape) * 0.5 + 1.25 - sum(c for _, c in chain)
    for made, number in reversed(chain):
        drawn = drawn + number
        if made.dtype in ("float16", "bfloat16"):
            drawn = representable(drawn, made.dtype)
    return drawn


def _origins(value: Value) -> Iterator[tuple[Value, float]]:
    """A parameter and what it was made of by casts and by adding numbers, each with the number added to it."""
    current: Value | None = value
    while current is not None:
        maker, source = current.producer, None
        shift: float | None = 0.0
        if maker is not None and maker.kind == "cast":
            source = maker.inputs[0]
        elif maker is not None and maker.kind == "add":
            a, b = maker.inputs
            source, shift = (b, a.number) if a.number is not None else (a, b.number)
        yield current, shift or 0.0
        current = source if shift is not None else None


def _sizes(meta: Any, symbols: dict[str, int]) -> Any:
    """A size, or several, with numbers for symbols."""
    if isinstance(meta, (tuple, list)):
        return tuple(size_of(d, symbols) for d in meta)
    return size_of(meta, symbols) if isinstance(meta, (int, torch.SymInt)) else meta


class _Program:
    """Some nodes with their boundary, to be run in their own types or in float64."""

    def __init__(self, low: Lowering, nodes: list[fx.Node], boundary: list[Value], results: list[fx.Node],
                 symbols: dict[str, int], inputs: Mapping[Value, fx.Node] | None = None) -> None:  # fmt: skip
        self.low, self.nodes, self.boundary, self.results, self.symbols = low, nodes, boundary, results, symbols
        self.inputs = [inputs[v] if inputs is not None else v.native for v in boundary]
        self.types: dict[int, torch.dtype] = {}  # of the results, as they were run last

    def text(self) -> str:
        """The program, with names by position."""
        names: dict[fx.Node, str] = {n: f"v{i}" for i, n in enumerate(self.inputs) if isinstance(n, fx.Node)}
        lines = []
        for i, node in enumerate(self.nodes):
            names[node] = f"t{i}"
            slot = self.low.values.get(node)
            number = slot.number if isinstance(slot, Value) else None
            args = fx.map_arg((node.args, node.kwargs), lambda n: names.get(n) or self._text(n))
            target = "" if node.op in ("placeholder", "get_attr") else node.target
            lines.append(f"{node.op} {target} {args} {number}")
        return "\n".join([*lines, *(names[n] for n in self.results)])

    def _text(self, node: fx.Node) -> str:
        meta = meta_of(node)
        return f"{meta.dtype} {_sizes(tuple(meta.shape), self.symbols)}" if is_tensor(meta) else str(self._size(node))

    def _given(self, node: fx.Node, wide: bool) -> Any:
        """A size, or a tensor of which the type or shape alone is read."""
        meta = meta_of(node)
        if not is_tensor(meta):
            return self._size(node)
        return torch.zeros(_sizes(tuple(meta.shape), self.symbols), dtype=here(meta.dtype, wide))

    def _size(self, node: fx.Node) -> Any:
        meta, slot = meta_of(node), self.low.values.get(node)
        if isinstance(meta, torch.SymFloat):
            return slot.number if isinstance(slot, Value) and slot.number is not None else meta.node.hint
        return _sizes(meta, self.symbols)

    def run(self, values: list[Array], wide: bool, k: int) -> Array:
        """The k-th result for the values of the boundary."""
        env: dict[Any, Any] = {}
        for i, (value, node, array) in enumerate(zip(self.boundary, self.inputs, values, strict=True)):
            tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
            if not wide or i:  # x comes as its type can hold it, give or take the rounding that `compare` tries
                tensor = tensor.to(getattr(torch, value.dtype or "float32"))
            env[node] = tensor.to(torch.float64) if wide and tensor.is_floating_point() else tensor
        for node in self.nodes:
            made = self._step(node, env, wide)
            narrow = wide and isinstance(made, torch.Tensor) and made.dtype in FLOATS  # of a call that names no type
            env[node] = made.double() if narrow else made
            slot = self.low.values.get(node)
            if wide and isinstance(slot, Value) and slot.number is not None:
                env[node] = torch.full_like(env[node], slot.number)  # a constant as its own type holds it
        out: torch.Tensor = env[self.results[k]]
        if not wide:
            self.types[k] = out.dtype
        return out.detach().to(torch.float64).numpy()

    def _step(self, node: fx.Node, env: dict[Any, Any], wide: bool) -> Any:
        if node.op in ("placeholder", "get_attr"):
            slot, meta = self.low.values[node], meta_of(node)
            assert isinstance(slot, Value) and slot.number is not None
            shape = tuple(d for d in slot.shape or () if isinstance(d, int))
            dtype = meta.dtype if is_tensor(meta) else getattr(torch, slot.dtype or "float32")
            return torch.full(shape, slot.number, dtype=here(dtype, wide))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else self._given(n, wide))
        args = tuple(here(a, wide) for a in args)
        kwargs = {k: here(v, wide) for k, v in kwargs.items()}
        if node.op == "call_method":
            return getattr(args[0], method(str(node.target), wide))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self._module(node, args, kwargs, env)
        target: Any = node.target
        if target is not operator.getitem and wide and name_of(node) in ("rms_norm", "_fused_rms_norm"):
            args, kwargs = self._default_eps(node, args, kwargs)
        return target(*args, **kwargs)

    def _module(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], env: dict[Any, Any]) -> Any:
        """The call of a module, with the parameters of the boundary in place of its own."""
        module: Any = self.low.module.get_submodule(str(node.target))
        own = {name: env.get(f"{node.target}.{name}", p) for name, p in module.named_parameters()}
        if isinstance(module, torch.nn.RMSNorm) and module.eps is None and meta_of(node).dtype != torch.float64:
            eps = torch.finfo(torch.float32).eps
            return torch.nn.functional.rms_norm(args[0], module.normalized_shape, own.get("weight"), eps)
        return torch.func.functional_call(module, own, args, kwargs)

    @staticmethod
    def _default_eps(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Without eps torch takes that of the type: here of the model's, not of float64."""
        given = args[3] if len(args) > 3 else kwargs.get("eps")
        source = node.args[0]
        dtype = meta_of(source).dtype if isinstance(source, fx.Node) and is_tensor(meta_of(source)) else None
        if given is not None or dtype == torch.float64:
            return args, kwargs
        eps = torch.finfo(torch.float32).eps
        if isinstance(node.target, OpOverload) or len(args) > 3:
            return (*(*args, None)[:3], eps), {k: v for k, v in kwargs.items() if k not in ("eps", "weight")}
        return args, {**kwargs, "eps": eps}
