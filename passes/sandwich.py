"""Norm, residual addition and the next norm as one operator: the sandwich of Gemma 2 and 3 and of GLM-4.

    n = norm1(f); s = r + n; y = norm2(s)      becomes      y, s = norm_add_norm(f, r)

Only where the place of the first norm is a sandwich, n is read by nothing else, the two norms are alike (kind, eps,
offset, casts) and the addition broadcasts nothing. s stays available; without a second norm see `norm_add`.
"""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.plan import Abilities, Fused, Plan
from normfuse.residual import added, taken


@dataclass(frozen=True, slots=True)
class Sandwich:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each sandwich."""
        free, done = plan.free(), taken(plan)
        readers = {site.norm.x: site for site in reversed(free)}
        for site in free:
            post = site.placement == "sandwich_post"
            pair = added(site.value, site.norm.x, site.norm.axes) if post else None
            if pair is None or pair[0] not in readers or pair[0] in done:
                continue
            second = readers[pair[0]]
            outputs = (second.value, pair[0])
            if plan.fuse(Fused("norm_add_norm", (site, second), (site.norm.x, pair[1]), outputs), self.can):
                done.update(outputs)
