"""Checking one replaced region of an FX graph against its replacement, by running both with torch on the CPU.

The region's own nodes are run, not the neutral ones, so that a mistake of the front end shows too. In float64 every
float type that a node names is replaced. Equal regions (the layers of a model) are checked once.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._ops import OpOverload

from normfuse.frontends.fx import Lowering
from normfuse.frontends.fx_effects import is_assert, name_of
from normfuse.frontends.fx_emit import Emitter
from normfuse.frontends.fx_meta import MISSING, is_tensor, meta_of, size_of
from normfuse.graph import Value
from normfuse.norm import Norm, Site
from normfuse.verify import Array, Check, compare

MAX_REGION = 400
_SHAPED = frozenset(
    """reshape view _unsafe_view expand broadcast_to unflatten full ones zeros new_full new_ones new_zeros bmm
    expand_as view_as reshape_as""".split()
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_TO_FLOAT = frozenset({"half", "bfloat16", "float"})


class Checker:
    """Checks sites of one graph; remembers what it has checked by the text of region and replacement."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        self.done: dict[str, Check] = {}

    def check(self, low: Lowering, site: Site) -> Check:
        """Compare the region of a site with what would take its place."""
        norm = site.norm
        boundary = list(dict.fromkeys([norm.x, *norm.parameters()]))
        nodes = region(low, site, boundary)
        if nodes is None:
            return Check(False, message="the region depends on values that cannot be reproduced alone")
        symbols: dict[str, int] = {}
        fixed = any(name_of(n) in _SHAPED for n in nodes)
        shapes = [_shape(v, norm, fixed, symbols) for v in boundary]
        old = _Program(low, nodes, boundary, site.value.native, symbols)
        new = self._replacement(low, site, boundary, symbols)
        key = "\n".join([old.text(), new.text(), repr([(v.dtype, s) for v, s in zip(boundary, shapes, strict=True)]),
                         repr(norm.compute)])  # fmt: skip
        if key not in self.done:
            tensors = [_parameter(i, v, s) for i, (v, s) in enumerate(zip(boundary, shapes, strict=True))]
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.done[key] = compare(
                        lambda x, wide: old.run([x, *tensors[1:]], wide),
                        lambda x, wide: new.run([x, *tensors[1:]], wide),
                        shapes[0],
                        norm.x.dtype or "",
                        norm.dtype,
                    )
            except Exception as why:  # torch raises anything; not checked means not kept
                text = (str(why) or type(why).__name__).splitlines()[0]
                self.done[key] = Check(False, message=f"the check could not run: {text[:200]}")
        return self.done[key]

    def _replacement(self, low: Lowering, site: Site, boundary: list[Value], symbols: dict[str, int]) -> _Program:
        graph = fx.Graph()
        inputs = {v: graph.placeholder(f"v{i}") for i, v in enumerate(boundary)}

        def operand(value: Value) -> fx.Node:
            if value not in inputs:  # what a parameter was cast from
                wide = next(v for v in boundary if _source(v, value))
                inputs[value] = graph.call_method("to", (inputs[wide], getattr(torch, value.dtype or "")))
            return inputs[value]

        nodes = self.emitter.emit(graph, site.norm, inputs[site.norm.x], operand)
        everything = [n for n in graph.nodes if n.op != "placeholder"]
        return _Program(low, everything, boundary, nodes[-1], symbols, inputs)


def _source(wide: Value, value: Value) -> bool:
    """Whether one value is made from another by casts alone."""
    current: Value | None = wide
    while current is not None and current is not value:
        node = current.producer
        current = node.inputs[0] if node is not None and node.kind == "cast" else None
    return current is value


def region(low: Lowering, site: Site, boundary: list[Value]) -> list[fx.Node] | None:
    """The FX nodes that compute a site from x and its parameters, in order; None where more is needed."""
    stop = {v.native for v in boundary}
    found: set[fx.Node] = set()
    todo: list[fx.Node] = [site.value.native]
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
        todo.extend(node.all_input_nodes)
        if len(found) > MAX_REGION:
            return None
    return [n for n in low.source.nodes if n in found]


