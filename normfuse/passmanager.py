"""Runs the passes over one neutral graph, in order."""

from __future__ import annotations

from collections.abc import Callable

from normfuse.config import Config
from normfuse.graph import Graph, Value
from normfuse.passes.fuse_norm import FuseNorm
from normfuse.passes.remove_dead import RemoveDead
from normfuse.placement import place
from normfuse.plan import Plan
from normfuse.recognise import Norm, recognise

Veto = Callable[[Norm, Value], tuple[str, str] | None]


def plan(graph: Graph, config: Config, expressible: Veto, rewrite: bool = True) -> Plan:
    """Recognise the norms of a graph, label their places and, for a rewrite, decide what to change."""
    out = Plan(graph, recognise(graph))
    place(graph, out.found.sites)
    if rewrite:
        fuse(out, config, expressible)
    return out


def passes(config: Config, expressible: Veto) -> tuple[Callable[[Plan], None], ...]:
    """The passes of a configuration, in the order they run."""
    return FuseNorm(config.numerics, expressible), RemoveDead()


def fuse(out: Plan, config: Config, expressible: Veto) -> None:
    """Run the passes; a plan may be run again after verification has refused a site."""
    out.replace.clear()
    out.remove.clear()
    for step in passes(config, expressible):
        step(out)
