"""Runs the passes over one neutral graph, in order."""

from __future__ import annotations

from collections.abc import Callable

from normfuse.config import Config
from normfuse.graph import Graph
from normfuse.norm import Refusal
from normfuse.passes.add_norm import AddNorm
from normfuse.passes.fuse_norm import FuseNorm, stuck
from normfuse.passes.latent import Latent
from normfuse.passes.norm_add import NormAdd
from normfuse.passes.qk_pair import QKPair
from normfuse.passes.remove_dead import RemoveDead, live
from normfuse.passes.sandwich import Sandwich
from normfuse.placement import place
from normfuse.plan import Abilities as Abilities, Plan
from normfuse.recognise import recognise


def plan(graph: Graph, config: Config, can: Abilities, rewrite: bool = True) -> Plan:
    """Recognise the norms of a graph, label their places and, for a rewrite, decide what to change."""
    out = Plan(graph, recognise(graph))
    for site in out.found.sites:
        site.is_op = site.is_op and not can.foreign(site)
    place(graph, out.found.sites)
    if rewrite:
        fuse(out, config, can)
    return out


def passes(config: Config, can: Abilities) -> tuple[Callable[[Plan], None], ...]:
    """The passes of a configuration, in the order they run: the widest fusion first."""
    beside = (Sandwich(can), NormAdd(can), AddNorm(can), QKPair(can), Latent(can)) if can.operator else ()
    return *beside, FuseNorm(can, config.numerics), RemoveDead()


def fuse(out: Plan, config: Config, can: Abilities) -> None:
    """Run the passes; a plan may be run again after verification has refused a site or broken a fusion."""
    alive = live(out.graph)
    dead = [site for site in out.found.sites if site.value.producer not in alive]
    while True:
        out.clear()
        out.left |= dict.fromkeys(dead, "nothing reads it")
        for step in passes(config, can):
            step(out)
        failed = stuck(out)
        if not failed:
            return
        for edit in failed:
            out.fail(edit, Refusal("NF116", edit.sites[0].label, "a value inside the norm is read elsewhere"))
