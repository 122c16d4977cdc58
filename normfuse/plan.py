"""A plan: what the passes want changed in one graph. Front ends carry it out."""

from __future__ import annotations

from dataclasses import dataclass, field

from normfuse.graph import Graph, Node
from normfuse.norm import Refusal, Site
from normfuse.recognise import Recognition


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """Compute the value of a site by one norm operator, or, `as_written`, by one function of its own nodes."""

    site: Site
    as_written: bool = False


@dataclass(slots=True, eq=False)
class Plan:
    """Edits to one graph and the refusals met on the way, by site where they belong to one."""

    graph: Graph
    found: Recognition
    replace: list[Replace] = field(default_factory=list)
    remove: list[Node] = field(default_factory=list)
    refused: dict[Site, Refusal] = field(default_factory=dict)

    def refuse(self, site: Site, why: Refusal) -> None:
        """Leave a site as it is, and say why."""
        self.refused[site] = why
