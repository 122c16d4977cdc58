"""Put one operator in the place of each norm that is spelled out.

    x -> square -> mean -> + eps -> rsqrt -> * x -> * w      becomes      x, w -> rms_norm

This runs after the fusions with neighbours, on the norms that none of them took. A norm with an order of roundings that
no operator has becomes one function of its own nodes, where the front end has functions; `numerics="fast"` gives it the
operator, and other roundings, instead. Where the plain operator will not do, an operator of our own may.

A norm is left where the front end says that nothing is gained, and refused, with a code, when
- it has such an order of roundings and there are no functions (NF117);
- the runtime form cannot express it (the front end says why);
- a value inside it is read elsewhere, so that its reductions would be computed twice, or it is a step of a norm that
  stands there as the front end would write it (NF116).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from normfuse.facts import MEAN
from normfuse.graph import Graph, Node, Value
from normfuse.norm import Refusal, Site, region
from normfuse.passes.remove_dead import live
from normfuse.plan import ALONE, Abilities, Edit, Fused, Plan, Reason, Replace
from normfuse.transfer import REDUCTIONS

E = TypeVar("E", Replace, Fused)


@dataclass(frozen=True, slots=True)
class FuseNorm:
    """`numerics="fast"` may change roundings; `can`: what the front end is able to make."""

    can: Abilities
    numerics: str = "exact"

    def __call__(self, plan: Plan) -> None:
        """Add an edit for each site that can be fused, a refusal for each that cannot."""
        chosen: list[Replace] = []
        free = plan.free()
        done = {site for site in free if self.can.done(site)}
        within = {v: site for site in done for node in region(site.value, site.norm) for v in node.outputs}
        for site in free:
            if site in done:
                continue
            if site.value in within:  # x - mean(x) of a norm that stands there, where x is nearly a norm itself
                message = f"it is a step of the norm {within[site.value].label}, which stands there already"
                plan.refuse(site, Refusal("NF116", site.label, message))
                continue
            reason = self.can.leave(site, False) if self.can.leave is not None else None
            if reason is not None:
                apart = plan.apart.get(site)
                plan.left[site] = reason.replace(ALONE, f"a neighbour that stays: {apart}") if apart else reason
                continue
            own = Fused("norm", (site,), (site.norm.x,), (site.value,))
            if self.can.leave is not None and plan.fuse(own, self.can):
                continue
            why = None if site.is_op else self._veto(site)
            if why is None and not site.is_op:
                chosen.append(Replace(site, as_written=self._mixed(site)))
            elif why is not None and not plan.fuse(own, self.can):
                plan.refuse(site, Refusal(why[0], site.label, why[1]))
        plan.replace.extend(self._paying(plan, chosen))

    def _mixed(self, site: Site) -> bool:
        return site.norm.cast == "mixed" and self.numerics == "exact"

    def _veto(self, site: Site) -> Reason | None:
        if self._mixed(site) and not self.can.functions:
            return "NF117", f"no operator has this order of roundings: {site.mixed}"
        return self.can.expressible(site.norm, site.value)

    def _paying(self, plan: Plan, chosen: list[Replace]) -> list[Replace]:
        """Drop replacements that leave a reduction of theirs alive, until none does."""
        while True:
            alive = live(plan.graph, [*plan.fused, *chosen])
            twice = computed_twice(plan.graph, chosen, alive)
            if not twice:
                return chosen
            for edit, value in twice.items():
                i = chosen.index(edit)
                wider = self._with_statistics(plan, edit, alive, [*plan.fused, *chosen])
                if wider is not None:
                    chosen[i] = wider
                    break  # the others may have what they lack by this
                plan.refuse(edit.site, Refusal("NF116", edit.site.label, _reader(value, alive)))
                del chosen[i]

    def _with_statistics(self, plan: Plan, edit: Replace, alive: set[Node], edits: list[Edit]) -> Replace | None:
        """The replacement that also gives the mean and the standard deviation that are read outside the norm."""
        site, norm = edit.site, edit.site.norm
        if edit.as_written or norm.kind != "layer_norm" or not self.can.statistics(norm):
            return None
        key, reduced = site.fact.root.key(), tuple(() if i in norm.axes else e for i, e in enumerate(site.fact.layout))
        powers = {factor for monomial in site.fact.alpha for factor in monomial if factor[0][0] == "T"}
        last = site.value.producer
        assert last is not None
        before = live(plan.graph)
        dead = [node for node in plan.graph.nodes if node not in before]  # they stay, and what they read
        staying = live(plan.graph, edits, dead) if dead else alive
        found: dict[str, Value] = {}
        for value in (node.outputs[0] for node in plan.graph.nodes if node in alive and node.outputs):
            fact = plan.found.facts.get(value.index, {}).get(key)
            if fact is None or fact.layout != reduced or value.dtype != norm.compute:
                continue
            if fact.absolute:
                continue  # |mean| is another number
            if value.captured is not None and value.captured < last.index:
                continue  # a sub-graph is run before that
            if any(use.index < last.index for use in value.uses if use in staying):
                continue  # it is read before the operator could stand
            if fact.beta == {MEAN: 1.0}:
                found["mean"] = value
            elif fact.beta == {tuple(powers): 1.0}:  # of a norm there is one
                found["rstd"] = value
        # a mean that what the deviation is made of still read may come in the next round
        wider = Replace(site, False, edit.mean or found.get("mean"), edit.rstd or found.get("rstd"))
        return wider if (wider.mean, wider.rstd) != (edit.mean, edit.rstd) else None


def stuck(plan: Plan) -> list[Fused]:
    """The fused operators that leave a reduction of theirs alive, so that it would be computed twice."""
    return list(computed_twice(plan.graph, plan.fused, live(plan.graph, plan.edits())))


def computed_twice(graph: Graph, edits: list[E], alive: set[Node]) -> dict[E, Value]:
    """The edits after which a reduction of theirs, or the model's operator that takes it, is needed, and for what."""
    natives: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        natives.setdefault(node.native, []).append(node)
    found: dict[E, Value] = {}
    for edit in edits:
        given = set(edit.computes())
        for site in edit.sites:
            value = _besides(site, given, natives, alive)
            if value is not None:
                found.setdefault(edit, value)
    return found


def _besides(site: Site, given: set[Value], natives: dict[Any, list[Node]], alive: set[Node]) -> Value | None:
    """A value besides those given that the reductions of a norm are still needed for."""
    nodes = region(site.value, site.norm)
    reductions = [node for node in nodes if node.kind in REDUCTIONS]
    region_nodes = set(nodes)
    inside = [v for node in nodes for v in node.outputs] if not alive.isdisjoint(reductions) else []
    done = {site.value, *given}
    for native in {node.native for node in reductions} - {None}:
        for node in natives[native]:  # one operator may give the norm, what is made of it, and a statistic
            chain = node in region_nodes or not done.isdisjoint(node.inputs)
            inside += node.outputs[chain:]
            if chain and node not in region_nodes:
                done.add(node.outputs[0])
    return next((v for v in inside if v not in done and (v.kept or any(use in alive for use in v.uses))), None)


def _reader(value: Value, alive: set[Node]) -> str:
    """Who reads a value inside a norm."""
    if value.kept:
        return f"{value.name}, inside the norm, is an output of the graph"
    use = next(use for use in value.uses if use in alive)
    return f"{value.name}, inside the norm, is also read by {use.name or use.op}"
