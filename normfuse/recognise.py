"""The one loop: from a graph to a fact for every value, the norms among them, and the nearest misses.

First the roots: wherever a statistic is taken, the tensors that it may be a statistic of. Then one pass over the
nodes in topological order, in which each value gets a fact per root that reaches it (`MAX_ROOTS` at most, so time
is linear). Which of the values are norms is for `sites.py` to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from normfuse.facts import MEAN, ONE, ZERO, Atom, Fact, Layout, Refused, Root, RootKey, constant, formula
from normfuse.graph import FLOATS, Graph, Node, Value
from normfuse.norm import VIEWS, Refusal, Site
from normfuse.sites import Chooser, Miss
from normfuse.transfer import REDUCTIONS, RULES, SPREAD, align, start

MAX_ROOTS = 32
MAX_WALK = 16
MAX_READERS = 64
HEAVY = 99
"""The rank that what is no parameter counts for."""

ELEMENTWISE = frozenset("add sub mul div neg abs square pow sqrt rsqrt reciprocal max cast identity".split())
STATISTICS = frozenset("mean sum var std vecnorm".split())
ROOTED = frozenset("sqrt rsqrt std vecnorm".split())
TELLING = ("NF112", "NF117")
"""Refusals that explain a miss even where they stand before any statistic."""


@dataclass(slots=True)
class Recognition:
    """What is known of a graph: facts per value index and root, the sites in topological order, the refusals, and what
    has the form of a norm in another layout than its root."""

    facts: dict[int, dict[RootKey, Fact]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    turned: list[tuple[Value, Fact]] = field(default_factory=list)

    def describe(self, value: Value) -> str:
        """The fact of a value as a formula; a value about which nothing is known is its own root."""
        facts = self.facts.get(value.index)
        if not facts:
            return value.name
        fact = next(iter(facts.values()))
        return formula(fact, fact.root.value.name)


def recognise(graph: Graph) -> Recognition:
    """Find every norm of a graph. Time is linear in its size, the result a function of the graph alone."""
    return _Recogniser(graph).run()


class _Recogniser:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.out = Recognition()
        self.facts = self.out.facts
        self.light: dict[int, int] = {}  # value -> largest rank of the inputs that it is made of, if it is a parameter
        self.stat: set[int] = set()
        self.params: dict[int, Value] = {}
        self.askew: set[tuple[RootKey, int]] = set()  # parameters that do not line up with the axes of a root
        self.roots: dict[int, dict[tuple[int, ...], Root]] = {}
        self.seeds: dict[int, list[Root]] = {}  # reduction node -> its candidate roots
        self.misses: dict[RootKey, list[Miss]] = {}
        self.early: dict[RootKey, tuple[str, str, str]] = {}  # the first miss before any statistic that may say why

    def run(self) -> Recognition:
        for value in self.graph.leaves:
            self.light[value.index] = 0 if value.fixed else len(value.shape) if value.shape else HEAVY
        for node in self.graph.nodes:
            self._classify(node)
        for node in self.graph.nodes:
            if node.kind in REDUCTIONS:
                self._seed(node)
        for value in self.graph.leaves:
            self._plant(value)
        for node in self.graph.nodes:
            self._step(node)
        chooser = Chooser(self.graph, self.facts, self.params, self.askew, self.misses)
        self.out.sites, self.out.turned = chooser.sites(), chooser.turned
        self._refusals()
        return self.out

    # -- what is a parameter, what is a statistic ------------------------------------------------------------------

    def _classify(self, node: Node) -> None:
        if not node.outputs:
            return
        out = node.outputs[0]
        if node.kind in ELEMENTWISE or node.kind in VIEWS:
            ranks = [self.light.get(v.index, HEAVY) for v in node.inputs if v.number is None]
            self.light[out.index] = max(ranks, default=0)
            stats = [v for v in node.inputs if v.number is None and not self._parameter(v)]
            if stats and all(v.index in self.stat for v in stats):
                self.stat.add(out.index)
        elif node.kind in ("mean", "sum", "var", "std", "vecnorm") or (
            node.kind == "matmul"
            and (any(v.number is not None for v in node.inputs) or (out.shape is not None and out.shape[-1:] == (1,)))
        ):
            self.stat.add(out.index)
        elif node.kind == "quantize" and out.fixed:  # a weight that is kept in fewer bits
            self.light[out.index] = 0

    def _parameter(self, value: Value) -> bool:
        """Surely a parameter: made of constants, or of inputs of rank 1 at most."""
        return self.light.get(value.index, HEAVY) <= 1

    # -- roots ----------------------------------------------------------------------------------------------------

    def _seed(self, node: Node) -> None:
        value = node.inputs[0] if node.inputs[0].number is None else node.inputs[-1]
        if node.kind == "mean" and value.dtype not in FLOATS and value.dtype is not None:
            self._unread(node, "NF113", f"the mean of a tensor of type {value.dtype}")
        if value.rank is None:
            if node.kind in ("mean", "var", "std"):
                self._unread(node, "NF115", f"the shape of {value.name} is not known")
            return
        if node.kind == "matmul":
            if self._parameter(value) or value.rank < 2:
                return
            shape = node.outputs[0].shape
            if all(v.number is None for v in node.inputs) and not (
                    shape and (len(shape) == 1 or shape[-1] in (1, None))):  # fmt: skip
                return
            axis = value.rank - 1 if value is node.inputs[0] else value.rank - 2
            axes: tuple[int, ...] | None = (axis,)
        else:
            axes = node.attrs["axes"]
        if axes is None:
            self._unread(node, "NF114", "the axes of the mean are known only at run time")
            return
        found: list[Root] = []
        written = False
        for v, reduced in self._origins(value, axes):
            assert v.shape is not None
            over = tuple(a for a in reduced if v.shape[a] != 1)
            if v.tainted:
                written = written or bool(over)
            elif over:
                found.append(self.roots.setdefault(v.index, {}).setdefault(over, Root(v, over, _size(v, over))))
        squared = value.producer is not None and value.producer.kind in ("square", "pow")
        if written and not found and (squared or node.kind in ("var", "std", "vecnorm")):
            self.out.refusals.append(Refusal("NF120", node.name, f"{value.name} or a view of it is written in place"))
        self.seeds[node.index] = found

    def _unread(self, node: Node, code: str, message: str) -> None:
        """Refuse a statistic of which nothing is known; a mean that goes into no root is no norm's."""
        if _rooted(node):
            self.out.refusals.append(Refusal(code, node.name, message))

    def _origins(self, value: Value, axes: tuple[int, ...]) -> Iterator[tuple[Value, tuple[int, ...]]]:
        """The tensors that a statistic of `value` may be a statistic of, with the axes seen from them."""
        todo = [(value, tuple(sorted(axes)))]
        seen: set[int] = set()
        while todo and len(seen) < MAX_WALK:
            v, over = todo.pop(0)
            if v.index in seen or v.dtype not in FLOATS or v.number is not None:
                continue
            seen.add(v.index)
            yield v, over
            node = v.producer
            if node is None or node.outputs[0] is not v:
                continue
            if node.kind in VIEWS:
                source = node.inputs[0]
                layout = _view(node, source)
                if layout is not None and node.kind != "expand":
                    todo.append((source, tuple(sorted(a for i in over for a in layout[i]))))
            elif node.kind in ("mean", "sum") and node.attrs["axes"]:  # a mean in several steps
                taken, source = node.attrs["axes"], node.inputs[0]
                if source.rank is not None:
                    kept = [a for a in range(source.rank) if node.attrs["keepdims"] or a not in taken]
                    todo.append((source, tuple(sorted({*(kept[a] for a in over), *taken}))))
            elif node.kind in ELEMENTWISE:
                for i, operand in enumerate(node.inputs):
                    others = [o for j, o in enumerate(node.inputs) if j != i]
                    scaled = all(o.number is not None or o.index in self.stat or self._parameter(o) for o in others)
                    square = node.kind == "mul" and operand.shape == v.shape
                    squared = node.kind in ("square", "pow") or (square and node.inputs[0] is node.inputs[-1])
                    whole = squared or operand.index not in self.stat  # what is squared may be a mean over other axes
                    if operand.rank == v.rank and (scaled or square) and whole:
                        todo.append((operand, over))

    def _plant(self, value: Value) -> None:
        for root in self.roots.get(value.index, {}).values():
            self.facts.setdefault(value.index, {})[root.key()] = start(root)

    # -- facts ----------------------------------------------------------------------------------------------------

    def _step(self, node: Node) -> None:
        rule = RULES.get(node.kind)
        roots: dict[RootKey, Root] = {}
        for v in node.inputs:
            for key, fact in self.facts.get(v.index, {}).items():
                roots[key] = fact.root
        if rule is not None:
            out = node.outputs[0]
            for key in list(roots):  # what is overwritten later may be something else where it is read
                over = next((v for v in node.inputs if v.tainted and key in self.facts.get(v.index, ())), None)
                if over is not None:
                    self._miss(key, node, Refused("NF120", f"{over.name} or a view of it is written in place"))
                    del roots[key]
            made: dict[RootKey, Fact] = {}
            for key in sorted(roots, reverse=True):
                if len(made) == MAX_ROOTS:
                    break
                try:
                    made[key] = rule(node, self._operands(node, roots[key]))
                except Refused as why:
                    self._miss(key, node, why)
            if made:
                self.facts[out.index] = made
        else:
            for key in roots:
                self._miss(key, node, Refused("NF106", f"statistics go into {node.op}, which is not part of a norm"))
        for v in node.outputs:
            self._plant(v)

    def _operands(self, node: Node, root: Root) -> list[Fact]:
        key = root.key()
        known = [self.facts.get(v.index, {}).get(key) for v in node.inputs]
        layout, beside = next((f.layout, v.shape) for f, v in zip(known, node.inputs, strict=True) if f is not None)
        out = []
        for i, (v, fact) in enumerate(zip(node.inputs, known, strict=True)):
            if fact is not None:
                out.append(fact)
            elif v.number is not None:
                aligned = _matrix(v, i, layout) if node.kind == "matmul" else align(v, layout, root, beside)
                out.append(Fact(root, ZERO, ZERO, constant(v.number), aligned))
            elif v.overridable and _single(v):
                raise Refused("NF122", f"{v.name} may be replaced by the caller, so it is no constant")
            elif self._scales(v, root) and node.kind != "matmul":
                atom: Atom = ("p", v.index, v.name)
                self.params[v.index] = v
                aligned = align(v, layout, root)
                if _askew(aligned, root):
                    self.askew.add((key, v.index))
                out.append(Fact(root, ZERO, ZERO, {((atom, 1.0),): 1.0}, aligned))
            elif _single(v) and node.kind != "matmul":
                raise Refused("NF104", f"{v.name} is computed at run time, not a constant")
            else:
                name = root.value.name
                raise Refused("NF106", f"the statistics of {name} meet {v.name}, which is not {name} or a parameter")
        return out

    def _scales(self, value: Value, root: Root) -> bool:
        """Whether a value may be a parameter of a norm of this root: light enough, and not what the root is made of."""
        if self.light.get(value.index, HEAVY) > len(root.axes):
            return False
        made = not value.fixed and any(index == value.index for index, _ in self.facts.get(root.value.index, ()))
        return not made and (value.shape != root.value.shape or not _akin(value, root.value))

    def _miss(self, key: RootKey, node: Node, why: Refused) -> None:
        known = [self.facts[v.index][key] for v in node.inputs if key in self.facts.get(v.index, ())]
        level = max(f.advanced for f in known)
        if level >= 2 or (level and why.code == "NF107") or why.code == "NF110":
            self.misses.setdefault(key, []).append((level, node.index, why.code, node.name, why.message))
        elif why.code in TELLING:
            self.early.setdefault(key, (why.code, node.name, why.message))

    # -- refusals -------------------------------------------------------------------------------------------------

    def _refusals(self) -> None:
        """One nearest miss per second moment that went into no norm."""
        done = {site.fact.root.key() for site in self.out.sites}
        for site in self.out.sites:  # and the mean that was taken away ahead of an RMSNorm
            for key, fact in self.facts.get(site.fact.root.value.index, {}).items():
                if (fact.alpha, fact.beta) == ({ONE: 1.0}, {MEAN: -1.0}) and not fact.kappa:
                    done.add(key)
        covered = {
            i for i, roots in self.seeds.items()
            if any(key in done for root in roots for key in self.facts.get(root.value.index, ()))
        }  # fmt: skip
        said: set[tuple[str, str]] = set()
        for i in sorted(self.seeds):
            if i in covered or all(root.value.fixed for root in self.seeds[i]):  # a weight norm, which is taken once
                continue
            reduction = self.graph.nodes[i]
            if _single(reduction.outputs[0]) and not _rooted(reduction, unknown=True):  # a mean squared error
                continue
            found = [m for root in self.seeds[i] for m in self.misses.get(root.key(), ())]
            if not found:
                continue
            _, _, code, node, message = max(found, key=lambda m: (m[0] >= 2 and m[2] != "NF106", m[0], -m[1]))
            if code == "NF106":
                early = [self.early[root.key()] for root in self.seeds[i] if root.key() in self.early]
                code, node, message = next(iter(early), (code, node, message))
            if (code, node) not in said:
                said.add((code, node))
                self.out.refusals.append(Refusal(code, node, message))
        self.out.refusals.extend(Refusal(*note) for note in self.graph.notes)


