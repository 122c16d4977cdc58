"""The norm of a latent as one operator that reads its slice where it lies: DeepSeek's MLA.

    c, k = split(projection); y = norm(c)      becomes      y = rms_norm(c), rows with a stride, no copy
"""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.plan import Abilities, Fused, Plan


@dataclass(frozen=True, slots=True)
class Latent:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each latent norm that is worth an operator of its own."""
        for site in plan.free():
            if site.placement == "latent" and (self.can.leave is None or self.can.leave(site, False) is None):
                plan.fuse(Fused("norm", (site,), (site.norm.x,), (site.value,)), self.can)
