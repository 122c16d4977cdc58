"""What is claimed of an ONNX graph before a norm is looked for, against what ONNX Runtime computes.

Random chains of the operators that models compute shapes and constants with, over inputs whose sizes are fixed, named
or unknown. Of each value that lowering knows a shape, type, number, constant or sizes of, those have to be the value's,
on other inputs too; a name stands for one size in all shapes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper, numpy_helper

from normfuse.frontends.onnx import Lowering, lower
from normfuse.graph import FLOATS

Array = np.ndarray[Any, Any]
OPSETS = (9, 11, 12, 13, 14, 15, 17, 18, 19, 21, 23)
MOST = 4000
"""Elements of a value."""
TYPES = {np.dtype(t): helper.np_dtype_to_tensor_dtype(np.dtype(t))
         for t in ("float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool")}  # fmt: skip
TARGETS = ([-1], [0, -1], [-1, 0], [1, -1], [0, 0, -1], [-1, 2], [2, -1], [-1, 4])
PICKS = (0, 1, -1, [0], [1, 0], [-1], [[0], [1]], [[0, 1]])


class Draft:
    """A graph that grows by one node at a time, each of which is run at once."""

    def __init__(self, seed: int) -> None:
        self.rng, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.opset = self.rng.choice(OPSETS)
        self.values: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}
        self.nodes: list[onnx.NodeProto] = []
        names = ("N", "M", None)
        self.sizes = [[self.rng.choice([1, 2, 3, 4, 6, 8]) if self.rng.random() < 0.4 else self.rng.choice(names)
                       for _ in range(self.rng.randint(1, 4))] for _ in range(self.rng.randint(1, 3))]  # fmt: skip
        self.types = [self.rng.choice([np.float32, np.float32, np.float32, np.float16]) for _ in self.sizes]
        self.given = self.feeds()
        self.values.update(self.given)

    def feeds(self) -> dict[str, Array]:
        """Inputs, of one size for each name."""
        named = {"N": self.rng.choice([1, 2, 3, 5]), "M": self.rng.choice([1, 2, 4])}
        found: dict[str, Array] = {}
        for i, (dims, dtype) in enumerate(zip(self.sizes, self.types, strict=True)):
            shape = [d if isinstance(d, int) else named[d] if d else self.rng.choice([1, 2, 3, 5]) for d in dims]
            found[f"x{i}"] = self.numbers.standard_normal(shape).astype(dtype)
        return found

    def constant(self, array: Any) -> str:
        """A new constant."""
        name = f"c{len(self.constants)}"
        self.constants[name] = self.values[name] = np.asarray(array)
        return name

    def real(self) -> str:
        """Any value of a float type."""
        return self.rng.choice([name for name, array in self.values.items() if array.dtype.kind == "f"])

    def vector(self) -> str:
        """Some int64 value that could be sizes."""
        found = [n for n, a in self.values.items() if a.dtype == np.int64 and a.ndim <= 2 and a.size < 40]
        if not found or self.rng.random() < 0.15:
            many = range(self.rng.randint(1, 3))
            return self.constant(np.array([self.rng.choice([-1, 1, 1, 2, 3, 4, 16]) for _ in many], np.int64))
        return self.rng.choice(found)

    def some(self, share: float) -> str:
        """A vector, this share of the time, or a float."""
        return self.vector() if self.rng.random() < share else self.real()

    def axes(self, name: str, since: int, more: dict[str, Any]) -> list[str]:
        """Axes for an operator, as the input that they are from an opset on, or as an attribute."""
        rank = max(self.values[name].ndim, 1)
        axes = self.rng.sample(range(-rank, rank), self.rng.randint(1, min(2, rank)))
        if self.opset >= since:
            return [self.constant(np.array(axes))]
        more["axes"] = axes
        return []

    def grow(self) -> None:
        """Try to add a node."""
        op = self.rng.choices(list(OPERATORS), [weight for weight, _ in OPERATORS.values()])[0]
        kind, inputs, more = OPERATORS[op][1](self)
        outputs = [f"v{len(self.nodes)}_{i}" for i in range(2 if kind == "Split" else 1)]
        node = helper.make_node(kind, inputs, outputs, **more)
        feeds = {name: self.values[name] for name in dict.fromkeys(inputs)}
        infos = [helper.make_tensor_value_info(n, TYPES[a.dtype], a.shape) for n, a in feeds.items()]
        results = _run(self.model(infos, [node], [], outputs), feeds)
        if results is None or any(r.dtype not in TYPES or not 0 < r.size <= MOST for r in results):
            return
        self.nodes.append(node)
        self.values.update(zip(outputs, results, strict=True))

    def model(self, inputs: list[onnx.ValueInfoProto], nodes: list[onnx.NodeProto],
              held: list[onnx.TensorProto], outputs: list[str]) -> onnx.ModelProto:  # fmt: skip
        """A model with these parts."""
        graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name=name) for name in outputs], held)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)

    def whole(self) -> tuple[onnx.ModelProto, list[str]]:
        """The model, with some constants as nodes, and the names of what its nodes give."""
        read, held, nodes = {name for node in self.nodes for name in node.input}, [], []
        for name in read & self.constants.keys():
            tensor = numpy_helper.from_array(self.constants[name], name)
            if self.rng.random() < 0.7:
                held.append(tensor)
            else:
                nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        inputs = [helper.make_tensor_value_info(f"x{i}", TYPES[np.dtype(t)], dims)
                  for i, (dims, t) in enumerate(zip(self.sizes, self.types, strict=True))]  # fmt: skip
        names = [name for node in self.nodes for name in node.output]
        made = self.model(inputs, nodes + self.nodes, sorted(held, key=lambda t: t.name), names[-1:])
        last = helper.make_tensor_value_info(names[-1], TYPES[self.values[names[-1]].dtype], None)
        made.graph.output[0].CopyFrom(last)
        return made, names


def _run(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array] | None:
    """What ONNX Runtime makes of it, unchanged and by one thread; None where a node does not fit."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.enable_cpu_mem_arena = 4, 1, False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(found) for found in session.run(None, feeds)]
    except Exception:
        return None


