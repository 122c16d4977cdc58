"""Runs the passes over one neutral graph, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normfuse.config import Config
from normfuse.graph import Graph, Value
from normfuse.passes.fuse_norm import FuseNorm
from normfuse.passes.remove_dead import RemoveDead
from normfuse.placement import place
from normfuse.plan import Plan
from normfuse.norm import Norm
from normfuse.recognise import recognise

Veto = Callable[[Norm, Value], tuple[str, str] | None]


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a front end can put into its graph.

    `expressible` is its veto on a norm, as (code, message); `functions`: it can make a function of nodes;
    `statistics`: whether its operator for a norm also gives the mean and the reciprocal of the standard deviation.
    """

    expressible: Veto
    functions: bool = False
    statistics: Callable[[Norm], bool] = lambda norm: False


def plan(graph: Graph, config: Config, abilities: Abilities, rewrite: bool = True) -> Plan:
    """Recognise the norms of a graph, label their places and, for a rewrite, decide what to change."""
    out = Plan(graph, recognise(graph))
    place(graph, out.found.sites)
    if rewrite:
        fuse(out, config, abilities)
    return out


def passes(config: Config, can: Abilities) -> tuple[Callable[[Plan], None], ...]:
    """The passes of a configuration, in the order they run."""
    return FuseNorm(config.numerics, can.expressible, can.functions, can.statistics), RemoveDead()


def fuse(out: Plan, config: Config, abilities: Abilities) -> None:
    """Run the passes; a plan may be run again after verification has refused a site."""
    out.replace.clear()
    out.remove.clear()
    for step in passes(config, abilities):
        step(out)
