"""A residual addition and the norm behind it as one operator with both results: Llama, Qwen, DeepSeek, GPT-2, BERT.

    s = r + f; y = norm(s)      becomes      y, s = add_norm(r, f)

    s32 = x.float() + r.float(); y = norm(s32); s = s32.to(x's type)      vLLM

is one operator too: its norm reads the sum before it is rounded. Only where x and r are of one narrow type, and nothing
but the norm and at most one cast, to that type, reads s32.

s stays available to its other readers; a view that only regroups the rows may stand between the two (OPT). Only where
the addition broadcasts nothing; of several norms of the same sum the first is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.graph import Node, Value
from normfuse.norm import Site, region
from normfuse.plan import Abilities, Fused, Plan
from normfuse.residual import sum_of, summed, taken

NARROW = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class AddNorm:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each norm of a sum."""
        # an operator that gives a sum and its norm keeps it
        operators = {site.value.producer.native for site in plan.found.sites if site.is_op and site.value.producer}
        norms = {v for site in plan.found.sites for v in (site.value, sum_of(site.value))}
        done = taken(plan) | norms  # n + n*w is a norm, not an addition
        for site in plan.free():
            s = sum_of(site.norm.x)
            node = summed(s)
            if node is None or s in done or node.native in operators:
                continue
            wide = unrounded(site, s, node)
            if wide is not None and plan.fuse(wide, self.can):
                continue  # nothing else reads the sum
            a, b = node.inputs
            outputs = (site.value, s)
            # results lie in memory as the first input does, which is not the same for either
            if any(plan.fuse(Fused("add_norm", (site,), inputs, outputs), self.can) for inputs in ((a, b), (b, a))):
                done.add(s)


def unrounded(site: Site, s: Value, node: Node) -> Fused | None:
    """The operator that normalises a sum in float32 of narrow tensors and rounds it for its other readers."""
    if s.kept or s.dtype != "float32":
        return None
    inside = set(region(site.value, site.norm))
    casts = [use for use in s.uses if use not in inside]
    x, r = map(_uncast, node.inputs)
    if len(casts) > 1 or any(use.kind != "cast" for use in casts) or x is r:
        return None
    narrow = casts[0].outputs[0] if casts else Value("", s.shape, x.dtype)
    if not x.dtype == r.dtype == narrow.dtype or x.dtype not in NARROW:
        return None
    return Fused("add_norm", (site,), (x, r), (site.value, narrow), round_sum=False)


def _uncast(value: Value) -> Value:
    """What a value is a cast of, or the value, which an addition in torch may widen by itself."""
    node = value.producer
    return node.inputs[0] if node is not None and node.kind == "cast" and not node.inputs[0].tainted else value
