"""Put one operator in the place of each norm that is spelled out.

    x -> square -> mean -> + eps -> rsqrt -> * x -> * w      becomes      x, w -> rms_norm

A norm with an order of roundings that no operator has becomes one function of its own nodes, where the front end has
functions; `numerics="fast"` gives it the operator, and other roundings, instead.

A norm is refused, with a code, when
- it has such an order of roundings and there are no functions (NF117);
- the runtime form cannot express it (the front end says why);
- a value inside it is read elsewhere, so that its reductions would be computed twice (NF116).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normfuse.facts import MEAN
from normfuse.graph import Graph, Node, Value
from normfuse.norm import Norm, Refusal, Site, region
from normfuse.passes.remove_dead import live
from normfuse.plan import Plan, Replace
from normfuse.transfer import REDUCTIONS


@dataclass(frozen=True, slots=True)
class FuseNorm:
    """`numerics="fast"` may change roundings; `expressible` is the front end's veto; `functions`: it has functions;
    `statistics`: whether its operator for a norm can give the mean and the standard deviation too."""

    numerics: str = "exact"
    expressible: Callable[[Norm, Value], tuple[str, str] | None] = lambda norm, value: None
    functions: bool = False
    statistics: Callable[[Norm], bool] = lambda norm: False

    def __call__(self, plan: Plan) -> None:
        """Add a `Replace` for each site that can be fused, a refusal for each that cannot."""
        chosen: list[Replace] = []
        for site in plan.found.sites:
            if site.is_op or site in plan.refused:
                continue
            why = self._veto(site)
            if why is None:
                chosen.append(Replace(site, as_written=self._mixed(site)))
            else:
                plan.refuse(site, Refusal(why[0], site.label, why[1]))
        plan.replace.extend(self._paying(plan, chosen))

    def _mixed(self, site: Site) -> bool:
        return site.norm.cast == "mixed" and self.numerics == "exact"

    def _veto(self, site: Site) -> tuple[str, str] | None:
        if self._mixed(site) and not self.functions:
            return "NF117", f"no operator has this order of roundings: {site.mixed}"
        return self.expressible(site.norm, site.value)

    def _paying(self, plan: Plan, chosen: list[Replace]) -> list[Replace]:
        """Drop replacements that leave a reduction of theirs alive, until none does."""
        while True:
            alive = live(plan.graph, chosen)
            stuck = [edit for edit in chosen if any(node in alive for node in statistics(edit.site))]
            if not stuck:
                return chosen
            for edit in stuck:
                i = chosen.index(edit)
                wider = self._with_statistics(plan, edit, alive)
                if wider is not None:
                    chosen[i] = wider
                else:
                    plan.refuse(edit.site, Refusal("NF116", edit.site.label, _reader(plan.graph, edit.site, alive)))
                    del chosen[i]

    def _with_statistics(self, plan: Plan, edit: Replace, alive: set[Node]) -> Replace | None:
        """The replacement that also gives the mean and the standard deviation that are read outside the norm."""
        site, norm = edit.site, edit.site.norm
        if edit.as_written or edit.mean or edit.rstd or norm.kind != "layer_norm" or not self.statistics(norm):
            return None
        key, reduced = site.fact.root.key(), tuple(() if i in norm.axes else e for i, e in enumerate(site.fact.layout))
        powers = {factor for monomial in site.fact.alpha for factor in monomial if factor[0][0] == "T"}
        last = site.value.producer
        assert last is not None
        found: dict[str, Value] = {}
        for node in region_and_readers(plan, site, alive):
            for value in node.outputs:
                fact = plan.found.facts.get(value.index, {}).get(key)
                if fact is None or fact.linear or fact.layout != reduced or value.dtype != norm.compute:
                    continue
                if any(use.index < last.index for use in value.uses if use in alive):
                    continue  # it is read before the operator could stand
                if fact.beta == {MEAN: 1.0}:
                    found["mean"] = value
                elif len(powers) == 1 and fact.beta == {tuple(powers): 1.0}:
                    found["rstd"] = value
        return Replace(site, False, found.get("mean"), found.get("rstd")) if found else None


def statistics(site: Site) -> list[Node]:
    """The reductions of a norm."""
    return [node for node in region(site.value, site.norm) if node.kind in REDUCTIONS]


def region_and_readers(plan: Plan, site: Site, alive: set[Node]) -> list[Node]:
    """The live nodes that compute statistics of the root of a site, in order."""
    key = site.fact.root.key()
    return [node for node in plan.graph.nodes if node in alive and node.outputs
            and key in plan.found.facts.get(node.outputs[0].index, ())]  # fmt: skip


def _reader(graph: Graph, site: Site, alive: set[Node]) -> str:
    nodes = region(site.value, site.norm)
    inside = set(nodes)
    for node in nodes:
        for value in node.outputs:
            if value is site.value:
                continue
            if value.kept:
                return f"{value.name}, inside the norm, is an output of the graph"
            for use in value.uses:
                if use not in inside and use in alive:
                    return f"{value.name}, inside the norm, is also read by {use.name or use.op}"
    return "a value inside the norm is read elsewhere"