def _rooted(node: Node, unknown: bool = False) -> bool:
    """Whether a root is taken of what a statistic goes into, or what is `unknown` may do so. Of so many readers that
    nobody looks at all, one may."""
    todo, seen = [node], {node.index}
    for one in todo:
        power = one.inputs[1].number if one.kind == "pow" else 1.0
        if one.kind in ROOTED or power is None or power % 1 or len(todo) > MAX_READERS:
            return True
        if one.kind in ELEMENTWISE | VIEWS | STATISTICS:
            readers = [user for out in one.outputs for user in out.uses if user.index not in seen]
            seen.update(user.index for user in readers)
            todo += readers
        elif unknown:
            return True
    return False


def _single(value: Value) -> bool:
    """One element, for sure."""
    return value.shape is not None and all(d == 1 for d in value.shape)


def _akin(a: Value, b: Value) -> bool:
    """Whether two values of one shape are made of a third that has it too, so that neither is a parameter."""
    if a.fixed or b.fixed:  # of constants alone
        return False
    return any(v.shape == a.shape and not v.fixed for v in _before(a) & _before(b))


def _before(value: Value) -> set[Value]:
    """A value and all that it is computed from."""
    todo, seen = [value], {value}
    while todo:
        node = todo.pop().producer
        new = [v for v in (node.inputs if node is not None else ()) if v not in seen]
        seen.update(new)
        todo += new
    return seen


