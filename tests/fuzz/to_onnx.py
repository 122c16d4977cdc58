"""A program as an ONNX model, of a random opset from 9 to 23."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.fuzz.program import Array, Op, Program, Val, later

TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE,
         "bool": TensorProto.BOOL}  # fmt: skip
IR = {9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
PLAIN = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "pow": "Pow", "neg": "Neg", "abs": "Abs", "sqrt": "Sqrt",
    "reciprocal": "Reciprocal", "max": "Max", "min": "Min", "identity": "Identity", "relu": "Relu", "tanh": "Tanh",
    "sigmoid": "Sigmoid", "matmul": "MatMul",
}  # fmt: skip
REDUCTIONS = {"mean": "ReduceMean", "sum": "ReduceSum", "sumsq": "ReduceSumSquare", "vecnorm": "ReduceL2",
              "amax": "ReduceMax"}  # fmt: skip


def write(program: Program) -> ModelProto:
    """The model; names and spellings follow from the program's seed."""
    return _Writer(program).model()


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.rng = random.Random(~program.seed)
        native = [op.kind for op in program.ops if op.kind in ("layer_norm", "rms_norm")]
        least = 23 if "rms_norm" in native else 17 if native else 13
        old = None if native else later(program.seed, "opset")
        self.opset = self.rng.randint(least, 23) if old is None else old.randint(9, 12)
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.inner: dict[str, TensorProto] | None = None
        self.fresh = 0

    def model(self) -> ModelProto:
        for op in self.program.ops:
            self.op(op)
        inputs = [_info(v) for v in self.program.inputs]
        outputs = [_info(v) for v in self.program.outputs]
        stated = [_info(op.out) for op in self.program.ops if op.branches]  # of which nothing can be inferred
        graph = helper.make_graph(self.nodes, "fuzz", inputs, outputs, list(self.tensors.values()), value_info=stated)
        imports = [helper.make_opsetid("", self.opset)]
        if self.functions:
            imports.append(helper.make_opsetid("acme", 1))
        return helper.make_model(graph, opset_imports=imports, functions=self.functions, ir_version=max(
            IR[self.opset], 8 if self.functions else 0))  # fmt: skip

    # -- parts ----------------------------------------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def name(self, hint: str = "t") -> str:
        self.fresh += 1
        return f"{hint}_{self.fresh}"

    def constant(self, array: Array) -> str:
        name = self.name("k")
        return self.tensor(name, numpy_helper.from_array(array, name))

    def tensor(self, name: str, proto: TensorProto) -> str:
        """An initializer, or a Constant node inside a function and now and then elsewhere."""
        if self.inner is not None:
            if name not in self.inner:
                self.inner[name] = proto
                self.nodes.append(helper.make_node("Constant", [], [name], value=proto))
        else:
            self.tensors[name] = proto
        return name

    def value(self, v: Val) -> str:
        if v.data is not None:
            return self.tensor(v.name, numpy_helper.from_array(v.data.astype(v.dtype), v.name))
        return v.name

    def node(self, kind: str, args: list[str], out: str | None = None, **attrs: Any) -> str:
        out = out or self.name()
        node = helper.make_node(kind, args, [out], name=self.name(kind) if self.chance(0.8) else "", **attrs)
        self.nodes.append(node)
        return out

    def axes(self, kind: str, x: str, axes: list[int], since: int, out: str, **attrs: Any) -> str:
        """A node whose axes are an input from some opset on."""
        if self.opset >= since:
            return self.node(kind, [x, self.constant(np.array(axes, np.int64))], out, **attrs)
        return self.node(kind, [x], out, axes=axes, **attrs)

    # -- operations -------------------------------------------------------------------------------------------------

    def op(self, op: Op) -> None:
        out = op.out.name
        if op.branches:
            return self.controlled(op)
        args = [self.value(v) for v in op.args]
        if op.kind in PLAIN:
            self.node(PLAIN[op.kind], args, out)
        elif op.kind in REDUCTIONS:
            self.reduction(op, args[0], out)
        else:
            getattr(self, f"_{op.kind}")(op, args, out)

    def reduction(self, op: Op, x: str, out: str) -> None:
        rank = len(op.args[0].shape)
        axes = [a - rank if self.chance(0.5) and self.opset >= 11 else a for a in op.attrs["axes"]]
        keep = {} if op.attrs["keep"] and self.chance(0.5) else {"keepdims": int(op.attrs["keep"])}
        self.axes(REDUCTIONS[op.kind], x, axes, 13 if op.kind == "sum" else 18, out, **keep)

    def _cast(self, op: Op, args: list[str], out: str) -> None:
        self.node("Cast", args, out, to=TYPES[op.attrs["to"]])

    def _trunc(self, op: Op, args: list[str], out: str) -> None:
        whole = self.node("Cast", args, to=TensorProto.INT64)
        self.node("Cast", [whole], out, to=TYPES[op.out.dtype])

    def _square(self, op: Op, args: list[str], out: str) -> None:
        if self.chance(0.5):
            self.node("Mul", args * 2, out)
        else:
            self.node("Pow", [args[0], self.constant(np.array(2.0, op.out.dtype))], out)

    def _rsqrt(self, op: Op, args: list[str], out: str) -> None:
        if self.chance(0.7):
            self.node("Reciprocal", [self.node("Sqrt", args)], out)
        else:
            self.node("Div", [self.constant(np.array(1.0, op.out.dtype)), self.node("Sqrt", args)], out)

    def _var(self, op: Op, args: list[str], out: str) -> None:
        """There is no such operator: what exporters write for it."""
        (x,), (value,) = args, op.args
        n = int(np.prod([value.shape[a] for a in op.attrs["axes"]]))
        axes, keep = list(op.attrs["axes"]), int(op.attrs["keep"])
        mean = self.axes("ReduceMean", x, axes, 18, self.name())
        d = self.node("Sub", [x, mean])
        square = self.node("Mul", [d, d])
        if op.attrs["correction"]:
            total = self.axes("ReduceSum", square, axes, 13, self.name(), keepdims=keep)
            self.node("Div", [total, self.constant(np.array(n - op.attrs["correction"], value.dtype))], out)
        else:
            self.axes("ReduceMean", square, axes, 18, out, keepdims=keep)

    def _rowdot(self, op: Op, args: list[str], out: str) -> None:
        if self.opset < 12:  # which has no Einsum
            axis = len(op.args[0].shape) - 1
            self.node("ReduceSum", [self.node("Mul", args)], out, axes=[axis], keepdims=0)
            return
        letters = "bijklm"[: len(op.args[0].shape)]
        self.node("Einsum", args, out, equation=f"{letters},{letters}->{letters[:-1]}"
                  if self.chance(0.5) else "...d,...d->...")  # fmt: skip

    def _unsqueeze(self, op: Op, args: list[str], out: str) -> None:
        self.axes("Unsqueeze", args[0], list(op.attrs["axes"]), 13, out)

    def _squeeze(self, op: Op, args: list[str], out: str) -> None:
        self.axes("Squeeze", args[0], list(op.attrs["axes"]), 13, out)

    def _reshape(self, op: Op, args: list[str], out: str) -> None:
        shape = list(op.out.shape)
        if shape and self.chance(0.3):
            shape[self.rng.randrange(len(shape))] = -1
        self.node("Reshape", [args[0], self.constant(np.array(shape, np.int64))], out)

    def _expand(self, op: Op, args: list[str], out: str) -> None:
        self.node("Expand", [args[0], self.constant(np.array(op.out.shape, np.int64))], out)

    def _transpose(self, op: Op, args: list[str], out: str) -> None:
        self.node("Transpose", args, out, perm=list(op.attrs["perm"]))

    def _half(self, op: Op, args: list[str], out: str) -> None:
        if self.opset < 10:
            self.node("Slice", args, out, starts=[0], ends=[op.out.shape[-1]], axes=[len(op.out.shape) - 1])
            return
        bounds = [self.constant(np.array([n], np.int64)) for n in (0, op.out.shape[-1], -1)]
        self.node("Slice", [args[0], *bounds], out)

    def _layer_norm(self, op: Op, args: list[str], out: str) -> None:
        attrs = {} if op.attrs["count"] == 1 and self.chance(0.3) else {"axis": -op.attrs["count"]}
        name = "LayerNormalization" if op.kind == "layer_norm" else "RMSNormalization"
        self.node(name, args, out, epsilon=op.attrs["eps"], **attrs)

    _rms_norm = _layer_norm

    # -- control ----------------------------------------------------------------------------------------------------

    def body(self, ops: list[Op]) -> list[NodeProto]:
        outer, self.nodes = self.nodes, []
        for op in ops:
            self.op(op)
        inner, self.nodes = self.nodes, outer
        return inner

    def controlled(self, op: Op) -> None:
        if op.kind == "call":
            return self.call(op)
        if op.kind == "if":
            graphs = [helper.make_graph(self.body(ops), name, [], [_info(last)])
                      for name, (ops, last) in zip(("then", "else"), op.branches, strict=True)]  # fmt: skip
            self.node("If", [op.args[0].name], op.out.name, then_branch=graphs[0], else_branch=graphs[1])
            return
        ((ops, last),) = op.branches
        turn, go, on = self.name("turn"), self.name("go"), self.name("on")
        nodes = [helper.make_node("Identity", [go], [on]), *self.body(ops)]
        carried = op.attrs["carried"]
        inputs = [helper.make_tensor_value_info(turn, TensorProto.INT64, []),
                  helper.make_tensor_value_info(go, TensorProto.BOOL, []), _info(carried)]  # fmt: skip
        outputs = [helper.make_tensor_value_info(on, TensorProto.BOOL, []), _info(last)]
        body: GraphProto = helper.make_graph(nodes, "turns", inputs, outputs)
        trips = self.constant(np.array(op.attrs["trips"], np.int64))
        self.node("Loop", [trips, self.constant(np.array(True)), self.value(op.args[0])], op.out.name, body=body)

    def call(self, op: Op) -> None:
        """A model-local function of what its body reads from outside."""
        ((ops, last),) = op.branches
        outer, self.inner = self.inner, {}
        nodes = self.body(ops)
        self.inner = outer
        made = {name for node in nodes for name in node.output}
        read = list(dict.fromkeys(name for node in nodes for name in node.input if name not in made))
        name = self.name("unit")
        function = helper.make_function("acme", name, read, [last.name], nodes,
                                        [helper.make_opsetid("", self.opset)])  # fmt: skip
        self.functions.append(function)
        self.node(name, read, op.out.name, domain="acme")


def _info(v: Val) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(v.name, TYPES[v.dtype], list(v.shape))
