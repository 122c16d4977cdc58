"""A plan: what the passes want changed in one graph. Front ends carry it out."""

from __future__ import annotations

from dataclasses import dataclass, field

from normfuse.graph import Graph, Node, Value
from normfuse.norm import Refusal, Site
from normfuse.recognise import Recognition


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """Compute the value of a site by one norm operator, or, `as_written`, by one function of its own nodes.

    `mean` and `rstd` are values besides it that the operator has to give: the mean and the reciprocal of the standard
    deviation, where these are read outside the norm.
    """

    site: Site
    as_written: bool = False
    mean: Value | None = None
    rstd: Value | None = None

    def computes(self) -> dict[Value, list[Value]]:
        """Each value that the replacement gives, with what it is then computed from."""
        norm = self.site.norm
        out = {v: [norm.x] for v in (self.mean, self.rstd) if v is not None}
        return out | {self.site.value: [norm.x, *norm.parameters()]}


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
