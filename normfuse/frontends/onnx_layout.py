"""Norms whose statistics are taken in one layout and applied in another, written in that of the result.

    m = mean(x, 1); d = x - m; r = rsqrt(mean(d^2, 1) + eps); y = T(d) * T(r)
                                  becomes      x' = T(x); m = mean(x', -1); d = x' - m; ... y = d * r

The transpose optimisers of tf2onnx and ONNX Runtime leave it so. The nodes are the model's own, in their order, with
each operand in the other layout: nothing is rounded that was not. The facts tell the layout of every value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from normfuse.distance import distance
from normfuse.facts import ONE, ZERO, Fact, Refused, Root, RootKey
from normfuse.frontends.onnx import Lowering
from normfuse.frontends.onnx_check import MOST, OPS, in_float64
from normfuse.frontends.onnx_emit import discard, unique
from normfuse.frontends.onnx_fold import attribute
from normfuse.graph import FLOATS, Dim, Node, Value
from normfuse.norm import VIEWS, Site, match, region
from normfuse.ort_values import Array
from normfuse.passes.remove_dead import live
from normfuse.recognise import Recognition
from normfuse.sessions import is_float
from normfuse.transfer import SPREAD, align, identity_layout

AXES_INPUT = {"ReduceMean": 18, "ReduceSum": 13}
"""The reductions that are written anew, and from which opset on their axes are an input."""
COPIES = frozenset({*VIEWS, "identity"})
ELEMENTWISE = frozenset("add sub mul div neg abs square pow sqrt rsqrt reciprocal max cast".split())
MAX_NODES = 64
CLOSE = 1e-9
"""How far the same numbers may be off in float64, where sums are taken in another order, in parts of the largest."""


class _No(Exception):
    """This one stays as it is."""


@dataclass(slots=True)
class Turned:
    """A norm: its result, the root that it is one of, and the nodes between, in order."""

    value: Value
    key: RootKey
    nodes: list[Node]


def turned(low: Lowering, found: Recognition) -> list[Turned]:
    """The norms of a graph that are such."""
    keys: dict[Value, list[RootKey]] = {}
    for value, fact in found.turned:
        assert value.producer is not None
        if _permuted(fact) and value.producer.kind not in COPIES:
            keys.setdefault(value, []).append(fact.root.key())
    sites = [(site, {node for node in region(site.value, site.norm) if node.kind not in COPIES})
             for site in (found.sites if keys else ())]  # fmt: skip
    taken: set[Node] = set()
    out: list[Turned] = []
    alive = live(low.graph) if keys else set[Node]()
    for value in reversed(keys):
        if value.native is None or value.producer not in alive:
            continue
        if any(v in keys for node in value.uses for v in node.outputs):
            continue  # a step towards another
        kinds = {key: match(found.facts[value.index][key]).kind for key in keys[value]}
        for key in sorted(kinds, key=lambda key: (kinds[key] != "layer_norm", key)):
            nodes = _nodes(low, found, value, key)
            if nodes is None or not taken.isdisjoint(nodes) or not _mixed(found, value, key, nodes):
                continue
            fact, inside = found.facts[value.index][key], set(nodes)
            if all(_less(site, own, fact, kinds[key], inside) for site, own in sites if not inside.isdisjoint(own)):
                taken.update(nodes)
                out.append(Turned(value, key, nodes))
                break
    return out[::-1]


def _mixed(found: Recognition, value: Value, key: RootKey, nodes: Sequence[Node]) -> bool:
    """Whether some of its steps are in another layout than the result."""
    facts = _Facts(found, key)
    layout = facts[value.index].layout
    steps = (facts[node.outputs[0].index].layout for node in nodes if node.kind not in COPIES)
    return any(len(own) != len(layout) or any(a and a != b for a, b in zip(own, layout, strict=True)) for own in steps)


def _less(site: Site, own: set[Node], fact: Fact, kind: str, nodes: set[Node]) -> bool:
    """Whether a norm that was found is a part of another one, and the worse form."""
    if site.norm.kind != kind:  # the RMSNorm of what a LayerNorm takes the mean from
        return kind == "layer_norm" and own <= nodes
    axes, last = fact.root.axes, len(fact.layout) - len(fact.root.axes)
    inner = site.norm.axes[0] < (site.norm.x.rank or 0) - len(axes)
    places = [i for i, entry in enumerate(fact.layout) if entry and entry[0] in axes]
    return own <= nodes and inner and places == list(range(last, len(fact.layout)))


class _Facts:
    """The facts of values, by index, in one root."""

    def __init__(self, found: Recognition, key: RootKey) -> None:
        self.facts, self.key = found.facts, key

    def __contains__(self, index: int) -> bool:
        return self.key in self.facts.get(index, ())

    def __getitem__(self, index: int) -> Fact:
        return self.facts[index][self.key]


def _permuted(fact: Fact) -> bool:
    """Whether a value has the axes of its root in another order."""
    return sorted(fact.layout) == sorted(identity_layout(fact.root.value))


def _plain(fact: Fact) -> bool:
    """Whether a value is its root, in any layout."""
    if fact.kappa or fact.trace or fact.absolute or fact.partial:
        return False
    return fact.alpha == {ONE: 1.0} and fact.beta == ZERO


def _nodes(low: Lowering, found: Recognition, value: Value, key: RootKey) -> list[Node] | None:
    """The nodes between a root and its norm, if each is one of the model's and nobody else reads what they give."""
    facts = _Facts(found, key)
    root = facts[value.index].root.value
    nodes: set[Node] = set()
    todo = [value]
    while todo:
        node = todo.pop().producer
        if node is None or node in nodes:
            continue
        known = [v for v in node.inputs if v.index in facts]
        if not known or len(nodes) > MAX_NODES or not _written(low, node):
            return None
        nodes.add(node)
        todo += [v for v in known if v is not root]
    natives = [node.native for node in nodes]
    if root.native is None or len(set(natives)) < len(natives):
        return None
    for v in (v for node in nodes for v in node.outputs if v is not value):
        if (v.kept or not nodes.issuperset(v.uses)) and not (v.index in facts and _plain(facts[v.index])):
            return None
    return sorted(nodes, key=lambda node: node.index)


