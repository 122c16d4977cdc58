"""LayerNorm to RMSNorm, exactly: plan how to take the mean away ahead of the norms.

    h = embed(ids) + f(h');  y = layer_norm(h)      becomes      h = embed_c(ids) + f_c(h');  y = rms_norm(h)

With P = I - 11'/d, layer_norm(P h) = layer_norm(h) and layer_norm(h) = rms_norm(P h). So each LayerNorm asks for its
input centred. The request goes up the graph (`normfuse.centring`) to constants, which are edited; where no rule holds,
one explicit centring operator is put. Then two proofs are owed. Absorption: every request ends in a constant, in an
operator, or in a value whose mean is zero already. Tolerance: every reader of a value that changes either asked for it,
or cannot tell (a LayerNorm over that axis, a softmax); graph outputs can. A value with another reader becomes the place
of an operator, which only those who asked read, and the plan is made again; the places only grow, so it ends.
A connected part of the plan that does not convert more norms than it adds operators is dropped.

Zhang & Sennrich 2019 (arXiv 1910.07467), Jiang et al. 2023 (arXiv 2305.14858).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import replace

from normfuse.centring import PARTED, Blocked, Centre, Links, Part, back, centred, joined, united
from normfuse.conversion import Candidates, Conversion, Groups, Means, Operator, Reader, count, prove
from normfuse.graph import Graph, Node, Value
from normfuse.norm import Site
from normfuse.passes.remove_dead import live
from normfuse.recognise import Recognition
from normfuse.sites import COPIES


def convert(graph: Graph, found: Recognition, can: Means) -> Conversion:
    """Plan the conversion of every LayerNorm of a graph for which it can be proved and pays in operators."""
    return _Planner(graph, found, can).run()


class _Planner:
    def __init__(self, graph: Graph, found: Recognition, can: Means) -> None:
        self.graph, self.found, self.can = graph, found, can
        self.alive = live(graph)
        chosen = Candidates(found, can, self.alive)
        self.out, self.sites, self.cones, self.inside = chosen.out, chosen.sites, chosen.cones, chosen.inside
        self.seeds: dict[Value, str] = {}  # values that stay as they are, with an operator behind them if asked for
        self.stuck: dict[Value, str] = {}  # values that can neither be centred nor be followed by an operator
        self.copies: set[Value] = set()
        self.parts: set[Value] = set()  # values of which only those parts are to change that are asked for
        self.state: dict[Value, Centre] = {}
        self.askers: dict[Value, list[Reader]] = {}
        self.operators: dict[Operator, list[Reader]] = {}
        self.raw: set[Value] = set()  # values that this round has found must stay as they are

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Conversion:
        while self.sites:
            for site, why in self.can.partial({site: self.out.inner.get(site, site) for site in self.sites}).items():
                self.out.keep(site, "NF301", why)
            self.sites = [site for site in self.sites if site not in self.out.kept]
            self._ask()
            steps = self._unread, self._torn, self._stepped, self._sink, self._public, self._drop
            if not self.again and not any(step() for step in steps):
                break
        self._result()
        return self.out

    def _ask(self) -> None:
        """Send the requests up, the latest values first, so that each value knows all its requests at once."""
        self.state, self.askers, self.operators, self.again = {}, {}, {}, False
        asked: dict[Value, list[tuple[Centre, Reader]]] = {}
        heap: list[tuple[int, int, Value]] = []

        def ask(value: Value, want: Centre, by: Reader) -> None:
            if value not in asked:
                asked[value] = []
                order = -1 if value.producer is None else value.producer.index
                heapq.heappush(heap, (-order, value.index, value))
            asked[value].append((want, by))

        for site in self.sites:
            ask(*self._wish(site), site)
        while heap:
            _, _, value = heapq.heappop(heap)
            wants = asked[value]
            self.askers[value] = [by for _, by in wants]
            if value not in self.seeds and value not in self.stuck:
                try:
                    for operand, want in self._push(value, [want for want, _ in wants]):
                        assert value.producer is not None
                        ask(operand, want, (value.producer, value))
                    continue
                except Blocked as why:
                    self._stop(value, str(why))
            for want, by in wants:
                if value in self.seeds and want.whole(value):
                    self.operators.setdefault((value, want), []).append(by)
                else:
                    self._refuse(by, self.seeds.get(value) or self.stuck[value])

    def _wish(self, site: Site) -> tuple[Value, Centre]:
        norm = self.out.inner.get(site, site).norm
        assert norm.size is not None
        return norm.x, Centre(norm.axes[0], ((0, norm.size),))

    def _push(self, value: Value, wants: list[Centre]) -> list[tuple[Value, Centre]]:
        """Record that a value comes centred; what that takes of the operands of its producer."""
        want = joined(value, wants)
        if centred(self.found, value, want):
            return []
        node = value.producer
        if value.tainted:
            raise Blocked(f"{value.name} is written in place")
        if node is None:
            fixed = value.fixed or value.overridable
            why = f"{value.name} is an input of the graph" if not fixed else next(
                (why for v in (value, *want.scales)
                 if (why := self.can.locked(v) or (None if v is value else self.can.shared(v))) is not None), None)
            if why is not None:
                raise Blocked(why)
            links = []
        else:
            links = self._back(node, value, want)
        self.state[value] = want
        return links

    def _back(self, node: Node, out: Value, want: Centre, uniform: Callable[[Value], bool] | None = None) -> Links:
        """The operands to centre; of what is to be asked for in parts, the part that `out` is."""
        links = back(node, out, want, self.can.channels, uniform or self.can.uniform)
        return [(v, replace(c, only=self._part(node, out, v, c)) if v in self.parts else c) for v, c in links]

    def _part(self, node: Node, out: Value, value: Value, want: Centre) -> Part:
        """Of a slice along another axis than the channels, which part of an operand it is."""
        for axis in range(value.rank or 0):
            span = self.can.span(node, out, axis) if axis != want.axis and value is node.inputs[0] else None
            if span is not None:
                return united(value, [(axis, tuple(range(*span)))])
        return want.only

    def _stop(self, value: Value, why: str) -> None:
        """A value is not to change: put an operator behind it, or, where none can stand, behind what is made of it."""
        if not value.fixed and self._stands(value):
            self.seeds[value] = why
        else:
            self.stuck[value] = why

    def _stands(self, value: Value) -> bool:
        """Whether an operator behind a value is still there when the norms are made anew."""
        gone = any(site in self.sites for site in self.inside.get(value, ()))
        return value.native is not None and not gone and self.can.place(value)

    def _refuse(self, by: Reader, why: str) -> None:
        self.again = True
        if isinstance(by, Site):
            self.out.keep(by, "NF302", why)
            self.sites = [site for site in self.sites if site is not by]
        elif by[1] not in self.seeds and by[1] not in self.stuck:
            self._stop(by[1], why)

    # -- tolerance ----------------------------------------------------------------------------------------------------

    def _unread(self) -> bool:
        """Find the changed values that somebody reads as they were; True if there are any."""
        twins: dict[Hashable, list[Value]] = {}
        for value in self.graph.leaves:
            if value.kept or any(use in self.alive for use in value.uses):
                twins.setdefault(self.can.twins(value), []).append(value)
        bad = []
        self.raw, self.copies = set(), set()
        same = self._unchanged()
        # the last first: a value that stays as it is makes those it is read from stay in the same round
        for value in sorted(self.state, key=lambda v: -1 if v.producer is None else v.producer.index, reverse=True):
            want = self.state[value]
            why = None if value in same else self._reader(value, want)
            if why is None and value.producer is None:
                others = [v for v in twins.get(self.can.twins(value), ()) if v is not value]
                why = self.can.shared(value)
                if any(v.kept or self.state.get(v) != want for v in others):
                    why = f"its storage is that of {others[0].name} too"
            if why is not None:
                bad.append((value, why))
                self.raw.add(value)
        parts = [value for value, _ in bad if self._parted(value)]
        if parts:
            self.parts.update(parts)
            return True
        # the other parts of what they are taken from may change all the same
        bad = [(value, why) for value, why in bad if self._is_part(value)] or bad
        for value, why in bad:
            constant, nodes = value.fixed and value.producer is None, self._nodes(value)
            whole = len(nodes) == len(self.askers[value]) and not any(
                self._unasked(node, value, self.state[value]) for node in nodes)  # what they give has no other reader
            if self.can.untie and constant and whole and self.can.copied(value, nodes):
                self.copies.add(value)
            else:
                self._stop(value, f"{value.name}: {why}")
        return any(value not in self.copies for value, _ in bad)

    def _unchanged(self) -> set[Value]:
        """The values that are made, without a factor taken out, of what has mean zero already."""
        same: set[Value] = set()
        made = [(v.producer.index, v) for v in self.state if v.producer is not None]
        for _, value in sorted(made, key=lambda pair: pair[0]):
            links, want = self._links(value), self.state[value]
            if links and all(c.scales == want.scales and v not in self.seeds and (v in same or v not in self.state)
                             for v, c in links):  # fmt: skip
                same.add(value)
        return same

    def _nodes(self, value: Value) -> list[Node]:
        """The nodes that ask for a value."""
        return [by[0] for by in self.askers[value] if not isinstance(by, Site)]

    def _parted(self, value: Value) -> bool:
        """Whether a value that is read as it was may change in those parts alone that are asked for."""
        if value in self.parts or value.kept or (value.producer is not None and value.producer.kind not in PARTED):
            return False
        want = replace(self.state[value], only=None)
        return any(self._part(*by, value, want) for by in self.askers[value] if not isinstance(by, Site))

    def _is_part(self, value: Value) -> bool:
        node = value.producer
        return node is not None and any(c.only for v, c in self._back(node, value, self.state[value])
                                        if v in self.parts)  # fmt: skip

    def _reader(self, value: Value, want: Centre) -> str | None:
        if value.kept:
            return "it is an output of the graph, or a sub-graph or a constant is made of it"
        for node in dict.fromkeys(value.uses):
            if not self._blind(node, value, want) and self._unasked(node, value, want):
                return f"{node.op} {node.name} reads it as it is"
        return None

    def _unasked(self, node: Node, value: Value, want: Centre) -> list[Value]:
        """The results of a node that are read and take no account of how an operand changes."""
        read = [v for v in node.outputs if v.kept or node.attrs.get("effect") or any(u in self.alive for u in v.uses)]
        return [out for out in read if not self._asked(node, value, want, out)]

    def _torn(self) -> bool:
        """Find an operator ahead of a node whose other results take no account of it: it goes behind the result that
        asked instead (query and key of three that are taken apart). True if there is one."""
        for (value, want), readers in self.operators.items():
            for by in readers:
                rest = [] if isinstance(by, Site) else self._unasked(by[0], value, want)
                if rest and not isinstance(by, Site):
                    self._stop(by[1], f"{by[0].op} {by[0].name} also gives {rest[0].name}, which is read as it is")
                    return True
        return False

    def _stepped(self) -> bool:
        """Find a multiplication that would be taken out and is a step of another operator; True if there is one."""
        for value, want in self.state.items():
            node = value.producer
            if node is not None and None in [v.native for v in (value, *node.inputs)] and any(
                    c.scales != want.scales and None in (v.native, value.native) for v, c in self._links(value)):
                self._stop(value, f"{node.op} {node.name} scales the channels as a step of its own")
                return True
        return False

    def _blind(self, node: Node, value: Value, want: Centre) -> bool:
        if want.whole(value) and want.axis in self.cones.get((node, value), ()):
            return True
        if node.kind in ("var", "std") and node.attrs["axes"] == (want.axis,) and want.whole(value):
            return True
        return self.can.blind(node, value, want)

    def _asked(self, node: Node, value: Value, want: Centre, out: Value) -> bool:
        """Whether a result of a node takes account of how an operand changes."""
        seen = self._seen(node, value, want, out)
        if seen is None:
            return True
        if out not in self.state or out in self.raw:
            return False
        links = self._back(node, out, self.state[out])
        mine = [c for v, c in links if v is value]
        if len(mine) != sum(v is value for v in node.inputs):
            return False  # it is read in a place that did not ask, too
        if want.only is None:  # all of it is centred, whatever part is asked for
            mine = [replace(c, only=None) for c in mine]
        return bool(mine) and all(c == seen for c in mine)

    def _seen(self, node: Node, value: Value, want: Centre, out: Value) -> Centre | None:
        """What of the change of an operand a result shows, which may be a slice of it; None for nothing."""
        for axis in range(value.rank or 0) if value is node.inputs[0] else ():
            span = self.can.span(node, out, axis)
            if span is not None and axis == want.axis:
                inside = want.within(*span)
                if inside == ():
                    return None
                want = replace(want, blocks=inside or ())  # one that is cut is asked for by nobody
            elif span is not None and want.only is not None and axis == want.only[0]:
                indices = tuple(i for i in want.only[1] if i in range(*span))
                if not indices:
                    return None
                want = replace(want, only=(axis, indices))
        return want

    def _public(self) -> bool:
        """Where an operator changes a value for all its readers, all have to be content; True if some are not."""
        if not self.can.hooks:
            return False
        for (value, want), readers in self.operators.items():
            asked = {by[0] for by in readers if not isinstance(by, Site)}
            rest = [n for n in value.uses if n in self.alive and n not in asked and not self._blind(n, value, want)]
            if rest or value.kept:
                del self.seeds[value]
                self.stuck[value] = f"{value.name} is also read by {rest[0].name or rest[0].op}" if rest else (
                    f"{value.name} is an output of the graph")  # fmt: skip
                return True
        return False

    # -- fewer operators ----------------------------------------------------------------------------------------------

    def _sink(self) -> bool:
        """Move an operator behind the node that alone asks for it, where what else that node reads is asked for by
        nobody else: one operator after token and position embeddings were added, not one on each."""
        for (value, _), readers in self.operators.items():
            below = self._below(readers[0])
            if below is not None:
                self.seeds[below] = self.seeds[value]
                return True
        return False

    def _below(self, by: Reader) -> Value | None:
        while not isinstance(by, Site):
            node, out = by
            if not all(self._alone(v, by) for v, _ in self._back(node, out, self.state[out])):
                return None
            if self._stands(out) and self.state[out].whole(out):
                return out
            by = self.askers[out][0]  # if it is not the only one, the next round of this loop ends it
        return None

    def _alone(self, value: Value, by: Reader) -> bool:
        """Whether nobody else asks for an operand, or for what it is a copy or a view of."""
        while self.askers.get(value) == [by]:
            node = value.producer
            if node is None or value not in self.state or (node.kind not in COPIES and node.kind != "cast"):
                return True
            (value, _), by = self._back(node, value, self.state[value])[0], (node, value)
        return False

    def _drop(self) -> bool:
        """Give up connected parts of the plan that add as many operators as they convert norms."""
        groups = Groups()

        def key(v: Value, want: Centre) -> object:
            return (v, want) if v in self.seeds else v

        for site in self.sites:
            groups.join(site, key(*self._wish(site)))
        for value, want in self.state.items():
            if value.producer is not None:
                for operand, w in self._back(value.producer, value, want):
                    if operand in self.state or operand in self.seeds:
                        groups.join(value, key(operand, w))
        gain: dict[object, int] = {}
        first: dict[object, list[Value]] = {}
        for site in self.sites:
            gain[groups.of(site)] = gain.get(groups.of(site), 0) + 1
        for operator in self.operators:
            gain[groups.of(operator)] = gain.get(groups.of(operator), 0) - 1
            first.setdefault(groups.of(operator), []).append(operator[0])
        lost = [site for site in self.sites if gain[groups.of(site)] <= 0]
        for site in lost:
            places = first[groups.of(site)]
            norms = sum(groups.of(s) is groups.of(site) for s in self.sites)
            needed = f"{count(places, 'centring operator')} would be needed for {count(norms, 'norm')}"
            self.out.keep(site, "NF303", f"{needed}: {self.seeds[places[0]]}")
        self.sites = [site for site in self.sites if site not in self.out.kept]
        return bool(lost)

    # -- the result ---------------------------------------------------------------------------------------------------

    def _result(self) -> None:
        out = self.out
        if not self.sites:
            return
        out.sites, out.values, out.operators = self.sites, dict(self.state), dict(self.operators)
        out.seeds = {v: self.seeds[v] for v, _ in self.operators}
        out.edits = {v: want for v, want in self.state.items() if v.producer is None}
        told: dict[Value, Site] = {}
        for site in self.sites:
            out.proof[site] = prove(out, site, told, self._links, self.alive)
        out.uniform = list(dict.fromkeys(v for proof in out.proof.values() for v in proof.uniform))
        scaled = {v.producer: None for v, want in self.state.items()
                  if any(c.scales != want.scales for _, c in self._links(v))}  # fmt: skip
        out.scaled = [node for node in scaled if node is not None]
        for value in self.copies & set(out.edits):
            out.copies[value] = self._nodes(value)

    def _links(self, value: Value, uniform: dict[Value, None] | None = None) -> list[tuple[Value, Centre]]:
        node = value.producer
        if node is None:
            return []

        def is_uniform(v: Value) -> bool:
            found = self.can.uniform(v)
            if found and uniform is not None:
                uniform[v] = None
            return found

        return self._back(node, value, self.state[value], is_uniform)