Made = tuple[str, list[str], dict[str, Any]]


def _shape(d: Draft) -> Made:
    more = {"start": d.rng.randint(-3, 2)} if d.opset >= 15 and d.rng.random() < 0.4 else {}
    if more and d.rng.random() < 0.5:
        more["end"] = d.rng.randint(-2, 3)
    return "Shape", [d.rng.choice(list(d.values))], more


def _slice(d: Draft) -> Made:
    start, step, axis = d.rng.randint(-3, 2), d.rng.choice([1, 1, 1, -1, 2]), d.rng.choice([0, 0, -1, 1])
    far = 2**31 - 1 if step > 0 else -(2**31)  # of the other ONNX and ONNX Runtime do not think the same
    ends, x = [start, d.rng.choice([-1, 1, 2, 3, 100, -3, far]), axis, step], d.some(0.7)
    if d.opset < 10:
        return "Slice", [x], {"starts": ends[:1], "ends": ends[1:2], "axes": ends[2:3]}
    return "Slice", [x, *(d.constant(np.array([v])) for v in ends[: d.rng.choice([2, 4])])], {}


def _squeeze(d: Draft) -> Made:
    op, x, more = d.rng.choice(["Unsqueeze", "Squeeze"]), d.some(0.6), dict[str, Any]()
    plain = op == "Squeeze" and d.rng.random() < 0.3
    return op, [x, *([] if plain else d.axes(x, 13, more))], more


def _reduce(d: Draft) -> Made:
    op, x = d.rng.choice("ReduceMean ReduceSum ReduceProd ReduceMax ReduceL2".split()), d.some(0.4)
    more: dict[str, Any] = {}
    since = 13 if op == "ReduceSum" else 18
    axes = [] if d.rng.random() < 0.25 else d.axes(x, since, more)
    if d.opset >= since and d.rng.random() < 0.3:
        more["noop_with_empty_axes"] = 1
    if d.rng.random() < 0.6:
        more["keepdims"] = d.rng.randint(0, 1)
    return op, [x, *axes], more


def _reshape(d: Draft) -> Made:
    more = {"allowzero": 1} if d.opset >= 14 and d.rng.random() < 0.15 else {}
    to = d.vector() if d.rng.random() < 0.7 else d.constant(np.array(d.rng.choice(TARGETS)))
    return "Reshape", [d.some(0.2), to], more


def _pair(d: Draft) -> Made:
    op = d.rng.choice("Add Mul Sub Div Max Min Sum".split())
    return op, [d.vector(), d.vector()] if d.rng.random() < 0.6 else [d.real(), d.real()], {}


def _choose(d: Draft) -> Made:
    known = [name for name, array in d.values.items() if array.dtype == bool]
    if not known:
        return d.rng.choice(["Equal", "Greater", "Less"]), [d.vector(), d.vector()], {}
    pair = [d.vector(), d.vector()] if d.rng.random() < 0.5 else [d.real(), d.real()]
    return "Where", [d.rng.choice(known), *pair], {}


def _transpose(d: Draft) -> Made:
    x = d.real()
    order = d.rng.sample(range(d.values[x].ndim), d.values[x].ndim)
    return "Transpose", [x], {"perm": order} if order and d.rng.random() < 0.8 else {}


def _split(d: Draft) -> Made:
    return "Split", [d.real()], {"axis": d.rng.choice([0, -1])} | ({"num_outputs": 2} if d.opset >= 18 else {})