def _written(low: Lowering, node: Node) -> bool:
    """Whether a node can be written in another layout."""
    native = node.native
    if not isinstance(native, ir.Node) or native.graph is not low.source or native.domain not in ("", "ai.onnx"):
        return False
    if node.kind in ("mean", "sum"):
        return native.op_type in AXES_INPUT and bool(node.attrs["axes"])
    return node.kind in COPIES or (node.kind in ELEMENTWISE and len(native.outputs) == 1)


def lay(low: Lowering, found: Recognition, norms: Sequence[Turned], opset: int, used: set[str | None]) -> int:
    """Write norms in the layout of their results; how many could be. `used`: the names of the whole model."""
    inside = {node.native for norm in norms for node in norm.nodes}
    needed = {node.native for node in live(low.graph)} - inside
    places = {node: i for i, node in enumerate(low.source)}
    count = 0
    for norm in norms:
        writer = _Writer(low, found, norm, opset, used, places)
        try:
            result = writer.run()
            _name(norm, writer.nodes, used)
            _Equal(low, writer.facts, writer.root, opset).demand(norm, [*writer.reused, *writer.nodes], result)
        except (_No, Refused):
            writer.undo()
            continue
        _put(norm, writer.nodes, result, needed)
        low.values[result], norm.value.native = norm.value, result  # which the next norm may read
        count += 1
    return count


def _name(norm: Turned, nodes: list[ir.Node], used: set[str | None]) -> None:
    old: ir.Value = norm.value.native
    last = old.producer()
    assert last is not None
    for i, node in enumerate(nodes):
        node.name = unique(f"{last.name or old.name}/{i}", used)
        node.outputs[0].name = unique(f"{old.name}_{i}", used)
        node.metadata_props.update(last.metadata_props)


def _put(norm: Turned, nodes: list[ir.Node], result: ir.Value, needed: set[ir.Node]) -> None:
    old: ir.Value = norm.value.native
    last = old.producer()
    assert last is not None and last.graph is not None
    last.graph.insert_before(last, nodes)
    new = result.producer()
    assert new is not None
    new.name, new.doc_string = last.name, last.doc_string
    result.name, result.shape, result.type = old.name, old.shape, old.type
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    discard([node.native for node in reversed(norm.nodes)], needed)