def _shape(value: Value, norm: Norm, fixed: bool, symbols: dict[str, int]) -> tuple[int, ...]:
    """The shape to test with: rows are cut down unless a view in the region fixes them."""
    if not isinstance(value.native, fx.Node):
        return tuple(d for d in value.shape or () if isinstance(d, int))
    sizes = [size_of(d, symbols) for d in meta_of(value.native).shape]
    if value is norm.x and not fixed:
        sizes = [d if i in norm.axes else min(d, 3) for i, d in enumerate(sizes)]
    return tuple(sizes)


def _parameter(i: int, value: Value, shape: tuple[int, ...]) -> Array:
    """A random parameter, drawn from its position so that equal regions get equal ones."""
    return np.random.default_rng(i + 1).standard_normal(shape) * 0.5 + 1.25


class _Program:
    """Some nodes with their boundary, to be run in their own types or in float64."""

    def __init__(self, low: Lowering, nodes: list[fx.Node], boundary: list[Value], result: fx.Node,
                 symbols: dict[str, int], inputs: Mapping[Value, fx.Node] | None = None) -> None:  # fmt: skip
        self.low, self.nodes, self.boundary, self.result, self.symbols = low, nodes, boundary, result, symbols
        self.inputs = [inputs[v] if inputs is not None else v.native for v in boundary]

    def text(self) -> str:
        """The program, with names by position."""
        names: dict[fx.Node, str] = {n: f"v{i}" for i, n in enumerate(self.inputs) if isinstance(n, fx.Node)}
        lines = []
        for i, node in enumerate(self.nodes):
            names[node] = f"t{i}"
            slot = self.low.values.get(node)
            number = slot.number if isinstance(slot, Value) else None
            args = fx.map_arg((node.args, node.kwargs), lambda n: names.get(n) or str(self._size(n)))
            target = "" if node.op in ("placeholder", "get_attr") else node.target
            lines.append(f"{node.op} {target} {args} {number}")
        return "\n".join(lines)

    def _size(self, node: fx.Node) -> Any:
        meta, slot = meta_of(node), self.low.values.get(node)
        if isinstance(meta, torch.SymFloat):
            return slot.number if isinstance(slot, Value) and slot.number is not None else meta.node.hint
        if isinstance(meta, (tuple, list)):
            return type(meta)(size_of(d, self.symbols) for d in meta)
        return size_of(meta, self.symbols) if isinstance(meta, (int, torch.SymInt)) else meta

    def run(self, values: list[Array], wide: bool) -> Array:
        """The result for x and the parameters."""
        env: dict[Any, Any] = {}
        for i, (value, node, array) in enumerate(zip(self.boundary, self.inputs, values, strict=True)):
            tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
            if not wide or i:  # x comes as its type can hold it, give or take the rounding that `compare` tries
                tensor = tensor.to(getattr(torch, value.dtype or "float32"))
            env[node] = tensor.to(torch.float64) if wide and tensor.is_floating_point() else tensor
        for node in self.nodes:
            env[node] = self._step(node, env, wide)
            slot = self.low.values.get(node)
            if wide and isinstance(slot, Value) and slot.number is not None:
                env[node] = torch.full_like(env[node], slot.number)  # a constant as its own type holds it
        out: torch.Tensor = env[self.result]
        return out.detach().to(torch.float64).numpy()

    def _step(self, node: fx.Node, env: dict[Any, Any], wide: bool) -> Any:
        if node.op in ("placeholder", "get_attr"):
            slot, meta = self.low.values[node], meta_of(node)
            assert isinstance(slot, Value) and slot.number is not None
            shape = tuple(d for d in slot.shape or () if isinstance(d, int))
            dtype = meta.dtype if is_tensor(meta) else getattr(torch, slot.dtype or "float32")
            return torch.full(shape, slot.number, dtype=self._type(dtype, wide))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else self._size(n))
        args = tuple(self._type(a, wide) for a in args)
        kwargs = {k: self._type(v, wide) for k, v in kwargs.items()}
        if node.op == "call_method":
            name = "double" if wide and node.target in _TO_FLOAT else str(node.target)
            return getattr(args[0], name)(*args[1:], **kwargs)
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
    def _type(argument: Any, wide: bool) -> Any:
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        return torch.float64 if wide and isinstance(argument, torch.dtype) and argument in _FLOATS else argument

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
