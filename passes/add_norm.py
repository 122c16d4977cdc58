"""A residual addition and the norm behind it as one operator with both results: Llama, Qwen, DeepSeek, GPT-2, BERT.

    s = r + f; y = norm(s)      becomes      y, s = add_norm(r, f)

    s32 = x.float() + r.float(); y = norm(s32); s = s32.to(x's type)      vLLM

is one operator too: its norm reads the sum before it is rounded. Only where x and r are of one narrow type, and nothing
but the norm and at most one cast, to that type, reads s32.

s stays available to its other readers; a view that only regroups the rows may stand between the two (OPT). Only where
the addition broadcasts nothing; of several norms of the same sum the first is taken.

    s = r + (x W + b)

takes in b, too, where a front end has an operator for that and nothing else reads x W + b (BERT, ViT, OPT).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from normfuse.graph import Node, Value
from normfuse.norm import Site, region
from normfuse.plan import Abilities, Fused, Plan
from normfuse.residual import is_bias, sum_of, summed, taken, uncast

NARROW = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class AddNorm:
    can: Abilities

    def __call__(self, plan: Plan) -> None:
        """Add a `Fused` for each norm of a sum."""
        # an operator that gives a sum and its norm keeps it
        operators = {site.value.producer.native for site in plan.found.sites if site.is_op and site.value.producer}
        norms = {v: site.norm.axes for site in plan.found.sites for v in (site.value, sum_of(site.value))}
        given = taken(plan)
        done = given | norms.keys()  # n + n*w is a norm, not an addition
        for site in plan.free():
            s = sum_of(site.norm.x)
            node = summed(s)
            if node is None or s in done or node.native in operators or biases(node, norms):
                continue
            wide = next((wide for wide in unrounded(site, s, node, done, given) if plan.fuse(wide, self.can)), None)
            if wide is not None:  # nothing else reads the sum
                given.add(wide.outputs[1])
                continue
            outputs = (site.value, s)
            if any(plan.fuse(Fused("add_norm", (site,), (x, r), outputs, x_bias=bias), self.can)
                   for x, r, bias in summands(node, done)):  # fmt: skip
                done.add(s)


def biases(node: Node, norms: dict[Value, tuple[int, ...]]) -> bool:
    """Whether an addition is of a norm's result and a bias of it, which stand apart where a cast is between them."""
    a, b = node.inputs
    return any(v in norms and is_bias(other, norms[v]) for v, other in ((a, b), (b, a)))


def summands(node: Node, known: set[Value]) -> Iterator[tuple[Value, Value, Value | None]]:
    """(x, residual, bias of x) of an addition: with a bias where there is one, and either summand as x.

    Results lie in memory as x does, which is not the same for either. A bias that ends a norm, of `known`, stays there.
    """
    a, b = node.inputs
    for x, residual in ((a, b), (b, a)):
        biased = None if x in known else _biased(x)
        if biased is not None:
            yield biased[0], residual, biased[1]
    yield a, b, None
    yield b, a, None


def _biased(value: Value) -> tuple[Value, Value] | None:
    """(x, bias) of a value that is their sum and that one addition reads."""
    node = value.producer
    if node is None or node.kind != "add" or value.kept or value.tainted or len(value.uses) != 1 or not value.shape:
        return None
    for x, bias in (node.inputs, node.inputs[::-1]):
        alike = x.shape == value.shape and x.dtype == bias.dtype
        if alike and bias.fixed and bias.shape == value.shape[-1:] and not x.fixed:
            return x, bias
    return None


def unrounded(site: Site, s: Value, node: Node, known: set[Value], given: set[Value]) -> Iterator[Fused]:
    """The operators that normalise a sum in float32 of narrow tensors and round it for its other readers.

    Where two norms share their statistics, each gets the sum anew, and one of them rounds it. A front end says whether
    a bias of x, too, is a narrow one that was cast.
    """
    if s.kept or s.dtype != "float32":
        return
    inside = set(region(site.value, site.norm))
    casts = [use for use in s.uses if use not in inside]
    if len(casts) > 1 or any(use.kind != "cast" for use in casts):
        return
    for a, b, bias in summands(node, known):
        x, r = uncast(a), uncast(b)
        narrow = casts[0].outputs[0] if casts else Value("", s.shape, x.dtype)
        if narrow in given:
            narrow = Value("", s.shape, narrow.dtype)
        if x is not r and x.dtype == r.dtype == narrow.dtype and x.dtype in NARROW:
            yield Fused("add_norm", (site,), (x, r), (site.value, narrow), round_sum=False, x_bias=bias)
