"""The norms of query and key as one operator: Qwen3, Gemma 3, OLMo 2.

    a = norm(q); b = norm(k)      becomes      a, b = qk_norm(q, k)

Only for two norms that meet in the same attention, are alike (kind, eps, offset, casts) and do not depend on each
other. Of more than two, as in joint attention, those next to each other are pairs: first two with a weight or two
without, since a value may be normalised as well, without one (Gemma 4). Whether the readers of a can wait for k is for
the front end to say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from math import isclose

from normfuse.graph import Graph, Node, Value
from normfuse.norm import Site
from normfuse.plan import Abilities, Fused, Plan


@dataclass(frozen=True, slots=True)
class QKPair:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each pair that pays."""
        meeting: dict[Node, list[Site]] = defaultdict(list)
        for site in plan.free():
            if site.placement != "qk" or site.attends is None:
                continue
            if self.can.leave is None or self.can.leave(site, True) is None:
                meeting[site.attends].append(site)
        taken: dict[Site, Fused] = {}
        for alike in (True, False):  # with a weight or without
            for sites in meeting.values():
                for a, b in combinations(sites, 2):
                    if a in taken or b in taken or ((a.norm.weight is None) == (b.norm.weight is None)) is not alike:
                        continue
                    if a.norm.kind != b.norm.kind or not isclose(a.norm.eps, b.norm.eps, rel_tol=1e-6):
                        continue  # no operator has two of them
                    edit = Fused("qk_norm", (a, b), (a.norm.x, b.norm.x), (a.value, b.value))
                    if not _linked(plan.graph, edit, taken.values()) and plan.fuse(edit, self.can):
                        taken[a] = taken[b] = edit


def _linked(graph: Graph, edit: Fused, others: Iterable[Fused]) -> bool:
    """Whether a pair stands in between the norms of another, and one of the two depends on the other: what may wait
    for one of them need not be what may wait for both."""
    first, last = (v.index for v in edit.outputs)
    between = [e for e in others if e.outputs[0].index < last and first < e.outputs[1].index]
    return any(_depends(graph, edit, other) or _depends(graph, other, edit) for other in between)


def _depends(graph: Graph, edit: Fused, other: Fused) -> bool:
    """Whether an operator reads a result of another one."""
    captured = [v for node in graph.nodes for v in node.outputs if v.captured is not None]
    todo, seen = [*edit.inputs, *edit.parameters()], set[Value]()
    while todo:
        value = todo.pop()
        if value in other.outputs:
            return True
        if value not in seen and value.producer is not None:
            todo += value.producer.inputs
            if value.producer.kind == "opaque":  # it may have sub-graphs
                todo += [v for v in captured if v.index < value.index]
        seen.add(value)
    return False
