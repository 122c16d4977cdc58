"""The norms of query and key as one operator: Qwen3, Gemma 3, OLMo 2.

    a = norm(q); b = norm(k)      becomes      a, b = qk_norm(q, k)

Only for two norms that meet in the same attention, are alike (kind, eps, offset, casts) and do not depend on each
other; of more than two, as in joint attention, each two in a row are a pair. Whether the readers of a can wait for k is
for the front end to say.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from normfuse.graph import Node
from normfuse.norm import Site
from normfuse.plan import Abilities, Fused, Plan


@dataclass(frozen=True, slots=True)
class QKPair:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each pair that pays."""
        groups: dict[tuple[Node, bool], list[Site]] = defaultdict(list)
        for site in plan.free():
            if site.placement != "qk" or site.attends is None:
                continue
            if self.can.leave is None or self.can.leave(site, True) is None:
                groups[site.attends, site.norm.weight is None].append(site)
        pairs = [pair for sites in groups.values() for pair in zip(sites[::2], sites[1::2], strict=False)]
        end = -1
        for a, b in sorted(pairs, key=lambda pair: pair[0].value.index):
            if a.value.index > end:  # pairs that interlace could each wait for the other
                if plan.fuse(Fused("qk_norm", (a, b), (a.norm.x, b.norm.x), (a.value, b.value)), self.can):
                    end = b.value.index
