"""The one loop: from a graph to a fact for every value, the norms among them, and the nearest misses.

First the roots: wherever a statistic is taken, the tensors that it may be a statistic of. Then one pass over the
nodes in topological order, in which each value gets a fact per root that reaches it (`MAX_ROOTS` at most, so time
is linear). A value whose fact has the form of a norm, and which is not merely a step towards another one, is a site.

- RMSNorm:   alpha = w * (m2 + eps)**-1/2,          beta = b
- LayerNorm: alpha = w * (m2 - m1**2 + eps)**-1/2,  beta = b - alpha*m1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from normfuse.facts import (
    MEAN, ONE, ZERO, Atom, Fact, Layout, Poly, Refused, Root, constant, formula,
)  # fmt: skip
from normfuse.graph import FLOATS, PRECISION, Graph, Node, Value
from normfuse.norm import NEAR, VIEWS, Expr, Match, Norm, Refusal, Site, exact, is_op, match, precision
from normfuse.transfer import REDUCTIONS, RULES, SPREAD, align, identity_layout, start

MAX_ROOTS = 32
MAX_WALK = 16
MAX_ROUNDS = 8
MAX_READERS = 64
HEAVY = 99
"""The rank that what is no parameter counts for."""

RootKey = tuple[int, tuple[int, ...]]
COPIES = frozenset({*VIEWS, "identity"})
ELEMENTWISE = frozenset("add sub mul div neg abs square pow sqrt rsqrt reciprocal max cast identity".split())
STATISTICS = frozenset("mean sum var std vecnorm".split())
ROOTED = frozenset("sqrt rsqrt std vecnorm".split())
TELLING = ("NF112", "NF117")
"""Refusals that explain a miss even where they stand before any statistic."""


@dataclass(slots=True)
class Recognition:
    """What is known of a graph: facts per value index and root, the sites in topological order, the refusals."""

    facts: dict[int, dict[RootKey, Fact]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

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
        self.misses: dict[RootKey, list[tuple[int, int, str, str, str]]] = {}
        self.early: dict[RootKey, tuple[str, str, str]] = {}  # the first miss before any statistic that may say why
        self.taken: set[int] = set()  # the values of the sites

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
        self._sites()
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
        layout = next(f.layout for f in known if f is not None)
        out = []
        for i, (v, fact) in enumerate(zip(node.inputs, known, strict=True)):
            if fact is not None:
                out.append(fact)
            elif v.number is not None:
                aligned = _matrix(v, i, layout) if node.kind == "matmul" else align(v, layout, root)
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
        made = any(index == value.index for index, _ in self.facts.get(root.value.index, ()))
        return not made and (value.shape != root.value.shape or not _akin(value, root.value))

    def _miss(self, key: RootKey, node: Node, why: Refused) -> None:
        known = [self.facts[v.index][key] for v in node.inputs if key in self.facts.get(v.index, ())]
        level = max(f.advanced for f in known)
        if level >= 2 or (level and why.code == "NF107") or why.code == "NF110":
            self.misses.setdefault(key, []).append((level, node.index, why.code, node.name, why.message))
        elif why.code in TELLING:
            self.early.setdefault(key, (why.code, node.name, why.message))

    # -- sites ----------------------------------------------------------------------------------------------------

    def _sites(self) -> None:
        """Choose, of all values that are norms, those that are not merely a step towards another one."""
        matches: dict[int, list[tuple[Fact, Match]]] = {}  # in the layout of the root
        groups: dict[int, set[RootKey]] = {}  # in any layout
        values = [v for node in self.graph.nodes for v in node.outputs if v.index in self.facts]
        for value in values:
            for key, fact in sorted(self.facts[value.index].items()):
                if fact.advanced < 3 or not fact.alpha or fact.kappa or fact.absolute:
                    continue
                whole = fact.layout == identity_layout(fact.root.value)
                try:
                    found = match(fact)
                except Refused as why:
                    assert value.producer is not None
                    if whole:
                        miss = (4, value.producer.index, why.code, value.producer.name, why.message)
                        self.misses.setdefault(key, []).append(miss)
                    continue
                groups.setdefault(value.index, set()).add(key)
                used = {(key, atom[1]) for p in (found.weight, found.bias) for term in p for atom, _ in term}
                if whole and self.askew.isdisjoint(used):  # else the norm is that of a transposed tensor
                    matches.setdefault(value.index, []).append((fact, found))
        read: set[int] = set()
        for _ in range(MAX_ROUNDS):  # what a norm reads whole stands for itself, and that may change what it reads
            chosen = self._chosen(values, matches, self._final(values, matches, groups, read))
            before, read = read, {chain[0][1].root.value.index for chain in chosen}
            if read == before:
                break
        for chain in chosen:
            self._site(chain)

    def _chosen(self, values: list[Value], matches: dict[int, list[tuple[Fact, Match]]],
                final: dict[int, bool]) -> list[list[tuple[Value, Fact]]]:  # fmt: skip
        """The chains of the values that are norms in their own right, and no view or copy of one that is."""
        chosen: set[int] = set()
        out = []
        for value in values:
            if value.index in matches and final[value.index]:
                chain = list(self._chain(self._best(matches[value.index])[0], value))
                if not any(v.index in chosen and f.advanced >= 3 for v, f in chain):
                    chosen.add(value.index)
                    out.append(chain)
        return out

    def _final(self, values: list[Value], matches: dict[int, list[tuple[Fact, Match]]],
               groups: dict[int, set[RootKey]], read: set[int]) -> dict[int, bool]:  # fmt: skip
        """Which values are more than a step towards a norm that all their readers come to."""
        final: dict[int, bool] = {}
        steps: dict[int, set[RootKey]] = {}  # the groups in which a value is a norm, or all its readers come to one
        for value in reversed(values):
            own = groups.get(value.index, set())
            ahead = [steps.get(node.outputs[0].index, set()) if node.outputs else set() for node in value.uses]
            leads = own.intersection(*ahead) if ahead and not value.kept and value.index not in read else set()
            final[value.index] = not leads
            # a copy is not another norm: what reads the one reads the other
            steps[value.index] = leads | {f.root.key() for f, _ in matches.get(value.index, ())
                                          if not self._idle(value, f)}  # fmt: skip
        return final

    def _best(self, found: list[tuple[Fact, Match]]) -> tuple[Fact, Match]:
        """Of several readings of one value: the oldest root, unless a later one is more than a cast away."""
        best = found[0]
        for fact, m in found:
            seen = self.facts[fact.root.value.index].get(best[0].root.key())
            plain = seen is not None and seen.alpha == {ONE: 1.0} and seen.beta in (ZERO, {MEAN: -1.0})
            if not plain and not (best[1].kind == "layer_norm" and m.kind == "rms_norm"):
                best = (fact, m)
        return best

    def _chain(self, fact: Fact, value: Value) -> Iterator[tuple[Value, Fact]]:
        """The value and those before it on the way of x, back to the root."""
        while value is not fact.root.value:
            step = self.facts[value.index][fact.root.key()]
            yield value, step
            assert step.via is not None
            value = step.via

    def _site(self, chain: list[tuple[Value, Fact]]) -> None:
        """Take the longest part of the chain that an operator with the same roundings can compute."""
        why_not = ""
        chain_name = _label(chain[0][0])
        for value, fact in chain:
            if why_not and self._joins(chain, value):
                break
            try:
                if fact.layout != identity_layout(fact.root.value) or self._idle(value, fact):
                    continue
                if value.index in self.taken:  # read through two copies
                    return
                found = match(fact)
                compute, cast, narrow = precision(fact)
                rounded = _bits(compute) < 24 or (cast == "first" and _bits(value.dtype) < 24)
                if rounded and not exact(found.weight):
                    raise Refused("NF117", "a constant factor or 1/weight would be rounded to a narrow type")
            except Refused as why:
                why_not = why.message
                continue
            norm = self._norm(value, fact, found, compute, cast, narrow)
            self.taken.add(value.index)
            self.out.sites.append(Site(value, norm, fact, is_op(value, norm), chain_name))
            return
        value, fact = chain[0]
        compute = max(fact.types & set(PRECISION) | {"float32"}, key=PRECISION.__getitem__)
        norm = self._norm(value, fact, match(fact), compute, "mixed")
        self.out.sites.append(Site(value, norm, fact, is_op(value, norm), chain_name, why_not))

    def _joins(self, chain: list[tuple[Value, Fact]], value: Value) -> bool:
        """Whether, after a value on the chain, another operand depends on the root too: the value alone will not do."""
        after = chain[[v for v, _ in chain].index(value) - 1][0]
        key = chain[0][1].root.key()
        assert after.producer is not None
        return len({v for v in after.producer.inputs if key in self.facts.get(v.index, ())}) > 1

    def _idle(self, value: Value, fact: Fact) -> bool:
        """Only a copy or a view of a value before it that has the same layout."""
        node, via = value.producer, fact.via
        assert node is not None and via is not None
        copies = node.kind in VIEWS or node.kind == "identity" or (node.kind == "cast" and via.dtype == value.dtype)
        return copies and self.facts[via.index][fact.root.key()].layout == fact.layout

    def _norm(self, value: Value, fact: Fact, found: Match, compute: str, cast: str, narrow: str = "") -> Norm:
        root = fact.root
        weight, bias = self._expr(found.weight, 1.0), self._expr(found.bias, 0.0)
        return Norm(found.kind, root.value, root.axes, root.size, found.eps, weight, bias, compute, cast,
                    value.dtype or "?", narrow)  # fmt: skip

    def _expr(self, p: Poly, neutral: float) -> Expr | None:
        if not p or (set(p) == {ONE} and abs(p[ONE] - neutral) <= NEAR / 2):
            return None
        terms = []
        for key in sorted(p):
            factors = tuple((self.params[int(str(atom[1]))], int(e)) for atom, e in key)
            terms.append((p[key], factors))
        return tuple(terms)

    # -- refusals -------------------------------------------------------------------------------------------------

    def _refusals(self) -> None:
        """One nearest miss per second moment that went into no norm."""
        done = {site.fact.root.key() for site in self.out.sites}
        covered = {
            i for i, roots in self.seeds.items()
            if any(key in done for root in roots for key in self.facts.get(root.value.index, ()))
        }  # fmt: skip
        said: set[tuple[str, str]] = set()
        for i in sorted(self.seeds):
            if i in covered:
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


def _rooted(node: Node) -> bool:
    """Whether a root is taken of what a statistic goes into. Of so many readers that nobody looks at all, one may."""
    todo, seen = [node], {node.index}
    for one in todo:
        power = one.inputs[1].number if one.kind == "pow" else 1.0
        if one.kind in ROOTED or power is None or power % 1 or len(todo) > MAX_READERS:
            return True
        if one.kind in ELEMENTWISE | VIEWS | STATISTICS:
            readers = [user for out in one.outputs for user in out.uses if user.index not in seen]
            seen.update(user.index for user in readers)
            todo += readers
    return False


def _label(value: Value) -> str:
    """What made a value, by name: not a copy or a view behind it, which may stand outside of the norm's module."""
    while value.producer is not None and value.producer.kind in COPIES and value.producer.inputs[0].producer:
        value = value.producer.inputs[0]
    assert value.producer is not None
    return value.producer.name or value.name


def _single(value: Value) -> bool:
    """One element, for sure."""
    return value.shape is not None and all(d == 1 for d in value.shape)


def _bits(dtype: str | None) -> int:
    return PRECISION.get(dtype or "", 0)


def _akin(a: Value, b: Value) -> bool:
    """Whether two values of one shape are made of a third that has it too, so that neither is a parameter."""
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
    """Whether a parameter, as it stands, is broadcast to other axes of a root than those that it goes with."""
    rank = root.value.rank
    assert rank is not None
    if root.axes == tuple(range(rank - len(root.axes), rank)):
        taken = [axis for entry in aligned if entry != SPREAD for axis in entry]
        return taken != sorted(taken)
    return any(entry not in ((), SPREAD, (rank - len(aligned) + i,)) for i, entry in enumerate(aligned))


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
