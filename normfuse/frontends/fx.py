"""The FX front end: from a torch graph to the neutral one, before and after AOTAutograd.

Reads Dynamo graphs (torch functions, methods, operators), `torch.export` programs and aten graphs. Shapes and types
come from what the tracer left in `node.meta`; without them nothing can be told, and a note says so. The graph is only
read here; `normfuse.frontends.fx_emit` edits it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from normfuse.frontends import fx_effects
from normfuse.frontends.fx_call import Call, fold
from normfuse.frontends.fx_meta import MISSING, Symbol, dtype_of, is_tensor, label, meta_of, shape_of
from normfuse.frontends.fx_ops import ATTENTION, MODULES, OPS
from normfuse.graph import Graph, Shape, Value

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm)
_CONSTANT = re.compile(r"(_tensor_constant|lifted_tensor_|_lifted_tensor_constant)\d+$")
_STATE = re.compile(r"l_.*_(parameters|buffers)_", re.IGNORECASE)

Slot = Value | tuple["Value | None", ...] | None


class Lowering:
    """Builds the neutral graph of one FX graph.

    `state` names the placeholders that are parameters, buffers or lifted constants of an exported program; for a
    constant its tensor, whose value counts when it has one element. `autocast`: how often it is on around the graph.
    """

    def __init__(self, module: torch.nn.Module, graph: fx.Graph,
                 state: Mapping[str, torch.Tensor | None] | None = None, autocast: int = 0) -> None:  # fmt: skip
        self.module = module
        self.source = graph
        self.state = state or {}
        self.graph = Graph("")
        self.values: dict[fx.Node, Slot] = {}
        self.tainted = fx_effects.tainted(graph)
        self.segment: dict[fx.Node, tuple[int, int]] = {}
        self.subgraphs: list[str] = []
        mode = 0
        for node in graph.nodes:
            self._lower(node)
            name = fx_effects.name_of(node)
            if name in fx_effects.MODES:
                mode, autocast = mode + 1, autocast + fx_effects.MODES[name]
            self.segment[node] = (mode, autocast)
        computed = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
        if computed and not any(is_tensor(meta_of(n)) or isinstance(meta_of(n), (tuple, list)) for n in computed):
            self.graph.notes.append(("NF115", "graph", "the graph has no shapes and types in node.meta; trace it with "
                                     "torch.export or torch.compile, or run ShapeProp on it"))  # fmt: skip

    def autocast(self, path: str) -> int:
        """How often autocast is on around a sub-graph."""
        found = [0]
        for node in self.source.nodes:
            if node.target == path if node.op == "call_module" else any(
                    n.op == "get_attr" and n.target == path for n in node.all_input_nodes):  # fmt: skip
                inside = str(node.target) == "wrap_with_autocast"  # (device, type, enabled, ...)
                found.append(int(bool(node.args[2])) if inside else self.segment[node][1])
        return max(found)

    # -- values ---------------------------------------------------------------------------------------------------

    def out(self, node: fx.Node) -> Value:
        """The neutral value for the result of a node that gives one tensor."""
        value = self._value(node.name, meta_of(node), node)
        self.values[node] = value
        return value

    def outs(self, node: fx.Node) -> tuple[Value | None, ...]:
        """The neutral values for the results of a node that gives several."""
        metas = meta_of(node)
        slots = tuple(self._value(f"{node.name}.{i}", m, None) if is_tensor(m) else None for i, m in enumerate(metas))
        for value in slots:
            if value is not None:
                value.tainted = node in self.tainted
        self.values[node] = slots
        return slots

    def _value(self, name: str, meta: Any, native: fx.Node | None) -> Value:
        shape, dtype = (shape_of(meta), dtype_of(meta)) if is_tensor(meta) else (None, None)
        return self.graph.value(name, shape, dtype, native=native, tainted=native in self.tainted)

    def virtual(self, shape: Shape | None, dtype: str | None) -> Value:
        """A value that the model computes inside one operator."""
        return self.graph.value("", shape, dtype)

    def number(self, c: float, dtype: str | None, shape: Shape = ()) -> Value:
        """A constant that an operator implies."""
        return self.graph.leaf(str(c), shape, dtype, number=c if math.isfinite(c) else None, fixed=True)

    def _leaf(self, node: fx.Node, fixed: bool, number: float | None = None) -> Value:
        meta = meta_of(node)
        shape, dtype = (shape_of(meta), dtype_of(meta)) if is_tensor(meta) else (None, None)
        written = node in self.tainted
        known = number if number is not None and math.isfinite(number) and not written else None
        value = self.graph.leaf(node.name, shape, dtype, native=node, fixed=fixed and not written, tainted=written,
                                number=known)  # fmt: skip
        self.values[node] = value
        return value

    def parameter(self, path: str, tensor: torch.Tensor | None) -> Value | None:
        """A parameter of a module that the graph calls; its native form is the path of the attribute."""
        if tensor is None:
            return None
        return self.graph.leaf(path, shape_of(tensor), dtype_of(tensor), native=path, fixed=True)

    def constant(self, node: fx.Node, number: float) -> None:
        """The result of a node that is a number all over, rounded to its type."""
        meta = meta_of(node)
        exact = torch.tensor(number, dtype=meta.dtype)
        self._leaf(node, True, float(exact) if not exact.is_complex() else None)

    def operand(self, argument: Any, like: Value | None = None) -> Value | None:
        """The neutral value of an argument: a node, or a number beside a tensor; None for anything else."""
        if isinstance(argument, fx.Node):
            found = self.values.get(argument)
            return found if isinstance(found, Value) else None
        if isinstance(argument, (int, float)):
            return self.number(float(argument), like.dtype if like is not None else None)
        return None

    # -- nodes ----------------------------------------------------------------------------------------------------

    def emit(self, kind: str, inputs: list[Value], node: fx.Node, out: Value | None = None, **attrs: Any) -> Value:
        """Append a neutral node for an FX node, or a constant where all operands are numbers."""
        if out is None:
            folded = fold(kind, [v.number for v in inputs]) if node not in self.tainted else None
            if folded is not None and is_tensor(meta_of(node)):
                self.constant(node, folded)
                value = self.values[node]
                assert isinstance(value, Value)
                return value
            out = self.out(node)
        out.fixed = bool(inputs) and all(v.fixed for v in inputs) and not out.tainted
        self.graph.node(kind, inputs, [out], native=node, op=fx_effects.name_of(node) or str(node.target),
                        name=label(node), **attrs)  # fmt: skip
        return out

    def role(self, node: fx.Node, kind: str = "opaque", effect: bool = False, **attrs: Any) -> None:
        """A node about which the core knows its kind at most."""
        inputs: list[Value] = []
        operands: list[fx.Node] = []  # one that is read twice, twice
        fx.map_arg((node.args, node.kwargs), operands.append)
        for n in operands:
            slot = self.values.get(n)
            inputs += [v for v in (slot if isinstance(slot, tuple) else (slot,)) if v is not None]
        if isinstance(meta_of(node), (tuple, list)) and not is_tensor(meta_of(node)):
            outputs = [v for v in self.outs(node) if v is not None]
        else:
            outputs = [self.out(node)]
        attrs |= {"effect": True} if effect else {}
        self.graph.node(kind, inputs, outputs, native=node, op=fx_effects.name_of(node) or str(node.target),
                        name=label(node), **attrs)  # fmt: skip

    def pure(self, node: fx.Node) -> bool:
        """Whether all is known of a node, so that it may run later than the model has it."""
        slot = self.values.get(node)
        values = [v for v in (slot if isinstance(slot, tuple) else (slot,)) if v is not None]
        return bool(values) and all(v.producer is not None and v.producer.kind != "opaque" for v in values)

    def note(self, code: str, node: fx.Node, message: str) -> None:
        """A refusal that the front end itself has to make."""
        self.graph.notes.append((code, label(node), message))

    def _lower(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self._attribute(node)
        elif node.op == "output":
            for n in node.all_input_nodes:
                slot = self.values.get(n)
                for value in slot if isinstance(slot, tuple) else (slot,):
                    if value is not None:
                        value.kept = True
        elif not fx_effects.is_assert(node):
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        meta = meta_of(node)
        if node.op == "call_module":
            module = fx_effects.held(self.module, node.target)
            norm = isinstance(module, NORMS) and getattr(module, "num_groups", 1) == 1
            if norm and fx_effects.hooked(module):
                self.note("NF116", node, "hooks of the module, or a forward of its own, see what goes in and out")
        if fx_effects.written(node) or not fx_effects.known(node):
            return self.role(node, effect=True)
        if meta is not MISSING and not is_tensor(meta) and not (isinstance(meta, (tuple, list)) and meta):
            return self._scalar(node, meta)
        row = None if meta is MISSING else self._row(node)
        if row is None or not row(Call(self, node)):
            self.role(node, effect=meta is MISSING and not node.users)

    def _row(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            whole = not fx_effects.hooked(module) or not isinstance(module, (*NORMS, torch.nn.Identity, torch.nn.ReLU))
            return MODULES.get(type(module)) if whole else None
        name = fx_effects.name_of(node) or ""
        foreign = "::" in name and ("attn" in name.lower() or "attention" in name.lower())
        return ATTENTION if foreign else OPS.get(name)

    def _scalar(self, node: fx.Node, meta: Any) -> None:
        """A size, a flag or nothing: a plain number is a constant; what reads a tensor keeps it alive."""
        settled = float(meta) if isinstance(meta, (int, float)) else _settle(node, meta)
        if settled is not None:
            self.values[node] = self.number(settled, None)
            return
        inputs = [v for n in node.all_input_nodes if isinstance(v := self.values.get(n), Value)]
        shape = () if isinstance(meta, (torch.SymInt, torch.SymFloat, Symbol)) else None
        value = self.graph.value(node.name, shape, None, native=node)
        self.values[node] = value
        effect = bool(node.users and inputs) or meta is None
        self.graph.node("opaque", inputs, [value], native=node, op=fx_effects.name_of(node) or str(node.target),
                        name=label(node), **({"effect": True} if effect else {}))  # fmt: skip

    def _placeholder(self, node: fx.Node) -> None:
        meta = meta_of(node)
        if meta is not MISSING and not is_tensor(meta):
            return self._scalar(node, meta)
        constant = self.state.get(node.name)
        parameter = isinstance(meta, torch.nn.Parameter) or node.type is torch.nn.Parameter
        described = type(node.meta.get("desc")).__name__ in ("ParamAOTInput", "BufferAOTInput")
        fixed = node.name in self.state or parameter or described or _STATE.match(node.name) is not None
        self._leaf(node, fixed, _single(constant))

    def _attribute(self, node: fx.Node) -> None:
        found = fx_effects.held(self.module, node.target)
        if isinstance(found, fx.GraphModule):
            self.subgraphs.append(str(node.target))
        elif isinstance(found, torch.Tensor):
            constant = _CONSTANT.search(str(node.target)) is not None
            value = self._leaf(node, True, _single(found) if constant else None)
            if value.shape is None:
                value.shape, value.dtype = shape_of(found), dtype_of(found)


def _settle(node: fx.Node, meta: Any) -> float | None:
    """An eps that Dynamo left open (`dynamic=True`): its value while compiling, with a guard on it; else None.

    Only for a float that is added to a statistic or is the eps of an operator, so that no other float is guarded.
    """
    context = torch._guards.TracingContext.try_get()
    if not isinstance(meta, torch.SymFloat) or context is None or context.fake_mode is None:
        return None
    environment = context.fake_mode.shape_env
    if environment is None or environment is not meta.node.shape_env or environment.frozen:
        return None
    for user in node.users:
        name = fx_effects.name_of(user) or ""
        if name.endswith("_norm") or (name in ("add", "__add__", "__radd__") and any(map(_statistic, user.args))):
            return float(meta)
    return None


def _statistic(argument: Any) -> bool:
    """A mean, a variance or the like, possibly scaled."""
    for _ in range(4):
        if not isinstance(argument, fx.Node):
            return False
        name = fx_effects.name_of(argument) or ""
        if name in ("mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "einsum", "matmul") or "vec" in name:
            return True
        argument = argument.args[0] if argument.args else None
    return False


def _single(tensor: torch.Tensor | None) -> float | None:
    """The element of a real tensor that has only one."""
    if tensor is None or type(tensor) is not torch.Tensor or tensor.numel() != 1 or tensor.is_meta:
        return None
    return None if tensor.is_complex() else float(tensor.item())
