"""The choice of sites: a value whose fact has the form of a norm, and that is not merely a step towards another one.

- RMSNorm:   alpha = w * (m2 + eps)**-1/2,          beta = b
- LayerNorm: alpha = w * (m2 - m1**2 + eps)**-1/2,  beta = b - alpha*m1
"""

from __future__ import annotations

from collections.abc import Iterator

from normfuse.facts import MEAN, ONE, ZERO, Atom, Fact, Poly, Refused, RootKey, number
from normfuse.graph import PRECISION, Graph, Value
from normfuse.norm import NEAR, VIEWS, Expr, Match, Norm, Site, exact, is_op, kept, match, precision, region
from normfuse.transfer import identity_layout

MAX_ROUNDS = 8
SEVERAL = {"layer_norm": 2, "rms_norm": 3}
"""Norms of one tensor up to which each takes the statistics for itself: three LayerNorms took 1.06 times as long in
ONNX Runtime as what they were made of and four 1.13, two 0.94; three RMSNorms 0.86 and four, as one, 0.92."""
COPIES = frozenset({*VIEWS, "identity"})

Miss = tuple[int, int, str, str, str]
"""How far it came, the index of its node, a code, the name of the node, a message."""


class Chooser:
    """Chooses the sites of a graph in which each value has its facts; tells the misses what is no norm after all."""

    def __init__(self, graph: Graph, facts: dict[int, dict[RootKey, Fact]], params: dict[int, Value],
                 askew: set[tuple[RootKey, int]], misses: dict[RootKey, list[Miss]]) -> None:  # fmt: skip
        self.graph, self.facts, self.params, self.askew, self.misses = graph, facts, params, askew, misses
        self.made: list[Site] = []
        self.turned: list[tuple[Value, Fact]] = []  # what has the form of a norm in another layout than its root
        self.taken: set[int] = set()  # the values of the sites
        self.matches: dict[int, list[tuple[Fact, Match]]] = {}  # what is a norm in the layout of its root

    def sites(self) -> list[Site]:
        """Choose, of all values that are norms, those that are not merely a step towards another one."""
        matches = self.matches
        groups: dict[int, set[RootKey]] = {}  # in any layout
        values = [v for node in self.graph.nodes for v in node.outputs if v.index in self.facts]
        for value in values:
            for key, fact in sorted(self.facts[value.index].items()):
                if fact.advanced < 3 or not fact.alpha or fact.kappa or fact.absolute or fact.root.size == 0:
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
                if not whole or not self.askew.isdisjoint(used):  # a norm of a transposed tensor
                    self.turned.append((value, fact))
                else:
                    matches.setdefault(value.index, []).append((fact, found))
        read: set[int] = set()
        for _ in range(MAX_ROUNDS):  # what a norm reads whole stands for itself, and that may change what it reads
            chosen = self._chosen(values, matches, self._final(values, matches, groups, read))
            before, read = read, {chain[0][1].root.value.index for chain in chosen}
            if read == before:
                break
        for chain in chosen:
            self._site(chain)
        return self.made

    def _chosen(self, values: list[Value], matches: dict[int, list[tuple[Fact, Match]]],
                final: dict[int, bool]) -> list[list[tuple[Value, Fact]]]:  # fmt: skip
        """The chains of the values that are norms in their own right, and no view or copy of one that is."""
        chosen: set[int] = set()
        out = []
        for value in values:
            if value.index in matches and final[value.index]:
                chain = list(self._chain(self._best(value, matches[value.index])[0], value))
                if not any(v.index in chosen and f.advanced >= 3 for v, f in chain):
                    chosen.add(value.index)
                    out.append(chain)
        return out

    def _final(self, values: list[Value], matches: dict[int, list[tuple[Fact, Match]]],
               groups: dict[int, set[RootKey]], read: set[int]) -> dict[int, bool]:  # fmt: skip
        """Which values are more than a step towards a norm that all their readers come to."""
        final: dict[int, bool] = {}
        steps: dict[int, set[RootKey]] = {}  # the groups in which a value is a norm, or all its readers come to one
        ends: dict[int, set[int]] = {}  # the norms that they come to
        for value in reversed(values):
            own, found = groups.get(value.index, set()), matches.get(value.index, [])
            ahead = [node.outputs[0].index for node in value.uses if node.outputs]
            alone = value.kept or value.index in read or not ahead or len(ahead) < len(value.uses)
            leads = set() if alone else own.intersection(*(steps.get(i, set()) for i in ahead))
            # a copy is not another norm: what reads the one reads the other
            norms = {f.root.key() for f, _ in found if not self._idle(value, f)}
            ends[value.index] = set().union(*(ends.get(i, set()) for i in ahead)) if leads else {value.index}
            if norms and len(ends[value.index]) > 1 and self._shared(value, matches, ends[value.index]):
                leads, ends[value.index] = set(), {value.index}
            final[value.index] = not leads
            steps[value.index] = leads | norms
        return final

    def _shared(self, value: Value, matches: dict[int, list[tuple[Fact, Match]]], ends: set[int]) -> bool:
        """Whether a norm is read by several, and each for itself would cost more: it is one operator already, or
        plain numbers are all that the norms it leads to have besides, or they are more than `SEVERAL`."""
        (fact, own), *_ = matches[value.index]
        more = [m for i in ends for _, m in matches.get(i, ())]
        plain = all(_parameters(m) <= _parameters(own) for m in more)
        return plain or len(ends) > SEVERAL[own.kind] or is_op(value, self._norm(value, fact, own, "", ""))

    def _best(self, value: Value, found: list[tuple[Fact, Match]]) -> tuple[Fact, Match]:
        """Of several readings of one value: the oldest root, unless a later one is more than a cast away, or an
        operator computes an RMSNorm of what others read, too (what a centred LayerNorm has become)."""
        best = found[0]
        for fact, m in found:
            seen = self.facts[fact.root.value.index].get(best[0].root.key())
            plain = seen is not None and seen.alpha == {ONE: 1.0} and seen.beta in (ZERO, {MEAN: -1.0})
            inside = best[1].kind == "layer_norm" and m.kind == "rms_norm"
            if (not plain and not inside) or (inside and self._stands(value, fact, m)):
                best = (fact, m)
        return best

    def _stands(self, value: Value, fact: Fact, found: Match) -> bool:
        """Whether one operator takes the statistics and scales, and others read what it reads as well."""
        x, nodes = fact.root.value, region(value, self._norm(value, fact, found, "", ""))
        readers = {node.native for node in nodes if x in node.inputs}
        return len(readers) == 1 and None not in readers and (x.kept or not set(x.uses) <= set(nodes))

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
            if why_not and (parts := self._joined(chain, value)):
                if not self._apart(parts):
                    break
                for v in parts:
                    self._site(list(self._chain(self._best(v, self.matches[v.index])[0], v)))
                return
            try:
                if fact.layout != identity_layout(fact.root.value) or self._idle(value, fact):
                    continue
                if value.index in self.taken:  # by another norm that has this part in common
                    return
                found = match(fact)
                compute, cast, narrow = precision(fact)
                rounded = _bits(compute) < 24 or (cast == "first" and _bits(value.dtype) < 24)
                if rounded and not exact(found.weight):
                    raise Refused("NF117", "a constant factor or 1/weight would be rounded to a narrow type")
                if self.graph.typed and not kept(found.eps, compute):
                    raise Refused("NF117", f"its eps of {number(found.eps)} would be rounded to {compute}")
            except Refused as why:
                why_not = why.message
                continue
            norm = self._norm(value, fact, found, compute, cast, narrow)
            self.taken.add(value.index)
            self.made.append(Site(value, norm, fact, is_op(value, norm), chain_name))
            return
        value, fact = chain[0]
        compute = max(fact.types & set(PRECISION) | {"float32"}, key=PRECISION.__getitem__)
        norm = self._norm(value, fact, match(fact), compute, "mixed")
        self.made.append(Site(value, norm, fact, is_op(value, norm), chain_name, why_not))

    def _joined(self, chain: list[tuple[Value, Fact]], value: Value) -> list[Value]:
        """What meets, after a value on the chain, if another operand depends on the root too: the value alone will not
        do."""
        after = chain[[v for v, _ in chain].index(value) - 1][0]
        key = chain[0][1].root.key()
        assert after.producer is not None
        found = [v for v in dict.fromkeys(after.producer.inputs) if key in self.facts.get(v.index, ())]
        return found if len(found) > 1 else []

    def _apart(self, parts: list[Value]) -> bool:
        """Whether values are norms that have no node in common: of a sum of these each is one by itself."""
        if not all(v.index in self.matches for v in parts):
            return False
        best = [(v, *self._best(v, self.matches[v.index])) for v in parts]
        nodes = [node for v, fact, m in best for node in region(v, self._norm(v, fact, m, "", ""))]
        return len(set(nodes)) == len(nodes)

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


def _label(value: Value) -> str:
    """What made a value, by name: not a copy or a view behind it, which may stand outside of the norm's module."""
    while value.producer is not None and value.producer.kind in COPIES and value.producer.inputs[0].producer:
        value = value.producer.inputs[0]
    assert value.producer is not None
    return value.producer.name or value.name


def _parameters(found: Match) -> set[Atom]:
    return {atom for poly in (found.weight, found.bias) for key in poly for atom, _ in key}


def _bits(dtype: str | None) -> int:
    return PRECISION.get(dtype or "", 0)