def _size(value: Value, axes: tuple[int, ...]) -> int | None:
    assert value.shape is not None
    size = 1
    for a in axes:
        d = value.shape[a]
        if not isinstance(d, int):
            return None
        size *= d
    return size


def _view(node: Node, source: Value) -> Layout | None:
    """The layout of a view's output over the axes of its input."""
    if source.shape is None:
        return None
    try:
        return RULES[node.kind](node, [start(Root(source, (), None))]).layout
    except Refused:
        return None


def _askew(aligned: Layout, root: Root) -> bool:
    """Whether a parameter, as it stands, is broadcast to other axes of a root than those that it goes with. Of the last
    axes it may have all, in their order, wherever they stand."""
    rank, shape = root.value.rank, root.value.shape
    assert rank is not None and shape is not None
    placed = all(entry in ((), SPREAD, (rank - len(aligned) + i,)) for i, entry in enumerate(aligned))
    if placed or root.axes != tuple(range(rank - len(root.axes), rank)):
        return not placed
    taken = [axis for entry in aligned if entry != SPREAD for axis in entry]
    return taken != sorted(taken) or not {a for a in root.axes if shape[a] != 1} <= set(taken)


def _matrix(value: Value, position: int, layout: Layout) -> Layout:
    """The layout of a uniform matrix in a product with a value of the given layout."""
    shape = value.shape
    if not shape or not layout:
        raise Refused("NF106", "a matrix product with a scalar")
    inner = layout[-1] if position else (layout[-2] if len(layout) > 1 else layout[0])
    if len(shape) == 1:
        return (inner,)
    if any(d != 1 for d in shape[:-2]):
        raise Refused("NF106", "a matrix product with a batch of matrices")
    outer = shape[-1] if position else shape[-2]
    spread = () if outer == 1 else SPREAD
    pad: Layout = ((),) * (len(shape) - 2)
    return (*pad, inner, spread) if position else (*pad, spread, inner)
