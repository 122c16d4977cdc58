"""Runs the passes over one neutral graph, in order."""

from __future__ import annotations

from collections.abc import Callable

from normfuse.config import Config
from normfuse.graph import Graph, Value
from normfuse.passes.fuse_norm import FuseNorm
from normfuse.passes.remove_dead import RemoveDead
from normfuse.placement import place
from normfuse.plan import Plan
from normfuse.norm import Norm
from normfuse.recognise import recognise

Veto = Callable[[Norm, Value], tuple[str, str] | None]


def plan(graph: Graph, config: Config, expressible: Veto, rewrite: bool = True, functions: bool = False) -> Plan:
    """Recognise the norms of a graph, label their places and, for a rewrite, decide what to change.

    `expressible` is the front end's veto on a norm, `functions` says that it can make functions of nodes.
    """
    out = Plan(graph, recognise(graph))
    place(graph, out.found.sites)
    if rewrite:
        fuse(out, config, expressible, functions)
    return out


def passes(config: Config, expressible: Veto, functions: bool = False) -> tuple[Callable[[Plan], None], ...]:
    """The passes of a configuration, in the order they run."""
    return FuseNorm(config.numerics, expressible, functions), RemoveDead()


def fuse(out: Plan, config: Config, expressible: Veto, functions: bool = False) -> None:
    """Run the passes; a plan may be run again after verification has refused a site."""
    out.replace.clear()
    out.remove.clear()
    for step in passes(config, expressible, functions):
        step(out)
