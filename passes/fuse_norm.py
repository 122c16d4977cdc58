"""Put one operator in the place of each norm that is spelled out.

    x -> square -> mean -> + eps -> rsqrt -> * x -> * w      becomes      x, w -> rms_norm

A norm is refused, with a code, when
- it has an order of roundings that no operator has (NF117), unless `numerics` is "fast";
- the runtime form cannot express it (the front end says why);
- a value inside it is read elsewhere, so that its reductions would be computed twice (NF116).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normfuse.graph import Graph, Node, Value
from normfuse.passes.remove_dead import live
from normfuse.plan import Plan, Replace
from normfuse.recognise import Norm, Refusal, Site
from normfuse.transfer import REDUCTIONS


@dataclass(frozen=True, slots=True)
class FuseNorm:
    """`numerics="fast"` also fuses norms whose roundings change; `expressible` is the front end's veto."""

    numerics: str = "exact"
    expressible: Callable[[Norm, Value], tuple[str, str] | None] = lambda norm, value: None

    def __call__(self, plan: Plan) -> None:
        """Add a `Replace` for each site that can be fused, a refusal for each that cannot."""
        chosen: list[Replace] = []
        for site in plan.found.sites:
            if site.is_op or site in plan.refused:
                continue
            why = self._veto(site)
            if why is None:
                chosen.append(Replace(site))
            else:
                plan.refuse(site, Refusal(why[0], site.label, why[1]))
        plan.replace.extend(self._paying(plan, chosen))

    def _veto(self, site: Site) -> tuple[str, str] | None:
        if site.norm.cast == "mixed" and self.numerics == "exact":
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
                plan.refuse(edit.site, Refusal("NF116", edit.site.label, _reader(plan.graph, edit.site, alive)))
            chosen = [edit for edit in chosen if edit not in stuck]


def region(site: Site) -> list[Node]:
    """The nodes between the root and the norm, last first."""
    stop = {site.norm.x, *site.norm.parameters()}
    todo, seen, out = [site.value], set(stop), []
    while todo:
        value = todo.pop()
        node = value.producer
        if value in seen or node is None:
            continue
        seen.add(value)
        if node not in out:
            out.append(node)
            todo.extend(node.inputs)
    return sorted(out, key=lambda node: -node.index)


def statistics(site: Site) -> list[Node]:
    """The reductions of a norm."""
    return [node for node in region(site) if node.kind in REDUCTIONS]


def _reader(graph: Graph, site: Site, alive: set[Node]) -> str:
    nodes = region(site)
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