def _fill(d: Draft) -> Made:
    dtype = d.rng.choice([np.float32, np.int64, np.float16])
    value = numpy_helper.from_array(np.full(1, d.rng.choice([0, 1, 7]), dtype))
    return "ConstantOfShape", [d.vector()], {"value": value}


def _concat(d: Draft) -> Made:
    parts = [d.vector() for _ in range(d.rng.randint(1, 3))] if d.rng.random() < 0.7 else [d.real(), d.real()]
    return "Concat", parts, {"axis": d.rng.choice([0, 0, 0, -1, 1])}


OPERATORS: dict[str, tuple[float, Callable[[Draft], Made]]] = {
    "shape": (14, _shape), "size": (3, lambda d: ("Size", [d.rng.choice(list(d.values))], {})),
    "gather": (7, lambda d: ("Gather", [d.some(0.7), d.constant(np.array(d.rng.choice(PICKS)))],
                             {"axis": d.rng.choice([0, 0, 0, -1, 1])})),
    "slice": (6, _slice), "squeeze": (6, _squeeze), "pair": (10, _pair), "reshape": (9, _reshape),
    "fill": (3, _fill), "concat": (8, _concat),
    "cast": (6, lambda d: ("Cast", [d.rng.choice(list(d.values))],
                           {"to": d.rng.choice([1, 7, 7, 6, 10, 9, 11, 3, 2])})),
    "unary": (3, lambda d: (d.rng.choice("Neg Abs Identity Sqrt Reciprocal Relu Sigmoid Softmax".split()),
                            [d.some(0.4)], {})),
    "expand": (4, lambda d: ("Expand", [d.real(), d.vector()], {})), "transpose": (3, _transpose),
    "flatten": (3, lambda d: ("Flatten", [d.real()], {"axis": d.rng.randint(-2, 3)})), "reduce": (6, _reduce),
    "matmul": (2, lambda d: ("MatMul", [d.real(), d.real()], {})), "choose": (2, _choose), "split": (2, _split),
    "tile": (2, lambda d: ("Tile", [d.real(), d.vector()], {})),
    "range": (1, lambda d: ("Range", [d.constant(np.array(0)), d.vector(), d.constant(np.array(1))], {})),
}  # fmt: skip
"""How often, and how each is made: (operator, inputs, attributes)."""


def drawn(seed: int) -> Draft:
    """The graph of a seed."""
    draft = Draft(seed)
    for _ in range(draft.rng.randint(6, 24)):
        draft.grow()
    return draft


def wrong(seed: int) -> list[str]:
    """The claims about the graph of a seed that are not true."""
    draft = drawn(seed)
    if not draft.nodes:
        return []
    model, names = draft.whole()
    every = onnx.ModelProto()
    every.CopyFrom(model)
    del every.graph.output[:]
    every.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    low = lower(ir.from_proto(model))[0]
    for feeds in (draft.given, draft.feeds(), draft.feeds()):
        results = _run(every, feeds)
        if results is None or not all(found.size for found in results):  # reductions of nothing have odd shapes there
            continue
        sizes: dict[str, int] = {}
        for i, dims in enumerate(draft.sizes):
            sizes |= {d: n for d, n in zip(dims, feeds[f"x{i}"].shape, strict=True) if isinstance(d, str)}
        actual = feeds | dict(zip(names, results, strict=True))
        found = [line for value in low.values if value.name in actual
                 for line in _contradicted(low, value, actual[value.name], sizes)]  # fmt: skip
        if found:
            return found
    return []


def _contradicted(low: Lowering, value: ir.Value, actual: Array, sizes: dict[str, int]) -> Iterator[str]:
    claimed = low.values[value]
    where = f"{value.name} of {getattr(value.producer(), 'op_type', 'the inputs')}"

    def differ(dims: Any, real: Any) -> bool:
        return len(dims) != len(real) or any(
            d != n if isinstance(d, int) else d is not None and sizes.setdefault(d, n) != n
            for d, n in zip(dims, real, strict=True))  # fmt: skip

    if claimed.shape is not None and differ(claimed.shape, actual.shape):
        yield f"{where} has shape {actual.shape}, not {claimed.shape}"
    if claimed.dtype in FLOATS and claimed.dtype != actual.dtype.name:
        yield f"{where} is {actual.dtype}, not {claimed.dtype}"
    if value in low.sizes and differ(low.sizes[value], actual.reshape(-1).tolist()):
        yield f"{where} holds {actual.tolist()}, not {low.sizes[value]}"
    for known in (low.arrays.get(value), claimed.number):
        wide = actual.astype(np.float64)
        if known is None:
            continue
        shaped = np.shape(known) in ((), actual.shape)
        if not shaped or not np.allclose(np.asarray(known, np.float64), wide, 2e-3, equal_nan=True):
            yield f"{where} is {actual.tolist()}, not {np.asarray(known).tolist()}"
