"""A residual addition and the norm behind it as one operator with both results: Llama, Qwen, DeepSeek, GPT-2, BERT.

    s = r + f; y = norm(s)      becomes      y, s = add_norm(r, f)

s stays available to its other readers; a view that only regroups the rows may stand between the two (OPT). Only where
the addition broadcasts nothing; of several norms of the same sum the first is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.plan import Abilities, Fused, Plan
from normfuse.residual import sum_of, summed, taken


@dataclass(frozen=True, slots=True)
class AddNorm:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each norm of a sum."""
        done = taken(plan)
        for site in plan.free():
            s = sum_of(site.norm.x)
            node = summed(s)
            if node is None or s in done:
                continue
            a, b = node.inputs
            outputs = (site.value, s)
            # results lie in memory as the first input does, which is not the same for either
            if any(plan.fuse(Fused("add_norm", (site,), inputs, outputs), self.can) for inputs in ((a, b), (b, a))):
                done.add(s)
