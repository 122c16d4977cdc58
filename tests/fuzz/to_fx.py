"""A program as a torch.fx.GraphModule, with functions, methods, operators and aten overloads mixed; and its meaning in
float64.

An if is its first branch, a loop one turn: `evaluate(..., flat=True)` says the same.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from tests.fuzz import program
from tests.fuzz.program import Array, Op, Program, Val

aten = torch.ops.aten
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bool": torch.bool}
HALVES = (torch.float16, torch.float32, torch.bfloat16)
CASTS = ("half", "float", "double", "bfloat16")
BINARY: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, torch.add, aten.add.Tensor, "add"), "sub": (operator.sub, torch.sub, aten.sub.Tensor, "sub"),
    "mul": (operator.mul, torch.mul, aten.mul.Tensor, "mul"),
    "div": (operator.truediv, torch.div, aten.div.Tensor, "div"),
    "matmul": (operator.matmul, torch.matmul, aten.matmul.default, "matmul"),
}  # fmt: skip
UNARY: dict[str, tuple[Any, ...]] = {
    "neg": (operator.neg, torch.neg, aten.neg.default, "neg"), "abs": (torch.abs, aten.abs.default, "abs"),
    "sqrt": (torch.sqrt, aten.sqrt.default, "sqrt"), "rsqrt": (torch.rsqrt, aten.rsqrt.default, "rsqrt"),
    "reciprocal": (torch.reciprocal, aten.reciprocal.default, "reciprocal"),
    "identity": (aten.clone.default, "contiguous", "clone"), "relu": (torch.relu, aten.relu.default, "relu"),
    "tanh": (torch.tanh, aten.tanh.default, "tanh"), "sigmoid": (torch.sigmoid, aten.sigmoid.default, "sigmoid"),
    "trunc": (torch.trunc, aten.trunc.default),
}  # fmt: skip
SCALAR = {"add": aten.add.Scalar, "sub": aten.sub.Scalar, "mul": aten.mul.Scalar, "div": aten.div.Scalar}


def write(program: Program) -> fx.GraphModule:
    """The graph with each result in `meta["val"]`, as ShapeProp would leave it."""
    return _Writer(program).module()


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.rng = random.Random(program.seed + 1)
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.env: dict[int, fx.Node] = {}
        self.constants = 0

    def module(self) -> fx.GraphModule:
        for v in self.program.inputs:
            node = self.graph.placeholder(v.name)
            node.meta["val"] = torch.ones(v.shape, dtype=DTYPES[v.dtype])
            self.env[v.index] = node
        with torch.no_grad():
            self.body(self.program.ops)
        self.graph.output(tuple(self.env[v.index] for v in self.program.outputs))
        later = random.Random(self.program.seed + 2)
        if later.random() < program.LATER:
            self.overwrite(later)
        return fx.GraphModule(self.root, self.graph)

    def overwrite(self, rng: random.Random) -> None:
        """Write over memory after it was read for the last time, so that what is read any later is wrong."""
        shared: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if isinstance(node.meta.get("val"), torch.Tensor):
                shared.setdefault(node.meta["val"].untyped_storage().data_ptr(), []).append(node)
        for nodes in shared.values():
            users = {user for node in nodes for user in node.users}
            last = max([*users, *nodes])
            own = all(node.op in ("call_function", "call_method") for node in nodes) and last.op != "output"
            if own and nodes[0].meta["val"].is_floating_point() and rng.random() < 0.5:
                with self.graph.inserting_after(last):
                    self.emit(rng.choice((aten.fill_.Scalar, "fill_")), rng.choice(nodes), 7.0)

    def pick(self, choices: tuple[Any, ...]) -> Any:
        return choices[int(self.rng.random() * len(choices))]

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or of a method where the target is a name."""
        named = isinstance(target, str)
        node = (self.graph.call_method if named else self.graph.call_function)(target, args, kwargs)
        real, more = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = getattr(real[0], target)(*real[1:], **more) if named else target(*real, **more)
        return node

    def value(self, v: Val, scalar: bool = False) -> Any:
        """The node of a value; with `scalar` a constant of one element may be a number."""
        if v.data is None:
            return self.env[v.index]
        if scalar and v.data.size == 1 and self.rng.random() < 0.8:
            return float(v.data.reshape(-1)[0])
        if v.data.size > 1 and len(v.shape) > 1 and np.ptp(v.data) == 0.0:  # only the graph can say that it is uniform
            return self.emit(torch.full, v.shape, float(v.data.flat[0]), dtype=DTYPES[v.dtype])
        name = f"_tensor_constant{self.constants}" if v.data.size == 1 else f"w{self.constants}"
        self.constants += 1
        tensor = torch.from_numpy(v.data.copy()).to(DTYPES[v.dtype])
        self.root.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        node.meta["val"] = tensor
        return node

    def body(self, ops: list[Op]) -> None:
        for op in ops:
            self.env[op.out.index] = self.op(op)

    def op(self, op: Op) -> fx.Node:
        if op.branches:
            inner, last = op.branches[0]
            if op.kind == "loop":
                self.env[op.attrs["carried"].index] = self.value(op.args[0])
            self.body(inner)
            return self.env[last.index]
        if op.kind in BINARY and op.kind != "matmul":
            return self.binary(op)
        args = [self.value(v, scalar=op.kind in ("pow", "max", "min") and i == 1) for i, v in enumerate(op.args)]
        if op.kind == "matmul":
            return self.emit(self.pick(BINARY["matmul"]), *args)
        if op.kind in UNARY:
            return self.emit(self.pick(UNARY[op.kind]), *args)
        found: Callable[..., fx.Node] = getattr(self, f"_{op.kind}")
        return found(op, *args)

    def binary(self, op: Op) -> fx.Node:
        a, b = (self.value(v, scalar=True) for v in op.args)
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            b = self.emit(torch.full, (), b, dtype=DTYPES[op.out.dtype])
        if not isinstance(a, fx.Node):
            return self.emit(BINARY[op.kind][0], a, b)
        if not isinstance(b, fx.Node) and self.rng.random() < 0.3:
            return self.emit(SCALAR[op.kind], a, b)
        return self.emit(self.pick(BINARY[op.kind]), a, b)

    def _pow(self, op: Op, x: fx.Node, q: Any) -> fx.Node:
        if isinstance(q, fx.Node):
            return self.emit(self.pick((torch.pow, operator.pow, aten.pow.Tensor_Tensor)), x, q)
        q = int(q) if q == int(q) and self.rng.random() < 0.7 else q
        return self.emit(self.pick((torch.pow, operator.pow, aten.pow.Tensor_Scalar, "pow")), x, q)

    def _square(self, op: Op, x: fx.Node) -> fx.Node:
        if self.rng.random() < 0.5:
            return self.emit(self.pick((torch.square, "square")), x)
        return self.emit(self.pick((torch.pow, aten.pow.Tensor_Scalar, operator.pow)), x, 2)

    def _max(self, op: Op, x: fx.Node, c: Any) -> fx.Node:
        if isinstance(c, fx.Node):
            return self.emit(self.pick((torch.maximum, aten.maximum.default)), x, c)
        return self.emit(self.pick((torch.clamp_min, aten.clamp_min.default, "clamp_min", "clamp")), x, c)

    def _min(self, op: Op, x: fx.Node, c: Any) -> fx.Node:
        if isinstance(c, fx.Node):
            return self.emit(torch.minimum, x, c)
        return self.emit(self.pick((torch.clamp_max, aten.clamp_max.default)), x, c)

    def _cast(self, op: Op, x: fx.Node) -> fx.Node:
        to = DTYPES[op.attrs["to"]]
        if self.rng.random() < 0.3:
            return self.emit(aten._to_copy.default, x, dtype=to)
        if self.rng.random() < 0.3:
            return self.emit({"float16": "half", "float32": "float", "float64": "double"}[op.attrs["to"]], x)
        return self.emit("to", x, to)

    def _dims(self, op: Op) -> list[int]:
        rank = len(op.args[0].shape)
        return [a - rank if self.rng.random() < 0.5 else a for a in op.attrs["axes"]]

    def _mean(self, op: Op, x: fx.Node) -> fx.Node:
        function, method, overload = {"mean": (torch.mean, "mean", aten.mean.dim),
                                      "sum": (torch.sum, "sum", aten.sum.dim_IntList)}[op.kind]  # fmt: skip
        if self.rng.random() < 0.4:
            return self.emit(overload, x, self._dims(op), op.attrs["keep"])
        return self.emit(self.pick((function, method)), x, dim=self._dims(op), keepdim=op.attrs["keep"])

    _sum = _mean

    def _sumsq(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(torch.sum, self.emit(torch.mul, x, x), dim=self._dims(op), keepdim=op.attrs["keep"])

    def _vecnorm(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(torch.linalg.vector_norm, x, 2, self._dims(op), op.attrs["keep"])

    def _amax(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(self.pick((torch.amax, aten.amax.default)), x, self._dims(op), op.attrs["keep"])

    def _var(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(self.pick((torch.var, aten.var.correction, "var")), x, self._dims(op),
                         correction=op.attrs["correction"], keepdim=op.attrs["keep"])  # fmt: skip

    def _rowdot(self, op: Op, x: fx.Node, y: fx.Node) -> fx.Node:
        if self.rng.random() < 0.5:
            return self.emit(torch.einsum, "...d,...d->...", x, y)
        return self.emit(torch.linalg.vecdot, x, y)

    def _unsqueeze(self, op: Op, x: fx.Node) -> fx.Node:
        for a in op.attrs["axes"]:
            x = self.emit(self.pick((torch.unsqueeze, aten.unsqueeze.default, "unsqueeze")), x, a)
        return x

    def _squeeze(self, op: Op, x: fx.Node) -> fx.Node:
        for a in reversed(op.attrs["axes"]):
            x = self.emit(self.pick((torch.squeeze, aten.squeeze.dim, "squeeze")), x, a)
        return x

    def _reshape(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(self.pick((torch.reshape, aten.reshape.default, "reshape")), x, list(op.out.shape))

    def _expand(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(self.pick((aten.expand.default, torch.broadcast_to)), x, list(op.out.shape))

    def _transpose(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(self.pick((torch.permute, aten.permute.default, "permute")), x, list(op.attrs["perm"]))

    def _half(self, op: Op, x: fx.Node) -> fx.Node:
        return self.emit(aten.slice.Tensor, x, -1, 0, op.out.shape[-1])

    def _layer_norm(self, op: Op, x: fx.Node, *params: fx.Node) -> fx.Node:
        shape = list(op.args[0].shape[len(op.args[0].shape) - op.attrs["count"] :])
        given = (*params, None, None)[: 2 if op.kind == "layer_norm" else 1]
        name = {"layer_norm": (torch.nn.functional.layer_norm, aten.layer_norm.default),
                "rms_norm": (torch.nn.functional.rms_norm, aten.rms_norm.default)}[op.kind]  # fmt: skip
        return self.emit(self.pick(name), x, shape, *given, op.attrs["eps"])

    _rms_norm = _layer_norm


def _widened(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in HALVES else argument


def run(module: fx.GraphModule, feeds: Mapping[str, Array]) -> list[Array]:
    """The outputs of a module, all floats in float64."""
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = torch.from_numpy(np.ascontiguousarray(feeds[str(node.target)]))
            elif node.op == "get_attr":
                found = module.get_buffer(str(node.target))
                env[node] = found.double() if found.is_floating_point() else found
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                if node.op == "output":
                    return [np.asarray(v.numpy()) for v in args[0]]
                found = _call(node, tuple(map(_widened, args)), {k: _widened(v) for k, v in kwargs.items()})
                casts = node.target in CASTS or any(
                    isinstance(argument, torch.dtype) for argument in (*args, *kwargs.values()))  # fmt: skip
                # a cast from one type to another makes new memory
                env[node] = found.clone() if casts and isinstance(found, torch.Tensor) else found
    raise AssertionError("a graph without output")


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        if node.target in CASTS:
            return args[0].double()
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)
