"""A norm and the residual addition behind it as one operator: OLMo 2.

    n = norm(f); s = r + n      becomes      s = norm_add(f, r)

Only where n is read by nothing else and the addition broadcasts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.plan import Abilities, Fused, Plan
from normfuse.residual import added, taken


@dataclass(frozen=True, slots=True)
class NormAdd:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each norm that is only added to something."""
        done = taken(plan)
        for site in plan.free():
            pair = added(site.value, site.norm.x, site.norm.axes)
            if pair is None or pair[0] in done:
                continue
            if plan.fuse(Fused("norm_add", (site,), (site.norm.x, pair[1]), (pair[0],)), self.can):
                done.add(pair[0])  # of two norms that are added the first takes the sum
