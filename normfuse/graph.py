"""The neutral graph: all that the recogniser and the passes see of an ONNX or FX graph.

A front end translates native operators into `Node`s of about thirty neutral kinds and keeps a reference to what
it translated in `native`. One native operator may become several neutral nodes (`addcmul` is a mul and an add).
Anything a front end does not know becomes kind ``"opaque"``, about which the core assumes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Dim = int | str | None
"""The size of an axis: a number, a symbol that means the same size wherever it stands, or unknown."""
Shape = tuple[Dim, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
"""Bits of the significand, the hidden one included."""

KINDS = frozenset(
    """add sub mul div neg abs square pow sqrt rsqrt reciprocal max cast identity
    mean sum var std vecnorm matmul reshape unsqueeze squeeze expand transpose layer_norm rms_norm
    linear recurrent attention activation gather slice concat where quantize opaque""".split()
)


@dataclass(slots=True, eq=False)
class Value:
    """A tensor in the graph.

    `number` is set when every element is known to equal it. `leaf` says that nothing in the graph computes the
    value; `fixed` that it is moreover the same in every run (a constant, or an initializer or parameter).
    `overridable` marks a constant that the caller may replace, which therefore is none.
    `kept` says that someone outside the node list reads it: a graph output or a control-flow sub-graph, which runs
    ahead of the node with index `captured`.
    """

    name: str
    shape: Shape | None = None
    dtype: str | None = None
    number: float | None = None
    leaf: bool = False
    fixed: bool = False
    kept: bool = False
    captured: int | None = None
    tainted: bool = False
    overridable: bool = False
    index: int = 0
    producer: Node | None = None
    uses: list[Node] = field(default_factory=list)
    native: Any = None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def __repr__(self) -> str:
        return f"%{self.name}: {self.dtype}{list(self.shape) if self.shape is not None else '[?]'}"


@dataclass(slots=True, eq=False)
class Node:
    """An operation of a neutral kind; `op` is what the model calls it, for messages."""

    kind: str
    inputs: list[Value]
    outputs: list[Value]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    op: str = ""
    index: int = 0
    native: Any = None

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(v.name for v in self.inputs)}) -> {', '.join(v.name for v in self.outputs)}"


@dataclass(slots=True, eq=False)
class Graph:
    """Nodes in topological order. `leaves` are the values that no node computes."""

    name: str = ""
    nodes: list[Node] = field(default_factory=list)
    leaves: list[Value] = field(default_factory=list)
    count: int = 0
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """(code, node, message): what the front end itself had to refuse."""
    typed: bool = False
    """Whether each number has the type of what it is added to, as ONNX's have; a number of Python's is not rounded."""

    def leaf(self, name: str, shape: Shape | None, dtype: str | None, **more: Any) -> Value:
        """Add a value that no node computes."""
        value = Value(name, shape, dtype, leaf=True, index=self.count, **more)
        self.count += 1
        self.leaves.append(value)
        return value

    def value(self, name: str, shape: Shape | None, dtype: str | None, **more: Any) -> Value:
        """A value for a node to compute."""
        value = Value(name, shape, dtype, index=self.count, **more)
        self.count += 1
        return value

    def node(self, kind: str, inputs: list[Value], outputs: list[Value], native: Any = None, op: str = "",
             name: str = "", **attrs: Any) -> Node:  # fmt: skip
        """Append a node; its inputs must exist already."""
        node = Node(kind, inputs, outputs, attrs, name, op or kind, len(self.nodes), native)
        for value in inputs:
            value.uses.append(node)
        for value in outputs:
            value.producer = node
        self.nodes.append(node)
        return node