class _Equal:
    """Compares the nodes of a norm with those that were made anew: all that is done later is checked against these."""

    def __init__(self, low: Lowering, facts: _Facts, root: Root, opset: int) -> None:
        self.low, self.facts, self.root, self.opset = low, facts, root, opset
        self.sizes: dict[Dim, int] = {}
        self.targets: dict[ir.Value, Array] = {}

    def demand(self, norm: Turned, nodes: list[ir.Node], result: ir.Value) -> None:
        """Raise `_No` where they give something else in float64 on random numbers, or do not run. Rows are few where
        nothing fixes their number."""
        for few in (True, False):
            try:
                self.targets = self._fewer(norm) if few else {}
                old = self._run([node.native for node in norm.nodes], norm.value.native, few)
                new = self._run(nodes, result, few)
            except Exception:  # the reference evaluator raises anything
                continue
            if old.shape != new.shape or distance(old, new) > CLOSE * float(np.max(np.abs(old), initial=0.0)):
                raise _No
            return
        raise _No

    def _run(self, nodes: list[ir.Node], out: ir.Value, few: bool) -> Array:
        inside = {v for node in nodes for v in node.outputs}
        read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v not in inside)
        feeds = {v.name or "": self._numbers(v, few) for v in read}
        model = in_float64([ir.to_proto(node) for node in nodes], list(feeds), [out.name or ""], self.opset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Any = ReferenceEvaluator(model, new_ops=OPS).run(None, feeds)
        return np.asarray(found[0])

    def _fewer(self, norm: Turned) -> dict[ir.Value, Array]:
        """The targets of Reshapes, where rows are few."""
        sizes = [self._size(i, d, True) for i, d in enumerate(self.root.value.shape or ())]
        out: dict[ir.Value, Array] = {}
        for node in norm.nodes:
            target = node.native.inputs[1] if node.native.op_type == "Reshape" else None
            array, layout = self._known(target), self.facts[node.outputs[0].index].layout
            if target is None or array is None or len(array) != len(layout):
                continue
            wanted = [math.prod(sizes[a] for a in entry) if d > 1 and entry != SPREAD else d
                      for d, entry in zip(array.tolist(), layout, strict=True)]
            out[target] = np.array(wanted, np.int64)
        return out

    def _size(self, axis: int, dim: Dim, few: bool) -> int:
        size = dim if isinstance(dim, int) else self.sizes.setdefault(dim, 2 + len(self.sizes) % 3)
        return min(size, 3) if few and isinstance(dim, int) and axis not in self.root.axes else size

    def _known(self, native: ir.Value | None) -> Array | None:
        if native is None:
            return None
        array = self.low.arrays.get(native)
        if array is None and native.const_value is not None:
            array = np.asarray(native.const_value.numpy())
        return array

    def _numbers(self, native: ir.Value, few: bool) -> Array:
        array = self.targets.get(native, self._known(native))
        if array is not None:
            return array.astype(np.float64) if is_float(array) else array
        value = self.low.value(native)
        if value.shape is None or value.dtype not in FLOATS:
            raise _No
        shape = [self._size(i, d, few and value is self.root.value) for i, d in enumerate(value.shape)]
        if math.prod(shape) > MOST:
            raise _No
        return np.random.default_rng(value.index).standard_normal(shape) + 1.0


class _Writer:
    """Makes the nodes of one norm anew."""

    def __init__(self, low: Lowering, found: Recognition, norm: Turned, opset: int, used: set[str | None],
                 places: Mapping[ir.Node, int]) -> None:  # fmt: skip
        self.low, self.norm, self.opset, self.used, self.places = low, norm, opset, used, places
        self.facts = _Facts(found, norm.key)
        fact = self.facts[norm.value.index]
        self.root, self.layout = fact.root, fact.layout
        self.nodes: list[ir.Node] = []
        self.made: dict[int, ir.Value] = {}
        self.held: list[ir.Value] = []
        self.reused: list[ir.Node] = []

    def run(self) -> ir.Value:
        """The result, in its own layout as all that it is made of."""
        for node in self.norm.nodes:
            out = node.outputs[0]
            if _plain(self.facts[out.index]):
                self.made[out.index] = self.x()
            elif node.kind in COPIES:
                self.made[out.index] = self.of(node.inputs[0])
            elif node.kind in ("mean", "sum"):
                self.made[out.index] = self.reduced(node)
            else:
                self.made[out.index] = self.elementwise(node)
        found = self.made[self.norm.value.index]
        if found.producer() not in self.nodes:
            raise _No
        return found

    def undo(self) -> None:
        """Leave no node that still counts as a reader, and no constant."""
        for node in self.nodes:
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)
        for value in self.held:
            del self.low.source.initializers[value.name or ""]

    def node(self, op: str, inputs: Sequence[ir.Value | None], attrs: Sequence[ir.Attr] = ()) -> ir.Value:
        self.nodes.append(ir.Node("", op, inputs, attrs))
        return self.nodes[-1].outputs[0]

    def constant(self, numbers: Sequence[int]) -> ir.Value:
        return self.node("Constant", [], [ir.AttrTensor("value", ir.tensor(np.array(numbers, np.int64)))])

    def x(self) -> ir.Value:
        """The root in the layout of the result."""
        index = self.root.value.index
        if index not in self.made:
            axes = [entry[0] if entry else None for entry in self.layout]
            rest = iter(a for a in range(len(axes)) if a not in axes)  # of one element: any of them
            perm = [next(rest) if a is None else a for a in axes]
            native = self.root.value.native
            self.made[index] = native if perm == sorted(perm) else self.turned(native, perm)
        return self.made[index]

    def turned(self, native: ir.Value, perm: list[int]) -> ir.Value:
        """A transpose of a value: one that stands ahead of the norm already, or a new one."""
        before = self.places[self.norm.value.native.producer()]
        for node in native.consumers():
            if node.op_type == "Transpose" and node.domain == "" and self.places.get(node, before) < before:
                if list(attribute(node, "perm", ())) == perm:
                    self.reused.append(node)
                    return node.outputs[0]
        return self.node("Transpose", [native], [ir.AttrInt64s("perm", perm)])

    def of(self, value: Value) -> ir.Value:
        return self.x() if value is self.root.value else self.made[value.index]

    def reduced(self, node: Node) -> ir.Value:
        native: ir.Node = node.native
        source = node.inputs[0]
        layout = self.facts[source.index].layout
        over = {a for i in node.attrs["axes"] for a in layout[i]}
        axes = [i for i, entry in enumerate(self.layout) if entry and entry[0] in over]
        attrs = [ir.AttrInt64("keepdims", 1)]
        if self.opset >= AXES_INPUT[native.op_type]:
            return self.node(native.op_type, [self.of(source), self.constant(axes)], attrs)
        return self.node(native.op_type, [self.of(source)], [ir.AttrInt64s("axes", axes), *attrs])

    def elementwise(self, node: Node) -> ir.Value:
        native: ir.Node = node.native
        beside = next(v for v in node.inputs if v.index in self.facts)
        inputs = [None if v is None else self.operand(self.low.value(v), v, beside) for v in native.inputs]
        return self.node(native.op_type, inputs, list(native.attributes.values()))

    def operand(self, value: Value, native: ir.Value, beside: Value) -> ir.Value:
        """What a node reads, in the layout of the result."""
        if value.index in self.facts:
            return self.of(value)
        shape = value.shape
        if shape is None or len(shape) > len(self.layout) or not all(isinstance(d, int) for d in shape):
            raise _No
        aligned = align(value, self.facts[beside.index].layout, self.root, beside.shape)
        long = [(i, entry) for i, entry in enumerate(aligned) if entry and shape[i] != 1]
        if any(entry == SPREAD or len(entry) != 1 for _, entry in long):
            raise _No
        places = [self.layout.index(entry) for _, entry in long]
        sizes = [d for d in shape if isinstance(d, int)]
        target = [1] * len(self.layout)
        for (i, _), place in zip(long, places, strict=True):
            target[place] = sizes[i]
        plain = sizes == target[len(target) - len(shape) :] and set(target[: len(target) - len(shape)]) <= {1}
        if plain and places == sorted(places):
            return native
        turn = [i for i, d in enumerate(sizes) if d == 1 or not aligned[i]]
        turn += [i for _, i in sorted(zip(places, (i for i, _ in long), strict=True))]
        tensor = native.const_value if value.leaf and value.fixed and not value.overridable else None
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            moved = native if turn == sorted(turn) else self.node("Transpose", [native], [ir.AttrInt64s("perm", turn)])
            if [sizes[i] for i in turn] == target:
                return moved
            return self.node("Reshape", [moved, self.constant(target)])
        name = unique(f"{native.name}_{self.norm.value.name}", self.used)
        held = ir.Tensor(tensor.numpy().transpose(turn).reshape(target), dtype=tensor.dtype, name=name)
        made = ir.Value(name=name, shape=ir.Shape(target), type=ir.TensorType(tensor.dtype), const_value=held)
        self.low.source.register_initializer(made)
        self.held.append(made)
        return made
